"""Columns, template, system; and the held-out share, whose rows depend only on their prompts."""

from __future__ import annotations

import datetime
import json
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gruppo.config.sections import Task
from gruppo.data.loading import load_training
from gruppo.errors import UsageError
from gruppo.evaluation.runner import evaluate
from gruppo.utils.progress import NullProgress
from tests.data.load import both_sides, given, questions, training

QUESTIONS = [{"question": f"What is {n}?", "solution": str(n), "level": n % 3} for n in range(4)]


def save(folder: Path, rows: list, name: str = "rows.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def test_columns_are_renamed_and_the_others_stay(tmp_path: Path) -> None:
    rows = training(save(tmp_path, QUESTIONS), columns={"prompt": "question", "answer": "solution"})
    assert rows[1] == {"prompt": "What is 1?", "answer": "1", "level": 1}


def test_columns_may_be_swapped_and_hide_others(tmp_path: Path) -> None:
    path = save(tmp_path, [{"prompt": "a", "answer": "b", "text": "c"}])
    assert training(path, columns={"prompt": "answer", "answer": "prompt"}) == [
        {"prompt": "b", "answer": "a", "text": "c"}
    ]
    assert training(path, columns={"prompt": "text"}) == [{"prompt": "c", "answer": "b"}]


def test_template_and_system(tmp_path: Path) -> None:
    path = save(tmp_path, QUESTIONS[:1])
    plain = training(path, template="{question} ({level}) {{x}}")
    assert plain[0]["prompt"] == "What is 0? (0) {x}"
    assert plain[0]["question"] == "What is 0?"
    user = {"role": "user", "content": "What is 0?"}
    with_system = training(path, columns={"prompt": "question"}, system="Think.")
    assert with_system[0]["prompt"] == [{"role": "system", "content": "Think."}, user]
    assert training(path, columns={"prompt": "question"}, system="")[0]["prompt"] == [user]


def test_system_of_a_conversation(tmp_path: Path) -> None:
    user, existing = {"role": "user", "content": "x"}, {"role": "system", "content": "Mine."}
    path = save(tmp_path, [{"prompt": [user]}, {"prompt": [existing, user]}])
    added = {"role": "system", "content": "Think."}
    assert [row["prompt"] for row in training(path, system="Think.")] == [[added, user], [existing, user]]
    assert [row["prompt"] for row in training(path, system="")] == [[user], [existing, user]]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, ["row 1", "no prompt", 'task.columns = {prompt = "question"}']),
        ({"columns": {"prompt": "qestion"}}, ["task.columns", 'prompt = "qestion"', 'did you mean "question"']),
        ({"columns": {"prompt": "level"}}, ["row 1", "prompt = 0", "neither text"]),
        ({"template": "{questions}?"}, ["task.template", "{questions}", 'did you mean "question"']),
        ({"template": "no column"}, ["task.template", "no column"]),
        ({"template": "{question"}, ["task.template", "{{ }}"]),
        ({"template": "{question} }"}, ["task.template", "{{ }}"]),
        ({"template": '{"a": {question}}'}, ["task.template", "{{ }}"]),
        ({"template": "{}"}, ["task.template", "not the name of a column"]),
    ],
)
def test_mistakes_name_the_field_and_the_fix(tmp_path: Path, fields: dict, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        training(save(tmp_path, QUESTIONS), **fields)
    for word in words:
        assert word in str(caught.value)


def test_mistakes_in_an_evaluation_task_name_its_table(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'evaluation\.task\.columns = \{prompt = "question"\}'):
        questions(save(tmp_path, QUESTIONS))


def test_a_template_needs_a_value_in_every_row(tmp_path: Path) -> None:
    path = save(tmp_path, [{"q": "a", "hint": "b"}, {"q": "c", "hint": None}])
    with pytest.raises(UsageError, match=r"row 2 has no value in \{hint\}"):
        training(path, template="{q} {hint}")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (0.5, "0.5"),
        (True, "true"),
        ("a", "a"),
        ("", ""),
        (np.int64(3), "3"),
        (np.float32(0.5), "0.5"),
        (np.bool_(True), "true"),
        (np.str_("a"), "a"),
        (Decimal("1.50"), "1.50"),
        (datetime.date(2020, 1, 2), "2020-01-02"),
        (np.datetime64("2020-01-02"), "2020-01-02"),
        (np.datetime64("2020-01-02", "ns"), "2020-01-02 00:00:00"),
        (pd.Timestamp("2020-01-02"), "2020-01-02 00:00:00"),
        ([1, "a", None], '[1, "a", null]'),
        ({"a": np.int64(3)}, '{"a": 3}'),
        (np.array([1, 2]), "[1, 2]"),
        ((Decimal("1.5"),), '["1.5"]'),
    ],
)  # fmt: skip
def test_a_template_shows_plain_text_and_lists_as_json(value: Any, text: str) -> None:
    (row,) = given([{"q": value}], template="{q} + 1")
    assert row["prompt"] == f"{text} + 1"
    task = Task(template="{q}?", completion="It is {q}.")
    train, _ = load_training(task, "task", False, NullProgress(), [{"q": value}], True)
    assert train.rows[0]["completion"] == f"It is {text}."


@pytest.mark.parametrize(
    "value", [None, float("nan"), np.float32("nan"), np.datetime64("NaT"), Decimal("nan"), pd.NA, pd.NaT]
)
def test_a_template_refuses_missing_values(value: Any) -> None:
    rows = [{"q": "a", "hint": "b"}, {"q": "c", "hint": value}]
    for source in (rows, pd.DataFrame(rows)):
        with pytest.raises(UsageError, match=r"row 2 has no value in \{hint\}"):
            given(source, template="{q} {hint}")


def test_nan_in_a_file_is_a_missing_value(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"row 1 has no value in \{hint\}"):
        training(save(tmp_path, [{"hint": float("nan")}]), template="{hint}")


@pytest.mark.parametrize("value", [b"abc", bytearray(b"abc"), np.bytes_(b"abc"), ["a", b"abc"], {"x": b"abc"}])
def test_a_template_refuses_bytes_by_name(value: Any) -> None:
    with pytest.raises(UsageError, match=r"task\.template: prompts, row 1 has bytes in \{q\}, .*abc.*decode"):
        given([{"q": value}], template="{q}")


def test_equal_values_are_on_one_side_whatever_their_type() -> None:
    task = Task(template="{q}", held_out=0.3)
    plain, numpy = (
        load_training(task, "task", False, NullProgress(), [{"q": kind(number)} for number in range(50)])[0]
        for kind in (int, np.int64)
    )
    assert plain.numbers == numpy.numbers


MANY = [{"prompt": f"Question {n}", "answer": n} for n in range(2000)]


def test_held_out_share_divides_the_rows(tmp_path: Path) -> None:
    train, held_out = both_sides(save(tmp_path, MANY), held_out=0.2)
    assert 340 < len(held_out.rows) < 460, "within three standard deviations of 400"
    assert sorted([*train.numbers, *held_out.numbers]) == list(range(2000))
    assert [MANY[number] for number in held_out.numbers] == list(held_out.rows)
    assert questions(tmp_path / "rows.jsonl", held_out=0.2).rows == held_out.rows


def test_held_out_rows_depend_only_on_their_prompts(tmp_path: Path) -> None:
    _, held_out = both_sides(save(tmp_path, MANY), held_out=0.2)
    shuffled = random.Random(0).sample(MANY, 500)
    _, fewer = both_sides(save(tmp_path, [{**row, "more": 1} for row in shuffled], "fewer.jsonl"), held_out=0.2)
    wanted = {row["prompt"] for row in held_out.rows} & {row["prompt"] for row in shuffled}
    assert {row["prompt"] for row in fewer.rows} == wanted
    _, larger = both_sides(tmp_path / "rows.jsonl", held_out=0.3)
    assert {row["prompt"] for row in held_out.rows} < {row["prompt"] for row in larger.rows}


def test_equal_prompts_stay_on_one_side_and_are_evaluated_once(tmp_path: Path) -> None:
    train, held_out = both_sides(save(tmp_path, MANY[:50] * 3), held_out=0.4)
    assert not {row["prompt"] for row in train.rows} & {row["prompt"] for row in held_out.rows}
    assert len(train.rows) == 3 * (50 - len(held_out.rows))
    assert len({row["prompt"] for row in held_out.rows}) == len(held_out.rows)
    assert held_out.numbers == sorted(held_out.numbers)


def test_held_out_rows_do_not_depend_on_system_or_template(tmp_path: Path) -> None:
    rows = [{"question": f"Question {n}", "hint": n % 7} for n in range(300)]
    path = save(tmp_path, rows)

    def held_out(**fields: object) -> list[int]:
        return list(both_sides(path, held_out=0.2, **fields)[1].numbers)

    columns = {"prompt": "question"}
    wanted = held_out(columns=columns)
    assert wanted == held_out(columns=columns, system="Think.") == held_out(columns=columns, system="")
    assert wanted == held_out(template="{question} Think first.") == held_out(template="Q: {question}", system="x")
    assert wanted == held_out(columns=columns, template="{prompt} ({hint})")
    assert held_out(template="{question} {hint}") == held_out(template="{hint}: {question}", system="x")
    assert held_out(columns=columns, system="Think.", held_out_by="prompt") != wanted
    messages = save(tmp_path, [{"messages": [{"role": "user", "content": row["question"]}]} for row in rows], "m.jsonl")
    sides = [both_sides(messages, held_out=0.2, **fields)[1].numbers for fields in ({}, {"system": "x"})]
    assert sides[0] == sides[1]


def test_held_out_rows_by_the_finished_prompt_are_those_of_earlier_versions(tmp_path: Path) -> None:
    _, held_out = both_sides(save(tmp_path, MANY[:200]), held_out=0.1, system="Think.", held_out_by="prompt")
    assert held_out.numbers == [
        20, 33, 44, 48, 52, 59, 77, 97, 113, 114, 115, 124, 131, 141, 143, 151, 167, 196, 197,
    ]  # fmt: skip


def test_held_out_share_of_a_generated_task() -> None:
    train, held_out = both_sides("arithmetic", held_out=0.25)
    assert not {str(row["prompt"]) for row in train.rows} & {str(row["prompt"]) for row in held_out.rows}
    assert 0.2 < len(held_out.rows) / (len(held_out.rows) + len(train.rows)) < 0.3


def test_a_side_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"task\.held_out = 0\.001.*none would be held out"):
        both_sides(save(tmp_path, MANY[:3]), held_out=0.001)
    with pytest.raises(UsageError, match=r"task\.held_out = 0\.99.*all would be held out"):
        training(save(tmp_path, MANY[:2]), held_out=0.99)


def test_test_split_of_a_user_function_and_of_arithmetic() -> None:
    assert len(both_sides("arithmetic", options={"held_out": 9})[1].rows) == 9
    assert len(questions("arithmetic", options={"held_out": 9}).rows) == 9
    assert both_sides("tests/functions_of_users.py:task")[1].rows == [{"prompt": "a", "answer": "a"}]


def test_evaluate_accepts_a_table(tiny_folder: str, tmp_path: Path) -> None:
    task = {"name": str(save(tmp_path, QUESTIONS)), "template": "{level}", "columns": {"answer": "solution"}}
    outcome = evaluate(tiny_folder, task, max_tokens=2, grader="exact_match", questions=3)
    assert [prompt.content for prompt in outcome.eval_set.prompts] == ["0", "1", "2"]
    with pytest.raises(UsageError, match=r'task\["colums"\].*"columns"'):
        evaluate(tiny_folder, {"name": "rows.jsonl", "colums": {}})
