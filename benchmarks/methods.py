"""Each method's held-out accuracy before and after, on one task, over seeds: `.venv/bin/python benchmarks/methods.py`.

All take as many steps of as many completions; SFT reads as many rows. A run that is done is left as it is and one that
was stopped goes on, so the same command finishes what is missing. Writes benchmarks/methods.json and prints the
table of docs/methods.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from gruppo.stats import wilson_interval

ROOT = Path(__file__).parents[1]
METHODS = ("sft", "rft", "online-rft", "dpo", "ppo", "quickstart", "iterative-grpo", "iterative-process")
HEAVY = ("checkpoints", "model", "reward_model", "reference")  # gigabytes of a run that is done, which nothing reads


def run(method: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """What a run came to, made first if it is not there."""
    out = folder / f"{method}-{seed}"
    summary = out / "summary.json"
    if not summary.is_file() or json.loads(summary.read_text())["state"] != "done":
        settings = [f"run.seed={seed}", f"run.steps={steps}", "evaluation.every=0"]
        options = [part for each in settings for part in ("--set", each)]
        command = [sys.executable, "-m", "gruppo.cli", "train", str(ROOT / f"recipes/{method}.toml"), *options]
        subprocess.run([*command, "--out", str(out), "--resume"], check=True)
    for name in HEAVY:
        shutil.rmtree(out / name, ignore_errors=True)
    made: dict[str, Any] = json.loads(summary.read_text())
    tables = sorted((out / "rollouts").glob("step-*.parquet"))
    tokens = sum(sum(map(len, pq.read_table(path, columns=["token_ids"])["token_ids"].to_pylist())) for path in tables)
    kept = ("accuracy_before", "accuracy_after", "questions", "train_seconds", "peak_memory_bytes", "weights_sha256")
    return {"method": method, "seed": seed, "tokens": tokens, **{name: made[name] for name in kept}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/methods", help="where run folders are")
    given = parser.parse_args()
    names = given.methods.split(",")
    rows = [run(name, seed, given.steps, given.runs) for seed in range(given.seeds) for name in names]
    (Path(__file__).with_suffix(".json")).write_text(json.dumps(rows, indent=1) + "\n")
    print("| method | before | after, by seed | all seeds, 95 % interval | tokens a run | s | peak, GB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in names:
        own = [row for row in rows if row["method"] == name]
        asked = sum(row["questions"] for row in own)
        right = sum(round(row["accuracy_after"] * row["questions"]) for row in own)
        low, high = wilson_interval(right, asked)
        after = ", ".join(f"{row['accuracy_after']:.1%}" for row in own)
        peak = max(row["peak_memory_bytes"] for row in own) / 1e9
        print(
            f"| {'grpo' if name == 'quickstart' else name} | {own[0]['accuracy_before']:.1%} | {after} | "
            f"{right / asked:.1%} ({low:.1%} to {high:.1%}) | {sum(row['tokens'] for row in own) / len(own):,.0f} | "
            f"{sum(row['train_seconds'] for row in own) / len(own):.0f} | {peak:.2f} |"
        )


if __name__ == "__main__":
    main()
