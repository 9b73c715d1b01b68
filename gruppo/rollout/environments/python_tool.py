"""Runs the Python blocks that a model writes in its answer: tool-integrated reasoning (ToRA, DeepSeekMath).

    ```python
    print(3 * 7)
    ```
    ```output
    21
    ```

The closing fence ends the turn; the output follows in the same turn of the conversation. The blocks of a completion
share one interpreter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

from gruppo.rollout.environments.protocol import Turn

_FENCE = "```"
_FENCED = re.compile(rf"([ \t]*){_FENCE}([^`]*)")
_LANGUAGE = re.compile(r"\s*\{?\.?(?:python|py)[\d.]*\}?(?:\s|$)", re.IGNORECASE)


class Ran(Protocol):
    """Result of a block. `output`: text that is safe to show; `status`: "ok" or the kind of failure."""

    output: str
    status: str


class Session(Protocol):
    """A confined interpreter for one completion. It keeps its state between blocks unless the output says otherwise."""

    def run(self, code: str) -> Any:
        """Run a block within the limits of the session's pool and return a `Ran`."""

    def close(self) -> None:
        """End the interpreter."""


class Pool(Protocol):
    """Provides sessions; see `gruppo.rollout.sandbox.pool`."""

    def session(self) -> Any:
        """A new `Session`."""

    def close(self) -> None:
        """End all sessions."""


class PythonBlocks:
    """The environment of one completion; see the module docstring."""

    stop: tuple[str, ...] = (f"\n{_FENCE}\n",)

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.session: Session | None = None

    def reset(self, row: Mapping[str, Any], seed: int) -> str | None:
        """Returns no observation."""
        return None

    def step(self, text: str) -> Turn:
        """Run the Python block at the end of the text, if there is one."""
        code = last_block(text)
        if code is None:
            return Turn()
        if self.session is None:
            self.session = self.pool.session()
        ran: Ran = self.session.run(code)
        output = ran.output.strip("\n")
        shown = f"{_FENCE}output\n{output}\n{_FENCE}\n" if output else f"{_FENCE}output\n{_FENCE}\n"
        return Turn(shown, calls=1, errors=int(ran.status != "ok"))

    def close(self) -> None:
        """End the interpreter of the completion."""
        if self.session is not None:
            self.session.close()
            self.session = None


def last_block(text: str) -> str | None:
    """The code of the Python block whose closing fence ends the text (white space aside), or None if there is none.

    A fence is alone on its line except for indentation, which is also removed from the code, and the language:
    "python", "py", "python3.11" or "{python}", followed by anything. A Python fence opens a new block even within
    another block.
    """
    lines = text.rstrip().split("\n")
    opened: tuple[int, int, bool] | None = None
    for place, line in enumerate(lines):
        fence = _FENCED.fullmatch(line)
        if fence is None:
            continue
        python = bool(_LANGUAGE.match(fence[2]))
        if opened is None or python:
            opened = place, len(fence[1]), python
        elif not fence[2].strip():
            start, indent, runs = opened
            if runs and place == len(lines) - 1:
                return "\n".join(
                    code[min(indent, len(code) - len(code.lstrip())) :] for code in lines[start + 1 : place]
                )
            opened = None
    return None
