"""How much disk a run needs, estimated before it starts.

Weights are counted tensor by tensor. Tables of completions are estimated by a few measured sizes, as if every
completion had the most tokens, so they come out smaller.
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
from gruppo.models.policy import LanguageModel
from gruppo.models.weights import named_weights, save_base, trained_weights
from gruppo.training.memory_estimate import Workload
from gruppo.utils.disk import free_bytes, gigabytes, held_bytes

HEADER = 110  # bytes that a file of tensors spends on naming one
LINE = 2_500  # bytes of a step in metrics.jsonl and events.jsonl
# Bytes of a table as Parquet compresses it: of the file, a row, a token (its id and texts), and a real number.
FILE, ROW, TOKEN, REAL = 9_000, 60, 5.0, 5.0
TABLES = ("rollouts", "evaluations", "labels")


@dataclass(frozen=True)
class Disk:
    """Bytes of a run folder. `parts`: of a finished run; `while_saving`: what is there beside them while a checkpoint
    is written and the old ones are not yet gone; `checkpoint`: one of them, `kept`: how many stay."""

    parts: dict[str, int]
    while_saving: int
    checkpoint: int
    kept: int

    @property
    def total(self) -> int:
        """Of a finished run."""
        return sum(self.parts.values())

    @property
    def peak(self) -> int:
        """The most that is there at a time."""
        return self.total + self.while_saving

    @property
    def least(self) -> int:
        """The peak without tables, which may come out smaller."""
        return self.peak - sum(self.parts[name] for name in TABLES if name in self.parts)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"peak": self.peak, "total": self.total, "checkpoint": self.checkpoint, "kept": self.kept, **self.parts}

    def require(self, folder: Path) -> str | None:
        """Raise UsageError where the folder's file system has too little for what is certain; a warning where it may
        have too little for the tables."""
        free = free_bytes(folder)
        if self.least > free:
            raise UsageError(
                f"--out {folder}: {gigabytes(free)} are free there, and the run needs {gigabytes(self.least)} beside "
                f"its tables: {self.kept} checkpoints of {gigabytes(self.checkpoint)}, {gigabytes(self.while_saving)} "
                "while one is written, and the result; make room, or choose a folder on another disk"
            )
        if self.peak > free:
            tables = gigabytes(self.peak - self.least)
            return (
                f"{folder}: {gigabytes(free)} are free there, and the run may need {gigabytes(self.peak)}, of which "
                f"tables of completions are {tables} if every completion has the most tokens"
            )
        return None


def still_needed(folder: Path, forecast: Mapping[str, Any]) -> str | None:
    """A warning where what a resumed run has yet to write may not fit; `forecast`: as its environment.json holds it."""
    needed, free = int(forecast["peak"]) - held_bytes(folder), free_bytes(folder)
    if needed <= free:
        return None
    return f"{folder}: {gigabytes(free)} are free there, and the run may need {gigabytes(needed)} more"


def forecast_disk(recipe: Recipe, policy: LanguageModel, work: Workload, start_weights: bool = False) -> Disk:
    """The disk that a run of the policy (with its adapters) needs.

    `start_weights`: the weights of the start model are kept too. Value and reward models are assumed to have the
    policy's size. Groups that dynamic sampling adds to a step are not counted.
    """
    whole, trained = _weights(named_weights(policy.model)), trained_weights(policy.model)
    adapters = _bytes(trained.values()) if recipe.model.lora is not None else 0
    layers = _scalar_model(policy)
    judged = recipe.reward_model is not None and recipe.reward_model.prompts > 0
    beside = int(recipe.method.needs_critic) + int(judged)
    checkpoint = _with_optimizer(policy.model) + beside * 3 * layers
    kept, most = _checkpoints(recipe)
    result = whole - adapters
    references = min(recipe.run.iterations - 1, 1 + (kept > 2)) if recipe.method.needs_reference else 0
    base = _base_bytes(policy)
    rounds = recipe.run.iterations if judged else 0
    parts = {
        "checkpoints": kept * checkpoint,
        "model": result + base + (layers + base if judged else 0),
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
    """Of a file of weights, which are never narrow there."""
    return sum(each.numel() * (max(4, each.itemsize) if each.is_floating_point() else each.itemsize) + HEADER
               for each in tensors.values())  # fmt: skip


def _with_optimizer(module: nn.Module) -> int:
    """Trained weights, and of each of them AdamW's two means and its count of steps."""
    trained = [each for each in module.parameters() if each.requires_grad]
    return _bytes(trained_weights(module).values()) + sum(
        2 * (p.numel() * p.itemsize + HEADER) + HEADER for p in trained
    )


def _scalar_model(policy: LanguageModel) -> int:
    """The layers of a value or reward model: a policy's without its adapters, and a head of one row."""
    layers = policy.model.get_decoder().named_parameters()
    return _weights({name: each for name, each in layers if ".lora_" not in name})


def _checkpoints(recipe: Recipe) -> tuple[int, int]:
    """How many checkpoints a finished run has, and how many are there while another is written."""
    run = recipe.run
    made = [range(run.checkpoint_every, run.steps + 1, run.checkpoint_every)]
    if recipe.reward_model or run.iterations > 1:
        made.append(range(0, run.steps, run.steps // run.iterations))
    last = sorted({run.steps, *(step for each in made for step in each[-4:])})[-4:]
    best = any(_evaluates_before(recipe, each, last[-2:][0]) for each in made)
    kept = min(2, len(last)) + best
    return kept, min(len(last), kept + 1)


def _evaluates_before(recipe: Recipe, made: range, border: int) -> bool:
    """Whether a run of the recipe evaluates after one of the steps of a range, which begins at 0 or at its stride, that
    are before the border. No step is listed: there may be more than memory holds."""
    if recipe.evaluation is None or not made:
        return False
    every = recipe.evaluation.every
    return made[0] == 0 < border or bool(every and math.lcm(every, made.step) < border)


def eval_set_count(recipe: Recipe, every: int) -> int:
    """How often a run of the recipe holds an exam: before the first step, after the last, and each `every` steps."""
    return len(range(0, recipe.run.steps, every or recipe.run.steps)) + 1


def _base_bytes(policy: LanguageModel) -> int:
    """Config and tokenizer, by writing them."""
    with tempfile.TemporaryDirectory() as folder:
        save_base(policy, Path(folder))
        return held_bytes(Path(folder))


def _tables(recipe: Recipe, work: Workload, rounds: int) -> dict[str, int]:
    """Bytes of the tables by folder, if every completion has the most tokens."""
    by_token = recipe.method.credit in {"token", "value", "step"}
    lists = 2 + work.reference + by_token + 2 * work.critic  # of log-probabilities, advantages, values, returns
    tables = {
        "rollouts": recipe.run.steps * _table(work.completions, work.max_tokens, lists),
        "evaluations": sum(each.times * _table(each.answers, each.answer_tokens, 1) for each in work.exams),
    }
    if recipe.reward_model is not None and rounds:
        labelled = recipe.reward_model.prompts * recipe.sampling.group_size
        tables["labels"] = rounds * _table(labelled, work.max_tokens, 0)
    return tables


def _table(rows: int, tokens: int, lists: int) -> int:
    """Bytes of one table; `tokens` of a row; `lists`: how many lists of real numbers a row has."""
    return FILE + rows * (ROW + round(tokens * (TOKEN + REAL * lists))) if rows else 0
