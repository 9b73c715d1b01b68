"""Rows with completions of their own: which tokens the loss sees."""

from __future__ import annotations

from typing import Any

import pytest

from gruppo.data.offline import offline_completions, with_prompt
from gruppo.data.tokenization import tokenize_rows
from gruppo.errors import UsageError
from gruppo.types import Row
from tests.conftest import END, make_tokenizer

TURNS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}={{ m['content'] }}<eos>- "
    "{% else %}<{{ m['content'] }}>{% endif %}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


def tokenizer(template: str = TURNS) -> Any:
    result = make_tokenizer()
    result.add_special_tokens({"eos_token": "<eos>"})
    result.chat_template = template
    return result


def completions_of(row: Row, pairs: bool = False, template: str = TURNS) -> list[tuple[str, list[bool], float]]:
    chat_tokenizer = tokenizer(template)
    (prompt,) = tokenize_rows([with_prompt(row, "row 1")], chat_tokenizer, 100, 10, "t")
    completions = offline_completions(prompt, chat_tokenizer, pairs)
    return [
        (chat_tokenizer.decode(list(completion.token_ids)), list(completion.mask), reward)
        for completion, reward in completions
    ]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_text_ends_with_the_end_token() -> None:
    (completion,) = completions_of({"prompt": "1+1=", "completion": "2"})
    assert completion == ("2<eos>", [True, True], 1.0)


def test_completion_of_a_conversation_ends_with_its_turn() -> None:
    for row in (
        {"prompt": [user("a")], "completion": "bc"},
        {"prompt": [user("a")], "completion": [assistant("bc")]},
        {"messages": [user("a"), assistant("bc")]},
    ):
        (completion,) = completions_of(row, template=TURNS.replace("- ", " "))
        assert completion == ("bc<eos>", [True] * 3, 1.0)


def test_user_messages_in_between_are_not_trained_on() -> None:
    row = {"messages": [user("a"), assistant("bc"), user("d"), assistant("e")]}
    ((text, mask, _),) = completions_of(row, template=TURNS.replace("- ", ""))
    assert text == "bc<eos><d>=e<eos>"
    assert mask == [True] * 3 + [False] * 4 + [True] * 2


def test_both_formats_of_preferences() -> None:
    for row in (
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": "c"},
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
    ):
        chosen, rejected = completions_of(row, pairs=True, template=TURNS.replace("- ", ""))
        assert (chosen[0], chosen[2]) == ("b<eos>", 1.0)
        assert (rejected[0], rejected[2]) == ("c<eos>", 0.0)


def test_only_shared_messages_before_the_first_answer_are_the_prompt() -> None:
    row = {
        "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
        "rejected": [user("a"), assistant("b"), user("x"), assistant("d")],
    }
    split_row = with_prompt(row, "row 1")
    assert split_row["prompt"] == [user("a")]
    assert split_row["chosen"][0] == assistant("b")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "it has no completion"),
        ({}, "columns: none"),
        ({"messages": [user("a")]}, "no assistant message"),
        ({"messages": [assistant("a"), user("b")]}, "no assistant message"),
        ({"messages": []}, "no assistant message"),
        ({"messages": ["a", "b"]}, "no assistant message"),
        ({"chosen": "a", "rejected": "b"}, "must be whole conversations"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "no common beginning"),
        ({"chosen": [user("a")], "rejected": [user("a"), assistant("b")]}, "no common beginning"),
    ],
)
def test_rows_without_a_completion_are_refused(row: Row, message: str) -> None:
    with pytest.raises(UsageError, match=f"row 1.*{message}"):
        with_prompt(row, "row 1")


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ("", "is not non-empty text"),
        (None, "is not non-empty text"),
        ([assistant("b")], "is not non-empty text"),
        (3, "is not non-empty text"),
    ],
)
def test_invalid_completions_of_plain_text(completion: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        completions_of({"prompt": "a", "completion": completion})


@pytest.mark.parametrize(
    ("completion", "message"),
    [([], "neither text"), ([user("b")], "does not begin"), ([{"role": "assistant"}], "without role and content")],
)
def test_invalid_completions_of_a_conversation(completion: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        completions_of({"prompt": [user("a")], "completion": completion})


def test_a_template_that_rewrites_earlier_messages_is_refused() -> None:
    template = "{{ messages | length }}" + TURNS
    with pytest.raises(UsageError, match="changes earlier messages"):
        completions_of({"messages": [user("a"), assistant("b")]}, template=template)


def test_the_end_token_is_a_single_token() -> None:
    assert tokenizer().eos_token_id == END
