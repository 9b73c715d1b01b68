"""Which architectures can be run, shown by a trial on a few tokens."""

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
from gruppo.models.attention.interface import attention_named
from gruppo.models.attention.shared_prefix import CapturingAttention, SharedPrefixAttention
from gruppo.models.fused_decoder import FusedBody
from gruppo.models.policy import LanguageModel
from gruppo.models.precision import prepare_for_float64

# Kinds of layers whose state is their keys and values alone; others (convolutions, recurrences) would leak from one
# sequence of a packed row into the next.
_LAYER_TYPES = {"full_attention", "sliding_attention"}


def wrap_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """A model in memory as gruppo uses it. Dropout is off: what samples and what is trained is one distribution. A
    padding token's embedding has its gradient, which torch would leave out: chat templates end turns with that token.

    The model is tried on a few tokens: what gruppo makes of them, packed with a shared prompt, has to be what
    transformers makes of each sequence alone. Raises UsageError, naming the architecture, where it is not.
    """
    if problem := unsupported(model.config, trust_remote_code=model.is_remote_code()):
        raise UsageError(f"model: {problem}")
    if dtype == torch.float64:
        prepare_for_float64(model)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    ends, context = eos_ids(model, tokenizer), context_length(model.config)
    return _tried(LanguageModel(model.eval(), tokenizer, ends, context, model.device, dtype))


_TRIAL_PROMPT, _TRIAL_COMPLETIONS = 3, (4, 2)


@torch.no_grad()
def _tried(policy: LanguageModel) -> LanguageModel:
    """The same with `head_scale`, `head_softcap` and `cache_bytes` as a trial shows them; UsageError where the numbers
    are not transformers' own."""
    model, name = policy.model, f"{policy.model.config.model_type} ({type(policy.model).__name__})"
    if getattr(model.get_output_embeddings(), "weight", None) is None:
        raise UsageError(f"model: architecture {name} has no linear output head; use another model")
    plan = CapturingAttention([(_TRIAL_PROMPT, _TRIAL_COMPLETIONS)])
    length = _TRIAL_PROMPT + sum(_TRIAL_COMPLETIONS)
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.tensor([[(7 * place + 5) % vocabulary for place in range(length)]], device=policy.device)
    prompt, rows, start = list(range(_TRIAL_PROMPT)), [], _TRIAL_PROMPT
    for own in _TRIAL_COMPLETIONS:
        rows.append([*prompt, *range(start, start + own)])
        start += own
    positions = torch.tensor([[*prompt, *(place for row in rows for place in range(len(prompt), len(row)))]])
    positions = positions.to(policy.device)
    try:
        with attention_named(policy.configs, "eager"):  # in transformers 5.16 its quicker kernels leave soft caps out
            expected = torch.cat([model(input_ids=ids[:, row], use_cache=False).logits[0] for row in rows])
    except Exception as error:  # another project's module: anything can be wrong with it
        raise UsageError(f"model: architecture {name} fails by itself ({error_line(error)}); mend the model") from error
    try:
        hidden = policy.hidden_states(ids, positions, plan)[0]
    except Exception as error:
        raise UsageError(
            f"model: architecture {name} does not run on gruppo's attention ({error_line(error)}); use another model"
        ) from error
    text = model.config.get_text_config()
    window = int(getattr(text, "sliding_window", None) or 0)
    told = getattr(text, "layer_types", None) or not getattr(text, "use_sliding_window", True)
    if 0 < window < policy.context and not told and any(layer.window is None for layer in plan.layers):
        raise UsageError(
            f"model: architecture {name} has a sliding window of {window} tokens that it does not tell its attention "
            "of; use another model"
        )
    near = 1e-3 * (1 + float(expected.abs().max()))
    places = [place for row in rows for place in row]

    def agrees(made: LanguageModel, hidden: Tensor) -> bool:
        logits = replace(made, dtype=hidden.dtype).head.logits(hidden[places])
        return float((logits - expected).abs().max()) < near

    for scale, softcap in _head_settings(text):
        made = replace(policy, head_scale=scale, head_softcap=softcap)
        if plan.captured and agrees(made, hidden):
            width = sum(each.shape[0] * each.shape[-1] for pair in plan.captured.values() for each in pair)
            size = torch.promote_types(policy.dtype, torch.float32).itemsize
            made = replace(made, cache_bytes=size * width)
            if not FusedBody.fits(model.get_decoder()):
                return made
            fused = replace(made, body=FusedBody(model.get_decoder(), plan.layers, made.generation))
            again = SharedPrefixAttention([(_TRIAL_PROMPT, _TRIAL_COMPLETIONS)])
            same = agrees(made, replace(fused, dtype=hidden.dtype).hidden_states(ids, positions, again)[0])
            return fused if same else made
    raise UsageError(
        f"model: architecture {name} gives other numbers on gruppo's attention than on transformers' own (its tokens "
        "see something besides the tokens before them, or its output head is not a linear one); use another model"
    )


def _head_settings(config: Any) -> list[tuple[float, float | None]]:
    """Scales and soft caps of the logits that a config can mean (Cohere and Granite scale, Gemma caps)."""
    factors = [getattr(config, name, None) for name in ("logit_scale", "logits_scaling")]
    scales = [1.0, *(scale for factor in factors if factor for scale in (float(factor), 1 / float(factor)))]
    cap = getattr(config, "final_logit_softcapping", None)
    return [(scale, softcap) for softcap in ([float(cap), None] if cap else [None]) for scale in scales]


def _ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The rope settings of a config: one, or one for each kind of layer."""
    settings = getattr(config.get_text_config(), "rope_parameters", None) or {}
    nested = [each for each in settings.values() if isinstance(each, dict)]
    return nested or [settings]


def context_length(config: PreTrainedConfig) -> int:
    """The most tokens that a sequence may have. Long ropes change all positions of a sequence beyond their original
    length, so that a token's numbers would depend on its neighbours': they are used up to there."""
    text = config.get_text_config()
    context = int(getattr(text, "max_position_embeddings", 0) or 2**31)
    for rope in _ropes(config):
        if rope.get("rope_type") == "longrope":
            held = rope.get("original_max_position_embeddings")
            context = min(context, int(getattr(text, "original_max_position_embeddings", held) or held or context))
    return context


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All ids that end a turn, from the generation config, the config and the tokenizer."""
    found: set[int] = set()
    for holder in (model.generation_config, model.config, tokenizer):
        value = getattr(holder, "eos_token_id", None)
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(sorted(found))


def unsupported(config: PreTrainedConfig, trust_remote_code: bool = False) -> str | None:
    """Why a model of this config cannot be run, by name, or None; weights are not needed to tell."""
    name, text = config.model_type, config.get_text_config()
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    own = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if trust_remote_code and own:
        kind = get_class_from_dynamic_module(own, str(config.name_or_path))
    if kind is None or getattr(text, "is_encoder_decoder", False):
        return f"architecture {name!r} is not a causal language model; use one (Llama, Qwen, Gemma, Mistral, Phi, …)"
    if not kind._supports_attention_backend:
        return (
            f"architecture {name!r} does not compute its attention through transformers' attention interface; use a "
            "model that does (Llama, Qwen, Gemma, Mistral, Phi, …)"
        )
    odd = sorted(set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES)
    if odd:
        return f"architecture {name!r} has layers of type {odd[0]!r}, which gruppo cannot run; use another model"
    for rope in _ropes(config):
        if rope.get("rope_type") == "dynamic":
            return "rope_type 'dynamic' makes a token's position depend on its neighbours' lengths; use another model"
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantized and cannot be trained; use the unquantized model"
    return None
