"""Reward models in `reward_funcs`: by name, by folder, or in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from gruppo.errors import UsageError
from gruppo.rewards.classifier import Classifier, longest_sequence


class ModelReward(Classifier):
    """The score of a sequence-classification model with one output; see `gruppo.rewards.classifier.Classifier`."""

    def __init__(self, model: str | PreTrainedModel, tokenizer: Any = None) -> None:
        """`tokenizer`: of a model in memory; by default the one that its name leads to. Raises UsageError if the model
        or its tokenizer cannot be loaded, or if the model has more than one output."""
        if isinstance(model, str):
            super().__init__(model)
            name = model
        else:
            name = str(model.config._name_or_path)
            if model.config.num_labels != 1:
                raise UsageError(
                    f"reward_funcs: {name} has {model.config.num_labels} outputs; give a model with a single score"
                )
            self.model, self.device, self.label, self.sigmoid = model.eval(), model.device, None, False
            self.tokenizer = tokenizer or AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            self.limit = longest_sequence(model.config, self.tokenizer)
        self.__name__ = Path(name).name
