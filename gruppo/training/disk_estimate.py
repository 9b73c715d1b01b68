"""How much disk a run will need, before it starts.

Weights are counted tensor by tensor. Of tables a trial is made in memory: rows as a run writes them, of the longest
completions, whose tokens are those of the prompts and whose log-probabilities are random. So tables come out smaller
than foretold where completions are shorter; nothing else does.
"""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor, nn

from gruppo.config.recipe import Recipe
from gruppo.errors import UsageError
from gruppo.models.policy import LanguageModel
from gruppo.models.weights import named_weights, save_base, trained_weights
from gruppo.runs.tables import EVALUATIONS, LABELS, ROLLOUTS
from gruppo.training.memory_estimate import EvalWorkload, Workload
from gruppo.utils.disk import free_bytes, gigabytes, held_bytes

TRIAL_TOKENS = 8_000  # of completions in a trial table
HEADER = 110  # bytes that a file of tensors spends on naming one
LINE = 2_500  # bytes of a step in metrics.jsonl and events.jsonl
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


def forecast_disk(
    recipe: Recipe, policy: LanguageModel, work: Workload, prompts: Sequence[Sequence[int]], start_weights: bool = False
) -> Disk:
    """The disk that a run of the policy (with its adapters) will need. `prompts`: token ids of some of its prompts;
    `start_weights`: those of the start model are kept too. Value and reward models are taken to have the policy's size;
    groups that a step draws in place of dropped ones (method.dynamic_sampling_rounds) are not counted."""
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
    tables = {
        "rollouts": recipe.run.steps * _table(ROLLOUTS, _rollout, recipe, policy, work, prompts, work.completions),
        "evaluations": sum(
            exam.times * _table(EVALUATIONS, partial(_answer, exam), recipe, policy, work, prompts, exam.answers)
            for exam in work.exams
        ),
    }
    if recipe.reward_model is not None and judged:
        labelled = recipe.reward_model.prompts * recipe.sampling.group_size
        tables["labels"] = rounds * _table(LABELS, _label, recipe, policy, work, prompts, labelled)
    parts = {
        "checkpoints": kept * checkpoint,
        "model": result + base + (layers + base if judged else 0),
        "adapter": adapters,
        "base": base + (result if start_weights else 0),
        "reference": references * whole,
        **tables,
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


_Row = Callable[[Recipe, Workload, Sequence[int], "_Draw", str], dict[str, Any]]


class _Draw:
    """Tokens and numbers of a trial."""

    def __init__(self, policy: LanguageModel, prompts: Sequence[Sequence[int]]) -> None:
        self.random = np.random.default_rng(0)
        self.known = np.array([token for prompt in prompts for token in prompt])
        self.texts = {int(each): str(policy.tokenizer.decode([int(each)])) for each in np.unique(self.known)}

    def tokens(self, count: int) -> list[int]:
        return [int(each) for each in self.random.choice(self.known, count)]

    def logprobs(self, count: int) -> list[float]:
        return [float(each) for each in -self.random.exponential(size=count).astype(np.float32)]

    def text(self, tokens: Sequence[int]) -> str:
        return "".join(self.texts[token] for token in tokens)


def _table(
    schema: pa.Schema, row: _Row, recipe: Recipe, policy: LanguageModel, work: Workload,
    prompts: Sequence[Sequence[int]], rows: int,
) -> int:  # fmt: skip
    """Bytes of a table of so many rows: written whole if it is small, else by what further rows add to a few."""
    if not rows:
        return 0
    length = max(1, work.max_tokens, *(exam.answer_tokens for exam in work.exams))
    few = min(rows, max(2, TRIAL_TOKENS // length))
    draw = _Draw(policy, prompts)

    def size(count: int) -> int:
        chosen = [prompts[(number // work.group_size) % len(prompts)] for number in range(count)]
        made = [row(recipe, work, prompt, draw, f"{recipe.task.name}/{number}") for number, prompt in enumerate(chosen)]
        target = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(made, schema), target, compression="zstd", write_page_checksum=True)
        return target.tell()

    whole = size(few)
    if few == rows:
        return whole
    fixed = size(1)
    return whole + (whole - fixed) * (rows - few) // (few - 1)


def _rollout(recipe: Recipe, work: Workload, prompt: Sequence[int], draw: _Draw, name: str) -> dict[str, Any]:
    count, method = work.max_tokens, recipe.method
    tokens, number = draw.tokens(count), draw.random.random()
    own = draw.logprobs(count) if method.credit in {"token", "value", "step"} else [number] * count
    return {
        "step": 1, "group": 1, "completion": 1, "prompt_id": name, "prompt": draw.text(prompt), "columns": "{}",
        "text": draw.text(tokens), "finish_reason": "length", "policy_version": 1, "reward": number,
        "reward_parts": f'{{"reward": {number}}}', "steps": "{}", "extra": "{}", "trained": True,
        "prompt_token_ids": list(prompt), "token_ids": tokens, "token_texts": [draw.texts[each] for each in tokens],
        "mask": [True] * count, "sampling_logprobs": draw.logprobs(count), "old_logprobs": draw.logprobs(count),
        "ref_logprobs": draw.logprobs(count) if work.reference else None, "advantages": own,
        "values": draw.logprobs(count + 1) if work.critic else None,
        "returns": draw.logprobs(count) if work.critic else None,
    }  # fmt: skip


def _answer(
    exam: EvalWorkload, recipe: Recipe, work: Workload, prompt: Sequence[int], draw: _Draw, name: str
) -> dict[str, Any]:
    tokens = draw.tokens(exam.answer_tokens)
    return {
        "eval_set": exam.name, "prompt_id": name, "sample": 0, "question": draw.text(prompt), "columns": "{}",
        "answer": draw.text(tokens), "correct": False, "extracted": "12", "rule": "number", "other_rules": "{}",
        "vote": "= 12", "score": None, "finish_reason": "length", "episode": None, "token_ids": tokens,
        "mask": [True] * len(tokens), "logprobs": draw.logprobs(len(tokens)),
    }  # fmt: skip


def _label(recipe: Recipe, work: Workload, prompt: Sequence[int], draw: _Draw, name: str) -> dict[str, Any]:
    tokens = draw.tokens(work.max_tokens)
    ends = list(range(9, len(tokens), 10))
    steps = ends if recipe.reward_model is not None and recipe.reward_model.kind == "process" else []
    return {
        "prompt_id": name, "prompt": draw.text(prompt), "columns": "{}", "prompt_token_ids": list(prompt),
        "text": draw.text(tokens), "token_ids": tokens, "finish_reason": "length", "right": True,
        "step_texts": [draw.text(tokens[max(0, end - 9) : end + 1]) for end in steps], "step_ends": steps,
        "step_text_ends": steps, "soft": [float(draw.random.random()) for _ in steps], "hard": [True] * len(steps),
    }  # fmt: skip
