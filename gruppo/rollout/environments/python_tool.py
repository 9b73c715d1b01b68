"""Python that a model writes into its answer, run block by block: tool-integrated reasoning (ToRA, DeepSeekMath).

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
    """What running a block gave: text that is safe to show, and "ok" or what went wrong."""

    output: str
    status: str


class Session(Protocol):
    """An interpreter of its own, confined; it forgets nothing between blocks unless it says so."""

    def run(self, code: str) -> Any:
        """Run a block; a `Ran`, within the limits of the session's pool."""

    def close(self) -> None:
        """End it."""


class Pool(Protocol):
    """Where sessions come from; see gruppo.rollout.sandbox.pool."""

    def session(self) -> Any:
        """A new `Session`."""

    def close(self) -> None:
        """End all of them."""


class PythonBlocks:
    """The environment of one completion: see the top of this file."""

    stop: tuple[str, ...] = (f"\n{_FENCE}\n",)

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.session: Session | None = None

    def reset(self, row: Mapping[str, Any], seed: int) -> str | None:
        """Nothing to say."""
        return None

    def step(self, text: str) -> Turn:
        """Run the block that the text ends with, if it ends with one."""
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
        """End its interpreter."""
        if self.session is not None:
            self.session.close()
            self.session = None


def last_block(text: str) -> str | None:
    """The code of the block of Python whose closing fence ends the text, white space apart; None where none does.

    A fence stands alone on its line, but for indentation, which is taken off the code too, and for what language it
    opens: "python", "py", "python3.11", "{python}", with anything behind it. Python opens a block within another.
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
                    each[min(indent, len(each) - len(each.lstrip())) :] for each in lines[start + 1 : place]
                )
            opened = None
    return None
