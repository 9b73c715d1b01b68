"""That a resumed run continues on what it began with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gruppo.errors import UsageError
from gruppo.runs.folder import RunFolder
from gruppo.runs.reading import reading


def require_whole(environment: Mapping[str, Any], run: RunFolder) -> None:
    """Raise UsageError unless what a resumed run needs of its environment is there, and of the right kind."""
    with reading(run.path / "environment.json", "put it back as the run wrote it, or choose another --out"):
        chosen = environment["chosen"]
        numbers = [chosen[name] for name in ("threads", "slots", "micro_batch_tokens")]
        if not all(isinstance(each, int) and each > 0 for each in numbers):
            raise ValueError(f"threads, slots and micro_batch_tokens are {numbers}")
        if chosen["dtype"] not in ("float32", "bfloat16", "float64") or chosen["device"] not in ("cpu", "cuda", "mps"):
            raise ValueError(f"dtype = {chosen['dtype']!r}, device = {chosen['device']!r}")
        if not isinstance(chosen.get("recompute", False), bool):
            raise ValueError(f"recompute = {chosen['recompute']!r}")
        if missing := {"start_weights_sha256", "data_sha256", "rewards_sha256"} - set(environment):
            raise ValueError(f"{min(missing)} is missing")


def require_same_judge(run: RunFolder, weights: str) -> None:
    """Note the reward model's weights when a run begins; raise UsageError where it went on with others."""
    known = run.read_json("environment.json") or {}
    if "reward_model_sha256" in known:
        require_same(known["reward_model_sha256"], weights, "weights of the reward model")
    else:
        run.write_json("environment.json", {**known, "reward_model_sha256": weights})


def require_same(before: str, now: str, what: str) -> None:
    """Raise UsageError where a resumed run would continue with something else."""
    if before != now:
        raise UsageError(
            f"--resume: the {what} are not those that this run began with; put them back, or start again with --out"
        )
