"""Compare predicted and measured peak memory on settings that vary everything that memory depends on.

`.venv/bin/python benchmarks/memory.py` runs every setting in a separate process: two steps of training, an evaluation,
labeling, or the training of a reward model. It prints a table and writes benchmarks/memory.json. With names of settings
as arguments, only those run and nothing is written.
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
JUDGE = "judge"  # a reward model of the usual model's size, created by this script

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

# Name -> fields of [evaluation], and the number of words in a question. Every answer has the maximum length.
EVALUATIONS: dict[str, dict[str, Any]] = {
    "evaluation, few slots": {"questions": 8, "max_tokens": 32},
    "evaluation, 64 slots": {"questions": 64, "max_tokens": 24},
    "evaluation, 256 slots": {"questions": 320, "max_tokens": 16},
    "evaluation, samples": {"questions": 4, "samples": 32, "max_tokens": 64, "decoding": {"temperature": 1.0}},
    "evaluation, truncated": {
        "questions": 96, "max_tokens": 8, "decoding": {"temperature": 0.7, "top_p": 0.9}, "dtype": "float32",
    },
    "evaluation, prompts of 1,300": {"questions": 12, "max_tokens": 16, "words": 900},
    "evaluation, long answers": {"questions": 8, "max_tokens": 512},
    "evaluation, wide model": {"questions": 32, "max_tokens": 32, "model": WIDE},
    "evaluation, budget of 1.6 GB": {"questions": 64, "max_tokens": 64, "memory": "1.6 GB"},
    "evaluation, reward model": {"questions": 16, "max_tokens": 16, "judge": True},
}  # fmt: skip
# Name -> fields of [reward_model], of [sampling], and the number of words in a question.
LABELS: dict[str, dict[str, Any]] = {
    "labels": {"train": False, "kind": "outcome", "prompts": 24, "max_tokens": 32},
    "labels of steps": {"train": False, "kind": "process", "prompts": 4, "max_tokens": 32, "memory": "1.6 GB"},
    "reward model": {"train": True, "kind": "outcome", "prompts": 12, "max_tokens": 32},
    "reward model, budget of 3 GB": {"train": True, "kind": "outcome", "prompts": 12, "max_tokens": 32,
                                     "memory": "3 GB"},
}  # fmt: skip
ALL = {**SETTINGS, **EVALUATIONS, **LABELS}


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
    task = write_stories(setting, folder, 50)
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
        **compared(environment),
    }


def write_stories(setting: dict[str, Any], folder: Path, count: int) -> Path:
    """A file with questions of the setting's length, all of the same number of tokens."""
    words = ["castle", "dragon", "river", "lantern", "winter", "garden", "thunder"] * 200
    rows = [
        {"prompt": [{"role": "user", "content": f"Write a very long story, number {number}, about: "
                     + " ".join(words[: setting.get("words", 20)])}]}
        for number in (range(10, 10 + count) if count <= 90 else range(100, 100 + count))
    ]  # fmt: skip
    task = folder / "stories.jsonl"
    task.write_text("".join(json.dumps(row | {"answer": "1"}) + "\n" for row in rows))
    return task


def compared(environment: dict[str, Any]) -> dict[str, Any]:
    """The predicted peak with its parts, and the measured peak of this process, in bytes."""
    return {
        "predicted": environment["memory_forecast"]["peak"],
        "measured": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "forecast": environment["memory_forecast"],
    }


def measure_evaluation(name: str, folder: Path) -> dict[str, Any]:
    """Evaluate in this process; returns the same as `measure`."""
    from gruppo.config.loading import load_recipe
    from gruppo.evaluation.eval_run import run_evaluation
    from gruppo.utils.progress import NullProgress
    from gruppo.utils.signals import Stop

    setting = EVALUATIONS[name]
    evaluation: dict[str, Any] = {key: setting[key] for key in ("questions", "max_tokens")}
    evaluation |= {"samples": setting.get("samples", 1), "grader": "exact_match"}
    evaluation["task"] = str(write_stories(setting, folder, setting["questions"]))
    evaluation["decoding"] = {"min_tokens": setting["max_tokens"], **setting.get("decoding", {})}
    recipe: dict[str, Any] = {
        "run": {"memory": setting.get("memory", 0.6)},
        "model": {"name": setting.get("model", MODEL), "dtype": setting.get("dtype", "bfloat16"), "device": "cpu"},
        "evaluation": evaluation,
    }
    if setting.get("model") == WIDE:
        recipe["model"]["name"] = str(folder / WIDE)
    if setting.get("judge"):
        recipe["reward_model"] = {"name": str(folder / JUDGE), "kind": "outcome", "prompts": 0}
    run_evaluation(load_recipe(recipe), folder / "out", False, NullProgress(), Stop())
    environment = json.loads((folder / "out/environment.json").read_text())
    return {"slots": environment["slots"], **compared(environment)}


def measure_labels(name: str, folder: Path) -> dict[str, Any]:
    """Label in this process, or train a reward model on the labels in `folder`; returns the same as `measure`."""
    import gruppo

    setting = LABELS[name]
    fields = {key: setting[key] for key in ("kind", "prompts")}
    recipe: dict[str, Any] = {
        "run": {"memory": setting.get("memory", 0.6)},
        "model": {"name": MODEL, "dtype": "bfloat16", "device": "cpu"},
        "task": {"name": str(write_stories(setting, folder, 50))},
        "reward": {"functions": ["benchmarks/memory.py:varied"], "workers": 1},
        "method": {"name": "grpo-process" if setting["kind"] == "process" else "grpo"},
        "sampling": {"prompts_per_step": 8, "group_size": 4, "max_tokens": setting["max_tokens"]},
        "reward_model": fields,
    }
    if not setting["train"] or not (folder / "labels").exists():
        gruppo.label(recipe, out=folder / "labels", progress=False)
        environment = json.loads((folder / "labels/environment.json").read_text())
        return {"slots": environment["slots"], **compared(environment)}
    gruppo.train_reward_model(recipe, folder / "labels", out=folder / "trained", progress=False)
    environment = json.loads((folder / "trained/environment.json").read_text())
    return {**environment["chosen"], **compared(environment)}


def make_judge(folder: Path) -> None:
    """Save a reward model of the usual model's size, with a head of zeros."""
    from gruppo.models.loading import find_model
    from gruppo.models.reward_model import load_reward_model, save_reward_model

    save_reward_model(load_reward_model(find_model(MODEL), "outcome", "cpu", "float32"), "outcome", folder)


def main() -> None:
    names = sys.argv[1:] or list(ALL)
    rows: dict[str, dict[str, Any]] = {}
    print(f"{'setting':<32}{'predicted':>11}{'measured':>11}{'ratio':>8}  micro-batch  slots")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            if ALL[name].get("model") == WIDE or ALL[name].get("judge"):
                _child("make", name, folder)
            if ALL[name].get("train"):
                _child("measure", name, folder)  # writes the labels
            rows[name] = row = json.loads(_child("measure", name, folder).splitlines()[-1])
        row["ratio"] = row["predicted"] / row["measured"]
        print(
            f"{name:<32}{row['predicted'] / 1e9:>8.2f} GB{row['measured'] / 1e9:>8.2f} GB{row['ratio']:>8.3f}"
            f"{row.get('micro_batch_tokens', ''):>13}{row.get('slots', ''):>7}",
            flush=True,
        )
    worst = max(abs(row["ratio"] - 1) for row in rows.values())
    print(f"largest difference: {worst:.1%}")
    if names == list(ALL):
        text = json.dumps({"command": "benchmarks/memory.py", "worst_difference": worst, "settings": rows}, indent=2)
        Path(__file__).with_suffix(".json").write_text(text + "\n")


def _child(action: str, name: str, folder: str) -> str:
    command = [sys.executable, __file__, f"--{action}", name, folder]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    action, name, place = [*sys.argv[1:4], "", "", ""][:3]
    if action == "--measure":
        measured = measure if name in SETTINGS else measure_evaluation if name in EVALUATIONS else measure_labels
        print(json.dumps(measured(name, Path(place))))
    elif action == "--make" and ALL[name].get("judge"):
        make_judge(Path(place) / JUDGE)
    elif action == "--make":
        make_random_model(Path(place) / WIDE, 1024)
    else:
        main()
