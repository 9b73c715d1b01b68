"""Recall of the models before training, measured with the engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from gruppo.study.arms import load_study
from gruppo.study.contamination import recall
from gruppo.study.plan import describe_plan
from gruppo.study.recall_check import measure_recall, recall_left, recall_of
from gruppo.study.report import write_report
from gruppo.utils.progress import NullProgress
from gruppo.utils.signals import Stop
from tests.study.conftest import change

Completer = Callable[[Sequence[str]], Sequence[str]]
QUESTIONS = ["abc def abd", "abd abc", "b"]


@pytest.fixture
def file(study_file: Path) -> Path:
    """A study with recall, which has not run: two arms that start from one model."""
    for name, texts in (("asked", QUESTIONS), ("control", ["cab bad"])):
        rows = [json.dumps({"prompt": text, "answer": "a"}) + "\n" for text in texts]
        (study_file.parent / f"{name}.jsonl").write_text("".join(rows))
    folder = study_file.parent
    change(study_file, str(folder / "test.jsonl"), str(folder / "asked.jsonl"))
    control = f'recall = true\nrecall_control = "{folder / "control.jsonl"}"'
    change(study_file, "questions = 4", f"questions = 4\n{control}")
    return study_file


def test_models_continue_the_first_halves_greedily(
    file: Path, tiny_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's continuations are those of transformers, and a question of one word has no halves."""
    seen: dict[str, str] = {}

    def watched(questions: Sequence[str], complete: Completer) -> Mapping[str, float]:
        def noted(texts: Sequence[str]) -> Sequence[str]:
            answers = complete(texts)
            seen.update(zip(texts, answers, strict=True))
            return answers

        return recall(questions, noted)

    monkeypatch.setattr("gruppo.study.recall_check.recall", watched)
    study = load_study(file)
    (planned,) = recall_left(study)
    measure_recall(study, planned, NullProgress(), Stop())
    assert set(seen) == {"abc def", "abd", "cab"}
    model, tokenizer = (kind.from_pretrained(tiny_folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    for text, answer in seen.items():
        given = tokenizer(text, return_tensors="pt")
        length = given["input_ids"].shape[1]
        (ids,) = model.generate(**given, do_sample=False, max_new_tokens=2 * length + 16)
        assert tokenizer.decode(ids[length:], skip_special_tokens=True).strip() == answer.strip()
    (entry,) = recall_of(study)
    assert (entry["evaluation"], entry["arms"]) == ("letters", ["low", "high"])
    assert entry["found"]["questions"]["questions"] == 2
    assert entry["found"]["control"]["questions"] == 1


def found_for(file: Path, values: Mapping[str, Any]) -> None:
    """Write what would be measured."""
    study = load_study(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gruppo.study.recall_check.recall", lambda texts, _: values[str(len(texts))])
        (planned,) = recall_left(study)
        measure_recall(study, planned, NullProgress(), Stop())


def test_the_page_compares_recall_with_the_control(file: Path) -> None:
    assert "recall of letters is left" in describe_plan(load_study(file), (), NullProgress(), checks=False)
    assert "| letters | low, high | not measured |" in write_report(load_study(file)).page.read_text()
    values = {"2": {"questions": 2, "exact": 0.5, "words": 0.75}, "1": {"questions": 1, "exact": 0.0, "words": 0.25}}
    found_for(file, values)
    report = write_report(load_study(file))
    page = report.page.read_text()
    assert "| letters | low, high | 2 | 50.0% | 75.0% |" in page
    assert "| control for letters | low, high | 1 | 0.0% | 25.0% |" in page
    assert report.content["recall"][0]["found"] == {"control": values["1"], "questions": values["2"]}
    assert recall_left(load_study(file)) == []
    change(file, "questions = 4", "questions = 3")
    assert len(recall_left(load_study(file))) == 1, "other questions"


def test_questions_without_halves_are_refused(file: Path) -> None:
    (file.parent / "control.jsonl").write_text('{"prompt": "cab", "answer": "a"}\n')
    study = load_study(file)
    (planned,) = recall_left(study)
    with pytest.raises(ValueError, match="letters: recall_control: no question has two words"):
        measure_recall(study, planned, NullProgress(), Stop())
