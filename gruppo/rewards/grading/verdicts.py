"""Grades with reasons: the extracted answer, the rule that found it, and the verdicts of other rules.

Evaluations differ in how they extract an answer from a text, which can move a score by percentage points. A text on
which the rules disagree (ambiguous answer extraction) is worth reading.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gruppo.data.boxes import last_box
from gruppo.data.options import asked
from gruppo.data.references import for_each
from gruppo.rewards.grading.choices import choice_of
from gruppo.rewards.grading.extraction import Decision, decisions, own_answer
from gruppo.rewards.grading.formulas import answered_formula, is_words, reference_formula, same_formula
from gruppo.rewards.grading.graders import COMPARISONS, find_grader, question_of
from gruppo.rewards.grading.last_number import last_number
from gruppo.rewards.grading.math_verify import same_mathematics
from gruppo.rewards.grading.normal_form import normal
from gruppo.rewards.grading.numbers import answered_number, read_decision, reference_numbers
from gruppo.rewards.grading.quantities import cleaned, quantities, same_quantity
from gruppo.rewards.grading.units import EVERYDAY, units_of
from gruppo.rewards.grading.words import is_numeric, stated

LONGEST = 200  # characters of an extracted answer that are kept


@dataclass(frozen=True)
class Verdict:
    """Grade of a text.

    `extracted`: the answer found in the text, or None. `rule`: the rule that found it. `others`: verdicts of
    alternative rules that found an answer, by rule name.
    """

    correct: bool
    extracted: str | None
    rule: str
    others: Mapping[str, bool] = field(default_factory=dict)

    @property
    def ambiguous(self) -> bool:
        """Whether an alternative rule grades the text differently."""
        return any(verdict != self.correct for verdict in self.others.values())


def verdicts(text: str, columns: Mapping[str, Any], grader: str) -> Verdict:
    """Grade a text and explain the grade.

    `grader`: a name in `GRADERS`, or an import path. `correct` is the grader's own result, and `extracted` is cut to
    `LONGEST` characters. With several references, a rule is right if it is right by any of them. For a grader without
    an explanation, `extracted` is None, `rule` is the grader's name and `others` is empty. Raises UsageError for an
    unknown grader, and any exception of the grader for an unusable row.
    """
    explain = _EXPLAINED.get(grader)
    if explain is None:
        return Verdict(bool(find_grader(grader)(text, columns)), None, grader)

    def verdict(row: Mapping[str, Any]) -> Verdict:
        correct = find_grader(grader)(text, row)
        extracted, rule, others = explain(text, row)
        return Verdict(correct, extracted and extracted[:LONGEST], rule, others)

    found = for_each(verdict, COMPARISONS[grader].rows(columns))
    others = {name: any(each.others.get(name) for each in found) for each in found for name in each.others}
    return replace(next((each for each in found if each.correct), found[0]), others=others)


Explained = tuple[str | None, str, dict[str, bool]]


def _number(text: str, columns: Mapping[str, Any]) -> Explained:
    wanted = reference_numbers(columns["answer"])
    question = question_of(columns)
    answered = answered_number(text, question, str(columns["answer"]))
    units = units_of(str(columns["answer"]), question) if question else EVERYDAY
    others = {}
    for name, decision in _by_rule(text):
        if readings := read_decision(decision, units):
            others[name] = len(wanted) == 1 and all(same_quantity(reading, wanted[0]) for reading in readings)
    numbers = quantities(cleaned(text))
    if numbers:
        others["last number"] = same_quantity(numbers[-1], wanted[-1])
    if (plain := last_number(text)) is not None:
        others["last plain number"] = plain == wanted[-1].value
    return (answered.text if answered else None), (answered.rule if answered else "none"), others


def _word_problem(text: str, columns: Mapping[str, Any]) -> Explained:
    if is_numeric(columns["answer"]):
        return _number(text, columns)
    passage, whole = stated(text)
    return passage or None, "boxed" if whole else "sentence", {}


def _by_rule(text: str) -> Iterator[tuple[str, Decision]]:
    """The last decision of every rule in the whole text, as other evaluations take it, even if others come later."""
    last = {decision.rule: decision for decision in decisions(text)}
    if box := last_box(text):
        last["boxed"] = Decision("boxed", box[1], box[0])
    yield from last.items()


def _math(text: str, columns: Mapping[str, Any]) -> Explained:
    answer = columns["answer"] if "answer" in columns else columns["solution"]
    wanted = reference_formula(answer)
    answered = answered_formula(text, is_words(normal(wanted)))
    question = question_of(columns)
    others = {name: same_formula(decision.text, wanted, question) for name, decision in _by_rule(text)}
    if re.fullmatch(r"[-+−]?[\d.,/]+", wanted.strip(" $")) and (plain := last_number(text)) is not None:
        others["last plain number"] = plain == last_number(wanted)
    boxed = others.get("boxed")
    if boxed is None or answered is None or answered[1] != "boxed":
        others["math-verify"] = bool(same_mathematics(own_answer(text), answer, question))
    return (answered[0] if answered else None), (answered[1] if answered else "whole text"), others


def _science(text: str, columns: Mapping[str, Any]) -> Explained:
    extracted, rule, others = _math(text, columns)
    wanted = quantities(cleaned(reference_formula(columns.get("answer", columns.get("solution")))))
    answered = answered_number(text)
    if answered is not None and len(wanted) == 1:
        extracted, rule = answered.text, answered.rule
        others["within 1 %"] = abs(answered.readings[0].value - wanted[0].value) <= abs(wanted[0].value) / 100
    return extracted, rule, others


def _choice(text: str, columns: Mapping[str, Any]) -> Explained:
    options, letters, wanted = asked(columns)
    chosen = choice_of(text, options, letters)
    others = {}
    for name, decision in _by_rule(text):
        alternative = choice_of(decision.text, options, letters)
        if alternative is not None:
            others[name] = alternative.letters == wanted
    if isolated := re.findall(rf"(?<![A-Za-z])[{letters}](?![A-Za-z])", text):
        others["last letter"] = isolated[-1] == wanted
    if bracketed := re.findall(rf"\(([{letters}])\)", text):
        others["last bracketed letter"] = bracketed[-1] == wanted
    return (chosen.letters if chosen else None), (chosen.rule if chosen else "none"), others


def _exact(text: str, columns: Mapping[str, Any]) -> Explained:
    return text.strip(), "whole text", {}


_EXPLAINED: dict[str, Callable[[str, Mapping[str, Any]], Explained]] = {
    "numeric_answer": _number,
    "word_problem": _word_problem,
    "math_answer": _math,
    "ocw": _science,
    "choice": _choice,
    "exact_match": _exact,
}
