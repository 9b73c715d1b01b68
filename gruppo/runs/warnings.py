"""Warnings while training: what a line of metrics, seen after those before it, gives reason to look at.

Everything follows from the lines of metrics.jsonl alone, so a run that was killed and resumed has the warnings of the
run that nobody killed. Thresholds are constants here; docs/warnings.md explains each warning and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from gruppo.utils.stats import trend

Line = Mapping[str, Any]

PATIENCE = 5  # steps without a finding after which its warning has passed
KEPT = 60  # steps that are looked back at
START = 5  # steps at the beginning that later ones are compared with
QUIET = 5  # steps without any signal
CUT_STEPS, CUT_SHARE = 3, 0.95
RECENT, BEFORE = 5, 20  # lengths: the last steps, and how long before them those that they are compared with end
GROWN, SHRUNK, FEWEST_TOKENS = 2.0, 1 / 3, 16
ENTROPY_STEPS, ENTROPY_SHARE, ENTROPY_FLOOR = 3, 0.1, 0.01
DRIFT_STEPS = 3
PART_STEPS, PART_SHARE, NOTHING = 10, 0.9, 1e-9
KL_STEPS, KL_FACTOR, KL_LEAST, KL_MOST = 3, 5.0, 0.1, 1.0
SPIKE, SPIKE_STEPS = 10.0, 10
RISES = 2.0  # standard errors of a slope
CHANCE = 2.0  # standard errors of an area under the curve
PENALTIES = ("overlong", "repetition")  # rewards that are 0 where all is well


@dataclass(frozen=True)
class Evidence:
    """What there is to warn of, in words, and the numbers that say so."""

    message: str
    evidence: Mapping[str, Any]


@dataclass(frozen=True)
class WarningEvent:
    """A warning that begins at a step, or has passed there."""

    name: str
    step: int
    passed: bool
    message: str
    evidence: Mapping[str, Any]

    @property
    def link(self) -> str:
        """Where it is explained."""
        return f"docs/warnings.md#{self.name.replace('_', '-')}"


@dataclass
class History:
    """The lines that checks look at. `first`: of the run's first steps; `steps`: of the last; `evaluations`: of all;
    `judged`: of the reward model's last training.
    `weights`: of the parts of the reward; `drift`: nats, on average, by which engine and trainer may differ."""

    weights: Mapping[str, float]
    drift: float
    first: list[Line] = field(default_factory=list)
    steps: list[Line] = field(default_factory=list)
    evaluations: list[Line] = field(default_factory=list)
    judged: Line | None = None
    count: int = 0

    def add(self, line: Line) -> bool:
        """Take a line in; whether it is one of a step."""
        if "eval/accuracy" in line:
            self.evaluations.append(line)
        if "reward_model/after/positives" in line:
            self.judged = line
        if "completion/length" not in line:
            return False
        self.count += 1
        if len(self.first) < START:
            self.first.append(line)
        self.steps = [*self.steps, line][-KEPT:]
        return True

    def last(self, name: str, count: int) -> list[float]:
        """A metric of the last `count` steps; nothing where one of them has none."""
        return _values(self.steps[-count:], name) if len(self.steps) >= count else []

    def span(self, count: int) -> list[int]:
        """First and last of the last `count` steps."""
        return [int(self.steps[-count]["step"]), int(self.steps[-1]["step"])]


class WarningMonitor:
    """Looks at the lines of a run one by one, as they are written, or again after a resume."""

    def __init__(self, weights: Mapping[str, float], drift: float) -> None:
        self._seen = History(weights, drift)
        self._silent: dict[str, int] = {}  # of each warning that is on, for how many steps nothing was found

    def see(self, line: Line) -> list[WarningEvent]:
        """What begins or has passed with this line."""
        step, is_step, notices = int(line["step"]), self._seen.add(line), []
        for name, check in CHECKS.items():
            found = check(self._seen)
            if found is not None:
                if name not in self._silent:
                    notices.append(WarningEvent(name, step, False, found.message, found.evidence))
                self._silent[name] = 0
            elif name in self._silent and is_step:
                self._silent[name] += 1
                if self._silent[name] == PATIENCE:
                    del self._silent[name]
                    notices.append(WarningEvent(name, step, True, f"not seen for {PATIENCE} steps", {}))
        return notices


def warnings_of(lines: Iterable[Line], weights: Mapping[str, float], drift: float) -> list[WarningEvent]:
    """All that `WarningMonitor` says of a run's lines."""
    watch = WarningMonitor(weights, drift)
    return [notice for line in lines for notice in watch.see(line)]


def no_nonzero_advantage(seen: History) -> Evidence | None:
    """No group's completions differ in their rewards, for QUIET steps."""
    shares = seen.last("groups/nonzero_advantage", QUIET)
    if not shares or any(shares):
        return None
    steps = seen.span(QUIET)
    return Evidence(
        f"no group carried a signal in steps {_to(steps)}: nothing is learned from rewards",
        {"steps": steps, "reward/mean": seen.last("reward/mean", QUIET)},
    )


def evaluation_falls(seen: History) -> Evidence | None:
    """The last evaluation lies below the best one, their intervals apart, and the reward rose in between."""
    if len(seen.evaluations) < 2:
        return None
    now = seen.evaluations[-1]
    best = max(seen.evaluations[:-1], key=lambda line: (float(line["eval/accuracy"]), int(line["step"])))
    between = [line for line in seen.steps if best["step"] < line["step"] <= now["step"]]
    if len(between) < 3 or now["eval/accuracy_high"] >= best["eval/accuracy_low"]:
        return None
    rewards = [_reward(line) for line in between]
    if trend(rewards) <= RISES:
        return None
    steps = [int(best["step"]), int(now["step"])]
    return Evidence(
        f"the evaluation fell from {best['eval/accuracy']:.1%} after step {steps[0]} to {now['eval/accuracy']:.1%} "
        f"after step {steps[1]} while the reward rose from {_ends(rewards)}: what it rewards may not be what is asked",
        {"steps": steps, "eval/accuracy": [best["eval/accuracy"], now["eval/accuracy"]], "reward": rewards},
    )


def lengths(seen: History) -> Evidence | None:
    """Completions have become twice as long within some steps; or a third as long, and the reward has not risen."""
    if len(seen.steps) < 2 * RECENT:
        return None
    window = seen.steps[-(RECENT + BEFORE) :]
    values = _values(window, "completion/length")
    before, now = fmean(values[:RECENT]), fmean(values[-RECENT:])
    steps = [int(window[0]["step"]), int(window[-1]["step"])]
    evidence = {"steps": steps, "completion/length": values}
    told = f"completions went from {before:.0f} to {now:.0f} tokens over steps {_to(steps)}"
    if now >= GROWN * before and now - before >= FEWEST_TOKENS:
        cut = window[-1].get("completion/truncated") or 0.0
        return Evidence(f"{told}; {cut:.0%} are cut at the maximum", evidence)
    rewards = [_reward(line) for line in window]
    if now <= SHRUNK * before and before - now >= FEWEST_TOKENS / 2 and trend(rewards) <= RISES:
        return Evidence(f"{told}, and the reward did not rise ({_ends(rewards)})", {**evidence, "reward": rewards})
    return None


def everything_truncated(seen: History) -> Evidence | None:
    """Nearly all completions are cut, for CUT_STEPS steps."""
    shares = seen.last("completion/truncated", CUT_STEPS)
    if not shares or min(shares) < CUT_SHARE:
        return None
    steps = seen.span(CUT_STEPS)
    return Evidence(
        f"in steps {_to(steps)} {fmean(shares):.0%} of completions were cut at sampling.max_tokens, "
        "so that their ends are never seen",
        {"steps": steps, "completion/truncated": shares},
    )


def entropy_collapses(seen: History) -> Evidence | None:
    """The policy's entropy is a tenth of what it was in the first steps, or next to nothing."""
    values, start = seen.last("policy/entropy", ENTROPY_STEPS), _values(seen.first, "policy/entropy")
    if not values or not start or seen.count < START + ENTROPY_STEPS:
        return None
    before, now = fmean(start), fmean(values)
    if now >= max(ENTROPY_SHARE * before, ENTROPY_FLOOR):
        return None
    steps = seen.span(ENTROPY_STEPS)
    return Evidence(
        f"the entropy is {now:.3f} nats a token in steps {_to(steps)}, from {before:.3f} in the first {len(start)}: "
        "completions of a group become alike",
        {
            "steps": steps,
            "policy/entropy": values,
            "first": start,
            "groups/duplicate_completions": seen.last("groups/duplicate_completions", ENTROPY_STEPS),
        },
    )


def engine_drifts(seen: History) -> Evidence | None:
    """The engine's log-probabilities differ from the trainer's by more than rounding, for DRIFT_STEPS steps."""
    values = seen.last("engine/logprob_difference_mean", DRIFT_STEPS)
    if not values or min(values) <= seen.drift:
        return None
    steps = seen.span(DRIFT_STEPS)
    return Evidence(
        f"engine and trainer differ by {fmean(values):.2g} nats a token in steps {_to(steps)}, more than "
        f"{seen.drift:g}: what is trained is not what was sampled",
        {
            "steps": steps,
            "engine/logprob_difference_mean": values,
            "engine/logprob_difference_max": seen.last("engine/logprob_difference_max", DRIFT_STEPS),
        },
    )


def one_part_of_the_reward(seen: History) -> Evidence | None:
    """One part of the reward makes nearly all of what tells completions apart, and another part earns nothing, or falls
    while it rises."""
    parts = [name for name, weight in seen.weights.items() if weight and seen.last(f"reward/{name}/std", PART_STEPS)]
    if len(parts) < 2:
        return None
    signal = {name: abs(seen.weights[name]) * fmean(seen.last(f"reward/{name}/std", PART_STEPS)) for name in parts}
    leader, whole = max(signal, key=lambda name: signal[name]), sum(signal.values())
    if not whole or signal[leader] < PART_SHARE * whole:
        return None
    means = {name: seen.last(f"reward/{name}/mean", PART_STEPS) for name in parts}
    rises = trend([seen.weights[leader] * value for value in means[leader]]) > RISES
    behind = {}
    for name in parts:
        if name != leader and name not in PENALTIES and max(map(abs, means[name])) < NOTHING:
            behind[name] = "has given 0 to every completion"
        elif name != leader and rises and trend([seen.weights[name] * value for value in means[name]]) < -RISES:
            behind[name] = f"went from {_ends(means[name])}"
    if not behind:
        return None
    steps = seen.span(PART_STEPS)
    told = "; ".join(f"{name} {how}" for name, how in behind.items())
    return Evidence(
        f"over steps {_to(steps)} {leader} made {signal[leader] / whole:.0%} of what tells completions apart, going "
        f"from {_ends(means[leader])}; {told}",
        {"steps": steps, "shares": {name: value / whole for name, value in signal.items()}, "means": means},
    )


def kl_explodes(seen: History) -> Evidence | None:
    """The KL to the reference has jumped, or is very large."""
    values = seen.last("policy/kl", KL_STEPS)
    if not values:
        return None
    now, before = fmean(values), _values(seen.steps[-(BEFORE + KL_STEPS) : -KL_STEPS], "policy/kl")
    usual = median(before) if len(before) >= START else None
    if now < KL_MOST and (usual is None or now < max(KL_LEAST, KL_FACTOR * usual)):
        return None
    steps = seen.span(KL_STEPS)
    told = "" if usual is None else f", from {usual:.3f} in the {len(before)} steps before"
    return Evidence(
        f"the KL to the reference is {now:.3f} nats a token in steps {_to(steps)}{told}: the policy runs away from it",
        {"steps": steps, "policy/kl": values, "before": before},
    )


def gradient_spikes(seen: History) -> Evidence | None:
    """A gradient's norm is many times what it usually is."""
    norms = [(int(line["step"]), line.get("optimizer/gradient_norm")) for line in seen.steps]
    known = [(step, float(norm)) for step, norm in norms if norm is not None]
    if len(known) <= SPIKE_STEPS or norms[-1][1] is None:
        return None
    usual, (step, now) = median(norm for _, norm in known[:-1]), known[-1]
    if not usual or now <= SPIKE * usual:
        return None
    return Evidence(
        f"the gradient's norm is {now:.3g} in step {step}, {now / usual:.0f} times the median of the {len(known) - 1} "
        "updates before",
        {"steps": [step, step], "optimizer/gradient_norm": now, "median": usual},
    )


def reward_model_guesses(seen: History) -> Evidence | None:
    """After its last training the reward model's AUC on held-out labels is no further above ½ than chance puts it: n₁
    positives and n₀ others have a standard error of √((n₁ + n₀ + 1) / 12 n₁ n₀) around it (Mann-Whitney)."""
    if seen.judged is None:
        return None
    line, step = seen.judged, int(seen.judged["step"])
    labels, positives = (float(line[f"reward_model/after/{name}"]) for name in ("labels", "positives"))
    value = line.get("reward_model/after/auc")
    evidence = {"steps": [step, step], "auc": value, "labels": labels, "positives": positives}
    told = f"after step {step}, with {positives:.0f} of {labels:.0f} held-out labels positive,"
    if value is None:
        return Evidence(f"{told} it cannot be seen whether the reward model tells right from wrong", evidence)
    error = ((labels + 1) / (12 * positives * (labels - positives))) ** 0.5
    if value > 0.5 + CHANCE * error:
        return None
    return Evidence(
        f"{told} the reward model's AUC on them is {value:.2f}, where chance alone gives up to "
        f"{min(1.0, 0.5 + CHANCE * error):.2f}: the policy may follow its noise",
        evidence,
    )


CHECKS: dict[str, Callable[[History], Evidence | None]] = {
    check.__name__: check
    for check in (
        no_nonzero_advantage,
        evaluation_falls,
        lengths,
        everything_truncated,
        entropy_collapses,
        engine_drifts,
        one_part_of_the_reward,
        kl_explodes,
        gradient_spikes,
        reward_model_guesses,
    )
}


def _values(lines: Sequence[Line], name: str) -> list[float]:
    """A metric of each line; nothing where one of them has none."""
    values = [line.get(name) for line in lines]
    return [] if any(value is None for value in values) else [float(value) for value in values if value is not None]


def _reward(line: Line) -> float:
    """The mean reward, that of steps with it."""
    steps = (value for name, value in line.items() if name.endswith("/step_mean") and value is not None)
    return float(line.get("reward/mean") or 0.0) + sum(map(float, steps))


def _ends(values: Sequence[float]) -> str:
    """The means of the first and of the last third."""
    count = max(1, len(values) // 3)
    return f"{fmean(values[:count]):.3f} to {fmean(values[-count:]):.3f}"


def _to(steps: Sequence[int]) -> str:
    return f"{steps[0]} to {steps[1]}"
