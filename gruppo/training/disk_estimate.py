"""How much disk a run needs, estimated before it starts.

Weights are counted tensor by tensor. Tables of completions are estimated from a few measured sizes, as if every
completion had the maximum number of tokens, so the real tables are smaller.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gruppo.config.recipe import Recipe
from gruppo.errors import UsageError
from gruppo.models.four_bit import full_count, is_four_bit
from gruppo.models.policy import LanguageModel
from gruppo.models.weights import named_weights, save_base, trained_weights
from gruppo.training.memory_estimate import Workload
from gruppo.utils.disk import free_bytes, gigabytes, held_bytes

HEADER = 110  # bytes that a safetensors file spends on naming one tensor
LINE = 2_500  # bytes per step in metrics.jsonl and events.jsonl
# Bytes of a table compressed by Parquet: per file, per row, per token (its id and texts), and per real number.
FILE, ROW, TOKEN, REAL = 10_500, 60, 5.0, 5.0
TABLES = ("rollouts", "evaluations", "labels")


@dataclass(frozen=True)
class Disk:
    """Bytes of a run folder.

    `parts`: of a finished run, by name. `while_saving`: additional bytes while a checkpoint is written and the old ones
    are not yet deleted. `checkpoint`: of one checkpoint. `kept`: how many checkpoints are kept.
    """

    parts: dict[str, int]
    while_saving: int
    checkpoint: int
    kept: int

    @property
    def total(self) -> int:
        """Bytes of a finished run."""
        return sum(self.parts.values())

    @property
    def peak(self) -> int:
        """The largest number of bytes at any time."""
        return self.total + self.while_saving

    @property
    def least(self) -> int:
        """The peak without tables, which may be smaller than estimated."""
        return self.peak - sum(self.parts[name] for name in TABLES if name in self.parts)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"peak": self.peak, "total": self.total, "checkpoint": self.checkpoint, "kept": self.kept, **self.parts}

    def require(self, folder: Path) -> str | None:
        """Raise UsageError if the folder's file system has too little space for everything but the tables.

        Returns a warning if it may have too little space for the tables.
        """
        free = free_bytes(folder)
        if self.least > free:
            raise UsageError(
                f"--out {folder}: only {gigabytes(free)} free, but the run needs {gigabytes(self.least)} in addition "
                f"to its tables: {self.kept} checkpoints of {gigabytes(self.checkpoint)}, "
                f"{gigabytes(self.while_saving)} while one is written, and the result; free some space, or choose a "
                "folder on another disk"
            )
        if self.peak > free:
            tables = gigabytes(self.peak - self.least)
            return (
                f"{folder}: only {gigabytes(free)} free, but the run may need {gigabytes(self.peak)}, including "
                f"{tables} for tables of completions if every completion has the maximum number of tokens"
            )
        return None


def still_needed(folder: Path, forecast: Mapping[str, Any]) -> str | None:
    """A warning if a resumed run's remaining files may not fit. `forecast`: the estimate in its environment.json."""
    needed, free = int(forecast["peak"]) - held_bytes(folder), free_bytes(folder)
    if needed <= free:
        return None
    return f"{folder}: only {gigabytes(free)} free, but the run may need {gigabytes(needed)} more"


def forecast_disk(recipe: Recipe, policy: LanguageModel, work: Workload, start_weights: bool = False) -> Disk:
    """Estimate the disk space that a run of the policy (with its adapters) needs.

    `start_weights`: the initial model's weights are kept too. Value and reward models are assumed to have the
    policy's size. Groups that dynamic sampling adds to a step are not counted.
    """
    whole, trained = _weights(named_weights(policy.model)), trained_weights(policy.model)
    small = [weight for weight in policy.model.parameters() if is_four_bit(weight)]  # saved as float32
    whole += sum(4 * full_count(weight) - weight.nbytes for weight in small)
    adapters = _bytes(trained.values()) if recipe.model.lora is not None else 0
    layers = _scalar_model(policy)
    trains_reward_model = recipe.reward_model is not None and recipe.reward_model.prompts > 0
    extra_models = int(recipe.method.needs_critic) + int(trains_reward_model)
    checkpoint = checkpoint_bytes(policy.model) + extra_models * 3 * layers
    checkpoint += recipe.lag * _table(work.completions, work.max_tokens, 1)  # the steps that are sampled already
    kept, most = _checkpoints(recipe)
    result = whole - adapters
    references = min(recipe.run.iterations - 1, 1 + (kept > 2)) if recipe.method.needs_reference else 0
    base = _base_bytes(policy)
    rounds = recipe.run.iterations if trains_reward_model else 0
    parts = {
        "checkpoints": kept * checkpoint,
        "model": result + base + (layers + base if trains_reward_model else 0),
        "adapter": adapters,
        "base": base + (result if start_weights else 0),
        "reference": references * whole,
        **_tables(recipe, work, rounds),
        "logs": LINE * (recipe.run.steps + rounds) + 10_000,
    }
    saving = (checkpoint if most > kept else 0) + (whole if recipe.run.iterations - 1 > references > 0 else 0)
    return Disk({name: size for name, size in parts.items() if size}, saving, checkpoint, kept)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize + HEADER for tensor in tensors)


def _weights(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a weights file. Floating-point weights take at least 4 bytes each."""
    return sum(
        tensor.numel() * (max(4, tensor.itemsize) if tensor.is_floating_point() else tensor.itemsize) + HEADER
        for tensor in tensors.values()
    )


def checkpoint_bytes(module: nn.Module) -> int:
    """Bytes of a module in a checkpoint: its trained weights, each with AdamW's two moments and step count."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return _bytes(trained_weights(module).values()) + sum(
        2 * (p.numel() * p.itemsize + HEADER) + HEADER for p in trained
    )


def _scalar_model(policy: LanguageModel) -> int:
    """Bytes of a value or reward model: the policy's layers without adapters, and a head with one row."""
    layers = policy.model.get_decoder().named_parameters()
    return _weights({name: tensor for name, tensor in layers if ".lora_" not in name})


def _checkpoints(recipe: Recipe) -> tuple[int, int]:
    """How many checkpoints a finished run has, and how many exist while another is written."""
    run = recipe.run
    schedules = [range(run.checkpoint_every, run.steps + 1, run.checkpoint_every)]
    if recipe.reward_model or run.iterations > 1:
        schedules.append(range(0, run.steps, run.steps // run.iterations))
    last = sorted({run.steps, *(step for schedule in schedules for step in schedule[-4:])})[-4:]
    best = any(_evaluates_before(recipe, schedule, last[-2:][0]) for schedule in schedules)
    kept = min(2, len(last)) + best
    return kept, min(len(last), kept + 1)


def _evaluates_before(recipe: Recipe, saved: range, border: int) -> bool:
    """Whether a run of the recipe evaluates after a step in `saved` that is before `border`.

    `saved` starts at 0 or at its stride. Its steps are not listed, because there may be more than memory holds.
    """
    if recipe.evaluation is None or not saved:
        return False
    every = recipe.evaluation.every
    return saved[0] == 0 < border or bool(every and math.lcm(every, saved.step) < border)


def eval_set_count(recipe: Recipe, every: int) -> int:
    """How often a run of the recipe evaluates a set: before the first step, after the last, and every `every` steps."""
    return len(range(0, recipe.run.steps, every or recipe.run.steps)) + 1


def _base_bytes(policy: LanguageModel) -> int:
    """Bytes of config and tokenizer, measured by writing them."""
    with tempfile.TemporaryDirectory() as folder:
        save_base(policy, Path(folder))
        return held_bytes(Path(folder))


def _tables(recipe: Recipe, work: Workload, rounds: int) -> dict[str, int]:
    """Bytes of the tables by folder, if every completion has the maximum number of tokens."""
    by_token = recipe.method.credit in {"token", "value", "step"}
    # Lists of log-probabilities, entropies, advantages, values, returns.
    lists = 3 + recipe.method.needs_reference + by_token + 2 * work.critic
    tables = {
        "rollouts": recipe.run.steps * _table(work.completions, work.max_tokens, lists),
        "evaluations": sum(each.times * _table(each.answers, each.answer_tokens, 1) for each in work.eval_sets),
    }
    if recipe.reward_model is not None and rounds:
        labelled = recipe.reward_model.prompts * recipe.sampling.group_size
        tables["labels"] = rounds * _table(labelled, work.max_tokens, 0)
    return tables


def _table(rows: int, tokens: int, lists: int) -> int:
    """Bytes of one table. `tokens`: per row. `lists`: number of lists of real numbers per row."""
    return FILE + rows * (ROW + round(tokens * (TOKEN + REAL * lists))) if rows else 0
