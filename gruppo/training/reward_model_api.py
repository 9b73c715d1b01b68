"""`gruppo label` and `gruppo reward-model`: label completions, and train a reward model on the labels, outside a run.

Both write folders that a kill leaves intact. The same command with --resume continues them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gruppo.config.loading import load_recipe
from gruppo.config.recipe import Recipe
from gruppo.config.sections import RewardModel
from gruppo.data.chat_template import end_renderer
from gruppo.errors import RunError, UsageError
from gruppo.evaluation.datasets import Data, read_data
from gruppo.runs.atomic import WriteError
from gruppo.runs.console import choose_progress
from gruppo.runs.folder import LABELS, REWARD_MODEL, RunFolder, check_folder, explaining_write_errors, start_time
from gruppo.runs.reading import require_own
from gruppo.utils.progress import Progress
from gruppo.utils.signals import Interrupted, stop_on_signals
from gruppo.utils.text import text_of_content
from gruppo.utils.token_text import text_of, text_tokens, tokens_after
from gruppo.utils.waiting import watched

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from gruppo.models.loading import ModelSource
    from gruppo.models.packing import Batch
    from gruppo.rollout.labels import LabelledCompletion
    from gruppo.rollout.reward_model import Sample
    from gruppo.training.checkpoint import State
    from gruppo.training.optimizer import RequireFinite
    from gruppo.training.reward_model import RewardModelTrainer
    from gruppo.utils.metrics import Metrics
    from gruppo.utils.signals import Stop

SIZES = ("chosen", "memory_forecast")  # of environment.json: what a training chose when it began


@dataclass(frozen=True)
class Labels:
    """Labels that `label` wrote.

    `right`: share of correct completions. `steps`: number of labeled steps. `soft`: mean soft label of the steps, None
    without steps.
    """

    path: Path
    completions: int
    right: float
    steps: int
    soft: float | None


def label(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    out: str | Path,
    resume: bool = False,
    overrides: Sequence[str] = (),
    progress: bool | Progress = True,
) -> Labels:
    """Sample completions of the recipe's questions, label them by rule, and write them to `out`/labels.

    There is one Parquet file per sampling.prompts_per_step questions. [reward_model] configures the labels: `prompts`
    questions, sampling.group_size completions per question. Kind "process" (the default if the recipe has no such
    table) labels every step by `continuations` completions from its end. `resume` keeps existing files. Raises
    UsageError, and gruppo.utils.signals.Interrupted on SIGINT or SIGTERM.
    """
    settings, shown, folder = load_recipe(recipe, overrides), choose_progress(progress), Path(out)
    if settings.environment is not None:
        raise UsageError("[environment]: labeled completions are sampled without an environment; remove the table")
    reward_model = settings.reward_model or RewardModel(kind="process")
    if settings.method.source == "dataset" or not settings.reward.functions:
        raise UsageError(
            'reward.functions: the first function is the labeling rule; write e.g. functions = ["last_number"]'
        )
    if not reward_model.prompts:
        raise UsageError("reward_model.prompts = 0: nothing would be labeled; write the number of questions")
    check_folder(folder, settings, resume, LABELS)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        shown, _ = stack.enter_context(watched(shown))
        stack.enter_context(stop.interruptible())  # tables are written atomically, and existing tables are kept
        stack.enter_context(explaining_write_errors(folder))
        data = read_data(settings, settings.reward.functions, None, shown)
        run = RunFolder(folder)
        stack.callback(run.close)
        stack.callback(end_renderer)
        return _label(settings, reward_model, data, run, stack, shown, stop)


def _label(
    recipe: Recipe, settings: RewardModel, data: Data, run: RunFolder, stack: ExitStack, progress: Progress, stop: Stop
) -> Labels:
    from gruppo.data.chat_template import template_time
    from gruppo.data.tokenization import data_sha256
    from gruppo.engines import check_engine
    from gruppo.engines.memory import Free, open_engine_within
    from gruppo.models.attention.backends import check_compute
    from gruppo.models.loading import find_model, load_model
    from gruppo.models.weights import weights_sha256
    from gruppo.rewards.steps import find_split
    from gruppo.rollout.labels import label_rows, read_labels
    from gruppo.rollout.step_labels import StepLabeller
    from gruppo.runs.tables import LABELS as LABEL_COLUMNS
    from gruppo.training.inputs import labeled, tokenize_data
    from gruppo.training.setup import make_pool

    find_split(settings.split)
    device, dtype = check_compute(recipe.model)
    check_engine(recipe, device, dtype)
    pool = stack.enter_context(make_pool(recipe, recipe.reward.functions, data, run.path / "rewards.log", progress))
    source = find_model(recipe.model.name, progress, trust_remote_code=recipe.model.trust_remote_code)
    started = start_time(run.path)
    stack.enter_context(template_time(started))
    inputs = tokenize_data(recipe, data, source, progress)
    free = Free.now(recipe.run.memory, device)
    policy = load_model(source, recipe.model.device, recipe.model.dtype, progress, recipe.model.attention)
    size, group, max_tokens = recipe.sampling.prompts_per_step, recipe.sampling.group_size, recipe.sampling.max_tokens
    longest = max(len(prompt.token_ids) for prompt in inputs.prompts)
    work = labeled(recipe, settings, longest, max_tokens, min(size, settings.prompts))
    engine, memory = open_engine_within(free, policy, recipe.engine, [work], stack, progress)
    identity = {
        "weights_sha256": weights_sha256(policy.model),
        "rewards_sha256": pool.digests,
        "data_sha256": data_sha256(inputs.prompts, ()),
    }
    run.start_same(recipe, LABELS, identity, started, {"slots": engine.slots, "memory_forecast": memory.as_dict()})
    threshold = recipe.method.success_threshold
    labeller = StepLabeller(engine, pool, policy.tokenizer, inputs.sampling, settings, threshold, progress, stop)
    with progress.bar("Labeling", settings.prompts, "questions") as advance:
        for number, start in enumerate(range(0, settings.prompts, size), start=1):
            prompts = inputs.prompts.draw(start, min(size, settings.prompts - start))
            if (run.path / "labels" / f"step-{number:06d}.parquet").is_file():
                advance(len(prompts))
                continue
            labels, failures = labeller.sample(prompts, group, (recipe.run.seed, 0, start))
            for failure, count in failures.items():
                run.event("reward_failed", failure, number, completions=count)
                progress.note(f"{count} verdicts failed: {failure}; see events.jsonl")
            run.table("labels", number, label_rows(labels), LABEL_COLUMNS)
            advance(len(prompts))
    return _summarize(run.path, read_labels(sorted((run.path / "labels").glob("step-*.parquet"))))


def _summarize(folder: Path, labels: Sequence[LabelledCompletion]) -> Labels:
    shares = [share for label in labels for share in label.shares]
    correct = sum(label.right for label in labels) / len(labels) if labels else 0.0
    return Labels(folder, len(labels), correct, len(shares), sum(shares) / len(shares) if shares else None)


@dataclass(frozen=True)
class Trained:
    """A reward model that `train_reward_model` trained; transformers can load `path`/model.

    `before` and `after`: metrics of the held-out samples (see `gruppo.training.reward_model.quality`).
    """

    path: Path
    updates: int
    before: Mapping[str, float | None]
    after: Mapping[str, float | None]


def train_reward_model(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    labels: str | Path,
    *,
    out: str | Path,
    resume: bool = False,
    overrides: Sequence[str] = (),
    progress: bool | Progress = True,
) -> Trained:
    """Train the recipe's [reward_model] on the labels in a folder of `label` (or of a run), and write it to `out`.

    Weights come from reward_model.name, or else model.name. If the model's tokenizer differs from the labels', the
    texts are tokenized again. `out`/model is the model, `out`/metrics.jsonl has one line per update, and
    `out`/summary.json has the metrics. A checkpoint is saved every run.checkpoint_every updates, less often if saving
    would take more than a tenth of the time, and when SIGINT or SIGTERM ends the training. Micro-batches are derived
    from run.memory. Raises UsageError, RunError if a loss is not finite, and gruppo.utils.signals.Interrupted.
    """
    settings, shown, folder = load_recipe(recipe, overrides), choose_progress(progress), Path(out)
    reward_model = settings.reward_model
    if reward_model is None:
        raise UsageError('[reward_model]: missing; write it with kind = "outcome" or "process"')
    if Path(labels).is_dir():
        require_own(Path(labels))
    files = sorted((Path(labels) / "labels").glob("step-*.parquet"))
    if not files:
        raise UsageError(f"{labels}: has no labels/step-….parquet; give the folder that `gruppo label` wrote")
    check_folder(folder, settings, resume, REWARD_MODEL)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        shown, _ = stack.enter_context(watched(shown))
        stack.enter_context(explaining_write_errors(folder))
        run = RunFolder(folder)
        stack.callback(run.close)
        stack.callback(end_renderer)
        return _train(settings, reward_model, files, run, shown, stop)


@dataclass
class _Training:
    """State of training a reward model outside a run. `before`: metrics of the held-out samples before training."""

    trainer: RewardModelTrainer
    state: State
    training: list[Sample]
    held_out: list[Sample]
    before: dict[str, Any]


def _begin_training(
    recipe: Recipe, settings: RewardModel, files: Sequence[Path], run: RunFolder, progress: Progress
) -> _Training | Trained:
    """The state that the training begins or goes on with, or its result if it is finished."""
    from gruppo.engines.memory import Free
    from gruppo.models.attention.backends import check_compute
    from gruppo.models.loading import find_named
    from gruppo.models.reward_model import check_kind, load_reward_model
    from gruppo.models.weights import weights_sha256
    from gruppo.rollout.reward_model import RewardModelScorer
    from gruppo.training.checkpoint import State, load_models, load_state, newest_checkpoint
    from gruppo.training.lean_optimizers import check_state
    from gruppo.training.optimizer import make_optimizer
    from gruppo.training.reward_model import RewardModelTrainer
    from gruppo.training.sizing import choose_for_labels
    from gruppo.utils.files import file_sha256
    from gruppo.utils.oom_retry import BatchSizes

    device, _ = check_compute(recipe.model)
    check_state(recipe.optimizer.state)
    name = "reward_model.name" if settings.name else "model.name"
    source = find_named(settings.name or recipe.model.name, name, progress)
    check_kind(source.config, settings.kind)
    training, held_out = _samples(source, settings, files)
    free, compute = Free.now(recipe.run.memory, device), recipe.model
    model = load_reward_model(source, settings.kind, compute.device, compute.dtype, progress, compute.attention)
    facts = {name: value for name, value in (run.read_json("environment.json") or {}).items() if name in SIZES}
    if not facts:  # a resumed training keeps its sizes: others would round differently
        found = choose_for_labels(free, recipe, settings, model, [*training, *held_out], progress)
        chosen = {"micro_batch_tokens": found.micro_batch_tokens, "recompute": found.recompute}
        facts = {"chosen": {**chosen, "memory_budget_bytes": found.budget_bytes}}
        facts["memory_forecast"] = {"peak": found.memory.training, **found.memory.parts("training")}
    model = replace(model, policy=replace(model.policy, recompute=facts["chosen"]["recompute"]))
    optimizer = make_optimizer(recipe.optimizer, model.module, model.policy)
    max_grad_norm = recipe.optimizer.max_grad_norm
    longest = max(len(sample.prompt.token_ids) + len(sample.completion.token_ids) for sample in (*training, *held_out))
    tokens = facts["chosen"]["micro_batch_tokens"]
    sizes = BatchSizes(tokens, 1, longest, lambda reduced: run.event("memory", str(reduced), state.step))
    trainer = RewardModelTrainer(RewardModelScorer(model, settings, source.tokenizer, sizes), optimizer, max_grad_norm)

    identity = {"labels_sha256": [file_sha256(file) for file in files], "weights_sha256": weights_sha256(model.module)}
    run.start_same(recipe, REWARD_MODEL, identity, facts=facts)
    if done := run.read_json("summary.json"):
        return Trained(run.path, done["updates"], done["before"], done["after"])
    checkpoint, problems = newest_checkpoint(run)
    state = load_state(checkpoint) if checkpoint else State()
    damages = run.cut_back(state.lengths, state.step)
    for kind, messages in (("checkpoint_unusable", problems), ("damaged", damages)):
        for message in messages:
            run.event(kind, message, state.step)
            progress.note(f"Note: {message}; continuing after update {state.step}")
    before: dict[str, Any] | None = run.read_json("before.json")
    if before is None:
        before = trainer.quality(held_out, progress)
        run.write_json("before.json", before)
    if checkpoint is not None:
        load_models(checkpoint, {"": (model.module, optimizer)})
        model.policy.generation.advance()
    return _Training(trainer, state, training, held_out, before)


def _train(
    recipe: Recipe, settings: RewardModel, files: Sequence[Path], run: RunFolder, progress: Progress, stop: Stop
) -> Trained:
    with stop.interruptible():
        begun = _begin_training(recipe, settings, files, run, progress)
        if isinstance(begun, Trained):
            return begun
        from gruppo.models.reward_model import save_reward_model
        from gruppo.training.checkpoint import save_checkpoint, save_models
        from gruppo.training.disk_estimate import checkpoint_bytes
        from gruppo.training.reward_model import alike, fit
        from gruppo.training.saving_pace import SavingPace
    trainer, state = begun.trainer, begun.state
    model, optimizer = trainer.scorer.model, trainer.optimizer
    pace = SavingPace(checkpoint_bytes(model.module))

    def save() -> None:
        if state.step:
            with pace.saving():
                save_checkpoint(run, partial(save_models, models={"": (model.module, optimizer)}), state)

    require = _required(run, state, trainer.scorer.tokenizer)
    if (warning := alike(begun.training)) and not state.step:
        run.event("reward_model_labels", warning, state.step)
        progress.note(f"Warning: {warning}")

    def after(number: int, metrics: Metrics) -> None:
        run.metric({"step": number, **metrics.reduce()})
        state.step = number
        if number % recipe.run.checkpoint_every == 0 and pace.allows:
            save()

    try:
        fit(trainer, begun.training, 1, require, progress, stop, state.step, after)
        with stop.interruptible():
            result = Trained(run.path, state.step, begun.before, trainer.quality(begun.held_out, progress))
            with run.building("model") as folder:
                save_reward_model(model, settings.kind, folder)
            run.write_json("summary.json", {"updates": result.updates, "before": result.before, "after": result.after})
    except (Interrupted, RunError) as error:  # raised between two updates, unless a line could not be written
        if not isinstance(error, WriteError):
            save()
        raise
    return result


def _required(run: RunFolder, state: State, tokenizer: PreTrainedTokenizerBase) -> RequireFinite:
    """A check that stops before the optimizer step if a value is not finite, and keeps the batch."""
    from gruppo.training.nonfinite import keep_batches

    def require(value: float, what: str, batches: Sequence[Batch]) -> None:
        if not math.isfinite(value):
            facts = {"what": what, "value": str(value), "micro_batches": len(batches)}
            path = keep_batches(run, state.step + 1, facts, batches, tokenizer)
            raise RunError(
                f"the {what} of update {state.step + 1} is {value}; this update was not applied, and its batch "
                f"is in {path}: start again with a lower reward_model.learning_rate"
            )

    return require


def _samples(source: ModelSource, settings: RewardModel, files: Sequence[Path]) -> tuple[list[Sample], list[Sample]]:
    """The labeled samples in the model's tokens: to train on, and held out. Raises UsageError if they do not fit."""
    from gruppo.rollout.labels import read_labels
    from gruppo.training.reward_model import divided

    samples = [label.sample(settings) for label in _in_tokens_of(source.tokenizer, read_labels(files))]
    for sample in samples:
        size = len(sample.prompt.token_ids) + len(sample.completion.token_ids)
        if not sample.prompt.token_ids or size > source.context:
            raise UsageError(
                f"{sample.prompt.id}: prompt and completion have {size} tokens; the model needs a prompt of at "
                f"least 1 token, and reads at most {source.context} in total"
            )
    training, held_out = divided(samples, settings.held_out, settings.seed)
    if not any(sample.labels.ends for sample in training):
        what = "step" if settings.kind == "process" else "completion"
        raise UsageError(
            f"reward_model.held_out = {settings.held_out}: none of {len(samples)} completions in "
            f"{files[0].parent} has a {what} label and is left to train on; label more, or hold out less"
        )
    return training, held_out


def _in_tokens_of(tokenizer: PreTrainedTokenizerBase, labels: Sequence[LabelledCompletion]) -> list[LabelledCompletion]:
    """The labels in this tokenizer's tokens; unchanged if it decodes their token ids to the same texts."""

    def decodes(label: LabelledCompletion) -> bool:
        completion = label.completion
        text = text_of(tokenizer, completion.token_ids, label.prompt.token_ids)
        ended = completion.finish_reason == "stop"  # with an EOS token or a stop string, which are not in its text
        return text == completion.text or (ended and text.startswith(completion.text))

    ids = [token for label in labels for token in (*label.prompt.token_ids, *label.completion.token_ids)]
    if max(ids, default=0) < len(tokenizer) and all(map(decodes, labels)):
        return list(labels)
    return [_encoded(tokenizer, label) for label in labels]


def _encoded(tokenizer: PreTrainedTokenizerBase, labelled: LabelledCompletion) -> LabelledCompletion:
    """A labeled completion in another tokenizer's tokens, with the EOS token if it finished (EOS)."""
    from gruppo.data.chat_template import chat_tokens
    from gruppo.rewards.steps import step_tokens

    content = labelled.prompt.content
    if isinstance(content, str) or not tokenizer.chat_template:
        text = (
            content
            if isinstance(content, str)
            else "\n".join(text_of_content(message["content"]) for message in content) + "\n"
        )
        prompt_ids = text_tokens(tokenizer, text)
    else:
        prompt_ids = chat_tokens(tokenizer, content, ask=True)
    text = labelled.completion.text
    ids = tokens_after(tokenizer, text, prompt_ids)
    if labelled.completion.finish_reason == "stop" and tokenizer.eos_token_id is not None:
        ids.append(int(tokenizer.eos_token_id))
    zeros = (0.0,) * len(ids)
    completion = replace(labelled.completion, token_ids=tuple(ids), sampling_logprobs=zeros, mask=(True,) * len(ids))
    shares = dict(zip(labelled.text_ends, labelled.shares, strict=True))
    ends = step_tokens(completion, labelled.text_ends, tokenizer, prompt_ids)
    return replace(
        labelled,
        prompt=replace(labelled.prompt, token_ids=tuple(prompt_ids)),
        completion=completion,
        ends=tuple(end for end, _ in ends),
        text_ends=tuple(end for _, end in ends),
        shares=tuple(shares[end] for _, end in ends),
    )
