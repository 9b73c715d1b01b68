"""Each method's held-out accuracy before and after, on one task, over seeds: `.venv/bin/python benchmarks/methods.py`.

All sample as many tokens, to half a step's: a run ends at the step that comes nearest to --tokens, after --steps at
most. SFT samples none and takes --steps of as many rows. What labels of a reward model are sampled with is not counted.
A run that is done is left as it is and one that was killed goes on, so the same command finishes what is missing.
Writes benchmarks/methods.json and prints the table of docs/methods.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import gruppo
from gruppo.utils.stats import wilson_interval

ROOT = Path(__file__).parents[1]
METHODS = ("sft", "rft", "online-rft", "dpo", "ppo", "quickstart", "iterative-grpo", "iterative-process")
HEAVY = ("checkpoints", "model", "reward_model", "reference")  # gigabytes of a run that is done, which nothing reads


class Budget:
    """Ends a run at the step that comes nearest to `tokens` sampled ones; those of earlier steps are read."""

    def __init__(self, tokens: int, folder: Path) -> None:
        self.tokens, self.folder = tokens, folder

    def on_step(self, step: int, metrics: Mapping[str, Any], groups: Sequence[Any]) -> Any:
        made = sampled(self.folder, step)
        return gruppo.STOP if made * (1 + 0.5 / step) >= self.tokens else None


def sampled(folder: Path, steps: int | None = None) -> int:
    """Tokens of the completions that the first `steps` steps learned from, by the run's tables."""
    tables = sorted((folder / "rollouts").glob("step-*.parquet"))[:steps]
    return sum(sum(map(len, pq.read_table(path, columns=["token_ids"])["token_ids"].to_pylist())) for path in tables)


def place(method: str, seed: int, given: argparse.Namespace) -> Path:
    """The run's folder: one of other steps or tokens is another run."""
    runs: Path = given.runs
    return runs / f"{given.steps}-{given.tokens}" / f"{method}-{seed}"


def train(method: str, seed: int, given: argparse.Namespace) -> None:
    """One run, in this process; what is there of it goes on."""
    out = place(method, seed, given)
    settings = [f"run.seed={seed}", f"run.steps={given.steps}", "evaluation.every=0"]
    budget = [] if method == "sft" else [Budget(given.tokens, out)]
    gruppo.train(ROOT / f"recipes/{method}.toml", callbacks=budget, overrides=settings, out=out, resume=True)


def finished(method: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """What a run came to, made first, in a process of its own, if it is not there."""
    out = place(method, seed, given)
    summary = out / "summary.json"
    if not summary.is_file() or json.loads(summary.read_text())["state"] not in ("done", "stopped"):
        command = [sys.executable, __file__, "--one", f"{method}:{seed}", "--runs", str(given.runs)]
        subprocess.run([*command, "--steps", str(given.steps), "--tokens", str(given.tokens)], check=True)
    for name in HEAVY:
        shutil.rmtree(out / name, ignore_errors=True)
    made: dict[str, Any] = json.loads(summary.read_text())
    kept = ("steps", "accuracy_before", "accuracy_after", "questions", "train_seconds", "peak_memory_bytes")
    tokens = 0 if method == "sft" else sampled(out)
    return {"method": method, "seed": seed, "tokens": tokens, **{name: made[name] for name in kept}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=30_000, help="sampled tokens of a run")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/methods", help="where run folders are")
    parser.add_argument("--one", metavar="METHOD:SEED", help="make this run in this process, and nothing else")
    given = parser.parse_args()
    if given.one:
        method, seed = given.one.split(":")
        train(method, int(seed), given)
        return
    names = given.methods.split(",")
    if odd := [name for name in names if name not in METHODS]:
        parser.error(f"--methods {odd[0]}: is none of {', '.join(METHODS)}")
    if least := [name for name in ("seeds", "steps", "tokens") if getattr(given, name) < 1]:
        parser.error(f"--{least[0]} {getattr(given, least[0])}: must be 1 or more")
    rows = [finished(name, seed, given) for seed in range(given.seeds) for name in names]
    (Path(__file__).with_suffix(".json")).write_text(json.dumps(rows, indent=1) + "\n")
    print("| method | before | after, by seed | all seeds, 95 % interval | steps | sampled tokens | s | peak, GB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in names:
        own = [row for row in rows if row["method"] == name]
        asked = sum(row["questions"] for row in own)
        right = sum(round(row["accuracy_after"] * row["questions"]) for row in own)
        low, high = wilson_interval(right, asked)
        after = ", ".join(f"{row['accuracy_after']:.1%}" for row in own)
        peak = max(row["peak_memory_bytes"] for row in own) / 1e9
        print(
            f"| {'grpo' if name == 'quickstart' else name} | {own[0]['accuracy_before']:.1%} | {after} | "
            f"{right / asked:.1%} ({low:.1%} to {high:.1%}) | {', '.join(str(row['steps']) for row in own)} | "
            f"{sum(row['tokens'] for row in own) / len(own):,.0f} | "
            f"{sum(row['train_seconds'] for row in own) / len(own):.0f} | {peak:.2f} |"
        )


if __name__ == "__main__":
    main()
