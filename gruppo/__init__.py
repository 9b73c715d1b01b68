"""gruppo trains language models with Group Relative Policy Optimization.

`train` runs a recipe, `evaluate` measures a model, `load_recipe` reads and validates a recipe. They are imported
when first used, so that `import gruppo` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gruppo.config import Recipe as Recipe
    from gruppo.config import load_recipe as load_recipe
    from gruppo.entry import Result as Result
    from gruppo.entry import train as train
    from gruppo.errors import RunError as RunError
    from gruppo.errors import UsageError as UsageError
    from gruppo.evaluation import evaluate as evaluate

_HOMES = {
    "Recipe": "config",
    "load_recipe": "config",
    "RunError": "errors",
    "UsageError": "errors",
    "evaluate": "evaluation",
    "Result": "entry",
    "train": "entry",
}

__all__ = ["Recipe", "Result", "RunError", "UsageError", "evaluate", "load_recipe", "train"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"gruppo.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'gruppo' has no attribute {name!r}")
