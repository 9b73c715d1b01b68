"""OpenRLHF 0.11: openrlhf.cli.train_ppo_ray, with the names of 0.11 (--actor.adam.lr) and the flat ones before it."""

from __future__ import annotations

from typing import Any

from gruppo.conversion.common import aggregation, loss_kl, put_base, put_kl, put_schedule, put_trackers, run_name
from gruppo.conversion.draft import Draft
from gruppo.conversion.given import Setting, Settings, Source, as_list, as_number, is_off

# OpenRLHF's defaults of what determines the result and has a field in a recipe.
DEFAULTS: dict[str, Any] = {
    "algo.advantage.estimator": "gae",
    "algo.advantage.lambd": 1.0,
    "algo.advantage.gamma": 1.0,
    "algo.kl.init_coef": 0.01,
    "algo.kl.estimator": "k1",
    "actor.eps_clip": 0.2,
    "actor.policy_loss_type": "ppo",
    "actor.loss_agg_mode": "token-mean",
    "actor.adam.lr": 1e-6,
    "actor.adam.betas": [0.9, 0.95],
    "actor.adam.weight_decay": 0.0,
    "actor.lr_scheduler": "cosine_with_min_lr",
    "actor.lr_warmup_ratio": 0.03,
    "actor.max_norm": 1.0,
    "train.num_episodes": 1,
    "train.max_epochs": 1,
    "train.batch_size": 128,
    "train.seed": 42,
    "rollout.batch_size": 1024,
    "rollout.n_samples_per_prompt": 1,
    "rollout.temperature": 1.0,
    "data.max_len": 2048,
    "data.input_key": "input",
}
_CRITIC = {"critic.adam.lr": 9e-6, "critic.value_clip": 0.5}
_LORA = {"ds.lora.alpha": 16}
_SECONDS = 180.0  # that OpenRLHF waits for a reward server
_EVALUATION = {"eval.temperature": 0.6, "eval.n_samples_per_prompt": 4}

# advantage estimator -> the row of the table of methods, and its baseline and scale
_ESTIMATORS = {
    "gae": ("ppo", "batch", "batch"),
    "reinforce": ("reinforce-pp", "batch", "batch"),
    "rloo": ("rloo", "leave-one-out", "none"),
    "reinforce_baseline": ("grpo", "group", "batch"),
    "group_norm": ("grpo", "group", "group"),
    "dr_grpo": ("grpo", "group", "none"),
    "flash_reinforce": ("grpo", "batch", "none"),
}


def convert(source: Source) -> Draft:
    """The recipe that does what OpenRLHF does with these arguments, as far as there is an equivalent."""
    settings = Settings(source.values, DEFAULTS)
    draft = Draft("OpenRLHF", settings)
    _method(draft, settings)
    _correction(draft, settings)
    _kl(draft, settings)
    _batch(draft, settings)
    _model(draft, settings)
    _data(draft, settings)
    _lengths(draft, settings)
    _rewards(draft, settings)
    _evaluation(draft, settings)
    _optimizer(draft, settings)
    board = settings.take("logger.tensorboard_dir", "use_tensorboard")
    names = [Setting(one.name, kind, one.given) for one, kind in (
        (settings.take("logger.wandb.key", "use_wandb"), "wandb"), (board, "tensorboard"),
        (settings.take("use_swanlab"), "swanlab")) if one.given and not is_off(one.value)]  # fmt: skip
    put_trackers(draft, *names)
    run_name(
        draft,
        settings.take("logger.wandb.run_name", "wandb_run_name"),
        settings.take("ckpt.output_dir", "save_path"),
    )
    return draft


def _method(draft: Draft, settings: Settings) -> None:
    estimator = settings.take("algo.advantage.estimator", "advantage_estimator")
    name = str(estimator.value)
    if name not in _ESTIMATORS:
        draft.lack(estimator, 'gruppo has no such advantages; written as "grpo"')
    method, baseline, scale = _ESTIMATORS.get(name, _ESTIMATORS["group_norm"])
    draft.put("method.name", method, estimator)
    draft.put("method.baseline", baseline, f"advantages of {name}", given=False)
    plain = settings.take("algo.advantage.no_std_norm", "no_advantage_std_norm")
    if scale == "batch" and not is_off(plain.value):
        draft.put("method.scale", "none", plain)
    else:
        draft.put("method.scale", scale, f"advantages of {name}", given=False)
    if draft.value("method.scale") == "group":
        draft.put("method.advantage_epsilon", 1e-9, "the ε beside the standard deviation", given=False)
    if method == "ppo":
        for key, value in _CRITIC.items():
            settings.default(key, value)
    else:
        for names in (("algo.advantage.lambd", "lambd"), ("algo.advantage.gamma", "gamma")):
            if (setting := settings.take(*names)).given:
                draft.skip(setting, "there is no value model")
        for setting in list(settings.rest()):
            if setting.name.startswith(("critic.", "critic_", "value_clip")):
                draft.skip(settings.take(setting.name), "there is no value model")
    _loss(draft, settings)


def _loss(draft: Draft, settings: Settings) -> None:
    """The policy term, its bounds, and dynamic sampling."""
    loss = settings.take("actor.policy_loss_type", "policy_loss_type")
    mean = settings.take("actor.loss_agg_mode")
    draft.put("method.surrogate", "clipped", loss)
    if loss.value == "gspo":
        draft.put("method.ratio", "sequence", loss)
        draft.put("method.aggregation", "sequence-mean", loss)
    else:
        aggregation(draft, mean)
    clip = settings.take("actor.eps_clip", "eps_clip")
    pair = [as_number(one) for one in as_list(settings.take("actor.eps_clip_low_high", "eps_clip_low_high").value)]
    low, high = pair if len(pair) == 2 else (as_number(clip.value), as_number(clip.value))
    bounds: Setting | str = "eps_clip_low_high" if len(pair) == 2 else clip
    draft.put("method.clip_low", low, bounds)
    draft.put("method.clip_high", high, bounds)
    if settings.flag("algo.dynamic_filtering_enable", "dynamic_filtering"):
        draft.put("method.dynamic_sampling_rounds", 9, "dynamic_filtering, which has no limit")
        limits = settings.take("algo.dynamic_filtering_range", "dynamic_filtering_reward_range")
        if limits.given:
            draft.lack(limits, "dropped groups are those whose rewards are all equal")


def _correction(draft: Draft, settings: Settings) -> None:
    """Weights for the difference between vLLM and the trainer."""
    old, level = settings.take("enable_vllm_is_correction"), settings.take("algo.advantage.is_correction_level")
    mode, gate = (
        settings.take("algo.advantage.is_correction_mode"),
        settings.take("algo.advantage.is_correction_gating"),
    )
    kind, masks = settings.take("vllm_is_correction_type"), settings.take("use_icepop")
    bounds = settings.take("algo.advantage.is_correction_threshold", "vllm_is_truncated_threshold")
    is_on = next((one for one in (old, level) if one.given and not is_off(one.value)), None)
    clips = mode.value == "clip" if is_on is level else is_off(masks.value) and kind.value in (None, "tis")
    if is_on is None:
        for setting in (mode, gate, bounds, kind, masks):
            if setting.given:
                draft.skip(setting, "the correction is off")
    elif clips and level.value in (None, "token") and gate.value in (None, "ratio"):
        limits = as_list(bounds.value)
        draft.put("method.tis_cap", as_number(limits[-1]) if limits else 5.0, bounds if limits else is_on)
    else:
        draft.lack(is_on, "method.tis_cap truncates the weights of tokens, and nothing rejects completions or tokens")


def _kl(draft: Draft, settings: Settings) -> None:
    coefficient = settings.take("algo.kl.init_coef", "init_kl_coef")
    in_loss = settings.flag("algo.kl.use_loss", "use_kl_loss")
    old = "k3" if settings.flag("use_kl_estimator_k3") else None
    estimator = settings.take("algo.kl.estimator", "kl_estimator")
    if old and not estimator.given:
        estimator = Setting("use_kl_estimator_k3", "k3", True)
    if in_loss:
        loss_kl(draft, coefficient, estimator)
        return
    put_kl(draft, coefficient, "k1")
    if draft.value("method.kl_coef") and estimator.value != "k1":
        draft.lack(estimator, "in the reward, the estimator is k1")
    if draft.value("method.kl_coef") and draft.value("method.name") in {"grpo", "rloo"}:
        draft.lack(
            "the KL at every token, after the baseline",
            "gruppo subtracts the KL of the whole completion from its reward, before the baseline",
        )


def _batch(draft: Draft, settings: Settings) -> None:
    rollout, group = settings.take("rollout.batch_size", "rollout_batch_size"), settings.take(
        "rollout.n_samples_per_prompt", "n_samples_per_prompt"
    )  # fmt: skip
    train, epochs = (
        settings.take("train.batch_size", "train_batch_size"),
        settings.take("train.max_epochs", "max_epochs"),
    )
    prompts, count = int(as_number(rollout.value) or 1024), int(as_number(group.value) or 1)
    update = max(1, int(as_number(train.value) or 128))
    parts = max(1, prompts * count // update)
    draft.put("sampling.group_size", count, group)
    draft.put("sampling.prompts_per_step", prompts, rollout)
    draft.put("method.inner_updates", int(as_number(epochs.value) or 1), epochs)
    if parts > 1:
        draft.put("method.minibatches", parts, f"{train}, of {prompts * count} completions", given=train.given)
    draft.remark(
        f"Batch: rollout batch {prompts} prompts × {count} completions, in {parts} update{'s' if parts > 1 else ''} of "
        f"train batch {update} completions."
    )
    passes = settings.take("train.num_episodes", "num_episodes")
    draft.put("run.epochs", as_number(passes.value), passes)
    every = settings.take("ckpt.save_steps", "save_steps")
    if interval := max(0, int(as_number(every.value) or 0)):
        draft.put("run.checkpoint_every", interval, every)
    elif every.given:
        draft.skip(every, "gruppo saves every run.checkpoint_every steps, and at the end")


def _model(draft: Draft, settings: Settings) -> None:
    name = settings.take("actor.model_name_or_path", "pretrain")
    if name.value:
        draft.put("model.name", name.value, name)
    kind = settings.take("ds.param_dtype", "fsdp.param_dtype", "param_dtype", "bf16")
    if kind.given and str(kind.value) in {"bf16", "True"}:
        draft.put("model.dtype", "bfloat16", kind)
    elif kind.given:
        draft.lack(kind, 'float16 is not supported; write model.dtype = "bfloat16", or leave it out')
    rank = settings.take("ds.lora.rank", "lora_rank")
    if int(as_number(rank.value) or 0) > 0:
        for key, value in _LORA.items():
            settings.default(key, value)
        draft.put("model.lora.rank", as_number(rank.value), rank)
        alpha = settings.take("ds.lora.alpha", "lora_alpha")
        draft.put("model.lora.alpha", as_number(alpha.value), alpha)
        targets = settings.take("ds.lora.target_modules", "target_modules")
        whole = targets.value in (None, "all-linear")
        draft.put("model.lora.targets", "all-linear" if whole else as_list(targets.value), targets)
        put_base(draft, settings, "ds.load_in_4bit", "load_in_4bit")
    else:
        for setting in list(settings.rest()):
            if setting.name.startswith(("ds.lora.", "lora_", "target_modules")):
                draft.skip(settings.take(setting.name), "lora.rank is 0")


def _data(draft: Draft, settings: Settings) -> None:
    data, shares = (
        settings.take("data.prompt_dataset", "prompt_data"),
        settings.take("data.prompt_probs", "prompt_data_probs"),
    )
    names = [str(one).rpartition("@")[2] for one in as_list(data.value)]
    weights = [as_number(one) for one in as_list(shares.value)]
    if len(names) > 1:
        draft.mixture += [
            {"name": name, **({"weight": weight} if weight else {})}
            for name, weight in zip(names, weights if len(weights) == len(names) else [None] * len(names))
        ]
    elif names:
        draft.put("task.name", names[0], data)
    else:
        draft.ask("task.name", "prompts.jsonl", "the dataset of the prompts, data.prompt_dataset")
    key, label = settings.take("data.input_key", "input_key"), settings.take("data.label_key", "label_key")
    columns = {"prompt": str(key.value)} if key.value not in (None, "prompt") else {}
    columns |= {"answer": str(label.value)} if label.value not in (None, "answer") else {}
    template = settings.take("data.input_template", "input_template")
    fields: dict[str, tuple[Any, Setting | str]] = {}
    if columns:
        fields["columns"] = columns, "input_key and label_key"
    if isinstance(template.value, str) and "{}" in template.value:
        fields["template"] = template.value.replace("{}", "{prompt}"), template
    if settings.flag("data.apply_chat_template", "apply_chat_template"):
        fields["system"] = "", "apply_chat_template: prompts that are texts become conversations"
    split = settings.take("data.prompt_split", "prompt_split")
    if split.given and split.value != "train":
        fields["split"] = split.value, split
    for field, (value, source) in fields.items():
        draft.put(f"task.{field}", value, source)


def _lengths(draft: Draft, settings: Settings) -> None:
    total, new = settings.take("data.max_len", "max_len"), settings.take("rollout.max_new_tokens", "generate_max_len")
    limit = settings.take("prompt_max_len")
    if (tokens := as_number(new.value)) is not None:
        draft.put("sampling.max_tokens", int(tokens), new)
    elif (whole := as_number(total.value)) is not None:
        draft.put("sampling.max_tokens", int(whole), f"{total}, of prompt and completion together")
        draft.lack(total, "a completion here may have this many tokens, whatever the length of its prompt")
    if (tokens := as_number(limit.value)) is not None:
        draft.put("task.max_prompt_tokens", int(tokens), limit)
        draft.put("task.overlong", "filter", "OpenRLHF truncates longer prompts, gruppo leaves them out")


def _rewards(draft: Draft, settings: Settings) -> None:
    model = settings.take("reward.model_name_or_path", "reward_pretrain")
    remote, agent = (
        settings.take("reward.remote_url", "remote_rm_url"),
        settings.take("train.agent_func_path", "agent_func_path"),
    )
    functions: list[str] = []
    options: dict[str, Any] = {}
    weights: list[float] = []
    source = model
    servers = [str(one) for one in as_list(remote.value)] if is_off(agent.value) else []
    if servers and servers[0].startswith(("http://", "https://")):
        functions, weights, source = ["remote"], [1.0], remote
        options["remote"] = _server(draft, servers)
    elif model.value and is_off(remote.value):
        for name in as_list(model.value):
            label = "classifier" if not functions else f"classifier{len(functions) + 1}"
            functions.append(label if label == "classifier" else f"{label} = classifier")
            options[label] = {"model": str(name)}
            weights.append(1.0)
    placeholder = not functions
    if placeholder:
        functions, weights = ["my_rewards.py:reward"], [1.0]
    length, factor = settings.take("reward.overlong_buffer_len", "overlong_buffer_len"), settings.take(
        "reward.overlong_penalty_factor", "overlong_penalty_factor"
    )  # fmt: skip
    if tokens := as_number(length.value):
        functions.append("overlong")
        weights.append(as_number(factor.value) or 1.0)
        options["overlong"] = {"buffer_tokens": int(tokens)}
    if placeholder:
        what = (
            "OpenRLHF's reward_func(queries, prompts, labels) becomes reward(prompts, completions, answer, **columns)"
        )
        where = next((one for one in (remote, agent) if not is_off(one.value)), None)
        draft.ask("reward.functions", functions, what if where is None else f"{where}; {what}")
    else:
        draft.put("reward.functions", functions, source)
    if not is_off(agent.value):
        draft.lack(agent, 'an agent of several turns is a class; write [environment] with name = "file.py:Class"')
    if set(weights) != {1.0}:
        draft.put("reward.weights", weights, factor)
    if options:
        draft.put("reward.options", options, "models and lengths of the reward")


def _server(draft: Draft, servers: list[str]) -> dict[str, Any]:
    """The options of the reward "remote" for a reward server, with the time and tries that OpenRLHF gives a request."""
    options: dict[str, Any] = {"url": servers[0], "format": "openrlhf", "timeout": _SECONDS, "tries": 5}
    if "task.system" in draft.fields:  # prompts are conversations
        options["tokenizer"] = draft.value("model.name")
    if servers[1:]:
        draft.lack(", ".join(servers[1:]), "a reward asks one server; put a load balancer in front of several")
    draft.lack("the EOS token at the end of each query", "a reward gets the text before it; let the server add one")
    source = f"{_SECONDS:g} seconds per request"
    draft.put("reward.timeout", 4 * _SECONDS, f"{source}, and time for more tries", given=False)
    return options


def _evaluation(draft: Draft, settings: Settings) -> None:
    data, every = settings.take("eval.dataset", "eval_dataset"), settings.take("eval.steps", "eval_steps")
    if is_off(data.value):
        if every.given:
            draft.skip(every, "there is no evaluation dataset")
        return
    for key, value in _EVALUATION.items():
        settings.default(key, value)
    split = settings.take("eval.split", "eval_split")
    samples = settings.take("eval.n_samples_per_prompt", "eval_n_samples_per_prompt")
    heat = settings.take("eval.temperature", "eval_temperature")
    draft.put("evaluation.task", {"name": str(data.value), "split": str(split.value or "train")}, data)
    draft.put("evaluation.every", max(0, int(as_number(every.value) or 0)), every)
    draft.put("evaluation.samples", int(as_number(samples.value) or 4), samples)
    draft.put("evaluation.decoding.temperature", as_number(heat.value), heat)
    draft.ask(
        "evaluation.grader", "math_answer", "OpenRLHF measures the reward, gruppo the answers; see docs/evaluation.md"
    )


def _optimizer(draft: Draft, settings: Settings) -> None:
    betas = settings.take("actor.adam.betas", "adam_betas")
    pair = [as_number(one) for one in as_list(betas.value)]
    if len(pair) == 2:
        draft.put("optimizer.beta1", pair[0], betas)
        draft.put("optimizer.beta2", pair[1], betas)
    rate = settings.take("actor.adam.lr", "actor_learning_rate")
    draft.put("optimizer.learning_rate", as_number(rate.value), rate)
    kind = settings.take("actor.lr_scheduler", "lr_scheduler")
    share = settings.take("actor.lr_warmup_ratio", "lr_warmup_ratio")
    if not settings.is_given("actor.muon.lr"):
        for setting in list(settings.rest()):
            if ".muon." in setting.name:
                draft.skip(settings.take(setting.name), "the optimizer is Adam")
    settings.default("lr_warmup_ratio", share.value)
    put_schedule(draft, settings, kind, "lr_warmup_steps", "lr_warmup_ratio")
