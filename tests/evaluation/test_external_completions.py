"""Completions from elsewhere in the shapes that people have them, and what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gruppo.config.loading import load_recipe
from gruppo.errors import UsageError
from gruppo.evaluation.compare import read_evaluation
from gruppo.evaluation.eval_run import grade_file
from gruppo.evaluation.results import EvalResult
from gruppo.utils.progress import NullProgress
from gruppo.utils.signals import Stop

TASK = [{"prompt": "What is 1 + 1?", "answer": "2"}, {"prompt": "What is 2 + 2?", "answer": "4"}]


def graded(
    tmp_path: Path, rows: list[dict[str, Any]], task: bool = True, grader: str | None = None, out: Path | None = None,
    resume: bool = False,
) -> EvalResult:  # fmt: skip
    path = tmp_path / "given.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TASK))
    settings: dict[str, Any] = {"grader": grader} if grader else {}
    if task:
        settings["task"] = str(tmp_path / "task.jsonl")
    recipe = load_recipe({"model": {"name": str(path)}, "evaluation": settings})
    return grade_file(recipe, path, task, out, resume, NullProgress(), Stop())


SHAPES = {
    "text, by index": [{"index": 0, "completion": "so 2"}, {"index": 1, "completion": "so 5"}],
    "by the question's text": [
        {"question": "What is  2 + 2?", "response": "it is 5"}, {"question": "What is 1 + 1?", "response": "2"},
    ],
    "messages": [
        {"id": "0", "completion": [{"role": "assistant", "content": "2"}]},
        {"id": "1", "completion": [{"role": "user", "content": "4"}, {"role": "assistant", "content": "6"}]},
    ],
    "lm-evaluation-harness": [
        {"doc_id": 1, "doc": {"question": "What is 2 + 2?"}, "target": "4", "resps": [["5"]]},
        {"doc_id": 0, "doc": {"question": "What is 1 + 1?"}, "target": "2", "resps": [["2"]]},
    ],
    "a conversation as the prompt": [
        {"prompt": [{"role": "user", "content": "What is 1 + 1?"}], "output": "2"}, {"idx": 1, "output": "1"},
    ],
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_rows(shape: str, tmp_path: Path) -> None:
    evaluation = graded(tmp_path, SHAPES[shape])
    (result,) = evaluation.sets.values()
    assert {each.text: list(each.correct) for each in result.questions} == {
        "What is 1 + 1?": [True],
        "What is 2 + 2?": [False],
    }
    assert result.figures["accuracy"] == 0.5
    assert "finished_share" not in result.figures, "how these ended is unknown"


def test_several_completions_of_a_question_in_one_row_or_in_many(tmp_path: Path) -> None:
    together = graded(
        tmp_path, [{"index": 0, "completions": ["2", "3", "2"]}, {"index": 1, "completions": ["4", "4", "5"]}]
    )
    apart = graded(tmp_path, [
        {"index": 0, "completion": "2"}, {"index": 1, "completion": "4"}, {"index": 0, "completion": "3"},
        {"index": 1, "completion": "4"}, {"index": 0, "completion": "2"}, {"index": 1, "completion": "5"},
    ])  # fmt: skip
    for evaluation in (together, apart):
        (result,) = evaluation.sets.values()
        assert result.figures["samples"] == 3
        assert result.figures["accuracy"] == pytest.approx(2 / 3)
        assert result.figures["curves"]["maj"]["3"]["value"] == 1
        assert result.figures["curves"]["pass"]["1"]["value"] == pytest.approx(2 / 3)


def test_rows_that_bring_their_own_reference(tmp_path: Path) -> None:
    rows = [
        {"question": "1 + 1", "reference": "2", "completion": "2"}, {"gold": 7, "response": "8"},
        {"problem": "half", "ground_truth": "\\frac12", "generation": "\\boxed{0.5}"},
    ]  # fmt: skip
    (result,) = graded(tmp_path, rows, task=False, grader="math_answer").sets.values()
    assert [list(each.correct) for each in result.questions] == [[True], [False], [True]]
    assert [each.text for each in result.questions] == ["1 + 1", "row 2", "half"]


@pytest.mark.parametrize(
    ("rows", "task", "words"),
    [
        ([{"index": 0, "text_of_mine": "2"}], True, ["row 1", "no completion", "text_of_mine"]),
        ([{"completion": "2"}], True, ["row 1", "prompt_id", '"completion": "2"']),
        ([{"index": 9, "completion": "2"}], True, ["row 1", "index", "9"]),
        ([{"index": 0, "completion": []}], True, ["contains no text"]),
        ([{"index": 0, "question": "What is 2 + 3?", "completion": "2"}], True, ["row 1", "another question"]),
        ([{"prompt_id": [1], "completion": "2"}], True, ["row 1", "prompt_id"]),
        ([{"completion": "2"}], False, ["no reference", "name the task"]),
        ([{"id": 3, "answer": each, "completion": "2"} for each in "24"], False, ["row 2", "'3'"]),
        ([], True, ["no rows"]),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_read_is_shown(tmp_path: Path, rows: list, task: bool, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        graded(tmp_path, rows, task)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_folder_can_be_read_and_graded_again(tmp_path: Path) -> None:
    """Our own samples are answers from elsewhere too, and give the same figures."""
    first = graded(tmp_path, SHAPES["text, by index"], out=tmp_path / "out")
    again = graded(tmp_path, SHAPES["text, by index"], out=tmp_path / "out", resume=True)
    assert again.as_dict()["sets"] == first.as_dict()["sets"]
    recipe = load_recipe({"model": {"name": "x"}, "evaluation": {"task": str(tmp_path / "task.jsonl")}})
    own = grade_file(recipe, tmp_path / "out" / "samples.parquet", True, None, False, NullProgress(), Stop())
    assert [s.figures["accuracy"] for s in own.sets.values()] == [s.figures["accuracy"] for s in first.sets.values()]


def test_unanswered_questions_and_nulls_are_counted(tmp_path: Path) -> None:
    """A question without an answer, and an answer that is null, which counts as wrong."""
    (result,) = graded(tmp_path, [{"index": 0, "completions": ["2", None]}]).sets.values()
    assert result.figures["accuracy"] == 0.5
    assert result.figures["unanswered"] == 1


def test_halves_of_characters_and_numbers_are_answers_too(tmp_path: Path) -> None:
    rows = [{"index": 0, "completion": "2 \ud83d"}, {"index": 1.0, "completion": 4}]
    made = graded(tmp_path, rows, out=tmp_path / "out")
    (result,) = made.sets.values()
    assert [list(each.correct) for each in result.questions] == [[True], [True]]


def test_an_edited_file_is_not_taken_for_the_one_that_was_graded(tmp_path: Path) -> None:
    graded(tmp_path, SHAPES["text, by index"], out=tmp_path / "out")
    with pytest.raises(UsageError, match="answers_sha256"):
        graded(tmp_path, [{"index": 0, "completion": "2"}], out=tmp_path / "out", resume=True)


def test_ids_of_the_task_go_before_places(tmp_path: Path) -> None:
    """Rows with ids from 1: their own answer, and no neighbour's."""
    rows = [{**row, "id": number} for number, row in enumerate(TASK, start=1)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "given.jsonl"
    path.write_text("".join(json.dumps({"id": n, "completion": t}) + "\n" for n, t in ((1, "2"), (2, "4"))))
    recipe = load_recipe({"model": {"name": "x"}, "evaluation": {"task": str(tmp_path / "own.jsonl")}})
    (result,) = grade_file(recipe, path, True, None, False, NullProgress(), Stop()).sets.values()
    assert result.figures["accuracy"] == 1


def test_completions_of_several_sets_are_reported_by_set(tmp_path: Path) -> None:
    """With names, domains and counts of their own; questions of the same task in two sets do not mix."""
    for name, rows in (("one", TASK), ("two", [{"prompt": "What is 3 + 3?", "answer": "6"}]), ("none", TASK[:1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"question": "What is 1 + 1?", "completion": "2"}, {"question": "What is 3 + 3?", "completion": "5"}]
    path = tmp_path / "given.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [{"task": str(tmp_path / f"{name}.jsonl")} for name in ("one", "two", "none")]
    recipe = load_recipe({"model": {"name": "x"}, "benchmarks": tasks})
    notes: list[str] = []

    class Noting(NullProgress):
        def note(self, text: str) -> None:
            notes.append(text)

    result = grade_file(recipe, path, True, tmp_path / "out", False, Noting(), Stop())
    figures = {name: (found.figures["accuracy"], found.figures["unanswered"]) for name, found in result.sets.items()}
    assert figures == {"one": (1.0, 1), "two": (0.0, 0)}
    assert notes == [f"none: {path} answers none of its 1 questions; it is left out"]
    assert read_evaluation(tmp_path / "out").sets.keys() == result.sets.keys()
