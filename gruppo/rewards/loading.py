"""Load a reward by name or from a pickle and check that a group can call it; runs in the reward's process."""

from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from gruppo.config.labels import options_name
from gruppo.errors import UsageError, nearest
from gruppo.rewards import RewardFunction, RewardRun, split_prefix
from gruppo.rewards.identity import code_digest
from gruppo.rewards.interop import ADAPTERS
from gruppo.utils.imports import import_attribute

OFFERED = ("prompts", "prompt_endings", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")

_SECRET = re.compile(r"key|token|secret|password", re.IGNORECASE)  # in names of options whose values are not shown


@dataclass(frozen=True)
class Loaded:
    """A reward that is ready to call. `options`: keyword arguments of every call; `digest`: SHA-256 of its code."""

    function: RewardFunction
    options: Mapping[str, Any]
    digest: str


def load_reward(
    source: str | bytes,
    name: str,
    options: Mapping[str, Any],
    columns: Sequence[str],
    partial_columns: Mapping[str, str] | None = None,
    run: RewardRun | None = None,
) -> Loaded:
    """Load a reward from an import path, which may have an adapter's prefix, or from a pickled function.

    `columns`: names of the columns that all rows have. `partial_columns`: those that only some have, and how many, in
    words. `run`: passed to an object's method `use_run`, if it has one. A class is instantiated once, with its options;
    a function receives them in every call. Raises UsageError if the code cannot be imported, does not accept the
    options, cannot work within the limits of the run, or cannot be called with
    the arguments that a group offers.
    """
    if isinstance(source, bytes):
        function, prefix = pickle.loads(source), ""
        name = getattr(function, "__qualname__", type(function).__name__)
    else:
        prefix, path = split_prefix(source)
        function = import_attribute(path, "reward.functions")
    digest = code_digest(source, function)
    if isinstance(function, type):
        function, options = _instance(function, name, options), {}
        if run is not None and hasattr(function, "use_run"):
            with _naming_field(name):
                function.use_run(run)
    if prefix:
        adapter = ADAPTERS[prefix]
        check_options(function, name, options, adapter.passed)
        function, options = adapter.adapt(partial(function, **options) if options else function), {}
    else:
        check_options(function, name, options, {*OFFERED, *columns})
    check_signature(function, name, [*columns, *options], partial_columns or {})
    return Loaded(function, options, digest)


def check_options(function: Any, name: str, options: Mapping[str, Any], given: Iterable[str]) -> None:
    """Raise UsageError unless every option is a named parameter that the run does not pass itself (`given`).

    **kwargs do not count as accepting an option, because they receive the columns of rows. A callable without a
    signature is not checked.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return
    given = set(given)
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in given]
    for option, value in options.items():
        if option in given:
            raise UsageError(f"{_field(name)}.{option} = {value!r}: the run passes {option} itself; rename the option")
        if option not in known:
            fix = nearest(option, known) if known else "; it has no options: remove it"
            shown = "…" if _SECRET.search(option) else repr(value)
            raise UsageError(f"{_field(name)}.{option} = {shown}: unknown option{fix}")


def check_signature(
    function: RewardFunction, name: str, columns: Sequence[str], partial_columns: Mapping[str, str]
) -> None:
    """Raise UsageError unless the function can be called by keyword with the arguments that a group offers.

    `partial_columns`: see `load_reward`. A callable without a signature is not checked.
    """
    offered = {*OFFERED, *columns}
    any_of = getattr(function, "any_of", ())  # columns of which the reward needs at least one
    if any_of and not offered & set(any_of):
        raise UsageError(
            f'reward.functions = "{name}": needs the column {" or ".join(any_of)} in every row (offered: '
            f"{', '.join(sorted(columns)) or 'none'}){_partly(any_of, partial_columns)}; add it, or rename one with "
            "task.columns"
        )
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return  # a built-in without a signature: a mismatch shows in the first call
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    for parameter in parameters:
        required = parameter.default is parameter.empty
        if required and parameter.kind is parameter.POSITIONAL_ONLY:
            raise UsageError(
                f'reward.functions = "{name}": {parameter.name} is positional-only; rewards are called by '
                "keyword: remove the /"
            )
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if required and named and parameter.name not in offered:
            raise UsageError(
                f'reward.functions = "{name}": needs the argument "{parameter.name}", which is not available (offered: '
                f"{', '.join(sorted(offered))}){_partly([parameter.name], partial_columns)}; write def reward(prompts, "
                "completions, **columns), add that column to every row, give the argument a default, "
                f"or set {_field(name)}.{parameter.name}"
            )
    if not takes_all and not {p.name for p in parameters} & {"completions", "completion_ids"}:
        raise UsageError(
            f'reward.functions = "{name}": takes no completions; write '
            "def reward(prompts, completions, **columns) -> list of numbers"
        )


def parameters_of(function: RewardFunction) -> list[str]:
    """The names of a function's parameters; none for a callable without a signature."""
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []


def _partly(names: Iterable[str], partial_columns: Mapping[str, str]) -> str:
    return "".join(f"; {name}: {partial_columns[name]}" for name in names if name in partial_columns)


def _instance(kind: type, name: str, options: Mapping[str, Any]) -> RewardFunction:
    """Instantiate the class with the options and check that the instance can be called."""
    check_options(kind, name, options, ())
    try:
        parameters = inspect.signature(kind).parameters.values()
    except (TypeError, ValueError):
        parameters = {}.values()
    for parameter in parameters:
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.default is parameter.empty and parameter.name not in options:
            option = f"{_field(name)}.{parameter.name}"
            raise UsageError(f"{option}: missing; {kind.__name__} needs it: write {option} = …")
    try:
        with _naming_field(name):
            reward: RewardFunction = kind(**options)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"{_field(name)} = {dict(options)}: {kind.__name__} fails when it is created with them "
            f"({type(error).__name__}: {error}); fix the class or its options"
        ) from error
    if not callable(reward):
        raise UsageError(
            f'reward.functions = "{name}": instances of the class {kind.__name__} cannot be called; write '
            "def __call__(self, prompts, completions, **columns)"
        )
    return reward


@contextmanager
def _naming_field(name: str) -> Iterator[None]:
    """Put the recipe field before the option that a UsageError of the block begins with."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{_field(name)}.{error}") from None


def _field(name: str) -> str:
    """The recipe field that holds the options of this function."""
    name = options_name(name)
    return f"reward.options.{name}" if re.fullmatch(r"[\w-]+", name) else f'reward.options."{name}"'
