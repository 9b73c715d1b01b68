"""Chat templates: conversations as text and token ids.

Every chat template that gruppo renders is rendered here. A template is a program that comes with a model, possibly a
stranger's, so it runs in a process of its own (chat_template_main.py) with limits on CPU time, memory and output. They
grow with the length of the conversation and count work, so a busy machine changes no verdict. The result is that of
transformers' `apply_chat_template`, character for character and token for token.

A tokenizer with an `apply_chat_template` of its own (mistral-common, a model's trusted Python files) renders by itself:
what runs then is not a template.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from gruppo.errors import UsageError
from gruppo.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Limits of one conversation, for each started 4 MiB of its request.
CPU_SECONDS, MEMORY_BYTES, SHARE_BYTES = 10, 2**30, 2**22


# Characters of a rendered conversation: so many, and so many for each byte of the request.
CHARACTERS, CHARACTERS_PER_BYTE = 2**20, 16


_STUCK_SECONDS = 600.0  # a process that sleeps uses no CPU time
_TICK_SECONDS = 0.5 if sys.platform == "linux" else 0.05  # other systems do not enforce RLIMIT_AS
_PROGRAM = Path(__file__).with_name("chat_template_main.py")


class TemplateError(UsageError):
    """A chat template fails on a conversation, refuses it, or exceeds a limit."""


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: Mapping[str, Any] | None = None,
    *,
    ask: bool = False,
    continue_last: bool = False,
) -> str:
    """A conversation as text.

    `options`: variables of the template, and `tools`. `ask`: with a generation prompt at its end; `continue_last`:
    without the end of the last message. Raises TemplateError.
    """
    return str(_apply(tokenizer, messages, options or {}, ask, continue_last, tokenize=False))


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: Mapping[str, Any] | None = None,
    *,
    ask: bool = False,
    continue_last: bool = False,
) -> list[int]:
    """A conversation as token ids; see `render_chat`."""
    return list(_apply(tokenizer, messages, options or {}, ask, continue_last, tokenize=True))


@contextmanager
def template_time(moment: datetime) -> Iterator[None]:
    """Within the block, templates that print the date or the time print this one, in place of the current one."""
    global _time
    before, _time = _time, moment
    try:
        yield
    finally:
        _time = before


def asks_for_time(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Mapping[str, Any] | None = None
) -> bool:
    """Whether the template looks at the time when it renders this conversation. Raises TemplateError."""
    if _renders_itself(tokenizer):
        return False
    return bool(_rendered(tokenizer, messages, options or {}, {"add_generation_prompt": True})["dated"])


def end_renderer() -> None:
    """End the process that renders templates. The next template starts another one."""
    _RENDERER.end()


def unread_options(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> list[str]:
    """Names of options that appear nowhere in the template, so that they change nothing."""
    if _renders_itself(tokenizer) or not tokenizer.chat_template:
        return []
    template = str(tokenizer.get_chat_template(None, options.get("tools")))
    return [name for name in options if not re.search(rf"\b{re.escape(name)}\b", template)]


_time: datetime | None = None


def _renders_itself(tokenizer: PreTrainedTokenizerBase) -> bool:
    from transformers import PreTrainedTokenizerBase

    return type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: Mapping[str, Any],
    ask: bool,
    continue_last: bool,
    tokenize: bool,
) -> Any:
    arguments: dict[str, Any] = {"add_generation_prompt": ask, "continue_final_message": continue_last}
    if _renders_itself(tokenizer):
        try:
            return tokenizer.apply_chat_template(
                list(messages), tokenize=tokenize, return_dict=False, **arguments, **options
            )
        except Exception as error:  # a trusted Python file, or mistral-common on a row
            raise TemplateError(f"the tokenizer fails on it ({type(error).__name__}: {error})") from error
    text = _rendered(tokenizer, messages, options, arguments)["text"]
    if not tokenize:
        return text
    return tokenizer(text, padding=False, truncation=False, max_length=None, add_special_tokens=False)["input_ids"]


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> dict[str, Any]:
    try:
        request = {
            "template": tokenizer.get_chat_template(None, options.get("tools")),
            "special_tokens": _plain(tokenizer.special_tokens_map),
            "messages": _plain(list(messages)),
            "arguments": {**arguments, **_plain(options)},
            "time": (_time or datetime.now()).isoformat(),
        }
        size = len(pickle.dumps(request))
    except RecursionError:
        raise TemplateError("its messages are nested too deeply; write text") from None
    shares = 1 + size // SHARE_BYTES
    limits = {
        "seconds": CPU_SECONDS * shares,
        "memory": MEMORY_BYTES * shares,
        "characters": CHARACTERS + CHARACTERS_PER_BYTE * size,
    }
    answer = _RENDERER.answer({**request, **limits})
    if "text" not in answer:
        raise TemplateError(_explained(answer, limits))
    if not _is_text(answer["text"]) and _is_text(
        json.dumps([request["messages"], request["arguments"]], ensure_ascii=False)
    ):
        raise TemplateError(f"the chat template writes half of a surrogate pair, which is not text; {_ANOTHER}")
    return answer


def _is_text(text: str) -> bool:
    """Whether a text has a UTF-8 form: it contains no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain(value: Any) -> Any:
    """The value in plain JSON types and tuples, as transformers shows it to templates."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = map(_plain, value)
        return tuple(items) if isinstance(value, tuple) else list(items)
    if isinstance(value, np.generic):
        return _plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return _plain(value.model_dump())
    return f"<{type(value).__name__}>"


_ANOTHER = "use the chat template that belongs to the model, or another model"


def _explained(answer: Mapping[str, Any], limits: Mapping[str, int]) -> str:
    """Why a template did not render a conversation, and what to do about it."""
    kind, message = answer["kind"], " ".join(str(answer.get("message", "")).split())
    where = f", line {answer['line']} of the template" if answer.get("line") else ""
    if kind == "refused":
        fix = "write the row as the template expects"
        if "system" in message.lower():
            fix = "leave out the system message (task.system), or move its text into the user message (task.template)"
        return f'the chat template refuses it: "{message}"{where}; {fix}'
    if kind == "undefined":
        return (
            f"the chat template reads a value that is missing ({message}{where}); add it to the messages, or pass it "
            "in task.chat_template_kwargs"
        )
    if kind == "syntax":
        return f"the chat template is not valid ({message}{where}); {_ANOTHER}"
    if kind == "failed":
        return f"the chat template fails on it ({message}{where}); write the row as the template expects"
    if kind == "unavailable":
        return f"the process that renders chat templates cannot run ({message}); reinstall gruppo and transformers"
    if answer.get("killed"):
        return f"the process that renders chat templates was killed twice ({message}); free some memory, and try again"
    excess = {
        "cpu": f"takes more than {limits['seconds']} s of CPU time",
        "memory": f"takes more than {limits['memory'] // 2**20} MiB of memory",
        "size": f"writes {message}, more than {limits['characters']}",
        "died": f"ends the process that renders it ({message})",
        "stuck": f"does not end within {_STUCK_SECONDS:.0f} s",
    }
    return f"the chat template {excess[kind]} on it; {_ANOTHER}"


class _Renderer:
    """The process that renders templates: started when it is first needed, and again after it was ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: Connection | None = None
        self._answers: Connection | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of the process, or {"kind": "cpu", "died" or "stuck"}."""
        content = pickle.dumps(request)
        with self._lock:
            for last in (False, True):
                try:
                    answer = self._ask(content)
                except BaseException:
                    self.close()  # an answer that nobody has read must not become that of the next request
                    raise
                # Something else ended the process: a user, the system, or the end of the thread that started it.
                if last or answer.get("kind") != "died" or not answer["killed"]:
                    return answer
            raise AssertionError

    def _ask(self, content: bytes) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._start()
        assert self._requests is not None
        assert self._answers is not None
        deadline = time.monotonic() + _STUCK_SECONDS
        try:
            self._requests.send_bytes(content)
            while not self._answers.poll(_TICK_SECONDS):
                if time.monotonic() > deadline:
                    self.close()
                    return {"kind": "stuck"}
                if sys.platform != "linux" and self._memory() > MEMORY_BYTES * (1 + len(content) // SHARE_BYTES):
                    self.close()
                    return {"kind": "memory"}
            answer = json.loads(self._answers.recv_bytes().decode("utf-8", "surrogatepass"))
        except (EOFError, OSError):
            return self._ended()
        if answer.get("kind") in ("memory", "unavailable"):
            self.close()
        return dict(answer)

    def _start(self) -> None:
        request_read, request_write = os.pipe()
        answer_read, answer_write = os.pipe()
        self._requests = Connection(request_write, readable=False)
        self._answers = Connection(answer_read, writable=False)
        numbers = [str(number) for number in (request_read, answer_write, os.getpid())]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_PROGRAM), *numbers],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(request_read, answer_write),
                start_new_session=True,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            )
        finally:
            os.close(request_read)
            os.close(answer_write)

    def _memory(self) -> int:
        try:
            return int(psutil.Process(self._process.pid).memory_info().rss) if self._process else 0
        except psutil.Error:
            return 0

    def _ended(self) -> dict[str, Any]:
        """Why the process has ended without an answer."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        code = self._process.poll()
        self.close()
        if code == -signal.SIGXCPU:
            return {"kind": "cpu"}
        names = {-number: f"signal {number.name}" for number in signal.Signals}
        name = names.get(code or 0, f"exit code {code}")
        return {"kind": "died", "message": name, "killed": code in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP)}

    def end(self) -> None:
        """End the process, once it has answered what it was asked."""
        with self._lock:
            self.close()

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
        for connection in (self._requests, self._answers):
            if connection is not None:
                connection.close()
        self._process = self._requests = self._answers = None

    def forget(self) -> None:
        """In a forked process: leave the process to the parent."""
        if self._process is not None:
            self._process.returncode = 0  # it is not this process's child to wait for
            self._process = None
        self._lock = threading.Lock()
        self.close()


_RENDERER = _Renderer()
atexit.register(_RENDERER.close)
os.register_at_fork(after_in_child=_RENDERER.forget)
