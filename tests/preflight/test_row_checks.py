"""`gruppo check` warns of answers within prompts, of lists as text, and of evaluation prompts in another format."""

from __future__ import annotations

from typing import Any

from gruppo.config.loading import load_recipe
from gruppo.engines.base import SamplingParams
from gruppo.evaluation.sets import EvalSet
from gruppo.preflight.row_checks import check_answers, check_evaluation_format, check_tool_values
from gruppo.types import Prompt

USER, ANSWER = {"role": "user", "content": "3 + 4?"}, {"role": "assistant", "content": "It is 7."}
SYSTEM = {"role": "system", "content": "Think."}


def prompt(content: Any, **columns: Any) -> Prompt:
    return Prompt("rows/0", content, (1,), "rows", columns)


def test_prompts_that_end_with_an_answer() -> None:
    assert check_answers([prompt([USER], answer="7"), prompt("a")], False) == []
    (found,) = check_answers([prompt([USER, ANSWER], answer="7"), prompt([USER], answer="7")], False)
    assert (found.severity, found.figures["told"]) == ("problem", 1)
    (found,) = check_answers([prompt([USER, ANSWER], answer="9")], False)
    assert found.severity == "warning"
    assert check_answers([prompt([USER, ANSWER], answer="7")], True) == []


def test_lists_and_lists_as_text() -> None:
    severities = [finding.severity for finding in check_answers([prompt("a", answer='["x", "y"]')], False)]
    assert severities == ["warning"]
    assert [finding.severity for finding in check_answers([prompt("a", answer=["x", "y"])], False)] == ["ok"]
    assert check_answers([prompt("a", answer="[1, 2]")], False) == []


def test_keys_without_a_value_in_calls_and_tools() -> None:
    def call(**arguments: Any) -> dict[str, Any]:
        return {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": arguments}]}

    assert check_tool_values([prompt([USER, call(x=1)]), prompt("a")]) == []
    (found,) = check_tool_values([prompt([USER, call(x=1)]), prompt([USER, call(x=1, y=None)])])
    assert (found.severity, found.figures["null"]) == ("warning", 1)
    assert "prompt[1].tool_calls[0].arguments.y" in found.what
    tool = {"name": "f", "parameters": {"properties": {"x": {}, "y": None}}}
    (found,) = check_tool_values([Prompt("rows/0", [USER], (1,), "rows", {}, {"tools": [tool]})])
    assert "tools[0].parameters.properties.y" in found.what


def formats(trained: list, asked: list, **evaluation: Any) -> list[str]:
    table = {"task": {"name": "eval.jsonl", **evaluation}}
    recipe = load_recipe({"model": {"name": "m"}, "task": {"name": "rows.jsonl"}, "evaluation": table})
    eval_set = EvalSet("", [prompt(content) for content in asked], {}, SamplingParams(1.0, 1), 1, 0, None)
    found = check_evaluation_format(recipe, [prompt(content) for content in trained], [eval_set])
    return [finding.severity for finding in found]


def test_evaluation_in_another_format() -> None:
    assert formats([[SYSTEM, USER]], [[SYSTEM, USER]]) == []
    assert formats([[SYSTEM, USER]], [[USER]]) == ["warning"]
    assert formats([[SYSTEM, USER]], ["a"]) == ["warning"]
    assert formats(["a"], [[USER]]) == ["warning"]
    assert formats([[SYSTEM, USER], [USER]], [[USER]]) == []
    assert formats([[SYSTEM, USER]], [[{**SYSTEM, "content": "Other."}, USER]]) == ["warning"]
    assert formats(["a"], ["b"], template="{x}") == ["note"]


def test_evaluation_with_other_chat_options() -> None:
    recipe = load_recipe({"model": {"name": "m"}, "task": {"name": "r.jsonl"}, "evaluation": {"task": "r.jsonl"}})

    def found(trained: dict[str, Any], asked: dict[str, Any]) -> list[str]:
        prompts = [Prompt("rows/0", [USER], (1,), "rows", {}, options) for options in (trained, asked)]
        eval_set = EvalSet("", prompts[1:], {}, SamplingParams(1.0, 1), 1, 0, None)
        return [finding.what for finding in check_evaluation_format(recipe, prompts[:1], [eval_set])]

    off, on = {"enable_thinking": False}, {"enable_thinking": True}
    assert found(off, off) == []
    (what,) = found(off, on)
    assert "enable_thinking = true" in what
    assert "enable_thinking = false" in what
    assert len(found(off, {})) == len(found({"tools": [{"name": "f"}]}, {})) == 1
