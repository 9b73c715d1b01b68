"""What `gruppo check` says about token text: every case in words, and the first rows as the model reads them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerFast

from gruppo.data.offline import offline_completions, with_prompt
from gruppo.data.tokenization import tokenize_rows
from gruppo.models.policy import LanguageModel
from gruppo.preflight.findings import Finding, format_findings
from gruppo.preflight.token_checks import check_token_text
from gruppo.types import Row
from tests.conftest import make_policy
from tests.odd_tokenizers import CHATML, byte_level, closing, ids_of, metaspace


def policy_with(tokenizer: PreTrainedTokenizerFast, surplus: int = 0) -> LanguageModel:
    policy = make_policy(vocab_size=len(tokenizer) + surplus)
    return replace(policy, tokenizer=tokenizer, eos_ids=tuple(ids_of(tokenizer, "</s>", "<|im_end|>")))


def findings(policy: LanguageModel, row: Row) -> list[Finding]:
    offline = {}
    if "completion" in row:
        row = with_prompt(row, "row 1")
    (prompt,) = tokenize_rows([row], policy.tokenizer, 100, 50, "t")
    if "completion" in row:
        offline[prompt.id] = offline_completions(prompt, policy.tokenizer, False)
    return check_token_text(policy, [prompt], offline)


TEXT: Row = {"prompt": "2+2=", "answer": "4"}
CHAT: Row = {"prompt": [{"role": "user", "content": "a"}], "answer": "b"}


def said(policy: LanguageModel, row: Row, severity: str | None = None) -> str:
    found = [one for one in findings(policy, row) if one.subject == "token text"]
    return "\n".join(one.what for one in found if severity in (None, one.severity))


def test_the_first_rows_are_shown_with_special_tokens_and_line_ends() -> None:
    policy = policy_with(byte_level(template=CHATML))
    shown = findings(policy, {"prompt": CHAT["prompt"], "completion": "<think>\nb</think>"})[0]
    assert shown.subject == "row t/0"
    assert shown.what == (
        r'prompt "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", completion "<think>\nb</think><|im_end|>"'
    )
    assert shown.figures["prompt"].startswith("<|im_start|>user\na")
    assert shown.figures["completions"] == ["<think>\nb</think><|im_end|>"]
    assert r"user\na<|im_end|>" in format_findings([shown])
    shown = findings(policy_with(closing(metaspace())), TEXT)[0]
    assert shown.what == 'prompt "<s> 2+2=", reference answer "4"'


@pytest.mark.parametrize(("surplus", "severity"), [(1, "note"), (162, "warning")])
def test_ids_without_text_are_counted(surplus: int, severity: str) -> None:
    policy = policy_with(byte_level(), surplus)
    assert policy.ids_without_text == frozenset(range(len(policy.tokenizer), len(policy.tokenizer) + surplus))
    assert f"no text for {surplus} of the {policy.head_size} token ids" in said(policy, TEXT, severity)
    assert "no text for" not in said(policy_with(byte_level()), TEXT)


def test_what_a_tokenizer_puts_around_texts_is_said() -> None:
    plain, spaced = said(policy_with(byte_level()), TEXT), said(policy_with(metaspace()), TEXT)
    closes = said(policy_with(closing(byte_level())), TEXT)
    assert "puts a space before each text" in spaced
    assert "puts a space" in said(policy_with(byte_level(prefix_space=True)), TEXT)
    assert "puts '</s>' after each text" in closes
    assert "puts" not in plain


def test_special_tokens_that_rewards_see_are_named() -> None:
    words = said(policy_with(byte_level()), TEXT)
    assert "part of their text: <think>, </think>, <tool_call>, <|im_start|>" in words
    assert "<|im_end|>" not in words, "it ends the turn"


def test_a_block_of_reasoning_that_the_template_opens_is_said() -> None:
    opened = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    emptied = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")
    assert said(policy_with(byte_level(template=opened)), CHAT).endswith("begins every answer with <think>")
    assert said(policy_with(byte_level(template=emptied)), CHAT).endswith("<think>, and closes it at once")
    assert "begins every answer" not in said(policy_with(byte_level(template=CHATML)), CHAT)
