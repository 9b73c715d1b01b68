"""Engines: samplers that turn prompts into completions."""

from __future__ import annotations

from gruppo.engines.base import Engine
from gruppo.models.policy import LanguageModel
from gruppo.utils.imports import import_attribute
from gruppo.utils.oom_retry import BatchSizes

# name -> import path of a class that is called with a policy and the number of slots (concurrent completions)
ENGINES = {"native": "gruppo.engines.native.engine:NativeEngine"}


def build_engine(policy: LanguageModel, slots: int, sizes: BatchSizes | None = None, name: str = "native") -> Engine:
    """Build an engine that samples from the policy, with `slots` concurrent completions.

    `sizes`: if given, sampling that runs out of memory is retried with fewer slots, and `sizes` keeps the smaller
    number for the rest of the run. `name`: a key of ENGINES or an import path.
    """
    engine: Engine = import_attribute(ENGINES.get(name, name), "engine")(policy, slots)
    if sizes is None:
        return engine
    from gruppo.engines.resizing import ResizingEngine

    return ResizingEngine(engine, sizes)
