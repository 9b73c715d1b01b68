"""Loading environments: classes of the protocol, and classes written for TRL."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gruppo.errors import UsageError
from gruppo.rollout.environments.protocol import Environment
from gruppo.rollout.environments.trl_tools import Tools, schema_of, tools_of
from gruppo.utils.imports import import_attribute


@dataclass(frozen=True)
class Loaded:
    """A class that is ready. `schemas`: of its tools, if it is one of TRL's; `gives_reward`: it has get_reward;
    `digest`: a hash of the file that defines it."""

    make: Callable[[], Environment]
    schemas: list[dict[str, Any]]
    stop: tuple[str, ...]
    gives_reward: bool
    digest: str


def load_environment(name: str, options: Mapping[str, Any]) -> Loaded:
    """The class behind an import path. Raises UsageError where it cannot be imported or made, or is none of the two
    kinds."""
    kind = import_attribute(name, "environment.name")
    try:
        inspect.signature(kind).bind(**options)
    except TypeError as error:
        raise UsageError(f"environment.options = {dict(options)}: {error}; write the arguments of {name}") from None
    except ValueError:
        pass  # no signature: the call tells
    try:
        tried = kind(**options)
    except Exception as error:
        raise UsageError(
            f'environment.name = "{name}": an object of it cannot be made ({type(error).__name__}: {error}); mend it, '
            "or environment.options"
        ) from error
    if not callable(getattr(tried, "reset", None)):
        raise UsageError(
            f'environment.name = "{name}": it has no method reset; write def reset(self, row, seed) and def step(self, '
            "text), or a class of TRL's with reset(self, **row) and tools as methods"
        )
    if not is_ours(tried) and _hears_text(tried):
        raise UsageError(
            f'environment.name = "{name}": it has step(self, text), but its reset is not reset(self, row, seed); write '
            "that, or call the tool something else than step"
        )
    module = sys.modules.get(type(tried).__module__)
    file = getattr(module, "__file__", None)
    digest = hashlib.sha256(Path(file).read_bytes() if file else name.encode()).hexdigest()
    gives = callable(getattr(tried, "get_reward", None))
    if is_ours(tried):
        if odd := [each for each in ("reset", "step") if inspect.iscoroutinefunction(getattr(tried, each))]:
            raise UsageError(
                f'environment.name = "{name}": {odd[0]} is async, which a class of TRL\'s can be; write def {odd[0]}(…)'
            )
        return Loaded(lambda: kind(**options), [], _stop(tried, name), gives, digest)
    schemas = [schema_of(method, tool) for tool, method in tools_of(tried).items()]
    if not schemas:
        raise UsageError(
            f'environment.name = "{name}": it has neither step(self, text) with reset(self, row, seed), nor public '
            "methods that the model could call as tools; write one of them"
        )
    return Loaded(lambda: Tools(kind(**options)), schemas, (), gives, digest)


def is_ours(made: Any) -> bool:
    """Whether an object is of our kind: it has `step`, and `reset` takes a row and a seed and nothing else."""
    parameters = inspect.signature(made.reset).parameters.values()
    return callable(getattr(made, "step", None)) and [each.name for each in parameters] == ["row", "seed"]


def _hears_text(made: Any) -> bool:
    """Whether an object has the `step` of our kind."""
    step = getattr(made, "step", None)
    return callable(step) and list(inspect.signature(step).parameters) == ["text"]


def _stop(made: Any, name: str) -> tuple[str, ...]:
    stop = getattr(made, "stop", ())
    texts = (stop,) if isinstance(stop, str) else stop
    if not isinstance(texts, Sequence) or any(not isinstance(each, str) or not each for each in texts):
        raise UsageError(f'environment.name = "{name}": stop = {stop!r} is no list of texts; write stop = ("\\n",)')
    return tuple(texts)
