"""TRL's trainers on gruppo: a script runs with `from gruppo.trl import …` in place of `from trl import …`.

    GRPOTrainer, GRPOConfig    RLOOTrainer, RLOOConfig    DPOTrainer, DPOConfig    SFTTrainer, SFTConfig
    TrlParser, ScriptArguments, ModelConfig, DatasetMixtureConfig, get_dataset, get_peft_config,
    get_quantization_config, get_kbit_device_map          for command-line scripts
    generate_rollout_completions                          in place of trl.experimental.openenv's, for a rollout_func
    gruppo.trl.rewards                                    in place of trl.rewards

TRL itself need not be installed. What becomes of each argument, and what differs: docs/coming_from_trl.md.
Names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gruppo.trl.configs import DPOConfig as DPOConfig
    from gruppo.trl.configs import GRPOConfig as GRPOConfig
    from gruppo.trl.configs import RLOOConfig as RLOOConfig
    from gruppo.trl.configs import SFTConfig as SFTConfig
    from gruppo.trl.rollouts import generate_rollout_completions as generate_rollout_completions
    from gruppo.trl.scripts import DatasetMixtureConfig as DatasetMixtureConfig
    from gruppo.trl.scripts import ModelConfig as ModelConfig
    from gruppo.trl.scripts import ScriptArguments as ScriptArguments
    from gruppo.trl.scripts import TrlParser as TrlParser
    from gruppo.trl.scripts import get_dataset as get_dataset
    from gruppo.trl.scripts import get_kbit_device_map as get_kbit_device_map
    from gruppo.trl.scripts import get_peft_config as get_peft_config
    from gruppo.trl.scripts import get_quantization_config as get_quantization_config
    from gruppo.trl.trainers import DPOTrainer as DPOTrainer
    from gruppo.trl.trainers import GRPOTrainer as GRPOTrainer
    from gruppo.trl.trainers import RLOOTrainer as RLOOTrainer
    from gruppo.trl.trainers import SFTTrainer as SFTTrainer

_SCRIPTS = (
    "DatasetMixtureConfig", "ModelConfig", "ScriptArguments", "TrlParser", "get_dataset", "get_kbit_device_map",
    "get_peft_config", "get_quantization_config",
)  # fmt: skip
_HOMES = {
    **{f"{method}Config": "configs" for method in ("DPO", "GRPO", "RLOO", "SFT")},
    **{f"{method}Trainer": "trainers" for method in ("DPO", "GRPO", "RLOO", "SFT")},
    **dict.fromkeys(_SCRIPTS, "scripts"),
    "generate_rollout_completions": "rollouts",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"gruppo.trl.{_HOMES[name]}"), name)
    raise AttributeError(
        f"module 'gruppo.trl' has no attribute {name!r}; it has {', '.join(_HOMES)}. Other names of TRL can be "
        "imported from trl"
    )


def __dir__() -> list[str]:
    return sorted({*_HOMES, "__doc__", "__file__", "__name__", "__path__"})
