"""The table of methods: data source × reward × advantage per token × loss (DeepSeekMath §5.2.1).

All methods share one training loop. A row sets a few orthogonal parameters, the fields of the recipe's [method]; fields
that a recipe sets itself take precedence over the row. No code branches on the name of a method.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class MethodRow:
    """A row of the table. The texts are for readers; `settings` are the row's defaults for the recipe's [method]."""

    equation: str
    data_source: str
    reward: str
    signal: str
    loss: str
    settings: Mapping[str, Any] = field(default_factory=dict)


_CURRENT = "G completions per prompt, sampled from the current policy"
_INITIAL = "G completions per prompt, sampled from the initial policy"
_CORRECT = {
    "baseline": "indicator",
    "scale": "none",
    "surrogate": "log-likelihood",
    "aggregation": "sequence-mean",
    "kl_coef": 0.0,
}

METHODS = {
    "sft": MethodRow(
        equation="DeepSeekMath (2402.03300) Eq. 6-7",
        data_source="prompts with completions from a dataset",
        reward="none",
        signal="1 on every token",
        loss="-log π, mean over each completion",
        settings={**_CORRECT, "source": "dataset"},
    ),
    "rft": MethodRow(
        equation="DeepSeekMath (2402.03300) Eq. 8-10",
        data_source=f"{_INITIAL}; correct ones without duplicates, at most k per prompt",
        reward="rule",
        signal="1 if correct, else 0",
        loss="-log π, mean over each completion",
        settings={**_CORRECT, "source": "initial", "deduplicate": True, "max_per_prompt": 4},
    ),
    "online-rft": MethodRow(
        equation="DeepSeekMath (2402.03300) Eq. 11",
        data_source=_CURRENT,
        reward="rule",
        signal="1 if correct, else 0",
        loss="-log π, mean over each completion",
        settings=_CORRECT,
    ),
    "dpo": MethodRow(
        equation="DeepSeekMath (2402.03300) Eq. 12-14",
        data_source="pairs of correct and incorrect completions of the initial policy, or preferences from a dataset",
        reward="rule or preference",
        signal="±β σ(β (Δ⁻ - Δ⁺)), Δ is the log-ratio of a completion to the reference",
        loss="-log σ(β (Δ⁺ - Δ⁻)), Δ averaged (sequence-mean) or summed (sequence-sum) over tokens",
        settings={
            **_CORRECT,
            "source": "initial",
            "baseline": "none",
            "credit": "pair",
            "deduplicate": True,
            "max_per_prompt": 4,
        },
    ),
    "ppo": MethodRow(
        equation="DeepSeekMath (2402.03300) Eq. 1-2, 15-18",
        data_source="completions sampled from the current policy",
        reward="rule or model, on the last token, minus β times the KL (k1) at every token",
        signal="generalized advantage estimation (GAE) with a learned value model",
        loss="clipped token ratio, mean over each completion; clipped squared error for the value model",
        settings={"credit": "value", "baseline": "none", "scale": "none", "kl_estimator": "k1"},
    ),
    "grpo": MethodRow(
        equation="DeepSeekMath (2402.03300) Eq. 3, 4, 19-21",
        data_source=_CURRENT,
        reward="rule",
        signal="(r - mean) / std of the group, the same for every token",
        loss="clipped token ratio, mean over each completion, KL (k3) in the loss",
    ),
    "grpo-process": MethodRow(
        equation="DeepSeekMath (2402.03300) §4.1.3",
        data_source=_CURRENT,
        reward="model or function per step, in addition to outcome rewards",
        signal="sum of the normalized rewards of all steps that end at or after the token",
        loss="as grpo",
        settings={"credit": "step"},
    ),
    "dr-grpo": MethodRow(
        equation="Dr. GRPO (2503.20783)",
        data_source=_CURRENT,
        reward="rule",
        signal="r - mean of the group",
        loss="as grpo, but summed over tokens and divided by max_tokens; no KL",
        settings={"scale": "none", "aggregation": "constant", "kl_coef": 0.0},
    ),
    "dapo": MethodRow(
        equation="DAPO (2503.14476) Eq. 8-12",
        data_source="as grpo; groups of equal rewards are dropped and replaced (dynamic sampling)",
        reward="rule (the paper adds the reward `overlong`)",
        signal="as grpo",
        loss="clipped token ratio with a wider upper clip range, mean over all tokens of a group; no KL",
        settings={"aggregation": "group-token-mean", "clip_high": 0.28, "kl_coef": 0.0, "dynamic_sampling_rounds": 9},
    ),
    "gspo": MethodRow(
        equation="GSPO (2507.18071) Eq. 5-7",
        data_source=_CURRENT,
        reward="rule",
        signal="as grpo",
        loss="clipped sequence ratio (geometric mean of the token ratios), mean over completions; no KL",
        settings={"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "kl_coef": 0.0},
    ),
    "cispo": MethodRow(
        equation="CISPO (2506.13585) Eq. 4-5",
        data_source=_CURRENT,
        reward="rule",
        signal="as grpo",
        loss="Â log π weighted by the detached ratio, clipped from above only; mean over all tokens of a group; no KL",
        settings={
            "surrogate": "clipped-weight",
            "clip_low": 1.0,
            "clip_high": 4.0,
            "aggregation": "group-token-mean",
            "kl_coef": 0.0,
        },
    ),
    "rloo": MethodRow(
        equation="RLOO (2402.14740) Eq. 8",
        data_source=_CURRENT,
        reward="rule, minus β times the KL (k1) of the completion",
        signal="r - mean of the other completions of the group",
        loss="Â log π, summed over each completion; no ratio, no clip",
        settings={
            "baseline": "leave-one-out",
            "scale": "none",
            "surrogate": "log-likelihood",
            "aggregation": "sequence-sum",
            "kl_coef": 0.05,
            "kl_estimator": "k1",
        },
    ),
    "reinforce-pp": MethodRow(
        equation="REINFORCE++ (2501.03262) Eq. 4-8",
        data_source=_CURRENT,
        reward="rule, minus β times the KL (k1) at every token",
        signal="reward still to come at the token, normalized over all tokens of the step",
        loss="clipped token ratio, mean over all tokens of the step",
        settings={
            "baseline": "batch",
            "scale": "batch",
            "credit": "token",
            "aggregation": "token-mean",
            "kl_coef": 0.01,
            "kl_estimator": "k1",
        },
    ),
}


_NO_BREAK = "\N{NO-BREAK SPACE}"


def describe_methods(width: int = 100) -> str:
    """The table as text, one block per method."""
    wrapper = textwrap.TextWrapper(width, initial_indent="  ", subsequent_indent=" " * 13, break_on_hyphens=False)
    blocks = []
    for name, row in METHODS.items():
        lines = [f"{name}  ({row.equation})"]
        for title, text in (
            ("data", row.data_source),
            ("reward", row.reward),
            ("advantage", row.signal),
            ("loss", row.loss),
            ("settings", ", ".join(_setting(key, value) for key, value in row.settings.items()) or "the defaults"),
        ):
            lines += wrapper.wrap(f"{title:<11}{text}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks).replace(_NO_BREAK, " ")


def _setting(key: str, value: Any) -> str:
    """A setting as TOML, which the text wrapper does not break."""
    return f"{key} = {json.dumps(value)}".replace(" ", _NO_BREAK)
