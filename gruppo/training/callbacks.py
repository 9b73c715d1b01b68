"""Code of the user's that is called during a run, in the same process: to watch it, and to end it early.

Callbacks are called where nothing is half done, and get copies: what they do to them changes nothing. What one raises
ends the run with a checkpoint and goes on to the caller of `gruppo.train` as it is.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Final

from gruppo.errors import UsageError
from gruppo.types import Group


class StopTraining(Enum):
    """What a callback returns to end the run early: `gruppo.STOP`."""

    STOP = "stop"


STOP: Final = StopTraining.STOP


class Callback:
    """A base for callbacks, whose methods do nothing; any object with one of them will do.

    A method that returns `gruppo.STOP` ends the run at the step that it was called for: with the evaluation, if the
    recipe has one, a checkpoint and the result. Steps done before a resume are not told again.
    """

    def on_step(self, step: int, metrics: dict[str, Any], groups: Sequence[Group]) -> StopTraining | None:
        """A step was made and written: its line of metrics.jsonl, its groups with completions and advantages."""
        return None

    def on_evaluation(self, step: int, figures: dict[str, Any], rows: list[dict[str, Any]]) -> StopTraining | None:
        """Questions were answered after `step` steps: accuracy with interval, and a row an answer."""
        return None

    def on_checkpoint(self, step: int, path: Path) -> StopTraining | None:
        """A checkpoint is complete in the folder `path`; it is deleted when later ones have come."""
        return None


MOMENTS: Mapping[str, int] = {"on_step": 3, "on_evaluation": 3, "on_checkpoint": 2}  # name -> number of arguments


class Callbacks:
    """The callbacks of a run. `stopped`: one has asked for its end; `failed`: one has raised, and none is called any
    more."""

    def __init__(self, given: Sequence[Callback | Callable[..., Any] | object] = ()) -> None:
        """Raises UsageError for what has none of the methods, or one that does not take their arguments."""
        self.stopped = self.failed = False
        self._listeners: dict[str, list[tuple[str, Callable[..., Any]]]] = {moment: [] for moment in MOMENTS}
        if not isinstance(given, list | tuple):
            raise UsageError(f"callbacks: is a {type(given).__name__}; give a list of callbacks")
        for each in given:
            for moment, method in _methods(each):
                self._listeners[moment].append((_checked(moment, method), method))

    def tell(self, moment: str, *arguments: Any) -> None:
        """Call the method `moment` of each callback that has it, with copies. Raises what one raises, and UsageError
        where one returns anything but STOP and None."""
        for name, method in [] if self.failed else self._listeners[moment]:
            try:
                answer = method(*copy.deepcopy(arguments))
                if answer is not None and answer is not STOP:
                    raise UsageError(
                        f"callbacks: {name} returns {answer!r}; return gruppo.STOP to end the run, or nothing"
                    )
            except Exception:
                self.failed = True
                raise
            self.stopped |= answer is STOP


def _methods(callback: object) -> list[tuple[str, Callable[..., Any]]]:
    """The methods of a callback that are not those of the base; a function is an on_step."""
    if isinstance(callback, type):
        raise UsageError(f"callbacks: {callback.__name__} is a class; give an instance, {callback.__name__}()")
    found = [
        (moment, getattr(callback, moment))
        for moment in MOMENTS
        if callable(getattr(callback, moment, None))
        and getattr(type(callback), moment, None) is not getattr(Callback, moment)
    ]
    if not found and callable(callback):
        return [("on_step", callback)]
    if not found and not isinstance(callback, Callback):
        raise UsageError(
            f"callbacks: {callback!r} has none of {', '.join(MOMENTS)}; write one of them, or give a function "
            "f(step, metrics, groups)"
        )
    return found


def _checked(moment: str, method: Callable[..., Any]) -> str:
    """The method's name for errors, once it is known to take its arguments."""
    name = getattr(method, "__qualname__", type(method).__name__)
    try:
        inspect.signature(method).bind(*range(MOMENTS[moment]))
    except TypeError as error:
        raise UsageError(
            f"callbacks: {name} cannot be called with {moment}'s arguments ({error}); take those of "
            f"gruppo.Callback.{moment}"
        ) from None
    return str(name)
