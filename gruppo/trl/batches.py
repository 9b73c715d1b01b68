"""TRL's batch arithmetic: completions per device, accumulation and epochs as prompts × group size and steps.

TRL counts optimizer steps. gruppo counts steps of sampling, each with one or more optimizer steps.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from gruppo.errors import UsageError
from gruppo.trl.configs import GRPOConfig, RLOOConfig, TrainingArguments

OnlineConfig = GRPOConfig | RLOOConfig


@dataclass(frozen=True)
class Batches:
    """What one step of gruppo is.

    `prompts` × `group` completions are sampled in a step, which has `iterations` × `minibatches` optimizer steps.
    `sentence`: how the numbers come about.
    """

    prompts: int
    group: int
    minibatches: int
    iterations: int
    sentence: str

    @property
    def updates(self) -> int:
        """Optimizer steps of TRL per step of gruppo."""
        return self.minibatches * self.iterations

    def steps(self, trl_steps: float) -> int:
        """Steps of gruppo that have at least this number of optimizer steps, at least 1."""
        return max(1, math.ceil(trl_steps / self.updates))

    def steps_of_epochs(self, epochs: float, rows: int) -> int:
        """Steps of gruppo in `epochs` passes over `rows` rows. As in TRL, the prompts of a pass that do not fill a step
        are left out, unless there are fewer in all."""
        return max(1, math.ceil(epochs * max(1, rows // self.prompts)))


def batches_of(args: TrainingArguments) -> Batches:
    """The batches of a trainer's arguments. Raises UsageError where TRL refuses them, and for more than one process."""
    processes = int(os.environ.get("WORLD_SIZE", "1") or 1)
    if processes > 1:
        raise UsageError(
            f"WORLD_SIZE = {processes}: a run is one process, which uses one device; start the script with python, and "
            f"multiply gradient_accumulation_steps by {processes} for the same batch"
        )
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise UsageError(f"{name} = {getattr(args, name)}: must be at least 1")
    if isinstance(args, OnlineConfig):
        return _online(args)
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    sentence = (
        f"per_device_train_batch_size {args.per_device_train_batch_size} × gradient_accumulation_steps "
        f"{args.gradient_accumulation_steps} = {rows} rows per step"
    )
    return Batches(rows, 1, 1, 1, sentence)


def _online(args: OnlineConfig) -> Batches:
    """The batches of a trainer that samples."""
    device, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    group, iterations = args.num_generations or 0, args.num_iterations
    if group < 2 or iterations < 1:
        name, value, least = ("num_generations", group, 2) if group < 2 else ("num_iterations", iterations, 1)
        raise UsageError(f"{name} = {value}: must be at least {least}")
    per_generation, how = _steps_per_generation(args)
    completions = device * per_generation
    if completions % group:
        raise UsageError(
            f"num_generations = {group}: does not divide the {completions} completions of a generation batch ({how}); "
            "write a batch that is a multiple of it"
        )
    minibatches = 1
    if per_generation % accumulation == 0:
        minibatches = per_generation // accumulation
    elif accumulation % per_generation == 0 and iterations == 1:
        completions = device * accumulation  # several generation batches of one policy make one update
        how = f"per_device_train_batch_size {device} × gradient_accumulation_steps {accumulation}"
    else:
        raise UsageError(
            f"steps_per_generation = {per_generation}: with gradient_accumulation_steps = {accumulation} and "
            f"num_iterations = {iterations}, an update would use parts of two generation batches; write a multiple of "
            f"gradient_accumulation_steps"
        )
    prompts = completions // group
    parts = f", in {minibatches} minibatches" if minibatches > 1 else ""
    again = f", used {iterations} times" if iterations > 1 else ""
    sentence = f"{how} = {completions} completions per step = {prompts} prompts × {group} generations{parts}{again}"
    return Batches(prompts, group, minibatches, iterations, sentence)


def _steps_per_generation(args: OnlineConfig) -> tuple[int, str]:
    """Passes per generation batch, and how many completions that makes, in words."""
    device, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    start = f"per_device_train_batch_size {device}"
    if args.generation_batch_size is None:
        if args.steps_per_generation is None:
            return accumulation, f"{start} × gradient_accumulation_steps {accumulation}"
        return args.steps_per_generation, f"{start} × steps_per_generation {args.steps_per_generation}"
    if args.steps_per_generation is not None:
        raise UsageError(
            f"generation_batch_size = {args.generation_batch_size}: steps_per_generation = {args.steps_per_generation} "
            "says the same; write only one of them"
        )
    if args.generation_batch_size % device:
        raise UsageError(
            f"generation_batch_size = {args.generation_batch_size}: must be a multiple of "
            f"per_device_train_batch_size = {device}"
        )
    return args.generation_batch_size // device, f"generation_batch_size {args.generation_batch_size}"
