"""A run of any size for the dashboard, and what the dashboard takes to show it.

    python benchmarks/ui_scale.py make runs/scale --steps 10000 --completions 100
    python benchmarks/ui_scale.py measure runs/scale
    python benchmarks/ui_scale.py live runs/scale --minutes 10
    python benchmarks/ui_scale.py list

`make` writes a run folder that `Result.read` and `gruppo show` accept, with every column of `gruppo.runs.tables`. The
token ids, texts, log-probabilities, entropies, values and returns of `TEMPLATES` steps are made once and used again
under other step numbers. Prompts, rewards, advantages and what depends on them are new in every step. Checkpoints and
the model are empty folders. If it is interrupted, it goes on at the next call.

The other commands start `gruppo ui` as a process of its own over a copy that shares the tables of the run, and write
benchmarks/ui_scale.json. `measure` opens every kind of page at least 100 times, with random steps, groups, questions,
orders and filters. `live` appends steps as a run does while two pages follow it. `list` opens the list of 200 runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ui_measure

from gruppo.config.loading import load_recipe
from gruppo.runs.tables import EVALUATIONS, ROLLOUTS, versioned
from gruppo.utils.stats import bootstrap_interval

TEMPLATES = 40  # distinct steps
SIZE = 10  # completions per group
PROMPTS = 8_000
SHORTEST, LONGEST = 100, 500  # tokens
QUESTIONS, SAMPLES, EVERY = 200, 4, 100  # held-out questions, answers to each, steps between evaluations
LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))
EQUAL = "all advantages are 0: every trained completion has the same reward"
START = datetime(2026, 1, 1, tzinfo=UTC)
METRICS = (
    "completion/length_max", "completion/length_min", "completion/trained", "completion/without_text",
    "engine/logprob_difference_max", "engine/logprob_difference_mean", "engine/logprob_difference_p99",
    "groups/duplicate_completions", "groups/skipped", "loss/total", "loss/policy", "loss/kl", "memory/peak_bytes",
    "memory/micro_batch_tokens", "memory/cache_bytes", "optimizer/clipped", "optimizer/gradient_norm",
    "optimizer/learning_rate", "optimizer/weight_norm", "policy/clipped_high", "policy/clipped_low", "policy/entropy",
    "policy/kl", "policy/kl_max", "policy/ratio_max", "policy/ratio_mean", "policy/ratio_min", "reward/std",
    "reward/last_number/std", "reward/format/mean", "reward/format/std", "advantage/max", "advantage/min",
    "advantage/std", "sampling/tokens", "sampling/prompts", "sampling/slots", "sampling/preempted", "value/loss",
    "value/clipped", "value/explained_variance", "value/mean", "value/return_mean", "time/generate",
    "time/load_weights", "time/reward", "time/old_logprobs", "time/ref_logprobs", "time/update", "time/write",
    "time/step", "time/tokens_per_second", "time/wait", "time/other",
)  # fmt: skip


def _lists(values: np.ndarray | pa.Array, lengths: np.ndarray) -> pa.ListArray:
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, values if isinstance(values, pa.Array) else pa.array(values))


def _floats(source: np.random.Generator, size: int, scale: float) -> np.ndarray:
    """Doubles with the precision of floats, as the trainer computes them."""
    return (-source.exponential(scale, size)).astype(np.float32).astype(np.float64)


class Maker:
    """Makes the tables of a run. `completions`: per step, a multiple of `SIZE`. A step is the same in every call."""

    def __init__(self, steps: int, completions: int, seed: int = 0) -> None:
        self.steps, self.completions, self.seed = steps, completions, seed
        self.source = np.random.default_rng(seed)
        words = self.source.choice(LETTERS, (4_000, 7))
        self.words = [" " + "".join(word[: 2 + number % 6]) for number, word in enumerate(words)]
        self.vocabulary = pa.array([*self.words, "<|im_end|>"])
        self.prompts = [self._prompt(number) for number in range(PROMPTS)]
        self.difficulty = self.source.normal(0, 1.5, PROMPTS)
        self.templates = [self._template(completions) for _ in range(min(TEMPLATES, steps))]
        self.answers = [self._template(QUESTIONS * SAMPLES) for _ in range(4)]

    def _prompt(self, number: int) -> dict[str, Any]:
        left, right = (int(value) for value in self.source.integers(10, 10_000, 2))
        ids = self.source.integers(0, len(self.words), 24)
        content = f"What is {left} + {right}?{''.join(self.words[token] for token in ids)}"
        return {
            "prompt_id": f"arithmetic/{number}",
            "prompt": json.dumps([{"role": "user", "content": content}]),
            "columns": json.dumps({"answer": str(left + right)}),
            "prompt_token_ids": ids.tolist(),
            "prompt_token_texts": [self.words[token] for token in ids],
        }

    def _template(self, rows: int) -> dict[str, Any]:
        lengths = self.source.integers(SHORTEST, LONGEST + 1, rows)
        total = int(lengths.sum())
        ids = np.minimum(self.source.zipf(1.3, total) - 1, len(self.words) - 1)
        ends = np.cumsum(lengths)
        finished = lengths < LONGEST * 0.95
        ids[ends[finished] - 1] = len(self.words)
        texts = self.vocabulary.take(pa.array(ids))
        plain = [self.words[token] if token < len(self.words) else "" for token in ids]
        starts = ends - lengths
        sampling = _floats(self.source, total, 0.4)
        noise = self.source.normal(0, 0.01, (3, total)).astype(np.float32).astype(np.float64)
        return {
            "lengths": lengths,
            "text": pa.array(["".join(plain[start:end]) for start, end in zip(starts, ends, strict=True)]),
            "finish_reason": pa.array(np.where(finished, "stop", "length")),
            "token_ids": _lists(ids.astype(np.int64), lengths),
            "token_texts": _lists(texts, lengths),
            "mask": _lists(np.ones(total, bool), lengths),
            "sampling_logprobs": _lists(sampling, lengths),
            "old_logprobs": _lists(sampling + noise[0], lengths),
            "ref_logprobs": _lists(sampling + noise[1] * 5, lengths),
            "entropy": _lists(-_floats(self.source, total, 0.6), lengths),
            "values": _lists(np.concatenate([noise[2], np.zeros(rows)]), lengths + 1),
            "returns": _lists(noise[2] + 0.5, lengths),
        }

    def rollouts(self, step: int) -> tuple[pa.Table, dict[str, float]]:
        """The table of a step, and its metrics."""
        self.source = np.random.default_rng([self.seed, step, 0])
        template, count, rows = self.templates[step % len(self.templates)], self.completions // SIZE, self.completions
        chosen = self.source.integers(0, PROMPTS, count)
        skill = 3.0 * step / self.steps - 2.0
        right = self.source.random((count, SIZE)) < 1 / (1 + np.exp(self.difficulty[chosen, None] - skill))
        formatted = self.source.random((count, SIZE)) < 0.9
        failed = self.source.random((count, SIZE)) < 0.005
        reward = np.where(failed, np.nan, right + 0.2 * formatted)
        with np.errstate(invalid="ignore"):
            mean, spread = np.nanmean(reward, 1, keepdims=True), np.nanstd(reward, 1, ddof=1, keepdims=True)
        advantage = np.where(failed | (spread < 1e-9), 0.0, (reward - mean) / np.maximum(spread, 1e-9))
        skipped = (spread[:, 0] < 1e-9).repeat(SIZE)
        parts = np.array([json.dumps({"last_number": a, "format": b}) for a in (0.0, 1.0) for b in (0.0, 1.0)])
        parts = np.where(failed, json.dumps({"last_number": None, "format": None}), parts[right * 2 + formatted * 1])
        columns = {name: value for name, value in template.items() if name != "lengths"} | {
            "step": pa.array(np.full(rows, step)),
            "group": pa.array(np.arange(count).repeat(SIZE)),
            "completion": pa.array(np.tile(np.arange(SIZE), count)),
            "policy_version": pa.array(np.full(rows, step - 1)),
            "reward": pa.array(reward.ravel(), from_pandas=True),
            "reward_parts": pa.array(parts.ravel()),
            "steps": pa.array(["{}"] * rows),
            "failure": pa.array(["last_number: TimeoutError: no result after 10 s" if f else None
                                 for f in failed.ravel()]),
            "extra": pa.array(["{}"] * rows),
            "printed": pa.array([json.dumps({"format": f"group of {number // SIZE}\n"}) if number % 20 == 0 else None
                                 for number in range(rows)]),
            "episode": pa.nulls(rows, pa.string()),
            "trained": pa.array(~failed.ravel()),
            "skipped": pa.array([EQUAL if value else None for value in skipped]),
            "advantages": _lists(advantage.ravel().repeat(template["lengths"]), template["lengths"]),
        }  # fmt: skip
        for name in ("prompt_id", "prompt", "columns", "prompt_token_ids", "prompt_token_texts"):
            columns[name] = pa.array([self.prompts[number][name] for number in chosen.repeat(SIZE)])
        figures = {
            "reward/mean": float(np.nanmean(reward)),
            "reward/last_number/mean": float(right.mean()),
            "reward/excluded": float(failed.mean()),
            "groups/nonzero_advantage": float((spread > 1e-9).mean()),
            "completion/length": float(template["lengths"].mean()),
            "completion/truncated": float((template["lengths"] >= LONGEST * 0.95).mean()),
        }
        return pa.table({name: columns[name] for name in ROLLOUTS.names}, versioned(ROLLOUTS)), figures

    def line(self, step: int, figures: Mapping[str, float]) -> str:
        """The line of metrics.jsonl of a step, after its table."""
        others = dict(zip(METRICS, np.abs(self.source.normal(1, 0.1, len(METRICS))).tolist(), strict=True))
        return json.dumps({"step": step, **others, **figures}) + "\n"

    def evaluation(self, step: int) -> tuple[pa.Table, dict[str, float]]:
        """The table of an evaluation after a step, and its metrics."""
        self.source = np.random.default_rng([self.seed, step, 1])
        template, rows = self.answers[step // EVERY % len(self.answers)], QUESTIONS * SAMPLES
        asked = np.arange(QUESTIONS).repeat(SAMPLES)
        skill = 3.0 * step / self.steps - 2.0
        right = self.source.random(rows) < 1 / (1 + np.exp(self.difficulty[asked] - skill))
        said = np.where(right, 7, self.source.integers(8, 15, rows))
        prompts = [self.prompts[number] for number in asked]
        columns = {name: template[name] for name in ("finish_reason", "token_ids", "token_texts", "mask")} | {
            "eval_set": pa.array([""] * rows),
            "prompt_id": pa.array([f"arithmetic (held out)/{number}" for number in asked]),
            "sample": pa.array(np.tile(np.arange(SAMPLES), QUESTIONS)),
            "question": pa.array([json.loads(prompt["prompt"])[0]["content"] for prompt in prompts]),
            "answer": template["text"],
            "correct": pa.array(right),
            "extracted": pa.array([str(number) for number in said]),
            "rule": pa.array(["last number"] * rows),
            "other_rules": pa.array([json.dumps({"last number": bool(value)}) for value in right]),
            "vote": pa.array(["right" if r else f"= {number}" for r, number in zip(right, said, strict=True)]),
            "score": pa.nulls(rows, pa.float64()),
            "episode": pa.nulls(rows, pa.string()),
            "logprobs": template["sampling_logprobs"],
        }
        for name in ("columns", "prompt_token_ids", "prompt_token_texts"):
            columns[name] = pa.array([prompt[name] for prompt in prompts])
        low, high = bootstrap_interval(right.reshape(QUESTIONS, SAMPLES).mean(1))
        figures = {"eval/accuracy": float(right.mean()), "eval/accuracy_low": low, "eval/accuracy_high": high}
        return pa.table({name: columns[name] for name in EVALUATIONS.names}, versioned(EVALUATIONS)), figures


def _write(table: pa.Table, path: Path) -> None:
    if path.exists():
        return
    temporary = path.with_suffix(".writing")
    pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
    temporary.replace(path)


def _recipe(steps: int, completions: int) -> str:
    return load_recipe({
        "run": {"name": "scale", "steps": steps, "checkpoint_every": max(1, steps // 10)},
        "model": {"name": "smollm2-135m-instruct"},
        "task": {"name": "arithmetic"},
        "reward": {"functions": ["last_number", "format"], "weights": [1.0, 0.2]},
        "method": {"name": "grpo", "kl_coef": 0.02},
        "sampling": {"prompts_per_step": completions // SIZE, "group_size": SIZE, "max_tokens": LONGEST},
        "evaluation": {"questions": QUESTIONS, "samples": SAMPLES, "every": EVERY, "decoding": {"temperature": 1.0}},
    }).to_toml()  # fmt: skip


def _json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _write_rest(folder: Path, steps: int, accuracies: list[dict[str, float]]) -> None:
    """The files of a finished run besides its tables and lines."""
    _json(folder / "environment.json", {"python": "3.11", "cores": 2, "chosen": {"device": "cpu", "dtype": "float32"}})
    _json(folder / "status.json", {"state": "done", "phase": "Saving", "step": steps, "steps": steps,
                                   "heartbeat": (START + timedelta(seconds=8 * steps)).isoformat(),
                                   "checkpoint": steps, "truncated_to": {}})  # fmt: skip
    before, after = accuracies[0], accuracies[-1]
    _json(folder / "summary.json", {
        "state": "done", "steps": steps, "train_seconds": 8.0 * steps, "questions": QUESTIONS, "benchmarks": {},
        "accuracy_before": before["eval/accuracy"], "accuracy_after": after["eval/accuracy"],
        "interval_before": [before["eval/accuracy_low"], before["eval/accuracy_high"]],
        "interval_after": [after["eval/accuracy_low"], after["eval/accuracy_high"]],
    })  # fmt: skip
    _json(folder / f"checkpoints/step-{steps:06d}/state.json", {"step": steps, "lengths": {}})
    _json(folder / "base/config.json", {"model_type": "llama"})
    _json(folder / "base/tokenizer.json", {})
    (folder / "model").mkdir(exist_ok=True)


def make(folder: Path, steps: int, completions: int) -> dict[str, Any]:
    """Write the run; returns the seconds it took and the bytes on disk. Tables that are there are kept."""
    started = time.perf_counter()
    for name in ("rollouts", "evaluations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(_recipe(steps, completions), encoding="utf-8")
    maker, accuracies = Maker(steps, completions), []
    with (folder / "metrics.jsonl").open("w") as metrics, (folder / "events.jsonl").open("w") as events:
        for step in range(steps + 1):
            if step:
                table, figures = maker.rollouts(step)
                _write(table, folder / f"rollouts/step-{step:06d}.parquet")
                if step % 500 == 0:
                    print(f"{step} of {steps} steps, {time.perf_counter() - started:.0f} s", file=sys.stderr)
                metrics.write(maker.line(step, figures))
            if step % EVERY == 0 or step == steps:
                table, figures = maker.evaluation(step)
                _write(table, folder / f"evaluations/step-{step:06d}.parquet")
                metrics.write(json.dumps({"step": step, **figures}) + "\n")
                accuracies.append(figures)
            if step % 500 == 250:
                events.write(json.dumps({
                    "time": (START + timedelta(seconds=8 * step)).isoformat(), "step": step, "kind": "warning",
                    "message": "the entropy of the policy has fallen", "warning": "entropy_collapse",
                    "state": "begins", "evidence": {}, "link": "docs/warnings.md",
                }) + "\n")  # fmt: skip
    _write_rest(folder, steps, accuracies)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"seconds": round(time.perf_counter() - started, 1), "gigabytes": round(size / 1e9, 2)}


def append(maker: Maker, run: Path, step: int) -> None:
    """Write the table and the metrics of one more step, as a run does."""
    table, figures = maker.rollouts(step)
    _write(table, run / f"rollouts/step-{step:06d}.parquet")
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write(maker.line(step, figures))


def make_many(root: Path, runs: int) -> None:
    """Write `runs` runs of 300 steps in folders of ten, without tables, in different states."""
    maker = Maker(300, SIZE)
    lines = {step: maker.line(step, maker.rollouts(step)[1]) for step in range(1, 301)}
    evaluated = {step: json.dumps({"step": step, **maker.evaluation(step)[1]}) + "\n" for step in (0, 100, 200, 300)}
    for number in range(runs):
        run = root / f"group-{number // 10}" / f"run-{number}"
        run.mkdir(parents=True)
        steps = 300 - number % 3 * 100
        (run / "recipe.toml").write_text(_recipe(300, SIZE).replace('"scale"', f'"run {number}"'), encoding="utf-8")
        shown = [lines.get(step, "") + evaluated.get(step, "") for step in range(steps + 1)]
        (run / "metrics.jsonl").write_text("".join(shown))
        (run / "events.jsonl").write_text("")
        _write_rest(run, steps, [maker.evaluation(0)[1], maker.evaluation(300)[1]])
        if steps < 300:
            (run / "summary.json").unlink()
            ui_measure.beat(run, steps, 300)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write the run folder")
    making.add_argument("folder", type=Path)
    making.add_argument("--steps", type=int, default=10_000)
    making.add_argument("--completions", type=int, default=100, help=f"per step, a multiple of {SIZE}")
    measuring = commands.add_parser("measure", help="seconds per page, and memory")
    measuring.add_argument("folder", type=Path)
    measuring.add_argument("--openings", type=int, default=ui_measure.OPENINGS, help="of every kind of page")
    following = commands.add_parser("live", help="processor time while two pages follow the run")
    following.add_argument("folder", type=Path)
    following.add_argument("--minutes", type=float, default=10)
    following.add_argument("--pause", type=float, default=8, help="seconds between two steps")
    listing = commands.add_parser("list", help="the list of many runs")
    listing.add_argument("--runs", type=int, default=200)
    arguments = parser.parse_args()
    if arguments.command == "make":
        print(json.dumps(make(arguments.folder, arguments.steps, arguments.completions), indent=1))
    elif arguments.command == "measure":
        ui_measure.record("measure", ui_measure.measure(arguments.folder, arguments.openings))
    elif arguments.command == "live":
        maker = Maker(10_000, 100)
        found = ui_measure.live(arguments.folder, arguments.minutes, arguments.pause, partial(append, maker))
        ui_measure.record("live", found)
    else:
        with tempfile.TemporaryDirectory() as folder:
            make_many(Path(folder), arguments.runs)
            ui_measure.record("list", ui_measure.list_runs(Path(folder)))


if __name__ == "__main__":
    main()
