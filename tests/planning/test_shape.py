"""Weights, operations and caches of a model, against transformers and torch's own counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from gruppo.errors import UsageError
from gruppo.planning.shape import model_shape, shape_of_config, typical_shape

_LLAMA: dict[str, Any] = {"vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8,
                          "num_key_value_heads": 2, "intermediate_size": 1536}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_LLAMA, "tie_word_embeddings": False}),
    "llama-tied": ("LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**_LLAMA, "head_dim": 128}),
    "gemma3": ("Gemma3TextConfig", {**_LLAMA, "head_dim": 128}),
    "gpt2": ("GPT2Config", {"vocab_size": 4096, "n_embd": 512, "n_layer": 3, "n_head": 8, "n_positions": 1024}),
    "gpt-neox": ("GPTNeoXConfig", {"vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 3,
                                   "num_attention_heads": 8, "intermediate_size": 2048}),
    "opt": ("OPTConfig", {"vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8,
                          "ffn_dim": 2048, "word_embed_proj_dim": 512, "max_position_embeddings": 1024}),
    "mixtral": ("MixtralConfig", {**_LLAMA, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3-moe": ("Qwen3MoeConfig", {**_LLAMA, "num_experts": 16, "num_experts_per_tok": 4,
                                     "moe_intermediate_size": 256, "mlp_only_layers": [0]}),
    "qwen2-moe": ("Qwen2MoeConfig", {**_LLAMA, "num_experts": 16, "num_experts_per_tok": 4,
                                     "moe_intermediate_size": 256, "shared_expert_intermediate_size": 1024}),
}  # fmt: skip


def config_of(name: str) -> transformers.PreTrainedConfig:
    kind, settings = CONFIGS[name]
    config: transformers.PreTrainedConfig = getattr(transformers, kind)(**settings)
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_counted_as_transformers_counts_them(name: str) -> None:
    """Within 1%: norms and biases are left out."""
    config = config_of(name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    weights = sum(parameter.numel() for parameter in model.parameters())
    shape = shape_of_config(json.loads(config.to_json_string(use_diff=False)), name)
    assert shape.parameters == pytest.approx(weights, rel=0.01)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt-neox"])
def test_operations_of_a_forward_pass_are_those_that_torch_counts(name: str) -> None:
    """Eager attention computes all pairs of tokens, so every token attends to as many as there are."""
    config, tokens = config_of(name), 96
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    shape = shape_of_config(json.loads(config.to_json_string(use_diff=False)), name)
    assert tokens * shape.forward_flops(tokens) == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_the_cache_has_the_bytes_of_transformers_cache() -> None:
    config = config_of("qwen3")
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    cache = model(torch.zeros(1, 7, dtype=torch.long), use_cache=True).past_key_values
    held = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    assert 7 * shape_of_config(config.to_dict(), "x").cache_bytes == held


def test_a_pass_reads_the_experts_that_its_tokens_choose() -> None:
    shape = shape_of_config(config_of("mixtral").to_dict(), "x")
    expert = 3 * 512 * 1536
    rest = shape.parameters - 3 * 8 * expert
    assert shape.expert_parameters == 3 * 8 * expert
    assert shape.read_bytes(1) == pytest.approx(2 * (rest + 3 * 2 * expert))  # two of eight experts in each layer
    assert shape.read_bytes(2) == pytest.approx(2 * (rest + 3 * 3.5 * expert))  # 8 (1 - (6/8)²) = 3.5
    assert shape.read_bytes(10_000) == pytest.approx(shape.weight_bytes)
    dense = shape_of_config(config_of("llama").to_dict(), "x")
    assert dense.read_bytes(1) == dense.weight_bytes


def test_adapters_have_the_weights_that_peft_gives_them() -> None:
    peft = pytest.importorskip("peft")
    config = config_of("llama")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    assert shape_of_config(config.to_dict(), "x").lora_parameters(4) == trained


@pytest.mark.parametrize("parameters", [135e6, 7.6e9, 70e9])
def test_a_typical_shape_has_the_weights_it_was_asked_for(parameters: float) -> None:
    shape = typical_shape(parameters)
    assert shape.parameters == parameters
    assert 12 * shape.layers * shape.hidden**2 == pytest.approx(parameters, rel=0.25)
    assert shape.heads * shape.head_dim == shape.hidden


def test_a_typical_mixture_reads_its_active_weights_for_one_token() -> None:
    shape = typical_shape(30e9, 3e9)
    assert shape.read_bytes(1) == pytest.approx(2 * 3e9)


def test_a_model_is_found_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config_of("llama").to_json_string())
    assert model_shape(str(tmp_path)).layers == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read"), ("[]", "holds no table"), ("{}", "has no number num_hidden_layers"),
     (json.dumps({**_LLAMA, "kv_lora_rank": 4}), "latent attention"),
     (json.dumps({**_LLAMA, "hidden_size": "wide"}), "has no number hidden_size")],
)  # fmt: skip
def test_an_unusable_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        model_shape(str(tmp_path))
    assert "parameters" in str(caught.value)


def test_names_without_a_config_are_refused() -> None:
    for name in ("smollm2-135m-instruct", "model.gguf", "no-such-folder"):
        with pytest.raises(UsageError, match=f'"{name}": is no hub name and no folder'):
            model_shape(name)


def test_impossible_numbers_of_weights_are_refused() -> None:
    with pytest.raises(UsageError, match="must be a number of weights between"):
        typical_shape(0)
    with pytest.raises(UsageError, match="must be between"):
        typical_shape(7e9, 8e9)
