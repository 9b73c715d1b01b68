"""Compare predicted and measured peak memory on settings that vary everything that memory depends on.

`.venv/bin/python benchmarks/memory.py` trains two steps of every setting in a separate process, prints a table and
writes benchmarks/memory.json. With names of settings as arguments, only those run and nothing is written.
"""

from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from works import MODEL, make_random_model

WIDE = "llama-204m-random"  # 12 layers, hidden size 1024, created by this script

# Name -> recipe fields, and the number of words in a prompt.
SETTINGS: dict[str, dict[str, Any]] = {
    "groups of 8, short": {"prompts_per_step": 6, "group_size": 8, "max_tokens": 24},
    "reference, prompts of 400": {
        "prompts_per_step": 4, "group_size": 4, "max_tokens": 16, "kl_coef": 0.04, "words": 280,
    },
    "float32, one micro-batch": {"prompts_per_step": 2, "group_size": 8, "max_tokens": 32, "dtype": "float32"},
    "budget of 3.8 GB": {"prompts_per_step": 6, "group_size": 8, "max_tokens": 24, "memory": "3.8 GB"},
    "long, with evaluation": {"prompts_per_step": 3, "group_size": 4, "max_tokens": 112, "questions": 48},
    "wide model, reference": {
        "prompts_per_step": 4, "group_size": 6, "max_tokens": 48, "kl_coef": 0.04, "model": WIDE,
    },
    "adapters": {"prompts_per_step": 6, "group_size": 8, "max_tokens": 24, "rank": 16},
    "adapters, long": {"prompts_per_step": 3, "group_size": 4, "max_tokens": 112, "rank": 16},
}  # fmt: skip


def varied(completions: list[Any], **_: Any) -> list[float]:
    """A reward that differs within every group, so that every completion is trained on."""
    return [
        hashlib.sha256(f"{place} {completion}".encode()).digest()[0] / 255
        for place, completion in enumerate(completions)
    ]


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Train two steps in this process; returns the predicted peak and the one that the operating system reports."""
    import gruppo

    setting = SETTINGS[name]
    words = ["castle", "dragon", "river", "lantern", "winter", "garden", "thunder"] * 100
    rows = [
        {"prompt": [{"role": "user", "content": f"Write a very long story, number {number}, about: "
                     + " ".join(words[: setting.get("words", 20)])}]}
        for number in range(10, 60)
    ]  # fmt: skip
    task = folder / "stories.jsonl"
    task.write_text("".join(json.dumps(row | {"answer": "1"}) + "\n" for row in rows))
    sampling = {key: setting[key] for key in ("prompts_per_step", "group_size", "max_tokens")}
    recipe: dict[str, Any] = {
        "run": {"steps": 2, "memory": setting.get("memory", 0.6)},
        "model": {"name": setting.get("model", MODEL), "dtype": setting.get("dtype", "bfloat16"), "device": "cpu"},
        "task": {"name": str(task)},
        "reward": {"functions": ["benchmarks/memory.py:varied"], "workers": 1},
        "method": {"kl_coef": setting.get("kl_coef", 0.0)},
        "sampling": sampling,
        "optimizer": {"learning_rate": 1e-6},
    }
    if recipe["model"]["name"] == WIDE:
        recipe["model"]["name"] = str(folder / WIDE)
    if "rank" in setting:
        recipe["model"]["lora"] = {"rank": setting["rank"]}
    if "questions" in setting:
        recipe["evaluation"] = {"task": str(task), "questions": setting["questions"], "max_tokens": 32}
    result = gruppo.train(recipe, out=folder / "run")
    environment = json.loads((result.path / "environment.json").read_text())
    frame = result.frame()
    return {
        **{key: environment["chosen"][key] for key in ("micro_batch_tokens", "slots", "recompute")},
        "longest": int(max(frame["completion/length_max"].dropna())),
        "predicted": environment["memory_forecast"]["peak"],
        "measured": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "forecast": environment["memory_forecast"],
    }


def main() -> None:
    names = sys.argv[1:] or list(SETTINGS)
    rows: dict[str, dict[str, Any]] = {}
    print(f"{'setting':<28}{'predicted':>11}{'measured':>11}{'ratio':>8}  micro-batch  slots")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            if SETTINGS[name].get("model") == WIDE:
                _child("make", name, folder)
            rows[name] = row = json.loads(_child("measure", name, folder).splitlines()[-1])
        row["ratio"] = row["predicted"] / row["measured"]
        print(
            f"{name:<28}{row['predicted'] / 1e9:>8.2f} GB{row['measured'] / 1e9:>8.2f} GB{row['ratio']:>8.3f}"
            f"{row['micro_batch_tokens']:>13}{row['slots']:>7}",
            flush=True,
        )
    worst = max(abs(row["ratio"] - 1) for row in rows.values())
    print(f"largest difference: {worst:.1%}")
    if names == list(SETTINGS):
        text = json.dumps({"command": "benchmarks/memory.py", "worst_difference": worst, "settings": rows}, indent=2)
        Path(__file__).with_suffix(".json").write_text(text + "\n")


def _child(action: str, name: str, folder: str) -> str:
    command = [sys.executable, __file__, f"--{action}", name, folder]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], Path(sys.argv[3]))))
    elif sys.argv[1:2] == ["--make"]:
        make_random_model(Path(sys.argv[3]) / WIDE, 1024)
    else:
        main()
