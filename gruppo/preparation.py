"""Everything that a run needs, checked from the cheapest to the dearest: recipe, folder, data, rewards, weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gruppo.config import Recipe
from gruppo.engines import Engine, SamplingOptions
from gruppo.engines.native import NativeEngine, choose_slots
from gruppo.errors import UsageError
from gruppo.evaluation import check_grader
from gruppo.machine import describe
from gruppo.models import LanguageModel, choose_device, choose_dtype, find_model, load_model, weights_sha256
from gruppo.packing import choose_budget
from gruppo.reporting import Reporter
from gruppo.rewards import RewardFunction
from gruppo.rewards.pool import RewardPool
from gruppo.runlog import RunFolder, check_folder
from gruppo.tasks import Split, checked_rows, load_rows, tokenize_rows
from gruppo.tasks.answers import Grader, find_grader
from gruppo.types import Prompt, Row


@dataclass
class Prepared:
    """A run that is ready to begin. `budget`: tokens of a micro-batch."""

    recipe: Recipe
    run: RunFolder
    policy: LanguageModel
    reference: LanguageModel | None
    engine: Engine
    pool: RewardPool
    prompts: list[Prompt]
    questions: list[Prompt]
    grader: Grader | None
    optimizer: torch.optim.Optimizer
    budget: int
    sampling: SamplingOptions


def prepare(
    recipe: Recipe,
    folder: Path,
    resume: bool,
    rewards: Sequence[str | RewardFunction],
    rows: Sequence[Row] | None,
    reporter: Reporter,
    stack: ExitStack,
) -> Prepared:
    """Build a run from its recipe. Processes and locks are left to `stack`. Raises UsageError before weights are
    loaded wherever it can."""
    check_folder(folder, recipe, resume)
    train_rows, test_rows, grader = _rows(recipe, rows)
    columns = set.intersection(*(set(row) for row in train_rows)) - {"prompt"}
    choose_device(recipe.model.device)
    run = RunFolder(folder)
    stack.callback(run.close)
    pool = RewardPool(
        rewards,
        recipe.reward.weights,
        sorted(columns),
        recipe.reward.timeout,
        recipe.reward.workers,
        folder / "rewards.log",
    )
    stack.callback(pool.close)
    source = find_model(recipe.model.name, reporter)
    limit = recipe.sampling.max_tokens
    prompts = tokenize_rows(train_rows, source.tokenizer, source.context, limit, recipe.task.name)
    questions: list[Prompt] = []
    if recipe.evaluation is not None and grader is not None:
        limit = max(limit, recipe.evaluation.max_tokens or 0)
        name = recipe.evaluation.task or f"{recipe.task.name} (held out)"
        questions = tokenize_rows(test_rows, source.tokenizer, source.context, limit, name)
        check_grader(grader, questions)
    policy, chosen = _load_policy(recipe, run, source, prompts + questions, limit, reporter)
    return Prepared(
        recipe=recipe,
        run=run,
        policy=policy,
        reference=policy.frozen_copy() if recipe.method.kl_coef else None,
        engine=NativeEngine(policy, chosen["slots"]),
        pool=pool,
        prompts=prompts,
        questions=questions,
        grader=grader,
        optimizer=make_optimizer(recipe, policy),
        budget=chosen["micro_batch_tokens"],
        sampling=SamplingOptions(recipe.sampling.temperature, recipe.sampling.max_tokens),
    )


def make_optimizer(recipe: Recipe, policy: LanguageModel) -> torch.optim.Optimizer:
    """AdamW over the policy's float32 weights; decay on matrices only."""
    settings = recipe.optimizer
    parameters = [parameter for _, parameter in policy.model.named_parameters()]
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=policy.device.type in {"cpu", "cuda"},
    )


def _rows(recipe: Recipe, rows: Sequence[Row] | None) -> tuple[list[Row], list[Row], Grader | None]:
    if rows is None:
        train_rows = load_rows(recipe.task.name, "train", recipe.task.options)
    else:
        train_rows = checked_rows(rows, "prompts")
    settings = recipe.evaluation
    if settings is None:
        return train_rows, [], None
    if settings.task is None and rows is not None:
        raise UsageError("evaluation.task: missing; prompts given as rows have no held-out part: name a task or file")
    if settings.task is None:
        test_rows = load_rows(recipe.task.name, "test", recipe.task.options)
    else:
        split: Split = "train" if settings.task.endswith(".jsonl") else "test"
        test_rows = load_rows(settings.task, split, settings.options, "evaluation.task")
    return train_rows, test_rows[: settings.questions], find_grader(settings.grader)


def _load_policy(
    recipe: Recipe, run: RunFolder, source: Any, prompts: Sequence[Prompt], max_tokens: int, reporter: Reporter
) -> tuple[LanguageModel, dict[str, Any]]:
    """Load the weights, and choose what depends on the machine, or keep what the run chose when it began."""
    before = run.read_json("environment.json")
    device = choose_device(recipe.model.device)
    dtype = (
        before["chosen"]["dtype"] if before else str(choose_dtype(recipe.model.dtype, device)).removeprefix("torch.")
    )
    policy = load_model(source, device.type, dtype, reporter)
    digest = weights_sha256(policy.model)
    if before:
        if before["start_weights_sha256"] != digest:
            raise UsageError(
                f'model.name = "{recipe.model.name}": its weights are not those that this run began with; put them '
                "back, or start again with --out"
            )
        return policy, before["chosen"]
    longest = max(len(prompt.token_ids) for prompt in prompts)
    wanted = max(
        recipe.sampling.prompts_per_step * recipe.sampling.group_size,
        recipe.evaluation.questions if recipe.evaluation else 1,
    )
    chosen = {
        "device": device.type,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "slots": choose_slots(policy, longest, max_tokens, wanted),
        "micro_batch_tokens": choose_budget(policy),
    }
    run.start(recipe)
    run.write_json("environment.json", {**describe(device), "chosen": chosen, "start_weights_sha256": digest})
    return policy, chosen
