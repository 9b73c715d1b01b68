"""Conversations in the forms that datasets use, references that are lists or missing, and values that are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from gruppo.config.loading import RecipeError, load_recipe
from gruppo.config.sections import Task
from gruppo.data.loading import checked_rows, load_training
from gruppo.errors import UsageError
from gruppo.evaluation.datasets import read_data
from gruppo.rewards import text_of
from gruppo.rewards.interop import verifiers, verl
from gruppo.types import Row
from gruppo.utils.progress import NullProgress
from tests.data.load import training

USER, ANSWER = {"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": "7"}


def given(*rows: Any, answered: bool = False, **fields: Any) -> list[Row]:
    return list(load_training(Task(**fields), "task", False, NullProgress(), rows, answered)[0].rows)


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


@pytest.mark.parametrize(
    ("content", "joined"),
    [
        ([text("What is "), text("3?")], "What is 3?"),
        ([{"type": "text", "text": "a", "image_url": None}], "a"),
        (["a", "b"], "ab"),
        ([{"text": "a"}], "a"),
        ([{"type": "input_text", "text": "a"}], "a"),
        ([], ""),
    ],
)
def test_text_parts_are_joined(content: list, joined: str) -> None:
    message = {"role": "user", "content": content}
    assert given({"prompt": [message]})[0]["prompt"] == [{"role": "user", "content": joined}]
    answered = given(
        {"prompt": [USER], "chosen": [{**ANSWER, "content": content}], "rejected": [ANSWER]}, answered=True
    )
    assert answered[0]["chosen"] == [{**ANSWER, "content": joined}]
    assert given({"messages": [USER, {**ANSWER, "content": content}]}, answered=True)[0]["completion"] == [
        {**ANSWER, "content": joined}
    ]
    assert text_of([{"role": "assistant", "content": content}]) == joined


@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio", "video"])
def test_other_parts_are_refused_by_name(kind: str) -> None:
    message = {"role": "user", "content": [text("a"), {"type": kind, kind: "x.png"}]}
    with pytest.raises(UsageError, match=rf'rows, row 2: prompt\[0\]\.content\[1\]: is a part of the type "{kind}"'):
        checked_rows([{"prompt": "a"}, {"prompt": [message]}], "rows")


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris", "day": None}}}


def calling(call: Any, **message: Any) -> list[Any]:
    return [USER, {"role": "assistant", "tool_calls": [call], **message}, {"role": "tool", "content": "x"}, USER]


@pytest.mark.parametrize("message", [{}, {"content": None}, {"content": ""}])
def test_arguments_as_json_text_are_parsed_once(message: dict[str, Any]) -> None:
    arguments = json.dumps(CALL["function"]["arguments"])
    written = {**CALL, "function": {"name": "weather", "arguments": arguments}}
    assert given({"prompt": calling(written, **message)}) == given({"prompt": calling(CALL, **message)})
    (row,) = given({"prompt": calling(CALL, **message)})
    assert row["prompt"][1]["tool_calls"] == [CALL]
    assert row["prompt"][1]["content"] == message.get("content")


@pytest.mark.parametrize("arguments", ["city: Paris", "[1]", json.dumps(json.dumps({"city": "Paris"})), 3, ["x"]])
def test_arguments_that_are_not_an_object_are_refused(arguments: Any) -> None:
    call = {"function": {"name": "weather", "arguments": arguments}}
    with pytest.raises(UsageError, match=r"prompts, row 1: prompt\[1\]\.tool_calls\[0\]\.function\.arguments = "):
        given({"prompt": calling(call)})


def test_a_conversation_as_json_text_is_a_conversation() -> None:
    chat = [{"role": "system", "content": "s"}, USER]
    assert given({"prompt": json.dumps(chat)}) == given({"prompt": chat})
    rows = given({"messages": json.dumps([*chat, ANSWER])}, answered=True)
    assert rows == given({"messages": [*chat, ANSWER]}, answered=True)
    assert given({"prompt": '["a", "b"]'})[0]["prompt"] == '["a", "b"]', "other JSON is text"
    with pytest.raises(UsageError, match="a list as Python prints it"):
        given({"prompt": str(chat)})


def test_the_answer_of_a_conversation_is_not_in_the_prompt(tmp_path: Path) -> None:
    conversation = [USER, {"role": "assistant", "content": "hm"}, USER, ANSWER]
    (row,) = given({"messages": conversation})
    assert row == {"prompt": conversation[:3], "answer": "7"}
    assert given({"messages": conversation, "answer": "8"})[0] == {"prompt": conversation[:3], "answer": "8"}
    assert given({"messages": conversation[:3]}) == [{"prompt": conversation[:3]}]
    with pytest.raises(UsageError) as caught:
        given({"messages": 3, "question": "x"})
    assert "messages" not in str(caught.value).partition("columns = ")[2]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (7, ["prompt = 7", "neither text"]),
        (None, ["prompt = None", "no value"]),
        ({"role": "user"}, ["neither text"]),
        (["a"], ["prompt[0] = 'a'", "without role and content"]),
        ([{"from": "human", "value": "a"}], ["rename from and value to role and content"]),
        ([{"role": "human", "content": "a"}], ['prompt[0].role = "human"', 'write "user"']),
        ([{"role": "usr", "content": "a"}], ['did you mean "user"']),
        ([{"role": "user", "content": None}], ["prompt[0]", "without role and content"]),
        ([{"role": "user", "content": 5}], ["prompt[0].content = 5"]),
        ([{"role": "assistant", "content": None, "tool_calls": []}], ["without role and content"]),
    ],
)
def test_wrong_prompts_name_row_column_and_value(prompt: Any, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        given({"prompt": "a"}, {"prompt": prompt})
    for word in ["prompts, row 2", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a\ud800b"}, {"prompt": [{"role": "user", "content": "\udfff"}]},
        {"prompt": "a", "prompts": ["\ud83d"]}, {"prompt": "a", "prompt_info": {"\ud83d": 1}},
    ],
)  # fmt: skip
def test_half_of_a_surrogate_pair_is_refused(tmp_path: Path, row: Row) -> None:
    (tmp_path / "r.jsonl").write_text('{"prompt": "\\ud83d\\ude42"}\n' + json.dumps(row) + "\n")
    with pytest.raises(UsageError, match=r"r\.jsonl, row 2: the column prompt\w* contains .* surrogate pair"):
        training(tmp_path / "r.jsonl")
    with pytest.raises(UsageError, match="surrogate pair"):
        given(row)


def test_deep_values_are_refused(tmp_path: Path) -> None:
    deep: Any = "x"
    for _ in range(70):
        deep = [deep]
    (tmp_path / "r.jsonl").write_text(json.dumps({"prompt": "a", "info": deep}))
    with pytest.raises(UsageError, match=r"row 1: the column info is nested more than 64 levels deep"):
        training(tmp_path / "r.jsonl")
    itself: list[Any] = []
    itself += [itself, itself]
    with pytest.raises(UsageError, match="nested more than 64"):
        given({"prompt": "a", "info": itself})
    key = ".".join(["a"] * 2000)
    (tmp_path / "r.toml").write_text(f"{key} = 1\n")
    with pytest.raises(RecipeError, match=r"r\.toml: a: is nested more than 64 levels deep"):
        load_recipe(tmp_path / "r.toml")
    with pytest.raises(RecipeError, match="nested more than 64 levels deep"):
        load_recipe({"model": {"name": "m"}}, [f"task.options.{key}=1"])
    with pytest.raises(RecipeError, match="nested more than 64 levels deep"):
        load_recipe({"model": {"name": "m"}}, ["task.options.x=" + "[" * 300 + "]" * 300])
    with pytest.raises(RecipeError, match="nested more than 64 levels deep"):
        load_recipe({"model": {"name": "m"}, "task": {"options": {"x": itself}}})


def test_a_fifo_or_device_is_refused_without_waiting(tmp_path: Path) -> None:
    for name in ("r.toml", "r.jsonl"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(RecipeError, match=r"r\.toml: is a FIFO"):
        load_recipe(tmp_path / "r.toml")
    with pytest.raises(RecipeError, match=r"/dev/zero: is a device"):
        load_recipe("/dev/zero")
    with pytest.raises(UsageError, match=r"r\.jsonl is a FIFO"):
        training(tmp_path / "r.jsonl")
    from gruppo.cli.sample import _conversation

    with pytest.raises(UsageError, match="is a FIFO"):
        _conversation(str(tmp_path / "r.jsonl"))


def test_verl_and_verifiers_get_objects_from_json_text() -> None:
    def score(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any) -> float:
        return float(solution_str == ground_truth and extra_info["index"] == 3)

    columns = {"reward_model": [json.dumps({"ground_truth": "7"})], "extra_info": [json.dumps({"index": 3})]}
    assert verl(score)(["q"], ["7"], **columns) == [1.0]

    def rubric(completion: str, info: Any) -> float:
        return float(completion == info["target"])

    assert verifiers(rubric)(["q"], ["7"], info=[json.dumps({"target": "7"})]) == [1.0]
    assert verifiers(rubric)(["q"], ["7"], info=[{"target": "7"}]) == [1.0]


def recipe(reward: list[str], **tables: Any) -> Any:
    return load_recipe({"model": {"name": "m"}, "reward": {"functions": reward}, **tables})


@pytest.mark.parametrize("missing", [None, float("nan"), "", " ", []])
@pytest.mark.parametrize("reward", ["exact_match", "last_number", "math_verify", "choice"])
def test_rows_without_a_reference_are_counted(reward: str, missing: Any) -> None:
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": missing}, {"prompt": "c"}]
    with pytest.raises(UsageError, match=r"2 of 3 rows of prompts have no answer .*first: row 2, answer = "):
        read_data(recipe([reward]), [reward], rows, NullProgress())


@pytest.mark.parametrize("reward", ["exact_match", "last_number", "math_verify", "choice"])
@pytest.mark.parametrize("column", ["Answer", "answers", "solutions", "label", "Ground_Truth", "target"])
def test_a_column_that_probably_has_the_references_is_named(reward: str, column: str) -> None:
    rows = [{"prompt": "a", "level": 1, column: "1"}]
    with pytest.raises(UsageError) as caught:
        read_data(recipe([reward]), [reward], rows, NullProgress())
    assert f"(columns: prompt, level, {column})" in str(caught.value)
    assert str(caught.value).endswith(f'; write task.columns = {{answer = "{column}"}}')


def test_without_a_likely_column_the_advice_is_general_and_an_option_can_give_the_references() -> None:
    rows = [{"prompt": "a", "level": 1}]
    with pytest.raises(UsageError, match=r'add it, or name one: task\.columns = \{answer = "…"\}'):
        read_data(recipe(["exact_match"]), ["exact_match"], rows, NullProgress())
    options = {"functions": ["exact_match"], "options": {"exact_match": {"answer": ["1"]}}}
    given = load_recipe({"model": {"name": "m"}, "reward": options})
    assert read_data(given, ["exact_match"], rows, NullProgress()).columns == ["level"]


def test_the_table_of_a_mixture_that_lacks_references_is_named(tmp_path: Path) -> None:
    for name, column in (("a", "answer"), ("b", "label")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "q", column: "1"}) + "\n")
    mixed = recipe(["exact_match"], mixture=[{"name": str(tmp_path / f"{name}.jsonl")} for name in "ab"])
    with pytest.raises(UsageError, match=r'write mixture\[1\]\.columns = \{answer = "label"\}'):
        read_data(mixed, ["exact_match"], None, NullProgress())


def test_questions_without_a_reference_are_counted(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "a", "answer": "1"}\n{"prompt": "b", "answer": null}\n')
    table = {"task": str(tmp_path / "q.jsonl"), "grader": "exact_match"}
    rows = [{"prompt": "a", "answer": "1"}]
    with pytest.raises(UsageError, match=r'evaluation\.grader = "exact_match": 1 of 2 rows of .*row 2, answer = None'):
        read_data(recipe(["exact_match"], evaluation=table), ["exact_match"], rows, NullProgress())


def test_a_column_that_some_rows_lack_is_named_with_a_count() -> None:
    from gruppo.rollout.workers.rewards import RewardPool

    rows = [{"prompt": str(n), **({} if n == 2 else {"level": n})} for n in range(4)]
    reward = "tests/functions_of_users.py:by_level"
    data = read_data(recipe([reward]), [reward], rows, NullProgress())
    assert data.partial_columns == {"level": "3 of 4 rows have it, but not prompts, row 3"}
    with pytest.raises(UsageError, match=r'"level".*3 of 4 rows have it, but not prompts, row 3'):
        RewardPool([reward], [], data.columns, workers=1, partial_columns=data.partial_columns)
