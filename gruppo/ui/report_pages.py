"""The pages of one run in a report: which ones, and what each shows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from gruppo.errors import UsageError
from gruppo.ui import tables
from gruppo.ui.answers import side_by_side
from gruppo.ui.app import events_values, head_values, recipe_values
from gruppo.ui.catalog import Card
from gruppo.ui.charts import AXES, payload
from gruppo.ui.dashboard import Dashboard
from gruppo.ui.index import Index
from gruppo.ui.links import Links
from gruppo.ui.pages import Encoded
from gruppo.ui.private import Private, every_text
from gruppo.ui.queries import MOST, Filters, Page, Row
from gruppo.ui.sampling import Limits, by_weight, spread
from gruppo.ui.text import json_block
from gruppo.ui.tokens import answers_data, group_data

POINTS = 400  # of a curve
LISTED = 500  # rows of the table of steps
ANSWERS = 20  # rows of a page of an evaluation
SETS = 40  # of questions, whose evaluations have pages

_GROUPS_SHARE = 2 / 3  # of the megabytes; the rest is for answers of evaluations


@dataclass(frozen=True)
class ReportPage:
    """A page: its address, its template, and what this shows. `note`: what was left out of it."""

    address: str
    template: str
    values: dict[str, Any]
    note: str = ""


@dataclass
class _Step:
    """A step with its groups. `row`: of `Index.steps`."""

    row: Row
    groups: list[Row]
    shown: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class _Pair:
    """An evaluation of a set beside an earlier one. `found`: what its page shows."""

    eval_set: str
    before: int
    step: int
    kind: str
    found: dict[str, Any]


class RunPages:
    """The pages of a run. Commands call it by `card.folder`. `names`: an address for every page, in the file or not.

    `collect` reads what takes space, up to `limits`, and says which pages there are; `pages` then gives them.
    """

    def __init__(
        self, state: Dashboard, index: Index, card: Card, private: Private, limits: Limits, names: Links
    ) -> None:
        self.state, self.index, self.private, self.limits, self.names = state, index, private, limits, names
        self.path, self.card = card.path, every_text(card, private.paths)
        self.tokens: dict[str, Encoded] = {}
        self.steps: list[_Step] = []
        self.pairs: list[_Pair] = []
        self.questions: list[str] = []
        self.all_steps: list[Row] = []
        self.evaluations: list[Row] = index.evaluations()
        self.totals: Row = index.counts()
        self.unread: list[str] = []
        self._left = 0.0

    def collect(self, megabytes: float, advance: Callable[[float], None]) -> None:
        """Choose what is shown, and read the tokens of groups and answers: at most `megabytes`, of JSON.

        `advance(1)` is called after each group or answer.
        """
        self._choose_steps()
        self._choose_evaluations()
        self._choose_questions()
        self._left = megabytes * 1e6 * _GROUPS_SHARE
        for step, row in self._wanted_groups():
            address = self.names.group(self.card.key, step.row["step"], row["group"])
            if self._read(address, group_data, step.row["step"], row["group"], named=self.card.folder):
                step.shown.append(row)
            advance(1)
        for step in self.steps:
            step.shown.sort(key=lambda row: row["group"])
        self._left += megabytes * 1e6 * (1 - _GROUPS_SHARE)
        for number, eval_set, prompt in self._wanted_answers():
            address = self.names.answers(self.card.key, number, eval_set, prompt)
            self._read(address, answers_data, number, eval_set, prompt)
            advance(1)

    def _read(self, address: str | None, read: Callable[..., dict[str, Any]], *place: Any, **named: Any) -> bool:
        """Read a page of tokens, if it fits. A damaged table is left out, and said to be."""
        try:
            data = read(self.path, *place, **named)
        except UsageError as error:
            self.unread.append(self.private.paths(str(error)))
            return False
        data["run"] = self.card.folder
        for one in data["completions"]:
            one |= {name: every_text(one[name], self.private.paths) for name in ("printed", "failure") if name in one}
        text = json_block(every_text(data, self.private.folders))
        if len(text) > self._left:
            return False
        self._left -= len(text)
        self.tokens[str(address)] = Encoded(text, data["page"])
        return True

    # ------------------------------------------------------------------ choosing

    def _choose_steps(self) -> None:
        self.all_steps = _every(self.index.steps)
        means = [row["mean"] for row in self.all_steps]
        for place in spread(len(means), self.limits.steps, _best(means)):
            row = self.all_steps[place]
            self.steps.append(_Step(row, self.index.groups(row["step"], limit=MOST).rows))

    def _wanted_groups(self) -> Iterator[tuple[_Step, Row]]:
        """The groups in the order in which they are wanted: the last step, the first, the best, then the others."""
        means = [step.row["mean"] for step in self.steps]
        order = by_weight(range(len(means)), [len(means) - 1, 0, *_best(means)])
        for step in (self.steps[place] for place in order):
            spreads = [row["std"] for row in step.groups]
            for place in spread(len(spreads), self.limits.groups, _best(spreads)):
                yield step, step.groups[place]

    def _choose_evaluations(self) -> None:
        """Evaluations beside the first one of their set; the last one also by what happened to its questions."""
        for name in self._sets()[:SETS]:
            rows = [row for row in self.evaluations if row["eval_set"] == name]
            for place in spread(len(rows), self.limits.steps, _best([row["accuracy"] for row in rows])):
                self._add_pair(name, rows[0]["step"], rows[place]["step"])
            if len(rows) > 1:
                counts = self.pairs[-1].found["counts"]
                for kind in (kind for kind, count in counts.items() if count):
                    self._add_pair(name, rows[0]["step"], rows[-1]["step"], kind)

    def _sets(self) -> list[str]:
        return list(dict.fromkeys(row["eval_set"] for row in self.evaluations))

    def _add_pair(self, name: str, before: int, step: int, kind: str = "") -> None:
        view = tables.View("", False, 0, _no_address, {}, limit=ANSWERS)
        found = tables.evaluation_values(self.index, step, before, name, kind, view)
        self.pairs.append(_Pair(name, before, step, kind, found))

    def _wanted_answers(self) -> Iterator[tuple[int, str, str]]:
        """The answers that the first and the last evaluation of a set show, as (step, set, prompt)."""
        wanted: dict[tuple[int, str, str], None] = {}
        for pair in self.pairs:
            if pair.step == pair.found["steps"][-1]:
                for row in pair.found["rows"]:
                    wanted |= {(step, pair.eval_set, row["prompt_id"]): None for step in (pair.before, pair.step)}
        yield from wanted

    def _choose_questions(self) -> None:
        """Half of them of the shown evaluations, then those of the wanted groups, then those sampled most often."""
        shown = [row["prompt_id"] for pair in self.pairs for row in pair.found["rows"]]
        sampled = [row["prompt_id"] for _, row in self._wanted_groups()]
        often = [row["prompt_id"] for row in self.index.questions(sort="draws", descending=True, limit=MOST).rows]
        half = -(-self.limits.questions // 2)
        chosen = dict.fromkeys([*list(dict.fromkeys(shown))[:half], *sampled, *often, *shown])
        self.questions = list(chosen)[: self.limits.questions]

    # ------------------------------------------------------------------ the pages

    def pages(self) -> Iterator[ReportPage]:
        """The pages. Values of the index are those from before `collect`, also if the run goes on."""
        yield self._overview()
        yield self._page(self.names.run(self.card.key, "recipe"), "recipe.html", "recipe", **self._recipe())
        yield from self._step_pages()
        yield from self._question_pages()
        yield from self._evaluation_pages()

    def _page(self, address: str | None, template: str, tab: str, note: str = "", **values: Any) -> ReportPage:
        return ReportPage(str(address)[1:], template, {"tab": tab, "card": self.card, **values}, note)

    def _overview(self) -> ReportPage:
        live = self.state.runs.live(self.path)
        shown = {**head_values(self.state, self.card), **events_values(self.state, self.card)}
        charts = charts_of_axes(lambda axis: payload(live, axis, points=POINTS))
        values = every_text({"charts": charts, "commands": self._recipe()["commands"], **shown}, self.private.paths)
        return self._page(
            self.names.run(self.card.key), "run.html", "", self.summary(), **{**values, "card": self.card},
            charts_source=None, charts_stream=None,
        )  # fmt: skip

    def _recipe(self) -> dict[str, Any]:
        return dict(every_text(recipe_values(self.card, self.card.folder), self.private.paths))

    def _step_pages(self) -> Iterator[ReportPage]:
        view = tables.View("step", True, 0, _no_address, {}, limit=LISTED)
        places = [self.all_steps.index(step.row) for step in self.steps]
        listed = [self.all_steps[place] for place in spread(len(self.all_steps), max(LISTED, len(places)), places)]
        note = _part(len(self.steps), len(self.all_steps), "steps", "have a page") if self.all_steps else ""
        if len(listed) < len(self.all_steps):
            note += f" {len(listed):,} are listed."
        problems = every_text(self.index.problems().rows, self.private.paths)
        yield self._page(
            self.names.run(self.card.key, "steps"), "steps.html", "steps", note, counts=self.totals,
            rows=listed[::-1], view=replace(view, total=len(listed)), problems=problems,
        )  # fmt: skip
        numbers = [step.row["step"] for step in self.steps]
        for step, (previous, following) in zip(self.steps, _neighbors(numbers), strict=True):
            number = step.row["step"]
            row = {**step.row, "previous": previous, "next": following}
            view = tables.View("group", False, 0, _no_address, {}, limit=MOST, total=len(step.groups))
            notes = [_part(len(step.shown), step.row["groups"], "groups", "can be read token by token")]
            if len(step.groups) < step.row["groups"]:
                notes.append(f"The first {len(step.groups)} are listed.")
            yield self._page(
                self.names.step(self.card.key, number), "step.html", "steps", " ".join(notes), step=row,
                rows=step.groups, view=view, filters=Filters(),
            )  # fmt: skip
            groups = [one["group"] for one in step.shown]
            for one, (before, after) in zip(step.shown, _neighbors(groups), strict=True):
                address = str(self.names.group(self.card.key, number, one["group"]))
                yield self._page(
                    address, "group.html", "steps", step=number, group=one["group"], data=self.tokens[address],
                    prompt_id=one["prompt_id"], around={"previous": before, "next": after}, page_address=_no_address,
                )  # fmt: skip

    def _question_pages(self) -> Iterator[ReportPage]:
        listed, total = self.index.questions_of(self.questions), self.index.questions(limit=1).total
        view = tables.View("", True, 0, _no_address, {}, limit=len(listed) or 1, total=len(listed))
        yield self._page(
            self.names.run(self.card.key, "questions"), "questions.html", "questions",
            _part(len(listed), total, "questions", "are shown"), rows=listed, view=view, search="",
        )  # fmt: skip
        for row in listed:
            view = tables.View("", False, 0, _no_address, {}, tables.MOMENTS)
            found = tables.question_values(self.index, self.card, row["prompt_id"], view)
            note = _part(len(found["moments"]), found["view"].total, "times", "are shown, the first ones")
            found["view"] = replace(found["view"], total=len(found["moments"]))
            address = self.names.question(self.card.key, row["prompt_id"])
            yield self._page(address, "question.html", "questions", note, **found)

    def _evaluation_pages(self) -> Iterator[ReportPage]:
        links, key = self.names, self.card.key
        found = tables.evaluations_values(self.index, self.card, self.state.runs.live(self.path))
        curves = found.pop("answer_curves")
        charts = {"axis": "samples", "axes": {"samples": "answers per question (k)"}, "points": 800, "events": [],
                  "charts": curves}  # fmt: skip
        yield self._page(
            links.run(key, "evaluations"), "evaluations.html", "evaluations",
            _part(SETS, len(self._sets()), "sets", "have pages of their questions"),
            charts=charts if curves else None, charts_source=None, charts_stream=None, **found,
        )  # fmt: skip

        def address_of(step: int, name: str, prompt: str) -> str | None:
            found = links.answers(key, step, name, prompt)
            return found if found in self.tokens else None

        for pair in self.pairs:
            sides = [
                {"run": self.path, "step": step, "title": f"after step {step}", "share": share,
                 "href": partial(address_of, step, pair.eval_set)}
                for step, share in ((pair.before, "before"), (pair.step, "after"))
            ]  # fmt: skip
            rows = side_by_side(pair.found["rows"], sides, pair.eval_set)
            total = pair.found["view"].total
            view = replace(pair.found["view"], total=len(rows))
            address = links.evaluation(key, pair.step, set=pair.eval_set, before=pair.before, kind=pair.kind)
            note = _part(len(rows), total, "questions", "are shown")
            yield self._page(
                address, "evaluation.html", "evaluations", note, **{**pair.found, "rows": rows, "view": view}
            )
        for step, name, prompt in self._wanted_answers():
            address = links.answers(key, step, name, prompt)
            if address in self.tokens:
                yield self._page(
                    address, "answers.html", "evaluations", step=step, eval_set=name, prompt_id=prompt,
                    data=self.tokens[str(address)], page_address=_no_address,
                )  # fmt: skip

    def summary(self) -> str:
        """What the report holds of the run, and what was left out."""
        groups, steps = sum(len(step.shown) for step in self.steps), len(self.steps)
        parts = []
        if self.all_steps:
            parts.append(_part(steps, len(self.all_steps), "steps", "have a page"))
            parts.append(_part(groups, self.totals["groups"], "groups", "can be read token by token"))
        parts += self.unread[:5]
        return " ".join(part for part in parts if part)


def charts_of_axes(payload: Callable[[str], Mapping[str, Any]]) -> dict[str, Any]:
    """The charts by step, which hold those of the other axes as `others`. Numbers have 6 significant digits."""
    first, *others = AXES
    charts = {**payload(first), "others": {axis: payload(axis) for axis in others}}
    shortened: dict[str, Any] = json.loads(json.dumps(charts), parse_float=lambda text: float(f"{float(text):.6g}"))
    return shortened


def _no_address(*_: Any, **changed: Any) -> None:
    """A report has no page with other settings."""


def _every(page: Callable[..., Page]) -> list[Row]:
    """All rows of a list that comes in pages."""
    rows: list[Row] = []
    while True:
        found = page(offset=len(rows), limit=MOST).rows
        rows += found
        if len(found) < MOST:
            return rows


def _best(values: Sequence[float | None]) -> list[int]:
    """The place of the largest value, as a list; empty if none is known."""
    known = [(value, -place) for place, value in enumerate(values) if value is not None and math.isfinite(value)]
    return [-max(known)[1]] if known else []


def _neighbors(numbers: Sequence[int]) -> list[tuple[int | None, int | None]]:
    """What comes before and after each number; None at the ends."""
    return list(zip([None, *numbers[:-1]], [*numbers[1:], None], strict=True)) if numbers else []


def _part(shown: int, total: int, noun: str, what: str) -> str:
    """How much of something is in the report; "" if it is everything."""
    return "" if shown >= total else f"{shown:,} of {total:,} {noun} {what}."
