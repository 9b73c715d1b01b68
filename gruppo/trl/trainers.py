"""The trainers, with the names and arguments that they have in TRL."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, TrainerState

from gruppo.config.sections import Environment
from gruppo.errors import UsageError
from gruppo.models.compatibility import context_length
from gruppo.rewards import RewardFunction
from gruppo.rollout.environments.client import NAME
from gruppo.rollout.episodes import ROLLOUT_FUNC, Opened
from gruppo.rollout.multi_turn import OpenedEnvironments
from gruppo.rollout.workers.rewards import reward_names
from gruppo.training.setup import Local
from gruppo.trl import logs
from gruppo.trl.configs import DPOConfig, GRPOConfig, RLOOConfig, SFTConfig
from gruppo.trl.data import PLACEHOLDER, rows_of
from gruppo.trl.local_environments import LocalEnvironments
from gruppo.trl.local_rewards import LocalRewards
from gruppo.trl.reward_models import ModelReward
from gruppo.trl.rollouts import RolloutFunction
from gruppo.trl.sampling import Sampler
from gruppo.trl.trainer import Trainer
from gruppo.types import Row
from gruppo.utils.imports import IN_MEMORY

MOST_TURNS = 1000  # where TRL sets no limit


class _OnlineTrainer(Trainer):
    """A trainer whose completions are sampled and scored.

    `reward_funcs`: functions, names or folders of reward models, reward models, or a list of these.
    """

    args: GRPOConfig | RLOOConfig

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        reward_funcs: Any = None,
        args: GRPOConfig | RLOOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Sequence[Any] | None = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        tokenizer: Any = None,
    ) -> None:
        if rollout_func is not None and (environment_factory is not None or tools):
            other = "tools" if tools else "environment_factory"
            raise UsageError(
                f"rollout_func: it calls tools and environments itself; leave {other} out, or give no rollout_func"
            )
        if rollout_func is not None and not callable(rollout_func):
            raise UsageError(
                f"rollout_func = {rollout_func!r}: write a function f(prompts, trainer) that returns a dict"
            )
        self.environments: LocalEnvironments | None = None
        if environment_factory is not None or tools:
            self.environments = LocalEnvironments(environment_factory, tools or ())
        self.reward_funcs = _reward_functions(reward_funcs, reward_processing_classes)
        if not self.reward_funcs and not (self.environments and self.environments.gives_reward):
            raise UsageError(
                "reward_funcs: missing; give a function f(completions, **columns) -> list of numbers, or an "
                "environment_factory whose objects have get_reward"
            )
        if train_dataset is None and environment_factory is not None and args is not None and args.max_steps > 0:
            train_dataset = _Placeholders()
        super().__init__(
            model, args, train_dataset, eval_dataset, processing_class, callbacks, optimizers, quantization_config,
            peft_config, tokenizer,
        )  # fmt: skip
        self._check_weights()
        self.num_generations, self.num_generations_eval = self.batches.group, self._evaluation_group
        self.max_completion_length, self.temperature = self.args.max_completion_length, self.args.temperature
        self.rollouts: RolloutFunction | None = None
        if rollout_func is not None:
            vocabulary = self._config.get_text_config().vocab_size
            self.rollouts = RolloutFunction(
                rollout_func, self, context_length(self._config), vocabulary, self._template_options
            )

    def __getattr__(self, name: str) -> Any:
        if name in ("vllm_generation", "vllm_client", "llm"):
            raise AttributeError(
                f"{name}: gruppo's trainers have none; in a rollout_func, sample with "
                "gruppo.trl.generate_rollout_completions"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def steps_done(self) -> int:
        """Steps of the run so far, each with one or more optimizer steps."""
        return self.state.global_step // self.batches.updates

    @property
    def _evaluation_group(self) -> int:
        return self.args.num_generations_eval or self.args.num_generations or 1

    @property
    def _template_options(self) -> Mapping[str, Any]:
        options = self.args.chat_template_kwargs
        return options if isinstance(options, Mapping) else {}

    def _check_weights(self) -> None:
        weights = self.args.reward_weights
        if weights is not None and len(weights) != len(self.reward_funcs):
            raise UsageError(
                f"reward_weights = {weights}: {len(weights)} numbers for {len(self.reward_funcs)} reward functions; "
                "write one for each"
            )

    def functions(self) -> list[RewardFunction]:
        """See `Trainer`."""
        return self.reward_funcs

    def reward_names(self) -> list[str]:
        """See `Trainer`."""
        environment = [NAME] if self.environments is not None and self.environments.gives_reward else []
        return [*reward_names(self.reward_funcs), *environment]

    def completed(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """See `Trainer`. A reward function may take as long as it likes, and runs in this process."""
        recipe["reward"]["failure_limit"] = 0.0
        if self.environments is not None or self.rollouts is not None:
            recipe["environment"] = self._environment()
        return recipe

    def _environment(self) -> dict[str, Any]:
        """The table [environment]."""
        if self.rollouts is not None:
            return {"name": ROLLOUT_FUNC}
        turns = getattr(self.args, "max_tool_calling_iterations", None) or MOST_TURNS
        return {"name": f"{IN_MEMORY}environment_factory", "turns": turns}

    def _opened(self) -> Opened | None:
        """What answers the model besides the reward functions, or samples in place of the engine."""
        if self.environments is None:
            return self.rollouts
        return OpenedEnvironments(self.environments, Environment(**self._environment()))

    def pool(self, columns: Sequence[str]) -> LocalRewards:
        """What calls the reward functions, for rows with these columns."""
        return LocalRewards(
            self.reward_funcs, self.args.reward_weights or [], columns, self._trainer_state, self.environments,
            further_columns=self.rollouts is not None,
        )  # fmt: skip

    def _trainer_state(self, state: Mapping[str, Any]) -> TrainerState:
        """`trainer_state` of reward functions: the trainer's state, at the start of the step."""
        self.state.global_step = state.get("global_step", 0) * self.batches.updates
        return self.state

    def local(self, ready: Any) -> Local | None:
        """See `Trainer`."""
        return Local(self.pool, self._opened(), ready)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, Any]:
        """Sample num_generations_eval completions of every row and score them with the reward functions.

        `eval_dataset`: rows in place of the trainer's, or several by name, whose metrics are called eval_NAME_….
        Returns the metrics under TRL's names, adds them to `state.log_history`, and calls on_evaluate. There is no
        eval_loss.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise UsageError("evaluate(): give the trainer an eval_dataset, or evaluate(rows)")
        several = isinstance(dataset, Mapping)
        metrics: dict[str, Any] = {}
        for name, rows in dataset.items() if isinstance(dataset, Mapping) else [("", dataset)]:
            prefix = f"{metric_key_prefix}_{name}" if several else metric_key_prefix
            metrics |= self._evaluated(rows_of(rows, "eval_dataset"), prefix)
        self.moments.log(dict(metrics))
        self.moments.call("on_evaluate", metrics=metrics)
        self._note_best(metrics)
        return {**metrics, "epoch": self.state.epoch}

    def _note_best(self, metrics: Mapping[str, Any]) -> None:
        """Keep the best value of metric_for_best_model in `state`, for callbacks."""
        name = self.args.metric_for_best_model
        value = metrics.get(name or "", metrics.get(f"eval_{name}"))
        if name is None or value is None:
            return
        larger = not name.endswith("loss") if self.args.greater_is_better is None else self.args.greater_is_better
        best = self.state.best_metric
        if best is None or (value > best if larger else value < best):
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step

    def _evaluated(self, rows: Sequence[Row], prefix: str) -> dict[str, Any]:
        """The metrics of one set of rows."""
        started = time.monotonic()
        recipe = None if self._sampler else self._plan().recipe
        opened = self._opened()
        if self._sampler is None:
            assert recipe is not None
            in_memory = None if self._in_memory is None else (self._in_memory, self.processing_class)
            self._sampler = Sampler.loaded(recipe, in_memory, opened, self._progress)
        size = self._evaluation_group
        columns = sorted(set.intersection(*map(set, rows)) - {"prompt"})
        state = {"global_step": self.steps_done}
        groups = self._sampler.groups(
            rows,
            self._template_options,
            size,
            self.pool(columns),
            state,
            self.args.seed,
            self._progress,
            opened,
        )
        found = logs.averaged([logs.of_groups(groups, self.reward_names())])
        seconds = time.monotonic() - started
        timing = {"runtime": seconds, "samples_per_second": len(rows) * size / seconds}
        return {f"{prefix}_{name}": value for name, value in {**found, **timing}.items()}


class GRPOTrainer(_OnlineTrainer):
    """TRL's GRPOTrainer on gruppo. See `gruppo.trl` for what differs."""

    config, method = GRPOConfig, "GRPO"


class RLOOTrainer(_OnlineTrainer):
    """TRL's RLOOTrainer on gruppo. See `gruppo.trl` for what differs."""

    config, method = RLOOConfig, "RLOO"


class DPOTrainer(Trainer):
    """TRL's DPOTrainer on gruppo, for rows of prompt, chosen and rejected. See `gruppo.trl` for what differs."""

    config, method = DPOConfig, "DPO"

    def __init__(self, model: Any, ref_model: Any = None, args: DPOConfig | None = None, **more: Any) -> None:
        if ref_model is not None:
            raise UsageError("ref_model: the reference is the initial policy; remove it")
        super().__init__(model, args, **more)


class SFTTrainer(Trainer):
    """TRL's SFTTrainer on gruppo, for rows with completions. See `gruppo.trl` for what differs."""

    config, method = SFTConfig, "SFT"
    args: SFTConfig

    def __init__(self, model: Any, args: SFTConfig | None = None, train_dataset: Any = None, **more: Any) -> None:
        for name in ("formatting_func", "compute_loss_func", "compute_metrics", "data_collator"):
            if more.pop(name, None) is not None:
                raise UsageError(f"{name}: gruppo reads and tokenizes the rows itself; use dataset.map before training")
        super().__init__(model, args, train_dataset, **more)

    def train_rows(self) -> Sequence[Row]:
        """See `Trainer`. Raises UsageError for rows of which TRL would train on more than gruppo does."""
        rows = super().train_rows()
        if "completion" in rows[0]:
            return rows
        if "messages" not in rows[0]:
            raise UsageError(
                f"train_dataset: has the columns {', '.join(rows[0])}; rows of plain text have no completion to train "
                "on: give rows of prompt and completion, or of messages"
            )
        if not self.args.assistant_only_loss:
            raise UsageError(
                "assistant_only_loss = False: the loss of rows of messages covers what the assistant wrote, not the "
                "rest; write assistant_only_loss=True"
            )
        return rows


class _Placeholders(list[Row]):
    """Rows for an environment that has the prompts."""

    def __init__(self) -> None:
        super().__init__([PLACEHOLDER])


def _reward_functions(reward_funcs: Any, processing_classes: Any) -> list[RewardFunction]:
    """The reward functions of a trainer, with reward models as functions. Raises UsageError for anything else."""
    given = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs] if reward_funcs else []
    classes = processing_classes if isinstance(processing_classes, list | tuple) else [processing_classes]
    classes = [*classes, *[None] * len(given)]
    functions: list[RewardFunction] = []
    for function, tokenizer in zip(given, classes, strict=False):
        if isinstance(function, str | PreTrainedModel):
            functions.append(ModelReward(function, tokenizer))
        elif callable(function):
            functions.append(function)
        else:
            raise UsageError(f"reward_funcs: {function!r} is neither a function nor the name of a reward model")
    return functions
