"""What answers to questions come to: accuracy, pass@k, maj@k, best-of-k, weighted votes, and two sets compared.

Everything is a mean over questions, and every interval is over questions: answers to one are not independent of each
other. An answer's `vote` is what it says, equal for equal answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gruppo.errors import UsageError
from gruppo.rewards.grading.last_number import last_number
from gruppo.utils.stats import (
    MOST_VOTES,
    best_at_k,
    bootstrap_interval,
    majority_at_k,
    paired_interval,
    pass_at_k,
    smallest_difference,
    weighted_vote,
    wilson_interval,
)

CURVES = ("pass", "maj", "best")


@dataclass(frozen=True)
class Question:
    """A question's answers: which are right, what each votes for, and what a reward model gives them."""

    id: str
    text: str
    right: Sequence[bool]
    votes: Sequence[str | None]
    scores: Sequence[float] | None = None

    def curve(self, name: str) -> np.ndarray:
        """pass@k, maj@k or best-of-k for k = 1…n."""
        n = len(self.right)
        if name == "pass":
            return np.array([pass_at_k(sum(self.right), n, k) for k in range(1, n + 1)])
        if name == "maj":
            return majority_at_k(self.votes, self.right)
        assert self.scores is not None
        return best_at_k(self.scores, self.right)


def questions_of(rows: Iterable[Mapping[str, Any]]) -> list[Question]:
    """The questions that rows of gruppo.runs.tables.EVALUATIONS answer, in their order."""
    held: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        held.setdefault(row["prompt_id"], []).append(row)
    made = []
    for name, own in held.items():
        scores = [row["score"] for row in own]
        made.append(
            Question(
                name,
                own[0]["question"],
                [row["correct"] for row in own],
                [row["vote"] for row in own],
                None if None in scores else scores,
            )
        )
    return made


def ambiguous(row: Mapping[str, Any]) -> bool:
    """Whether rules of extraction disagree on a row's answer."""
    return any(other != row["correct"] for other in json.loads(row["other_rules"]).values())


def figures_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`figures` of the questions that rows answer; and the shares of answers that end by themselves (where it is known
    how they end), that hold a number, that say something, and on which rules of extraction disagree."""
    ends = [row["finish_reason"] == "stop" for row in rows if row["finish_reason"]]
    shares = {"finished_share": sum(ends) / len(ends)} if ends else {}
    return figures(questions_of(rows)) | {
        **shares,
        "number_share": sum(last_number(row["answer"]) is not None for row in rows) / len(rows),
        "answered_share": sum(row["vote"] is not None for row in rows) / len(rows),
        "ambiguous_share": sum(map(ambiguous, rows)) / len(rows),
    }


def accuracies(questions: Sequence[Question]) -> np.ndarray:
    """The share of each question's answers that is right."""
    return np.array([sum(each.right) / len(each.right) for each in questions])


def interval(values: np.ndarray) -> list[float]:
    """A 95 % interval of the mean of values that are one a question: Wilson's where each is 0 or 1 or all are equal, of
    which a bootstrap would have no width; else a bootstrap."""
    if set(values.tolist()) <= {0.0, 1.0} or len(set(values.tolist())) == 1:
        return list(wilson_interval(float(values.sum()), len(values)))
    return list(bootstrap_interval(values))


def sizes(questions: Sequence[Question]) -> list[int]:
    """The k of curves: powers of two up to the fewest answers a question has, and that number."""
    most = min(len(each.right) for each in questions)
    return sorted({*(2**power for power in range(most.bit_length())), most})


def figures(questions: Sequence[Question]) -> dict[str, Any]:
    """accuracy with its interval; where every question has several answers also `curves`: of pass@k, maj@k and, with
    scores, best-of-k, for each k its value and interval; and `weighted_vote` over all answers."""
    shares = accuracies(questions)
    made: dict[str, Any] = {
        "accuracy": float(shares.mean()),
        "interval": interval(shares),
        "questions": len(questions),
        "samples": min(len(each.right) for each in questions),
    }
    if made["samples"] < 2:
        return made
    scored = all(each.scores is not None for each in questions)
    few = max(len(each.right) for each in questions) <= MOST_VOTES
    known = {"pass": True, "maj": few, "best": scored}
    made["curves"] = {name: _curve(questions, name) for name in CURVES if known[name]}
    if scored:
        votes = np.array([weighted_vote(each.votes, each.right, each.scores or ()) for each in questions])
        made["weighted_vote"] = _with_interval(votes)
    return made


def _curve(questions: Sequence[Question], name: str) -> dict[str, Any]:
    ks = sizes(questions)
    values = np.array([each.curve(name)[[k - 1 for k in ks]] for each in questions])
    return {str(k): _with_interval(values[:, place]) for place, k in enumerate(ks)}


def _with_interval(values: np.ndarray) -> dict[str, Any]:
    return {"value": float(values.mean()), "interval": interval(values)}


def figure_metrics(prefix: str, found: Mapping[str, Any]) -> dict[str, float]:
    """Figures as metrics: accuracy with its interval, shares, and the points of curves, without their intervals."""
    low, high = found["interval"]
    shares = {name: value for name, value in found.items() if name.endswith("_share")}
    points = {
        f"{curve}@{k}": point["value"] for curve, own in found.get("curves", {}).items() for k, point in own.items()
    }
    made = {"accuracy": found["accuracy"], "accuracy_low": low, "accuracy_high": high, **shares, **points}
    return {prefix + name: value for name, value in made.items()}


def compare(first: Sequence[Question], second: Sequence[Question]) -> dict[str, Any]:
    """The second's figures less the first's, on the questions that both were asked, paired by question.

    `difference` of accuracies with a paired bootstrap `interval` (95 %, over questions); `smallest`: the smallest
    difference that as many questions can show (80 % power, two-sided 5 %); `first_only` and `second_only`: how many
    questions have more right answers of one than of the other; with several answers each, differences of pass@k and
    maj@k too. Raises UsageError where they share no question, or an id stands for two questions.
    """
    theirs = {each.id: each for each in second}
    pairs = [(each, theirs[each.id]) for each in first if each.id in theirs]
    if not pairs:
        raise UsageError("the two evaluations share no question (by prompt_id); compare evaluations of one task")
    for one, other in pairs:
        if one.text != other.text:
            raise UsageError(f"{one.id}: is {one.text[:60]!r} in one and {other.text[:60]!r} in the other evaluation")
    ours, others = [one for one, _ in pairs], [other for _, other in pairs]
    apart = accuracies(others) - accuracies(ours)
    made: dict[str, Any] = {
        "questions": len(pairs),
        "left_out": len(first) + len(second) - 2 * len(pairs),
        "difference": float(apart.mean()),
        "interval": list(paired_interval(apart)),
        "smallest": smallest_difference(apart),
        "first_only": int((apart < 0).sum()),
        "second_only": int((apart > 0).sum()),
    }
    ks = sorted(set(sizes(ours)) & set(sizes(others)))
    if ks[-1] > 1:
        places = [k - 1 for k in ks]
        made["curves"] = {}
        few = max(len(each.right) for each in (*ours, *others)) <= MOST_VOTES
        for name in ("pass", "maj") if few else ("pass",):
            each = np.array([other.curve(name)[places] - one.curve(name)[places] for one, other in pairs])
            made["curves"][name] = {
                str(k): {"value": float(each[:, i].mean()), "interval": list(paired_interval(each[:, i]))}
                for i, k in enumerate(ks)
            }
    return made
