"""Measure held-out accuracy of every method before and after training: `.venv/bin/python benchmarks/methods.py`.

All methods train on one task with several seeds and sample the same number of tokens, up to half a step: a run ends at
the step that comes closest to --tokens, after at most --steps steps. SFT samples nothing and does --steps steps of as
many rows. Tokens sampled to label data for a reward model are not counted. Finished runs are kept and interrupted ones
continue, so the same command completes what is missing. Writes benchmarks/methods.json and prints the table of
docs/methods.md.
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
HEAVY = ("checkpoints", "model", "reward_model", "reference")  # gigabytes of a finished run that nothing reads


class Budget:
    """A callback that stops a run at the step whose total of sampled tokens is closest to `tokens`."""

    def __init__(self, tokens: int, folder: Path) -> None:
        self.tokens, self.folder = tokens, folder

    def on_step(self, step: int, metrics: Mapping[str, Any], groups: Sequence[Any]) -> Any:
        count = sampled(self.folder, step)
        return gruppo.STOP if count * (1 + 0.5 / step) >= self.tokens else None


def sampled(folder: Path, steps: int | None = None) -> int:
    """Completion tokens of the first `steps` steps (None: all) in the run's rollout tables."""
    tables = sorted((folder / "rollouts").glob("step-*.parquet"))[:steps]
    return sum(sum(map(len, pq.read_table(path, columns=["token_ids"])["token_ids"].to_pylist())) for path in tables)


def place(method: str, seed: int, args: argparse.Namespace) -> Path:
    """The run's folder; runs with other --steps or --tokens have other folders."""
    runs: Path = args.runs
    return runs / f"{args.steps}-{args.tokens}" / f"{method}-{seed}"


def train(method: str, seed: int, args: argparse.Namespace) -> None:
    """Train in this process; an interrupted run continues."""
    out = place(method, seed, args)
    settings = [f"run.seed={seed}", f"run.steps={args.steps}", "evaluation.every=0"]
    budget = [] if method == "sft" else [Budget(args.tokens, out)]
    gruppo.train(method, callbacks=budget, overrides=settings, out=out, resume=True)


def finished(method: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The results of a run, which is first trained in a separate process unless it is finished."""
    out = place(method, seed, args)
    summary = out / "summary.json"
    if not summary.is_file() or json.loads(summary.read_text())["state"] not in ("done", "stopped"):
        command = [sys.executable, __file__, "--one", f"{method}:{seed}", "--runs", str(args.runs)]
        subprocess.run([*command, "--steps", str(args.steps), "--tokens", str(args.tokens)], check=True)
    for name in HEAVY:
        shutil.rmtree(out / name, ignore_errors=True)
    results: dict[str, Any] = json.loads(summary.read_text())
    kept = ("steps", "accuracy_before", "accuracy_after", "questions", "train_seconds", "peak_memory_bytes")
    tokens = 0 if method == "sft" else sampled(out)
    return {"method": method, "seed": seed, "tokens": tokens, **{name: results[name] for name in kept}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=30_000, help="sampled tokens per run")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/methods", help="folder of the run folders")
    parser.add_argument("--one", metavar="METHOD:SEED", help="train only this run, in this process")
    args = parser.parse_args()
    if args.one:
        method, seed = args.one.split(":")
        train(method, int(seed), args)
        return
    names = args.methods.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        parser.error(f"--methods {unknown[0]}: is not one of {', '.join(METHODS)}")
    if too_small := [name for name in ("seeds", "steps", "tokens") if getattr(args, name) < 1]:
        parser.error(f"--{too_small[0]} {getattr(args, too_small[0])}: must be at least 1")
    rows = [finished(name, seed, args) for seed in range(args.seeds) for name in names]
    (Path(__file__).with_suffix(".json")).write_text(json.dumps(rows, indent=1) + "\n")
    print("| method | before | after, by seed | all seeds, 95 % interval | steps | sampled tokens | s | peak, GB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in names:
        runs = [row for row in rows if row["method"] == name]
        questions = sum(row["questions"] for row in runs)
        correct = sum(round(row["accuracy_after"] * row["questions"]) for row in runs)
        low, high = wilson_interval(correct, questions)
        after = ", ".join(f"{row['accuracy_after']:.1%}" for row in runs)
        peak = max(row["peak_memory_bytes"] for row in runs) / 1e9
        print(
            f"| {'grpo' if name == 'quickstart' else name} | {runs[0]['accuracy_before']:.1%} | {after} | "
            f"{correct / questions:.1%} ({low:.1%} to {high:.1%}) | {', '.join(str(row['steps']) for row in runs)} | "
            f"{sum(row['tokens'] for row in runs) / len(runs):,.0f} | "
            f"{sum(row['train_seconds'] for row in runs) / len(runs):.0f} | {peak:.2f} |"
        )


if __name__ == "__main__":
    main()
