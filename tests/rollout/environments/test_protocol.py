"""Environments alone, worked by hand: unchanged TRL classes, tool calls, Python blocks."""

from __future__ import annotations

import json

import pytest

from gruppo.errors import UsageError
from gruppo.rollout.environments.loading import load_environment
from gruppo.rollout.environments.protocol import Turn
from gruppo.rollout.environments.python_tool import PythonBlocks, last_block
from gruppo.rollout.environments.trl_tools import Tools, schema_of, tool_calls
from tests.rollout.environments.worlds import Counter

WORLDS = "tests/rollout/environments/worlds.py"


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def counter_at_5() -> Tools:
    tools = Tools(Counter())
    assert tools.reset({"prompt": "x", "start": 5}, 0) == " It is 5 now."
    return tools


def test_tools_of_a_trl_class() -> None:
    loaded = load_environment(f"{WORLDS}:Counter", {})
    assert [schema["function"]["name"] for schema in loaded.schemas] == ["add", "breaks", "look"]
    assert (loaded.gives_reward, loaded.stop) == (True, ())


def test_schema_of_a_tool_by_hand() -> None:
    assert schema_of(Counter().add) == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add to the counter.",
            "parameters": {
                "type": "object",
                "properties": {
                    "amount": {"type": "integer", "description": "What is added, each time"},
                    "times": {"type": "integer", "description": "How often"},
                },
                "required": ["amount"],
            },
        },
    }


def test_schemas_of_annotations() -> None:
    def tool(a: str | None, b: list[int], c: float = 1.0, *rest: int, d=None, **others: int) -> None:
        """Text."""

    parameters = schema_of(tool)["function"]["parameters"]
    assert parameters["properties"] == {
        "a": {"type": "string"}, "b": {"type": "array", "items": {"type": "integer"}}, "c": {"type": "number"}, "d": {},
    }  # fmt: skip
    assert parameters["required"] == ["a", "b"]


def test_schema_equals_that_of_transformers() -> None:
    from transformers.utils import get_json_schema

    theirs = get_json_schema(Counter().add)
    theirs["function"].pop("return", None)
    assert schema_of(Counter().add) == theirs


def test_several_calls_in_one_turn_run_in_order() -> None:
    tools = counter_at_5()
    turn = tools.step(f"First {call('add', amount=2)} then {call('add', amount=1, times=3)}{call('look')}")
    assert turn == Turn(["total 7", "total 10", '{"total": 10}'], calls=3)
    assert tools.get_reward() == 10.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (call("subtract", amount=1), "there is no tool 'subtract'; there are: add, breaks, look"),
        (call("_hidden"), "there is no tool '_hidden'"),
        (call("get_reward"), "there is no tool 'get_reward'"),
        (call("add", value=1), "add: missing a required argument: 'amount'"),
        (call("breaks"), "RuntimeError: out of order"),
        ("<tool_call>add(1)</tool_call>", "the tool call is no JSON"),
        ('<tool_call>["add"]</tool_call>', 'a tool call must be {"name"'),
        ('<tool_call>{"name": "add", "arguments": 3}</tool_call>', 'a tool call must be {"name"'),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "the tool call is no JSON"),
        ("<tool_call>", "the tool call is no JSON"),
    ],
)
def test_invalid_calls_are_reported_to_the_model(text: str, message: str) -> None:
    turn = counter_at_5().step(text)
    assert (turn.calls, turn.errors, turn.done) == (1, 1, False)
    assert turn.observation is not None
    assert turn.observation[0].startswith(f"Error: {message}")


def test_an_unclosed_call_and_the_openai_format() -> None:
    assert counter_at_5().step('<tool_call>{"name": "add", "arguments": "{\\"amount\\": 2}"}').observation == [
        "total 7"
    ]
    nested = '{"function": {"name": "add", "arguments": {"amount": 1}}}'
    assert counter_at_5().step(f"<tool_call>{nested}</tool_call>").observation == ["total 6"]


def test_a_turn_without_calls_has_no_answer() -> None:
    assert counter_at_5().step("I am done.") == Turn()
    assert tool_calls("none") == []


def test_unusable_classes_are_refused() -> None:
    for name, options, message in (
        (f"{WORLDS}:Missing", {}, "environment.name"),
        (f"{WORLDS}:Counter", {"a": 1}, "environment.options"),
        (f"{WORLDS}:NoTools", {}, "neither step"),
        (f"{WORLDS}:NoReset", {}, "no method reset"),
        (f"{WORLDS}:OtherReset", {}, r"reset\(self, row, seed\)"),
        (f"{WORLDS}:Awaits", {}, "step is async"),
        (f"{WORLDS}:Letters", {"rounds": 2, "other": 1}, "environment.options"),
    ):
        with pytest.raises(UsageError, match=message):
            load_environment(name, options)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Let us see.\n```python\nprint(1)\n```\n", "print(1)"),
        ("```python\na = 1\n\nprint(a)\n```", "a = 1\n\nprint(a)"),
        ("```py\nx\n```\n\n", "x"),
        ("```python\n```\n", ""),
        ("```python\nx\n```\nand then", None),
        ("```python\nx", None),
        ("```\nx\n```\n", None),
        ("```json\n{}\n```\n", None),
        ("```python\nx\n```\n```text\ny\n```\n", None),
        ("```python\nx\n```\ntext\n```python\ny\n```\n", "y"),
        ("", None),
        ("```x = 3``` is it.\n```python\nprint(1)\n```\n", "print(1)"),
        ("```\n```python\n1\n```\n", "1"),
        ("1. do:\n   ```python\n   x = 1\n     y\n   ```\n", "x = 1\n  y"),
        ("```python title=a\nx\n```\n", "x"),
        ("```{python}\nx\n```\n", "x"),
        ("```python3.11\nx\n```\n", "x"),
        ("```pyramid\nx\n```\n", None),
    ],
)
def test_the_block_at_the_end_of_a_text(text: str, code: str | None) -> None:
    assert last_block(text) == code


class FakePool:
    """A pool whose sessions record the code, print the number of the block, and run nothing."""

    def __init__(self) -> None:
        self.sessions: list[FakeSession] = []
        self.closed = False

    def session(self) -> FakeSession:
        self.sessions.append(FakeSession())
        return self.sessions[-1]

    def close(self) -> None:
        self.closed = True


class FakeRan:
    def __init__(self, output: str, status: str = "ok") -> None:
        self.output, self.status, self.seconds = output, status, 0.0


class FakeSession:
    def __init__(self) -> None:
        self.ran: list[str] = []
        self.closed = False

    def run(self, code: str) -> FakeRan:
        self.ran.append(code)
        if "error" in code:
            return FakeRan("NameError", "error")
        return FakeRan(f"{len(self.ran)}\n")

    def close(self) -> None:
        self.closed = True


def test_blocks_of_a_completion_share_a_session() -> None:
    pool = FakePool()
    blocks = PythonBlocks(pool)
    assert blocks.step("no code") == Turn()
    assert pool.sessions == [], "no session is opened before there is code to run"
    assert blocks.step("```python\nx\n```\n") == Turn("```output\n1\n```\n", calls=1)
    assert blocks.step("```python\nerror\n```\n") == Turn("```output\nNameError\n```\n", calls=1, errors=1)
    assert [session.ran for session in pool.sessions] == [["x", "error"]]
    blocks.close()
    assert pool.sessions[0].closed


def test_all_calls_of_an_object_share_one_event_loop() -> None:
    environment = load_environment(f"{WORLDS}:Locks", {}).make()
    environment.reset({}, 0)
    call = '<tool_call>{"name": "hold", "arguments": {}}</tool_call>'
    for _ in range(2):
        assert environment.step(call) == Turn(["held"], calls=1)
