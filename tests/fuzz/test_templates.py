"""Fuzz chat templates: prompts are rendered and checked, or the error says that the template fails."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from gruppo.data.loading import checked_rows
from gruppo.data.offline import offline_completions
from gruppo.data.tokenization import tokenize_rows
from gruppo.models.policy import LanguageModel
from gruppo.preflight.static_checks import check_bos, check_chat_template, check_end_tokens, check_prompt_lengths
from tests.conftest import TEMPLATE, make_tokenizer
from tests.fuzz.test_rows import MESSAGES
from tests.fuzzing import TEXT, clear, examples

PIECES = [
    "{% for m in messages %}", "{% endfor %}", "{% if add_generation_prompt %}", "{% endif %}", "{% else %}",
    "{{ m['content'] }}", "{{ m.role }}", "{{ messages[0].content }}", "{{ messages[-1]['content'] | trim }}", "<eos>",
    "{{ bos_token }}", "{{ eos_token }}", "{{ raise_exception('no') }}", "{{ loop.last }}", "{% set x = 1 / 0 %}",
    "{{ messages | tojson }}", "{% generation %}", "{% endgeneration %}", "{{ undefined.field }}", "{# note #}", "{%-",
    "-%}", "{{", "}}", "\n", "a", "<", ">", "{% macro f(x) %}{{ f(x) }}{% endmacro %}", "{{ f(1) }}",
    "{% set ns = namespace(n=0) %}", "{{ m['content'].split('</think>')[-1] }}", "{{ strftime_now('%Y') }}",
    "{% if m['role'] == 'assistant' %}", "{{ ''.__class__.__mro__ }}", "{{ 'a' * 400 }}", "{% include 'x' %}",
    "{{ tools }}", "{{ none.x }}", "{% break %}", "{{ 9 ** 9 }}", "{{ messages.pop() }}", "{{ [].append(1) }}",
]  # fmt: skip
PARTS = st.sampled_from(PIECES) | TEXT
LOOP = st.tuples(
    st.just("{% for m in messages %}"), st.lists(PARTS, max_size=5).map("".join), st.just("{% endfor %}"),
    st.lists(PARTS, max_size=3).map("".join),
).map("".join)  # fmt: skip
MUTATED = st.lists(st.tuples(st.integers(0, len(TEMPLATE)), st.integers(0, 20), PARTS), max_size=3)
CHATS = MESSAGES | st.just([{"role": "user", "content": "ab"}])
ANSWERS = st.just("abc") | st.just([{"role": "assistant", "content": "b"}]) | MESSAGES


def mutate(changes: list[tuple[int, int, str]]) -> str:
    text = TEMPLATE
    for place, count, new in changes:
        text = text[:place] + new + text[place + count :]
    return text


TEMPLATES = st.lists(PARTS, max_size=8).map("".join) | LOOP | MUTATED.map(mutate)


@examples(120, template=TEMPLATES, messages=CHATS, answer=ANSWERS, pairs=st.booleans())
def test_any_chat_template(
    policy: LanguageModel, template: str, messages: list, answer: Any, pairs: bool
) -> None:  # fmt: skip
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    model = replace(policy, tokenizer=tokenizer)
    row = {"prompt": messages, "completion": answer, "chosen": answer, "rejected": "c"}
    with clear():
        rows = checked_rows([row], "rows")
        prompts = tokenize_rows(rows, tokenizer, 128, 8, "rows", 48)
        findings = [
            *check_end_tokens(model), *check_bos(tokenizer, prompts), *check_chat_template(model, prompts),
            check_prompt_lengths(prompts, 120, 8, {}, None),
        ]  # fmt: skip
        assert all(line.isprintable() for finding in findings for line in finding.lines())
        offline_completions(prompts[0], tokenizer, pairs)
