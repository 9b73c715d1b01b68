"""Checks that a resumed run continues with the data and weights that it started with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gruppo.errors import UsageError
from gruppo.runs.folder import RunFolder
from gruppo.runs.reading import reading


def require_whole(environment: Mapping[str, Any], run: RunFolder) -> None:
    """Raise UsageError unless everything that a resumed run needs from its environment is present and valid."""
    with reading(run.path / "environment.json", "restore it as the run wrote it, or choose another --out"):
        chosen = environment["chosen"]
        numbers = [chosen[name] for name in ("threads", "slots", "micro_batch_tokens")]
        if not all(isinstance(number, int) and number > 0 for number in numbers):
            raise ValueError(f"threads, slots and micro_batch_tokens are {numbers}")
        if chosen["dtype"] not in ("float32", "bfloat16", "float64") or chosen["device"] not in ("cpu", "cuda", "mps"):
            raise ValueError(f"dtype = {chosen['dtype']!r}, device = {chosen['device']!r}")
        if chosen.get("attention", "cpu") not in ("cpu", "sdpa", "flex", "varlen"):
            raise ValueError(f"attention = {chosen['attention']!r}")
        if not isinstance(chosen.get("recompute", False), bool):
            raise ValueError(f"recompute = {chosen['recompute']!r}")
        if missing := {"start_weights_sha256", "data_sha256", "rewards_sha256"} - set(environment):
            raise ValueError(f"{min(missing)} is missing")


def require_same_reward_model(run: RunFolder, weights: str) -> None:
    """Record the hash of the reward model's weights when a run starts.

    Raises UsageError if a resumed run uses other weights.
    """
    known = run.read_json("environment.json") or {}
    if "reward_model_sha256" in known:
        require_same(known["reward_model_sha256"], weights, "weights of the reward model")
    else:
        run.write_json("environment.json", {**known, "reward_model_sha256": weights})


def require_same(before: str, now: str, what: str) -> None:
    """Raise UsageError if a resumed run would continue with something else. `what`: for the message."""
    if before != now:
        raise UsageError(
            f"--resume: the {what} are not those that this run started with; restore them, or start again with "
            "another --out"
        )
