"""Environments and tools of a script, which live in its own process, as in TRL.

An `environment_factory` makes an object with reset(**row), tools as methods, and optionally get_reward(). `tools` are
functions. Reward functions get the objects of their completions as `environments`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gruppo.errors import UsageError
from gruppo.rollout.environments.client import Answer, EnvironmentHandle, Tick
from gruppo.rollout.environments.trl_tools import (
    CALL,
    Tools,
    awaited,
    parsed_call,
    schema_of,
    tool_calls,
    tools_of,
)
from gruppo.rollout.workers.reward_main import describe_error
from gruppo.utils.waiting import waiting_for

Factory = Callable[[], Any]


class _ToolBox(Tools):
    """An object of a script, or none, with functions as further tools."""

    def __init__(self, target: Any, functions: Sequence[Callable[..., Any]]) -> None:
        self.target = target
        self.tools = {function.__name__: function for function in functions}
        self.tools |= {} if target is None else tools_of(target)

    def reset(self, row: Mapping[str, Any], seed: int) -> str | None:
        """Reset the object, which gets the columns of the row; without one, there is nothing to reset."""
        return None if self.target is None else super().reset(row, seed)


class LocalEnvironments:
    """See `gruppo.rollout.environments.client.Environments`.

    `objects`: those of the completions that were sampled last, in order.
    """

    most = 2**31
    stop: tuple[str, ...] = ()

    def __init__(
        self, factory: Factory | Mapping[str, Factory] | None, functions: Sequence[Callable[..., Any]] = ()
    ) -> None:
        """`factory`: makes an object, or one by the value of a row's column `environment`; `functions`: tools.

        Raises UsageError if an object cannot be made, has no reset, or if the model could call nothing.
        """
        self._factories = dict(factory) if isinstance(factory, Mapping) else {None: factory}
        self._functions = list(functions)
        self._boxes: dict[int, _ToolBox] = {}
        self._observed: dict[int, list[tuple[str, tuple[str, ...]]]] = {}  # what the model wrote, and the answers
        self.gives_reward = False
        self.digests: list[str] = []
        schemas: dict[str, dict[str, Any]] = {}
        for name in self._factories:
            box = self._make(name)
            if box.target is not None and not callable(getattr(box.target, "reset", None)):
                raise UsageError(
                    f"environment_factory: {type(box.target).__name__} has no reset; write def reset(self, **row)"
                )
            schemas |= {tool: schema_of(method, tool) for tool, method in box.tools.items()}
            self.gives_reward |= callable(getattr(box.target, "get_reward", None))
        if not schemas:
            raise UsageError(
                "environment_factory: its objects have no public methods that the model could call as tools; write some"
            )
        self.schemas = list(schemas.values())

    @property
    def objects(self) -> list[Any]:
        """The objects of the last completions, by the order in which these are scored."""
        return [self._boxes[number].target for number in sorted(self._boxes)]

    def _make(self, name: Any) -> _ToolBox:
        factory = self._factories[name]
        return _ToolBox(None if factory is None else factory(), self._functions)

    def answer(self, plays: Sequence[EnvironmentHandle], tick: Tick) -> list[Answer]:
        """See `Environments`. The first call for new completions forgets the objects of earlier ones."""
        if plays and not any(play.texts for play in plays):
            self._boxes, self._observed = {}, {}
        return [self._answered(self._turn, play, tick) for play in plays]

    def end(self, plays: Sequence[EnvironmentHandle], tick: Tick) -> list[Answer]:
        """See `Environments`. The objects stay, for reward functions."""
        return [self._answered(self._reward, play, tick) for play in plays]

    def _answered(self, ask: Callable[[EnvironmentHandle], Answer], play: EnvironmentHandle, tick: Tick) -> Answer:
        tick()
        try:
            with waiting_for("environment_factory"):
                return ask(play)
        except Exception as error:  # noqa: BLE001  an object of the script can raise anything
            return Answer(failure=describe_error(error))

    def _turn(self, play: EnvironmentHandle) -> Answer:
        """Reset the object of a completion, or answer its last text."""
        if not play.texts:
            name = play.row.get("environment") if None not in self._factories else None
            if name not in self._factories:
                known = ", ".join(map(str, self._factories))
                raise KeyError(f"environment = {name!r} in a row: environment_factory has {known}")
            box = self._boxes[play.number] = self._make(name)
            first = box.reset(play.row, play.seed)
            return Answer(None if first is None else (str(first),))
        turn = self._boxes[play.number].step(play.texts[-1])
        observation = turn.observation
        texts = (observation,) if isinstance(observation, str) else observation
        if texts:
            self._observed.setdefault(play.number, []).append((play.texts[-1], tuple(texts)))
        return Answer(None if texts is None else tuple(texts), turn.done, turn.calls, turn.errors)

    def messages(self, place: int, text: str) -> list[dict[str, Any]]:
        """The completion at `place` of the last ones, whose whole text is `text`, as TRL's messages.

        An answer that calls tools has `tool_calls`, and each result is a message of the role "tool".
        """
        number = sorted(self._boxes)[place]
        messages: list[dict[str, Any]] = []
        rest = text
        for written, observations in self._observed.get(number, []):
            calls = [_call(body) for body in tool_calls(written)]
            message = {"role": "assistant", "content": written.partition(CALL)[0]}
            messages.append({**message, "tool_calls": [{"type": "function", "function": call} for call in calls]})
            for call, observation in zip(calls, observations, strict=False):
                messages.append({"role": "tool", "name": call["name"], "content": observation})
            rest = rest.partition(written)[2].partition(observations[-1])[2]
        return [*messages, {"role": "assistant", "content": rest.lstrip("\n")}] if rest or not messages else messages

    def _reward(self, play: EnvironmentHandle) -> Answer:
        target = self._boxes[play.number].target
        if not callable(getattr(target, "get_reward", None)):
            return Answer()
        value = awaited(target.get_reward())
        return Answer(reward=None if value is None else float(value))

    def drop(self) -> None:
        """See `Environments`. Reward functions still get the objects."""

    def close(self) -> None:
        """Does nothing: the objects belong to the script."""

    def notify_of_restarts(self, notify: Callable[[str], None]) -> None:
        """Does nothing: there is no process that could be started again."""


def _call(body: str) -> dict[str, Any]:
    """A tool call as TRL shows it to reward functions; one that cannot be read has the name "" and its text."""
    try:
        name, arguments = parsed_call(body)
    except Exception:  # noqa: BLE001  the model wrote no JSON
        return {"name": "", "arguments": {"text": body}}
    return {"name": name, "arguments": arguments}
