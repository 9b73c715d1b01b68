"""Small runs of the tiny model, which finish in seconds, for tests of the training loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pyarrow.parquet as pq
import pytest
import tomli_w

from gruppo.config.loading import without_unused_fields
from gruppo.runs.results import Result
from gruppo.training.api import train
from tests.prestarted import prestarted_workers

ROWS = [{"prompt": f"{first}{second}", "answer": first} for first in "abcdef" for second in "123"]


def recipe(model: str, **changes: Any) -> dict[str, Any]:
    """Changes to None remove a field."""
    data: dict[str, Any] = {
        "run": {"name": "tiny", "steps": 6, "checkpoint_every": 2},
        "model": {"name": model, "device": "cpu", "dtype": "float32"},
        "reward": {"functions": ["tests/rewards/functions.py:likes_letters"], "workers": 1},
        "method": {"kl_coef": 0.02},
        "sampling": {"prompts_per_step": 4, "group_size": 4, "max_tokens": 8},
        "optimizer": {"learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 1},
    }
    for key, value in changes.items():
        section, _, field = key.partition("__")
        data.setdefault(section, {})[field] = value
    data = {name: {key: value for key, value in table.items() if value is not None} for name, table in data.items()}
    return without_unused_fields(data)


def recipe_folder(folder: Path, model: Path, rows: list[dict[str, Any]] = ROWS, **changes: Any) -> Path:
    """A new folder with a recipe, its rows and the questions of its evaluations; returns the recipe's file."""
    folder.mkdir()
    for file, content in {"rows": rows, "questions": [{"prompt": letter, "answer": "a"} for letter in "abc"]}.items():
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    evaluation = {"evaluation__grader": "exact_match", "evaluation__every": 2, "evaluation__samples": 2,
                  "evaluation__decoding": {"temperature": 1.0}}  # fmt: skip
    data = recipe(str(model), **{**evaluation, **changes})
    data["run"]["memory"] = "2 GB"
    data["task"] = {"name": str(folder / "rows.jsonl")}
    data["evaluation"]["task"] = str(folder / "questions.jsonl")
    (folder / "recipe.toml").write_text(tomli_w.dumps(data))
    return folder / "recipe.toml"


def small_run(model: str, out: Path, resume: bool = False, **changes: Any) -> Result:
    """A run whose reward processes are forked, which saves a third of the time of a run of one step."""
    with prestarted_workers():
        return train(recipe(model, **changes), prompts=ROWS, out=out, resume=resume, progress=False)


def fingerprint(out: Path) -> dict[str, Any]:
    """Everything that must be equal in two equal runs: all but times, memory and events."""
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in metrics]
    summary = json.loads((out / "summary.json").read_text())
    final = sorted((out / "checkpoints").iterdir())[-1]
    return {
        "metrics": kept,
        "weights": summary["weights_sha256"],
        "rollouts": {path.name: pq.read_table(path).to_pylist() for path in sorted((out / "rollouts").iterdir())},
        "evaluations": {path.name: pq.read_table(path).to_pylist() for path in sorted(out.glob("evaluations/*"))},
        "checkpoint": {p.name: p.read_bytes() for p in final.iterdir() if p.suffix == ".safetensors"},
    }


class Killed(BaseException):
    """Stands in for SIGKILL: no code of gruppo catches it."""


@contextmanager
def killed(monkeypatch: pytest.MonkeyPatch, target: str, count: int) -> Iterator[None]:
    """Kill the code in the block just before the `count`-th call of `target`; no summary is written."""

    def dies() -> None:
        raise Killed

    with monkeypatch.context() as patch:
        at_call(patch, target, count, dies)
        patch.setattr("gruppo.training.run.summarize", lambda *_: {}, raising=True)
        with pytest.raises(Killed):
            yield


def at_call(patch: pytest.MonkeyPatch, target: str, count: int, action: Callable[[], None]) -> None:
    """Run `action` just before the `count`-th call of `target`."""
    original, calls = resolve_name(target), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count:
            action()
        return original(*args, **kwargs)

    patch.setattr(target, counted)
