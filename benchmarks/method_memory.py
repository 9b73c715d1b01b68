"""Measure the peak memory of every method on the same work, by part: `.venv/bin/python benchmarks/method_memory.py`.

Every method does two steps of 8 questions x 8 completions of at most 64 tokens with the quickstart's model, in a
separate process. GRPO and PPO both have a KL term. Prints the table of docs/methods.md and writes
benchmarks/method_memory.json.
"""

from __future__ import annotations

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
    "sft": ("sft", {}),
    "rft": ("rft", {}),
    "online-rft": ("online-rft", {}),
    "dpo": ("dpo", {}),
}
PARTS = ("process", "weights", "optimizer", "gradients", "reference", "critic", "reward_model", "prepared")


def measure(recipe: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Measured peak and estimate by part, in bytes."""
    with tempfile.TemporaryDirectory(prefix="gruppo-memory-") as folder:
        fields = (
            SHAPE | ({"sampling.prompts_per_step": 64, "sampling.group_size": 1} if recipe == "sft" else {}) | changes
        )
        options = [part for name, value in fields.items() for part in ("--set", f"{name}={json.dumps(value)}")]
        command = [sys.executable, "-m", "gruppo.cli.main", "train", recipe, *options]
        subprocess.run([*command, "--out", f"{folder}/run"], check=True, stdout=sys.stderr)
        environment = json.loads(Path(f"{folder}/run/environment.json").read_text())
        summary = json.loads(Path(f"{folder}/run/summary.json").read_text())
    forecast = environment["memory_forecast"]
    return {"measured": summary["peak_memory_bytes"], "forecast": forecast["peak"], "parts": forecast["training"]}


def main() -> None:
    chosen = sys.argv[1:] or list(RUNS)
    rows = {}
    print("| | measured | forecast | " + " | ".join(PARTS) + " | activations, logits |")
    print("| --- | --- | --- | " + "--- | " * (len(PARTS) + 1))
    for name in chosen:
        rows[name] = row = measure(*RUNS[name])
        parts = [row["parts"][part] for part in PARTS]
        rest = row["parts"]["activations"] + row["parts"]["logits"]
        cells = [f"{value / 1e9:.2f}" for value in (row["measured"], row["forecast"], *parts, rest)]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    if chosen == list(RUNS):
        text = json.dumps({"command": "benchmarks/method_memory.py", "runs": rows}, indent=1)
        Path(__file__).with_suffix(".json").write_text(text + "\n")


if __name__ == "__main__":
    main()
