"""Engines turn prompts into completions."""

from __future__ import annotations

from gruppo.engines.base import Engine
from gruppo.models.policy import LanguageModel
from gruppo.utils.imports import import_attribute
from gruppo.utils.oom_retry import BatchSizes

# name -> class, called with a policy and the number of completions that it samples at a time
ENGINES = {"native": "gruppo.engines.native.engine:NativeEngine"}


def build_engine(policy: LanguageModel, slots: int, sizes: BatchSizes | None = None, name: str = "native") -> Engine:
    """An engine that samples from the policy, `slots` completions at a time.

    `sizes`: where they are given, sampling that runs out of memory is tried again with fewer slots, and `sizes` keeps
    that for the rest of the run. `name`: of ENGINES, or an import path.
    """
    engine: Engine = import_attribute(ENGINES.get(name, name), "engine")(policy, slots)
    if sizes is None:
        return engine
    from gruppo.engines.resizing import ResizingEngine

    return ResizingEngine(engine, sizes)
