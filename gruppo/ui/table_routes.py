"""The addresses of pages about steps, groups, questions and evaluations."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query
from fastapi.responses import HTMLResponse

from gruppo.ui import tables
from gruppo.ui.answers import side_by_side
from gruppo.ui.catalog import Card
from gruppo.ui.dashboard import Dashboard
from gruppo.ui.pages import Data
from gruppo.ui.queries import Filters
from gruppo.ui.tokens import answers_data, group_data

Order = Literal["asc", "desc"]
Offset = Annotated[int, Query(ge=0, le=2**40)]
Step = Annotated[int, Query(ge=0, le=10**17)]
Text = Annotated[str, Query(max_length=20_000)]
Switch = Literal["", "0", "1"]


def add_tables(app: FastAPI, state: Dashboard) -> None:
    """Add the addresses to the server."""
    _add_steps(app, state)
    _add_questions(app, state)
    _add_evaluations(app, state)

    @app.get("/api/r/{key}/index")
    def index(key: str) -> Data:
        ready, done, total = state.indexes.progress(state.card(key).path)
        return Data({"ready": ready, "done": done, "total": total})


def _add_steps(app: FastAPI, state: Dashboard) -> None:
    links = state.templates.links

    @app.get("/r/{key}/steps", response_class=HTMLResponse)
    def steps(key: str, sort: str = "step", order: Order = "desc", offset: Offset = 0, part: str = "") -> HTMLResponse:
        card = state.card(key)
        view = tables.View(sort, order == "desc", offset, lambda **query: links.run(key, "steps", **query), {})
        name = "_steps_table.html" if part == "table" else "steps.html"
        return state.page(name, tab="steps", card=card, **tables.steps_values(state.index(card, part), view))

    @app.get("/r/{key}/steps/{step}", response_class=HTMLResponse)
    def groups(
        key: str, step: int, sort: str = "group", order: Order = "asc", offset: Offset = 0, text: Text = "",
        nonzero: Switch = "", truncated: Switch = "", excluded: Switch = "", skipped: Switch = "",
        low: str = "", high: str = "",
    ) -> HTMLResponse:  # fmt: skip
        card = state.card(key)
        values = {"text": text, "nonzero": nonzero, "truncated": truncated, "excluded": excluded, "skipped": skipped,
                  "low": low, "high": high}  # fmt: skip
        filters = Filters(
            _switch(skipped), _switch(truncated), _switch(excluded), _switch(nonzero), text, _bound(low), _bound(high)
        )
        view = tables.View(sort, order == "desc", offset, lambda **query: links.step(key, step, **query), values)
        found = tables.step_values(state.index(card), step, view, filters)
        return state.page("step.html", tab="steps", card=card, **found)

    @app.get("/r/{key}/steps/{step}/groups/{group}", response_class=HTMLResponse)
    def group(key: str, step: int, group: int, offset: Offset = 0) -> HTMLResponse:
        card = state.card(key)
        return state.page("group.html", tab="steps", card=card, **group_values(state, card, step, group, offset))

    @app.get("/api/r/{key}/steps/{step}/groups/{group}")
    def group_json(key: str, step: int, group: int, offset: Offset = 0) -> Data:
        return Data(group_data(state.card(key).path, step, group, offset))


def group_values(state: Dashboard, card: Card, step: int, group: int, offset: int = 0) -> dict[str, Any]:
    """What the page of a group shows. It needs no index, but has neighbours and a question only with one."""
    data = group_data(card.path, step, group, offset)
    row = state.index_if_ready(card, lambda index: index.group(step, group)) or {}
    links = state.templates.links
    base = links.group(card.key, step, group)
    return {
        "step": step, "group": group, "data": data, "prompt_id": row.get("prompt_id"),
        "around": {"previous": row.get("previous"), "next": row.get("next")},
        "page_address": lambda at: None if base is None or not links.live else f"{base}?offset={at}",
    }  # fmt: skip


def _add_questions(app: FastAPI, state: Dashboard) -> None:
    links = state.templates.links

    @app.get("/r/{key}/questions", response_class=HTMLResponse)
    def questions(
        key: str, text: Text = "", sort: str = "draws", order: Order = "desc", offset: Offset = 0
    ) -> HTMLResponse:
        card = state.card(key)
        view = tables.View(
            sort, order == "desc", offset, lambda **query: links.run(key, "questions", **query), {"text": text}
        )
        found = tables.questions_values(state.index(card), text, view)
        return state.page("questions.html", tab="questions", card=card, **found)

    @app.get("/r/{key}/question", response_class=HTMLResponse)
    def question(key: str, prompt: Text, order: Order = "asc", offset: Offset = 0) -> HTMLResponse:
        card = state.card(key)
        view = tables.View(
            "", order == "desc", offset, lambda **query: links.question(key, prompt, **query), {}, tables.MOMENTS
        )
        found = tables.question_values(state.index(card), card, prompt, view)
        return state.page("question.html", tab="questions", card=card, **found)


def _add_evaluations(app: FastAPI, state: Dashboard) -> None:
    links = state.templates.links

    @app.get("/r/{key}/evaluations", response_class=HTMLResponse)
    def evaluations(key: str, part: str = "") -> HTMLResponse:
        card = state.card(key)
        found = tables.evaluations_values(state.index(card, part), card, state.runs.live(card.path))
        charts = {"axis": "samples", "axes": {"samples": "answers per question (k)"}, "points": 800, "events": [],
                  "charts": found.pop("answer_curves")}  # fmt: skip
        return state.page(
            "_evaluations_table.html" if part == "table" else "evaluations.html", tab="evaluations", card=card,
            charts=charts if charts["charts"] else None, charts_source=None, charts_stream=None, **found,
        )  # fmt: skip

    @app.get("/r/{key}/evaluations/{step}", response_class=HTMLResponse)
    def evaluation(
        key: str, step: int, set_: Annotated[Text, Query(alias="set")] = "", before: Step | None = None,
        kind: str = "", offset: Offset = 0,
    ) -> HTMLResponse:  # fmt: skip
        card = state.card(key)
        values = {"set": set_, "before": before, "kind": kind}
        view = tables.View("", False, offset, lambda **query: links.evaluation(key, step, **query), values, limit=20)
        found = tables.evaluation_values(state.index(card), step, before, set_, kind, view)
        sides = [
            {"run": card.path, "step": moment, "title": f"after step {moment}", "share": share,
             "href": lambda prompt, moment=moment: links.answers(key, moment, set_, prompt)}
            for moment, share in ((found["before"], "before"), (step, "after"))
        ]  # fmt: skip
        found["rows"] = side_by_side(found["rows"], sides, set_)
        return state.page("evaluation.html", tab="evaluations", card=card, **found)

    @app.get("/r/{key}/evaluations/{step}/answers", response_class=HTMLResponse)
    def answers(
        key: str, step: int, prompt: Text, set_: Annotated[Text, Query(alias="set")] = "", offset: Offset = 0
    ) -> HTMLResponse:
        card = state.card(key)
        data = answers_data(card.path, step, set_, prompt, offset)
        base = links.answers(key, step, set_, prompt)
        return state.page(
            "answers.html", tab="evaluations", card=card, step=step, eval_set=set_, prompt_id=prompt, data=data,
            page_address=lambda at: None if base is None or not links.live else f"{base}&offset={at}",
        )  # fmt: skip


def _switch(value: Switch) -> bool | None:
    return None if value == "" else value == "1"


def _bound(text: str) -> float | None:
    """A number of a form; None if the field is empty, or holds something else."""
    try:
        return float(text) if text else None
    except ValueError:
        return None
