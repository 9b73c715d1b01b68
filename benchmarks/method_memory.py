"""Measure the peak memory of every method on the same work, by part: `.venv/bin/python benchmarks/method_memory.py`.

Every method does two steps of 8 questions x 8 completions of at most 64 tokens, in a separate process. GRPO and PPO
both have a KL term. Prints the table of docs/methods.md and writes benchmarks/method_memory.json with the rows of every
model that was measured: names of rows measure these again and keep the others.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHAPE = {
    "run.steps": 2,
    "run.iterations": 1,
    "sampling.prompts_per_step": 8,
    "sampling.group_size": 8,
    "sampling.max_tokens": 64,
    "evaluation.questions": 8,
}
# Name in the table -> recipe and changed fields.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("quickstart", {"method.kl_coef": 0.04}),
    "ppo": ("ppo", {"method.kl_coef": 0.04}),
    "grpo, outcome reward model": ("iterative-grpo", {"reward_model.prompts": 8}),
    "grpo-process, process reward model": ("iterative-process", {"reward_model.prompts": 8}),
    "grpo, no reference": ("quickstart", {}),
    "grpo, LoRA of rank 16": ("quickstart", {"method.kl_coef": 0.04, "model.lora.rank": 16}),
    "ppo, LoRA of rank 16": ("ppo", {"method.kl_coef": 0.04, "model.lora.rank": 16}),
    "sft": ("sft", {}),
    "rft": ("rft", {}),
    "online-rft": ("online-rft", {}),
    "dpo": ("dpo", {}),
}
PARTS = ("process", "weights", "optimizer", "gradients", "reference", "critic", "reward_model", "prepared")


def measure(model: str, recipe: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Measured peak and estimate by part, in bytes."""
    with tempfile.TemporaryDirectory(prefix="gruppo-memory-") as folder:
        rows = {"sampling.prompts_per_step": 64, "sampling.group_size": 1} if recipe == "sft" else {}
        fields = SHAPE | rows | {"model.name": model} | changes
        options = [part for name, value in fields.items() for part in ("--set", f"{name}={json.dumps(value)}")]
        command = [sys.executable, "-m", "gruppo.cli.main", "train", recipe, *options]
        subprocess.run([*command, "--out", f"{folder}/run"], check=True, stdout=sys.stderr)
        environment = json.loads(Path(f"{folder}/run/environment.json").read_text())
        summary = json.loads(Path(f"{folder}/run/summary.json").read_text())
    forecast = environment["memory_forecast"]
    return {
        "measured": summary["peak_memory_bytes"],
        "forecast": forecast["peak"],
        "parts": forecast["training"],
        "dtype": environment["chosen"]["dtype"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"rows of the table, default all: {', '.join(RUNS)}")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="model.name")
    parser.add_argument("--title", help="name of the model in the table and the file; default --model")
    parser.add_argument("--memory", type=float, default=0.6, help="run.memory")
    args = parser.parse_args()
    if unknown := set(args.rows) - set(RUNS):
        parser.error(f"no such rows: {', '.join(sorted(unknown))}")
    file = Path(__file__).with_suffix(".json")
    results = json.loads(file.read_text())
    rows = results["models"].setdefault(args.title or args.model, {})
    print("| | measured | forecast | " + " | ".join(PARTS) + " | activations, logits |")
    print("| --- | --- | --- | " + "--- | " * (len(PARTS) + 1))
    for name in args.rows or RUNS:
        recipe, changes = RUNS[name]
        rows[name] = row = measure(args.model, recipe, {"run.memory": args.memory} | changes)
        parts = [row["parts"][part] for part in PARTS]
        rest = row["parts"]["activations"] + row["parts"]["logits"]
        cells = [f"{value / 1e9:.2f}" for value in (row["measured"], row["forecast"], *parts, rest)]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
