"""Checks whether an architecture can be run, by its config and by a trial on a few tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from gruppo.errors import UsageError, error_line
from gruppo.models.attention.backends import BACKENDS, choose_backend
from gruppo.models.attention.interface import CapturingAttention, attention_named
from gruppo.models.fused_decoder import FusedBody
from gruppo.models.policy import LanguageModel
from gruppo.models.precision import prepare_for_float64
from gruppo.models.weights import damage_of
from gruppo.utils.progress import NullProgress, Progress

# Layer types whose only state is their keys and values. Others (convolutions, recurrences) would leak from one sequence
# of a packed row into the next.
_LAYER_TYPES = {"full_attention", "sliding_attention"}


def wrap_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype = torch.float32,
    attention: str = "auto",
    progress: Progress | None = None,
) -> LanguageModel:
    """Wrap a transformers model for gruppo. `attention`: the name of a backend, see `choose_backend`.

    Dropout is turned off, so that sampling and training use the same distribution. The embedding of the padding token
    gets a gradient, which torch would leave out, because chat templates end turns with this token.

    A trial on a few tokens compares gruppo's numbers for packed sequences with a shared prompt to transformers' numbers
    for each sequence separately. Raises UsageError, naming the architecture, if they differ.
    """
    if problem := unsupported(model.config, trust_remote_code=model.is_remote_code()):
        raise UsageError(f"model: {problem}")
    if dtype == torch.float64:
        prepare_for_float64(model)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    ends, context = eos_ids(model.generation_config, model.config, tokenizer), context_length(model.config)
    policy = LanguageModel(model.eval(), tokenizer, ends, context, model.device, dtype)
    return _tried(policy, attention, progress or NullProgress())


_TRIAL_PROMPT, _TRIAL_COMPLETIONS = 3, (4, 2)


@torch.no_grad()
def _tried(policy: LanguageModel, attention: str, progress: Progress) -> LanguageModel:
    """Set `head_scale`, `head_softcap`, `cache_bytes`, `attention` and `body` from a trial.

    Raises UsageError if the numbers differ from those of transformers.
    """
    model, name = policy.model, f"{policy.model.config.model_type} ({type(policy.model).__name__})"
    if getattr(model.get_output_embeddings(), "weight", None) is None:
        raise UsageError(f"model: architecture {name} has no linear output head; use another model")
    layout = [(_TRIAL_PROMPT, _TRIAL_COMPLETIONS)]
    tried = BACKENDS["cpu" if policy.device.type == "cpu" else "sdpa"]
    plan = CapturingAttention(tried(layout, policy.device))
    length = _TRIAL_PROMPT + sum(_TRIAL_COMPLETIONS)
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.tensor([[(7 * place + 5) % vocabulary for place in range(length)]], device=policy.device)
    prompt, rows, start = list(range(_TRIAL_PROMPT)), [], _TRIAL_PROMPT
    for completion in _TRIAL_COMPLETIONS:
        rows.append([*prompt, *range(start, start + completion)])
        start += completion
    positions = torch.tensor([[*prompt, *(place for row in rows for place in range(len(prompt), len(row)))]])
    positions = positions.to(policy.device)
    try:
        with attention_named(policy.configs, "eager"):  # transformers 5.16's faster kernels ignore soft caps
            expected = torch.cat([model(input_ids=ids[:, row], use_cache=False).logits[0] for row in rows])
    except Exception as error:  # third-party code can raise anything
        raise UsageError(
            f"model: architecture {name} fails in transformers ({error_line(error)}); fix the model"
        ) from error
    if not bool(torch.isfinite(expected).all()):
        raise UsageError(f"model: {_why_not_finite(model, name)}")
    try:
        hidden = policy.hidden_states(ids, positions, plan)[0]
    except Exception as error:
        raise UsageError(
            f"model: architecture {name} does not run on gruppo's attention ({error_line(error)}); use another model"
        ) from error
    text = model.config.get_text_config()
    window = int(getattr(text, "sliding_window", None) or 0)
    passed = getattr(text, "layer_types", None) or not getattr(text, "use_sliding_window", True)
    if 0 < window < policy.context and not passed and any(layer.window is None for layer in plan.layers):
        raise UsageError(
            f"model: architecture {name} has a sliding window of {window} tokens, but does not pass it to its "
            "attention function; use another model"
        )
    near = 1e-3 * (1 + float(expected.abs().max()))
    places = [place for row in rows for place in row]

    def agrees(candidate: LanguageModel, hidden: Tensor) -> bool:
        logits = replace(candidate, dtype=hidden.dtype).head.logits(hidden[places])
        return float((logits - expected).abs().max()) < near

    for scale, softcap in _head_settings(text):
        candidate = replace(policy, head_scale=scale, head_softcap=softcap)
        if plan.captured and agrees(candidate, hidden):
            cached = [tensor for _, key, value in plan.captured.values() for tensor in (key, value)]
            width = sum(tensor.shape[0] * tensor.shape[-1] for tensor in cached)
            backend, problems = choose_backend(attention, policy.device, policy.dtype, plan)
            if problems:
                progress.note(f"Note: attention runs on {backend.name} ({'; '.join(problems)})")
            size = width * policy.cache_dtype.itemsize
            candidate = replace(candidate, cache_bytes=size, attention=backend)
            if backend.name != "cpu" or not FusedBody.fits(model.get_decoder()):
                return candidate
            fused = replace(candidate, body=FusedBody(model.get_decoder(), plan.layers, candidate.generation))
            again = backend(layout, policy.device)
            same = agrees(candidate, replace(fused, dtype=hidden.dtype).hidden_states(ids, positions, again)[0])
            return fused if same else candidate
    raise UsageError(
        f"model: architecture {name} gives different numbers with gruppo's attention than with transformers' (its "
        "tokens see more than the tokens before them, or its output head is not linear); use another model"
    )


def _why_not_finite(model: PreTrainedModel, name: str) -> str:
    """Why the logits that transformers computes are not finite."""
    if damage := damage_of(model):
        return f"its weights are damaged: {damage}; use an undamaged copy"
    largest, weight = max(model.named_parameters(), key=lambda pair: float(pair[1].detach().abs().max()))
    return (
        f"architecture {name} gives logits that are not finite in transformers too, although all weights are finite. "
        f"The largest weight is {float(weight.detach().abs().max()):.3g} in {largest}; if the original has no such "
        "weight, the file is damaged: use an undamaged copy"
    )


def _head_settings(config: Any) -> list[tuple[float, float | None]]:
    """Possible scales and soft caps of the logits under a config (Cohere and Granite scale, Gemma caps)."""
    factors = [getattr(config, name, None) for name in ("logit_scale", "logits_scaling")]
    scales = [1.0, *(scale for factor in factors if factor for scale in (float(factor), 1 / float(factor)))]
    cap = getattr(config, "final_logit_softcapping", None)
    return [(scale, softcap) for softcap in ([float(cap), None] if cap else [None]) for scale in scales]


def _ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The RoPE settings of a config: one, or one per layer type."""
    settings = getattr(config.get_text_config(), "rope_parameters", None) or {}
    nested = [value for value in settings.values() if isinstance(value, dict)]
    return nested or [settings]


def context_length(config: PreTrainedConfig) -> int:
    """Maximum number of tokens of a sequence.

    Models with long RoPE are used up to their original length. Beyond it, long RoPE changes all positions of a
    sequence, so the numbers of a token would depend on other sequences of its batch.
    """
    text = config.get_text_config()
    context = int(getattr(text, "max_position_embeddings", 0) or 2**31)
    for rope in _ropes(config):
        if rope.get("rope_type") == "longrope":
            original = rope.get("original_max_position_embeddings")
            context = min(
                context, int(getattr(text, "original_max_position_embeddings", original) or original or context)
            )
    return context


def eos_ids(*sources: Any) -> tuple[int, ...]:
    """All token ids that end a turn, according to a model's generation config, its config and its tokenizer."""
    ids: set[int] = set()
    for source in sources:
        value = getattr(source, "eos_token_id", None)
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(sorted(ids))


def unsupported(config: PreTrainedConfig, trust_remote_code: bool = False) -> str | None:
    """The reason, naming the architecture, why a model with this config cannot be run, or None. Needs no weights."""
    name, text = config.model_type, config.get_text_config()
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    custom_class = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if trust_remote_code and custom_class:
        kind = get_class_from_dynamic_module(custom_class, str(config.name_or_path))
    if kind is None or getattr(text, "is_encoder_decoder", False):
        return f"architecture {name!r} is not a causal language model; use one (Llama, Qwen, Gemma, Mistral, Phi, …)"
    if not kind._supports_attention_backend:
        return (
            f"architecture {name!r} does not compute its attention through transformers' attention interface; use a "
            "model that does (Llama, Qwen, Gemma, Mistral, Phi, …)"
        )
    unknown = sorted(set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES)
    if unknown:
        return f"architecture {name!r} has layers of type {unknown[0]!r}, which gruppo cannot run; use another model"
    for rope in _ropes(config):
        if rope.get("rope_type") == "dynamic":
            return "rope_type 'dynamic' makes positions depend on the lengths of other sequences; use another model"
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantized, and quantized weights cannot be trained; use the unquantized model"
    return None
