"""The recipe that does what the arguments of a TRL trainer ask for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from gruppo.config.sections import Tracker
from gruppo.errors import UsageError, nearest
from gruppo.trl.batches import Batches, batches_of
from gruppo.trl.configs import DPOConfig, GRPOConfig, RLOOConfig, SFTConfig, TrainingArguments

TRL_EPSILON = 1e-4  # added to standard deviations
NEVER_CLIPS = 1e12  # a gradient norm that no gradient has

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}


@dataclass(frozen=True)
class _Loss:
    """A TRL loss_type: how its token losses are averaged, and its policy term."""

    aggregation: str
    surrogate: str = "clipped"


_LOSSES = {
    "grpo": _Loss("sequence-mean"),
    "bnpo": _Loss("token-mean"),
    "dapo": _Loss("token-mean"),
    "dr_grpo": _Loss("constant"),
    "luspo": _Loss("sequence-sum"),
    "cispo": _Loss("token-mean", "clipped-weight"),
}


@dataclass(frozen=True)
class Length:
    """How long a training is. `steps`: of gruppo; `per_epoch`: steps in a pass over the rows, None if not known."""

    steps: int
    per_epoch: int | None

    def every(self, batches: Batches, strategy: str, steps: float | None, field: str) -> int:
        """Steps of gruppo between two events of a TRL strategy; 0 for never.

        `steps`: optimizer steps, or a share of all if below 1. Raises UsageError for an unknown strategy.
        """
        if strategy == "no":
            return 0
        if strategy == "epoch":
            return self.per_epoch or self.steps
        if strategy != "steps":
            raise UsageError(f'{field} = "{strategy}": write "no", "steps" or "epoch"')
        if not steps or steps < 0:
            raise UsageError(f"{field.removesuffix('strategy')}steps = {steps}: must be greater than 0")
        return batches.steps(steps * self.steps * batches.updates if steps < 1 else steps)


def length_of(args: TrainingArguments, batches: Batches, rows: int | None) -> Length:
    """The length of a training on `rows` rows (None: a stream). Raises UsageError for a stream without max_steps."""
    per_epoch = None if rows is None else batches.steps_of_epochs(1, rows)
    if args.max_steps > 0:
        return Length(batches.steps(args.max_steps), per_epoch)
    if rows is None:
        raise UsageError("max_steps = -1: rows that are a stream or come from an environment have no length; set it")
    if args.num_train_epochs <= 0:
        raise UsageError(f"num_train_epochs = {args.num_train_epochs}: must be greater than 0")
    return Length(batches.steps_of_epochs(args.num_train_epochs, rows), per_epoch)


def recipe_of(
    args: TrainingArguments, length: Length, model: str, lora: Mapping[str, Any] | None, chat: bool, context: int
) -> dict[str, Any]:
    """The recipe of a training, without its rewards and environment.

    `model`: name or folder of the model; `lora`: the table [model.lora]; `chat`: whether prompts are conversations;
    `context`: most tokens of a sequence of the model.
    Raises UsageError for a value that gruppo has nothing for.
    """
    batches = batches_of(args)
    recipe: dict[str, Any] = {
        "run": {
            "name": _run_name(args),
            "seed": args.seed,
            "steps": length.steps,
            "checkpoint_every": length.every(batches, args.save_strategy, args.save_steps, "save_strategy")
            or length.steps,
            "trackers": _trackers(args),
        },
        "model": {"name": model, **_precision(args)},
        "optimizer": _optimizer(args, length.steps * batches.updates, batches),
    }
    if lora is not None:
        recipe["model"]["lora"] = dict(lora)
    sampling: dict[str, Any] = {"prompts_per_step": batches.prompts}
    task: dict[str, Any] = {}
    if args.max_prompt_length is not None:
        task = {"max_prompt_tokens": args.max_prompt_length, "overlong": "filter"}
    if isinstance(args, GRPOConfig | RLOOConfig):
        method = _grpo(args, batches) if isinstance(args, GRPOConfig) else _rloo(args, batches)
        sampling |= {"group_size": batches.group, **_sampling(args)}
        recipe["reward"] = {"weights": list(args.reward_weights or [])}
        if chat and args.chat_template_kwargs:
            task["chat_template_kwargs"] = args.chat_template_kwargs
    elif isinstance(args, DPOConfig):
        method = _dpo(args)
    else:
        assert isinstance(args, SFTConfig)
        method = _sft(args)
    if isinstance(args, DPOConfig | SFTConfig):  # a row may have max_length tokens, and gruppo leaves out longer ones
        sampling["max_tokens"] = min(args.max_seq_length or args.max_length or context, max(1, context // 2))
        task["overlong"] = "filter"
    return {**recipe, "task": task, "method": method, "sampling": sampling}


def _trackers(args: TrainingArguments) -> list[str]:
    """The trackers of `report_to` that gruppo has."""
    named = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
    return [name for name in get_args(Tracker) if name in named]


def _run_name(args: TrainingArguments) -> str:
    """A name that a run folder may have."""
    name = args.run_name or Path(args.output_dir or "run").absolute().name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:100] or "run"


def _precision(args: TrainingArguments) -> dict[str, Any]:
    """The fields of [model] that arguments decide."""
    options: dict[str, Any] = {}
    if args.use_cpu or args.no_cuda:
        options["device"] = "cpu"
    if args.bf16 is False and not args.fp16:
        options["dtype"] = "float32"
    if args.trust_remote_code or init_kwargs(args).get("trust_remote_code"):
        options["trust_remote_code"] = True
    return options


def init_kwargs(args: TrainingArguments) -> dict[str, Any]:
    """`model_init_kwargs` as a mapping. Raises UsageError for a revision."""
    options = args.model_init_kwargs or {}
    if not isinstance(options, Mapping):
        raise UsageError(f'model_init_kwargs = {options!r}: must be a mapping; write {{"trust_remote_code": True}}')
    if (revision := options.get("revision")) not in (None, "main"):
        raise UsageError(f'model_init_kwargs["revision"] = {revision!r}: write the model as "owner/name@{revision}"')
    return dict(options)


def _optimizer(args: TrainingArguments, updates: int, batches: Batches) -> dict[str, Any]:
    """[optimizer]. `updates`: optimizer steps of the whole training."""
    schedule = _SCHEDULES.get(args.lr_scheduler_type)
    if schedule is None:
        raise UsageError(f'lr_scheduler_type = "{args.lr_scheduler_type}": unknown{nearest("", _SCHEDULES)}')
    if "adamw" not in args.optim:
        raise UsageError(f'optim = "{args.optim}": the optimizer is AdamW; write optim="adamw_torch"')
    warmup = 0 if args.lr_scheduler_type == "constant" else args.get_warmup_steps(updates)
    total = updates // batches.updates
    return {
        "learning_rate": args.learning_rate,
        "schedule": schedule,
        "warmup_steps": min(batches.steps(warmup), total) if warmup else 0,
        "beta1": args.adam_beta1,
        "beta2": args.adam_beta2,
        "epsilon": args.adam_epsilon,
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm or NEVER_CLIPS,
        "state": "8bit" if "8bit" in args.optim else "float32",
    }


def _sampling(args: GRPOConfig | RLOOConfig) -> dict[str, Any]:
    """The fields of [sampling] that only methods that sample have."""
    if not args.max_completion_length:
        raise UsageError("max_completion_length = None: write the most tokens that a completion may have")
    start = {"max_tokens": args.max_completion_length, "temperature": args.temperature}
    return {**start, **sampling_options(args.generation_kwargs or {}, "generation_kwargs")}


def sampling_options(options: Any, field: str) -> dict[str, Any]:
    """The fields of [sampling] that keyword arguments of generation set.

    `field`: the name of the argument that holds them. Raises UsageError for one that changes the distribution.
    """
    if not isinstance(options, Mapping):
        raise UsageError(f'{field} = {options!r}: must be a mapping; write {{"stop": ["\\n"]}}')
    sampling: dict[str, Any] = {}
    for name, value in options.items():
        if name in ("stop", "stop_strings"):
            sampling["stop"] = [value] if isinstance(value, str) else list(value or ())
        elif name == "temperature":
            sampling["temperature"] = value
        elif name in ("max_new_tokens", "max_tokens"):
            sampling["max_tokens"] = value
        elif (name, value) not in _FULL:
            raise UsageError(f"{field}[{name!r}] = {value!r}: training samples from the full distribution; remove it")
    return sampling


_FULL = [
    ("n", 1),
    ("do_sample", True),
    ("top_p", 1.0),
    ("top_k", 0),
    ("top_k", None),
    ("top_k", -1),
    ("repetition_penalty", 1.0),
    ("num_beams", 1),
]


def _grpo(args: GRPOConfig, batches: Batches) -> dict[str, Any]:
    """[method] of GRPOConfig."""
    loss = _LOSSES.get(args.loss_type)
    if loss is None:
        raise UsageError(
            f'loss_type = "{args.loss_type}": gruppo has {", ".join(_LOSSES)}; write one of them, or a recipe with a '
            "method.surrogate of your own"
        )
    if args.loss_type == "bnpo" and args.gradient_accumulation_steps > 1:
        raise UsageError(
            'loss_type = "bnpo": averages over the tokens of each pass of per_device_train_batch_size, so the result '
            'depends on how a batch is divided; write "dapo", which averages over the tokens of the step, or '
            "gradient_accumulation_steps=1"
        )
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    method: dict[str, Any] = {"name": "grpo", **_shared(args, batches), "aggregation": loss.aggregation}
    if loss.surrogate == "clipped-weight":
        if high < 1:
            raise UsageError(
                f'epsilon_high = {high}: with loss_type = "cispo" it is the largest ratio; write epsilon_high=5.0'
            )
        method |= {"surrogate": loss.surrogate, "clip_low": 1.0, "clip_high": high - 1}
    else:
        method |= {"clip_low": args.epsilon, "clip_high": high}
    if args.importance_sampling_level not in ("token", "sequence"):
        raise UsageError(f'importance_sampling_level = "{args.importance_sampling_level}": write "token" or "sequence"')
    scale = {True: "group", False: "none"}.get(args.scale_rewards, args.scale_rewards)  # type: ignore[call-overload]
    if scale not in ("group", "batch", "none"):
        raise UsageError(f'scale_rewards = {args.scale_rewards!r}: write "group", "batch" or "none"')
    method |= {"ratio": args.importance_sampling_level, "scale": scale}
    if scale != "none":
        method["advantage_epsilon"] = TRL_EPSILON
    if args.beta and args.use_bias_correction_kl:
        method["kl_importance"] = True
    return method


def _shared(args: GRPOConfig | RLOOConfig, batches: Batches) -> dict[str, Any]:
    """The fields of [method] that GRPOConfig and RLOOConfig have."""
    return {
        "kl_coef": args.beta,
        "inner_updates": batches.iterations,
        "minibatches": batches.minibatches,
        "mask_truncated": args.mask_truncated_completions,
    }


def _rloo(args: RLOOConfig, batches: Batches) -> dict[str, Any]:
    """[method] of RLOOConfig, whose clipped ratio of whole completions is 1 in the first update."""
    if batches.updates > 1:
        raise UsageError(
            f"num_iterations = {batches.iterations}: gruppo's RLOO makes one update per step, for which no ratio is "
            f"needed; {batches.sentence}: write num_iterations=1 and steps_per_generation=None"
        )
    return {"name": "rloo", **_shared(args, batches)}


def _dpo(args: DPOConfig) -> dict[str, Any]:
    """[method] of DPOConfig."""
    if args.loss_type not in (["sigmoid"], "sigmoid"):
        raise UsageError(f'loss_type = {args.loss_type!r}: the loss of DPO is logistic; write ["sigmoid"]')
    return {"name": "dpo", "source": "dataset", "aggregation": "sequence-sum", "dpo_beta": args.beta}


def _sft(args: SFTConfig) -> dict[str, Any]:
    """[method] of SFTConfig."""
    if args.loss_type != "nll":
        raise UsageError(f'loss_type = "{args.loss_type}": gruppo has "nll"; write that')
    if args.completion_only_loss is False:
        raise UsageError("completion_only_loss = False: the loss covers the completion, not the prompt; remove it")
    return {"name": "sft", "aggregation": "token-mean"}
