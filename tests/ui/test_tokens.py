"""A group, or the answers to a question, token by token: what is shown of the tables of a run folder."""

from __future__ import annotations

import json
import math
import os
import shlex
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gruppo.errors import UsageError
from gruppo.runs.tables import ADDED
from gruppo.ui import tokens
from gruppo.ui.tokens import MOST_TEXT, PAGE_COMPLETIONS, answers_data, group_data
from tests.ui.made import answer_row, rollout_row, write_answers, write_rollouts


def shown(run: Path, *rows: dict[str, Any], offset: int = 0, limit: int = PAGE_COMPLETIONS) -> dict[str, Any]:
    """Group 0 of step 1 as a page gets it: through JSON that has nothing but JSON's numbers."""
    write_rollouts(run, *rows)
    data = group_data(run, 1, 0, offset, limit)
    return json.loads(json.dumps(data, allow_nan=False))  # type: ignore[no-any-return]


def one(run: Path, **changes: Any) -> dict[str, Any]:
    """The only completion of a group."""
    return shown(run, rollout_row(**changes))["completions"][0]  # type: ignore[no-any-return]


def test_a_completion_has_its_tokens_and_their_numbers(tmp_path: Path) -> None:
    found = one(tmp_path, advantages=[0.5, 0.5, -2.0], ref_logprobs=[-1.5, -0.5, -0.5])
    assert (found["number"], found["tokens"], found["token_ids"]) == (0, 3, [5, 6, 7])
    assert found["token_texts"] == ["a", "b", "c"]
    assert found["values"]["advantage"] == [0.5, 0.5, -2]
    assert found["values"]["kl"] == [pytest.approx(math.exp(-1.0) + 1.0 - 1.0, rel=1e-6), 0, 0]
    assert found["values"]["value"] is None
    assert found["means"]["advantage"] == pytest.approx(-1 / 3, rel=1e-6)
    assert found["reward"] == 1
    assert found["parts"] == {"right": 1}
    assert found["trained"] is True
    assert found["blocks"] == found["steps"] == found["special"] == []


def test_only_rows_of_the_group_are_shown(tmp_path: Path) -> None:
    rows = [rollout_row(group=group, completion=number) for group in (0, 1) for number in (0, 1)]
    write_rollouts(tmp_path, *rows, rollout_row(group=2, completion=0))
    data = group_data(tmp_path, 1, 1)
    assert [found["number"] for found in data["completions"]] == [0, 1]
    assert (data["kind"], data["step"], data["group"], data["page"]["total"]) == ("group", 1, 1, 2)


def test_an_unknown_group_is_named(tmp_path: Path) -> None:
    write_rollouts(tmp_path, rollout_row())
    with pytest.raises(UsageError, match="step 1 has no group 7"):
        group_data(tmp_path, 1, 7)
    with pytest.raises(UsageError, match=r"step-000009\.parquet: is missing"):
        group_data(tmp_path, 9, 0)


def test_masked_tokens_are_observations_and_do_not_count(tmp_path: Path) -> None:
    mask = [True, True, False, False, True, False]
    logprobs = [-1.0, -1.0, None, None, -4.0, None]
    row = {"mask": mask, "sampling_logprobs": logprobs, "advantages": [1.0, 1.0, 9.0, 9.0, 1.0, 9.0]}
    found = shown(tmp_path, rollout_row(range(5, 11), **row))
    completion = found["completions"][0]
    assert completion["mask"] == mask
    assert completion["values"]["sampling_logprob"] == logprobs
    assert completion["means"]["sampling_logprob"] == -2
    assert completion["blocks"] == [
        {"kind": "observation", "start": 2, "end": 4},
        {"kind": "observation", "start": 5, "end": 6},
    ]
    advantage = next(each for each in found["quantities"] if each["key"] == "advantage")
    assert (advantage["low"], advantage["high"], advantage["limit"]) == (1, 1, 1)


def test_calls_are_found_across_tokens_of_an_episode_alone(tmp_path: Path) -> None:
    texts = ["so ", "<tool", "_call>{", '"n": 1}', "</tool_call>", "obs", "```python\n", "print()\n```", "\nend"]
    mask = [True] * 5 + [False] + [True] * 3
    row = {"token_texts": texts, "mask": mask, "episode": '{"turns": 1, "calls": 2}'}
    completion = one(tmp_path, token_ids=range(5, 14), **row)
    assert completion["blocks"] == [
        {"kind": "call", "start": 1, "end": 5},
        {"kind": "observation", "start": 5, "end": 6},
        {"kind": "call", "start": 6, "end": 8},
    ]
    assert completion["episode"] == {"turns": 1, "calls": 2}
    without = one(tmp_path, token_ids=range(5, 14), **{**row, "episode": None})
    assert [block["kind"] for block in without["blocks"]] == ["observation"]


def test_a_call_that_was_cut_off_ends_with_the_completion(tmp_path: Path) -> None:
    row = {"token_texts": ["<tool_call>", "{", '"a'], "episode": "{}"}
    assert one(tmp_path, **{**row, "episode": '{"turns": 0}'})["blocks"] == [{"kind": "call", "start": 0, "end": 3}]


def test_empty_token_texts_do_not_move_a_call(tmp_path: Path) -> None:
    texts = ["", "<tool_call>", "", "x</tool_call>", "", "y"]
    found = one(tmp_path, token_ids=range(5, 11), token_texts=texts, episode='{"turns": 0}')
    (call,) = found["blocks"]
    assert "".join(texts[call["start"] : call["end"]]) == "<tool_call>x</tool_call>"


def test_ends_of_steps_have_their_rewards(tmp_path: Path) -> None:
    steps = {"judge": {"rewards": [1.0, -0.5], "ends": [0, 2]}, "other": {"rewards": [0.0], "ends": [2]}}
    assert one(tmp_path, steps=json.dumps(steps))["steps"] == [
        {"name": "judge", "token": 0, "number": 1, "reward": 1},
        {"name": "judge", "token": 2, "number": 2, "reward": -0.5},
        {"name": "other", "token": 2, "number": 1, "reward": 0},
    ]


@pytest.mark.parametrize(
    "steps",
    [
        '{"judge": {"rewards": [1.0], "ends": [3]}}',
        '{"judge": {"rewards": [1.0], "ends": [-1]}}',
        '{"judge": {"rewards": [1.0], "ends": ["0"]}}',
        '{"judge": {"rewards": [1.0], "ends": [true]}}',
        '{"judge": {"rewards": 1.0, "ends": [0]}}',
        '{"judge": [1.0]}',
        "[1, 2]",
        "not JSON",
        "[" * 100_000,
        None,
    ],
)
def test_steps_that_fit_no_token_are_left_out(tmp_path: Path, steps: str | None) -> None:
    assert one(tmp_path, steps=steps)["steps"] == []


def test_offline_completions_have_no_numbers_of_an_engine(tmp_path: Path) -> None:
    data = shown(tmp_path, rollout_row(sampling_logprobs=None, finish_reason=None, policy_version=None))
    recorded = {each["key"]: each["recorded"] for each in data["quantities"]}
    assert (recorded["sampling_logprob"], recorded["ratio"], recorded["kl"], recorded["entropy"]) == (0, 0, 1, 1)
    assert data["completions"][0]["values"]["ratio"] is None


def test_an_older_table_has_ids_but_no_texts(tmp_path: Path) -> None:
    path = write_rollouts(tmp_path, rollout_row())
    pq.write_table(pq.read_table(path).drop_columns(sorted(ADDED[2])).replace_schema_metadata(None), path)
    data = group_data(tmp_path, 1, 0)
    completion = data["completions"][0]
    assert completion["token_ids"] == [5, 6, 7]
    assert completion["token_texts"] is None
    assert completion["values"]["entropy"] is None
    assert completion["printed"] == {}
    assert data["prompt"]["token_ids"] is None
    assert data["prompt"]["text"] == "1+1?"


@pytest.mark.parametrize(
    ("changes", "name", "value"),
    [
        ({"token_texts": ["a", "b"]}, "token_texts", None),
        ({"token_texts": ["a", None, "c"]}, "token_texts", None),
        ({"mask": [True]}, "mask", [True] * 3),
        ({"mask": None}, "mask", [True] * 3),
        ({"token_ids": None, "token_texts": None, "mask": None}, "token_ids", []),
        ({"text": None}, "text", ""),
        ({"reward": None, "failure": "raised"}, "reward", None),
        ({"reward": math.nan}, "reward", "NaN"),
        ({"reward_parts": '{"a": NaN, "b": -Infinity}'}, "parts", {"a": "NaN", "b": "-inf"}),
        ({"reward_parts": "[]"}, "parts", {"damaged": "[]"}),
        ({"extra": '{"a": [1, {"b": null}]}'}, "extra", {"a": [1, {"b": None}]}),
        ({"printed": '{"right": "said"}'}, "printed", {"right": "said"}),
        ({"printed": '{"right": 5}'}, "printed", {"right": "5"}),
    ],
)
def test_cells_that_do_not_fit_are_not_shown_as_if_they_did(
    tmp_path: Path, changes: dict[str, Any], name: str, value: Any
) -> None:
    row = rollout_row()
    row.update(changes)
    assert shown(tmp_path, row)["completions"][0][name] == value


def test_a_completion_of_no_tokens_is_shown(tmp_path: Path) -> None:
    found = one(tmp_path, token_ids=())
    assert (found["tokens"], found["token_ids"], found["blocks"]) == (0, [], [])
    assert set(found["means"].values()) == {None}


def test_nesting_without_end_is_a_text(tmp_path: Path) -> None:
    deep = '{"a": ' + "[" * 500 + "]" * 500 + "}"
    found = one(tmp_path, extra=deep)["extra"]
    assert list(found) == ["damaged"]


def test_long_texts_are_cut(tmp_path: Path) -> None:
    found = one(tmp_path, text="x" * (MOST_TEXT + 1_234), extra=json.dumps({"a": "y" * (MOST_TEXT + 5)}))
    assert found["text"].endswith("… (1,234 more characters)")
    assert found["extra"]["a"].endswith("… (5 more characters)")
    assert "more characters are not rendered" in found["rendered"]


def test_special_tokens_are_marked(tmp_path: Path) -> None:
    texts = ["<|im_start|>", "<eos>", "</s>", "[INST]", "<｜end▁of▁sentence｜>", "<think>", "a < b", "[1]", "< >", "<"]
    found = one(tmp_path, token_ids=range(5, 15), token_texts=texts)
    assert found["special"] == [0, 1, 2, 3, 4, 5]


# ---------------------------------------------------------------- pages


def test_pages_follow_each_other_without_gaps(tmp_path: Path) -> None:
    rows = [rollout_row(completion=number, reward=float(number)) for number in range(40)]
    first = shown(tmp_path, *rows)
    assert first["page"] == {"offset": 0, "shown": PAGE_COMPLETIONS, "total": 40}
    assert [each["number"] for each in first["outline"]] == list(range(40))
    assert first["rewards"] == {"known": 40, "mean": 19.5}
    seen: list[int] = []
    while len(seen) < 40:
        page = group_data(tmp_path, 1, 0, len(seen))
        assert page["quantities"] == first["quantities"]
        assert page["completions"]
        seen += [each["number"] for each in page["completions"]]
    assert seen == list(range(40))


def test_a_page_ends_before_it_has_too_many_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "PAGE_TOKENS", 10)
    rows = [rollout_row(range(5, 5 + length), completion=number) for number, length in enumerate((4, 6, 1, 25, 2))]
    write_rollouts(tmp_path, *rows)
    pages = [group_data(tmp_path, 1, 0, offset) for offset in (0, 2, 3, 4)]
    assert [page["page"]["shown"] for page in pages] == [2, 1, 1, 1]
    long = pages[2]["completions"][0]
    assert (long["tokens"], len(long["token_ids"]), len(long["values"]["advantage"]), len(long["mask"])) == (
        25, 10, 10, 10,
    )  # fmt: skip
    assert long["means"]["advantage"] == 1


@pytest.mark.parametrize(("offset", "limit", "count"), [(-5, 2, 2), (3, 0, 1), (3, 10**9, 0), (10**12, 5, 0)])
def test_offsets_and_limits_outside_their_range(tmp_path: Path, offset: int, limit: int, count: int) -> None:
    rows = [rollout_row(completion=number) for number in range(4)]
    if limit > 10**6:
        rows, count = [rollout_row(completion=number) for number in range(20)], PAGE_COMPLETIONS
    assert len(shown(tmp_path, *rows, offset=offset, limit=limit)["completions"]) == count


def test_texts_of_a_page_are_rendered_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MOST_RENDERED", 10)
    rows = [rollout_row(completion=number, text="**12**") for number in range(2)]
    found = shown(tmp_path, *rows)["completions"]
    assert "<strong>12</strong>" in found[0]["rendered"]
    assert found[1]["rendered"] is None


# ---------------------------------------------------------------- prompts, answers and commands


def test_messages_of_a_prompt(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?", "name": "ann"},
                {"role": "assistant", "content": [{"type": "text", "text": "part"}]}]  # fmt: skip
    prompt = shown(tmp_path, rollout_row(prompt=json.dumps(messages)))["prompt"]
    assert prompt["text"] is None
    assert [(each["role"], each["text"]) for each in prompt["messages"]][:2] == [
        ("system", "Be brief."),
        ("user", "1+1?"),
    ]
    assert "part" in prompt["messages"][2]["text"]
    assert json.loads(prompt["messages"][1]["more"]) == {"name": "ann"}
    assert prompt["columns"] == {"answer": "2"}
    assert prompt["token_ids"] == [1, 2]
    assert prompt["special"] == [0]


@pytest.mark.parametrize("content", ["[1, 2] are what?", "[1, 2]", "[", "[]" * 3, "[" * 100_000, "", None])
def test_a_text_that_begins_like_messages_is_a_text(tmp_path: Path, content: str | None) -> None:
    prompt = shown(tmp_path, rollout_row(prompt=content))["prompt"]
    assert prompt["messages"] is None
    assert prompt["text"] == (content or "")


def test_answers_have_their_verdicts(tmp_path: Path) -> None:
    other = answer_row(eval_set="gsm8k")
    wrong = answer_row((5,), sample=1, correct=False, extracted=None, vote=None, score=math.nan, logprobs=[-3.0])
    write_answers(tmp_path, other, answer_row(), answer_row(prompt_id="e/1"), wrong)
    data = json.loads(json.dumps(answers_data(tmp_path, 1, "", "e/0"), allow_nan=False))
    assert [each["number"] for each in data["completions"]] == [0, 1]
    assert data["completions"][0]["verdict"] == {
        "correct": True, "extracted": "2", "rule": "last number", "other_rules": {"box": None}, "vote": "2",
        "score": None,
    }  # fmt: skip
    assert data["completions"][1]["verdict"]["score"] == "NaN"
    assert [each["correct"] for each in data["outline"]] == [True, False]
    assert data["completions"][1]["values"] == {"sampling_logprob": [-3]}
    assert data["prompt"]["text"] == "1+1?"
    assert data["commands"] == []
    assert len(answers_data(tmp_path, 1, "gsm8k", "e/0")["completions"]) == 1


def test_an_unknown_question_is_named(tmp_path: Path) -> None:
    write_answers(tmp_path, answer_row())
    with pytest.raises(UsageError, match="has no question 'e/9'"):
        answers_data(tmp_path, 1, "", "e/9")


def test_answers_of_another_engine_have_no_numbers(tmp_path: Path) -> None:
    write_answers(tmp_path, answer_row(logprobs=None, token_ids=[], token_texts=None, mask=None))
    data = answers_data(tmp_path, 1, "", "e/0")
    assert data["completions"][0]["values"] == {"sampling_logprob": None}
    assert data["completions"][0]["text"] == "abc"


@pytest.mark.parametrize("name", ["right", "a b", "$(touch x)", "`id`", "it's", '"; rm -rf ~', "-x", "--step=3", "é"])
def test_a_command_repeats_the_call_of_each_reward(tmp_path: Path, name: str) -> None:
    run = tmp_path / "a run; $(id)"
    (command,) = shown(run, rollout_row(reward_parts=json.dumps({name: 1.0})))["commands"]
    assert command["reward"] == name
    arguments = ["--step", "1", "--group", "0", f"--reward={name}"]
    assert shlex.split(command["command"]) == ["gruppo", "rerun-reward", str(run), *arguments]


def test_a_run_that_looks_like_an_option_is_quoted_as_a_path(tmp_path: Path) -> None:
    write_rollouts(tmp_path, rollout_row())
    (command,) = group_data(tmp_path, 1, 0, named="--out")["commands"]
    assert shlex.split(command["command"])[2] == "./--out"


@pytest.mark.parametrize("name", ["environment", "reward_model", "a\nb", "a\u202eb", "\x1b[31m", "\u200b"])
def test_no_command_for_what_no_function_returned_or_hides_characters(tmp_path: Path, name: str) -> None:
    parts = json.dumps({name: 1.0, "right": 0.5})
    assert [each["reward"] for each in shown(tmp_path, rollout_row(reward_parts=parts))["commands"]] == ["right"]


# ---------------------------------------------------------------- tables that are not what they seem


@pytest.mark.parametrize("kind", ["a link out of the folder", "a folder", "a pipe", "a folder that is a link"])
def test_only_files_of_the_run_are_read(tmp_path: Path, kind: str) -> None:
    outside, run = write_rollouts(tmp_path / "other", rollout_row()), tmp_path / "run"
    path = run / "rollouts" / outside.name
    (run if kind == "a folder that is a link" else path.parent).mkdir(parents=True)
    if kind == "a folder that is a link":
        path.parent.symlink_to(outside.parent)
    elif kind == "a link out of the folder":
        path.symlink_to(outside)
    elif kind == "a folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(UsageError, match=r"step-000001\.parquet: is (a link|damaged)"):
        group_data(run, 1, 0)


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    path = write_rollouts(tmp_path, *[rollout_row(completion=number) for number in range(30)])
    content = bytearray(path.read_bytes())
    content[100:140] = b"\xff" * 40
    path.write_bytes(bytes(content))
    with pytest.raises(UsageError, match=r"step-000001\.parquet: is damaged"):
        group_data(tmp_path, 1, 0)
