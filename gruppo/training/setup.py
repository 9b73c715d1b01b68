"""Builds the parts of a run from its recipe and its data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gruppo.config.engine_section import Engine as EngineTable
from gruppo.config.labels import options_name
from gruppo.config.recipe import Recipe
from gruppo.config.resume import MEMORY
from gruppo.config.sections import Audit
from gruppo.data.chat_template import end_renderer, template_time
from gruppo.data.mixture import Mixture
from gruppo.data.offline import OfflineCompletions
from gruppo.data.tokenization import data_sha256
from gruppo.engines import NATIVE, build_engine, check_engine
from gruppo.engines.base import Engine, SamplingParams
from gruppo.engines.memory import Free
from gruppo.engines.resizing import ResizingEngine
from gruppo.errors import UsageError
from gruppo.evaluation.datasets import Data
from gruppo.evaluation.sets import EvalSet
from gruppo.models.attention.backends import check_compute
from gruppo.models.loading import ModelSource, find_like, find_model, load_model
from gruppo.models.lora import add_adapters, check_adapters
from gruppo.models.ops.cpu.build import NO_KERNELS, kernels_sha256
from gruppo.models.policy import LanguageModel
from gruppo.models.precision import choose_device, choose_dtype
from gruppo.models.ranks import ALONE, Loaded, Ranks
from gruppo.models.reward_model import NAME, check_kind
from gruppo.models.weights import named_weights, save_base, save_weights, weights_sha256
from gruppo.rewards import RewardFunction
from gruppo.rewards.steps import find_split
from gruppo.rollout.episodes import Episodes, Opened
from gruppo.rollout.multi_turn import open_multi_turn
from gruppo.rollout.workers.process import Launcher
from gruppo.rollout.workers.rewards import RewardPool, Rewards, memory_per_process
from gruppo.runs.folder import REWARD_CACHE, START_TIME, RunFolder, check_folder, checkpoint_folders, start_time
from gruppo.training.changes import Changes
from gruppo.training.disk_estimate import still_needed
from gruppo.training.identity import require_same, require_same_reward_model, require_whole
from gruppo.training.inputs import RunInputs, tokenize_data, with_steps, workload
from gruppo.training.lean_optimizers import check_state
from gruppo.training.lost_ranks import LostRanks
from gruppo.training.models import TrainedModels, chosen_policy, distribute, load_critic, load_scorer
from gruppo.training.policy_loss import find_surrogate
from gruppo.training.sizing import choose_for_run, disk_of
from gruppo.utils.oom_retry import BatchSizes
from gruppo.utils.progress import Progress
from gruppo.utils.system import describe
from gruppo.utils.waiting import waiting_for

if TYPE_CHECKING:
    from gruppo.engines.fleet.fleet import Fleet
    from gruppo.rollout.hosts.hosts import Hosts


@dataclass(frozen=True)
class Local:
    """Objects of the caller that a run uses in this process, in place of worker processes.

    `rewards`: makes what scores completions, from the names of the columns that every row has; None for worker
    processes. `opened`: the recipe's [environment]. `ready`: is called with the run's parts before its first step.
    """

    rewards: Callable[[Sequence[str]], Rewards] | None
    opened: Opened | None
    ready: Callable[[RunComponents], None]


@dataclass
class RunComponents:
    """The parts of a run that is ready to start.

    `sampler`: the engine that samples completions: the policy's `engine`, or an engine of the initial model. `offline`:
    the completions that dataset rows bring, by prompt id; there is no `pool` then. `audit`: the second grader's pool.
    `changes`: what has changed since the run was started or last resumed. `filtered`: how many rows of each task were
    left out as too long. `episodes`: the sampler of a recipe with an environment. `ranks`: those that train. `copies`:
    of the policy, for weights that the engine loads later; see `gruppo.rollout.ahead`. `fleet`: what `engine` and
    `sampler` are, if the recipe has several engines. `lost_ranks`: those that the run continues after. `hosts`: where
    rewards and environments run, None for this machine.
    """

    recipe: Recipe
    run: RunFolder
    models: TrainedModels
    engine: Engine
    sampler: Engine
    pool: Rewards | None
    prompts: Mixture
    offline: Mapping[str, OfflineCompletions]
    eval_sets: list[EvalSet]
    audit: RewardPool | None
    sizes: BatchSizes
    sampling: SamplingParams
    changes: Changes
    filtered: dict[str, int]
    episodes: Episodes | None = None
    ranks: Ranks = ALONE
    copies: Sequence[LanguageModel] = ()
    fleet: Fleet | None = None
    lost_ranks: LostRanks = field(default_factory=LostRanks)
    hosts: Hosts | None = None

    @property
    def policy(self) -> LanguageModel:
        """The policy that is trained."""
        return self.models.policy

    @property
    def samples_policy(self) -> bool:
        """Whether steps sample with `engine`. Otherwise, only evaluations do."""
        return self.pool is not None and self.sampler is self.engine


def prepare(
    recipe: Recipe,
    folder: Path,
    resume: bool,
    rewards: Sequence[str | RewardFunction],
    data: Data,
    progress: Progress,
    stack: ExitStack,
    model: tuple[PreTrainedModel, PreTrainedTokenizerBase | None] | None = None,
    links_to: Path | None = None,
    local: Local | None = None,
    ranks: Ranks = ALONE,
) -> RunComponents:
    """Build a run from its recipe and its data.

    `model`: a model in memory with its tokenizer, in place of the recipe's. `links_to`: see `check_folder`; such a run
    samples nothing. `local`: objects of the caller that replace worker processes. `ranks`: those that train, of which
    this is the leader. `stack` closes processes and locks. Raises UsageError, if possible before weights are loaded.
    """
    plays = links_to is None
    device, dtype = check_compute(recipe.model)
    check_state(recipe.optimizer.state)
    if plays:
        check_engine(recipe, device, dtype)
    find_surrogate(recipe.method.surrogate)
    run, started = _open_folder(recipe, folder, resume, links_to, stack)
    reward_settings = recipe.reward_model
    if reward_settings is not None:
        find_split(reward_settings.split)
    hosts = _open_hosts(recipe, device, progress, stack) if plays and local is None else None
    opened, pool, audit = _open_rewards(recipe, rewards, data, folder, progress, stack, plays, local, hosts)
    if reward_settings is not None and pool is not None and NAME in pool.names:
        raise UsageError(
            f'reward.functions: one is called "{NAME}", the name of the part that [reward_model] adds; rename it'
        )
    start_model, tokenizer = model or (recipe.model.name, None)
    with waiting_for(f"the files of {recipe.model.name}"):
        source = find_model(start_model, progress, tokenizer, recipe.model.trust_remote_code)
    check_adapters(source, recipe.model.lora)
    critic_source = None
    if recipe.method.needs_critic:
        critic_source = find_like(recipe.critic.name, "critic.name", source, progress)
    reward_source = None
    if reward_settings is not None:
        reward_source = find_like(reward_settings.name, "reward_model.name", source, progress)
        check_kind(reward_source.config, reward_settings.kind)
    inputs = tokenize_data(recipe, data, source, progress, opened)
    recipe = with_steps(recipe, inputs, progress)
    changes = Changes(check_folder(folder, recipe, resume, links_to=links_to))
    code = _code(pool, rewards, opened, recipe)
    policy, chosen = _load_policy(recipe, run, source, inputs, code, changes, started, progress)
    critic = scorer = None
    if critic_source is not None:
        critic = load_critic(recipe, critic_source, policy, chosen["dtype"], progress)
    if reward_source is not None:
        scorer = load_scorer(recipe, reward_source, policy, chosen["dtype"], progress)
        require_same_reward_model(run, weights_sha256(scorer.module))
    loaded = Loaded(policy, critic, scorer)
    ranks.begin(recipe, chosen, loaded)
    lag = recipe.lag if plays else 0
    fleets = recipe.cluster is not None and recipe.cluster.engines > 0
    models = distribute(recipe, loaded, ranks, apart=lag > 0 and (fleets or recipe.engine.name == "native"))
    work = workload(recipe, inputs)
    sizes = BatchSizes(chosen["micro_batch_tokens"], chosen["slots"], work.smallest, retries=ranks.size == 1)
    fleet = _open_fleet(models.sampled, recipe, sizes, work.longest, folder, progress, stack) if plays else None
    engine, sampler = _engines(models, sizes, recipe.engine if plays else NATIVE, work.longest, fleet, stack)
    parts = RunComponents(
        recipe=recipe,
        run=run,
        models=models,
        engine=engine,
        sampler=sampler,
        pool=pool,
        prompts=inputs.prompts,
        offline=inputs.offline,
        eval_sets=inputs.eval_sets,
        audit=audit,
        sizes=sizes,
        sampling=inputs.sampling,
        changes=changes,
        filtered=inputs.filtered,
        episodes=opened.episodes(policy.tokenizer, policy.eos_ids, inputs.all_prompts) if opened else None,
        ranks=ranks,
        copies=[models.sampled.sampling_copy() for _ in range(lag - 1)],
        fleet=fleet,
        hosts=hosts,
    )
    if local is not None:
        local.ready(parts)
    return parts


def _engines(
    models: TrainedModels,
    sizes: BatchSizes,
    settings: EngineTable,
    length: int,
    fleet: Fleet | None,
    stack: ExitStack,
) -> tuple[Engine, Engine]:
    """The engine of the policy, and the one that samples completions: of the initial policy, or else the same.

    They sleep until they are used: a second one may need the memory of the first one.
    """
    if fleet is not None:
        return (ResizingEngine(fleet, sizes),) * 2
    engines = []
    for model in (models.sampled,) if models.initial is None else (models.sampled, models.initial):
        engines.append(build_engine(model, sizes.slots, sizes, settings, length))
        stack.callback(engines[-1].close)
        engines[-1].sleep()
    return engines[0], engines[-1]


def _open_fleet(
    policy: LanguageModel,
    recipe: Recipe,
    sizes: BatchSizes,
    length: int,
    folder: Path,
    progress: Progress,
    stack: ExitStack,
) -> Fleet | None:
    """The engines of a recipe with cluster.engines, else None. Ray is imported only for them."""
    if recipe.cluster is None or not recipe.cluster.engines:
        return None
    from gruppo.engines.fleet.opening import open_fleet

    with progress.bar("Starting engines", None, ""):
        return open_fleet(policy, recipe, sizes.slots, length, folder, stack)


def _open_hosts(recipe: Recipe, device: torch.device, progress: Progress, stack: ExitStack) -> Hosts | None:
    """The hosts of a recipe with cluster.reward_hosts, else None. Ray is imported only for them."""
    if recipe.cluster is None or not recipe.cluster.reward_hosts:
        return None
    from gruppo.rollout.hosts.opening import open_hosts

    with progress.bar("Starting reward hosts", None, ""):
        return open_hosts(recipe, device.type == "cuda", stack)


def _open_rewards(
    recipe: Recipe,
    rewards: Sequence[str | RewardFunction],
    data: Data,
    folder: Path,
    progress: Progress,
    stack: ExitStack,
    played: bool,
    local: Local | None,
    hosts: Hosts | None,
) -> tuple[Opened | None, Rewards | None, RewardPool | None]:
    """What answers and scores completions: environments, reward functions and audit, None for what a recipe lacks.

    `played`: False if nothing will be sampled. `local`: see `prepare`. `hosts`: see `RunComponents`.
    """
    opened = None if local is None else local.opened
    if opened is None:
        opened = open_multi_turn(recipe, folder / "environment.log", progress, stack, played, hosts)
    pool: Rewards | None = None
    log = folder / "rewards.log"
    if recipe.method.source != "dataset":
        here = None if local is None else local.rewards
        pool = here(data.columns) if here else make_pool(recipe, rewards, data, log, progress, opened, hosts)
        stack.callback(pool.close)
    audit = None
    if recipe.audit is not None:
        audit = stack.enter_context(_audit_pool(recipe, recipe.audit, data, log, progress, hosts))
    return opened, pool, audit


def _open_folder(
    recipe: Recipe, folder: Path, resume: bool, links_to: Path | None, stack: ExitStack
) -> tuple[RunFolder, datetime]:
    """The run folder, locked, and the time at which the run was started, which its chat templates print."""
    run = RunFolder(folder)
    stack.callback(run.close)
    # Check again: another run may have used the folder before this one got the lock.
    check_folder(folder, recipe, resume, links_to=links_to)
    started = start_time(folder)
    stack.callback(end_renderer)
    stack.enter_context(template_time(started))
    return run, started


def make_pool(
    recipe: Recipe,
    rewards: Sequence[str | RewardFunction],
    data: Data,
    log: Path,
    progress: Progress,
    opened: Opened | None = None,
    hosts: Hosts | None = None,
) -> RewardPool:
    """The reward processes of a recipe; none if its environment alone gives the reward. `hosts`: see `RunComponents`.

    Raises UsageError if a reward function cannot be used on the data.
    """
    settings = recipe.reward
    limits = memory_per_process(settings), settings.environment, progress
    workers = 0 if opened is not None and opened.gives_reward and not rewards else settings.workers
    return RewardPool(
        rewards,
        settings.weights,
        data.columns,
        settings.timeout,
        workers,
        log,
        settings.options,
        *limits,
        data.partial_columns,
        cache=log.with_name(REWARD_CACHE),
        launcher=_launcher(recipe, log, hosts),
    )


def _launcher(recipe: Recipe, log: Path, hosts: Hosts | None) -> Launcher | None:
    """What starts the processes of rewards on hosts, with the limit of memory that holds on their machines."""
    return None if hosts is None else hosts.launcher(log, partial(memory_per_process, recipe.reward))


def _audit_pool(
    recipe: Recipe, settings: Audit, data: Data, log: Path, progress: Progress, hosts: Hosts | None
) -> RewardPool:
    rewards, options = recipe.reward, {options_name(settings.function): settings.options} if settings.options else {}
    limits = memory_per_process(rewards), rewards.environment, progress
    try:
        return RewardPool(
            [settings.function],
            [],
            data.columns,
            rewards.timeout,
            1,
            log,
            options,
            *limits,
            field="audit.function",
            cache=log.with_name(REWARD_CACHE),
            launcher=_launcher(recipe, log, hosts),
        )
    except UsageError as error:
        text = str(error).replace("reward.functions", "audit.function").replace("reward.options", "audit.options")
        raise UsageError(text) from None


@dataclass(frozen=True)
class _Code:
    """Code that users bring: names and hashes of the `rewards`, then of the environment."""

    names: list[str]
    digests: list[str]
    rewards: Sequence[str | RewardFunction]


def _code(
    pool: Rewards | None,
    rewards: Sequence[str | RewardFunction],
    opened: Opened | None,
    recipe: Recipe,
) -> _Code:
    digests, names = (pool.digests, pool.names) if pool and pool.digests else ([], [])
    environments = opened.digests if opened else []
    called = recipe.environment.name if recipe.environment else ""
    known = rewards if digests else ()
    return _Code([*names, *[called] * len(environments)], [*digests, *environments], known)


def _load_policy(
    recipe: Recipe,
    run: RunFolder,
    source: ModelSource,
    inputs: RunInputs,
    code: _Code,
    changes: Changes,
    started: datetime,
    progress: Progress,
) -> tuple[LanguageModel, dict[str, Any]]:
    """Load the policy, and choose the settings that depend on the machine; a resumed run keeps its settings.

    Returns the policy and the settings. What has changed since the run was started or last resumed is added to
    `changes`.
    """
    before = run.read_json("environment.json")
    if before is None and checkpoint_folders(run.path):
        raise UsageError(
            f"{run.path}: environment.json, which records what the run chose at its start, is missing; restore it, or "
            "start again with another --out"
        )
    if before:
        require_whole(before, run)
    chosen: dict[str, Any] = before["chosen"] if before else {}
    device = choose_device(chosen.get("device", recipe.model.device))
    dtype = chosen.get("dtype") or str(choose_dtype(recipe.model.dtype, device)).removeprefix("torch.")
    data, prompts = data_sha256(inputs.prompts, inputs.questions), data_sha256(inputs.prompts, ())
    if before:
        changes.check_data(before, data, prompts)
    free = Free.now(recipe.run.memory, device)
    # `attention` and `recompute` are missing in runs from before the options existed.
    policy = load_model(source, device.type, dtype, progress, chosen.get("attention", recipe.model.attention))
    weights = weights_sha256(policy.model)
    if before:
        require_same(before["start_weights_sha256"], weights, "weights of the initial model")
    unnamed_weights = named_weights(policy.model) if recipe.model.lora and source.given and not before else None
    policy = add_adapters(policy, recipe.model.lora, recipe.run.seed)
    if before:
        torch.set_num_threads(chosen["threads"])
        if changes.has(MEMORY):
            chosen = changes.choose_sizes(before, choose_for_run(free, recipe, policy, inputs, progress))
        if changes.resizes_folder:
            has_weights = (run.path / "base" / "model.safetensors").is_file()
            changes.environment["disk_forecast"] = disk_of(recipe, policy, inputs, has_weights).as_dict()
        forecast = changes.environment.get("disk_forecast", before.get("disk_forecast"))
        if forecast and (warning := still_needed(run.path, forecast)):
            progress.note(f"Note: {warning}")
        changes.compare_code(before["rewards_sha256"], code.digests, code.names, code.rewards)
        if chosen.get("kernels", NO_KERNELS) != kernels_sha256(policy.dtype):
            changes.lasting.append(
                "the compiled kernels are not those that the run started with: rounding differs from here on"
            )
        return chosen_policy(policy, recipe, chosen), chosen
    changes.found.clear()  # a run that was killed while it started has done nothing
    sizes = choose_for_run(free, recipe, policy, inputs, progress)
    disk = disk_of(recipe, policy, inputs, start_weights=unnamed_weights is not None)
    if warning := disk.require(run.path):
        progress.note(f"Note: {warning}")
    chosen = {
        "device": device.type,
        "dtype": dtype,
        "attention": policy.attention.name,
        "threads": torch.get_num_threads(),
        "kernels": kernels_sha256(policy.dtype),
        "slots": sizes.slots,
        "micro_batch_tokens": sizes.micro_batch_tokens,
        "recompute": sizes.recompute,
        "memory_budget_bytes": sizes.budget_bytes,
    }
    run.start(recipe)
    with run.building("base") as folder:
        save_base(policy, folder)
        if unnamed_weights is not None:  # checkpoints hold only the adapters, and no name identifies these weights
            save_weights(unnamed_weights, folder)
    counts = {"prompts": len(inputs.prompts), "questions": len(inputs.questions)}
    identity: dict[str, Any] = {"start_weights_sha256": weights, "data_sha256": data, "prompts_sha256": prompts}
    identity["rewards_sha256"] = code.digests
    environment = {**describe(device), "chosen": chosen, "memory_forecast": sizes.memory.as_dict()}
    environment["disk_forecast"] = disk.as_dict()
    environment[START_TIME] = started.isoformat()
    run.write_json("environment.json", {**environment, **counts, **identity})
    return chosen_policy(policy, recipe, chosen), chosen
