"""Chat-template options: variables and tools from the recipe and from rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from gruppo.config.loading import load_recipe
from gruppo.config.sections import Task
from gruppo.data.chat_options import ChatOptions
from gruppo.data.loading import Dataset, load_training
from gruppo.data.offline import offline_completions
from gruppo.data.tokenization import ToolTexts, data_sha256, tokenize_part
from gruppo.errors import UsageError
from gruppo.evaluation.datasets import read_data
from gruppo.preflight.static_checks import check_chat_template
from gruppo.rollout.chat_rendering import ChatRenderer
from gruppo.types import Prompt
from gruppo.utils.progress import NullProgress
from tests.conftest import END, make_policy, make_tokenizer

TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name if t.function else t.name }} {% endfor %}"
    "{% for m in messages %}<{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}={% if not thinking | "
    "default(true) %}no{% endif %}{% endif %}"
)
CHAT = [{"role": "user", "content": "ab"}]
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
BARE = {"name": "sub", "parameters": {"type": "object"}}


def tokenizer() -> PreTrainedTokenizerFast:
    made = make_tokenizer()
    made.chat_template = TEMPLATE
    return made


def prompt(row: dict[str, Any], **fields: Any) -> Prompt:
    part, _ = load_training(Task(**fields), "task", False, NullProgress(), [{"prompt": CHAT, **row}])
    return tokenize_part(part, tokenizer(), 128, 8)[0][0]


@pytest.mark.parametrize(
    ("row", "fields", "expected"),
    [
        ({}, {}, {}),
        ({}, {"chat_template_kwargs": {"thinking": False}, "tools": [ADD]}, {"thinking": False, "tools": [ADD]}),
        ({"chat_template_kwargs": {"thinking": False}}, {}, {"thinking": False}),
        ({"chat_template_kwargs": '{"thinking": false}'}, {}, {"thinking": False}),
        ({"chat_template_kwargs": {"thinking": True}}, {"chat_template_kwargs": {"thinking": False, "a": 1}},
         {"thinking": True, "a": 1}),
        ({"chat_template_kwargs": {"thinking": None}}, {"chat_template_kwargs": {"thinking": False}},
         {"thinking": False}),
        ({"chat_template_kwargs": None, "tools": None}, {"tools": [ADD]}, {"tools": [ADD]}),
        ({"chat_template_kwargs": "", "tools": " "}, {"tools": [ADD]}, {"tools": [ADD]}),
        ({"tools": [BARE]}, {"tools": [ADD]}, {"tools": [BARE]}),
        ({"tools": []}, {"tools": [ADD]}, {}),
        ({"tools": json.dumps([ADD, BARE])}, {}, {"tools": [ADD, BARE]}),
        ({"tools": [json.dumps(ADD), BARE]}, {}, {"tools": [ADD, BARE]}),
        ({"tools": [{**BARE, "parameters": '{"type": "object"}'}]}, {}, {"tools": [BARE]}),
        ({"tools": [{**ADD, "function": json.dumps(ADD["function"])}]}, {}, {"tools": [ADD]}),
        ({"tools": [{"type": "function", "function": {"name": "add", "parameters":
            '{"type": "object", "properties": {}}'}}]}, {}, {"tools": [ADD]}),
    ],
)  # fmt: skip
def test_options_reach_the_template_as_in_transformers(row: Any, fields: Any, expected: dict[str, Any]) -> None:
    made = prompt(row, **fields)
    assert made.template_options == expected
    ids = tokenizer().apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False, **expected)
    assert list(made.token_ids) == list(ids)
    plain = prompt({})
    assert (made.token_ids != plain.token_ids) == ("tools" in expected or expected.get("thinking") is False)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages = .*a row's prompt gives"),
        ({"chat_template_kwargs": {"tokenize": False}}, "gruppo tokenizes the prompt"),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, "gruppo asks for an answer"),
        ({"chat_template_kwargs": '{"tools": []}'}, "the column `tools` give"),
        ({"chat_template_kwargs": {"a-b": 1}}, "not the name of a variable"),
        ({"chat_template_kwargs": [1]}, "is not a table of variables"),
        ({"chat_template_kwargs": "think"}, "neither JSON"),
        ({"tools": "hammer, saw"}, r"tools = 'hammer, saw': is neither JSON .*task\.columns = \{other = \"tools\"\}"),
        ({"tools": {"name": "f"}}, "is not a list of JSON schemas"),
        ({"tools": ["hammer"]}, r"tools\[0\] = 'hammer': is neither JSON"),
        ({"tools": [{"function": {"name": "f"}}, 3]}, r"tools\[0\] = .*is not the JSON schema"),
        ({"tools": [BARE, 3]}, r"tools\[1\] = 3: is not the JSON schema"),
        ({"tools": "[" * 100_000}, "neither JSON"),
    ],
)
def test_columns_that_are_no_options_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"^prompts, row 1: .*{message}"):
        prompt(row)
    text, _ = load_training(Task(), "task", False, NullProgress(), [{"prompt": "text", **row}])
    assert tokenize_part(text, tokenizer(), 128, 8)[0][0].template_options == {}, "text prompts have no options"
    renamed = {"other": next(iter(row))}
    assert prompt(row, columns=renamed).template_options == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "gruppo asks for an answer"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "that of the model's tokenizer"),
        ({"chat_template_kwargs": {"strftime_now": "1 May"}}, "template language"),
        ({"chat_template_kwargs": {"enable thinking": True}}, "not the name of a variable"),
        ({"chat_template_kwargs": {"day": __import__("datetime").date(2024, 7, 26)}}, 'write "2024-07-26"'),
        ({"chat_template_kwargs": {"a": {"b": [None]}}}, r"chat_template_kwargs.a.b\[0\] = None: has no value"),
        ({"tools": ["add"]}, r"tools\[0\] = 'add': is not the JSON schema"),
        ({"tools": [{}]}, r"tools\[0\] = {}"),
        ({"chat_template_kwargs": True}, "chat_template_kwargs = True: is not a table of variables; write e.g."),
        ({"tools": ADD}, "is not a list of JSON schemas; write e.g."),
    ],
)
def test_options_of_a_recipe_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=rf"task\..*{message}"):
        load_recipe({"model": {"name": "m"}, "task": fields})


def test_options_that_plain_text_never_gets_are_refused() -> None:
    for fields in ({"chat_template_kwargs": {"a": 1}}, {"tools": [ADD]}):
        with pytest.raises(UsageError, match=r'task\.(chat_template_kwargs|tools): .*task\.system = ""'):
            load_training(Task(**fields), "task", False, NullProgress(), [{"prompt": "text"}])
        load_training(Task(**fields, system=""), "task", False, NullProgress(), [{"prompt": "text"}])


def test_options_are_part_of_the_data_hash() -> None:
    """Also an option that changes no token of a prompt, but perhaps those of later turns."""
    without, with_option = prompt({}), prompt({}, chat_template_kwargs={"other": 1})
    assert without.token_ids == with_option.token_ids
    assert data_sha256([without], ()) != data_sha256([with_option], ())
    assert data_sha256([without], ()) == data_sha256([Prompt("prompts/0", CHAT, without.token_ids, "prompts", {})], ())


def test_completions_are_rendered_with_the_options() -> None:
    made = tokenizer()
    made.chat_template = (
        "{% for m in messages %}{{ '=' ~ mark if m.role == 'assistant' else '<' }}{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}={{ mark }}{% endif %}"
    )
    rows = [{"prompt": CHAT, "completion": "a"}]
    part, _ = load_training(
        Task(chat_template_kwargs={"mark": "no"}), "task", False, NullProgress(), rows, answered=True
    )
    ((whole,), _) = tokenize_part(part, made, 128, 8)
    ((completion, _),) = offline_completions(whole, made, False)
    assert list(completion.token_ids) == made("a<eos>", add_special_tokens=False)["input_ids"]


def test_later_turns_are_rendered_with_the_options() -> None:
    renderer = ChatRenderer(tokenizer(), [END])
    ids = make_tokenizer()("<b<eos>=no", add_special_tokens=False)["input_ids"]
    assert renderer.after(["b"], [], {"thinking": False}) == list(ids)
    assert renderer.after(["b"], []) == list(ids)[:-2]
    _, extended = renderer.prompt(CHAT, "b", {"thinking": False})
    assert list(extended) == list(make_tokenizer()("<abb<eos>=no", add_special_tokens=False)["input_ids"])


def test_tools_of_an_environment_and_of_rows_exclude_each_other() -> None:
    part = Dataset("rows", [{"prompt": CHAT, "tools": [ADD]}], [0])
    for tools in (ToolTexts(schemas=[BARE]), ToolTexts(text="You can call sub.")):
        with pytest.raises(UsageError, match="those that the model can call are the environment's"):
            tokenize_part(part, tokenizer(), 128, 8, tools=tools)


def recipe(tmp_path: Path, **tables: Any) -> Any:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": [{"role": "user", "content": str(n)}], "answer": "1"}) + "\n" for n in range(20))
    )
    base = {"model": {"name": "m"}, "evaluation": {"task": str(rows)}}
    base["benchmarks"] = [{"task": str(rows), "name": "extra"}]
    return load_recipe(
        {**base, "task": {"name": str(rows)}, **tables} if "mixture" not in tables else {**base, **tables}
    )


def evaluated(settings: Any) -> list[ChatOptions]:
    return [rows.parts[0].chat for rows in read_data(settings, [], None, NullProgress()).eval_sets]


def test_evaluation_inherits_the_options(tmp_path: Path) -> None:
    rows = str(tmp_path / "rows.jsonl")
    options = {"chat_template_kwargs": {"thinking": False}, "tools": [ADD]}
    settings = recipe(tmp_path, task={"name": rows, **options})
    for same in (settings, load_recipe(settings.as_mapping())):  # a run folder has the resolved recipe
        own, benchmark = evaluated(same)
        assert own == ChatOptions({"thinking": False}, [ADD])
        assert benchmark == ChatOptions({"thinking": False}, [ADD])  # of the same task
    held_out = recipe(tmp_path, task={"name": rows, **options, "held_out": 0.5}, evaluation={})
    assert evaluated(held_out)[0] == ChatOptions({"thinking": False}, [ADD])
    written = {"name": rows, "chat_template_kwargs": {}, "tools": []}
    assert evaluated(recipe(tmp_path, task={"name": rows, **options}, evaluation={"task": written}))[0] == ChatOptions()
    mixture = [{"name": rows, **options}, {"name": rows}]
    assert evaluated(recipe(tmp_path, mixture=mixture))[0] == ChatOptions()  # no common options
    agreed = recipe(tmp_path, mixture=[mixture[0], mixture[0]])
    assert evaluated(agreed)[0] == ChatOptions({"thinking": False}, [ADD])


def test_check_shows_the_options_and_those_that_nothing_reads() -> None:
    policy = make_policy()
    policy.tokenizer.chat_template = TEMPLATE + "{{ strftime_now('%Y') }}"
    prompts = [prompt({"tools": [ADD, BARE]}, chat_template_kwargs={"thinking": False, "thinkin": "a"}), prompt({})]
    findings = {finding.severity + " " + finding.subject: finding for finding in check_chat_template(policy, prompts)}
    shown = findings["ok chat options"].what
    assert "thinking = false (1 of 2 prompts)" in shown
    assert "tools: add, sub" in shown
    assert findings["warning chat options"].what == "the chat template never reads thinkin"
    assert "date" in findings["note date"].what
    assert not any("options" in found.subject for found in check_chat_template(policy, prompts[1:]))
