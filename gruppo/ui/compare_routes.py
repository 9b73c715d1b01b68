"""The address of the page that compares runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Query
from fastapi.responses import HTMLResponse

from gruppo.ui import comparing, tables
from gruppo.ui.answers import side_by_side
from gruppo.ui.dashboard import Dashboard
from gruppo.ui.links import Links
from gruppo.ui.pages import Data

SHOWN = 10  # questions that are answered differently
Keys = Annotated[list[str], Query(alias="run", max_length=100)]


def add_comparison(app: FastAPI, state: Dashboard) -> None:
    """Add the address to the server."""
    links = state.templates.links

    def chosen(keys: list[str]) -> list[comparing.Compared]:
        cards = [state.card(key) for key in dict.fromkeys(keys)][: comparing.MOST]
        if not cards:
            raise HTTPException(404, "Choose runs to compare on the page of all runs.")
        return comparing.opened([(card, state.runs.live(card.path)) for card in cards])

    @app.get("/compare", response_class=HTMLResponse)
    def compare(
        keys: Keys = [],  # noqa: B006
        band: Literal["", "0", "1"] = "",
        set_: Annotated[str, Query(alias="set", max_length=200)] = "",
        first: Annotated[str, Query(max_length=100)] = "",
        second: Annotated[str, Query(max_length=100)] = "",
    ) -> HTMLResponse:
        runs = chosen(keys)
        found = [run.card.key for run in runs]
        banded = band == "1" if band else any(len(group) > 2 for group in comparing.seeds(runs))
        band = "1" if banded else "0"
        charts = comparing.payload(runs, band=banded)
        return state.page(
            "compare.html", runs=runs, names=comparing.labels(runs), charts=charts, charts_stream="/live",
            charts_source=links.compare_data(*found, band=band), band=banded,
            other_band=links.compare(*found, band="0" if banded else "1"),
            without=[links.compare(*(key for key in found if key != other), band=band) for other in found],
            seeds=seeds_text(runs), differences=comparing.recipe_table(runs),
            **answers_values(state, runs, set_, (first, second)),
        )  # fmt: skip

    @app.get("/api/compare")
    def data(
        keys: Keys = [],  # noqa: B006
        band: Literal["0", "1"] = "1",
        axis: Literal["step", "tokens", "time"] = "step",
    ) -> Data:
        return Data(comparing.payload(chosen(keys), axis, band == "1"))


def seeds_text(runs: list[comparing.Compared]) -> str:
    """Which runs are seeds of one recipe; "" if none are."""
    names = comparing.labels(runs)
    parts = [", ".join(names[number] for number in group) for group in comparing.seeds(runs) if len(group) > 1]
    return f"Seeds of one recipe: {'; '.join(parts)}." if parts else ""


def answers_values(
    state: Dashboard, runs: list[comparing.Compared], eval_set: str, keys: tuple[str, str] = ("", "")
) -> dict[str, Any]:
    """The last evaluations of two of the runs, question by question, with the paired test.

    `keys`: the two runs; see `comparing.pair`. `unread`: the key of the first run whose tables are still being read.
    """
    values: dict[str, Any] = {"pair": None, "rows": [], "unread": None, "chosen": None}
    two = comparing.pair(runs, keys)
    if two is None:
        return values
    values["chosen"] = [runs[number].card.key for number in two]
    chosen = [runs[number] for number in two]
    indexes = [state.index_if_ready(run.card, lambda index: index) for run in chosen]
    first, second = indexes
    if first is None or second is None:
        return {**values, "unread": chosen[indexes.index(None)].card.key}
    lasts = [{row["eval_set"]: row["step"] for row in index.evaluations()} for index in (first, second)]
    sets = [name for name in lasts[0] if name in lasts[1]]
    if not sets:
        return values
    name = eval_set if eval_set in sets else sets[0]
    steps = [last[name] for last in lasts]
    verdicts = [tables.questions(index, step, name) for index, step in zip((first, second), steps, strict=True)]
    counts, rows = comparing.question_changes(*verdicts)
    labels = comparing.labels(runs)
    titles = [labels[number] for number in two]
    links: Links = state.templates.links
    sides = [
        {"run": run.card.path, "step": step, "title": f"{title}, after step {step}", "share": share,
         "href": lambda prompt, key=run.card.key, step=step: links.answers(key, step, name, prompt)}
        for run, step, title, share in zip(chosen, steps, titles, ("before", "after"), strict=True)
    ]  # fmt: skip
    pair = {"titles": titles, "test": tables.paired(*verdicts), "counts": counts, "set": name, "sets": sets,
            "shown": min(len(rows), SHOWN), "total": len(rows)}  # fmt: skip
    return {**values, "pair": pair, "rows": side_by_side(rows[:SHOWN], sides, name)}
