"""Aliases for module names up to revision 790d39a, kept for one more version.

Importing an old name gives a FutureWarning and the contents of the new modules. Import paths in recipes may use old
names too.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# old module -> the new modules with its contents
MODULES: dict[str, tuple[str, ...]] = {
    "gruppo.callbacks": ("gruppo.training.callbacks",),
    "gruppo.entry": ("gruppo.training.api",),
    "gruppo.exporting": ("gruppo.training.export",),
    "gruppo.figures": (
        "gruppo.runs.eval_metrics", "gruppo.evaluation.metrics", "gruppo.evaluation.formatting",
        "gruppo.evaluation.plots",
    ),
    "gruppo.interruption": ("gruppo.utils.signals",),
    "gruppo.labelling": ("gruppo.training.reward_model_api",),
    "gruppo.maths": ("gruppo.algorithms",),
    "gruppo.maths.advantages": ("gruppo.algorithms.advantages",),
    "gruppo.maths.logprobs": ("gruppo.models.logprobs", "gruppo.algorithms.kl"),
    "gruppo.maths.losses": ("gruppo.algorithms.losses", "gruppo.algorithms.aggregation"),
    "gruppo.replaying": ("gruppo.training.reproduce",),
    "gruppo.reporting": ("gruppo.utils.progress",),
    "gruppo.results": ("gruppo.runs.results",),
    "gruppo.rewards.adapters": ("gruppo.rewards.interop",),
    "gruppo.rewards.failures": ("gruppo.rollout.reward_failures",),
    "gruppo.rewards.formats": ("gruppo.rewards.format",),
    "gruppo.rewards.gym": ("gruppo.rewards.reasoning_gym",),
    "gruppo.rewards.lengths": ("gruppo.rewards.length",),
    "gruppo.rewards.pool": ("gruppo.rollout.workers.rewards",),
    "gruppo.rewards.rules": ("gruppo.rewards.answers",),
    "gruppo.stats": ("gruppo.utils.stats",),
    "gruppo.steps": ("gruppo.rewards.steps",),
    "gruppo.tasks": ("gruppo.data.loading", "gruppo.data.tokenization"),
    "gruppo.tasks.answers": (
        "gruppo.rewards.grading.graders", "gruppo.rewards.grading.last_number", "gruppo.rewards.grading.math_verify",
    ),
    "gruppo.tasks.arithmetic": ("gruppo.data.arithmetic",),
    "gruppo.tasks.benchmarks": ("gruppo.data.benchmarks", "gruppo.data.benchmark_table", "gruppo.data.benchmark_files"),
    "gruppo.tasks.choices": ("gruppo.rewards.grading.choices", "gruppo.data.options"),
    "gruppo.tasks.extraction": ("gruppo.rewards.grading.extraction", "gruppo.data.boxes"),
    "gruppo.tasks.files": ("gruppo.data.files",),
    "gruppo.tasks.formulas": ("gruppo.rewards.grading.formulas",),
    "gruppo.tasks.grading": ("gruppo.rewards.grading.verdicts",),
    "gruppo.tasks.gym": ("gruppo.data.reasoning_gym",),
    "gruppo.tasks.numbers": ("gruppo.rewards.grading.numbers", "gruppo.rewards.grading.quantities"),
    "gruppo.tools": ("gruppo.rollout.sandbox",),
    "gruppo.tools.environment": (
        "gruppo.rollout.environments.protocol", "gruppo.rollout.environments.loading",
        "gruppo.rollout.environments.trl_tools",
    ),
    "gruppo.tools.guess": ("gruppo.rollout.environments.guess_number",),
    "gruppo.tools.pool": ("gruppo.rollout.sandbox.pool",),
    "gruppo.tools.sandbox": ("gruppo.rollout.sandbox.bubblewrap",),
}  # fmt: skip

# old name -> new name, in the modules above
NAMES = {
    "Ending": "StopTraining",
    "Mathematics": "MathVerify",
    "Reporter": "Progress",
    "Silent": "NullProgress",
    "label_loss": "reward_model_loss",
    "pair_loss": "dpo_loss",
    "repeat": "rerun_reward",
    "replay": "reproduce",
    "told": "format_results",
    "told_difference": "format_difference",
}


def advice(name: str) -> str | None:
    """The replacement of an old module name or import path, as a message; None if the name is not an old one."""
    module, colon, attribute = name.partition(":")
    if module not in MODULES:
        return None
    names = [f"{new}{colon}{NAMES.get(attribute, attribute)}" for new in MODULES[module]]
    return f"{name} has moved to {' or '.join(names)}; write the new name, as the next version removes the old one"


def install_aliases() -> None:
    """Make the old names importable."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in MODULES:
            return None
        return ModuleSpec(name, _Loader(), is_package=any(other.startswith(f"{name}.") for other in MODULES))


class _Loader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        warnings.warn(str(advice(spec.name)), FutureWarning, stacklevel=2)
        return None

    def exec_module(self, module: ModuleType) -> None:
        new_modules = MODULES[module.__name__]

        def find(name: str) -> Any:
            for new in new_modules:
                target = importlib.import_module(new)
                for candidate in (name, NAMES.get(name, name)):
                    if hasattr(target, candidate):
                        return getattr(target, candidate)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = find  # type: ignore[method-assign]
