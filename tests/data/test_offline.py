"""Rows that bring their completions: what a loss sees of them."""

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
    made = make_tokenizer()
    made.add_special_tokens({"eos_token": "<eos>"})
    made.chat_template = template
    return made


def given(row: Row, pairs: bool = False, template: str = TURNS) -> list[tuple[str, list[bool], float]]:
    own = tokenizer(template)
    (prompt,) = tokenize_rows([with_prompt(row, "row 1")], own, 100, 10, "t")
    made = offline_completions(prompt, own, pairs)
    return [(own.decode(list(each.token_ids)), list(each.mask), reward) for each, reward in made]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_text_ends_with_the_end_token() -> None:
    (completion,) = given({"prompt": "1+1=", "completion": "2"})
    assert completion == ("2<eos>", [True, True], 1.0)


def test_a_conversations_answer_ends_with_its_turn() -> None:
    for row in (
        {"prompt": [user("a")], "completion": "bc"},
        {"prompt": [user("a")], "completion": [assistant("bc")]},
        {"messages": [user("a"), assistant("bc")]},
    ):
        (completion,) = given(row, template=TURNS.replace("- ", " "))
        assert completion == ("bc<eos>", [True] * 3, 1.0)


def test_what_the_user_says_in_between_is_not_learned() -> None:
    row = {"messages": [user("a"), assistant("bc"), user("d"), assistant("e")]}
    ((text, mask, _),) = given(row, template=TURNS.replace("- ", ""))
    assert text == "bc<eos><d>=e<eos>"
    assert mask == [True] * 3 + [False] * 4 + [True] * 2


def test_preferences_in_both_shapes() -> None:
    for row in (
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": "c"},
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
    ):
        chosen, rejected = given(row, pairs=True, template=TURNS.replace("- ", ""))
        assert (chosen[0], chosen[2]) == ("b<eos>", 1.0)
        assert (rejected[0], rejected[2]) == ("c<eos>", 0.0)


def test_answers_that_begin_alike_stay_apart() -> None:
    row = {
        "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
        "rejected": [user("a"), assistant("b"), user("x"), assistant("d")],
    }
    made = with_prompt(row, "row 1")
    assert made["prompt"] == [user("a")]
    assert made["chosen"][0] == assistant("b")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "it has no completion"),
        ({}, "columns: none"),
        ({"messages": [user("a")]}, "no message of the assistant"),
        ({"messages": [assistant("a"), user("b")]}, "no message of the assistant"),
        ({"messages": []}, "no message of the assistant"),
        ({"messages": ["a", "b"]}, "no message of the assistant"),
        ({"chosen": "a", "rejected": "b"}, "must be whole conversations"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "no beginning in common"),
        ({"chosen": [user("a")], "rejected": [user("a"), assistant("b")]}, "no beginning in common"),
    ],
)
def test_rows_that_bring_none(row: Row, message: str) -> None:
    with pytest.raises(UsageError, match=f"row 1.*{message}"):
        with_prompt(row, "row 1")


@pytest.mark.parametrize(
    ("completion", "message"),
    [("", "not the text"), (None, "not the text"), ([assistant("b")], "not the text"), (3, "not the text")],
)
def test_odd_completions_of_plain_text(completion: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        given({"prompt": "a", "completion": completion})


@pytest.mark.parametrize(
    ("completion", "message"),
    [([], "neither text"), ([user("b")], "does not begin"), ([{"role": "assistant"}], "without role and content")],
)
def test_odd_completions_of_a_conversation(completion: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        given({"prompt": [user("a")], "completion": completion})


def test_a_template_that_rewrites_the_past_is_refused() -> None:
    template = "{{ messages | length }}" + TURNS
    with pytest.raises(UsageError, match="writes earlier messages anew"):
        given({"messages": [user("a"), assistant("b")]}, template=template)


def test_the_end_token_is_one() -> None:
    assert tokenizer().eos_token_id == END
