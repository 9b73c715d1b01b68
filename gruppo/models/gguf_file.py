"""Writes a model as a GGUF file, which llama.cpp and Ollama read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quant_shape_to_byte_shape
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gruppo.errors import UsageError
from gruppo.models.gguf_vocabulary import gguf_vocabulary
from gruppo.models.weights import named_weights

# dtype -> types of the matrices in a file, and of the file; vectors are float32
DTYPES = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
# transformers' name of an architecture -> llama.cpp's
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}


def require_gguf(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], dtype: str) -> None:
    """Raise UsageError unless a model of this config can be written as a GGUF file that computes the same.

    `ends`: all ids that end a turn. `dtype`: a key of DTYPES.
    """
    if problem := _problem(config):
        raise UsageError(
            f"--gguf: {problem}; export without --gguf, and convert the folder with llama.cpp's convert_hf_to_gguf.py"
        )
    block, _ = gguf.GGML_QUANT_SIZES[DTYPES[dtype][0]]
    widths = (config.hidden_size, config.intermediate_size, config.num_attention_heads * _head_size(config))
    if odd := [width for width in widths if width % block]:
        raise UsageError(
            f"--dtype {dtype}: needs matrices with rows of a multiple of {block} values, and the model has rows of "
            f"{odd[0]}; write --dtype bfloat16"
        )
    gguf_vocabulary(tokenizer, ends, config.vocab_size)


def unread_gguf(config: PreTrainedConfig) -> str | None:
    """What transformers does not read from a GGUF file of a model with this config, in words, or None.

    llama.cpp reads all of it.
    """
    if (scaling := _rope(config).get("rope_type", "default")) != "default":
        return f"positions scaled by {scaling!r}"
    if config.model_type == "qwen3" and _head_size(config) != 128:
        return f"heads of {_head_size(config)} values in a Qwen3"
    return None


def write_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], path: Path, dtype: str, name: str
) -> None:
    """Write a model that `require_gguf` accepts as a GGUF file.

    The matrices, embedding and output head included, get the type that `dtype` names in `DTYPES`; vectors are float32.
    `name`: of the model, for people. Raises UsageError if a weight does not fit into float16.
    """
    kind, file_type = DTYPES[dtype]
    architecture = _ARCHITECTURES[model.config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_config(writer, model.config)
    gguf_vocabulary(tokenizer, ends, model.config.vocab_size).write(writer)
    kinds = {}
    for tensor_name, tensor in _tensors(model, architecture):
        kinds[tensor_name] = kind if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
        shape = quant_shape_to_byte_shape(tensor.shape, kinds[tensor_name])
        writer.add_tensor_info(tensor_name, shape, np.dtype(np.uint8), int(np.prod(shape)), kinds[tensor_name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor_name, tensor in _tensors(model, architecture):
            values = tensor.to(torch.float32).contiguous().numpy()
            with np.errstate(over="ignore"):
                data = gguf.quants.quantize(values, kinds[tensor_name])
            if dtype == "float16" and not np.isfinite(data).all():
                raise UsageError(f"--dtype float16: {tensor_name} has values beyond 65,504; write --dtype bfloat16")
            writer.write_tensor_data(data)
    finally:
        writer.close()


def _problem(config: PreTrainedConfig) -> str | None:
    """The reason why a GGUF file cannot hold a model of this config, or None."""
    name = config.model_type
    if name not in _ARCHITECTURES:
        return f"architecture {name!r} cannot be written (those that can: {', '.join(_ARCHITECTURES)})"
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        return f"{name!r} with attention_bias or mlp_bias cannot be written"
    if config.hidden_act != "silu":
        return f"{name!r} with hidden_act = {config.hidden_act!r} cannot be written, only with 'silu'"
    window = getattr(config, "sliding_window", None)
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ("sliding_attention",))
    if window is not None and windowed and window < config.max_position_embeddings:
        return f"{name!r} with a sliding window of {window} tokens cannot be written"
    scaling = _rope(config).get("rope_type", "default")
    known = ("default", "llama3") if _ARCHITECTURES[name] == gguf.MODEL_ARCH.LLAMA else ("default",)
    if scaling not in known or _rope(config).get("partial_rotary_factor", 1) != 1:
        return f"{name!r} with positions scaled by {scaling!r} cannot be written, only with {' or '.join(known)}"
    return None


def _rope(config: PreTrainedConfig) -> Mapping[str, Any]:
    rope: Mapping[str, Any] = config.rope_parameters
    return rope


def _head_size(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _add_config(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    size = _head_size(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def _tensors(model: PreTrainedModel, architecture: gguf.MODEL_ARCH) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the file by name. A head that is tied to the embedding is left out, as llama.cpp expects."""
    config = model.config
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    factors = _frequency_factors(config, model)
    if factors is not None:
        yield "rope_freqs.weight", factors
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in named_weights(model).items():
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known is not None, name
        layer = name.split(".")[-2]
        if architecture == gguf.MODEL_ARCH.LLAMA and layer in heads:
            yield known, _paired(tensor, heads[layer])
        else:
            yield known, tensor


def _paired(rows: Tensor, heads: int) -> Tensor:
    """The rows of a query or key projection in llama.cpp's order for Llama.

    transformers rotates row i of a head with row i + size/2, llama.cpp rotates neighbors.
    """
    pairs: Tensor = rows.unflatten(0, (heads, 2, -1)).transpose(1, 2)
    return pairs.flatten(0, 2)


def _frequency_factors(config: PreTrainedConfig, model: Any) -> Tensor | None:
    """What llama.cpp divides the rotary frequencies by; None if they are not scaled."""
    if _rope(config).get("rope_type", "default") == "default":
        return None
    size = _head_size(config)
    plain = float(_rope(config)["rope_theta"]) ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    factors: Tensor = plain / model.model.rotary_emb.inv_freq.double()
    return factors.float()
