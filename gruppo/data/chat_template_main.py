"""The process that renders chat templates:

    python -P chat_template_main.py READ_FD WRITE_FD PARENT_PID

A chat template is a program that comes with a model, so it runs here, with limits on CPU time, memory and output, and
with Jinja's sandbox as transformers sets it up. Requests arrive as pickles of plain data, and answers are sent back as
JSON. The file imports nothing of gruppo, and neither it nor what it imports loads torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pickle
import random
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import datetime, tzinfo
from importlib.machinery import PathFinder
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

_PR_SET_PDEATHSIG = 1
_MOST_QUOTED = 300  # characters of a template's message


class _Clock(datetime):
    """What templates see in place of `datetime`: time stands still at `moment`. `asked`: whether one has looked."""

    moment = datetime.min
    asked = False

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        """The time of the request."""
        cls.asked = True
        return cls.moment if tz is None else cls.moment.astimezone(tz)


def main() -> None:
    """Answer requests until the parent closes the pipe or dies."""
    read, write, parent = (int(argument) for argument in sys.argv[1:4])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        with contextlib.suppress(OSError):  # if memory runs out, the system ends this process before the parent
            Path("/proc/self/oom_score_adj").write_text("1000")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.getppid() != parent:  # it died before this process could ask to be ended with it
        return
    _limit(resource.RLIMIT_CORE, 0)
    requests, answers = Connection(read, writable=False), Connection(write, readable=False)
    try:
        apply = _load()
    except Exception as error:  # noqa: BLE001  an environment that cannot import transformers' modules here
        requests.recv_bytes()
        answers.send_bytes(_encoded({"kind": "unavailable", "message": f"{type(error).__name__}: {error}"}))
        return
    while True:
        try:
            request = pickle.loads(requests.recv_bytes())
        except EOFError:
            return
        answer = _answer(apply, request)
        answers.send_bytes(_encoded(answer))
        if answer.get("kind") == "memory":
            return  # what is left of the memory may be in fragments: another process continues


def _load() -> Callable[..., Any]:
    """transformers' `apply_chat_template`, with `_Clock` as its clock.

    Half of the time that `import transformers` takes goes into a table of all models, which nothing here needs.
    """
    spec = PathFinder.find_spec("transformers")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("transformers is not installed")
    package: Any = ModuleType("transformers")
    package.__path__, package.__version__ = list(spec.submodule_search_locations), version("transformers")
    sys.modules["transformers"] = package
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase
    from transformers.utils import chat_template_utils

    chat_template_utils.datetime = _Clock  # type: ignore[attr-defined]
    return PreTrainedTokenizerBase.apply_chat_template


def _answer(apply: Callable[..., Any], request: dict[str, Any]) -> dict[str, Any]:
    """{"text": …, "dated": whether the template has asked for the time}, or {"kind": …, "message": …, "line": …}."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + request["seconds"])
    _limit(resource.RLIMIT_AS, request["memory"])
    tokenizer = SimpleNamespace(
        get_chat_template=lambda template, tools: request["template"], special_tokens_map=request["special_tokens"]
    )
    _Clock.moment, _Clock.asked = datetime.fromisoformat(request["time"]), False
    try:
        random.seed(repr(request["messages"]))  # Jinja's filter `random` gives the same row the same text every time
        text = str(apply(tokenizer, request["messages"], tokenize=False, **request["arguments"]))
        if len(text) > request["characters"]:
            return {"kind": "size", "message": f"{len(text)} characters"}
        return {"text": text, "dated": _Clock.asked}
    except MemoryError:
        return {"kind": "memory", "message": ""}
    except Exception as error:  # noqa: BLE001  a template can fail in any way
        return _failure(error)


def _failure(error: Exception) -> dict[str, Any]:
    from jinja2.exceptions import TemplateError, TemplateSyntaxError, UndefinedError

    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    line = lines[-1] if lines else None
    if isinstance(error, TemplateSyntaxError):
        kind, line = "syntax", error.lineno
    elif isinstance(error, UndefinedError):
        kind = "undefined"
    else:  # the class itself is what `raise_exception` raises
        kind = "refused" if type(error) is TemplateError else "failed"
    message = str(error)[:_MOST_QUOTED]
    return {
        "kind": kind,
        "message": message if kind == "refused" else f"{type(error).__name__}: {message}",
        "line": line,
    }


def _encoded(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _limit(limit: int, most: int) -> None:
    """Set a soft limit, so that the next request can set another."""
    _, hard = resource.getrlimit(limit)
    with contextlib.suppress(OSError, ValueError):  # a system without this limit
        resource.setrlimit(limit, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    main()
