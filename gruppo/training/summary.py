"""The content of summary.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gruppo.evaluation.sets import EvalSet
from gruppo.models.weights import tensors_sha256
from gruppo.training.checkpoint import State


def summarize(
    outcome: str, state: State, sets: Sequence[EvalSet], weights: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    """The outcome of a run: its state, accuracies before and after, seconds, bytes, and a hash of the weights.

    `weights`: those of the policy by name; None if they cannot be read any more.
    """
    before = state.comparable.get("0", {})
    after = state.evaluations.get(str(state.step), {}) if state.step else {}
    return {
        "state": outcome,
        "steps": state.step,
        "train_seconds": state.train_seconds,
        "accuracy_before": before.get("accuracy"),
        "accuracy_after": after.get("accuracy"),
        "interval_before": before.get("interval"),
        "interval_after": after.get("interval"),
        "questions": before.get("questions", after.get("questions")),
        "benchmarks": {
            eval_set.name: {
                "domain": eval_set.domain,
                "before": state.benchmarks.get("0", {}).get(eval_set.name),
                "after": state.benchmarks.get(str(state.step), {}).get(eval_set.name) if state.step else None,
            }
            for eval_set in sets
            if eval_set.name
        },
        "peak_memory_bytes": state.peak_memory_bytes,
        "weights_sha256": None if weights is None else tensors_sha256(weights),
    }
