"""Reward functions of a script, called in its own process as TRL calls them: once per step, with all completions.

They are live objects: closures, bound methods, functions that use a client or a model of the script. So they are not
sent to worker processes, and have neither a time limit nor a memory limit.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gruppo.errors import UsageError
from gruppo.rewards import RewardFunction
from gruppo.rewards.combine import combine
from gruppo.rewards.identity import old_digest
from gruppo.rewards.loading import check_signature, parameters_of
from gruppo.rollout.workers.outcomes import Outcome, call_arguments, outcome_of
from gruppo.rollout.workers.reward_main import accepted, describe_error, values_of
from gruppo.rollout.workers.rewards import reward_names
from gruppo.trl.local_environments import LocalEnvironments
from gruppo.types import Completion, Prompt, Reward
from gruppo.utils.progress import Advance
from gruppo.utils.waiting import waiting_for


class BackgroundLoop:
    """An event loop in a thread of its own, for async functions: a notebook's thread already runs one."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def result(self, value: Any) -> Any:
        """The value, awaited if it is awaitable."""
        if not inspect.isawaitable(value):
            return value
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="async rewards", daemon=True).start()

        async def wait() -> Any:
            return await value

        return asyncio.run_coroutine_threadsafe(wait(), self._loop).result()

    def close(self) -> None:
        """End the thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None


class LocalRewards:
    """See `gruppo.rollout.workers.rewards.Rewards`. `state` gives the argument `trainer_state` of the functions;
    with `environments`, they get its objects as `environments`, and completions with tool calls as messages."""

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        weights: Sequence[float],
        columns: Sequence[str],
        state: Callable[[Mapping[str, Any]], Any],
        environments: LocalEnvironments | None = None,
        further_columns: bool = False,
    ) -> None:
        """`further_columns`: completions bring columns that are not known yet.

        Raises UsageError if a function cannot be called with these columns, or if there is not one weight each.
        """
        self.functions, self._state, self._environments = list(functions), state, environments
        self.names = reward_names(self.functions)
        self.weights = list(weights) or [1.0] * len(self.functions)
        if len(self.weights) != len(self.functions):
            raise UsageError(
                f"reward_weights = {self.weights}: {len(self.weights)} numbers for {len(self.functions)} functions; "
                "write one for each"
            )
        self.columns = sorted(set(columns) | ({"environments"} if environments else set()))
        self.paths: list[str | None] = [None] * len(self.functions)
        self.options: list[dict[str, Any]] = [{} for _ in self.functions]
        self.environment: list[str] = []
        self.timeout = float("inf")
        self.digests = [
            old_digest(function) or hashlib.sha256(name.encode()).hexdigest()
            for function, name in zip(self.functions, self.names, strict=True)
        ]
        for function, name in zip(self.functions, self.names, strict=True):
            check_signature(function, name, [*self.columns, *(parameters_of(function) if further_columns else ())], {})
        self._loop = BackgroundLoop()

    def notify_of_restarts(self, notify: Callable[[str], None]) -> None:
        """Does nothing: there is no process that could be started again."""

    def close(self) -> None:
        """End the thread of async functions."""
        self._loop.close()

    def score(
        self,
        groups: Sequence[tuple[Prompt, Sequence[Completion]]],
        state: Mapping[str, Any],
        advance: Advance | None = None,
    ) -> tuple[list[list[Reward]], dict[str, list[float]]]:
        """Call every function once, with the completions of all groups. Returns the rewards and logged metrics.

        If a call raises or returns something else than one number or None for each completion, all completions are
        excluded, with the reason.
        """
        completions = [completion for _, group in groups for completion in group]
        arguments = _joined([call_arguments(prompt, group) for prompt, group in groups])
        if self._environments is not None and any(isinstance(prompt.content, list) for prompt, _ in groups):
            texts = [completion.text for completion in completions]
            arguments["completions"] = [self._environments.messages(*one) for one in enumerate(texts)]
        outcomes, metrics = [], dict[str, list[float]]()
        for name, function in zip(self.names, self.functions, strict=True):
            with waiting_for(f"reward {name}"):
                outcome = self._call(function, arguments, completions, state)
            outcomes.append(outcome)
            for metric, values in outcome.metrics.items():
                metrics.setdefault(metric, []).extend(values)
            if advance is not None:
                advance(len(groups) / len(self.functions))
        rewards = iter(
            combine(
                self.names,
                self.weights,
                [outcome.values[number] for outcome in outcomes],
                {
                    name: column[number]
                    for one in outcomes
                    for name, column in one.extra.items()
                    if number < len(column)
                },
            )
            for number in range(len(completions))
        )
        return [[next(rewards) for _ in group] for _, group in groups], metrics

    def _call(
        self,
        function: RewardFunction,
        arguments: Mapping[str, Any],
        completions: Sequence[Completion],
        state: Mapping[str, Any],
    ) -> Outcome:
        metrics: dict[str, list[float]] = {}
        extra: dict[str, list[str]] = {}

        def log_metric(name: str, value: float) -> None:
            metrics.setdefault(str(name), []).append(float(value))

        def log_extra(column: str, values: Sequence[Any]) -> None:
            extra[str(column)] = [str(value) for value in values]

        offered = {**arguments, "trainer_state": self._state(state), "log_extra": log_extra, "log_metric": log_metric}
        if self._environments is not None:
            offered["environments"] = self._environments.objects
        try:
            result = self._loop.result(function(**accepted(function, offered)))
            answer = {"values": values_of(result, len(completions)), "metrics": metrics, "extra": extra}
        except Exception as error:  # noqa: BLE001  any exception means that the function failed
            answer = {"failure": describe_error(error)}
        return outcome_of(answer, completions)


def _joined(calls: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The arguments of one call for several groups. A column that a group's row lacks is None there, as in TRL."""
    names = dict.fromkeys(name for call in calls for name in call if name != "prompt_endings")
    return {
        name: [value for call in calls for value in call.get(name, [None] * len(call["completions"]))] for name in names
    }
