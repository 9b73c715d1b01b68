"""User-defined code that is called during a run, in the same process. It can observe the run and end it early.

Callbacks are called when no work is half done. They get copies, so modifying their arguments has no effect. If a
callback raises, the run ends with a checkpoint, and the exception reaches the caller of `gruppo.train` unchanged.
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
from gruppo.utils.waiting import waiting_for


class StopTraining(Enum):
    """What a callback returns to end the run early: `gruppo.STOP`."""

    STOP = "stop"


STOP: Final = StopTraining.STOP


class Callback:
    """Base class for callbacks, whose methods do nothing. Any object with at least one of the methods works.

    A method that returns `gruppo.STOP` ends the run at the step that it was called for. The run still evaluates (if the
    recipe has an evaluation), saves a checkpoint and writes the result. Steps done before a resume are not reported
    again.
    """

    def on_step(self, step: int, metrics: dict[str, Any], groups: Sequence[Group]) -> StopTraining | None:
        """A step is done and recorded: its line of metrics.jsonl, and its groups with completions and advantages."""
        return None

    def on_evaluation(self, step: int, figures: dict[str, Any], rows: list[dict[str, Any]]) -> StopTraining | None:
        """An evaluation after `step` steps is done: accuracy with interval, and one row per answer."""
        return None

    def on_checkpoint(self, step: int, path: Path) -> StopTraining | None:
        """A checkpoint is complete in the folder `path`; it is deleted once later checkpoints replace it."""
        return None


MOMENTS: Mapping[str, int] = {"on_step": 3, "on_evaluation": 3, "on_checkpoint": 2}  # name -> number of arguments


class Callbacks:
    """The callbacks of a run.

    `stopped`: a callback has asked to end the run. `failed`: a callback has raised, so none is called any more.
    """

    def __init__(self, callbacks: Sequence[Callback | Callable[..., Any] | object] = ()) -> None:
        """Raises UsageError for an object that has none of the methods, or a method with a different signature."""
        self.stopped = self.failed = False
        self._listeners: dict[str, list[tuple[str, Callable[..., Any]]]] = {moment: [] for moment in MOMENTS}
        if not isinstance(callbacks, list | tuple):
            raise UsageError(f"callbacks: is of type {type(callbacks).__name__}; pass a list of callbacks")
        for callback in callbacks:
            for moment, method in _methods(callback):
                self._listeners[moment].append((_checked_name(moment, method), method))

    def fresh(self) -> Callbacks:
        """The same callbacks, in the state before a run."""
        other = Callbacks()
        other._listeners = self._listeners
        return other

    def notify(self, moment: str, *arguments: Any) -> None:
        """Call the method `moment` of every callback that has it, with copies of the arguments.

        Raises any exception that a callback raises, and UsageError if one returns anything but STOP or None.
        """
        for name, method in [] if self.failed else self._listeners[moment]:
            try:
                with waiting_for(f"the callback {name}"):
                    answer = method(*copy.deepcopy(arguments))
                if answer is not None and answer is not STOP:
                    raise UsageError(
                        f"callbacks: {name} returns {answer!r}; return gruppo.STOP to end the run, or None"
                    )
            except Exception:
                self.failed = True
                raise
            self.stopped |= answer is STOP


def _methods(callback: object) -> list[tuple[str, Callable[..., Any]]]:
    """The methods of a callback that override the base class; a plain function counts as on_step."""
    if isinstance(callback, type):
        raise UsageError(f"callbacks: {callback.__name__} is a class; pass an instance, {callback.__name__}()")
    methods = [
        (moment, getattr(callback, moment))
        for moment in MOMENTS
        if callable(getattr(callback, moment, None))
        and getattr(type(callback), moment, None) is not getattr(Callback, moment)
    ]
    if not methods and callable(callback):
        return [("on_step", callback)]
    if not methods and not isinstance(callback, Callback):
        raise UsageError(
            f"callbacks: {callback!r} has none of {', '.join(MOMENTS)}; write one of them, or pass a function "
            "f(step, metrics, groups)"
        )
    return methods


def _checked_name(moment: str, method: Callable[..., Any]) -> str:
    """The method's name, for error messages. Raises UsageError unless the method takes the arguments."""
    name = getattr(method, "__qualname__", type(method).__name__)
    try:
        inspect.signature(method).bind(*range(MOMENTS[moment]))
    except TypeError as error:
        raise UsageError(
            f"callbacks: {name} cannot be called with {moment}'s arguments ({error}); use the signature of "
            f"gruppo.Callback.{moment}"
        ) from None
    return str(name)
