"""Everything that a run needs, after `preflight`, from the cheapest to the dearest: rewards, tokens, weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gruppo.algorithms.credit import find_surrogate
from gruppo.config.recipe import Audit, Optimizer, Recipe, as_bytes
from gruppo.config.recipe import Reward as RewardSettings
from gruppo.data.datasets import Data
from gruppo.data.loading import Part, ToolTexts, tokenize_part
from gruppo.data.mixture import Mixture
from gruppo.data.offline import Given, given_completions
from gruppo.engines.base import Engine, SamplingOptions
from gruppo.engines.native.engine import NativeEngine
from gruppo.errors import UsageError
from gruppo.evaluation.sets import Exam, make_exam
from gruppo.models.lora import add_adapters, check_adapters
from gruppo.models.ops.cpu.build import NO_KERNELS, kernels_sha256
from gruppo.models.policy import (
    LanguageModel,
    ModelSource,
    choose_device,
    choose_dtype,
    find_model,
    load_model,
    named_weights,
    save_base,
    save_weights,
    weights_sha256,
)
from gruppo.models.reward_model import NAME, check_kind, load_reward_model
from gruppo.models.value_head import ScalarModel
from gruppo.rewards import RewardFunction
from gruppo.rewards.steps import find_split
from gruppo.rollout.multi_turn import Episodes, Opened, open_episodes
from gruppo.rollout.workers.limits import machine_memory
from gruppo.rollout.workers.rewards import RewardPool
from gruppo.runs.folder import RunFolder, check_folder, checkpoint_folders
from gruppo.runs.reading import reading
from gruppo.runs.tables import as_json
from gruppo.training.disk_estimate import Disk, exam_count, forecast_disk, still_needed
from gruppo.training.memory_estimate import (
    Answering,
    Chosen,
    Workload,
    budget_bytes,
    choose_sizes,
    measure_footprint,
    process_bytes,
)
from gruppo.training.oom_retry import FittingEngine, Sizes
from gruppo.types import Prompt
from gruppo.utils.progress import Reporter
from gruppo.utils.system import describe


@dataclass
class Prepared:
    """A run that is ready to begin.

    `sampler`: what completions are drawn from, the policy's `engine` or one of the start model. `given`: by prompt id
    the completions that rows bring; then there is no `pool`. `critic`: the value model, of PPO only. `reward_model`
    has a `reward_optimizer` where it is trained. `audit`: the second grader's pool. `episodes`: what samples where the
    recipe has an environment. `changes`: what is no longer
    as it was when the run began, in words; `filtered`: how many rows of each task were left out as too long.
    """

    recipe: Recipe
    run: RunFolder
    policy: LanguageModel
    reference: LanguageModel | None
    engine: Engine
    sampler: Engine
    pool: RewardPool | None
    prompts: Mixture
    given: Mapping[str, Given]
    exams: list[Exam]
    optimizer: torch.optim.Optimizer
    critic: ScalarModel | None
    critic_optimizer: torch.optim.Optimizer | None
    reward_model: ScalarModel | None
    reward_optimizer: torch.optim.Optimizer | None
    audit: RewardPool | None
    sizes: Sizes
    sampling: SamplingOptions
    changes: list[str]
    filtered: dict[str, int]
    episodes: Episodes | None = None


def prepare(
    recipe: Recipe,
    folder: Path,
    resume: bool,
    rewards: Sequence[str | RewardFunction],
    data: Data,
    reporter: Reporter,
    stack: ExitStack,
    model: tuple[PreTrainedModel, PreTrainedTokenizerBase | None] | None = None,
    links_to: Path | None = None,
) -> Prepared:
    """Build a run from its recipe and its data; `model`: one in memory with its tokenizer, in place of the recipe's;
    `links_to`: see `check_folder`.
    Processes and locks are left to `stack`. Raises UsageError before weights are loaded wherever it can."""
    choose_dtype(recipe.model.dtype, choose_device(recipe.model.device))
    find_surrogate(recipe.method.surrogate)
    run = RunFolder(folder)
    stack.callback(run.close)
    # Again, as another run may have come and gone before the lock was ours.
    check_folder(folder, recipe, resume, links_to=links_to)
    pool, judge = None, recipe.reward_model
    opened = open_episodes(recipe, folder / "environment.log", reporter, stack, played=links_to is None)
    if recipe.method.source != "rows":
        log = folder / "rewards.log"
        pool = stack.enter_context(make_pool(recipe, rewards, data, log, reporter, opened))
    audit = None
    if recipe.audit is not None:
        audit = stack.enter_context(_audit_pool(recipe, recipe.audit, data, folder / "rewards.log", reporter))
    given, own = model or (recipe.model.name, None)
    source = find_model(given, reporter, own, recipe.model.trust_remote_code)
    check_adapters(source, recipe.model.lora)
    if judge is not None and pool is not None and NAME in pool.names:
        raise UsageError(f'reward.functions: one is called "{NAME}", as the part of [reward_model] is; rename it')
    critic_source = None
    if recipe.method.needs_critic:
        critic_source = find_like(recipe.critic.name, "critic.name", source, reporter)
    judge_source = None
    if judge is not None:
        find_split(judge.split)
        judge_source = find_like(judge.name, "reward_model.name", source, reporter)
        check_kind(judge_source.config, judge.kind)
    inputs = tokenize_data(recipe, data, source, reporter, opened)
    digests = [*(pool.digests if pool else []), *(opened.environments.digests if opened else [])]
    policy, chosen, changes = _load_policy(recipe, run, source, inputs, digests, reporter)
    policy = replace(policy, recompute=chosen.get("recompute", False))  # unsaid by runs from before there was a choice
    reference = policy.frozen_copy() if recipe.method.needs_reference else None
    least = workload(recipe, inputs).smallest
    sizes = Sizes(chosen["micro_batch_tokens"], chosen["slots"], least)
    engine = sampler = FittingEngine(NativeEngine(policy, sizes.slots), sizes)
    if recipe.method.source == "frozen":
        assert reference is not None
        sampler = FittingEngine(NativeEngine(reference, sizes.slots), sizes)
    critic = None
    if critic_source is not None:
        layers = load_model(critic_source, policy.device.type, chosen["dtype"], reporter)
        critic = ScalarModel.on(replace(layers, recompute=policy.recompute))
    reward_model = None
    if judge is not None and judge_source is not None:
        made = load_reward_model(judge_source, judge.kind, policy.device.type, chosen["dtype"], reporter)
        reward_model = replace(made, policy=replace(made.policy, recompute=policy.recompute))
        _require_same_judge(run, weights_sha256(reward_model.module))
    trained = reward_model is not None and judge is not None and judge.prompts > 0
    return Prepared(
        recipe=recipe,
        run=run,
        policy=policy,
        reference=reference,
        engine=engine,
        sampler=sampler,
        pool=pool,
        prompts=inputs.prompts,
        given=inputs.given,
        exams=inputs.exams,
        optimizer=make_optimizer(recipe.optimizer, policy.model),
        critic=critic,
        critic_optimizer=make_optimizer(recipe.optimizer, critic.module) if critic else None,
        reward_model=reward_model,
        reward_optimizer=make_optimizer(recipe.optimizer, reward_model.module) if reward_model and trained else None,
        audit=audit,
        sizes=sizes,
        sampling=inputs.sampling,
        changes=changes,
        filtered=inputs.filtered,
        episodes=opened.episodes(policy.tokenizer, policy.eos_ids, inputs.all_prompts) if opened else None,
    )


def make_pool(
    recipe: Recipe,
    rewards: Sequence[str | RewardFunction],
    data: Data,
    log: Path,
    reporter: Reporter,
    opened: Opened | None = None,
) -> RewardPool:
    """The reward processes of a recipe; none where its environment alone gives the reward. Raises UsageError where a
    reward cannot be used on its data."""
    own = recipe.reward
    confined = _memory_each(own), own.environment, reporter
    workers = 0 if opened is not None and opened.environments.gives_reward and not rewards else own.workers
    return RewardPool(rewards, own.weights, data.columns, own.timeout, workers, log, own.options, *confined)


def _audit_pool(recipe: Recipe, settings: Audit, data: Data, log: Path, reporter: Reporter) -> RewardPool:
    own, options = recipe.reward, {settings.function: settings.options} if settings.options else {}
    confined = _memory_each(own), own.environment, reporter
    try:
        return RewardPool([settings.function], [], data.columns, own.timeout, 1, log, options, *confined)
    except UsageError as error:
        text = str(error).replace("reward.functions", "audit.function").replace("reward.options", "audit.options")
        raise UsageError(text) from None


def _memory_each(settings: RewardSettings) -> int:
    """Bytes that one reward process may hold."""
    wanted = settings.memory
    whole = as_bytes(wanted) if isinstance(wanted, str) else int(wanted * machine_memory())
    return whole // settings.workers


@dataclass(frozen=True)
class Inputs:
    """What a run asks of its model: prompts to train on (with their completions, where rows bring them), how they are
    answered, and the exams that it holds."""

    prompts: Mixture
    given: Mapping[str, Given]
    exams: list[Exam]
    sampling: SamplingOptions
    filtered: dict[str, int]

    @property
    def questions(self) -> list[Prompt]:
        """Of all exams."""
        return [prompt for exam in self.exams for prompt in exam.prompts]

    @property
    def all_prompts(self) -> Iterator[Prompt]:
        """Those to train on and those to evaluate on."""
        return chain(self.prompts, self.questions)


def tokenize_data(
    recipe: Recipe, data: Data, source: ModelSource, reporter: Reporter, opened: Opened | None = None
) -> Inputs:
    """The prompts and questions of a recipe. Raises UsageError where one does not fit the model, or the grader."""
    limit = recipe.sampling.max_tokens
    tokens = _Tokens(source, reporter, opened.tools(source.tokenizer) if opened else None)
    parts = [tokens.of(part, limit) for part in data.training]
    given: dict[str, Given] = {}
    if recipe.method.source == "rows":
        parts = [
            tokens.answered(part, prompts, limit, recipe.method.credit == "pair", given)
            for part, prompts in zip(data.training, parts, strict=True)
        ]
    prompts = Mixture(parts, [task.weight for task in recipe.tasks], recipe.run.seed)
    exams = [make_exam(each, recipe, tokens.of) for each in data.exams]
    return Inputs(prompts, given, exams, SamplingOptions(recipe.sampling.temperature, limit), tokens.filtered)


def load_and_choose(
    recipe: Recipe, source: ModelSource, inputs: Inputs, device: torch.device, dtype: str, reporter: Reporter
) -> tuple[LanguageModel, Chosen]:
    """The policy, and the sizes under the recipe's budget."""
    free = Free.now(recipe, device)
    policy = add_adapters(load_model(source, device.type, dtype, reporter), recipe.model.lora, recipe.run.seed)
    return policy, free.choose(recipe, policy, inputs, reporter)


@dataclass(frozen=True)
class Free:
    """The budget of a recipe and what the process holds, in bytes, from before the weights are there."""

    budget: int
    process: int

    @classmethod
    def now(cls, recipe: Recipe, device: torch.device) -> Free:
        """As the machine is."""
        return cls(budget_bytes(recipe.run.memory, device), process_bytes(device))

    def choose(self, recipe: Recipe, policy: LanguageModel, inputs: Inputs, reporter: Reporter) -> Chosen:
        """The sizes for a policy with its adapters."""
        return choose_sizes(measure_footprint(policy, self.process, reporter), workload(recipe, inputs), self.budget)


def disk_of(recipe: Recipe, policy: LanguageModel, inputs: Inputs, start_weights: bool = False) -> Disk:
    """The disk of a run of this policy, with tables of rows like its first prompts'."""
    some = [prompt.token_ids for prompt in islice(inputs.prompts, 64)]
    return forecast_disk(recipe, policy, workload(recipe, inputs), some, start_weights)


def workload(recipe: Recipe, inputs: Inputs) -> Workload:
    """What the recipe asks for at the most, by its longest prompt and question."""
    return Workload(
        prompt_tokens=max(len(prompt.token_ids) for prompt in inputs.prompts),
        max_tokens=inputs.sampling.max_tokens,
        prompts_per_step=recipe.sampling.prompts_per_step,
        group_size=max(map(len, inputs.given.values())) if inputs.given else recipe.sampling.group_size,
        reference=recipe.method.needs_reference,
        critic=recipe.method.needs_critic,
        reward_model=recipe.reward_model is not None,
        exams=tuple(
            Answering(
                name=exam.name,
                questions=len(exam.prompts),
                samples=exam.samples,
                question_tokens=max(len(prompt.token_ids) for prompt in exam.prompts),
                answer_tokens=exam.options.max_tokens,
                times=exam_count(recipe, exam.every),
            )
            for exam in inputs.exams
        ),
        turns=recipe.environment is not None,
    )


class _Tokens:
    """Turns the rows of tasks into prompts, and counts those that were left out."""

    def __init__(self, source: ModelSource, reporter: Reporter, tools: ToolTexts | None = None) -> None:
        self.source, self.reporter, self.tools = source, reporter, tools
        self.filtered: dict[str, int] = {}

    def of(self, part: Part, max_tokens: int, most: int | None = None) -> list[Prompt]:
        """See `gruppo.data.loading.tokenize_part`."""
        source = self.source
        total = min(len(part.rows), most or len(part.rows))
        with self.reporter.progress(f"Tokenizing {part.name}", total, "prompts") as advance:
            prompts, left_out = tokenize_part(
                part, source.tokenizer, source.context, max_tokens, source.vocabulary, most, advance, self.tools
            )
        self._left_out(part, left_out, len(prompts))
        return prompts

    def answered(
        self, part: Part, prompts: Sequence[Prompt], max_tokens: int, pairs: bool, given: dict[str, Given]
    ) -> list[Prompt]:
        """Those of the prompts whose completions, which go into `given`, have at most `max_tokens` tokens; a longer one
        is refused, unless the task says that it is left out."""
        kept = []
        with self.reporter.progress(f"Tokenizing completions of {part.name}", len(prompts), "rows") as advance:
            for prompt in prompts:
                made = given_completions(prompt, self.source.tokenizer, pairs)
                advance(1)
                longest = max(len(completion.token_ids) for completion, _ in made)
                if longest <= max_tokens:
                    given[prompt.id] = made
                    kept.append(prompt)
                elif not part.filter_overlong:
                    raise UsageError(
                        f"{prompt.id}: a completion has {longest} tokens, more than sampling.max_tokens = "
                        f'{max_tokens}; raise that, or write {part.field}.overlong = "filter" to leave such rows out'
                    )
        self._left_out(part, len(prompts) - len(kept), len(kept))
        if not kept:
            raise UsageError(
                f"sampling.max_tokens = {max_tokens}: every completion of {part.name} is longer; write a larger one"
            )
        return kept

    def _left_out(self, part: Part, count: int, kept: int) -> None:
        if count:
            self.filtered[part.name] = self.filtered.get(part.name, 0) + count
            self.reporter.note(f"{part.name}: left out {count} rows that are too long; {kept} are used")


def make_optimizer(settings: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over a model's trained float32 weights; decay on matrices only."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=parameters[0].device.type in {"cpu", "cuda"},
    )
    # Fused steps leave the version of a tensor as it was, by which prepared weights are known to be old.
    optimizer.register_step_post_hook(lambda *_: torch.autograd.graph.increment_version(parameters))
    return optimizer


def _load_policy(
    recipe: Recipe,
    run: RunFolder,
    source: ModelSource,
    inputs: Inputs,
    rewards: Sequence[str],
    reporter: Reporter,
) -> tuple[LanguageModel, dict[str, Any], list[str]]:
    """Load the weights, and choose what depends on the machine, or keep what the run chose when it began."""
    before = run.read_json("environment.json")
    if before is None and checkpoint_folders(run.path):
        raise UsageError(
            f"{run.path}: environment.json, which says what the run chose when it began, is missing; put it back, or "
            "begin again with another --out"
        )
    if before:
        _require_whole(before, run)
    chosen: dict[str, Any] = before["chosen"] if before else {}
    device = choose_device(chosen.get("device", recipe.model.device))
    dtype = chosen.get("dtype") or str(choose_dtype(recipe.model.dtype, device)).removeprefix("torch.")
    data = data_sha256(inputs.prompts, inputs.questions)
    if before:
        _require_same(before["data_sha256"], data, "questions")
    free = Free.now(recipe, device)
    policy = load_model(source, device.type, dtype, reporter)
    weights = weights_sha256(policy.model)
    if before:
        _require_same(before["start_weights_sha256"], weights, "weights of the start model")
    only_here = named_weights(policy.model) if recipe.model.lora and source.given and not before else None
    policy = add_adapters(policy, recipe.model.lora, recipe.run.seed)
    if before:
        torch.set_num_threads(chosen["threads"])
        if "disk_forecast" in before and (lacking := still_needed(run.path, before["disk_forecast"])):
            reporter.note(f"Note: {lacking}")
        same = before["rewards_sha256"] == list(rewards)
        changed = [] if same else ["the reward functions have changed since the run began"]
        if chosen.get("kernels", NO_KERNELS) != kernels_sha256(policy.dtype):
            changed.append(
                "the compiled kernels are not those that the run began with: it rounds otherwise from here on"
            )
        return policy, chosen, changed
    sizes = free.choose(recipe, policy, inputs, reporter)
    disk = disk_of(recipe, policy, inputs, start_weights=only_here is not None)
    if doubt := disk.require(run.path):
        reporter.note(f"Note: {doubt}")
    chosen = {
        "device": device.type,
        "dtype": dtype,
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
        if only_here is not None:  # checkpoints hold the adapters alone, and no name leads back to these weights
            save_weights(only_here, folder)
    counts = {"prompts": len(inputs.prompts), "questions": len(inputs.questions)}
    identity = {"start_weights_sha256": weights, "data_sha256": data, "rewards_sha256": list(rewards)}
    found = {**describe(device), "chosen": chosen, "memory_forecast": sizes.memory.as_dict()}
    found["disk_forecast"] = disk.as_dict()
    run.write_json("environment.json", {**found, **counts, **identity})
    return policy, chosen, []


def _require_whole(environment: Mapping[str, Any], run: RunFolder) -> None:
    """Raise UsageError unless what a resumed run needs of its environment is there, and of the right kind."""
    with reading(run.path / "environment.json", "put it back as the run wrote it, or choose another --out"):
        chosen = environment["chosen"]
        numbers = [chosen[name] for name in ("threads", "slots", "micro_batch_tokens")]
        if not all(isinstance(each, int) and each > 0 for each in numbers):
            raise ValueError(f"threads, slots and micro_batch_tokens are {numbers}")
        if chosen["dtype"] not in ("float32", "bfloat16", "float64") or chosen["device"] not in ("cpu", "cuda", "mps"):
            raise ValueError(f"dtype = {chosen['dtype']!r}, device = {chosen['device']!r}")
        if not isinstance(chosen.get("recompute", False), bool):
            raise ValueError(f"recompute = {chosen['recompute']!r}")
        if missing := {"start_weights_sha256", "data_sha256", "rewards_sha256"} - set(environment):
            raise ValueError(f"{min(missing)} is missing")


def find_named(name: str, field: str, reporter: Reporter) -> ModelSource:
    """The model of a field that is not model.name, which errors then name."""
    try:
        return find_model(name, reporter)
    except UsageError as error:
        raise UsageError(str(error).replace("model.name", field, 1)) from None


def find_like(name: str | None, field: str, source: ModelSource, reporter: Reporter) -> ModelSource:
    """Where the weights of a value or reward model come from; by default the policy's start weights. Raises UsageError
    where that model does not read the policy's tokens."""
    if name is None:
        return source
    own = find_named(name, field, reporter)
    if own.vocabulary != source.vocabulary or own.tokenizer.get_vocab() != source.tokenizer.get_vocab():
        raise UsageError(
            f'{field} = "{name}": knows {own.vocabulary} tokens and the policy {source.vocabulary}; '
            "take a model with the policy's tokenizer"
        )
    return own


def _require_same_judge(run: RunFolder, weights: str) -> None:
    """Note the reward model's weights when a run begins; raise UsageError where it went on with others."""
    known = run.read_json("environment.json") or {}
    if "reward_model_sha256" in known:
        _require_same(known["reward_model_sha256"], weights, "weights of the reward model")
    else:
        run.write_json("environment.json", {**known, "reward_model_sha256": weights})


def data_sha256(prompts: Iterable[Prompt], questions: Sequence[Prompt]) -> str:
    """A hash over the token ids and columns of all questions, in order."""
    digest = hashlib.sha256()
    for prompt in [*prompts, *questions]:
        digest.update(as_json([prompt.id, prompt.token_ids, dict(prompt.columns)]).encode())
    return digest.hexdigest()


def _require_same(before: str, now: str, what: str) -> None:
    if before != now:
        raise UsageError(
            f"--resume: the {what} are not those that this run began with; put them back, or start again with --out"
        )
