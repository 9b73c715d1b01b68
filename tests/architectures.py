"""Tiny models of every supported architecture.

The engine's contract tests and the trainer's invariance tests run on each of them. docs/models.md has the same table;
tests/models/test_loading.py checks that it lists the same architectures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

from gruppo.models.compatibility import wrap_model
from gruppo.models.policy import LanguageModel
from gruppo.models.weights import named_weights
from tests import conftest
from tests.conftest import END, make_tokenizer

_COMMON: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "eos_token_id": END,
    "pad_token_id": END,
    "bos_token_id": None,
    "initializer_range": 0.3,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 48}
_MULTI = {**_COMMON, "num_key_value_heads": 4, "intermediate_size": 48}
_SLIDING = {**_GROUPED, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}


def _make(config: str, settings: dict[str, Any], **overrides: Any) -> Callable[[], PreTrainedConfig]:
    return lambda: getattr(transformers, config)(**{**settings, **overrides})


# name -> (features that it covers, config)
ARCHITECTURES: dict[str, tuple[str, Callable[[], PreTrainedConfig]]] = {
    "llama": ("grouped-query attention, tied embeddings", _make("LlamaConfig", _GROUPED, tie_word_embeddings=True)),
    "llama-untied": ("multi-head attention, untied embeddings, biases", _make(
        "LlamaConfig", _MULTI, tie_word_embeddings=False, attention_bias=True, mlp_bias=True)),
    "qwen2": ("query, key and value biases", _make("Qwen2Config", _GROUPED, tie_word_embeddings=True)),
    "qwen3": ("query and key norms", _make("Qwen3Config", _GROUPED, head_dim=16)),
    "gemma2": ("soft caps on attention scores and logits, sliding windows", _make(
        "Gemma2Config", _SLIDING, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
    "gemma3": ("sliding windows, scaled embeddings, two RoPE settings", _make(
        "Gemma3TextConfig", _SLIDING, query_pre_attn_scalar=8)),
    "phi3": ("fused projections, sliding window", _make("Phi3Config", _GROUPED, sliding_window=5)),
    "mistral": ("sliding window in every layer", _make("MistralConfig", _GROUPED, sliding_window=3)),
    "gpt-neox": ("parallel residual, partial RoPE, untied embeddings", _make(
        "GPTNeoXConfig", _COMMON, intermediate_size=48, rotary_pct=0.5)),
    "opt": ("learned positions, biases, tied embeddings", _make(
        "OPTConfig", _COMMON, ffn_dim=48, word_embed_proj_dim=32)),
    "gpt2": ("learned positions, transposed weights, tied embeddings", _make(
        "GPT2Config", {}, vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=128, eos_token_id=END,
        bos_token_id=None, initializer_range=0.3)),
    "phi": ("biased output head", _make("PhiConfig", _MULTI, partial_rotary_factor=0.5)),
    "granite": ("scaled logits, residuals and embeddings", _make(
        "GraniteConfig", _GROUPED, logits_scaling=2.0, embedding_multiplier=3.0, residual_multiplier=0.5,
        attention_multiplier=0.2)),
    "cohere": ("scaled logits, parallel residual", _make("CohereConfig", _GROUPED, logit_scale=0.25)),
    "deepseek-v3": ("latent attention with values narrower than keys, mixture of experts", _make(
        "DeepseekV3Config", _MULTI, q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8,
        v_head_dim=6, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=1,
        moe_intermediate_size=16, first_k_dense_replace=1)),
    "mixtral": ("mixture of experts", _make(
        "MixtralConfig", _GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
    "qwen3-moe": ("mixture of experts, query and key norms", _make(
        "Qwen3MoeConfig", _GROUPED, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        decoder_sparse_step=1, mlp_only_layers=[])),
    "gpt-oss": ("attention sinks, sliding window, mixture of experts", _make(
        "GptOssConfig", _SLIDING, num_local_experts=4, num_experts_per_tok=2, rope_parameters={
            "rope_type": "default", "rope_theta": 10000.0})),
}  # fmt: skip


def make_architecture(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> LanguageModel:
    """A tiny model of the architecture `name` with random weights, including biases and attention sinks."""
    torch.manual_seed(seed)
    config = ARCHITECTURES[name][1]()
    # In transformers 5.16 the default kernel ignores soft caps; eager attention is correct in all versions.
    kernel = "eager" if getattr(config, "attn_logit_softcapping", None) else None
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=kernel)
    with torch.no_grad():
        for tensor in named_weights(model).values():
            if tensor.ndim == 1:  # biases start at 0 and norms at 1, which would hide a forgotten bias
                tensor.add_(0.1 * torch.randn_like(tensor))
    model.to(conftest.device, torch.float64 if dtype == torch.float64 else torch.float32)
    return wrap_model(model, make_tokenizer(), dtype)
