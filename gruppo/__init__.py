"""gruppo trains language models with Group Relative Policy Optimization (GRPO, arXiv 2402.03300).

Train and evaluate:
    train                  run a recipe
    evaluate               measure a model on a task
    load_result            open a run folder
    export                 write a checkpoint as a model folder
    reproduce              recompute a step of a run from its stored rollouts, and compare
    rescore                score the completions of a run with another reward, and compare
    load_recipe            read and validate a recipe
Reward models:
    label                  label completions, and their steps, by a rule
    train_reward_model     train a reward model on labels
For your own code:
    Callback, STOP         watch a run, and stop it (what a callback returns is a StopTraining)
    Environment, Turn      environments of several turns
The recipe in Python, in place of TOML or a mapping:
    Recipe                 the recipe; its tables are the classes Run, Model, Lora, Task, Reward, RewardModel, Audit,
                           Method, Critic, Sampling, Optimizer, Evaluation, Decoding, Benchmark, Cluster,
                           EnvironmentTable and EngineTable

Names are imported when they are first used, so that `import gruppo` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any
from warnings import warn

from gruppo.utils.renamed_modules import install_aliases
from gruppo.utils.torch_settings import configure_torch

if TYPE_CHECKING:
    from gruppo.config.cluster_section import Cluster as Cluster
    from gruppo.config.engine_section import Engine as EngineTable
    from gruppo.config.loading import load_recipe as load_recipe
    from gruppo.config.method_section import Critic as Critic
    from gruppo.config.method_section import Method as Method
    from gruppo.config.recipe import Recipe as Recipe
    from gruppo.config.sections import Audit as Audit
    from gruppo.config.sections import Benchmark as Benchmark
    from gruppo.config.sections import Decoding as Decoding
    from gruppo.config.sections import Environment as EnvironmentTable
    from gruppo.config.sections import Evaluation as Evaluation
    from gruppo.config.sections import Lora as Lora
    from gruppo.config.sections import Model as Model
    from gruppo.config.sections import Optimizer as Optimizer
    from gruppo.config.sections import Reward as Reward
    from gruppo.config.sections import RewardModel as RewardModel
    from gruppo.config.sections import Run as Run
    from gruppo.config.sections import Sampling as Sampling
    from gruppo.config.sections import Task as Task
    from gruppo.errors import RunError as RunError
    from gruppo.errors import UsageError as UsageError
    from gruppo.evaluation.runner import evaluate as evaluate
    from gruppo.rollout.environments.protocol import Environment as Environment
    from gruppo.rollout.environments.protocol import Turn as Turn
    from gruppo.rollout.rescore import rescore as rescore
    from gruppo.runs.results import Result as Result
    from gruppo.runs.results import load_result as load_result
    from gruppo.training.api import train as train
    from gruppo.training.callbacks import STOP as STOP
    from gruppo.training.callbacks import Callback as Callback
    from gruppo.training.callbacks import StopTraining as StopTraining
    from gruppo.training.export import export as export
    from gruppo.training.reproduce import reproduce as reproduce
    from gruppo.training.reward_model_api import label as label
    from gruppo.training.reward_model_api import train_reward_model as train_reward_model

_TABLES = ["Run", "Model", "Lora", "Task", "Reward", "RewardModel", "Audit", "Sampling", "Optimizer", "Evaluation",
           "Decoding", "Benchmark"]  # fmt: skip
_HOMES = {
    **dict.fromkeys(_TABLES, "config.sections"),
    "Cluster": "config.cluster_section",
    "Critic": "config.method_section",
    "EngineTable": "config.engine_section",
    "EnvironmentTable": "config.sections",
    "Method": "config.method_section",
    "STOP": "training.callbacks",
    "Callback": "training.callbacks",
    "StopTraining": "training.callbacks",
    "Environment": "rollout.environments.protocol",
    "Recipe": "config.recipe",
    "Result": "runs.results",
    "RunError": "errors",
    "Turn": "rollout.environments.protocol",
    "UsageError": "errors",
    "evaluate": "evaluation.runner",
    "export": "training.export",
    "label": "training.reward_model_api",
    "load_recipe": "config.loading",
    "load_result": "runs.results",
    "reproduce": "training.reproduce",
    "rescore": "rollout.rescore",
    "train": "training.api",
    "train_reward_model": "training.reward_model_api",
}

__all__ = [  # noqa: RUF022  in the order of the text above
    "train", "evaluate", "load_result", "export", "reproduce", "rescore", "load_recipe", "label", "train_reward_model",
    "Callback", "STOP", "StopTraining", "Environment", "Turn", "Recipe", "Run", "Model", "Lora", "Task", "Reward",
    "RewardModel", "Audit", "Method", "Critic", "Sampling", "Optimizer", "Evaluation", "Decoding", "Benchmark",
    "Cluster", "EnvironmentTable", "EngineTable",
    "Result", "RunError", "UsageError",
]  # fmt: skip
__version__ = "0.1.0"

configure_torch()
install_aliases()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        # Environment and engine are also the names of interfaces; the tables of the recipe have another name here.
        return getattr(import_module(f"gruppo.{_HOMES[name]}"), name.removesuffix("Table"))
    if name == "replay":
        warn("gruppo.replay is now gruppo.reproduce; write that", FutureWarning, stacklevel=2)
        return import_module("gruppo.training.reproduce").reproduce
    raise AttributeError(f"module 'gruppo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__", "__doc__", "__file__", "__name__", "__path__"})
