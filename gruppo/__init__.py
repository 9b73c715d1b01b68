"""gruppo trains language models with Group Relative Policy Optimization.

`train` runs a recipe, `evaluate` measures a model, `export` writes a checkpoint as a model folder, `load_result` opens
a run folder, `replay` makes a step of it again, `load_recipe` reads and validates a recipe; `label` and
`train_reward_model` make a reward model; `Callback` and `STOP` are for watching and ending a run. They are imported
when first used, so that `import gruppo` is quick.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gruppo.config.recipe import Recipe as Recipe
    from gruppo.config.recipe import load_recipe as load_recipe
    from gruppo.errors import RunError as RunError
    from gruppo.errors import UsageError as UsageError
    from gruppo.evaluation.sets import evaluate as evaluate
    from gruppo.runs.results import Result as Result
    from gruppo.runs.results import load_result as load_result
    from gruppo.training.api import train as train
    from gruppo.training.callbacks import STOP as STOP
    from gruppo.training.callbacks import Callback as Callback
    from gruppo.training.export import export as export
    from gruppo.training.replay import replay as replay
    from gruppo.training.reward_model_api import label as label
    from gruppo.training.reward_model_api import train_reward_model as train_reward_model

# torch asks for huge pages for large tensors where this is set before its first one: fewer page faults.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# oneDNN keeps what it has compiled for 1,024 shapes, 0.6 MB each, and every micro-batch has shapes of its own.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")

_HOMES = {
    "STOP": "training.callbacks",
    "Callback": "training.callbacks",
    "Recipe": "config.recipe",
    "load_recipe": "config.recipe",
    "RunError": "errors",
    "UsageError": "errors",
    "evaluate": "evaluation.sets",
    "export": "training.export",
    "label": "training.reward_model_api",
    "train_reward_model": "training.reward_model_api",
    "replay": "training.replay",
    "Result": "runs.results",
    "load_result": "runs.results",
    "train": "training.api",
}

__all__ = [
    "STOP",
    "Callback",
    "Recipe",
    "Result",
    "RunError",
    "UsageError",
    "evaluate",
    "export",
    "label",
    "load_recipe",
    "load_result",
    "replay",
    "train",
    "train_reward_model",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"gruppo.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'gruppo' has no attribute {name!r}")
