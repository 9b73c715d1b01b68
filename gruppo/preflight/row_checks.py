"""Checks of rows: answers within prompts, lists as text, and evaluation prompts in another format than training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gruppo.config.recipe import Recipe
from gruppo.config.sections import Task
from gruppo.data.messages import parsed
from gruppo.data.references import alternatives, answer_text
from gruppo.evaluation.sets import EvalSet
from gruppo.preflight.findings import Finding
from gruppo.types import Prompt

_REFERENCES = ("answer", "solution")


def check_answers(prompts: Sequence[Prompt], trains_on_rows: bool) -> list[Finding]:
    """Whether prompts end with an answer, perhaps the right one, and whether references are lists.

    `trains_on_rows`: the rows bring their completions.
    """
    found = []
    ended = [
        prompt
        for prompt in prompts
        if not isinstance(prompt.content, str) and prompt.content[-1]["role"] == "assistant"
    ]
    told = [prompt for prompt in ended if any(text in prompt.text for text in _references(prompt))]
    if ended and not trains_on_rows:
        found.append(Finding(
            "problem" if told else "warning", "end of prompts", f"{len(ended)} of {len(prompts)} prompts end with an "
            f"assistant message, e.g. {ended[0].id}: {ended[0].text[:40]!r}"
            + (f"; in {len(told)} of them it contains the row's own answer" if told else ""),
            "the model continues this message instead of writing an answer",
            "leave columns.prompt out for rows with messages (the last message then becomes the answer), unless the "
            "message is the beginning of an answer", {"prompts": len(prompts), "ended": len(ended), "told": len(told)},
        ))  # fmt: skip
    texts = [prompt for prompt in prompts if _list_as_text(prompt.columns.get("answer"))]
    if texts:
        found.append(Finding(
            "warning", "answers", f"{len(texts)} of {len(prompts)} answers are a JSON list in a text, e.g. "
            f"{texts[0].id}: {texts[0].columns['answer'][:60]!r}", "such a text is one answer, compared as a whole",
            "to mean alternatives, write a list in the row (JSON Lines, JSON or Parquet)", {"answers": len(texts)},
        ))  # fmt: skip
    several = [prompt for prompt in prompts if isinstance(prompt.columns.get("answer"), list | tuple)]
    if several:
        found.append(Finding(
            "ok", "answers", f"{len(several)} of {len(prompts)} answers are lists: alternatives, any of which is right",
            figures={"answers": len(several)},
        ))  # fmt: skip
    return found


def check_tool_values(prompts: Sequence[Prompt]) -> list[Finding]:
    """Whether tool calls or tools have keys without a value, which appear when rows with different tools are listed."""
    nulls = [(prompt, path) for prompt in prompts if (path := next(_nulls(prompt), None))]
    if not nulls:
        return []
    return [Finding(
        "warning", "tools", f"{len(nulls)} of {len(prompts)} prompts have a tool call or a tool with a key whose value "
        f"is null, e.g. {nulls[0][0].id}: {nulls[0][1]}", "the chat template shows null to the model; pyarrow and "
        "datasets add such keys, those of other rows, when they turn a table into a list (to_list, to_pylist)",
        "pass the Dataset or the Parquet file itself, or remove these keys, unless null is meant",
        {"prompts": len(prompts), "null": len(nulls)},
    )]  # fmt: skip


def _nulls(prompt: Prompt) -> Iterator[str]:
    """Where tool calls and tools of a prompt have None as a value."""
    for place, message in enumerate([] if isinstance(prompt.content, str) else prompt.content):
        yield from _nulls_in(message.get("tool_calls") or [], f"prompt[{place}].tool_calls")
    yield from _nulls_in(prompt.template_options.get("tools") or [], "tools")


def _nulls_in(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from [f"{path}.{key}"] if item is None else _nulls_in(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _nulls_in(item, f"{path}[{place}]")


def _references(prompt: Prompt) -> list[str]:
    values = [prompt.columns[name] for name in _REFERENCES if name in prompt.columns]
    found = [value for value in values if isinstance(value, str | int | float | list | tuple)]
    return [answer_text(one).strip() for value in found for one in alternatives(value)]


def _list_as_text(answer: Any) -> bool:
    listed = parsed(answer, list) if isinstance(answer, str) else None
    return listed is not None and len(listed) > 1 and all(isinstance(item, str) for item in listed)


def check_evaluation_format(recipe: Recipe, prompts: Sequence[Prompt], eval_sets: Sequence[EvalSet]) -> list[Finding]:
    """Whether the prompts of evaluation sets have the format of the training prompts: messages, system, template."""
    trained = {_format(prompt) for prompt in prompts}
    tasks = {"": recipe.evaluation.task if recipe.evaluation else None}
    tasks |= {benchmark.title: benchmark.task for benchmark in recipe.benchmarks}
    found = []
    for eval_set in eval_sets:
        name = eval_set.name or "evaluation"
        others = [prompt for prompt in eval_set.prompts if _format(prompt) not in trained]
        if others:
            found.append(Finding(
                "warning", f"format of {name}", f"{len(others)} of {len(eval_set.prompts)} prompts are "
                f"{_format(others[0])}, but those of training are {' or '.join(sorted(trained)[:2])}",
                "the model is evaluated on another format than it is trained on",
                "write the same system, template and chat_template_kwargs in its task, or leave them out to inherit "
                "them",
                {"prompts": len(eval_set.prompts), "different": len(others)},
            ))  # fmt: skip
        elif (task := tasks.get(eval_set.name)) and not any(_same_prompts(task, other) for other in recipe.tasks):
            found.append(Finding(
                "note", f"format of {name}", f"its prompts come from {_builder(task)}, those of training from "
                f"{_builder(recipe.tasks[0])}", "the instructions to the model may differ",
                "nothing, if that is intended; else write the same template in both",
            ))  # fmt: skip
    return found


def _format(prompt: Prompt) -> str:
    content = prompt.content
    if isinstance(content, str):
        return "plain text"
    form = "messages without a system message"
    if content[0]["role"] == "system":
        form = f"messages with the system message {content[0]['content'][:60]!r}"
    options = {name: value for name, value in sorted(prompt.template_options.items()) if name != "tools"}
    texts = [f"{name} = {json.dumps(value, default=str, ensure_ascii=False)}" for name, value in options.items()]
    return ", ".join([form, *texts, *(["tools"] if prompt.template_options.get("tools") else [])])


def _same_prompts(task: Task, other: Task) -> bool:
    by_columns = task.template == other.template and task.options.get("prompt") == other.options.get("prompt")
    return by_columns and (task.template is not None or task.name == other.name or task.columns == other.columns)


def _builder(task: Task) -> str:
    return f"the template {task.template[:40]!r}" if task.template is not None else f"{task.name} itself"
