"""Rows with completions of their own: which tokens the loss sees."""

from __future__ import annotations

from typing import Any

import pytest

from gruppo.data.messages import text_or_messages
from gruppo.data.offline import offline_completions, with_prompt
from gruppo.data.tokenization import tokenize_rows
from gruppo.errors import UsageError
from gruppo.types import Row
from gruppo.utils.token_text import text_of, text_tokens, visible_text
from tests.conftest import END, make_tokenizer
from tests.odd_tokenizers import CHATML, byte_level, closing, ids_of, metaspace, prepending

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


@pytest.mark.parametrize("prompt", ["a", [user("a")], [{"role": "system", "content": "x"}, user("a")]])
def test_conversations_that_begin_with_the_prompt(prompt: Any) -> None:
    begin = [user(prompt)] if isinstance(prompt, str) else prompt
    pair = {"prompt": prompt, "chosen": [*begin, assistant("b")], "rejected": [*begin, assistant("c")]}
    assert with_prompt(pair, "row 1") == {"prompt": begin, "chosen": [assistant("b")], "rejected": [assistant("c")]}
    shown = {"prompt": prompt, "completion": [*begin, assistant("b")]}
    assert with_prompt(shown, "row 1") == {"prompt": begin, "completion": [assistant("b")]}


def test_conversations_that_begin_with_another_prompt_are_refused() -> None:
    for prompt in ("b", [user("b")], [user("a"), user("b")]):
        row = {"prompt": prompt, "completion": [user("a"), assistant("b")]}
        assert with_prompt(row, "row 1") == row
    with pytest.raises(UsageError, match="does not begin with an assistant message"):
        completions_of({"prompt": [user("b")], "completion": [user("a"), assistant("b")]})


def weighted(text: str, weight: object) -> dict[str, Any]:
    return {**assistant(text), "weight": weight}


def test_earlier_messages_with_the_weight_0_are_not_trained_on() -> None:
    row = {"messages": [user("a"), weighted("b", 0), user("c"), weighted("d", 1)]}
    assert with_prompt(row, "row 1") == {"prompt": row["messages"][:3], "completion": row["messages"][3:]}
    assert [(text, mask) for text, mask, _ in completions_of(row, template=TURNS.replace("- ", ""))] == [
        ("d<eos>", [True] * 2)
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [user("a"), weighted("b", 0)]}, r"messages\[1\]\.weight = 0"),
        ({"messages": [user("a"), assistant("b"), user("c"), weighted("d", 0)]}, r"messages\[3\]\.weight = 0"),
        ({"messages": [user("a"), weighted("b", 0), assistant("c")]}, r"messages\[1\]\.weight = 0"),
        ({"messages": [user("a"), weighted("b", 0.5)]}, r"messages\[1\]\.weight = 0\.5"),
        ({"prompt": [user("a")], "completion": [weighted("b", "1")]}, r"completion\[0\]\.weight = '1'"),
        ({"prompt": "a", "chosen": [assistant("b")], "rejected": [weighted("c", 0)]}, r"rejected\[0\]\.weight = 0"),
    ],
)
def test_a_weight_of_an_answer_other_than_1_is_refused(row: Row, message: str) -> None:
    with pytest.raises(UsageError, match=f"row 1: {message}: must be 1.*move it and all before it to prompt"):
        with_prompt(row, "row 1")


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


ODD = {
    "metaspace": metaspace,
    "metaspace first": lambda: metaspace("first"),
    "prepending": prepending,
    "byte level with a space": lambda: byte_level(prefix_space=True),
    "byte level": byte_level,
    "closing": lambda: closing(metaspace()),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("2+2=", "4"),
        ("2+2=", " 4"),
        ("2+2= ", "4"),
        ("Q: a\nA:", " b"),
        ("a", "\n\nb"),
        ("\u4e2d", "\u6587 a"),
        ("a", "b"),
    ],
)
def test_a_completion_of_text_adds_exactly_its_text(kind: str, prompt: str, answer: str) -> None:
    odd = ODD[kind]()
    (tokenized,) = tokenize_rows([{"prompt": prompt, "completion": answer}], odd, 100, 50, "t")
    ((completion, _),) = offline_completions(tokenized, odd, False)
    eos = odd.eos_token_id
    assert completion.text == answer
    assert text_of(odd, [*tokenized.token_ids, *completion.token_ids[:-1]]).removeprefix(" ") == prompt + answer
    assert completion.token_ids[-1] == eos
    assert list(tokenized.token_ids + completion.token_ids).count(eos) == 1
    assert odd.bos_token_id not in completion.token_ids
    whole = text_tokens(odd, prompt + answer)
    if whole[: len(tokenized.token_ids)] == list(tokenized.token_ids):
        assert [*tokenized.token_ids, *completion.token_ids[:-1]] == whole


def test_an_answer_that_ends_with_eos_gets_no_second_one() -> None:
    odd = byte_level()
    (tokenized,) = tokenize_rows([{"prompt": "a", "completion": "b</s>"}], odd, 100, 50, "t")
    ((completion, _),) = offline_completions(tokenized, odd, False)
    assert list(completion.token_ids) == ids_of(odd, "b", "</s>")
    assert completion.text == "b"


@pytest.mark.parametrize("kind", ODD)
def test_a_completion_of_messages_is_what_the_chat_template_gives(kind: str) -> None:
    odd = ODD[kind]()
    odd.chat_template = CHATML
    row = {"prompt": [user("a b")], "completion": [assistant("4"), user("b"), assistant("<think>a</think>b")]}
    (prompt,) = tokenize_rows([with_prompt(row, "row 1")], odd, 200, 50, "t")
    ((completion, _),) = offline_completions(prompt, odd, False)
    whole = odd.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=True, return_dict=False)
    end = ids_of(odd, "<|im_end|>")[0]
    assert [*prompt.token_ids, *completion.token_ids] == whole[: len(whole) - whole[::-1].index(end)]
    assert completion.mask.count(True) < len(completion.mask)
    assert "<think>" in completion.text
    assert completion.text.count("<|im_end|>") == 2, "of the turns before the last"


def test_an_answer_continues_the_beginning_that_its_prompt_has() -> None:
    odd = byte_level(template=CHATML)
    row = {"prompt": [user("a"), assistant("2+2=")], "completion": "4"}
    (prompt,) = tokenize_rows([row], odd, 200, 50, "t")
    ((completion, _),) = offline_completions(prompt, odd, False)
    assert list(completion.token_ids) == ids_of(odd, "4", "<|im_end|>")


OPENED = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
EMPTIED = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")
WITH_EMPTY_BLOCK = OPENED.replace(
    "{{ m['content'] }}",
    "{% if m['role'] == 'assistant' and '</think>' not in m['content'] %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}",
)
WITHOUT_REASONING = OPENED.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1].lstrip('\\n') }}")
ALWAYS_OPENED = OPENED.replace(
    "{{ m['content'] }}", "{% if m['role'] == 'assistant' %}<think>\n{% endif %}{{ m['content'] }}"
)


def answered(template: str, answer: str, odd: Any = None) -> str:
    """What follows the prompt, as text with all special tokens."""
    odd = odd or byte_level()
    odd.chat_template = template
    (prompt,) = tokenize_rows([{"prompt": [user("a")], "completion": answer}], odd, 200, 100, "t")
    ((completion, _),) = offline_completions(prompt, odd, False)
    assert all(completion.mask)
    assert visible_text(odd, prompt.token_ids).endswith(("<think>\n", "</think>\n\n"))
    return visible_text(odd, [*prompt.token_ids, *completion.token_ids]).partition("assistant\n")[2]


@pytest.mark.parametrize(
    ("template", "answer", "follows"),
    [
        (WITH_EMPTY_BLOCK, "b", "<think>\n\n</think>\n\nb"),
        (WITH_EMPTY_BLOCK, "<think>\na\n</think>\n\nb", "<think>\na\n</think>\n\nb"),
        (OPENED, "<think>\na\n</think>\nb", "<think>\na\n</think>\nb"),
        (OPENED, "<think>a</think>b", "<think>\na</think>b"),
        (OPENED, "<think></think>b", "<think>\n</think>b"),
        (OPENED, "<think>\n\n</think>\n\nb", "<think>\n\n</think>\n\nb"),
        (OPENED, "a</think>b", "<think>\na</think>b"),
        (WITHOUT_REASONING, "<think>\na\n</think>\n\nb", "<think>\na\n</think>\n\nb"),
        (WITHOUT_REASONING, "<think>\n\n</think>\n\nb", "<think>\n\n</think>\n\nb"),
        (WITHOUT_REASONING, "a</think>b", "<think>\na</think>b"),
        (ALWAYS_OPENED, "a</think>b", "<think>\na</think>b"),
        (ALWAYS_OPENED, "<think>\na</think>b", "<think>\na</think>b"),
        (EMPTIED, "b", "<think>\n\n</think>\n\nb"),
        (EMPTIED, "<think>\n\n</think>\n\nb", "<think>\n\n</think>\n\nb"),
        (EMPTIED, "<think></think>b", "<think>\n\n</think>\n\nb"),
    ],
)
def test_answers_after_a_prompt_that_has_opened_or_emptied_the_reasoning(
    template: str, answer: str, follows: str
) -> None:
    assert answered(template, answer) == f"{follows}<|im_end|>"


@pytest.mark.parametrize(
    ("template", "answer", "advice"),
    [
        (OPENED, "b", "has no reasoning; begin the answer with <think>reasoning</think>"),
        (WITHOUT_REASONING, "b", "has no reasoning; begin the answer with <think>reasoning</think>"),
        (EMPTIED, "<think>a</think>b", "has reasoning; remove it from the answer"),
        (CHATML.replace("'role'] }}\n{{", "'role'] }}:{{"), "b", "begins this answer with"),
    ],
)
def test_answers_that_do_not_fit_the_prompt_are_refused_with_advice_that_applies(
    template: str, answer: str, advice: str
) -> None:
    with pytest.raises(UsageError, match=advice):
        answered(template, answer)


def test_tags_of_reasoning_that_are_no_special_tokens() -> None:
    brackets = OPENED.replace("<think>", "[THINK]")
    odd = byte_level()
    odd.chat_template = brackets
    (prompt,) = tokenize_rows([{"prompt": [user("a")], "completion": "[THINK]a[/THINK]b"}], odd, 200, 100, "t")
    ((completion, _),) = offline_completions(prompt, odd, False)
    assert completion.text == "a[/THINK]b"


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}={{ m['content'] or '' }}"
    "{% if m['tool_calls'] is defined %}+{{ m['tool_calls'] | length }}{% endif %}<eos>"
    "{% else %}<{{ m['content'] }}>{% endif %}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


def test_an_empty_list_of_tool_calls_is_none() -> None:
    row = {
        "messages": [user("a"), {**assistant("b"), "tool_calls": []}, user("c"), {**assistant("d"), "tool_calls": None}]
    }
    plain = {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}
    checked = [{"messages": text_or_messages(one["messages"], "row 1", "messages")} for one in (row, plain)]
    assert completions_of(checked[0], template=CALLS) == completions_of(checked[1], template=CALLS)
    with_call = {"messages": [user("a"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]}
    assert completions_of(with_call, template=CALLS)[0][0] == "+1<eos>"


@pytest.mark.parametrize(
    ("answer", "template", "lost"),
    [
        ({"content": None, "tool_calls": [CALL]}, TURNS, "tool_calls"),
        ({"content": "b", "tool_calls": [CALL]}, TURNS, "tool_calls"),
        ({"content": "b", "reasoning_content": "ccc"}, TURNS, "reasoning_content"),
        ({"content": "bbb"}, TURNS.replace("{{ m['content'] }}<eos>", "{{ m['text'] }}<eos>"), "content"),
    ],
)
def test_what_a_template_leaves_out_of_an_answer_is_refused(answer: dict, template: str, lost: str) -> None:
    row = {"messages": [user("a"), {"role": "assistant", **answer}]}
    with pytest.raises(UsageError, match=f"leaves out the {lost} of this answer, so it would not be trained on"):
        completions_of(row, template=template)
