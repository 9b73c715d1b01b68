"""A Hugging Face sequence-classification model as a reward: a trained reward model, or any text classifier.

The only reward that imports torch, and only in the reward's own processes. Sequences are scored one at a time, so that
a value does not depend on other sequences and the model needs no padding token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedConfig

from gruppo.data.chat_template import chat_tokens
from gruppo.errors import UsageError, nearest
from gruppo.models.loading import out_of_reach, snapshot_of
from gruppo.models.precision import choose_device
from gruppo.models.pretrained import UNDAMAGED, pickles_alone
from gruppo.models.weights import damage_of
from gruppo.rewards import conversation, whole_text
from gruppo.types import Message
from gruppo.utils.hub import hub_problem, split_revision
from gruppo.utils.paths import is_dir, is_file, user_path

_UNLIMITED = 10**9  # tokenizers without a limit report 10**30


class Classifier:
    """Score of every prompt with its completion by a sequence-classification model.

    A model with one output gives that number, unscaled. A model with several gives the probability of `label`, an
    output's name or index, from 0 to 1: softmax, or sigmoid if the model's problem_type is multi_label_classification.
    Messages are rendered with the tokenizer's chat template; without a template, their contents are joined by line
    breaks. A text prompt is directly followed by the completion. A sequence that is too long for the model is never
    truncated: its completion fails.
    """

    def __init__(self, model: str, label: str | int | None = None, device: str = "auto") -> None:
        """`model`: a folder, or a hub name, which a revision may follow ("owner/name@revision"); `device`: auto, cpu,
        cuda or mps.

        Raises UsageError if the model is not found, cannot be loaded or has missing weights, if `label` does not fit
        its outputs, or if the device is not available.
        """
        folder = _locate(model)
        try:
            location = snapshot_of(model) if folder is None else folder
            if problem := pickles_alone(Path(location)):
                raise ValueError(problem)
            config = AutoConfig.from_pretrained(location, trust_remote_code=False)
            self.tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                location, output_loading_info=True, use_safetensors=True, trust_remote_code=False
            )
        except Exception as error:  # third-party files: anything can be wrong with them
            if folder is None and (problem := hub_problem(error)):
                raise UsageError(f"model = {model!r}: {problem}") from error
            first = (str(error).strip().splitlines() or [""])[0]
            raise UsageError(
                f"model = {model!r}: cannot be loaded ({type(error).__name__}: {first}); give a folder or a hub name "
                "of a sequence-classification model with its tokenizer"
            ) from error
        if missing := sorted(map(str, {*loaded[1]["missing_keys"], *loaded[1]["mismatched_keys"]})):
            raise UsageError(
                f"model = {model!r}: has no weights for {', '.join(missing[:3])}, which would be randomly initialized; "
                "give a model that was trained for sequence classification"
            )
        if damage := damage_of(loaded[0]):
            raise UsageError(f"model = {model!r}: its weights are damaged: {damage}; {UNDAMAGED}")
        self.device = choose_device(device)
        self.model = loaded[0].eval().to(self.device)
        self.label = _label_id(config, label)
        self.sigmoid = config.problem_type == "multi_label_classification"
        self.limit = longest_sequence(config, self.tokenizer)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float | ValueError]:
        return [self._score(*pair) for pair in zip(prompts, completions, strict=True)]

    @torch.inference_mode()
    def _score(self, prompt: str | list[Message], completion: str | list[Message]) -> float | ValueError:
        token_ids = self._token_ids(prompt, completion)
        if not 0 < len(token_ids) <= self.limit:
            return ValueError(
                f"prompt and completion have {len(token_ids)} tokens; the model accepts 1 to {self.limit}"
            )
        row = torch.tensor([token_ids], device=self.device)
        logits = self.model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0].float()
        if self.label is None:
            return float(logits[0])
        return float((logits.sigmoid() if self.sigmoid else logits.softmax(0))[self.label])

    def _token_ids(self, prompt: str | list[Message], completion: str | list[Message]) -> list[int]:
        if not isinstance(prompt, str) and self.tokenizer.chat_template:
            return chat_tokens(self.tokenizer, conversation(prompt, completion))
        text = whole_text(prompt, completion)
        has_bos = bool(self.tokenizer.bos_token) and text.startswith(str(self.tokenizer.bos_token))
        return list(self.tokenizer(text, add_special_tokens=not has_bos)["input_ids"])


def longest_sequence(config: PreTrainedConfig, tokenizer: Any) -> int:
    """Most tokens of a sequence that a model and its tokenizer accept."""
    sizes = (getattr(config.get_text_config(), "max_position_embeddings", None), tokenizer.model_max_length)
    return min((size for size in sizes if size and size < _UNLIMITED), default=_UNLIMITED)


def _locate(model: str) -> str | None:
    """The folder of a model; None for a name on the hub."""
    if not isinstance(model, str) or not model:
        raise UsageError(f"model = {model!r}: must be text; write a folder or a hub name")
    path = user_path(model)
    if is_file(path / "config.json"):
        return str(path)
    name, revision = split_revision(model)
    if is_file(path) or is_dir(path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UsageError(
            f"model = {model!r}: there is no such folder with a config.json; write its path, or a hub name"
        )
    try:
        unreachable = out_of_reach(name, revision)
    except HFValidationError:
        raise UsageError(f"model = {model!r}: neither a folder nor a valid name on the Hugging Face hub") from None
    if unreachable:
        raise UsageError(
            f"model = {model!r}: there is no such folder, and the Hugging Face hub cannot be reached; go online, or "
            "give a folder"
        )
    return None


def _label_id(config: PreTrainedConfig, label: str | int | None) -> int | None:
    """Index of the output for `label`; None for a model with one output."""
    names = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    if config.num_labels == 1:
        if label is not None:
            raise UsageError(f"label = {label!r}: the model has a single output, the score; remove label")
        return None
    listed = ", ".join(f"{name} ({number})" for number, name in names.items())
    if label is None:
        raise UsageError(f"label: missing; the model has several outputs: write label = one of {listed}")
    if isinstance(label, int) and not isinstance(label, bool) and label in names:
        return label
    for number, name in names.items():
        if name == label:
            return number
    raise UsageError(f"label = {label!r}: the model has no such label{nearest(str(label), names.values())}")
