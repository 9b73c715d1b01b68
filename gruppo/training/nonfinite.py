"""Keeps the micro-batches of an update whose loss or gradient is not finite, for inspection and recomputation.

nonfinite-step-000012.json           the cause, and for each micro-batch its texts and its values that are not finite
nonfinite-step-000012-0.safetensors  the tensors of the first micro-batch, and so on
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from gruppo.errors import RunError
from gruppo.models.packing import Batch
from gruppo.runs.atomic import publish
from gruppo.runs.folder import RunFolder
from gruppo.training.context import RunContext
from gruppo.utils.transfer import as_floats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Guard(Protocol):
    """See `FiniteGuard`."""

    def require(
        self, value: float, what: str, batches: Sequence[Batch], update: int = 0, field: str = "optimizer.learning_rate"
    ) -> None:
        """Raise an error if `value` is not finite."""


@dataclass(frozen=True)
class FiniteGuard:
    """Stops a run before the optimizer step if a value is not finite, and keeps the batches for inspection."""

    context: RunContext
    tokenizer: PreTrainedTokenizerBase

    def require(
        self,
        value: float,
        what: str,
        batches: Sequence[Batch],
        update: int = 0,
        field: str = "optimizer.learning_rate",
    ) -> None:
        """Raise RunError if `value` is not finite.

        `what`: name of the value, for the message. `update`: number of the update within the step, from 0. `field`:
        the learning rate that the message suggests to lower.
        """
        if math.isfinite(value):
            return
        folder, step = self.context.folder, self.context.state.step + 1
        method = self.context.recipe.method
        several = method.inner_updates * method.minibatches > 1
        where = f"step {step}" + (f", inner update {update + 1}" if several else "")
        facts = {"update": update + 1, "what": what, "value": str(value), "micro_batches": len(batches)}
        path = keep_batches(folder, step, facts, batches, self.tokenizer)
        names = sorted({name for batch in batches for name in not_finite(batch)})
        inside = f"; not finite in it: {', '.join(names)}" if names else ""
        message = f"the {what} of {where} is {value}; this update was not applied, and its batch is in {path}{inside}"
        self.context.recorder.event("nonfinite", message, step, file=path.name)
        raise RunError(f"{message}; inspect the batch, and start again with a lower {field}")


def keep_batches(
    run: RunFolder,
    step: int,
    facts: Mapping[str, Any],
    batches: Sequence[Batch],
    tokenizer: PreTrainedTokenizerBase,
) -> Path:
    """Write the micro-batches and `facts` to the run folder. Returns the JSON file; the tensors are next to it."""
    path = run.path / f"nonfinite-step-{step:06d}.json"
    records = []
    for number, batch in enumerate(batches):
        file = path.with_name(f"{path.stem}-{number}.safetensors")
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in _tensors(batch).items()}, file.with_suffix(".writing")
        )
        publish(file.with_suffix(".writing"), file)
        records.append(
            {
                "file": file.name,
                "layout": batch.layout,
                "members": batch.members,
                "not_finite": not_finite(batch),
                "completions": _texts(batch, tokenizer),
            }
        )
    run.write_json(path.name, {"step": step, **facts, "batches": records})
    return path


def load_batches(path: str | Path) -> list[Batch]:
    """The micro-batches in a file that `keep_batches` wrote, as the loss received them."""
    file = Path(path)
    batches = []
    for record in json.loads(file.read_text(encoding="utf-8"))["batches"]:
        tensors: dict[str, Any] = dict(load_file(file.with_name(Path(record["file"]).name)))
        layout = [(int(prompt), [int(length) for length in completions]) for prompt, completions in record["layout"]]
        batches.append(Batch(**tensors, layout=layout, members=[(a, b, c) for a, b, c in record["members"]]))
    return batches


def not_finite(batch: Batch) -> dict[str, int]:
    """How many trained values are not finite, by name of the tensor over the batch's completion tokens."""
    used = batch.weights != 0
    reals = {name: tensor for name, tensor in _tensors(batch).items() if tensor.is_floating_point()}
    counts = {name: (~torch.isfinite(tensor) & used).sum() for name, tensor in reals.items()}
    found = zip(counts, as_floats(list(counts.values())), strict=True)
    return {name: int(count) for name, count in found if count}


def _tensors(batch: Batch) -> dict[str, torch.Tensor]:
    values = {name: getattr(batch, name) for name in batch.__slots__}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def _texts(batch: Batch, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """Prompt and completion of every member, including special tokens."""
    prompts: list[str] = []
    start = 0
    for length, completions in batch.layout:
        prompts.append(str(tokenizer.decode(batch.token_ids[start : start + length].tolist())))
        start += length + sum(completions)
    rows, place, at, before = [], -1, 0, None
    for index, _, length in batch.members:
        place, before = place + (index != before), index
        completion = str(tokenizer.decode(batch.targets[at : at + length].tolist()))
        rows.append({"prompt": prompts[place], "completion": completion})
        at += length
    return rows
