"""What the evaluations of a study say: values of every arm, and its questions, answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gruppo.runs.eval_metrics import Question as Answers
from gruppo.runs.eval_metrics import sizes
from gruppo.study.evaluations import values_of
from gruppo.study.file import INITIAL, Question, StudyFile
from gruppo.utils.crossed import crossed_mean, holm
from gruppo.utils.stats import wilson_interval

LEVEL = 0.05

METHOD = (
    "A difference is taken question by question and seed by seed, and averaged. Its standard error comes from an "
    "analysis of variance with seeds and questions as crossed random effects; interval and p-value are Student's, with "
    "Satterthwaite's degrees of freedom. Nothing is claimed from fewer than two seeds. Holm's correction counts all "
    "questions of the study."
)


class Answered:
    """The answers of all models of a study, by evaluation, arm and seed.

    `initial` has, for every run, the seed of the run that has trained the model which it begins with (-1 if none has),
    and the answers of that model.
    """

    def __init__(
        self,
        final: Mapping[tuple[str, str, int], Sequence[Answers]],
        initial: Mapping[tuple[str, str, int], tuple[int, Sequence[Answers]]],
    ) -> None:
        self.final, self.initial = final, initial

    def answers_of(self, evaluation: str, arm: str, initial: bool = False) -> dict[int, Sequence[Answers]]:
        """The answers of an arm by seed. `initial`: of the models that it begins with, by the seeds of their runs."""
        if initial:
            found = dict(entry for (name, own, _), entry in self.initial.items() if (name, own) == (evaluation, arm))
        else:
            found = {seed: one for (name, own, seed), one in self.final.items() if (name, own) == (evaluation, arm)}
        return dict(sorted(found.items()))

    def table(
        self, evaluation: str, arm: str, kind: str, k: int = 1, initial: bool = False
    ) -> dict[int, dict[str, float]]:
        """A metric of an arm by seed and question. `initial`: see `answers_of`."""
        found = self.answers_of(evaluation, arm, initial)
        return {seed: _by_question(answers, kind, k) for seed, answers in found.items()}

    def pairs(self, question: Question, file: StudyFile) -> dict[int, np.ndarray]:
        """The differences of a question's two arms, one per question of the evaluation, by seed."""
        evaluation, kind, k = file.parsed(question.metric)
        first, second = question.arms
        tables = [self.table(evaluation, arm, kind, k) for arm in (first, second)]
        if INITIAL in question.arms:  # the model that the other arm begins with, for each of its seeds
            place = question.arms.index(INITIAL)
            other = question.arms[1 - place]
            tables[place] = {
                seed: _by_question(answers, kind, k)
                for (name, arm, seed), (_, answers) in self.initial.items()
                if (name, arm) == (evaluation, other)
            }
        return {
            seed: np.array([tables[1][seed][name] - value for name, value in tables[0][seed].items()])
            for seed in sorted(tables[0].keys() & tables[1].keys())
            if tables[0][seed].keys() == tables[1][seed].keys()
        }


def _by_question(answers: Sequence[Answers], kind: str, k: int) -> dict[str, float]:
    return dict(zip((one.id for one in answers), values_of(answers, kind, k).tolist(), strict=True))


def value_of(table: Mapping[int, Mapping[str, float]]) -> dict[str, Any] | None:
    """The mean of a metric over seeds and questions, with a 95 % interval and the mean of each seed; None if there is
    nothing. With one seed, the interval is over questions alone."""
    if not table or len({tuple(row) for row in table.values()}) > 1:
        return None
    values = np.array([list(row.values()) for row in table.values()])
    if len(set(values.ravel().tolist())) == 1 or values.shape[1] < 2:
        interval = wilson_interval(float(values[0].sum()), values.shape[1])
    else:
        low, high = crossed_mean(values).interval
        interval = max(0.0, low), min(1.0, high)
    return {
        "mean": float(values.mean()),
        "interval": list(interval),
        "questions": values.shape[1],
        "seeds": {str(seed): float(row.mean()) for seed, row in zip(table, values, strict=True) if seed >= 0},
    }


def curve_of(answers: Sequence[Sequence[Answers]], kind: str) -> dict[int, list[float]]:
    """pass@k or maj@k, for powers of two, of every seed's answers."""
    ks = sizes([question for questions in answers for question in questions])
    return {k: [float(values_of(questions, kind, k).mean()) for questions in answers] for k in ks}


def answer(file: StudyFile, answered: Answered) -> list[dict[str, Any]]:
    """The questions of a study with difference, interval, p-values and an answer in words.

    See `gruppo.utils.crossed.crossed_mean` for the test and its assumptions. Holm's correction counts every question
    of the file, answered or not.
    """
    results = [_compared(question, answered.pairs(question, file), file) for question in file.questions]
    adjusted = holm([1.0 if result["p"] is None else result["p"] for result in results])
    for question, result, p in zip(file.questions, results, adjusted, strict=True):
        result["p_holm"] = None if result["p"] is None else p
        result["answer"] = _in_words(question, result, file)
    return results


def _compared(question: Question, pairs: Mapping[int, np.ndarray], file: StudyFile) -> dict[str, Any]:
    names = [name for name in question.arms if name != INITIAL]
    planned = set.intersection(*(set(file.seeds_of(arm)) for arm in file.arms if arm.name in names))
    result: dict[str, Any] = {
        "id": question.id,
        "text": question.text,
        "metric": question.metric,
        "arms": list(question.arms),
        "alternative": question.alternative,
        "seeds": sorted(pairs),
        "missing_seeds": sorted(planned - pairs.keys()),
        "questions": len(next(iter(pairs.values()), ())),
        "difference": None,
        "interval": None,
        "p": None,
    }
    if pairs and result["questions"] > 1:
        estimate = crossed_mean(np.array(list(pairs.values())))
        result["difference"] = estimate.mean
        if len(pairs) > 1:
            result["interval"] = [max(-1.0, estimate.interval[0]), min(1.0, estimate.interval[1])]
            result["p"] = estimate.p_value(question.alternative)
    return result


def _in_words(question: Question, result: Mapping[str, Any], file: StudyFile) -> str:
    titles = {arm.name: arm.title for arm in file.arms} | {
        INITIAL: file.initial_title(question.arms, "the model before training")
    }
    first, second = (titles[name] for name in question.arms)
    if result["difference"] is None:
        return "not answered yet: no seed has both evaluations"
    if result["p"] is None:
        return "no claim: one seed says nothing about others"
    rest = f" (with {len(result['seeds'])} of the seeds so far)" if result["missing_seeds"] else ""
    if result["p_holm"] >= LEVEL and question.alternative == "two-sided":
        return f"no difference is shown between {first} and {second}{rest}"
    if result["p_holm"] >= LEVEL:
        word = "higher" if question.alternative == "greater" else "lower"
        return f"it is not shown that {second} is {word} than {first}{rest}"
    return f"{second} is {'higher' if result['difference'] > 0 else 'lower'} than {first}{rest}"
