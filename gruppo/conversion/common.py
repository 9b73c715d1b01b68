"""What the conversions of all trainers have in common."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import get_args

from gruppo.config.sections import Tracker
from gruppo.conversion.draft import Draft
from gruppo.conversion.given import Setting, Settings, as_list, as_number, is_off

_SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
}


_FORMS = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")  # of 4-bit weights


def run_name(draft: Draft, *candidates: Setting) -> None:
    """Name the run after the first of these values that is given; of a path, its last part counts."""
    for setting in candidates:
        if setting.given and not is_off(setting.value):
            last = PurePosixPath(str(setting.value)).name
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._")[:100]
            if name and "run.name" not in draft.fields:
                draft.put("run.name", name, setting)
            elif name:
                draft.skip(setting, "`gruppo train --out` names another run folder")


def put_trackers(draft: Draft, *settings: Setting) -> None:
    """The trackers among these values, each of which is a name or a list of names."""
    given = [setting for setting in settings if setting.given and not is_off(setting.value)]
    names = [str(name).lower() for setting in given for name in as_list(setting.value)]
    known = [name for name in dict.fromkeys(names) if name in get_args(Tracker)]
    if known:
        draft.put("run.trackers", known, given[0])
    for name in names:
        if name not in {*known, "console", "none", "all"}:
            draft.lack(name, f"is no tracker of gruppo; it has {', '.join(get_args(Tracker))}")


def put_kl(draft: Draft, coefficient: Setting, estimator: str) -> None:
    """The weight of the KL term, and its estimator where there is a term."""
    weight = as_number(coefficient.value) or 0.0
    draft.put("method.kl_coef", weight, coefficient)
    if weight:
        draft.put("method.kl_estimator", estimator, f"the estimator of {draft.trainer}", given=False)


def put_clips(draft: Draft, low: Setting, high: Setting) -> None:
    """The bounds of the ratio; without an upper one, the lower counts for both."""
    below, above = as_number(low.value), as_number(high.value)
    draft.put("method.clip_low", below, low)
    draft.put("method.clip_high", below if above is None else above, low if above is None else high)


def put_schedule(draft: Draft, settings: Settings, kind: Setting, steps: str, ratio: str, factor: float = 1.0) -> None:
    """The schedule of the learning rate and its warm-up, of which `steps` and `ratio` are the names.

    `factor`: gruppo's steps per step of the other trainer's schedule, at most 1.
    """
    word = str(kind.value)
    schedule = _SCHEDULES.get(word, "cosine" if "cosine" in word else "linear")
    draft.put("optimizer.schedule", schedule, kind)
    if word not in _SCHEDULES:
        what = kind if kind.given else f"{draft.trainer}'s default {kind}"
        draft.lack(what, f'schedules are constant, linear or cosine, without options; "{schedule}" was written')
    warmup, share = settings.take(steps), settings.take(ratio)
    count, fraction = as_number(warmup.value) or 0, as_number(share.value) or 0
    if 0 < count < 1:
        draft.put("optimizer.warmup_ratio", count, warmup)
    elif count >= 1:
        source = warmup if factor == 1 else f"{warmup}, of which a step here has {1 / factor:g}"
        draft.put("optimizer.warmup_steps", max(1, round(count * factor)), source)
    elif fraction:
        draft.put("optimizer.warmup_ratio", fraction, share)


def put_moments(draft: Draft, settings: Settings, *names: str) -> None:
    """The moments of an AdamW that stores them in 8 bits, if one of these names asks for it."""
    for setting in list(settings.rest()):
        if setting.name in names and re.search("adam.*8bit", str(setting.value), re.IGNORECASE):
            draft.put("optimizer.state", "8bit", settings.take(setting.name))


def put_base(draft: Draft, settings: Settings, *names: str) -> None:
    """Frozen weights in 4 bits, if one of these names asks for it, under adapters, which were put before."""
    adapted = any(name.startswith("model.lora.") for name in draft.fields)
    for setting in list(settings.rest()):
        if adapted and setting.name in names and not is_off(setting.value):
            draft.put("model.lora.base", "4bit", settings.take(setting.name))
        elif adapted and setting.name in _FORMS and setting.given:
            draft.skip(settings.take(setting.name), "4-bit weights are NF4 in blocks of 64, with float32 scales")


def aggregation(draft: Draft, setting: Setting) -> None:
    """verl's and OpenRLHF's loss_agg_mode."""
    modes = {
        "token-mean": "token-mean",
        "seq-mean-token-mean": "sequence-mean",
        "seq-mean-token-sum": "sequence-sum",
        "seq-mean-token-sum-norm": "constant",
    }
    if str(setting.value) not in modes:
        draft.lack(setting, 'gruppo has no such aggregation; written as "token-mean"')
    draft.put("method.aggregation", modes.get(str(setting.value), "token-mean"), setting)


def loss_kl(draft: Draft, coefficient: Setting, estimator: Setting) -> None:
    """A KL term in the loss, by verl's and OpenRLHF's names of estimators."""
    name = str(estimator.value).removesuffix("+")
    kinds = {"low_var_kl": "k3", "k3": "k3", "mse": "k2", "k2": "k2", "kl": "k1", "k1": "k1"}
    kind = kinds.get(name, "k3")
    if name not in kinds:
        draft.lack(estimator, "gruppo has no such estimator; written as k3")
    if str(estimator.value).endswith("+") and kind != "k2":
        draft.lack(estimator, "its gradient is that of k2, which was written; its value differs")
        kind = "k2"
    if kind == "k1":
        draft.lack(
            estimator,
            "as a term of the loss, k1 has an expected gradient of 0, so no KL was written; for one, write kl_coef and "
            'kl_estimator = "k3"',
        )
        draft.put("method.kl_coef", 0.0, "the KL has no gradient")
        return
    draft.put("method.kl_coef", as_number(coefficient.value) or 0.0, coefficient)
    if draft.value("method.kl_coef"):
        draft.put("method.kl_estimator", kind, estimator)
