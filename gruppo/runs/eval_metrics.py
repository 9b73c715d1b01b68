"""Metrics of graded answers: accuracy, pass@k, maj@k, best-of-k, weighted votes, and paired differences.

All metrics are means over questions, and all intervals are over questions, because answers to the same question are
not independent. The `vote` of an answer identifies what it says: equal answers have equal votes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gruppo.errors import UsageError
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
    """The answers to one question: whether each is correct, its vote, and its reward model score if there is one."""

    id: str
    text: str
    correct: Sequence[bool]
    votes: Sequence[str | None]
    scores: Sequence[float] | None = None

    def curve(self, name: str) -> np.ndarray:
        """pass@k, maj@k or best-of-k for k = 1…n."""
        n = len(self.correct)
        if name == "pass":
            return np.array([pass_at_k(sum(self.correct), n, k) for k in range(1, n + 1)])
        if name == "maj":
            return majority_at_k(self.votes, self.correct)
        assert self.scores is not None
        return best_at_k(self.scores, self.correct)


def questions_of(rows: Iterable[Mapping[str, Any]]) -> list[Question]:
    """The questions in rows of `gruppo.runs.tables.EVALUATIONS`, in the order of their first row."""
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    questions = []
    for name, answers in by_prompt.items():
        scores = [row["score"] for row in answers]
        questions.append(
            Question(
                name,
                answers[0]["question"],
                [row["correct"] for row in answers],
                [row["vote"] for row in answers],
                None if None in scores else scores,
            )
        )
    return questions


def accuracies(questions: Sequence[Question]) -> np.ndarray:
    """The share of correct answers, one value per question."""
    return np.array([sum(question.correct) / len(question.correct) for question in questions])


def interval(values: np.ndarray) -> list[float]:
    """A 95% interval of the mean of `values`, one value per question.

    Wilson's interval if all values are 0 or 1, or if all are equal, because a bootstrap of equal values has no width.
    Otherwise a bootstrap.
    """
    if set(values.tolist()) <= {0.0, 1.0} or len(set(values.tolist())) == 1:
        return list(wilson_interval(float(values.sum()), len(values)))
    return list(bootstrap_interval(values))


def sizes(questions: Sequence[Question]) -> list[int]:
    """The k of curves: powers of two up to n, and n itself; n: the smallest number of answers to a question."""
    n = min(len(question.correct) for question in questions)
    return sorted({*(2**power for power in range(n.bit_length())), n})


def figures(questions: Sequence[Question]) -> dict[str, Any]:
    """Accuracy with its interval, and figures of several answers.

    If every question has several answers: `curves`, with value and interval of pass@k, maj@k and, with scores,
    best-of-k, for each k; and, with scores, `weighted_vote` over all answers. maj@k is missing if a question has more
    than `MOST_VOTES` answers.
    """
    shares = accuracies(questions)
    values: dict[str, Any] = {
        "accuracy": float(shares.mean()),
        "interval": interval(shares),
        "questions": len(questions),
        "samples": min(len(question.correct) for question in questions),
    }
    if values["samples"] < 2:
        return values
    scored = all(question.scores is not None for question in questions)
    countable = max(len(question.correct) for question in questions) <= MOST_VOTES
    available = {"pass": True, "maj": countable, "best": scored}
    values["curves"] = {name: _curve(questions, name) for name in CURVES if available[name]}
    if scored:
        votes = np.array([
            weighted_vote(question.votes, question.correct, question.scores or ()) for question in questions
        ])  # fmt: skip
        values["weighted_vote"] = _with_interval(votes)
    return values


def _curve(questions: Sequence[Question], name: str) -> dict[str, Any]:
    ks = sizes(questions)
    values = np.array([question.curve(name)[[k - 1 for k in ks]] for question in questions])
    return {str(k): _with_interval(values[:, place]) for place, k in enumerate(ks)}


def _with_interval(values: np.ndarray) -> dict[str, Any]:
    return {"value": float(values.mean()), "interval": interval(values)}


def figure_metrics(prefix: str, figures: Mapping[str, Any]) -> dict[str, float]:
    """Figures as metrics: accuracy with its interval, shares, and the points of curves without their intervals."""
    low, high = figures["interval"]
    shares = {name: value for name, value in figures.items() if name.endswith("_share")}
    points = {
        f"{curve}@{k}": point["value"] for curve, by_k in figures.get("curves", {}).items() for k, point in by_k.items()
    }
    values = {"accuracy": figures["accuracy"], "accuracy_low": low, "accuracy_high": high, **shares, **points}
    return {prefix + name: value for name, value in values.items()}


def compare(first: Sequence[Question], second: Sequence[Question]) -> dict[str, Any]:
    """Differences (second - first) on the questions that both answered, paired by question.

    `difference` of accuracies, with a paired bootstrap `interval` (95%, over questions). `smallest`: the smallest
    difference that this many questions can show (80% power, two-sided 5%). `first_only`, `second_only`: number of
    questions on which that side has more correct answers. With several answers per question, also differences of
    pass@k and maj@k. Raises UsageError if they share no question, or if an id stands for two questions.
    """
    second_by_id = {question.id: question for question in second}
    pairs = [(question, second_by_id[question.id]) for question in first if question.id in second_by_id]
    if not pairs:
        raise UsageError("the two evaluations share no question (by prompt_id); compare evaluations of one task")
    for one, other in pairs:
        if one.text != other.text:
            raise UsageError(f"{one.id}: is {one.text[:60]!r} in one evaluation and {other.text[:60]!r} in the other")
    ones, others = [one for one, _ in pairs], [other for _, other in pairs]
    differences = accuracies(others) - accuracies(ones)
    result: dict[str, Any] = {
        "questions": len(pairs),
        "left_out": len(first) + len(second) - 2 * len(pairs),
        "difference": float(differences.mean()),
        "interval": list(paired_interval(differences)),
        "smallest": smallest_difference(differences),
        "first_only": int((differences < 0).sum()),
        "second_only": int((differences > 0).sum()),
    }
    ks = sorted(set(sizes(ones)) & set(sizes(others)))
    if ks[-1] > 1:
        places = [k - 1 for k in ks]
        result["curves"] = {}
        countable = max(len(question.correct) for question in (*ones, *others)) <= MOST_VOTES
        for name in ("pass", "maj") if countable else ("pass",):
            by_k = np.array([other.curve(name)[places] - one.curve(name)[places] for one, other in pairs])
            result["curves"][name] = {
                str(k): {"value": float(by_k[:, i].mean()), "interval": list(paired_interval(by_k[:, i]))}
                for i, k in enumerate(ks)
            }
    return result
