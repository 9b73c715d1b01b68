"""From the name or the pickle of a reward to something that can be called with a group, in the reward's process."""

from __future__ import annotations

import hashlib
import inspect
import pickle
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gruppo.errors import UsageError, nearest
from gruppo.rewards import RewardFunction, split_prefix
from gruppo.rewards.interop import ADAPTERS, Adapted
from gruppo.utils.imports import import_attribute

OFFERED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


@dataclass(frozen=True)
class Loaded:
    """A reward that is ready. `options` are passed to each call; `digest` is a hash of its code."""

    function: RewardFunction
    options: Mapping[str, Any]
    digest: str


def load_reward(source: str | bytes, name: str, options: Mapping[str, Any], columns: Sequence[str]) -> Loaded:
    """Make a reward of an import path, which may have an adapter's prefix, or of a pickled function.

    A class is instantiated with its options, once; a function gets them with each call. Raises UsageError where the
    code cannot be imported, does not take the options, or cannot be called with what a group offers.
    """
    if isinstance(source, bytes):
        found, prefix = pickle.loads(source), ""
        name = getattr(found, "__qualname__", type(found).__name__)
    else:
        prefix, path = split_prefix(source)
        found = import_attribute(path, "reward.functions")
    digest = _digest(source, found)
    if isinstance(found, type):
        found, options = _instance(found, name, options), {}
    if prefix:
        adapter = ADAPTERS[prefix]
        check_options(found, name, options, adapter.passed)
        found, options = adapter.adapt(partial(found, **options) if options else found), {}
    else:
        check_options(found, name, options, {*OFFERED, *columns})
    check_signature(found, name, [*columns, *options])
    return Loaded(found, options, digest)


def check_options(function: Any, name: str, options: Mapping[str, Any], given: Iterable[str]) -> None:
    """Raise UsageError unless each option is a named parameter that is not among those `given` by the run.

    **kwargs take the columns of rows, so they are no sign that a function knows an option.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return
    given = set(given)
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in given]
    for option, value in options.items():
        if option in given:
            raise UsageError(
                f"{_field(name)}.{option} = {value!r}: the run passes {option} itself; take another name for the option"
            )
        if option not in known:
            fix = nearest(option, known) if known else "; it has no options: remove it"
            raise UsageError(f"{_field(name)}.{option} = {value!r}: unknown option{fix}")


def check_signature(function: RewardFunction, name: str, columns: Sequence[str]) -> None:
    """Raise UsageError unless the function can be called by keyword with what a group offers."""
    offered = {*OFFERED, *columns}
    any_of = getattr(function, "any_of", ())  # built-in rewards say by this which columns can hold their reference
    if any_of and not offered & set(any_of):
        raise UsageError(
            f'reward.functions = "{name}": it needs the column {" or ".join(any_of)} in every row (offered: '
            f"{', '.join(sorted(columns)) or 'none'}); add it, or rename one by task.columns"
        )
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return  # a builtin without a signature: the first call will tell
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
                f'reward.functions = "{name}": it needs "{parameter.name}", which no row offers (offered: '
                f"{', '.join(sorted(offered))}); write def reward(prompts, completions, **columns), add that column, "
                f"or write {_field(name)}.{parameter.name}"
            )
    if not takes_all and not {p.name for p in parameters} & {"completions", "completion_ids"}:
        raise UsageError(
            f'reward.functions = "{name}": it takes no completions; write '
            "def reward(prompts, completions, **columns) -> list of numbers"
        )


def _instance(kind: type, name: str, options: Mapping[str, Any]) -> RewardFunction:
    """The class's object, made with the options."""
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
        made: RewardFunction = kind(**options)
    except UsageError as error:
        raise UsageError(f"{_field(name)}.{error}") from None
    except Exception as error:
        raise UsageError(
            f"{_field(name)} = {dict(options)}: {kind.__name__} fails when it is made of them "
            f"({type(error).__name__}: {error}); mend the class or its options"
        ) from error
    if not callable(made):
        raise UsageError(
            f'reward.functions = "{name}": objects of the class {kind.__name__} cannot be called; write '
            "def __call__(self, prompts, completions, **columns)"
        )
    return made


def _field(name: str) -> str:
    """Where a recipe has the options of that function."""
    return f"reward.options.{name}" if re.fullmatch(r"[\w-]+", name) else f'reward.options."{name}"'


def _digest(source: str | bytes, function: Any) -> str:
    """SHA-256 of the file that defines the function, or of its pickle where it came as one."""
    if isinstance(function, Adapted):
        function = function.function
    if isinstance(source, bytes):
        code = getattr(function, "__code__", None)
        content = source if code is None else code.co_code + repr(code.co_names).encode()
    else:
        module = sys.modules.get(getattr(function, "__module__", None) or type(function).__module__)
        file = getattr(module, "__file__", None)
        content = Path(file).read_bytes() if file else source.encode()
    return hashlib.sha256(content).hexdigest()
