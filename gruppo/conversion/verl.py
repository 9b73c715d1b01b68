"""verl 0.9.1: trainer.main_ppo (PPO, GRPO, RLOO, REINFORCE++), and the additions of its DAPO recipe."""

from __future__ import annotations

import re
from typing import Any

from gruppo.conversion.common import aggregation, loss_kl, put_kl, put_moments, put_schedule, put_trackers, run_name
from gruppo.conversion.draft import Draft
from gruppo.conversion.given import Setting, Settings, Source, as_list, as_number, is_off, written

_ACTOR, _ROLLOUT, _MODEL = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout.", "actor_rollout_ref.model."

# verl's defaults of what determines the result and has a field in a recipe.
DEFAULTS: dict[str, Any] = {
    "algorithm.adv_estimator": "gae",
    "algorithm.norm_adv_by_std_in_grpo": True,
    "algorithm.kl_ctrl.kl_coef": 0.001,
    "algorithm.gamma": 1.0,
    "algorithm.lam": 1.0,
    "data.train_batch_size": 1024,
    "data.max_prompt_length": 512,
    "data.max_response_length": 512,
    f"{_ACTOR}ppo_mini_batch_size": 256,
    f"{_ACTOR}ppo_epochs": 1,
    f"{_ACTOR}clip_ratio": 0.2,
    f"{_ACTOR}clip_ratio_low": 0.2,
    f"{_ACTOR}clip_ratio_high": 0.2,
    f"{_ACTOR}loss_agg_mode": "token-mean",
    f"{_ACTOR}policy_loss.loss_mode": "vanilla",
    f"{_ACTOR}kl_loss_coef": 0.001,
    f"{_ACTOR}kl_loss_type": "low_var_kl",
    f"{_ACTOR}optim.lr": 1e-6,
    f"{_ACTOR}optim.weight_decay": 0.01,
    f"{_ACTOR}optim.lr_scheduler_type": "constant",
    f"{_ACTOR}grad_clip": 1.0,
    f"{_ROLLOUT}n": 1,
    f"{_ROLLOUT}temperature": 1.0,
    "trainer.total_epochs": 30,
}
_LORA = {f"{_MODEL}lora_alpha": 16, f"{_MODEL}target_modules": "all-linear"}
_CRITIC = {"critic.optim.lr": 1e-5, "critic.cliprange_value": 0.5}

# adv_estimator -> the row of the table of methods, and its baseline and scale
_ESTIMATORS = {
    "gae": ("ppo", "batch", "batch"),
    "grpo": ("grpo", "group", "group"),
    "grpo_vectorized": ("grpo", "group", "group"),
    "rloo": ("rloo", "leave-one-out", "none"),
    "rloo_vectorized": ("rloo", "leave-one-out", "none"),
    "reinforce_plus_plus": ("reinforce-pp", "batch", "batch"),
    "reinforce_plus_plus_baseline": ("grpo", "group", "batch"),
}
# Ways to call compute_score once per completion; "dapo" adds the overlong buffer.
_MANAGERS = ("naive", "dapo", "remote", "rate_limited")
_LOSSES = {
    "vanilla": ("clipped", "token"),
    "gspo": ("clipped", "sequence"),
    "cispo": ("clipped-weight", "token"),
    "gpg": ("log-likelihood", "token"),
}


def convert(source: Source) -> Draft:
    """The recipe that does what verl does with this configuration, as far as there is an equivalent."""
    settings = Settings(source.values, DEFAULTS)
    draft = Draft("verl", settings)
    _method(draft, settings)
    _batch(draft, settings)
    _kl(draft, settings)
    _model(draft, settings)
    _data(draft, settings)
    _rewards(draft, settings)
    _sampling(draft, settings)
    kind = settings.take(f"{_ACTOR}optim.lr_scheduler_type", f"{_ACTOR}optim.warmup_style")
    warmup = f"{_ACTOR}optim.lr_warmup_steps"
    put_schedule(draft, settings, kind, warmup, f"{warmup}_ratio")
    put_moments(draft, settings, f"{_ACTOR}optim.optimizer")
    put_trackers(draft, settings.take("trainer.logger"))
    run_name(draft, settings.take("trainer.experiment_name"), settings.take("trainer.default_local_dir"))
    _evaluation(draft, settings)
    return draft


def _method(draft: Draft, settings: Settings) -> None:
    estimator = settings.take("algorithm.adv_estimator")
    name = str(estimator.value).rpartition(".")[2].lower()
    if name not in _ESTIMATORS:
        draft.lack(estimator, 'gruppo has no such advantages; written as "grpo"')
    method, baseline, scale = _ESTIMATORS.get(name, _ESTIMATORS["grpo"])
    draft.put("method.name", method, estimator)
    by_std = settings.take("algorithm.norm_adv_by_std_in_grpo")
    draft.put("method.baseline", baseline, f"adv_estimator = {name}", given=False)
    if scale == "group" and is_off(by_std.value):
        draft.put("method.scale", "none", by_std)
    else:
        draft.put("method.scale", scale, f"adv_estimator = {name}", given=False)
    if name == "reinforce_plus_plus_baseline":
        draft.remark("verl divides by the deviation over all tokens, gruppo by that over all completions.")
    if method == "ppo":
        for key, value in _CRITIC.items():
            settings.default(key, value)
    else:
        settings.take("algorithm.lam")
        settings.take("algorithm.gamma")
        for setting in list(settings.rest()):
            if setting.name.startswith("critic."):
                draft.skip(settings.take(setting.name), "there is no value model")
    mode = settings.take(f"{_ACTOR}policy_loss.loss_mode", f"{_ACTOR}loss_mode")
    if str(mode.value) not in _LOSSES:
        draft.lack(mode, 'gruppo has no such loss; written as "clipped". See method.surrogate for one of your own')
    surrogate, ratio = _LOSSES.get(str(mode.value), _LOSSES["vanilla"])
    draft.put("method.surrogate", surrogate, mode)
    draft.put("method.ratio", ratio, mode)
    aggregation(draft, settings.take(f"{_ACTOR}loss_agg_mode"))
    _clips(draft, settings)
    if surrogate == "clipped" and not settings.is_given(f"{_ACTOR}clip_ratio_c"):
        draft.lack(
            "verl's default clip_ratio_c = 3.0",
            "a ratio above 3 of a completion with a negative advantage is not clipped",
        )
    _filtering(draft, settings)


def _filtering(draft: Draft, settings: Settings) -> None:
    """Dynamic sampling."""
    rounds = settings.take("algorithm.filter_groups.max_num_gen_batches")
    if settings.flag("algorithm.filter_groups.enable"):
        limit = int(as_number(rounds.value) or 0)
        what: Setting | str = rounds if limit else "algorithm.filter_groups.enable = true, without a limit"
        draft.put("method.dynamic_sampling_rounds", limit - 1 if limit > 1 else 9, what)
    elif rounds.given:
        draft.skip(rounds, "algorithm.filter_groups.enable is off")


def _clips(draft: Draft, settings: Settings) -> None:
    both = settings.take(f"{_ACTOR}clip_ratio")
    for side in ("low", "high"):
        one = settings.take(f"{_ACTOR}clip_ratio_{side}")
        draft.put(f"method.clip_{side}", as_number(one.value), one)
    if both.given and as_number(both.value) != draft.value("method.clip_low"):
        draft.skip(both, "verl reads clip_ratio_low and clip_ratio_high, which are 0.2 unless they are set")


def _batch(draft: Draft, settings: Settings) -> None:
    batch, mini = settings.take("data.train_batch_size"), settings.take(f"{_ACTOR}ppo_mini_batch_size")
    group, epochs = settings.take(f"{_ROLLOUT}n"), settings.take(f"{_ACTOR}ppo_epochs")
    settings.take(f"{_ACTOR}rollout_n", "critic.rollout_n", "actor_rollout_ref.ref.rollout_n")
    settings.take("critic.ppo_mini_batch_size")
    prompts, count = int(as_number(batch.value) or 1024), int(as_number(group.value) or 1)
    part = max(1, min(int(as_number(mini.value) or prompts), prompts))
    draft.put("sampling.group_size", count, group)
    draft.put("sampling.prompts_per_step", prompts, batch)
    draft.put("method.inner_updates", int(as_number(epochs.value) or 1), epochs)
    if prompts > part:
        draft.put("method.minibatches", prompts // part, f"{mini}, of train_batch_size {prompts}", given=mini.given)
    draft.remark(
        f"Batch: train_batch_size {prompts} prompts × rollout.n {count} completions, in {prompts // part} "
        f"update{'s' if prompts > part else ''} of ppo_mini_batch_size {part} prompts."
    )
    steps, passes = settings.take("trainer.total_training_steps"), settings.take("trainer.total_epochs")
    if total := as_number(steps.value):
        draft.put("run.steps", int(total), steps)
    else:
        draft.put("run.epochs", as_number(passes.value), passes)
    every = settings.take("trainer.save_freq")
    if interval := max(0, int(as_number(every.value) or 0)):
        draft.put("run.checkpoint_every", interval, every)
    elif every.given:
        draft.skip(every, "gruppo saves every run.checkpoint_every steps, and at the end")


def _kl(draft: Draft, settings: Settings) -> None:
    in_loss, in_reward = settings.take(f"{_ACTOR}use_kl_loss"), settings.take("algorithm.use_kl_in_reward")
    coefficient, kind = settings.take(f"{_ACTOR}kl_loss_coef"), settings.take(f"{_ACTOR}kl_loss_type")
    weight = settings.take("algorithm.kl_ctrl.kl_coef", "algorithm.kl_penalty_coef")
    estimator = settings.take("algorithm.kl_penalty")
    if not is_off(in_reward.value):
        put_kl(draft, weight, "k1")
        if not is_off(in_loss.value):
            draft.lack(in_loss, "there is one KL term; that in the reward was written")
        if estimator.given and str(estimator.value) not in {"kl", "k1"}:
            draft.lack(estimator, "in the reward, the estimator is k1")
    elif not is_off(in_loss.value):
        loss_kl(draft, coefficient, kind)
    else:
        draft.put("method.kl_coef", 0.0, "no KL: use_kl_loss and use_kl_in_reward are off", given=in_loss.given)
        for setting in (coefficient, kind, weight, estimator):
            if setting.given:
                draft.skip(setting, "the KL is off")


def _model(draft: Draft, settings: Settings) -> None:
    rank = settings.take(f"{_MODEL}lora_rank", f"{_MODEL}lora.rank")
    if int(as_number(rank.value) or 0) > 0:
        for key, value in _LORA.items():
            settings.default(key, value)
        draft.put("model.lora.rank", as_number(rank.value), rank)
        alpha = settings.take(f"{_MODEL}lora_alpha", f"{_MODEL}lora.alpha")
        draft.put("model.lora.alpha", as_number(alpha.value), alpha)
        targets = settings.take(f"{_MODEL}target_modules", f"{_MODEL}lora.target_modules")
        whole = targets.value == "all-linear"
        draft.put("model.lora.targets", targets.value if whole else as_list(targets.value), targets)
    else:
        for setting in list(settings.rest()):
            if re.search(r"model\.(lora|target_modules|exclude_modules)", setting.name):
                draft.skip(settings.take(setting.name), "lora_rank is 0")
    settings.take("data.trust_remote_code")


def _data(draft: Draft, settings: Settings) -> None:
    files = settings.take("data.train_files")
    names = [str(one) for one in as_list(files.value)]
    if len(names) > 1:
        draft.mixture += [{"name": name} for name in names]
        draft.remark(
            "[[mixture]] samples the files by weight; verl joins their rows. Write weight in proportion to rows."
        )
    elif names:
        draft.put("task.name", names[0], files)
    else:
        draft.ask("task.name", "train.parquet", "the file of the training prompts, data.train_files")
    key = settings.take("data.prompt_key")
    if key.value not in (None, "prompt"):
        draft.put("task.columns", {"prompt": str(key.value)}, key)
    limit = settings.take("data.max_prompt_length", f"{_ROLLOUT}prompt_length")
    draft.put("task.max_prompt_tokens", int(as_number(limit.value) or 512), limit)
    filtered, cut = settings.take("data.filter_overlong_prompts"), settings.take("data.truncation")
    if not is_off(filtered.value):
        draft.put("task.overlong", "filter", filtered)
    elif str(cut.value) in {"left", "right", "middle"}:
        draft.lack(cut, "prompts are never truncated; longer ones are left out")
        draft.put("task.overlong", "filter", cut)
    options = settings.take("data.apply_chat_template_kwargs")
    nested = {one.name.rpartition(".")[2]: settings.take(one.name).value for one in list(settings.rest())
              if one.name.startswith("data.apply_chat_template_kwargs.")}  # fmt: skip
    if nested or options.value:
        draft.put("task.chat_template_kwargs", nested or options.value, "data.apply_chat_template_kwargs")


def _rewards(draft: Draft, settings: Settings) -> None:
    functions, source, question = _functions(draft, settings)
    buffer = _taken(settings, r"overlong_buffer(_cfg)?\.(enable|len|penalty_factor)$|reward_kwargs\.max_resp_len$")
    if not is_off(buffer.get("enable")):
        functions["overlong"] = {"buffer_tokens": int(as_number(buffer.get("len")) or 4096)}
        if limit := as_number(buffer.get("max_resp_len")):
            functions["overlong"]["max_tokens"] = int(limit)
        weight = as_number(buffer.get("penalty_factor")) or 1.0
        if weight != 1.0:
            weights = [*[1.0] * (len(functions) - 1), weight]
            draft.put("reward.weights", weights, "overlong_buffer.penalty_factor")
    if question:
        draft.ask("reward.functions", list(functions), question)
    else:
        draft.put("reward.functions", list(functions), source)
    options = {name: given for name, given in functions.items() if given}
    if options:
        draft.put("reward.options", options, "arguments of the rewards")


def _functions(draft: Draft, settings: Settings) -> tuple[dict[str, dict[str, Any]], Setting, str]:
    """The rewards with their options, the setting that they come from, and what the user has to look at ("" for none).

    verl has no name for the address of a reward server. Under `reward`, some of its users have.
    """
    path = settings.take("reward.custom_reward_function.path", "custom_reward_function.path")
    name = settings.take("reward.custom_reward_function.name", "custom_reward_function.name")
    source = model = settings.take("reward.reward_model.model_path", "reward_model.model.path")
    manager = settings.take("reward.reward_manager.name", "reward_model.reward_manager")
    if manager.value in _MANAGERS:
        draft.skip(manager, "gruppo calls the function in processes of its own, as this manager does")
    elif manager.given:
        draft.lack(manager, "gruppo calls compute_score for one completion at a time")
    found: dict[str, dict[str, Any]] = {}
    question = ""
    address = next((one for one in settings.rest() if _is_server(one)), None)
    if not is_off(path.value):
        source = path
        arguments = _taken(settings, r"custom_reward_function\.reward_kwargs\.\w+$")
        found[f"verl:{path.value}:{name.value or 'compute_score'}"] = arguments
    elif address is not None:
        question = (
            f"{settings.take(address.name)}, which is not a name of verl; if the server does not take the arguments of "
            "compute_score, change format (docs/rewards.md)"
        )
        found["remote"] = {"url": str(address.value), "format": "verl"}
        draft.put("reward.timeout", 240.0, "60 seconds per request, and time for more tries", given=False)
    if settings.flag("reward.reward_model.enable", "reward_model.enable") and not is_off(model.value):
        found["classifier"] = {"model": str(model.value)}
    if not found:
        question = 'verl\'s own choice by data_source, which needs verl; or e.g. "math_verify"'
        found["verl:verl.utils.reward_score:default_compute_score"] = {}
    return found, source, question


def _is_server(setting: Setting) -> bool:
    table, _, name = setting.name.rpartition(".")
    other = re.search(r"^(?!reward)|sandbox_fusion|reward_kwargs", table)
    return not other and name.endswith(("url", "address", "endpoint")) and str(setting.value).startswith("http")


def _taken(settings: Settings, pattern: str) -> dict[str, Any]:
    """The values of all names in which the pattern occurs, by the last part of the name."""
    names = [one.name for one in settings.rest() if re.search(pattern, one.name)]
    return {name.rpartition(".")[2]: settings.take(name).value for name in names}


def _sampling(draft: Draft, settings: Settings) -> None:
    length = settings.take("data.max_response_length", f"{_ROLLOUT}response_length")
    draft.put("sampling.max_tokens", int(as_number(length.value) or 512), length)
    settings.take(f"{_ROLLOUT}response_length")
    level, cap = settings.take("algorithm.rollout_correction.rollout_is"), settings.take(
        "algorithm.rollout_correction.rollout_is_threshold", f"{_ACTOR}tis_imp_ratio_cap"
    )  # fmt: skip
    if str(level.value) == "token" or (cap.name.endswith("tis_imp_ratio_cap") and as_number(cap.value)):
        bound = as_number(cap.value) or 2.0
        draft.put("method.tis_cap", bound, cap if cap.given else "verl's cap of 2")
    elif not is_off(level.value):
        draft.lack(level, "method.tis_cap weights tokens, not whole completions")
    elif cap.given:
        draft.skip(cap, "rollout_is is off")


def _evaluation(draft: Draft, settings: Settings) -> None:
    files, every = settings.take("data.val_files"), settings.take("trainer.test_freq")
    if files.given:
        draft.lack(
            f"data.val_files = {written(files.value)}",
            "verl scores these rows with the reward, gruppo grades answers: write [evaluation] with task = the file, "
            "and a grader that finds the answer (the column answer; verl's files keep it in reward_model.ground_truth)",
        )
    interval = as_number(every.value) or 0
    if interval > 0:
        draft.lack(every, "write evaluation.every in that table")
    for setting in list(settings.rest()):
        if ".val_kwargs." in setting.name and setting.given:
            draft.lack(settings.take(setting.name), "write evaluation.samples and [evaluation.decoding] in that table")
