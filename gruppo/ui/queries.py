"""Questions to the index of a run. The answers are plain dicts, lists of them, or a `Page`.

Values are always bound, never part of a query; what to sort by is looked up in a fixed table. Unknown steps, groups and
prompts give None or empty answers. `step`, `group` and `sort` outside their range raise UsageError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

from gruppo.errors import UsageError, nearest

MOST = 200  # rows of a page
MOST_DRAWS = 5_000  # of one prompt; more are thinned out evenly
MOST_QUESTIONS = 20_000  # of one evaluation
_INTEGER = 2**62

Row = dict[str, Any]


class Ask(Protocol):
    """Ask one question, with bound values; the rows of the answer."""

    def __call__(self, query: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[Row]:
        """The rows of the answer."""


@dataclass(frozen=True)
class Page:
    """Some rows of a longer list. `total`: rows of the whole list."""

    rows: list[Row]
    total: int


@dataclass(frozen=True)
class Filters:
    """Which groups to list. None and "" do not filter.

    `skipped`, `truncated`, `excluded`, `nonzero`: whether the group was skipped, has a truncated completion, has an
    excluded completion, has a nonzero advantage. `text`: part of its prompt or prompt id, in any case. `low`, `high`:
    bounds of its mean reward.
    """

    skipped: bool | None = None
    truncated: bool | None = None
    excluded: bool | None = None
    nonzero: bool | None = None
    text: str = ""
    low: float | None = None
    high: float | None = None

    def conditions(self) -> tuple[list[str], Row]:
        """Conditions in SQL, and their values."""
        found: list[str] = []
        for wanted, condition in (
            (self.skipped, "skipped IS NOT NULL"),
            (self.truncated, "truncated > 0"),
            (self.excluded, "excluded > 0"),
            (self.nonzero, "nonzero"),
        ):
            if wanted is not None:
                found.append(condition if wanted else f"NOT ({condition})")
        values: Row = {}
        for name, value, condition in (
            ("text", self.text or None, _HAS_TEXT),
            ("low", self.low, "mean >= $low"),
            ("high", self.high, "mean <= $high"),
        ):
            if value is not None:
                found.append(condition)
                values[name] = value
        return found, values


_HAS_TEXT = "(contains(lower(prompt), lower($text)) OR contains(lower(prompt_id), lower($text)))"
_GROUP = """step, "group", prompt_id, prompt, rewards, mean, std, best, shortest, longest, completions, truncated,
    excluded, trained, "right", skipped, nonzero"""

_STEP_SORTS = {name: f'"{name}"' for name in (
    "step", "mean", "nonzero", "length", "truncated", "excluded", "right",
)}  # fmt: skip
_GROUP_SORTS = {"step": "draw", "group": "draw"} | {name: f'"{name}"' for name in (
    "prompt", "mean", "std", "best", "shortest", "longest", "truncated", "excluded", "trained", "right", "nonzero",
)}  # fmt: skip
_QUESTION_SORTS = {name: f'"{name}"' for name in (
    "prompt_id", "prompt", "draws", "first", "last", "change", "best", "evaluations", "first_right", "last_right",
)}  # fmt: skip

# One row per evaluated question of each evaluation.
_ASKED = """
    SELECT step, eval_set, prompt_id, count(*) AS answers, count(*) FILTER (correct) AS "right",
        count(*) FILTER (correct) / count(*) AS share, min(position) AS position, any_value(question) AS question
    FROM answers WHERE {where} GROUP BY step, eval_set, prompt_id
"""

_QUESTIONS = f"""
WITH drawn AS (
    SELECT prompt_id, any_value(prompt) AS prompt, count(*) AS draws, arg_min(mean, draw) AS first,
        arg_max(mean, draw) AS last, max(best) AS best
    FROM groups GROUP BY prompt_id
), asked AS ({_ASKED.format(where="true")}), evaluated AS (
    SELECT prompt_id, any_value(question) AS question, count(*) AS evaluations, arg_min(share, step) AS first_right,
        arg_max(share, step) AS last_right
    FROM asked GROUP BY prompt_id
), questions AS (
    SELECT coalesce(drawn.prompt_id, evaluated.prompt_id) AS prompt_id, coalesce(prompt, question) AS prompt,
        coalesce(draws, 0) AS draws, first, last, last - first AS change, best,
        coalesce(evaluations, 0) AS evaluations, first_right, last_right
    FROM drawn FULL JOIN evaluated ON drawn.prompt_id = evaluated.prompt_id
)
"""


@dataclass(frozen=True)
class Question:
    """A prompt through the run.

    `draws`: the groups of the prompt in order; `drawn`: how many there are in all. `evaluations`: every evaluation that
    asked it, with the number of answers and how many are right. `first_right`: step and group of the first right
    completion. `first_right_evaluations`, `regressions`: by evaluation set, the step of the first evaluation with a
    right answer, and pairs of evaluations that follow each other, of which the first had a larger share of right
    answers.
    """

    prompt_id: str
    prompt: str
    draws: list[Row]
    drawn: int
    evaluations: list[Row]
    first_right: Row | None
    first_right_evaluations: dict[str, int] = field(default_factory=dict)
    regressions: dict[str, list[tuple[int, int]]] = field(default_factory=dict)


class Queries:
    """The questions. A subclass says with `_asking` how they reach the index."""

    def _asking(self) -> AbstractContextManager[Ask]:
        raise NotImplementedError

    def counts(self) -> Row:
        """Numbers of `steps`, `groups`, `completions`, `evaluations`, `damaged` tables, and the `last` step."""
        with self._asking() as ask:
            return ask("""
                SELECT count(*) AS steps, coalesce(sum(groups), 0)::BIGINT AS groups,
                    coalesce(sum(completions), 0)::BIGINT AS completions, max(step) AS last,
                    (SELECT count(*) FROM files WHERE kind = 'evaluations' AND problem IS NULL) AS evaluations,
                    (SELECT count(*) FROM files WHERE problem IS NOT NULL) AS damaged
                FROM steps
            """)[0]

    def problems(self, offset: int = 0, limit: int = MOST) -> Page:
        """Damaged tables: `kind`, `step` and `problem`."""
        return self._page("SELECT kind, step, problem", "files WHERE problem IS NOT NULL", "kind, step", offset, limit)

    def steps(self, sort: str = "step", descending: bool = False, offset: int = 0, limit: int = MOST) -> Page:
        """One row per step: numbers of groups and completions, `mean` reward, share of groups with `nonzero` advantage,
        mean `length`, and numbers of truncated, excluded and right completions."""
        return self._page("SELECT *", "steps", _order(_STEP_SORTS, sort, descending, "step"), offset, limit)

    def step(self, step: int) -> Row | None:
        """The row of one step, with the steps that have tables before and after it (`previous`, `next`)."""
        with self._asking() as ask:
            rows = ask("SELECT * FROM steps WHERE step = ?", [_bounded("step", step)])
            return rows[0] | _around(ask, step) if rows else None

    def groups(
        self,
        step: int | None = None,
        sort: str = "group",
        descending: bool = False,
        filters: Filters | None = None,
        offset: int = 0,
        limit: int = MOST,
    ) -> Page:
        """Groups of one step, or of all steps if it is None."""
        conditions, values = (filters or Filters()).conditions()
        if step is not None:
            conditions.append("step = $step")
            values["step"] = _bounded("step", step)
        source = f"groups WHERE {' AND '.join(conditions) or 'true'}"
        return self._page(
            f"SELECT {_GROUP}", source, _order(_GROUP_SORTS, sort, descending, "draw"), offset, limit, values
        )

    def group(self, step: int, group: int) -> Row | None:
        """One group, the rows of its `completions`, and its neighbours: `previous` and `next` group of the step,
        `previous_step` and `next_step`; None where there is none."""
        values = {"step": _bounded("step", step), "group": _bounded("group", group)}
        with self._asking() as ask:
            rows = ask(f'SELECT {_GROUP} FROM groups WHERE step = $step AND "group" = $group', values)
            if not rows:
                return None
            beside = ask(
                """
                SELECT max("group") FILTER ("group" < $group) AS previous,
                    min("group") FILTER ("group" > $group) AS next
                FROM groups WHERE step = $step
                """,
                values,
            )[0]
            steps = {f"{name}_step": value for name, value in _around(ask, step).items()}
            completions = ask(
                'SELECT * FROM completions WHERE step = $step AND "group" = $group ORDER BY completion', values
            )
            return {**rows[0], "rows": completions, **beside, **steps}

    def best(self, first: int | None = None, last: int | None = None, limit: int = 20) -> list[Row]:
        """The completions with the highest rewards, the newest first among equals, of the steps from `first` to `last`,
        both included; with `prompt_id` and `prompt`."""
        values = {
            "first": _bounded("step", 0 if first is None else first),
            "last": _bounded("step", _INTEGER if last is None else last),
            "limit": _limit(limit),
        }
        with self._asking() as ask:
            return ask(
                """
                WITH best AS (
                    SELECT * FROM completions WHERE step BETWEEN $first AND $last AND reward IS NOT NULL
                    ORDER BY reward DESC, step DESC, "group", completion LIMIT $limit
                )
                SELECT best.*, prompt_id, prompt FROM best
                JOIN (SELECT step, "group", prompt_id, prompt FROM groups
                      WHERE step IN (SELECT step FROM best)) USING (step, "group")
                ORDER BY reward DESC, step DESC, "group", completion
                """,
                values,
            )

    def questions(
        self,
        search: str = "",
        sort: str = "prompt_id",
        descending: bool = False,
        offset: int = 0,
        limit: int = MOST,
    ) -> Page:
        """One row per prompt that was drawn or evaluated.

        `draws`; mean reward of its `first` and `last` draw with a reward, their difference (`change`), and its `best`
        reward; number of `evaluations`, and its share of right answers at the first and the last of them
        (`first_right`, `last_right`). `search`: see `Filters.text`.
        """
        values = {"text": search} if search else {}
        source = f"questions WHERE {_HAS_TEXT}" if search else "questions"
        order = _order(_QUESTION_SORTS, sort, descending, "prompt_id")
        return self._page(f"{_QUESTIONS} SELECT *", source, order, offset, limit, values)

    def questions_of(self, prompts: Sequence[str]) -> list[Row]:
        """The rows of `questions` for these prompt ids, in their order; unknown ones are left out."""
        with self._asking() as ask:
            query = f"{_QUESTIONS} SELECT * FROM questions WHERE prompt_id IN (SELECT unnest($prompts))"
            rows = {row["prompt_id"]: row for row in ask(query, {"prompts": list(prompts)})}
        return [rows[prompt] for prompt in prompts if prompt in rows]

    def question(self, prompt_id: str) -> Question | None:
        """What is known of one prompt; see `Question`."""
        with self._asking() as ask:
            values: Row = {"id": prompt_id}
            drawn = ask("SELECT count(*) AS n, any_value(prompt) AS prompt FROM groups WHERE prompt_id = $id", values)
            count = drawn[0]["n"]
            every = max(1, -(-count // MOST_DRAWS))
            draws = ask(
                """
                SELECT * EXCLUDE place FROM (
                    SELECT step, "group", mean, best, completions, "right", excluded, truncated, nonzero,
                        row_number() OVER (ORDER BY draw) AS place
                    FROM groups WHERE prompt_id = $id
                ) WHERE (place - 1) % $every = 0 OR place = $count ORDER BY place
                """,
                values | {"every": every, "count": count},
            )
            right = ask(
                'SELECT step, "group" FROM groups WHERE prompt_id = $id AND "right" > 0 ORDER BY draw LIMIT 1', values
            )
            asked = ask(f"{_ASKED.format(where='prompt_id = $id')} ORDER BY eval_set, step", values)
        if not count and not asked:
            return None
        prompt = drawn[0]["prompt"] if count else asked[0]["question"]
        evaluations = [{name: row[name] for name in ("eval_set", "step", "answers", "right", "share")} for row in asked]
        first, regressions = _turns(evaluations)
        return Question(
            prompt_id, prompt or "", draws, count, evaluations, right[0] if right else None, first, regressions
        )

    def evaluations(self) -> list[Row]:
        """One row per evaluation and set, in the order of steps: numbers of `questions`, `answers` and `right` answers,
        `accuracy` (the mean over questions of their share of right answers), shares of answers that were `finished` and
        `without_vote`, mean `length`."""
        with self._asking() as ask:
            return ask(f"""
                WITH asked AS ({_ASKED.format(where="true")}), answered AS (
                    SELECT step, eval_set, count(*) FILTER (finish_reason = 'stop') / count(*) AS finished,
                        count(*) FILTER (vote IS NULL) / count(*) AS without_vote, avg(length) AS length
                    FROM answers GROUP BY step, eval_set
                )
                SELECT step, eval_set, count(*) AS questions, sum(answers)::BIGINT AS answers,
                    sum("right")::BIGINT AS "right", avg(share) AS accuracy, any_value(finished) AS finished,
                    any_value(without_vote) AS without_vote, any_value(length) AS length
                FROM asked JOIN answered USING (step, eval_set) GROUP BY step, eval_set ORDER BY step, eval_set
            """)

    def verdicts(self, step: int, eval_set: str = "") -> list[Row]:
        """The questions of one evaluation in order, at most `MOST_QUESTIONS`, for pass@k, maj@k and best-of-k.

        `correct`, `votes` and `scores` of a question are lists over its answers in order.
        """
        with self._asking() as ask:
            return ask(
                f"""
                SELECT prompt_id, list(coalesce(correct, false) ORDER BY position) AS correct,
                    list(vote ORDER BY position) AS votes, list(score ORDER BY position) AS scores
                FROM answers WHERE step = $step AND eval_set = $eval_set
                GROUP BY prompt_id ORDER BY min(position) LIMIT {MOST_QUESTIONS}
                """,
                {"step": _bounded("step", step), "eval_set": eval_set},
            )

    def answers(self, step: int, prompt_id: str, eval_set: str = "", offset: int = 0, limit: int = MOST) -> Page:
        """The answers to one question of an evaluation; `position` is the row in the table."""
        values = {"step": _bounded("step", step), "eval_set": eval_set, "id": prompt_id}
        source = "answers WHERE step = $step AND eval_set = $eval_set AND prompt_id = $id"
        return self._page("SELECT *", source, "position", offset, limit, values)

    def changes(
        self, before: int, after: int, eval_set: str = "", kind: str = "", offset: int = 0, limit: int = MOST
    ) -> tuple[dict[str, int], Page]:
        """What happened to each question between two evaluations of a set: the numbers of each kind, and the rows of
        one kind, or of all.

        A question is right at an evaluation if more than half of its answers are. Kinds: "fixed", "broken", "still
        wrong", "still right", and "not in both" for questions that only one of them asked.
        """
        if kind and kind not in KINDS_OF_CHANGE:
            raise UsageError(f"kind {kind!r} is not known{nearest(kind, KINDS_OF_CHANGE)}")
        values: Row = {
            "before": _bounded("step", before), "after": _bounded("step", after), "eval_set": eval_set,
        }  # fmt: skip
        with self._asking() as ask:
            found = ask(f"SELECT kind, count(*) AS n FROM ({_CHANGES}) GROUP BY kind", values)
            counts = dict.fromkeys(KINDS_OF_CHANGE, 0) | {row["kind"]: row["n"] for row in found}
            rows = ask(
                f"""
                SELECT * EXCLUDE position FROM ({_CHANGES}) WHERE $kind = '' OR kind = $kind
                ORDER BY position, prompt_id LIMIT $limit OFFSET $offset
                """,
                values | {"kind": kind, "limit": _limit(limit), "offset": _bounded("offset", offset)},
            )
        return counts, Page(rows, counts[kind] if kind else sum(counts.values()))

    def _page(
        self, select: str, source: str, order: str, offset: int, limit: int, values: Row | None = None
    ) -> Page:  # fmt: skip
        values = values or {}
        bounds = {"limit": _limit(limit), "offset": _bounded("offset", offset)}
        with self._asking() as ask:
            rows = ask(f"{select} FROM {source} ORDER BY {order} LIMIT $limit OFFSET $offset", values | bounds)
            total = offset + len(rows)
            if len(rows) == limit or (offset and not rows):
                head = select[: select.rindex("SELECT")]
                total = ask(f"{head} SELECT count(*) AS total FROM {source}", values)[0]["total"]
        return Page(rows, total)


KINDS_OF_CHANGE = ("fixed", "broken", "still wrong", "still right", "not in both")

_CHANGES = f"""
    SELECT coalesce(one.prompt_id, other.prompt_id) AS prompt_id, coalesce(one.question, other.question) AS question,
        one.share AS before, other.share AS after, coalesce(one.position, other.position) AS position,
        CASE WHEN one.share IS NULL OR other.share IS NULL THEN 'not in both'
            WHEN one.share > 0.5 THEN if(other.share > 0.5, 'still right', 'broken')
            ELSE if(other.share > 0.5, 'fixed', 'still wrong') END AS kind
    FROM ({_ASKED.format(where="step = $before AND eval_set = $eval_set")}) AS one
    FULL JOIN ({_ASKED.format(where="step = $after AND eval_set = $eval_set")}) AS other USING (prompt_id)
"""


def _around(ask: Ask, step: int) -> Row:
    """The steps with tables before and after a step."""
    return ask(
        """
        SELECT max(step) FILTER (step < $step) AS previous, min(step) FILTER (step > $step) AS next FROM steps
        """,
        {"step": step},
    )[0]


def _turns(evaluations: Sequence[Row]) -> tuple[dict[str, int], dict[str, list[tuple[int, int]]]]:
    """First right evaluation and regressions by set, of rows in the order of sets and steps."""
    first: dict[str, int] = {}
    regressions: dict[str, list[tuple[int, int]]] = {}
    for row in evaluations:
        if row["right"]:
            first.setdefault(row["eval_set"], row["step"])
    for one, other in pairwise(evaluations):
        if one["eval_set"] == other["eval_set"] and other["share"] < one["share"]:
            regressions.setdefault(one["eval_set"], []).append((one["step"], other["step"]))
    return first, regressions


def _order(sorts: Mapping[str, str], sort: str, descending: bool, then: str) -> str:
    if sort not in sorts:
        raise UsageError(f"sort {sort!r} is not known{nearest(sort, sorts)}")
    return f"{sorts[sort]} {'DESC' if descending else 'ASC'} NULLS LAST, {then}"


def _bounded(name: str, value: int) -> int:
    if not 0 <= value <= _INTEGER:
        raise UsageError(f"{name} {value} is not between 0 and {_INTEGER}")
    return value


def _limit(value: int) -> int:
    if not 1 <= value <= MOST:
        raise UsageError(f"limit {value} is not between 1 and {MOST}")
    return value
