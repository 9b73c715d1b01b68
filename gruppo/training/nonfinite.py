"""Micro-batches of an update whose loss or gradient is not finite, kept to be looked at and computed again.

nonfinite-step-000012.json           what happened, and for each micro-batch its texts and what in it is not finite
nonfinite-step-000012-0.safetensors  the tensors of the first micro-batch, and so on
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from gruppo.errors import RunError
from gruppo.models.packing import Batch
from gruppo.runs.atomic import publish
from gruppo.runs.folder import RunFolder
from gruppo.training.context import RunContext

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class FiniteGuard:
    """Stops a run before the optimizer where a value is not finite, and keeps the batches for inspection."""

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
        """Raise RunError where `value` is not finite. `what`: what it is, for the message; `update`: of the step,
        counted from 0; `field`: which learning rate to lower."""
        if math.isfinite(value):
            return
        folder, step = self.context.folder, self.context.state.step + 1
        several = self.context.recipe.method.inner_updates > 1
        where = f"step {step}" + (f", inner update {update + 1}" if several else "")
        facts = {"update": update + 1, "what": what, "value": str(value), "micro_batches": len(batches)}
        path = keep_batches(folder, step, facts, batches, self.tokenizer)
        odd = sorted({name for batch in batches for name in not_finite(batch)})
        inside = f"; not finite in it: {', '.join(odd)}" if odd else ""
        message = f"the {what} of {where} is {value}; this update was not made, and its batch is in {path}{inside}"
        self.context.recorder.event("nonfinite", message, step, file=path.name)
        raise RunError(f"{message}; look at the batch, and begin again with a lower {field}")


def keep_batches(
    run: RunFolder,
    step: int,
    facts: Mapping[str, Any],
    batches: Sequence[Batch],
    tokenizer: PreTrainedTokenizerBase,
) -> Path:
    """Write the micro-batches and what happened to the run folder; the JSON file, whose tensors lie beside it."""
    path = run.path / f"nonfinite-step-{step:06d}.json"
    told = []
    for number, batch in enumerate(batches):
        file = path.with_name(f"{path.stem}-{number}.safetensors")
        save_file(
            {name: each.cpu().contiguous() for name, each in _tensors(batch).items()}, file.with_suffix(".writing")
        )
        publish(file.with_suffix(".writing"), file)
        told.append(
            {
                "file": file.name,
                "layout": batch.layout,
                "members": batch.members,
                "not_finite": not_finite(batch),
                "completions": _texts(batch, tokenizer),
            }
        )
    run.write_json(path.name, {"step": step, **facts, "batches": told})
    return path


def load_batches(path: str | Path) -> list[Batch]:
    """The micro-batches of a file that `keep_batches` wrote, as they were given to the loss."""
    file = Path(path)
    made = []
    for each in json.loads(file.read_text(encoding="utf-8"))["batches"]:
        tensors: dict[str, Any] = dict(load_file(file.with_name(Path(each["file"]).name)))
        layout = [(int(prompt), [int(own) for own in completions]) for prompt, completions in each["layout"]]
        made.append(Batch(**tensors, layout=layout, members=[(a, b, c) for a, b, c in each["members"]]))
    return made


def not_finite(batch: Batch) -> dict[str, int]:
    """By name of a tensor over the batch's completion tokens, how many of its trained numbers are not finite. A NaN of
    the engine's is none: nobody drew what rows bring."""
    used = batch.weights != 0
    counts = {
        name: int((~torch.isfinite(each))[used].sum())
        for name, each in _tensors(batch).items()
        if each.is_floating_point() and not (name == "sampling_logprobs" and bool(each.isnan().all()))
    }
    return {name: count for name, count in counts.items() if count}


def _tensors(batch: Batch) -> dict[str, torch.Tensor]:
    every = {name: getattr(batch, name) for name in batch.__slots__}
    return {name: each for name, each in every.items() if isinstance(each, torch.Tensor)}


def _texts(batch: Batch, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """Prompt and completion of each member, special tokens included."""
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
