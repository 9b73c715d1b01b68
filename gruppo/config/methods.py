"""The table of methods: data source × reward × per-token signal × loss (DeepSeekMath §5.2.1). The loop is one for all.

A row is a point in the space of a few orthogonal parameters, which are fields of the recipe's [method]; what a recipe
writes itself goes before the row. `objective.py` computes what a row says; nothing there asks for a row's name.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class MethodRow:
    """A row of the table. The texts are for readers; `settings` are defaults of the recipe's [method]."""

    equation: str
    data_source: str
    reward: str
    signal: str
    loss: str
    settings: Mapping[str, Any] = field(default_factory=dict)


_LIVE = "questions; completions of the live policy, G each"
_FROZEN = "questions; completions of the frozen start model, G each"
_RIGHT = {
    "baseline": "indicator",
    "scale": "none",
    "surrogate": "log-likelihood",
    "aggregation": "sequence-mean",
    "kl_coef": 0.0,
}

METHODS = {
    "sft": MethodRow(
        equation="DeepSeekMath (2402.03300) Eq. 6-7",
        data_source="rows of questions with completions",
        reward="none",
        signal="1 on every token",
        loss="-log π, mean over each completion",
        settings={**_RIGHT, "source": "dataset"},
    ),
    "rft": MethodRow(
        equation="DeepSeekMath (2402.03300) Eq. 8-10",
        data_source=f"{_FROZEN}; of right ones no duplicates, at most k a question",
        reward="rule",
        signal="1 if right, else 0",
        loss="-log π, mean over each completion",
        settings={**_RIGHT, "source": "initial", "deduplicate": True, "max_per_prompt": 4},
    ),
    "online-rft": MethodRow(
        equation="DeepSeekMath (2402.03300) Eq. 11",
        data_source=_LIVE,
        reward="rule",
        signal="1 if right, else 0",
        loss="-log π, mean over each completion",
        settings=_RIGHT,
    ),
    "dpo": MethodRow(
        equation="DeepSeekMath (2402.03300) Eq. 12-14",
        data_source="pairs of a right and a wrong completion of the frozen start model, or rows of preferences",
        reward="rule or preference",
        signal="±β σ(β (Δ⁻ - Δ⁺)), Δ the completion's log-ratio to the reference",
        loss="-log σ(β (Δ⁺ - Δ⁻)), Δ the mean over a completion's tokens, or (sequence-sum) their sum",
        settings={
            **_RIGHT,
            "source": "initial",
            "baseline": "none",
            "credit": "pair",
            "deduplicate": True,
            "max_per_prompt": 4,
        },
    ),
    "ppo": MethodRow(
        equation="DeepSeekMath (2402.03300) Eq. 1-2, 15-18",
        data_source="questions; completions of the live policy",
        reward="rule or model, on the last token; minus β times the KL (k1) of each token",
        signal="generalised advantage estimation with a learned value model",
        loss="clipped token ratio, mean over each completion; the value model's own, clipped squared error",
        settings={"credit": "value", "baseline": "none", "scale": "none", "kl_estimator": "k1"},
    ),
    "grpo": MethodRow(
        equation="DeepSeekMath (2402.03300) Eq. 3, 4, 19-21",
        data_source=_LIVE,
        reward="rule",
        signal="(r - mean) / std of the group, on every token",
        loss="clipped token ratio, mean over each completion, KL (k3) in the loss",
    ),
    "grpo-process": MethodRow(
        equation="DeepSeekMath (2402.03300) §4.1.3",
        data_source=_LIVE,
        reward="of each step, by a model or a function; outcome rewards beside it",
        signal="sum of the normalised rewards of the steps that end at or after the token",
        loss="as grpo",
        settings={"credit": "step"},
    ),
    "dr-grpo": MethodRow(
        equation="Dr. GRPO (2503.20783)",
        data_source=_LIVE,
        reward="rule",
        signal="r - mean of the group",
        loss="as grpo, but the sum over tokens divided by max_tokens; no KL",
        settings={"scale": "none", "aggregation": "constant", "kl_coef": 0.0},
    ),
    "dapo": MethodRow(
        equation="DAPO (2503.14476) Eq. 8-12",
        data_source="as grpo; groups without signal are dropped, others drawn for them",
        reward="rule (the paper adds the reward `overlong`)",
        signal="as grpo",
        loss="clipped token ratio with a wider upper clip, mean over the tokens of a group; no KL",
        settings={"aggregation": "group-token-mean", "clip_high": 0.28, "kl_coef": 0.0, "dynamic_sampling_rounds": 9},
    ),
    "gspo": MethodRow(
        equation="GSPO (2507.18071) Eq. 5-7",
        data_source=_LIVE,
        reward="rule",
        signal="as grpo",
        loss="clipped sequence ratio (the geometric mean of the tokens'), mean over completions; no KL",
        settings={"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "kl_coef": 0.0},
    ),
    "cispo": MethodRow(
        equation="CISPO (2506.13585) Eq. 4-5",
        data_source=_LIVE,
        reward="rule",
        signal="as grpo",
        loss="Â log π weighted by the detached ratio, clipped from above only; mean over the tokens of a group; no KL",
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
        data_source=_LIVE,
        reward="rule, minus β times the completion's KL (k1)",
        signal="r - mean of the group's other completions",
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
        data_source=_LIVE,
        reward="rule, minus β times the KL (k1) of each token",
        signal="reward still to come at each token, normalised over all tokens of the step",
        loss="clipped token ratio, mean over the tokens of the step",
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


def describe_methods(width: int = 100) -> str:
    """The table as text, a block a method."""
    wrapper = textwrap.TextWrapper(width, initial_indent="  ", subsequent_indent=" " * 12, break_on_hyphens=False)
    blocks = []
    for name, row in METHODS.items():
        lines = [f"{name}  ({row.equation})"]
        for title, text in (
            ("data", row.data_source),
            ("reward", row.reward),
            ("signal", row.signal),
            ("loss", row.loss),
            ("settings", ", ".join(f"{key} = {value}" for key, value in row.settings.items()) or "the defaults"),
        ):
            lines += wrapper.wrap(f"{title:<10}{text}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
