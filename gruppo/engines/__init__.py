"""Engines: samplers that turn prompts into completions."""

from __future__ import annotations

from typing import Any

import torch

from gruppo.actors.needs import check_ray
from gruppo.config.engine_section import ENGINES
from gruppo.config.engine_section import Engine as EngineTable
from gruppo.config.recipe import Recipe
from gruppo.engines.base import Engine
from gruppo.errors import UsageError
from gruppo.models.policy import LanguageModel
from gruppo.utils.imports import import_attribute
from gruppo.utils.oom_retry import BatchSizes

NATIVE = EngineTable()
METHODS = "stream", "load_weights", "generate", "sleep", "close"
OWN_METHODS = METHODS[:2]  # `Engine` has the others


def check_engine(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UsageError if the recipe's engine cannot be imported, is no engine, or cannot do what the recipe asks
    for."""
    engine_class = _find(recipe.engine)
    check = getattr(engine_class, "check", None)
    if check is not None:
        check(recipe, device, dtype)
    if recipe.cluster is not None and recipe.cluster.engines:
        field = f"cluster.engines = {recipe.cluster.engines}"
        check_ray(recipe.cluster, device, field, "write engines = 0")
    elif recipe.cluster is not None and recipe.cluster.reward_hosts:
        field = f"cluster.reward_hosts = {recipe.cluster.reward_hosts}"
        check_ray(recipe.cluster, torch.device("cpu"), field, "write reward_hosts = 0")  # which need no device
    if recipe.lag and not (recipe.cluster and recipe.cluster.engines):
        _check_lag(recipe, engine_class, device)


def _check_lag(recipe: Recipe, engine_class: type, device: torch.device) -> None:
    """Raise UsageError if the engine needs the device or the weights of the policy while it trains."""
    lag, settings = f"cluster.lag = {recipe.lag}", recipe.engine
    if settings.has_own_process and device.type == "cuda" and settings.device is None:
        raise UsageError(
            f'{lag}: engine.name = "{settings.name}" shares the device of the trained model, and cannot sample while '
            "it trains; write engine.device, the number of another device, or lag = 0"
        )
    if settings.name != "native" and not getattr(engine_class, "copies_weights", True):
        raise UsageError(
            f'{lag}: engine.name = "{settings.name}" samples with the trained model itself (copies_weights = False), '
            "which changes meanwhile; use an engine that copies the weights, or write lag = 0"
        )


def build_engine(
    policy: LanguageModel,
    slots: int,
    sizes: BatchSizes | None = None,
    settings: EngineTable = NATIVE,
    length: int | None = None,
) -> Engine:
    """Build an engine that samples from the policy, with `slots` concurrent completions.

    `sizes`: if given, sampling that runs out of memory is retried with fewer slots, and `sizes` keeps the smaller
    number for the rest of the run. `settings`: the recipe's [engine]. `length`: the longest sequence, a prompt with its
    completion, in tokens; by default the context of the policy. The caller closes the engine.

    An engine that keeps weights of its own gets the policy's, and is probed now and after each load.
    """
    from gruppo.engines.probe import ProbedEngine, probed_length

    engine = start_engine(policy, slots, probed_length(policy, length), settings)
    if getattr(engine, "copies_weights", True):
        engine = ProbedEngine(engine, policy, settings.name)
        try:
            engine.load_weights(policy.weight_source(), 0)
        except BaseException:
            engine.close()
            raise
    if sizes is None:
        return engine
    from gruppo.engines.resizing import ResizingEngine

    return ResizingEngine(engine, sizes)


def start_engine(policy: LanguageModel, slots: int, length: int, settings: EngineTable, devices: int = 1) -> Engine:
    """The engine alone, as its class makes it. An engine that keeps weights of its own has none yet.

    `length`: the longest sequence, in tokens; `devices`: over how many devices vLLM splits the model. Both are for
    engines with a process of their own.
    """
    engine_class = _find(settings)
    if settings.has_own_process:
        return engine_class(policy, slots, length, settings, devices)  # type: ignore[no-any-return]
    return engine_class(policy, slots)  # type: ignore[no-any-return]


def _find(settings: EngineTable) -> Any:
    found = import_attribute(ENGINES.get(settings.name, settings.name), "engine.name")
    missing = [name for name in METHODS if getattr(found, name, None) is None]
    missing += [name for name in OWN_METHODS if getattr(found, name, None) is getattr(Engine, name)]
    if missing:
        raise UsageError(
            f'engine.name = "{settings.name}": has no method {" and no method ".join(missing)}; write a class with '
            f"{', '.join(METHODS[:-1])} and {METHODS[-1]}: a subclass of gruppo.engines.base.Engine needs "
            f"{' and '.join(OWN_METHODS)} only"
        )
    return found
