"""A plan for a recipe on given devices: placements with their times, memory, and what to change."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from gruppo.config.recipe import Recipe
from gruppo.errors import UsageError
from gruppo.planning.assumptions import Assumptions
from gruppo.planning.devices import Cluster
from gruppo.planning.lengths import lengths_with_mean
from gruppo.planning.placement import (
    Kind,
    Placement,
    Work,
    best_placement,
    engine_memory,
    engine_sizes,
    fewest_trainers,
    trainer_parts,
)
from gruppo.planning.published import Comparison, compare_published
from gruppo.planning.sampling import Engine
from gruppo.planning.shape import ModelShape
from gruppo.planning.trainer import Passes, rank_memory, training_state


@dataclass(frozen=True)
class Plan:
    """What a recipe will take on a cluster.

    `placements`: the best of each kind that fits, fastest first. `chosen`: the fastest, on several devices of those
    with engines apart; None if none fits. `trainer_bytes`: of one rank of the chosen placement, by part.
    `engine_bytes`: of one device of an engine: weights, and the cache of concurrent completions. `problems`: what
    does not fit, each with what to change. `notes`: what the plan leaves out.
    """

    recipe: Recipe
    shape: ModelShape
    cluster: Cluster
    assumptions: Assumptions
    work: Work
    placements: tuple[Placement, ...]
    chosen: Placement | None
    trainer_bytes: dict[str, float]
    engine_bytes: dict[str, float]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @cached_property
    def checked(self) -> list[Comparison]:
        """Published runs, predicted with the same assumptions."""
        return compare_published(self.assumptions)

    @property
    def assumed(self) -> dict[str, dict[str, Any]]:
        """Value, unit, meaning and source of each assumption, also of those that follow from the recipe or device."""
        given = {"slots": self.cluster.device.slots, "mean_tokens": self.work.lengths.mean}
        named = self.assumptions.named()
        return {
            name: {**each, "value": given[name] if each["value"] is None else each["value"]}
            for name, each in named.items()
        }

    @property
    def total_seconds(self) -> float | None:
        """Seconds of all steps, without evaluations; None if nothing fits."""
        return None if self.chosen is None else self.chosen.step * self.recipe.run.steps

    @property
    def settings(self) -> dict[str, int]:
        """The numbers of trainers, engines, devices per engine, and steps that sampling is ahead."""
        if self.chosen is None:
            return {}
        apart = self.chosen.kind != "colocated"
        return {
            "trainers": self.chosen.trainers,
            "engines": self.chosen.engines if apart else 0,
            "engine_devices": self.chosen.engine_devices if apart else 1,
            "lag": int(self.chosen.kind == "ahead"),
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain values, in seconds, bytes and tokens."""
        return {
            "model": asdict(self.shape),
            "devices": {**asdict(self.cluster), "total": self.cluster.devices},
            "work": {
                "completions": self.work.completions if self.work.sampled else 0,
                "mean_tokens": self.work.lengths.mean,
                "training_tokens": self.work.training_tokens,
                "scores": self.work.passes.scores,
                "updates": self.work.passes.updates,
                "recompute": self.work.passes.recompute,
            },
            "placements": [_times(placed) for placed in self.placements],
            "settings": self.settings,
            "step_seconds": None if self.chosen is None else self.chosen.step,
            "total_seconds": self.total_seconds,
            "trainer_bytes": self.trainer_bytes,
            "engine_bytes": self.engine_bytes,
            "transfer_bytes": self.shape.weight_bytes,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "assumptions": self.assumed,
            "published": [{"name": run.name, "source": run.source, "error": run.error()} for run in self.checked],
        }


def _times(placed: Placement) -> dict[str, Any]:
    idle_trainers, idle_engines = placed.idle
    return {
        "kind": placed.kind,
        "trainers": placed.trainers,
        "engines": placed.engines,
        "engine_devices": placed.engine_devices,
        "step_seconds": placed.step,
        "sampling_seconds": placed.sampling_seconds,
        "tail_seconds": 0.0 if placed.sampling is None else placed.sampling.tail,
        "running": 0 if placed.sampling is None else placed.sampling.running,
        "score_seconds": placed.training.scores,
        "update_seconds": placed.training.updates,
        "transfer_seconds": placed.transfer,
        "idle_trainers": idle_trainers,
        "idle_engines": idle_engines,
        "bottleneck": placed.bottleneck,
    }


def make_plan(recipe: Recipe, shape: ModelShape, cluster: Cluster, assumptions: Assumptions) -> Plan:
    """Plan a recipe. Raises UsageError if the recipe computes in another format than bfloat16, or for lengths that
    contradict it."""
    if recipe.model.dtype not in {"auto", "bfloat16"}:
        raise UsageError(
            f'model.dtype = "{recipe.model.dtype}": plan knows the rates of bfloat16 only; add --set '
            "model.dtype=bfloat16"
        )
    work = _work(recipe, shape, cluster, assumptions)
    kinds: list[Kind] = ["colocated"]
    if cluster.devices > 1 and work.sampled:
        kinds += ["synchronous", "ahead"]
    found = [best_placement(shape, cluster, work, assumptions, kind) for kind in kinds]
    placements = sorted((placed for placed in found if placed is not None), key=lambda placed: placed.step)
    ours = [placed for placed in placements if placed.kind != "colocated" or cluster.devices == 1 or not work.sampled]
    chosen = ours[0] if ours else None
    if chosen is None:
        parts, engine_parts = trainer_parts(shape, work, assumptions, max(1, cluster.devices - 1)), {}
    else:
        parts = trainer_parts(shape, work, assumptions, chosen.trainers)
        engine_parts = _engine_parts(shape, cluster, work, chosen) if chosen.sampling else {}
    problems = () if chosen else tuple(_problems(shape, cluster, work, assumptions))
    notes = tuple(_notes(recipe, chosen, work))
    return Plan(
        recipe, shape, cluster, assumptions, work, tuple(placements), chosen, parts, engine_parts, problems, notes
    )


def _work(recipe: Recipe, shape: ModelShape, cluster: Cluster, assumed: Assumptions) -> Work:
    """The work of a step of the recipe."""
    sampling, method, lora = recipe.sampling, recipe.method, recipe.model.lora
    sampled = method.source != "dataset"
    completions = sampling.prompts_per_step * (sampling.group_size if sampled else 1)
    mean = assumed.mean_tokens or assumed.mean_share * sampling.max_tokens
    if mean > sampling.max_tokens:
        raise UsageError(
            f"--mean-tokens {mean:g}: must be at most sampling.max_tokens = {sampling.max_tokens}; write a smaller "
            "number, or add --set sampling.max_tokens=NUMBER"
        )
    critics = int(method.needs_critic)
    scores = (method.needs_reference and (method.kl_coef > 0 or method.credit == "pair")) + critics
    scores += int(method.needs_scores or method.minibatches > 1)  # the policy before the step
    state = training_state(shape, 1 + critics, method.needs_reference, lora.rank if lora else None)
    copies = sampling.prompts_per_step if sampled else completions
    lengths = lengths_with_mean(mean, sampling.max_tokens, assumed.spread)

    def work(recompute: bool) -> Work:
        passes = Passes(scores, method.inner_updates * (1 + critics), recompute, frozen=lora is not None)
        return Work(
            completions, sampling.prompts_per_step, copies, assumed.prompt_tokens, sampling.max_tokens, lengths, passes,
            state, sampled,
        )  # fmt: skip

    whole = work(recompute=False)
    alone = cluster.devices == 1 and sum(trainer_parts(shape, whole, assumed, 1).values()) <= rank_memory(cluster)
    return whole if alone else work(recompute=True)


def _engine_parts(shape: ModelShape, cluster: Cluster, work: Work, chosen: Placement) -> dict[str, float]:
    """Bytes of one device of an engine: weights, and the cache of concurrent completions."""
    assert chosen.sampling is not None
    context = work.lengths.mean_context(work.prompt)
    cache = chosen.sampling.running * context * shape.cache_bytes / chosen.engine_devices
    return {"weights": shape.weight_bytes / chosen.engine_devices, "cache": cache}


def _problems(shape: ModelShape, cluster: Cluster, work: Work, assumed: Assumptions) -> list[str]:
    """Why nothing fits, and what to change."""
    device, found = cluster.device, []
    own = cluster.devices - 1 if work.sampled and cluster.devices > 1 else cluster.devices
    fixed = sum(size for name, size in trainer_parts(shape, work, assumed, own).items() if name != "state")
    needed = fewest_trainers(shape, cluster, work, assumed)
    if needed is None:
        found.append(
            f"a micro-batch: {fixed / 1e9:.1f} GB of activations and weights on a device of {device.memory / 1e9:.0f} "
            "GB; add --micro-batch-tokens with a smaller number, lower sampling.max_tokens, or use devices with more "
            "memory"
        )
    elif needed > own:
        found.append(
            f"the training state: {work.state.bytes / 1e9:.0f} GB, {work.state.bytes / own / 1e9:.1f} GB on each of "
            f"{own} devices beside {fixed / 1e9:.1f} GB of activations and weights; use at least {needed} devices of "
            "this kind for training, devices with more memory, or [model.lora]"
        )
    if work.sampled:
        largest = engine_sizes(cluster)[-1]
        memory = engine_memory(cluster, assumed)
        engine = Engine(shape, device, largest, memory, assumed)
        if engine.slots(work.prompt + work.longest) < 1:
            longest = (work.prompt + work.longest) * shape.cache_bytes
            found.append(
                f"an engine: {shape.weight_bytes / 1e9:.0f} GB of weights and {longest / 1e9:.1f} GB of cache for one "
                f"completion of maximum length on {largest} devices with {memory / 1e9:.0f} GB each; use machines with "
                "more devices, devices with more memory, or lower sampling.max_tokens"
            )
    return found or [
        "trainers and engines beside each other: each of them fits, but not both; use more devices, or [model.lora]"
    ]


def _notes(recipe: Recipe, chosen: Placement | None, work: Work) -> list[str]:
    """What the plan leaves out, or takes for granted."""
    notes = []
    if chosen is not None and chosen.kind == "ahead" and not recipe.method.tis_cap:
        notes.append("cluster.lag = 1 needs method.tis_cap, e.g. --set method.tis_cap=2")
    if recipe.optimizer.state != "float32" or (recipe.model.lora and recipe.model.lora.base == "4bit"):
        notes.append('the memory saved by optimizer.state and by model.lora.base = "4bit" is not counted')
    if recipe.method.dynamic_sampling_rounds:
        notes.append(
            "method.dynamic_sampling_rounds: each additional round takes up to the time of sampling; none is counted"
        )
    if recipe.environment is not None:
        notes.append("[environment]: the time of its answers is not counted")
    if recipe.reward_model is not None:
        notes.append("[reward_model]: its training and scoring are not counted")
    if recipe.evaluation is not None or recipe.benchmarks:
        notes.append("evaluations are not counted")
    if recipe.run.epochs is not None:
        notes.append(
            f"run.epochs: its number of steps is not known here; the total is that of {recipe.run.steps} steps"
        )
    return notes
