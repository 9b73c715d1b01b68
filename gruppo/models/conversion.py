"""Models that are converted to a folder of safetensors in the cache, once: GGUF files, and adapters with their base."""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gruppo.errors import UsageError, error_line
from gruppo.models.compatibility import wrap_model
from gruppo.models.pretrained import load_weights, loading_progress
from gruppo.models.weights import save_model
from gruppo.utils.files import file_sha256
from gruppo.utils.paths import cache_dir, is_dir, is_file, user_path
from gruppo.utils.progress import Progress

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def convert_gguf(file: Path, progress: Progress) -> Path:
    """Convert a GGUF file. Returns the folder.

    Raises UsageError if the file is incomplete, or scales positions, which transformers does not read.
    """
    name = f"{file.stem}-{file_sha256(file)[:16]}"

    def read() -> _Loaded:
        if _scales_positions(GGUFReader(file)):
            raise UsageError(
                f"model.name = {str(file)!r}: its positions are scaled, which transformers does not read from a GGUF "
                "file; use the model's safetensors files"
            )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        model = load_weights(str(file.parent), torch.float32, gguf_file=file.name)
        # transformers considers a dequantized GGUF model quantized, and cannot save its quantization config.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        return model, tokenizer

    return _converted(name, file, "use a complete .gguf file", f"Converting {file.name} to safetensors", read, progress)


def _scales_positions(file: GGUFReader) -> bool:
    """Whether a GGUF file scales rotary frequencies, by factors (Llama 3) or by a method (linear, YaRN)."""
    factors = any(tensor.name.startswith("rope_f") for tensor in file.tensors)
    return factors or any(
        name.endswith(".rope.scaling.type") and field.contents() != "none" for name, field in file.fields.items()
    )


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter in peft's format, without the model that it belongs to."""
    return is_file(folder / _CONFIG) and not is_file(folder / "config.json")


def adapter_base(folder: Path) -> str:
    """The name of the model that an adapter belongs to. Raises UsageError unless gruppo can merge the adapter."""
    where = f"model.name = {str(folder)!r}"
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        base, task = config.get("base_model_name_or_path"), config.get("task_type")
        revision = config.get("revision")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UsageError(f"{where}: {_CONFIG} cannot be read ({error}); save the adapter again with peft") from None
    if not isinstance(base, str) or not base:
        raise UsageError(f"{where}: {_CONFIG} names no base model; write its base_model_name_or_path there")
    if task not in {"CAUSAL_LM", None}:
        raise UsageError(f"{where}: is an adapter for {task}; use one with the task type CAUSAL_LM")
    if not is_file(folder / _WEIGHTS):
        raise UsageError(
            f"{where}: has no {_WEIGHTS}; adapters in pickles (.bin) are never read, because reading one can run any "
            "code: save the adapter again with peft"
        )
    return f"{base}@{revision}" if revision and not is_dir(user_path(base)) else base


def merge_adapter(folder: Path, base: str, progress: Progress, trust_remote_code: bool) -> Path:
    """Merge an adapter into the weights of its base model, in float32. Returns the folder of the merged model.

    The tokenizer is that of the adapter's folder if it has one, else that of the base. Raises UsageError if peft is not
    installed, or if the adapter does not fit the base.
    """
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise UsageError(
            f"model.name = {str(folder)!r}: is an adapter, which needs peft ({error}); run: pip install 'gruppo[lora]'"
        ) from error
    has_tokenizer = is_file(folder / "tokenizer_config.json")
    parts = [base, *(file_sha256(folder / name) for name in (_CONFIG, _WEIGHTS))]
    parts += [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in _files(base)]
    parts += [file_sha256(file) for file in _files(str(folder)) if has_tokenizer and "token" in file.name]
    name = f"{folder.name}-{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:16]}"

    def read() -> _Loaded:
        tokenizer = AutoTokenizer.from_pretrained(
            folder if has_tokenizer else base, trust_remote_code=trust_remote_code
        )
        for untie in (False, True):  # the output head and the embedding, if they are one tensor
            model = load_weights(base, torch.float32, trust_remote_code)
            if rows := _rows_of_embedding(folder / _WEIGHTS):
                model.resize_token_embeddings(rows)
            if untie:
                _untie(model)
            adapted = peft.PeftModel.from_pretrained(model, str(folder), torch_device="cpu", use_safetensors=True)
            if not hasattr(adapted, "merge_and_unload"):
                kind = adapted.active_peft_config.peft_type.value
                raise UsageError(
                    f"model.name = {str(folder)!r}: is an adapter of the type {kind}, "
                    "which cannot be merged into the weights of a model; use one that can, such as LoRA"
                )
            wanted = _trial(adapted)
            merged = adapted.merge_and_unload(safe_merge=True)
            if torch.allclose(_trial(merged), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max())):
                return merged, tokenizer
        raise UsageError(
            f"model.name = {str(folder)!r}: the merged model computes something else than the adapter on its base; "
            "use an adapter of other layers"
        )

    what = f"Merging the adapter {folder.name} into {base}"
    return _converted(name, folder, f"use an adapter of {base}", what, read, progress)


def _rows_of_embedding(weights: Path) -> int:
    """The size of the vocabulary in an adapter that brings a whole embedding or output head; 0 if it brings none."""
    with safe_open(weights, "pt") as tensors:
        whole = [name for name in tensors.keys() if name.endswith(_WHOLE)]  # noqa: SIM118  it is no mapping
        return int(tensors.get_slice(whole[0]).get_shape()[0]) if whole else 0


_WHOLE = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_in.weight", "embed_out.weight")


def _untie(model: Any) -> None:
    """Give the output head a weight of its own."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False


@torch.no_grad()
def _trial(model: Any) -> Tensor:
    """Logits of a few tokens."""
    size = model.get_input_embeddings().weight.shape[0]
    return torch.as_tensor(model.eval()(input_ids=torch.arange(1, 9)[None] % size).logits)


def _files(location: str) -> list[Path]:
    """The files of a local model, in order; none for a hub model, whose name and cached revision identify it."""
    return sorted(file for file in Path(location).glob("*") if file.is_file())


def _converted(name: str, source: Path, fix: str, what: str, read: Callable[[], _Loaded], progress: Progress) -> Path:
    """The folder `name` in the cache, built from the loaded model on first use: it appears complete or not at all."""
    target = cache_dir() / "models" / name
    if (target / "config.json").is_file() and (target / "model.safetensors").is_file():
        return target
    shutil.rmtree(target, ignore_errors=True)  # files were removed from it
    progress.note(f"{what}, in {target}; this happens once")
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
    try:
        with loading_progress(progress):
            model, tokenizer = read()
        save_model(wrap_model(model, tokenizer), building)
        try:
            building.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster, with the same result
                raise
    except UsageError:
        raise
    except Exception as error:  # third-party files can fail in any way
        raise UsageError(f"model.name = {str(source)!r}: cannot be converted ({error_line(error)}); {fix}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
        gc.collect()
    return target
