"""Graders against `graded.jsonl`, a list of texts that was graded by hand, one row per text.

`correct` is the verdict of a careful reader. `known` marks a known mistake of a grader, with the reason; the grader
must make exactly that mistake, so that an improvement is noticed.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gruppo.rewards.grading.graders import find_grader

ROWS = [json.loads(line) for line in Path(__file__).with_name("graded.jsonl").read_text().splitlines()]


def grade(row: dict[str, Any]) -> str:
    """ "right", "false positive" or "false negative"."""
    columns = {name: row[name] for name in ("answer", "choices", "question") if name in row}
    verdict = find_grader(row["grader"])(row["text"], columns)
    if verdict == row["correct"]:
        return "right"
    return "false positive" if verdict else "false negative"


def test_the_list_is_large_and_has_both_kinds() -> None:
    kinds = Counter((row["grader"], row["correct"]) for row in ROWS)
    assert len(ROWS) >= 250
    assert all(
        kinds[grader, correct] >= 9
        for grader in ("numeric_answer", "math_answer", "choice", "ocw")
        for correct in (True, False)
    )
    assert all(row["why"] for row in ROWS)
    assert sum("known" in row for row in ROWS) <= len(ROWS) / 30


def test_false_positives_and_negatives(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.perf_counter()
    outcomes = [(row, grade(row)) for row in ROWS]
    seconds = time.perf_counter() - start
    table = Counter((row["grader"], outcome, "known" in row) for row, outcome in outcomes)
    with capsys.disabled():
        print(f"\n{'grader':10}{'texts':>7}{'false +':>9}{'false -':>9}{'known':>7}   ({seconds:.1f} s)")
        for grader in dict.fromkeys(row["grader"] for row in ROWS):
            texts = sum(row["grader"] == grader for row in ROWS)
            wrong = [table[grader, f"false {kind}", False] for kind in ("positive", "negative")]
            known = sum(table[grader, f"false {kind}", True] for kind in ("positive", "negative"))
            print(f"{grader:10}{texts:7}{wrong[0]:9}{wrong[1]:9}{known:7}")
    surprises = [
        (outcome, row["grader"], row["text"], row["answer"], row["why"])
        for row, outcome in outcomes
        if outcome != row.get("known", "right").partition(":")[0]
    ]
    assert surprises == []
