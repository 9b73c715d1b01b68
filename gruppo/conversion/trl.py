"""TRL 1.16: GRPOConfig, RLOOConfig, DPOConfig, SFTConfig and RewardConfig, with ModelConfig and ScriptArguments."""

from __future__ import annotations

from typing import Any

from gruppo.conversion.common import put_base, put_clips, put_kl, put_moments, put_schedule, put_trackers, run_name
from gruppo.conversion.draft import Draft
from gruppo.conversion.given import Setting, Settings, Source, as_list, as_number, is_off, written

# TRL's defaults of what determines the result and has a field in a recipe.
_TRAINING = {
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "linear",
    "learning_rate": 1e-6,
    "seed": 42,
}
_ONLINE = {
    "num_generations": 8,
    "max_completion_length": 512,
    "temperature": 1.0,
    "num_iterations": 1,
    "epsilon": 0.2,
    "beta": 0.0,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "grpo": {
        **_TRAINING, **_ONLINE, "loss_type": "dapo", "scale_rewards": "group", "importance_sampling_level": "token",
        "use_bias_correction_kl": True,
    },
    "rloo": {**_TRAINING, **_ONLINE, "num_generations": 2, "beta": 0.05, "normalize_advantages": False},
    "dpo": {**_TRAINING, "beta": 0.1, "loss_type": ["sigmoid"], "max_length": 1024},
    "sft": {**_TRAINING, "learning_rate": 2e-5, "max_length": 1024},
    "reward": {**_TRAINING, "learning_rate": 1e-4, "max_length": 1024},
}  # fmt: skip
LORA = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}

_AGGREGATION = {
    "grpo": "sequence-mean",
    "dapo": "token-mean",
    "bnpo": "token-mean",
    "cispo": "token-mean",
    "dr_grpo": "constant",
    "luspo": "sequence-sum",
}
_REWARDS = {
    "accuracy_reward": "trl.rewards:accuracy_reward",
    "reasoning_accuracy_reward": "trl.rewards:reasoning_accuracy_reward",
    "think_format_reward": "trl.rewards:think_format_reward",
}


def convert(source: Source) -> Draft:
    """The recipe that does what TRL does with these arguments, as far as there is an equivalent."""
    settings = Settings(source.values, DEFAULTS[source.method])
    draft = Draft("TRL", settings)
    _model(draft, settings)
    if source.method in {"grpo", "rloo"}:
        draft.put("method.name", source.method, f"TRL's {source.method.upper()}Trainer")
        _online(draft, settings, source)
    elif source.method == "reward":
        _reward_model(draft, settings, source)
    else:
        draft.put("method.name", source.method, f"TRL's {source.method.upper()}Trainer")
        _offline(draft, settings, source)
    _data(draft, settings, source.method)
    put_moments(draft, settings, "optim")
    factor = 1 / (draft.value("method.inner_updates") * draft.value("method.minibatches"))
    put_schedule(draft, settings, settings.take("lr_scheduler_type"), "warmup_steps", "warmup_ratio", factor)
    run_name(draft, settings.take("run_name"), settings.take("output_dir"))
    put_trackers(draft, settings.take("report_to"))
    _without_effect(draft, settings)
    return draft


def _model(draft: Draft, settings: Settings) -> None:
    kinds = [settings.take(name) for name in ("dtype", "torch_dtype", "bf16", "fp16")]
    wanted = {
        "bfloat16": ("bfloat16", "True"), "float32": ("float32",), "auto": ("auto",),
    }  # fmt: skip
    for setting in kinds:
        word = str(setting.value).removeprefix("torch.")
        dtype = next((name for name, words in wanted.items() if word in words), None)
        if not setting.given or is_off(setting.value):
            continue
        if setting.name == "fp16" or dtype is None:
            draft.lack(setting, 'float16 is not supported; write model.dtype = "bfloat16", or leave it out')
        elif "model.dtype" not in draft.fields:
            draft.put("model.dtype", dtype, setting)
    peft = settings.take("use_peft")
    if is_off(peft.value):
        for name in [one.name for one in settings.rest() if one.name.startswith("lora_")]:
            setting = settings.take(name)
            draft.skip(setting, "use_peft is off")
        return
    for name, default in LORA.items():
        settings.default(name, default)
    targets = settings.take("lora_target_modules")
    names = as_list(targets.value)
    if names in ([], ["all-linear"]):
        guess = "all-linear" if names else ["q_proj", "v_proj"]
        why: Setting | str = targets if names else "the targets that peft chooses for most models"
        draft.put("model.lora.targets", guess, why, given=bool(names))
    else:
        draft.put("model.lora.targets", names, targets)
    put_base(draft, settings, "load_in_4bit")
    dropout = settings.take("lora_dropout")
    if not is_off(dropout.value):
        what = dropout if dropout.given else f"TRL's default {dropout}"
        draft.lack(what, "there is no dropout, so that sampling and training use the same distribution")


def _batch(draft: Draft, settings: Settings, source: Source, group: int, split: bool = True) -> int:
    """Put the prompts of a step: the completions that are sampled together over the group size.

    Returns the updates on parts of these completions. Without `split`, a step samples for one update only.
    """
    device, accumulation = settings.take("per_device_train_batch_size"), settings.take("gradient_accumulation_steps")
    steps, total = settings.take("steps_per_generation"), settings.take("generation_batch_size")
    processes = source.processes or 1
    update = int(as_number(device.value) or 8) * int(as_number(accumulation.value) or 1) * processes
    sampled = as_number(total.value) or (as_number(steps.value) or 0) * update / (as_number(accumulation.value) or 1)
    parts = max(1, round(sampled / update)) if sampled else 1
    kept = parts if split else 1
    prompts = max(1, update * kept // group)
    line = (
        f"Batch: {written(device.value)} per device × {written(accumulation.value)} accumulation steps × {processes} "
        f"process{'es' if processes > 1 else ''} = {update} completions per update"
    )
    line += f", {kept} updates per step" if kept > 1 else ""
    line += f" = {prompts} prompts × {group} completions" if group > 1 else ""
    draft.remark(f"{line}." if prompts * group == update * kept else f"{line}, rounded to whole groups.")
    if source.processes is None:
        draft.remark(
            "The arguments do not say how many processes train; for several, run `gruppo convert --processes N`."
        )
    draft.put("sampling.prompts_per_step", prompts, "the batch above")
    what = next((one for one in (total, steps) if one.given), None)
    if kept > 1 and what:
        draft.put("method.minibatches", kept, what)
    elif parts > 1 and what:
        draft.lack(what, "several updates need a ratio; a step samples for one update, of the same size")
    return kept


def _online(draft: Draft, settings: Settings, source: Source) -> None:
    """GRPO and RLOO, which sample completions."""
    group = settings.take("num_generations")
    count = int(as_number(group.value) or 8)
    draft.put("sampling.group_size", count, group)
    parts = _batch(draft, settings, source, count, split=source.method == "grpo")
    inner = settings.take("num_iterations")
    repeats = int(as_number(inner.value) or 1)
    if source.method == "rloo" and repeats > 1:
        draft.lack(inner, 'method.name = "rloo" has no ratio to correct for several updates; it updates once per step')
        repeats = 1
    else:
        draft.put("method.inner_updates", repeats, inner)
    _length(draft, settings, repeats * parts)
    if source.method == "grpo":
        _grpo(draft, settings, source)
    else:
        scale = settings.take("normalize_advantages")
        draft.put("method.scale", "none" if is_off(scale.value) else "batch", scale)
        if settings.is_given("epsilon", "epsilon_high"):
            draft.skip(settings.take("epsilon", "epsilon_high"), "with one update per step, no ratio is ever clipped")
        settings.take("epsilon")
        put_kl(draft, settings.take("beta"), "k1")
    if draft.value("method.scale") != "none":
        draft.put("method.advantage_epsilon", 1e-4, "the ε beside the standard deviation", given=False)
    _rewards(draft, settings)
    _engine(draft, settings)


def _grpo(draft: Draft, settings: Settings, source: Source) -> None:
    loss = settings.take("loss_type")
    kind = str(loss.value)
    passes = (source.processes or 1) * (as_number(source.values.get("gradient_accumulation_steps")) or 1)
    if kind == "bnpo" and passes > 1:
        draft.lack(loss, "TRL averages over the tokens of each pass through the model, gruppo over those of an update")
    if kind not in _AGGREGATION:
        draft.lack(loss, 'gruppo has no such loss; written as "dapo". See method.surrogate for one of your own')
    draft.put("method.aggregation", _AGGREGATION.get(kind, "token-mean"), loss)
    if kind == "cispo":
        low, high = settings.take("epsilon"), settings.take("epsilon_high")
        draft.put("method.surrogate", "clipped-weight", loss)
        draft.put("method.clip_low", 1.0, "the ratio has no lower bound")
        bound = as_number(high.value) or as_number(low.value) or 0.2
        if bound < 1:
            draft.lack(f"a largest ratio of {bound:g}", "it must be at least 1; for 5, write method.clip_high = 4")
        draft.put("method.clip_high", max(0.0, round(bound - 1, 12)), f"{high}, TRL's bound of the ratio itself")
    else:
        put_clips(draft, settings.take("epsilon"), settings.take("epsilon_high"))
    ratio = settings.take("importance_sampling_level")
    draft.put("method.ratio", ratio.value, ratio)
    scale = settings.take("scale_rewards")
    word = {"True": "group", "true": "group", "False": "none", "false": "none"}.get(str(scale.value), scale.value)
    draft.put("method.scale", word, scale)
    put_kl(draft, settings.take("beta"), "k3")
    corrected = settings.take("use_bias_correction_kl")
    if draft.value("method.kl_coef") and not is_off(corrected.value):
        draft.put("method.kl_importance", True, corrected)


def _engine(draft: Draft, settings: Settings) -> None:
    """Importance weights for the difference between engine and trainer."""
    mode = settings.take("vllm_importance_sampling_mode")
    names = ("vllm_importance_sampling_cap", "vllm_importance_sampling_clip_max")
    is_on = settings.take("vllm_importance_sampling_correction")
    cap = settings.take(*names)
    if mode.value == "token_truncate" and not (is_on.given and is_off(is_on.value)):
        draft.put("method.tis_cap", as_number(cap.value) or 3.0, cap if cap.given else "TRL's cap of 3")
        return
    for setting in (mode, is_on, cap):
        if setting.given:
            draft.skip(setting, "method.tis_cap is off, which weights tokens for the difference of engine and trainer")


def _length(draft: Draft, settings: Settings, updates_per_step: int = 1) -> None:
    steps, epochs = settings.take("max_steps"), settings.take("num_train_epochs")
    count = as_number(steps.value) or -1
    if count > 0:
        source: Setting | str = steps
        if updates_per_step > 1:
            source = f"{steps} updates, {updates_per_step} of them per step"
        draft.put("run.steps", max(1, -(-int(count) // updates_per_step)), source)
        if epochs.given:
            draft.skip(epochs, "max_steps takes its place")
    else:
        draft.put("run.epochs", as_number(epochs.value), epochs)
    every = settings.take("save_steps")
    interval = as_number(every.value)
    if every.given and interval and interval >= 1:
        draft.put("run.checkpoint_every", max(1, int(interval) // updates_per_step), every)
    elif every.given:
        draft.skip(every, "run.checkpoint_every is a number of steps; gruppo saves every 10")


def _rewards(draft: Draft, settings: Settings) -> None:
    names, model = settings.take("reward_funcs"), settings.take("reward_model_name_or_path")
    functions, options, unknown = [], {}, []
    if model.value:
        functions.append("classifier")
        options["classifier"] = {"model": model.value}
    for name in map(str, as_list(names.value)):
        if name == "get_soft_overlong_punishment":
            functions.append("overlong")
            options["overlong"] = {"max_tokens": 1280, "buffer_tokens": 256}
        elif name in _REWARDS:
            functions.append(_REWARDS[name])
        elif "." in name:
            functions.append(":".join(name.rsplit(".", 1)))
        else:
            functions.append(f"my_rewards.py:{name}")
            unknown.append(name)
    if any(name.startswith("trl.rewards:") for name in functions):
        draft.remark('The functions of trl.rewards need TRL; gruppo\'s own are "math_verify" and "think_format".')
    if not functions:
        draft.ask(
            "reward.functions", ["my_rewards.py:reward"], "the functions of reward_funcs, as file.py:function; those "
            "written for TRL run unchanged",
        )  # fmt: skip
    elif unknown:
        draft.ask(
            "reward.functions", functions, f"the file of {', '.join(unknown)}; written for TRL, it runs unchanged"
        )
    else:
        draft.put("reward.functions", functions, names if names.given else model)
    if options:
        draft.put("reward.options", options, "the arguments that TRL gives them")
    weights = settings.take("reward_weights")
    if weights.value is not None:
        draft.put("reward.weights", as_list(weights.value), weights)


def _offline(draft: Draft, settings: Settings, source: Source) -> None:
    """DPO and SFT, which read completions."""
    draft.put("method.source", "dataset", f"TRL's {source.method.upper()}Trainer")
    _batch(draft, settings, source, 1)
    _length(draft, settings)
    limit = settings.take("max_length")
    if (tokens := as_number(limit.value)) is not None:
        draft.put("sampling.max_tokens", int(tokens), f"{limit}, of prompt and completion together")
        draft.put("task.max_prompt_tokens", int(tokens), f"{limit}, of prompt and completion together")
        draft.put("task.overlong", "filter", "TRL truncates what is longer, gruppo leaves it out")
    if source.method == "sft":
        draft.put("method.aggregation", "token-mean", "TRL's mean over all tokens")
        return
    beta, loss = settings.take("beta"), settings.take("loss_type")
    draft.put("method.dpo_beta", as_number(beta.value), beta)
    draft.put("method.aggregation", "sequence-sum", "log-ratios are summed over a completion")
    if as_list(loss.value) != ["sigmoid"]:
        draft.lack(loss, "the loss of DPO is logistic (sigmoid)")


def _reward_model(draft: Draft, settings: Settings, source: Source) -> None:
    """TRL's RewardTrainer learns from pairs, gruppo's reward models from labels."""
    draft.lack(
        "pairs (chosen, rejected)",
        "gruppo trains reward models on labels: `gruppo label RECIPE --out DIR`, then `gruppo reward-model RECIPE DIR`",
    )
    name, rate = settings.take("model_name_or_path"), settings.take("learning_rate")
    draft.put("model.name", name.value, name)
    draft.put("reward_model.learning_rate", as_number(rate.value), rate)
    _batch(draft, settings, source, 1)
    batch = draft.fields.pop("sampling.prompts_per_step")
    draft.put("reward_model.batch_size", batch.value, batch.comment)
    epochs = settings.take("num_train_epochs")
    draft.put("reward_model.epochs", max(1, round(as_number(epochs.value) or 1)), epochs)
    seed, length = settings.take("seed"), settings.take("max_length")
    draft.put("reward_model.seed", seed.value, seed)
    draft.ask("reward.functions", ["my_rewards.py:reward"], "the rule that labels completions")
    for setting in (settings.take("max_steps"), length, settings.take("save_steps")):
        if setting.given and not is_off(setting.value):
            draft.skip(setting, "reward models train for reward_model.epochs, on whole completions")


def _data(draft: Draft, settings: Settings, method: str) -> None:
    listed, mixed = settings.take("datasets"), settings.take("dataset_mixture")
    rows = mixed.value.get("datasets") if isinstance(mixed.value, dict) else listed.value
    draft.mixture += [_dataset(row) for row in as_list(rows) if isinstance(row, dict)]
    name = settings.take("dataset_name")
    if draft.mixture:
        draft.remark(
            "[[mixture]] samples the datasets by weight; TRL joins their rows. Write weight in proportion to rows."
        )
    elif name.value:
        draft.put("task.name", name.value, name)
    else:
        draft.ask("task.name", "rows.jsonl", "the dataset: a file, or its name on the hub")
    config = settings.take("dataset_config", "dataset_configs")
    if config.value:
        draft.put("task.options", {"name": str(as_list(config.value)[0])}, config)
    split = settings.take("dataset_train_split")
    if split.value not in (None, "train"):
        draft.put("task.split", split.value, split)
    column = settings.take("dataset_prompt_column", "dataset_text_field")
    if column.given and column.value not in (None, "prompt", "text"):
        draft.put("task.columns", {"prompt": str(column.value)}, column)
    limit = settings.take("max_prompt_length")
    if (tokens := as_number(limit.value)) is not None and method not in {"dpo", "sft", "reward"}:
        draft.put("task.max_prompt_tokens", int(tokens), limit)
        draft.put("task.overlong", "filter", "older TRL truncates longer prompts, gruppo leaves them out")
    elif limit.given:
        draft.skip(limit, "sampling.max_tokens and task.max_prompt_tokens bound both")
    _evaluation(draft, settings, method, name)


def _dataset(row: dict[str, Any]) -> dict[str, Any]:
    """A table of the mixture for one entry of TRL's `datasets`, or of the alignment handbook's."""
    path = row.get("path") or row.get("id") or row.get("name")
    config = row.get("config") or (row.get("name") if row.get("path") else None)
    table: dict[str, Any] = {"name": str(path)}
    if config and config != "default":
        table["options"] = {"name": str(config)}
    if row.get("split") not in (None, "train"):
        table["split"] = str(row["split"])
    if (weight := as_number(row.get("weight"))) not in (None, 1.0):
        table["weight"] = weight
    return table


def _evaluation(draft: Draft, settings: Settings, method: str, name: Setting) -> None:
    when, every = settings.take("eval_strategy", "evaluation_strategy"), settings.take("eval_steps")
    split = settings.take("dataset_test_split")
    if is_off(when.value):
        for setting in (every, split):
            if setting.given:
                draft.skip(setting, "eval_strategy is off")
    elif method not in {"grpo", "rloo"} or not name.value:
        draft.lack(when, "TRL measures the loss or the reward on rows; gruppo grades answers. Write [evaluation]")
    else:
        draft.put("evaluation.task", {"name": name.value, "split": split.value or "test"}, when)
        interval = as_number(every.value) or 0
        draft.put("evaluation.every", int(interval) if interval >= 1 else 0, every)
        draft.ask(
            "evaluation.grader", "math_answer", "TRL measures the reward, gruppo the answers; see docs/evaluation.md"
        )


def _without_effect(draft: Draft, settings: Settings) -> None:
    """What belongs to a switch that is off."""
    if is_off(settings.take("sync_ref_model").value):
        for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            if (setting := settings.take(name)).given:
                draft.skip(setting, "sync_ref_model is off")
    else:
        draft.lack("sync_ref_model = true", "write run.iterations, which resets the reference at equal intervals")
