"""The models of a run as files: weights and optimizer states in checkpoints, and whole weights for the final model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from gruppo.models.lora import save_adapter
from gruppo.models.policy import LanguageModel
from gruppo.models.ranks import Ranks, on_all_ranks
from gruppo.models.reward_model import save_reward_model
from gruppo.models.weights import named_weights, save_base, save_weights, trained_weights
from gruppo.training.checkpoint import load_models, save_models
from gruppo.training.optimizer import Trainable


class ModelFiles:
    """Saves and loads the models of a run. Every rank writes and reads its own shards."""

    def __init__(
        self,
        policy: LanguageModel,
        optimizer: torch.optim.Optimizer,
        critic: Trainable | None,
        reward_model: Trainable | None,
        ranks: Ranks,
    ) -> None:
        self.policy, self.optimizer, self.ranks = policy, optimizer, ranks
        parts = {"critic": critic, "reward_model": reward_model}
        self.scalar_models = {name: part for name, part in parts.items() if part is not None}

    @property
    def trained(self) -> Mapping[str, tuple[nn.Module, torch.optim.Optimizer]]:
        """The trained modules with their optimizers, by the prefix of their files; the policy has none."""
        others = {
            name: (part.model.module, part.optimizer)
            for name, part in self.scalar_models.items()
            if part.optimizer is not None
        }
        return {"": (self.policy.model, self.optimizer), **others}

    @on_all_ranks
    def save(self, folder: Path) -> None:
        """Write weights and optimizer states of all trained models to a folder that exists. Ends when all ranks did."""
        save_models(folder, self.trained)
        self.ranks.gather(None)  # the leader renames the folder next

    @on_all_ranks
    def restore(self, folder: Path) -> None:
        """Load what `save` wrote, on any number of ranks."""
        load_models(folder, self.trained)
        for policy in (self.policy, *(part.model.policy for part in self.scalar_models.values())):
            policy.generation.advance()

    def save_final(self, folder: Path) -> None:
        """Write the policy to a folder that transformers can load."""
        save_weights(dict(self._whole(False)), folder)
        save_base(self.policy, folder)

    def save_adapter(self, folder: Path, base: str) -> None:
        """Write the policy's adapter in peft's format."""
        save_adapter(self.policy.model, folder, base, dict(self._whole(True)))

    def save_reward_model(self, kind: str, folder: Path) -> None:
        """Write the reward model to a folder that transformers can load."""
        save_reward_model(self.scalar_models["reward_model"].model, kind, folder, dict(self._whole_scorer()))

    @on_all_ranks
    def _whole(self, adapter: bool) -> Iterator[tuple[str, Tensor]]:
        tensors = trained_weights(self.policy.model).items() if adapter else self.policy.weight_source()
        for name, tensor in tensors:
            yield name, self.ranks.whole(tensor)

    @on_all_ranks
    def _whole_scorer(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named_weights(self.scalar_models["reward_model"].model.module).items():
            yield name, self.ranks.whole(tensor)
