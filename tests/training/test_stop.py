"""Stop strings in training: where completions end, what rewards and losses see, and that such runs resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import gruppo
from gruppo.config.loading import load_recipe
from gruppo.engines.base import SamplingParams
from gruppo.evaluation.sets import sampling_params
from tests.conftest import make_tokenizer
from tests.small_runs import ROWS, fingerprint, killed, small_run

STOP = ["aa", "b", "c", "7"]
SETTINGS: dict[str, Any] = {"sampling__stop": STOP, "run__steps": 2, "sampling__max_tokens": 24}


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(out.glob("rollouts/*")) for row in pq.read_table(path).to_pylist()]


def first_end(text: str) -> int | None:
    ends = [end for end in range(1, len(text) + 1) if text[:end].endswith(tuple(STOP))]
    return ends[0] if ends else None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method__name": "ppo", "method__kl_coef": None},
        {"reward_model__prompts": 4, "reward_model__batch_size": 8},
        {
            "method__name": "grpo-process", "reward_model__kind": "process", "reward_model__prompts": 4,
            "reward_model__continuations": 2, "reward_model__split": "tests/functions_of_users.py:every_two",
        },
    ],
    ids=["grpo", "ppo", "outcome reward model", "process reward model"],
)  # fmt: skip
def test_completions_end_with_a_stop_string(changes: dict, tiny_folder: str, tmp_path: Path) -> None:
    if changes.get("method__kl_coef", 0) is None:
        changes = {**changes, "method__kl_coef": 0.0}
    out, tokenizer = tmp_path / "run", make_tokenizer()
    small_run(tiny_folder, out, **SETTINGS, **changes)
    found = rows(out)
    for row in found:
        assert all(row["mask"])
        text = tokenizer.decode(row["token_ids"], skip_special_tokens=True)
        assert row["text"] == text, "tokens are characters: nothing follows the stop string"
        assert first_end(text) in (None, len(text))
        if first_end(text):
            assert row["finish_reason"] == "stop"
            assert len(row["advantages"]) == len(row["token_ids"])
    assert {bool(first_end(row["text"])) for row in found} == {True, False} or all(first_end(r["text"]) for r in found)
    if not changes:
        assert gruppo.reproduce(out, 2, prompts=ROWS, progress=False).equal


def test_a_run_with_stop_strings_resumes(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_run(tiny_folder, tmp_path / "whole", **SETTINGS)
    with killed(monkeypatch, "gruppo.training.run.TrainingRun._describe", 2):
        small_run(tiny_folder, tmp_path / "run", **SETTINGS)
    small_run(tiny_folder, tmp_path / "run", resume=True, **SETTINGS)
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def test_evaluation_uses_the_stop_strings_of_training(tiny_folder: str, tmp_path: Path) -> None:
    questions = tmp_path / "test.jsonl"
    questions.write_text("".join(json.dumps({"prompt": letter, "answer": "a"}) + "\n" for letter in "abcdef"))
    evaluation = {
        "evaluation__task": str(questions), "evaluation__grader": "exact_match",
        "evaluation__decoding": {"temperature": 1.0}, "run__steps": 1,
    }  # fmt: skip
    small_run(tiny_folder, tmp_path / "run", **{**SETTINGS, **evaluation})
    answers = pq.read_table(tmp_path / "run" / "evaluations" / "step-000000.parquet").to_pylist()
    ended = [answer for answer in answers if first_end(answer["answer"])]
    assert ended
    assert all(first_end(answer["answer"]) == len(answer["answer"]) for answer in ended)


@pytest.mark.parametrize(
    ("decoding", "stop", "keep"), [({}, ("x",), True), ({"stop": ["y"]}, ("y",), False), ({"stop": []}, (), False)]
)
def test_stop_strings_of_an_evaluation(decoding: dict, stop: tuple, keep: bool) -> None:
    recipe = load_recipe(
        {"model": {"name": "m"}, "sampling": {"stop": ["x"]}, "evaluation": {"task": "gsm8k", "decoding": decoding}}
    )
    assert load_recipe(recipe) == recipe
    assert recipe.evaluation is not None
    assert sampling_params(recipe.evaluation.decoding, 9, recipe.sampling.stop) == SamplingParams(
        0.0, 9, stop=stop, keep_stop=keep
    )
