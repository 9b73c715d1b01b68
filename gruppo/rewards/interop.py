"""Adapters for reward functions that were written for other trainers.

    verl          compute_score(data_source, solution_str, ground_truth, extra_info) -> float | dict with "score"
    verifiers     func(prompt, completion, answer, state, task, info) -> float

Both score one completion per call, sync or async, and receive only the arguments that they name. If a call raises,
only its completion is excluded. In a recipe: "verl:file.py:compute_score", "verifiers:package.module:func".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from gruppo.data.messages import parsed
from gruppo.errors import UsageError
from gruppo.rewards import text_of

Function = Callable[..., Any]


@dataclass(frozen=True)
class Adapter:
    """Calling convention of another trainer's reward functions.

    `arguments`: maps (prompt, completion, row) to keyword arguments. `passed`: names of the keyword arguments.
    `any_of`: argument -> the columns of which rows need at least one.
    """

    arguments: Callable[[Any, Any, Mapping[str, Any]], dict[str, Any]]
    passed: tuple[str, ...]
    any_of: Mapping[str, tuple[str, ...]]

    def adapt(self, function: Function) -> Adapted:
        """Wrap `function` as a reward. Raises UsageError if it requires an argument that is not passed."""
        return Adapted(self, function)


class Adapted:
    """A per-completion function as a reward for a group.

    Raises UsageError if the function requires an argument that the adapter does not pass.
    """

    def __init__(self, adapter: Adapter, function: Function) -> None:
        self.adapter, self.function = adapter, function
        original = getattr(function, "func", function)  # a partial has no __name__
        self.__name__ = str(getattr(original, "__name__", type(original).__name__))
        parameters = inspect.signature(function).parameters.values()
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self.taken = [name for name in adapter.passed if takes_all or name in named]
        for parameter in parameters:
            needed = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL
            if needed and parameter.kind is not parameter.VAR_KEYWORD and parameter.name not in self.taken:
                raise UsageError(
                    f'reward.functions: {self.__name__} needs "{parameter.name}", which this adapter does not pass '
                    f"(passed by keyword: {', '.join(adapter.passed)}); set it as an option, or give it a default"
                )
        self.any_of = tuple(column for name, columns in adapter.any_of.items() if name in named for column in columns)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        log_extra: Callable[[str, Sequence[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[Any] | Coroutine[Any, Any, list[Any]]:
        """Return one value per completion: the score, None if the function returns None, or the exception it raises."""
        rows = [{name: values[number] for name, values in columns.items() if _is_column(values, len(completions))}
                for number in range(len(completions))]  # fmt: skip
        outcomes = [self._call(*sample) for sample in zip(prompts, completions, rows, strict=True)]
        if any(inspect.isawaitable(outcome) for outcome in outcomes):
            return self._wait(outcomes, log_extra, log_metric)
        return _scores(outcomes, log_extra, log_metric)

    def _call(self, prompt: Any, completion: Any, row: Mapping[str, Any]) -> Any:
        try:
            arguments = self.adapter.arguments(prompt, completion, row)
            return self.function(**{name: arguments[name] for name in self.taken if name in arguments})
        except Exception as error:  # noqa: BLE001  becomes the failure of this completion
            return error

    async def _wait(self, outcomes: Sequence[Any], *logs: Any) -> list[Any]:
        import asyncio  # a reward's process starts without it

        async def outcome_of(outcome: Any) -> Any:
            return await outcome if inspect.isawaitable(outcome) else outcome

        return _scores(await asyncio.gather(*map(outcome_of, outcomes), return_exceptions=True), *logs)


def verl(function: Function) -> Adapted:
    """Wrap verl's `compute_score` as a reward.

    `data_source` and `extra_info` come from the columns with these names ("" and {} if missing). `ground_truth` comes
    from the column ground_truth, else reward_model["ground_truth"], else answer. `extra_info` and `reward_model` may be
    JSON text. If the function returns a dict, "score" is the reward, the other numbers are also logged as metrics, and
    all other entries go to the rollout tables. Raises UsageError if the function requires any other argument.
    """
    return _VERL.adapt(function)


def verifiers(function: Function) -> Adapted:
    """Wrap a function from verifiers' classic rubrics as a reward.

    `answer`, `task` and `info`, which may be JSON text, come from the columns with these names ("", "default" and {} if
    missing). `state` is a new dict with these, the prompt, the completion, its text in `responses`, and turn = 1.
    Raises UsageError if the function requires any other argument.
    """
    return _VERIFIERS.adapt(function)


def _is_column(values: Any, size: int) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str | bytes) and len(values) == size


def verl_arguments(_: Any, completion: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of verl's `compute_score` for a completion; without `ground_truth` if the row has none."""
    model = _object(row.get("reward_model"))
    nested = model if isinstance(model, Mapping) else {}
    truths = [place[name] for place, name in ((row, "ground_truth"), (nested, "ground_truth"), (row, "answer"))
              if name in place]  # fmt: skip
    return {
        "data_source": row.get("data_source", ""),
        "solution_str": text_of(completion),
        "extra_info": _object(row.get("extra_info", {})),
        **({"ground_truth": truths[0]} if truths else {}),
    }


def _verifiers_arguments(prompt: Any, completion: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    shared = {
        "prompt": prompt,
        "completion": completion,
        "answer": row.get("answer", ""),
        "task": row.get("task", "default"),
        "info": _object(row.get("info", {})),
    }
    return {**shared, "state": {**shared, "responses": [text_of(completion)], "turn": 1}}


def _object(value: Any) -> Any:
    """The object that a JSON text holds; any other value unchanged."""
    found = parsed(value, dict) if isinstance(value, str) else None
    return value if found is None else found


def log_entries(
    entries: Sequence[Mapping[Any, Any]],
    log_extra: Callable[[str, Sequence[Any]], None] | None,
    log_metric: Callable[[str, float], None] | None,
) -> None:
    """Log what came with the scores of a group: every entry as a column, numbers as metrics too."""
    for name in dict.fromkeys(name for one in entries for name in one):
        column = [one.get(name) for one in entries]
        if log_extra is not None:
            log_extra(str(name), column)
        for value in column:
            if log_metric is not None and isinstance(value, Real):
                log_metric(str(name), float(value))


def _scores(
    outcomes: Sequence[Any],
    log_extra: Callable[[str, Sequence[Any]], None] | None,
    log_metric: Callable[[str, float], None] | None,
) -> list[Any]:
    """Return the scores; log the other entries of returned dicts."""
    extras = [outcome if isinstance(outcome, Mapping) else {} for outcome in outcomes]
    log_entries(
        [{name: value for name, value in entries.items() if name != "score"} for entries in extras],
        log_extra,
        log_metric,
    )
    missing = ValueError('returned a dict without "score"')
    return [outcome.get("score", missing) if isinstance(outcome, Mapping) else outcome for outcome in outcomes]


_VERL = Adapter(
    verl_arguments,
    ("data_source", "solution_str", "ground_truth", "extra_info"),
    {"ground_truth": ("ground_truth", "reward_model", "answer")},
)
_VERIFIERS = Adapter(_verifiers_arguments, ("prompt", "completion", "answer", "state", "task", "info"), {})
ADAPTERS = {"verl": _VERL, "verifiers": _VERIFIERS}
