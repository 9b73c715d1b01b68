"""Chat templates: the same text and tokens as transformers', within limits, and errors that say what to do."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from transformers import PreTrainedTokenizerFast

from gruppo.data import chat_template
from gruppo.data.chat_template import TemplateError, chat_tokens, render_chat, template_time
from gruppo.data.loading import checked_rows
from gruppo.data.offline import offline_completions
from gruppo.data.tokenization import tokenize_rows
from gruppo.errors import UsageError
from tests.conftest import make_tokenizer

USER = [{"role": "user", "content": "ab"}]
CHATML = (
    "{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- tool | tojson }}{{ '\\n' }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}{%- for message in messages %}"
    "{%- set content = message.content if message.content is string else '' %}"
    "{{- '<|im_start|>' + message.role + '\\n' + content | trim }}"
    "{%- for call in message.tool_calls or [] %}{{- call.function.arguments | tojson(indent=2) }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
TEMPLATES = [
    "{% for m in messages %}<{{ m['content'] }}>{% endfor %}{% if add_generation_prompt %}={% endif %}",
    CHATML,
    "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ messages }}{{ tools }}{{ documents }}",
    "{% for m in messages %}\n  {% if loop.first %}\n  a{% continue %}{% endif %}\n {{ m.content }}\n{% endfor %}\n\n",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% macro show(m, n=2) %}{{ caller() }}{{ m.role * n }}{% endmacro %}"
    "{% for m in messages %}{% call show(m) %}x{% endcall %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m.role }}{% endfor %}",
    "{{ dict(a=1, b=messages[0]) | tojson(sort_keys=true) }}{{ messages | tojson(ensure_ascii=true, indent=1) }}",
    "{{ messages[-1].content.split('b')[0] }}{{ messages | map(attribute='role') | join(',') }}",
    "{{ messages[0].extra }}{{ messages[0].extra.x if messages[0].extra is mapping }}{{ messages[1].reasoning }}",
    "{{ level }}{{ flag }}{{ none_given is defined }}{{ items }}",
    "é漢😀 {{ messages[0].content | upper }} &<>\"' {{ '\\u2028' }}",
]  # fmt: skip


class Role(StrEnum):
    USER = "user"


@dataclasses.dataclass
class Extra:
    x: int


CONVERSATIONS: list[list[dict[str, Any]]] = [
    USER,
    [{"role": "system", "content": " be good "}, {"role": "user", "content": "a\n\nb é漢😀 \x1f<|im_end|>"}],
    [{"role": Role.USER, "content": "ab"}, {"role": "assistant", "content": "bb", "reasoning": "t", "name": None}],
    [
        {"role": "user", "content": "b", "extra": Extra(3)},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": {"é": (1, 2.5)}}}]},
        {"role": "tool", "content": "b" * 30_000},
    ],
    [{"role": "user", "content": "", "extra": {1: [None, np.float32(0.5)], "x": b""}}],
]  # fmt: skip
OPTIONS: list[dict[str, Any]] = [
    {},
    {"enable_thinking": False, "level": 3, "items": [{"a": (1, 2)}], "flag": True},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], "level": "é"},
    {"documents": [{"title": "t", "text": "b"}], "bos_token": "<<"},
]


def with_template(template: Any) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", TEMPLATES)
def test_same_text_and_tokens_as_transformers(template: str) -> None:
    tokenizer = with_template(template)
    for messages in CONVERSATIONS:
        for options in OPTIONS:
            for ask, continue_last in ((False, False), (True, False), (False, True)):
                arguments = {"add_generation_prompt": ask, "continue_final_message": continue_last, **options}
                try:
                    expected = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
                except Exception as error:  # noqa: BLE001
                    with pytest.raises(TemplateError, match=re.escape(str(error)[:20].strip())):
                        render_chat(tokenizer, messages, options, ask=ask, continue_last=continue_last)
                    continue
                assert render_chat(tokenizer, messages, options, ask=ask, continue_last=continue_last) == expected
                ids = tokenizer.apply_chat_template(messages, return_dict=False, **arguments)
                assert chat_tokens(tokenizer, messages, options, ask=ask, continue_last=continue_last) == list(ids)


def test_the_template_for_tools_is_chosen_as_transformers_does() -> None:
    tokenizer = with_template({"default": "plain", "tool_use": "{{ tools | length }} tools"})
    assert render_chat(tokenizer, USER) == "plain"
    assert render_chat(tokenizer, USER, {"tools": [{"name": "f"}]}) == "1 tools"


def test_a_lone_surrogate_is_rendered() -> None:
    assert render_chat(make_tokenizer(), [{"role": "user", "content": "\udc80"}]) == "<\udc80>"


def test_half_of_a_surrogate_pair_in_a_template() -> None:
    tokenizer = with_template("{{ '\\ud800' }}{{ messages[0].content }}")
    with pytest.raises(TemplateError, match="the chat template writes half of a surrogate pair, which is not text"):
        render_chat(tokenizer, USER)


HOSTILE = {
    "{{ 'x' * 9999999999 }}": "256 MiB",
    "{{ messages[0].content * 9999999999 }}": "256 MiB",
    "{{ 'x' | center(9999999999) }}": "256 MiB",
    "{{ '%9999999999d' | format(1) }}": "256 MiB",
    "{{ [0] * 999999999 }}": "256 MiB",
    "{{ ('x' * 1000000) | replace('x', 'y' * 1000000) }}": "256 MiB",
    "{{ ([('x' * 1000000)] * 500) | join }}": "256 MiB",
    "{{ ([messages] * 99999999) | list }}": "256 MiB",
    "{% set ns = namespace(x='xx') %}{% for i in range(99999) %}{% set ns.x = ns.x + ns.x %}{% endfor %}": "256 MiB",
    "{% set n = namespace(x=0) %}{% for i in range(999) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x }}": "RecursionError",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "CPU time",
    "{% for i in range(99999) %}{% for j in range(99999) if j == -1 %}{% endfor %}{% endfor %}": "CPU time",
    "{{ 7 ** (10 ** 9) }}": "CPU time",
    "{% for i in range(99999) %}{% for j in range(200) %}{{ 'xxxxxxxxxx' }}{% endfor %}{% endfor %}": "takes",
    "{{ lipsum(n=99999) }}": "CPU time",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}": "RecursionError",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}": "RecursionError",
    "{{ range(10 ** 9) | list }}": "OverflowError",
    "{{ 'x' * 2000000 }}": "writes 2000000 characters",
    "{{ ''.__class__.__mro__ }}": "SecurityError",
    "{{ raise_exception('x' * 10000000) }}": "refuses it",
}


@pytest.mark.parametrize("template", HOSTILE)
def test_templates_without_bounds_are_ended(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process has no more memory and CPU time than the limits allow; the next row is rendered as usual."""
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 1)
    monkeypatch.setattr(chat_template, "MEMORY_BYTES", 2**28)
    with pytest.raises(TemplateError, match=re.escape(HOSTILE[template])) as error:
        render_chat(with_template(template), USER)
    assert len(str(error.value)) < 600
    assert render_chat(make_tokenizer(), USER) == "<ab>"


def test_limits_grow_with_the_conversation() -> None:
    long = [{"role": "user", "content": "é" * 5_000_000}]
    template = (
        "{% for m in messages %}{{ m.content }}{{ m.content }}{{ m.content | tojson(ensure_ascii=true) }}{% endfor %}"
    )
    assert len(render_chat(with_template(template), long)) == 2 * 5_000_000 + 6 * 5_000_000 + 2


def test_a_busy_machine_changes_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process gets no CPU time for longer than its limit."""
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 1)
    process = renderer()
    process.suspend()
    threading.Timer(2.5, process.resume).start()
    assert render_chat(make_tokenizer(), USER) == "<ab>"


def test_a_process_that_was_killed_is_replaced() -> None:
    for _ in range(2):
        process = renderer()
        process.kill()
        assert render_chat(make_tokenizer(), USER) == "<ab>"
    process = renderer()
    process.suspend()
    threading.Timer(0.5, process.kill).start()  # during the request
    assert render_chat(make_tokenizer(), USER) == "<ab>"
    assert renderer().pid != process.pid


def test_an_interrupted_request_does_not_answer_the_next_one() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        renderer().suspend()
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(KeyboardInterrupt):
            render_chat(make_tokenizer(), [{"role": "user", "content": "interrupted"}])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert render_chat(make_tokenizer(), USER) == "<ab>"


def test_a_process_that_sleeps_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer().suspend()
    monkeypatch.setattr(chat_template, "_STUCK_SECONDS", 0.1)
    monkeypatch.setattr(chat_template, "_TICK_SECONDS", 0.1)
    with pytest.raises(TemplateError, match="does not end within"):
        render_chat(make_tokenizer(), USER)


def test_memory_is_watched_where_the_system_does_not_limit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(chat_template, "MEMORY_BYTES", 2**28)
    monkeypatch.setattr(chat_template, "_TICK_SECONDS", 0.01)
    template = "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = ns.x + [i, 'x'] %}{% endfor %}"
    monkeypatch.setattr(chat_template._Renderer, "_memory", lambda self: 2**29)
    with pytest.raises(TemplateError, match="of memory"):
        render_chat(with_template(template), USER)


def test_a_forked_process_renders_in_a_process_of_its_own() -> None:
    pid = renderer().pid
    child = os.fork()
    if not child:
        same = chat_template._RENDERER._process is not None or render_chat(make_tokenizer(), USER) != "<ab>"
        chat_template._RENDERER.close()
        os._exit(int(same))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert render_chat(make_tokenizer(), USER) == "<ab>"
    assert renderer().pid == pid


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_does_not_load_torch() -> None:
    assert "torch" not in Path(f"/proc/{renderer().pid}/maps").read_text()


def test_the_process_ends_with_its_parent() -> None:
    request = {
        "template": "x", "special_tokens": {}, "messages": USER, "arguments": {}, "time": "2024-07-26",
        "seconds": 9, "memory": 2**30, "characters": 9,
    }  # fmt: skip
    program = (
        "import time\nfrom gruppo.data.chat_template import _RENDERER\n"
        f"assert _RENDERER.answer({request!r})['text'] == 'x'\nprint(_RENDERER._process.pid, flush=True)\n"
    )
    for end in ("time.sleep(600)", ""):
        with subprocess.Popen([sys.executable, "-c", program + end], stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout is not None
            process = psutil.Process(int(parent.stdout.readline()))
            if end:
                parent.kill()
        deadline = time.monotonic() + 60
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_every_template_is_rendered_by_this_module() -> None:
    """transformers' own function is only called where the limits are, or in the text of a model card."""
    users = {str(path) for path in Path("gruppo").rglob("*.py") if ".apply_chat_template" in path.read_text()}
    users -= {"gruppo/conversion/openrlhf.py", "gruppo/conversion/verl.py"}  # names of other trainers' options
    assert users == {
        "gruppo/data/chat_template.py", "gruppo/data/chat_template_main.py", "gruppo/training/model_card.py"
    }  # fmt: skip


ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\n"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
)
ERRORS = [
    (ALTERNATE, 'refuses it: "Conversation roles must alternate", line 2 of the template; write the row as'),
    ("{{ raise_exception('System role not supported') }}", r"refuses it: .*task\.system"),
    ("{{ messages[0].call.name }}", "reads a value that is missing .*call.*line 1 .*chat_template_kwargs"),
    ("\n{{ effort | upper ~ effort.low }}", "'effort' is undefined, line 2 .*chat_template_kwargs"),
    ("{% for m in messages %}", r"is not valid \(TemplateSyntaxError: .*, line 1 .*belongs to the model"),
    ("{{ messages | nothing }}", "is not valid .*nothing"),
    ("{{ 1 / 0 }}", r"fails on it \(ZeroDivisionError: .*line 1 .*write the row as the template expects"),
    ("{{ messages[0].content + 1 }}", r"fails on it \(TypeError: "),
    ("{{ messages.pop() }}", r"fails on it \(SecurityError: "),
    ("{% include 'x' %}", r"fails on it \("),
]


@pytest.mark.parametrize(("template", "message"), ERRORS)
def test_an_error_names_the_row_the_message_and_the_fix(template: str, message: str) -> None:
    good = {"role": "user", "content": "ok"}
    rows = checked_rows([{"prompt": "text"}, {"prompt": [good, good]}], "data.jsonl")
    with pytest.raises(UsageError, match=rf"^data.jsonl, row 2: the chat template .*{message}"):
        tokenize_rows(rows, with_template(template), 100, 10, "data.jsonl")
    (prompt,) = tokenize_rows([{"prompt": [good], "completion": "b"}], make_tokenizer(), 100, 10, "data.jsonl")
    with pytest.raises(UsageError, match=rf"^data.jsonl/0: completion: the chat template .*{message}"):
        offline_completions(dataclasses.replace(prompt, content=[good, good]), with_template(template), False)


def test_time_stands_still_in_a_block() -> None:
    tokenizer = with_template("{{ strftime_now('%d %B %Y %H:%M') }}")
    with template_time(datetime(2024, 7, 26, 13, 5)):
        assert render_chat(tokenizer, USER) == "26 July 2024 13:05"
        assert chat_template.asks_for_time(tokenizer, USER)
    assert render_chat(tokenizer, USER)[-10:-6] == str(datetime.now().year)
    assert not chat_template.asks_for_time(make_tokenizer(), USER)


def test_random_choices_are_the_same_every_time() -> None:
    tokenizer = with_template("{{ range(100000) | random }} {{ lipsum(n=1) }}")
    first = render_chat(tokenizer, USER)
    renderer().kill()
    assert render_chat(tokenizer, USER) == first
    assert render_chat(tokenizer, [{"role": "user", "content": "b"}]) != first


def renderer() -> psutil.Process:
    """The process that renders, which has been started."""
    render_chat(make_tokenizer(), USER)
    assert chat_template._RENDERER._process is not None
    return psutil.Process(chat_template._RENDERER._process.pid)
