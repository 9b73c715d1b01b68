"""Rows to prompts: invalid rows, a chat template applied once, exact token ids, sampling order."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pandas
import pytest

from gruppo.config.sections import Task
from gruppo.data.loading import checked_rows, load_training
from gruppo.data.mixture import draw_prompts
from gruppo.data.tokenization import tokenize_rows
from gruppo.errors import UsageError
from gruppo.types import Prompt, Row
from gruppo.utils.progress import NullProgress
from tests.conftest import make_tokenizer


def write(path: Path, *lines: object) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def load_rows(name: str, **fields: object) -> list[Row]:
    return list(load_training(Task(name=name, **fields), "task", False, NullProgress())[0].rows)


def test_jsonl_rows_keep_their_columns(tmp_path: Path) -> None:
    rows = [{"prompt": "a\u2028b", "answer": 1}, {"prompt": [{"role": "user", "content": "c"}], "level": [1, 2]}]
    assert load_rows(write(tmp_path / "r.jsonl", rows[0], "", rows[1])) == rows
    with_mark = tmp_path / "mark.jsonl"
    with_mark.write_text("\ufeff" + json.dumps(rows[0]) + "\r\n", encoding="utf-8")
    assert load_rows(str(with_mark)) == rows[:1]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], ["no rows"]),
        (["{"], ["line 1", "not JSON"]),
        (["[1]"], ["line 1", "one object per line"]),
        ([{"prompt": "x"}, {"question": "y"}], ["row 2", "no prompt", "question"]),
        ([{"prompt": ""}], ["row 1", "empty"]),
        ([{"prompt": 3}], ["row 1", "neither text nor a list"]),
        ([{"prompt": []}], ["row 1"]),
        ([{"prompt": [{"content": "x"}]}], ["row 1", "without role"]),
    ],
)
def test_unusable_files_name_file_and_row(tmp_path: Path, lines: list, words: list[str]) -> None:
    path = write(tmp_path / "r.jsonl", *lines)
    with pytest.raises(UsageError) as caught:
        load_rows(path)
    for word in [path, *words]:
        assert word in str(caught.value)


def test_missing_file_and_unknown_task() -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_rows("none.jsonl")
    with pytest.raises(UsageError, match='did you mean "arithmetic"'):
        load_rows("aritmetic")
    with pytest.raises(UsageError, match=r"options.*maximum, held_out, negative"):
        load_rows("arithmetic", options={"maximun": 3})
    with pytest.raises(UsageError, match="cannot be imported"):
        load_rows("nowhere.at_all:load")


def test_file_has_no_held_out_part(tmp_path: Path) -> None:
    task = Task(name=write(tmp_path / "r.jsonl", {"prompt": "x"}))
    with pytest.raises(UsageError, match=r"task\.held_out = 0\.1.*evaluation\.task"):
        load_training(task, "task", True, NullProgress())


def test_chat_template_is_applied_once() -> None:
    """open-r1#462: the BOS token appeared twice."""
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<"
    tokenizer.chat_template = "<" + "{% for m in messages %}{{ m['content'] }}{% endfor %}="
    (prompt,) = tokenize_rows([{"prompt": [{"role": "user", "content": "a b"}], "answer": 1}], tokenizer, 99, 5, "t")
    assert tokenizer.convert_ids_to_tokens(list(prompt.token_ids)) == ["<", "a", " ", "b", "="]
    assert prompt.columns == {"answer": 1}
    assert prompt.content == [{"role": "user", "content": "a b"}]


def test_started_assistant_message_is_continued() -> None:
    tokenizer = make_tokenizer()
    content = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}={% endfor %}{% if add_generation_prompt %}?{% endif %}"
    )
    (prompt,) = tokenize_rows([{"prompt": content}], tokenizer, 99, 5, "t")
    assert tokenizer.convert_ids_to_tokens(list(prompt.token_ids)) == ["a", "=", "b"]


@pytest.mark.parametrize(
    "content", ["\ud800", [{"role": "user", "content": "\ud800"}], [{"role": "judge", "content": "a"}]]
)
def test_prompt_that_cannot_be_tokenized_is_reported_with_its_row(content: object) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] != 'user' %}{{ raise_exception('roles!') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(UsageError, match="row 2"):
        tokenize_rows([{"prompt": "a"}, {"prompt": content}], tokenizer, 99, 5, "t")


def test_text_is_used_as_it_is() -> None:
    (prompt,) = tokenize_rows([{"prompt": "ab"}], make_tokenizer(), 99, 5, "t")
    assert make_tokenizer().convert_ids_to_tokens(list(prompt.token_ids)) == ["a", "b"]


def test_messages_need_a_chat_template() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="chat template"):
        tokenize_rows([{"prompt": [{"role": "user", "content": "a"}]}], tokenizer, 99, 5, "t")


def test_prompt_longer_than_the_context_is_refused_not_truncated() -> None:
    """trl#3644: prompts were truncated."""
    rows = [{"prompt": "a" * 5}, {"prompt": "a" * 6}]
    assert len(tokenize_rows(rows[:1], make_tokenizer(), 10, 5, "t")) == 1
    with pytest.raises(UsageError, match=r"row 2.*6 tokens.*context of 10"):
        tokenize_rows(rows, make_tokenizer(), 10, 5, "t")


def test_token_outside_the_models_vocabulary_is_refused() -> None:
    with pytest.raises(UsageError, match=r"row 1.*knows only 20"):
        tokenize_rows([{"prompt": "z"}], make_tokenizer(), 99, 5, "t", vocabulary=20)


def test_empty_data_is_refused() -> None:
    with pytest.raises(UsageError, match="no rows"):
        checked_rows([], "prompts")


def prompts(count: int) -> list[Prompt]:
    return [Prompt(str(number), "", (1,), "t", {}) for number in range(count)]


def test_an_epoch_samples_every_prompt_once_in_its_own_order() -> None:
    sampled = [prompt.id for prompt in draw_prompts(prompts(10), 0, 0, 30)]
    assert set(Counter(sampled[:10]).values()) == {1}
    assert set(Counter(sampled[10:20]).values()) == {1}
    assert sampled[:10] != sampled[10:20]
    assert [prompt.id for prompt in draw_prompts(prompts(10), 1, 0, 10)] != sampled[:10]


def test_sampling_continues_where_it_stopped() -> None:
    """verl#5725, NeMo#3599: a resumed run repeated or skipped data."""
    whole = draw_prompts(prompts(7), 3, 0, 40)
    assert [prompt for cursor in range(0, 40, 4) for prompt in draw_prompts(prompts(7), 3, cursor, 4)] == whole


def test_rows_as_a_data_frame() -> None:
    """Iterating over a data frame would yield its column names."""
    assert checked_rows(pandas.DataFrame([{"prompt": "a", "answer": 1}]), "rows") == [{"prompt": "a", "answer": 1}]
