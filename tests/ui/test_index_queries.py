"""The index gives the answers that pandas gives on the same tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest

from gruppo.errors import UsageError
from gruppo.ui.index import Index
from gruppo.ui.queries import KINDS_OF_CHANGE, Filters
from tests.ui.run_tables import (
    plain,
    random_evaluation,
    random_rollouts,
    raw_answers,
    raw_completions,
    raw_groups,
    records,
    write,
)

STEPS, EVALUATIONS = range(1, 13), (0, 5, 10)


@pytest.fixture(scope="module", params=[0, 1], ids="seed {}".format)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = np.random.default_rng(request.param)
    run = tmp_path_factory.mktemp("run")
    for step in STEPS:
        write(run, "rollouts", step, random_rollouts(source, step))
    for step in EVALUATIONS:
        write(run, "evaluations", step, random_evaluation(source))
    return run


class Raw(NamedTuple):
    """The contents of a run in pandas."""

    completions: pd.DataFrame
    groups: pd.DataFrame
    answers: pd.DataFrame


@pytest.fixture(scope="module")
def raw(run: Path) -> Raw:
    completions = raw_completions(run)
    return Raw(completions, raw_groups(completions), raw_answers(run))


@pytest.fixture(scope="module")
def index(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    index = Index(run, tmp_path_factory.mktemp("cache"))
    assert index.update() == len(STEPS) + len(EVALUATIONS)
    return index


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The rows are equal in the columns of `expected`; numbers up to rounding."""
    assert len(found) == len(expected)
    for row, wanted in zip(found, expected, strict=True):
        for name, value in wanted.items():
            is_near = isinstance(value, float) and row[name] is not None
            assert row[name] == (pytest.approx(value) if is_near else value), (name, wanted)


def test_counts(raw: Raw, index: Index) -> None:
    assert index.counts() == {
        "steps": 12, "groups": len(raw.groups), "completions": len(raw.completions), "last": 12,
        "evaluations": 3, "damaged": 0,
    }  # fmt: skip


def test_steps(raw: Raw, index: Index) -> None:
    completions, groups = raw.completions, raw.groups
    expected = completions.groupby("step").agg(
        completions=("reward", "size"), mean=("reward", "mean"), length=("length", "mean"),
        truncated=("truncated", "sum"), excluded=("excluded", "sum"), right=("right", "sum"),
    )  # fmt: skip
    expected["groups"] = groups.groupby("step").size()
    expected["nonzero"] = groups.groupby("step")["nonzero"].mean()
    assert_same(index.steps().rows, records(expected.reset_index()))
    assert index.step(1) == index.steps().rows[0] | {"previous": None, "next": 2}
    assert index.step(12) == index.steps().rows[11] | {"previous": 11, "next": None}
    assert index.step(13) is None


def test_groups(raw: Raw, index: Index) -> None:
    expected = raw.groups
    assert_same(index.groups().rows, records(expected))
    for step in STEPS:
        assert_same(index.groups(step).rows, records(expected[expected["step"] == step]))
    assert index.groups(99).rows == []


def test_rewards_of_a_group_are_in_the_order_of_its_completions(raw: Raw, index: Index) -> None:
    for (step, group), rows in raw.completions.groupby(["step", "group"]):
        found = index.group(int(step), int(group))
        assert found is not None
        assert found["rewards"] == [plain(value) for value in rows["reward"]]
        assert [row["completion"] for row in found["rows"]] == rows["completion"].tolist()
        assert [row["right"] for row in found["rows"]] == [
            None if pd.isna(reward) else right for reward, right in zip(rows["reward"], rows["right"], strict=True)
        ]
        assert [row["advantage"] for row in found["rows"]] == [
            float(np.mean(values)) if len(values) else None for values in rows["advantages"]
        ]
        assert [row["length"] for row in found["rows"]] == rows["length"].tolist()


def test_neighbors_of_a_group(index: Index) -> None:
    first, last = index.group(1, 0), index.group(12, 3)
    assert first is not None
    assert last is not None
    assert [first[name] for name in ("previous", "next", "previous_step", "next_step")] == [None, 1, None, 2]
    assert [last[name] for name in ("previous", "next", "previous_step", "next_step")] == [2, None, 11, None]
    assert index.group(1, 4) is None


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize(
    "sort",
    ["step", "group", "prompt", "mean", "std", "best", "shortest", "longest", "truncated", "excluded", "trained",
     "right", "nonzero"],
)  # fmt: skip
def test_sorted_groups(raw: Raw, index: Index, sort: str, descending: bool) -> None:
    """Equal values are in the order of steps, missing ones at the end."""
    expected = raw.groups
    if sort in ("step", "group"):
        expected = expected[::-1] if descending else expected
    else:
        expected = expected.sort_values(sort, ascending=not descending, kind="stable", na_position="last")
    assert_same(index.groups(sort=sort, descending=descending).rows, records(expected))


@pytest.mark.parametrize("sort", ["step", "mean", "nonzero", "length", "truncated", "excluded", "right"])
def test_sorted_steps(index: Index, sort: str) -> None:
    expected = pd.DataFrame(index.steps().rows).sort_values(sort, ascending=False, kind="stable", na_position="last")
    assert_same(index.steps(sort, descending=True).rows, records(expected))


@pytest.mark.parametrize(
    ("filters", "condition"),
    [
        (Filters(skipped=True), "~skipped.isna()"),
        (Filters(skipped=False), "skipped.isna()"),
        (Filters(truncated=True), "truncated > 0"),
        (Filters(truncated=False, excluded=False), "truncated == 0 and excluded == 0"),
        (Filters(excluded=True), "excluded > 0"),
        (Filters(nonzero=True), "nonzero"),
        (Filters(nonzero=False), "~nonzero"),
        (Filters(low=0.1), "mean >= 0.1"),
        (Filters(low=0.1, high=0.5), "0.1 <= mean <= 0.5"),
        (Filters(text="QUESTION 3"), "prompt_id == 'task/3'"),
        (Filters(text="SK/2"), "prompt_id == 'task/2'"),
        (Filters(text="50% of_it"), "mean == mean or mean != mean"),
        (Filters(text="50_"), "mean > 1e9"),
        (Filters(text="' OR true --"), "mean > 1e9"),
    ],
    ids=str,
)
def test_filtered_groups(raw: Raw, index: Index, filters: Filters, condition: str) -> None:
    expected = raw.groups.query(condition, engine="python")
    assert_same(index.groups(filters=filters).rows, records(expected))
    in_step = expected[expected["step"] == 3]
    assert_same(index.groups(3, filters=filters).rows, records(in_step))


def test_pages(index: Index) -> None:
    every = index.groups()
    assert every.total == len(every.rows)
    rows = [row for offset in range(0, every.total + 5, 5) for row in index.groups(offset=offset, limit=5).rows]
    assert rows == every.rows
    assert index.groups(offset=every.total, limit=5).total == every.total
    assert index.groups(offset=10**6, limit=5).total == every.total
    assert index.questions(limit=1).total == index.questions().total == len(index.questions().rows)
    assert index.questions("question 3", limit=1).total == 1


def test_best_completions(raw: Raw, index: Index) -> None:
    expected = raw.completions.dropna(subset="reward")
    order = {"reward": False, "step": False, "group": True, "completion": True}
    expected = expected.sort_values(list(order), ascending=list(order.values()))
    names = ["step", "group", "completion", "reward", "length", "prompt_id", "prompt"]
    assert_same(index.best(limit=30), records(expected[names][:30]))
    inside = expected[expected["step"].between(4, 6)]
    assert_same(index.best(4, 6, limit=200), records(inside[names]))


def raw_questions(raw: Raw) -> pd.DataFrame:
    groups, answers = raw.groups, raw.answers
    known = groups.dropna(subset="mean")
    drawn = groups.groupby("prompt_id").agg(draws=("mean", "size"), best=("best", "max"), prompt=("prompt", "first"))
    drawn["first"] = known.groupby("prompt_id")["mean"].first()
    drawn["last"] = known.groupby("prompt_id")["mean"].last()
    drawn["change"] = drawn["last"] - drawn["first"]
    asked = answers.groupby(["step", "eval_set", "prompt_id"])["correct"].mean().reset_index()
    asked = asked.sort_values("step", kind="stable").groupby("prompt_id")["correct"]
    drawn["evaluations"] = asked.size()
    return drawn.reset_index().sort_values("prompt_id")


def test_questions(raw: Raw, index: Index) -> None:
    expected = raw_questions(raw)
    assert_same(index.questions().rows, records(expected))
    for sort in ("draws", "change", "best", "first", "last"):
        ordered = expected.sort_values(sort, ascending=False, kind="stable", na_position="last")
        assert_same(index.questions(sort=sort, descending=True).rows, records(ordered))
    assert_same(index.questions("question 4").rows, records(expected[expected["prompt_id"] == "task/4"]))


def test_question_through_time(raw: Raw, index: Index) -> None:
    groups, answers = raw.groups, raw.answers
    for prompt in sorted(set(groups["prompt_id"])):
        found = index.question(prompt)
        drawn = groups[groups["prompt_id"] == prompt]
        assert found is not None
        assert found.drawn == len(drawn)
        assert_same(found.draws, records(drawn[["step", "group", "mean", "best", "completions", "right", "nonzero"]]))
        right = records(drawn.loc[drawn["right"] > 0, ["step", "group"]])
        assert found.first_right == (right[0] if right else None)
        asked = answers[answers["prompt_id"] == prompt].groupby(["eval_set", "step"])["correct"]
        shares = asked.agg(answers="size", right="sum", share="mean").reset_index()
        assert_same(found.evaluations, records(shares))
        for name, rows in shares.groupby("eval_set"):
            pairs = list(zip(records(rows), records(rows)[1:], strict=False))
            falls = [(one["step"], other["step"]) for one, other in pairs if other["share"] < one["share"]]
            assert found.regressions.get(str(name), []) == falls
            rights = [row["step"] for row in records(rows) if row["right"]]
            assert found.first_right_evaluations.get(str(name)) == (rights[0] if rights else None)
    assert index.question("nothing like it") is None


def test_draws_of_a_prompt_are_thinned_out_evenly(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    every = index.question("task/0")
    assert every is not None
    monkeypatch.setattr("gruppo.ui.queries.MOST_DRAWS", 4)
    found = index.question("task/0")
    assert found is not None
    assert found.drawn == len(every.draws) > 4
    distance = -(-found.drawn // 4)
    places = sorted({*range(0, found.drawn, distance), found.drawn - 1})
    assert found.draws == [every.draws[place] for place in places]


def test_evaluations(raw: Raw, index: Index) -> None:
    answers = raw.answers.assign(
        finished=raw.answers["finish_reason"] == "stop", without_vote=raw.answers["vote"].isna()
    )
    by_set = answers.groupby(["step", "eval_set"])
    expected = by_set.agg(
        questions=("prompt_id", "nunique"), answers=("correct", "size"), right=("correct", "sum"),
        finished=("finished", "mean"), without_vote=("without_vote", "mean"), length=("length", "mean"),
    )  # fmt: skip
    shares = answers.groupby(["step", "eval_set", "prompt_id"])["correct"].mean()
    expected["accuracy"] = shares.groupby(["step", "eval_set"]).mean()
    assert_same(index.evaluations(), records(expected.reset_index()))


def test_verdicts_and_answers(raw: Raw, index: Index) -> None:
    answers = raw.answers
    for (step, eval_set), rows in answers.groupby(["step", "eval_set"]):
        found = index.verdicts(int(step), str(eval_set))
        by_prompt = {str(name): part for name, part in rows.groupby("prompt_id", sort=False)}
        assert [row["prompt_id"] for row in found] == list(by_prompt)
        for row in found:
            part = by_prompt[row["prompt_id"]]
            assert row["correct"] == part["correct"].tolist()
            assert row["votes"] == [plain(value) for value in part["vote"]]
            assert row["scores"] == part["score"].tolist()
            page = index.answers(int(step), row["prompt_id"], str(eval_set))
            assert_same(page.rows, records(part[["step", "position", "sample", "vote", "length"]]))
    assert index.verdicts(3) == []


def test_changes_between_evaluations(raw: Raw, index: Index) -> None:
    shares = raw.answers.groupby(["step", "eval_set", "prompt_id"])["correct"].mean()
    before, after = shares[0, ""], shares[10, ""]
    expected: dict[str, str] = {}
    for prompt in sorted({*before.index, *after.index}):
        if prompt not in before.index or prompt not in after.index:
            expected[prompt] = "not in both"
        else:
            old, new = bool(before[prompt] > 0.5), bool(after[prompt] > 0.5)
            names = {(False, True): "fixed", (True, False): "broken", (False, False): "still wrong"}
            expected[prompt] = names.get((old, new), "still right")
    counts, page = index.changes(0, 10)
    assert counts == {kind: list(expected.values()).count(kind) for kind in KINDS_OF_CHANGE}
    assert {row["prompt_id"]: row["kind"] for row in page.rows} == expected
    for row in page.rows:
        assert row["before"] == plain(before.get(row["prompt_id"]))
        assert row["after"] == plain(after.get(row["prompt_id"]))
    for kind in KINDS_OF_CHANGE:
        some = index.changes(0, 10, kind=kind, limit=1)[1]
        assert some.total == counts[kind]
        assert [row["kind"] for row in some.rows] == [kind] * min(1, counts[kind])


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda index: index.groups(sort="advantage; DROP TABLE groups"), "sort 'advantage; DROP TABLE groups' is not"),
        (lambda index: index.steps(sort="prompt"), "sort 'prompt' is not known"),
        (lambda index: index.groups(sort="meen"), "mean"),
        (lambda index: index.groups(limit=0), "limit 0 is not between 1 and 200"),
        (lambda index: index.groups(limit=201), "limit 201 is not between 1 and 200"),
        (lambda index: index.groups(offset=-1), "offset -1 is not between"),
        (lambda index: index.step(-1), "step -1 is not between"),
        (lambda index: index.group(1, 2**63), "group 9223372036854775808 is not between"),
        (lambda index: index.changes(0, 10, kind="fixd"), "kind 'fixd' is not known"),
    ],
    ids=range(9),
)
def test_questions_out_of_range(index: Index, ask: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ask(index)
