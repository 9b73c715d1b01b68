"""Tiny models of every architecture that can be written as a GGUF file."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from tests.odd_tokenizers import byte_level

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip

# name -> (config, its settings)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-untied": ("LlamaConfig", {"tie_word_embeddings": False, "head_dim": 32}),
    "llama3": ("LlamaConfig", {"rope_parameters": _LLAMA3}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 128}),
    "qwen3-small-heads": ("Qwen3Config", {"head_dim": 32}),
}


def make_config(name: str, **changes: Any) -> PreTrainedConfig:
    """The config of a model of MODELS. There are more embeddings than tokens, as in many published models."""
    tokenizer = byte_level()
    kind, settings = MODELS[name]
    ids = {f"{mark}_token_id": getattr(tokenizer, f"{mark}_token_id") for mark in ("bos", "eos", "pad")}
    config: PreTrainedConfig = getattr(transformers, kind)(
        **{**_COMMON, **ids, "vocab_size": len(tokenizer) + 5, **settings, **changes}
    )
    return config


def make_model(name: str) -> PreTrainedModel:
    """A model of MODELS with random weights, those of norms and biases included."""
    torch.manual_seed(0)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(make_config(name))
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim == 1:
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model.eval()
