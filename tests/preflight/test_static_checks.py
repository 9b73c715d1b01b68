"""The static checks of `gruppo check`: they find every planted fault, and report nothing where there is none."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from gruppo.config.loading import load_recipe
from gruppo.config.sections import Lora
from gruppo.models.lora import add_adapters
from gruppo.models.policy import LanguageModel
from gruppo.preflight.findings import WIDTH, Finding, format_findings
from gruppo.preflight.static_checks import (
    check_bos,
    check_chat_template,
    check_dataset_completions,
    check_end_tokens,
    check_engine_choice,
    check_fields,
    check_model,
    check_overlap,
    check_prompt_lengths,
)
from gruppo.types import Prompt
from tests.conftest import END, make_completion, make_policy, make_tokenizer

CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER = [{"role": "user", "content": "a"}]


def prompts_of(*contents: object, ids: tuple[int, ...] = (1, 2)) -> list[Prompt]:
    return [Prompt(f"t/{place}", content, ids, "t", {}) for place, content in enumerate(contents)]  # type: ignore[arg-type]


def graded(findings: list[Finding]) -> dict[str, str]:
    return {each.subject: each.severity for each in findings}


def with_template(template: str, **tokens: str) -> LanguageModel:
    made = make_tokenizer()
    made.chat_template = template
    made.add_special_tokens(tokens)
    return replace(make_policy(), tokenizer=made)


def recipe(**tables: dict):
    return load_recipe({"model": {"name": "m"}, "reward": {"functions": ["last_number"]}, **tables})


@pytest.mark.parametrize(
    ("tables", "severity"),
    [
        ({"sampling": {"group_size": 1}}, "problem"),
        ({"sampling": {"group_size": 1}, "method": {"name": "reinforce-pp"}}, "ok"),
        ({"reward": {"functions": ["last_number"], "weights": [0.0]}}, "problem"),
        ({"optimizer": {"learning_rate": 0.0}}, "warning"),
        ({"evaluation": None}, "note"),
        ({}, "ok"),
    ],
)
def test_fields_that_train_nothing(tables: dict, severity: str) -> None:
    grades = [each.severity for each in check_fields(recipe(**{"evaluation": {}, **tables}))]
    assert grades == ["ok", severity] if severity != "ok" else ["ok"]


@pytest.mark.parametrize(("tables", "device", "expected"), [
    ({}, "cuda", True),
    ({}, "cpu", False),
    ({"engine": {"name": "vllm"}}, "cuda", False),
    ({"method": {"name": "sft"}, "reward": {}}, "cuda", False),
])  # fmt: skip
def test_vllm_is_recommended_for_a_gpu(tables: dict, device: str, expected: bool) -> None:
    found = check_engine_choice(recipe(**tables), device, has_vllm=True)
    assert [each.severity for each in found] == ["note"] * expected
    (missing,) = check_engine_choice(recipe(), "cuda", has_vllm=False)
    assert missing.change.startswith('run: pip install "gruppo[vllm]"')


def test_a_matrix_of_zeros_is_pointed_out() -> None:
    """The zeros that adapters start with are intended."""
    broken = make_policy()
    assert graded(check_model(broken, "float32")) == {"model": "ok"}
    with torch.no_grad():
        broken.model.get_parameter("model.layers.1.mlp.up_proj.weight").zero_()
    (_, found) = check_model(broken, "float32")
    assert (found.severity, "up_proj" in found.what) == ("warning", True)
    assert graded(check_model(add_adapters(make_policy(), Lora(), 0), "float32")) == {"model": "ok"}


def test_end_tokens(policy: LanguageModel) -> None:
    assert graded(check_end_tokens(policy)) == {"EOS tokens": "ok", "padding": "ok"}
    assert graded(check_end_tokens(replace(policy, eos_ids=())))["EOS tokens"] == "problem"
    (found, *_) = check_end_tokens(replace(policy, eos_ids=(48, 49)))
    assert (found.severity, "cannot emit" in found.why) == ("problem", True)
    (found, *_) = check_end_tokens(replace(policy, eos_ids=(0, 3)))
    assert (found.severity, found.what.startswith("2 tokens, each of which ends a completion: ")) == ("ok", True)


def test_a_tokenizer_that_knows_more_than_the_model(policy: LanguageModel) -> None:
    larger = make_tokenizer()
    larger.add_tokens([f"token{number}" for number in range(20)])
    assert graded(check_end_tokens(replace(policy, tokenizer=larger)))["tokenizer"] == "warning"
    assert "tokenizer" not in graded(check_end_tokens(policy))


@pytest.mark.parametrize(
    ("ids", "adds", "severity"),
    [((5, 1), True, "ok"), ((5, 5, 1), True, "problem"), ((1, 2), True, "warning"), ((1, 2), False, "ok")],
)
def test_bos_stands_once(ids: tuple[int, ...], adds: bool, severity: str) -> None:
    class Tokenizer(SimpleNamespace):
        def __call__(self, _: str) -> dict:
            return {"input_ids": [5, 1] if adds else [1]}

        def __len__(self) -> int:
            return 48

    tokenizer = Tokenizer(bos_token_id=5, decode=lambda _: "<s>")
    assert graded(check_bos(tokenizer, prompts_of("a", ids=ids))) == {"start of prompts": severity}  # type: ignore[arg-type]
    assert check_bos(make_tokenizer(), prompts_of("a")) == []


def test_a_template_that_is_right() -> None:
    made = check_chat_template(with_template(CHATML), prompts_of(USER))
    assert graded(made) == {"generation prompt": "ok", "end of answers": "ok"}


@pytest.mark.parametrize(
    ("template", "subject", "severity"),
    [
        (CHATML.replace("{% if add_generation_prompt %}<assistant>{% endif %}", ""), "generation prompt", "problem"),
        (CHATML.replace("<assistant>", "<assistant><think>"), "generation prompt", "note"),
        (CHATML.replace("<eos>", ""), "end of answers", "warning"),
        (CHATML.replace("<eos>", "<end>"), "end of answers", "problem"),
        (CHATML.replace("{{ m['content'] }}", ""), "chat template", "problem"),
        (CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else '-' }}"), "earlier turns", "note"),
        (CHATML.replace("m['content']", "m['content'].split('</think>')[-1] if not loop.last else m['content']"),
         "earlier turns", "note"),
        ("{{ raise_exception('no answers') if messages|length > 1 }}", "chat template", "note"),
    ],
)  # fmt: skip
def test_templates_that_are_wrong(template: str, subject: str, severity: str) -> None:
    made = check_chat_template(with_template(template, cls_token="<end>"), prompts_of(USER))
    assert graded(made)[subject] == severity


def test_a_template_that_changes_earlier_answers_is_a_warning_if_rows_have_answers() -> None:
    template = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else '-' }}")
    chat = [*USER, {"role": "assistant", "content": "b"}, *USER]
    assert graded(check_chat_template(with_template(template), prompts_of(chat)))["earlier turns"] == "warning"


def test_plain_text_beside_a_chat_template(policy: LanguageModel) -> None:
    assert graded(check_chat_template(policy, prompts_of("a"))) == {"chat template": "note"}
    assert graded(check_chat_template(with_template(""), prompts_of("a"))) == {"chat template": "ok"}
    assert graded(check_chat_template(with_template(CHATML), prompts_of("a", USER)))["end of answers"] == "ok"


def test_lengths() -> None:
    prompts = prompts_of("a", "b", ids=(1, 2, 3))
    fine = check_prompt_lengths(prompts, 100, 28, {}, None)
    assert (fine.severity, fine.figures["max"], fine.figures["too_long"]) == ("ok", 3, 0)
    assert check_prompt_lengths(prompts, 100, 28, {"t": 2}, None).severity == "warning"
    refused = check_prompt_lengths(prompts, 100, 28, {"t": 2}, "t, row 3: too long")
    assert (refused.severity, "2 of 4" in refused.what, "row 3" in refused.why) == ("problem", True, True)
    (given,) = check_dataset_completions({"t/0": [(make_completion([1, 2, END]), 1.0)]}, 8)
    assert (given.severity, given.figures["max"]) == ("ok", 3)
    assert check_dataset_completions({}, 8) == []


def test_overlap() -> None:
    asked = [{"role": "system", "content": "Think."}, {"role": "user", "content": "What is 3 + 4?"}]
    prompts = prompts_of(asked, "What is 3 - 4", "what  is 3.5?")
    assert check_overlap(prompts, []) == []
    (none,) = check_overlap(prompts, prompts_of("What is 3 * 4?", "What is 35?", "What is -3 - 4?"))
    assert none.severity == "ok"
    (found,) = check_overlap(prompts, prompts_of("What is 3 - 4", "WHAT is 3 + 4 ?", "What is 3.5", "other"))
    assert found.severity == "warning"
    assert found.figures == {"questions": 4, "exact": 1, "normalised": 2}
    assert "'What is 3 - 4', is t/1" in found.what


def test_findings_fit_a_terminal_and_end_with_the_most_severe() -> None:
    text = "a long story of words " * 12
    found = [
        Finding("problem", "reward", text + "\x1b[31m\n", text, text),
        Finding("ok", "model", "x" * 200),
        Finding("warning", "prompts", text),
    ]
    lines = format_findings(found).splitlines()
    assert all(len(line) <= WIDTH and line.isprintable() for line in lines)
    assert [line.split()[0] for line in lines if line[:1].strip()] == ["ok", "warning", "problem", "Found:"]
    assert lines[-1] == "Found: 1 problem, 1 warning, 0 notes, 1 ok"
    assert any(line.startswith("         why: a long") for line in lines)
    assert any(line.startswith("         do: a long") for line in lines)
