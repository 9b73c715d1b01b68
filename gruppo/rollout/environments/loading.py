"""Loading of environments: classes that follow gruppo's protocol, and classes written for TRL."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gruppo.errors import UsageError
from gruppo.rollout.environments.protocol import Environment
from gruppo.rollout.environments.trl_tools import Tools, schema_of, tools_of
from gruppo.utils.imports import file_of, import_attribute


@dataclass(frozen=True)
class Loaded:
    """A loaded environment class. `schemas`: schemas of its tools, if it was written for TRL; `gives_reward`: it has
    get_reward; `digest`: hash of the file that defines it."""

    make: Callable[[], Environment]
    schemas: list[dict[str, Any]]
    stop: tuple[str, ...]
    gives_reward: bool
    digest: str


def load_environment(name: str, options: Mapping[str, Any]) -> Loaded:
    """Load the class behind an import path. Raises UsageError if it cannot be imported or instantiated, or is of
    neither kind."""
    kind = import_attribute(name, "environment.name")
    try:
        inspect.signature(kind).bind(**options)
    except TypeError as error:
        raise UsageError(f"environment.options = {dict(options)}: {error}; write the arguments of {name}") from None
    except ValueError:
        pass  # no signature: the call below shows whether the options fit
    try:
        instance = kind(**options)
    except Exception as error:
        raise UsageError(
            f'environment.name = "{name}": cannot be instantiated ({type(error).__name__}: {error}); fix the '
            "class or environment.options"
        ) from error
    if not callable(getattr(instance, "reset", None)):
        raise UsageError(
            f'environment.name = "{name}": it has no method reset; write def reset(self, row, seed) and def step(self, '
            "text), or a class for TRL with reset(self, **row) and tools as methods"
        )
    if not is_ours(instance) and _has_step(instance):
        raise UsageError(
            f'environment.name = "{name}": it has step(self, text), but its reset is not reset(self, row, seed); write '
            "that, or give the tool another name than step"
        )
    module = sys.modules.get(type(instance).__module__)
    digest = hashlib.sha256(file_of(module) or name.encode()).hexdigest()
    gives_reward = callable(getattr(instance, "get_reward", None))
    if is_ours(instance):
        if asynchronous := [one for one in ("reset", "step") if inspect.iscoroutinefunction(getattr(instance, one))]:
            method = asynchronous[0]
            raise UsageError(
                f'environment.name = "{name}": {method} is async, which only methods of a class for TRL can be; write '
                f"def {method}(…)"
            )
        return Loaded(lambda: kind(**options), [], _stop(instance, name), gives_reward, digest)
    schemas = [schema_of(method, tool) for tool, method in tools_of(instance).items()]
    if not schemas:
        raise UsageError(
            f'environment.name = "{name}": it has neither step(self, text) with reset(self, row, seed), nor public '
            "methods that the model could call as tools; write one of them"
        )
    return Loaded(lambda: Tools(kind(**options)), schemas, (), gives_reward, digest)


def is_ours(instance: Any) -> bool:
    """Whether an object follows gruppo's protocol: it has `step`, and `reset` takes exactly a row and a seed."""
    parameters = inspect.signature(instance.reset).parameters
    return callable(getattr(instance, "step", None)) and list(parameters) == ["row", "seed"]


def _has_step(instance: Any) -> bool:
    """Whether an object has the `step` of gruppo's protocol."""
    step = getattr(instance, "step", None)
    return callable(step) and list(inspect.signature(step).parameters) == ["text"]


def _stop(instance: Any, name: str) -> tuple[str, ...]:
    stop = getattr(instance, "stop", ())
    texts = (stop,) if isinstance(stop, str) else stop
    if not isinstance(texts, Sequence) or any(not isinstance(text, str) or not text for text in texts):
        raise UsageError(
            f'environment.name = "{name}": stop = {stop!r} is not a list of strings; write stop = ("\\n",)'
        )
    return tuple(texts)
