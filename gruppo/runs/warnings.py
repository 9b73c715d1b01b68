"""Training warnings: problems that a line of metrics shows, given the lines before it.

Warnings depend only on the lines of metrics.jsonl, so a run that was killed and resumed has the same warnings as an
uninterrupted run. Thresholds are constants here; docs/warnings.md explains each warning and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, stdev
from typing import Any

from gruppo.utils.stats import trend

Line = Mapping[str, Any]

PATIENCE = 5  # steps without a finding after which a warning has passed
KEPT = 60  # steps of history
START = 5  # first steps, which later steps are compared with
QUIET = 5  # steps without any nonzero advantage
TRUNCATED_STEPS, TRUNCATED_SHARE = 3, 0.95
RECENT, BEFORE = 5, 20  # lengths: the last steps, and how many steps before them the steps compared with them end
GROWN, SHRUNK, FEWEST_TOKENS = 2.0, 1 / 3, 16
ENTROPY_STEPS, ENTROPY_SHARE, ENTROPY_FLOOR = 3, 0.1, 0.01
DRIFT_STEPS = 3
PART_STEPS, PART_SHARE, NOTHING = 10, 0.9, 1e-9
KL_STEPS, KL_FACTOR, KL_LEAST, KL_MOST = 3, 5.0, 0.1, 1.0
SPIKE, SPIKE_STEPS = 10.0, 10
NOISE_COUNT, SIGNAL_LEAST = 4, 0.05  # measurements of the gradient's noise; share of its squared norm
RISES = 2.0  # standard errors of a slope
CHANCE = 2.0  # standard errors of an area under the curve
PENALTIES = ("overlong", "repetition")  # rewards that are 0 if nothing is wrong


@dataclass(frozen=True)
class Evidence:
    """The message of a warning, and the numbers behind it."""

    message: str
    evidence: Mapping[str, Any]


@dataclass(frozen=True)
class WarningEvent:
    """A warning that begins or has passed at a step."""

    name: str
    step: int
    passed: bool
    message: str
    evidence: Mapping[str, Any]

    @property
    def link(self) -> str:
        """Where the warning is explained."""
        return f"docs/warnings.md#{self.name.replace('_', '-')}"


@dataclass
class History:
    """The lines that checks look at.

    `first`: lines of the run's first steps. `steps`: of the last steps. `evaluations`: of all evaluations.
    `reward_model`: of the reward model's last training. `noise`: of the last steps at which the noise of the gradient
    was measured. `weights`: weights of the parts of the reward. `drift`: the
    average difference allowed between engine and trainer, in nats per token.
    """

    weights: Mapping[str, float]
    drift: float
    first: list[Line] = field(default_factory=list)
    steps: list[Line] = field(default_factory=list)
    evaluations: list[Line] = field(default_factory=list)
    reward_model: Line | None = None
    noise: list[Line] = field(default_factory=list)
    count: int = 0

    def add(self, line: Line) -> bool:
        """Add a line. Returns whether it is the line of a step."""
        if "eval/accuracy" in line:
            self.evaluations.append(line)
        if "reward_model/after/positives" in line:
            self.reward_model = line
        if line.get("gradient/signal") is not None:
            self.noise = [*self.noise, line][-NOISE_COUNT:]
        if "completion/length" not in line:
            return False
        self.count += 1
        if len(self.first) < START:
            self.first.append(line)
        self.steps = [*self.steps, line][-KEPT:]
        return True

    def last(self, name: str, count: int) -> list[float]:
        """A metric of the last `count` steps; an empty list if one of them lacks it."""
        return _values(self.steps[-count:], name) if len(self.steps) >= count else []

    def span(self, count: int) -> list[int]:
        """The first and the last of the last `count` steps."""
        return [int(self.steps[-count]["step"]), int(self.steps[-1]["step"])]


class WarningMonitor:
    """Checks the lines of a run one by one, as they are written, or again after a resume."""

    def __init__(self, weights: Mapping[str, float], drift: float) -> None:
        self._seen = History(weights, drift)
        self._silent: dict[str, int] = {}  # for every active warning, the number of steps without a finding

    def see(self, line: Line) -> list[WarningEvent]:
        """Warnings that begin or have passed with this line."""
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
    """All warnings of `WarningMonitor` for the lines of a run."""
    monitor = WarningMonitor(weights, drift)
    return [notice for line in lines for notice in monitor.see(line)]


def no_nonzero_advantage(seen: History) -> Evidence | None:
    """No group has had a nonzero advantage for QUIET steps."""
    shares = seen.last("groups/nonzero_advantage", QUIET)
    if not shares or any(shares):
        return None
    steps = seen.span(QUIET)
    return Evidence(
        f"no group had a nonzero advantage in steps {_to(steps)}: nothing is learned from rewards",
        {"steps": steps, "reward/mean": seen.last("reward/mean", QUIET)},
    )


def evaluation_falls(seen: History) -> Evidence | None:
    """The last evaluation is below the best one with disjoint intervals, and the reward rose in between, as far as KEPT
    steps show."""
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
    steps, rising = [int(best["step"]), int(now["step"])], [int(between[0]["step"]), int(between[-1]["step"])]
    return Evidence(
        f"the evaluation fell from {best['eval/accuracy']:.1%} after step {steps[0]} to {now['eval/accuracy']:.1%} "
        f"after step {steps[1]} while the reward of steps {_to(rising)} rose from {_ends(rewards)}: the reward may not "
        "measure what the evaluation does",
        {"steps": steps, "eval/accuracy": [best["eval/accuracy"], now["eval/accuracy"]], "reward": rewards},
    )


def lengths(seen: History) -> Evidence | None:
    """Completions have become twice as long within some steps, or a third as long without a rise of the reward."""
    if len(seen.steps) < 2 * RECENT:
        return None
    window = seen.steps[-(RECENT + BEFORE) :]
    values = _values(window, "completion/length")
    before, now = fmean(values[:RECENT]), fmean(values[-RECENT:])
    steps = [int(window[0]["step"]), int(window[-1]["step"])]
    evidence = {"steps": steps, "completion/length": values}
    message = f"completions went from {before:.0f} to {now:.0f} tokens over steps {_to(steps)}"
    if now >= GROWN * before and now - before >= FEWEST_TOKENS:
        truncated = window[-1].get("completion/truncated") or 0.0
        return Evidence(f"{message}; {truncated:.0%} are truncated at the maximum", evidence)
    rewards = [_reward(line) for line in window]
    if now <= SHRUNK * before and before - now >= FEWEST_TOKENS / 2 and trend(rewards) <= RISES:
        return Evidence(f"{message}, and the reward did not rise ({_ends(rewards)})", {**evidence, "reward": rewards})
    return None


def everything_truncated(seen: History) -> Evidence | None:
    """Nearly all completions have been truncated for TRUNCATED_STEPS steps."""
    shares = seen.last("completion/truncated", TRUNCATED_STEPS)
    if not shares or min(shares) < TRUNCATED_SHARE:
        return None
    steps = seen.span(TRUNCATED_STEPS)
    return Evidence(
        f"{fmean(shares):.0%} of completions in steps {_to(steps)} were truncated at sampling.max_tokens, "
        "so their ends are never seen",
        {"steps": steps, "completion/truncated": shares},
    )


def entropy_collapses(seen: History) -> Evidence | None:
    """The policy's entropy is less than a tenth of its value in the first steps, or near 0."""
    values, start = seen.last("policy/entropy", ENTROPY_STEPS), _values(seen.first, "policy/entropy")
    if not values or not start or seen.count < START + ENTROPY_STEPS:
        return None
    before, now = fmean(start), fmean(values)
    if now >= max(ENTROPY_SHARE * before, ENTROPY_FLOOR):
        return None
    steps = seen.span(ENTROPY_STEPS)
    return Evidence(
        f"the entropy is {now:.3f} nats per token in steps {_to(steps)}, from {before:.3f} in the first {len(start)}: "
        "the completions of a group become alike",
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
        f"engine and trainer differ by {fmean(values):.2g} nats per token in steps {_to(steps)}, more than "
        f"{seen.drift:g}: the trained policy differs from the policy that sampled",
        {
            "steps": steps,
            "engine/logprob_difference_mean": values,
            "engine/logprob_difference_max": seen.last("engine/logprob_difference_max", DRIFT_STEPS),
        },
    )


def one_part_of_the_reward(seen: History) -> Evidence | None:
    """One part of the reward accounts for nearly all differences between completions, at the expense of another part.

    The other part is always 0, or falls while the first part rises.
    """
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
    others = "; ".join(f"{name} {how}" for name, how in behind.items())
    return Evidence(
        f"over steps {_to(steps)} {leader} accounted for {signal[leader] / whole:.0%} of the differences between "
        f"completions, and went from {_ends(means[leader])}; {others}",
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
    change = "" if usual is None else f", from {usual:.3f} in the {len(before)} steps before"
    return Evidence(
        f"the KL to the reference is {now:.3f} nats per token in steps {_to(steps)}{change}: the policy is moving "
        "away from it",
        {"steps": steps, "policy/kl": values, "before": before},
    )


def gradient_spikes(seen: History) -> Evidence | None:
    """The norm of a gradient is many times its median."""
    norms = [(int(line["step"]), line.get("optimizer/gradient_norm")) for line in seen.steps]
    known = [(step, float(norm)) for step, norm in norms if norm is not None]
    if len(known) <= SPIKE_STEPS or norms[-1][1] is None:
        return None
    usual, (step, now) = median(norm for _, norm in known[:-1]), known[-1]
    if not usual or now <= SPIKE * usual:
        return None
    return Evidence(
        f"the gradient norm is {now:.3g} in step {step}, {now / usual:.0f} times the median of the {len(known) - 1} "
        "updates before",
        {"steps": [step, step], "optimizer/gradient_norm": now, "median": usual},
    )


def noisy_gradient(seen: History) -> Evidence | None:
    """Nearly nothing of the gradient is signal, averaged over NOISE_COUNT measurements, by two standard errors."""
    if len(seen.noise) < NOISE_COUNT:
        return None
    signals = _values(seen.noise, "gradient/signal")
    mean, error = fmean(signals), stdev(signals) / len(signals) ** 0.5
    if mean + 2 * error >= SIGNAL_LEAST:
        return None
    steps = [int(seen.noise[0]["step"]), int(seen.noise[-1]["step"])]
    needed = f"a step would need {(1 - mean) / mean:.0f} times as many completions" if mean > 0.001 else "none was seen"
    return Evidence(
        f"{max(0.0, mean):.1%} of the squared gradient was signal in {NOISE_COUNT} measurements, steps {_to(steps)}: "
        f"nearly every update is noise (for half of it to be signal, {needed})",
        {"steps": steps, "gradient/signal": signals, "gradient/agreement": _values(seen.noise, "gradient/agreement")},
    )


def reward_model_guesses(seen: History) -> Evidence | None:
    """After its last training, the reward model's AUC on held-out labels is no further above ½ than chance explains.

    For n₁ positives and n₀ other labels, the standard error around ½ is √((n₁ + n₀ + 1) / 12 n₁ n₀) (Mann-Whitney).
    """
    if seen.reward_model is None:
        return None
    line, step = seen.reward_model, int(seen.reward_model["step"])
    labels, positives = (float(line[f"reward_model/after/{name}"]) for name in ("labels", "positives"))
    value = line.get("reward_model/after/auc")
    evidence = {"steps": [step, step], "auc": value, "labels": labels, "positives": positives}
    message = f"after step {step}, with {positives:.0f} of {labels:.0f} held-out labels positive,"
    if value is None:
        return Evidence(
            f"{message} it is unknown whether the reward model can distinguish correct from wrong", evidence
        )
    error = ((labels + 1) / (12 * positives * (labels - positives))) ** 0.5
    if value > 0.5 + CHANCE * error:
        return None
    return Evidence(
        f"{message} the reward model's AUC on them is {value:.2f}, while chance alone gives up to "
        f"{min(1.0, 0.5 + CHANCE * error):.2f}: the policy may follow its noise",
        evidence,
    )


def tokens_without_text(seen: History) -> Evidence | None:
    """The last step sampled token ids for which the tokenizer has no text."""
    values = seen.last("completion/without_text", 1)
    if not values or not values[0]:
        return None
    steps = seen.span(1)
    return Evidence(
        f"the tokenizer has no text for {values[0]:.2%} of the tokens that were sampled in step {steps[0]}: in the "
        "text of a completion, each of them is U+FFFD",
        {"steps": steps, "completion/without_text": values},
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
        noisy_gradient,
        reward_model_guesses,
        tokens_without_text,
    )
}


def _values(lines: Sequence[Line], name: str) -> list[float]:
    """A metric of all lines; an empty list if one of them lacks it."""
    values = [line.get(name) for line in lines]
    return [] if any(value is None for value in values) else [float(value) for value in values if value is not None]


def _reward(line: Line) -> float:
    """The mean reward, including the mean step rewards."""
    steps = (value for name, value in line.items() if name.endswith("/step_mean") and value is not None)
    return float(line.get("reward/mean") or 0.0) + sum(map(float, steps))


def _ends(values: Sequence[float]) -> str:
    """The means of the first and the last third, as text."""
    count = max(1, len(values) // 3)
    return f"{fmean(values[:count]):.3f} to {fmean(values[-count:]):.3f}"


def _to(steps: Sequence[int]) -> str:
    return f"{steps[0]} to {steps[1]}"
