"""The server of the dashboard. Every address is read-only; runs are named by keys, never by paths."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exception_handlers import request_validation_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import Response

from gruppo.errors import RunError, UsageError
from gruppo.runs.missing import STEP, missing_parts
from gruppo.runs.reading import reading
from gruppo.ui import details
from gruppo.ui.advice import advice_for
from gruppo.ui.catalog import Card, Catalog, foreign_entries
from gruppo.ui.charts import payload
from gruppo.ui.cluster import cluster_tile
from gruppo.ui.compare_routes import add_comparison
from gruppo.ui.dashboard import Dashboard
from gruppo.ui.indexes import Indexes, NotReadyError, default_cache
from gruppo.ui.links import Links
from gruppo.ui.live import LiveRun
from gruppo.ui.pages import Data, Templates
from gruppo.ui.runs import OpenRuns
from gruppo.ui.security import HEADERS, Guard
from gruppo.ui.table_routes import add_tables

POLL_SECONDS = 2.0  # how often a page that follows a run looks for changes
ALIVE_SECONDS = 15.0  # a stream says something at least this often, so that a run without sign of life is noticed
EVENTS = 200  # on a run's page
STATES = ("running", "done", "stopped", "interrupted", "failed", "silent", "unfinished")
_PROBLEM = {
    "text/html": {"schema": {"type": "string"}},
    "application/json": {"schema": {"type": "object", "required": ["detail"], "properties": {"detail": {}}}},
}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    404: {"description": "There is no such run, step, group, question or file, or it is damaged.", "content": _PROBLEM},
    422: {"description": "A parameter is not valid.", "content": _PROBLEM},
    503: {"description": "The tables of the run are still being read.", "content": _PROBLEM},
}
_STATIC = Path(__file__).parent / "static"
_KINDS = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class Sorting:
    """How a list is sorted and filtered, and the address of the same list with other settings."""

    q: str
    state: str
    sort: str
    descending: bool
    base: Callable[..., str | None]

    def address(self, **changed: Any) -> str | None:
        """The same list, with some settings changed."""
        order = "desc" if self.descending else "asc"
        return self.base(**{"q": self.q, "state": self.state, "sort": self.sort, "order": order, **changed})


_SORTS: dict[str, Callable[[Card], Any]] = {
    "name": lambda card: card.name.lower(),
    "state": lambda card: card.state.name,
    "method": lambda card: card.method,
    "model": lambda card: (card.model, card.task),
    "step": lambda card: card.step,
    "left": lambda card: card.left,
    "reward": lambda card: card.reward,
    "accuracy": lambda card: card.accuracy,
}


def create_app(root: Path, token: str | None = None, host: str = "127.0.0.1", cache: Path | None = None) -> FastAPI:
    """The dashboard over the runs in and below `root`.

    `token`: see `Guard`; None for none. `host`: the address that it is served at. `cache`: where indexes are kept, by
    default `default_cache()`.
    """
    catalog = Catalog(root)
    state = Dashboard(root, catalog, OpenRuns(), Templates(Links()), Indexes(cache or default_cache()))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        state.indexes.close()

    app = FastAPI(
        title="gruppo", docs_url=None, redoc_url=None, openapi_url="/api/openapi.json", lifespan=lifespan,
        responses=_PROBLEMS,
    )  # fmt: skip
    app.state.is_stopping = lambda: False  # a server that stops waits for streams, which ask this
    app.add_middleware(Guard, host=host, token=token)
    _add_pages(app, state)
    _add_data(app, state)
    add_tables(app, state)
    add_comparison(app, state)
    _add_errors(app, state)
    return app


def _add_pages(app: FastAPI, state: Dashboard) -> None:
    @app.get("/", response_class=HTMLResponse)
    def runs(
        q: str = "", state_: str = Query("", alias="state"), sort: str = "", order: str = "desc", part: str = ""
    ) -> HTMLResponse:
        cards = state.catalog.cards()
        query = Sorting(q, state_, sort if sort in _SORTS else "", order != "asc", state.templates.links.runs)
        chosen = _sorted([card for card in cards if _matches(card, query)], query)
        values = {"cards": chosen, "names": own_names(cards), "total": len(cards), "query": query, "states": STATES,
                  "root": str(state.root), "counts": _counts(cards, chosen)}  # fmt: skip
        return state.page("_runs_table.html" if part == "table" else "runs.html", **values)

    @app.get("/r/{key}", response_class=HTMLResponse)
    def run(key: str, part: str = "") -> HTMLResponse:
        card = state.card(key)
        if part == "head":
            return state.page("_run_head.html", **head_values(state, card))
        if part == "events":
            return state.page("_events.html", **events_values(state, card))
        live = state.runs.live(card.path)
        return state.page(
            "run.html", tab="", charts=payload(live), charts_source=state.templates.links.data(key, "series"),
            charts_stream=state.templates.links.data(key, "live"), commands=details.commands(card, card.step),
            **{**head_values(state, card), **events_values(state, card)},
        )  # fmt: skip

    @app.get("/r/{key}/recipe", response_class=HTMLResponse)
    def recipe(key: str) -> HTMLResponse:
        card = state.card(key)
        return state.page("recipe.html", tab="recipe", card=card, **recipe_values(card))

    @app.get("/r/{key}/files/{name:path}", response_class=FileResponse)
    def file(key: str, name: str) -> FileResponse:
        found = details.file(state.card(key).path, name)
        if found is None:
            raise HTTPException(404, f"{name[:200]} is not a file of this run that can be downloaded.")
        return FileResponse(found, media_type="application/octet-stream", filename=name.replace("/", "-"))

    @app.get("/static/{name}", response_class=FileResponse)
    def static(name: str) -> FileResponse:
        path = static_file(name)
        if path is None:
            raise HTTPException(404, "There is no such file.")
        return FileResponse(path, media_type=_KINDS[path.suffix], headers={"cache-control": "no-cache"})


def _add_data(app: FastAPI, state: Dashboard) -> None:
    @app.get("/api/runs")
    def runs() -> Data:
        return Data([card.values() for card in state.catalog.cards()])

    @app.get("/api/r/{key}/series")
    def series(
        key: str,
        axis: Literal["step", "tokens", "time"] = "step",
        first: int | None = Query(None, ge=-(2**53), le=2**53),
        last: int | None = Query(None, ge=-(2**53), le=2**53),
        points: int = Query(800, ge=10, le=20_000),
        since: int | None = Query(None, ge=-(2**53), le=2**53),
        generation: int = -1,
    ) -> Data:
        live = state.runs.live(state.card(key).path)
        known = since if generation == live.generation and first is None and last is None else None
        return Data(payload(live, axis, first, last, points, known))

    @app.get("/api/r/{key}/live")
    async def live(key: str, request: Request) -> StreamingResponse:
        card = await asyncio.to_thread(state.card, key)

        def seen() -> dict[str, Any]:
            now = state.catalog.card(key, card.path)
            return {
                "revision": state.runs.live(card.path).revision,
                "state": now.state.name,
                "words": now.state.words,
            }

        return _stream(request, seen)

    @app.get("/live")
    async def list_live(request: Request) -> StreamingResponse:
        def seen() -> dict[str, Any]:
            cards = state.catalog.cards()
            return {"revision": [[card.key, card.state.name, card.step, card.accuracy, card.warning] for card in cards]}

        return _stream(request, seen)


def _stream(request: Request, seen: Callable[[], Any]) -> StreamingResponse:
    """Server-sent events: what `seen` returns, whenever it changes."""

    async def events() -> AsyncIterator[str]:
        last, said = None, 0.0
        while not (request.app.state.is_stopping() or await request.is_disconnected()):
            text = json.dumps(await asyncio.to_thread(seen), separators=(",", ":"))
            if text != last:
                last, said = text, time.monotonic()
                yield f"data: {text}\n\n"
            elif time.monotonic() - said > ALIVE_SECONDS:
                said = time.monotonic()
                yield ": still here\n\n"
            await asyncio.sleep(POLL_SECONDS)

    return StreamingResponse(events(), media_type="text/event-stream")


def _add_errors(app: FastAPI, state: Dashboard) -> None:
    def answer(request: Request, code: int, message: str) -> HTMLResponse | Data:
        if request.url.path.startswith("/api/"):
            return Data({"detail": message}, code)
        title = {404: "Not found", 422: "Not a valid address"}.get(code, "This page cannot be shown")
        return HTMLResponse(state.templates.render("message.html", title=title, message=message), code)

    @app.exception_handler(StarletteHTTPException)
    def http(request: Request, error: StarletteHTTPException) -> HTMLResponse | Data:
        return answer(request, error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        if request.url.path.startswith("/api/"):
            return await request_validation_exception_handler(request, error)
        return answer(request, 422, "; ".join(f"{found['loc'][-1]}: {found['msg']}" for found in error.errors()))

    @app.exception_handler(Exception)  # outside of Guard, which sets these headers otherwise
    def failed(request: Request, error: Exception) -> Response:
        response = answer(request, 500, "An error of gruppo, which is printed where the dashboard was started.")
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(NotReadyError)
    def indexing(request: Request, error: NotReadyError) -> HTMLResponse | Data:
        if request.url.path.startswith("/api/"):
            return Data({"detail": "The tables of this run are still being read."}, 503)
        card = state.card(request.path_params["key"])
        return state.page("indexing.html", tab="", card=card, done=error.done, total=error.total)

    @app.exception_handler(UsageError)
    @app.exception_handler(RunError)
    def damaged(request: Request, error: UsageError | RunError) -> HTMLResponse | Data:
        return answer(request, 404, str(error))


def head_values(state: Dashboard, card: Card) -> dict[str, Any]:
    """What the top of a run's page shows."""
    live = state.runs.live(card.path)
    return {
        "card": card,
        "last": details.last_values(live),
        "cluster": cluster_tile(card, live),
        "problems": _problems(card, live),
    }


def _problems(card: Card, live: LiveRun) -> list[str]:
    try:
        problems = [
            f"{name}: is a link, or neither a file nor a folder; it is not read" for name in foreign_entries(card.path)
        ]
        if card.state.name != "running" and not problems:
            with reading(card.path, "restore it from a copy"):
                problems = missing_parts(
                    card.path, live.lines_with(lambda name: name == STEP or name.startswith("eval/"))
                )
    except UsageError as error:
        problems = [str(error)]
    if live.damaged:
        problems.append(f"{live.damaged} lines of metrics.jsonl and events.jsonl are damaged and left out.")
    return [*([card.problem] if card.problem else []), *problems]


def events_values(state: Dashboard, card: Card) -> dict[str, Any]:
    """What a run's page shows of its events."""
    events = state.runs.live(card.path).events
    kept = [{**event, "advice": advice_for(event)} for event in reversed(events[-EVENTS:])]
    return {"card": card, "events": kept, "hidden_events": len(events) - len(kept)}


def recipe_values(card: Card, named: str | None = None) -> dict[str, Any]:
    """What the page of the recipe shows. `named`: how commands call the run, by default by its path."""
    problem, changed = card.problem, None
    try:
        changed = details.changed_fields(card.path)
    except UsageError as error:
        problem = problem or str(error)
    try:
        text = (card.path / "recipe.toml").read_text(encoding="utf-8", errors="replace")[:200_000]
    except OSError:
        text = ""
    return {
        "recipe_problem": problem,
        "differences": changed,
        "recipe_text": text,
        "machine": details.machine(card.path),
        "files": [(name, path.stat().st_size) for name, path in details.files(card.path).items()],
        "commands": details.commands(card, card.step, named),
    }


def static_file(name: str) -> Path | None:
    """A style sheet, script or picture of the package; None for another name. plotly's script is in its own package."""
    if name == "plotly.min.js":
        return Path(str(package_files("plotly"))) / "package_data" / name
    known = {path.name: path for path in _STATIC.iterdir() if path.suffix in _KINDS}
    return known.get(name)


def _matches(card: Card, query: Sorting) -> bool:
    text = " ".join((card.name, card.folder, card.method, card.model, card.task)).lower()
    return all(word in text for word in query.q.lower().split()) and query.state in ("", card.state.name)


def _sorted(cards: Iterable[Card], query: Sorting) -> list[Card]:
    cards = list(cards)
    if not query.sort:
        return cards
    key = _SORTS[query.sort]
    known = sorted((card for card in cards if key(card) is not None), key=key, reverse=query.descending)
    return known + [card for card in cards if key(card) is None]


def own_names(cards: Iterable[Card]) -> dict[str, str]:
    """The name to show for each run, by key: its folder if another run has the same name, else ""."""
    cards = list(cards)
    counts = Counter(card.name for card in cards)
    return {card.key: card.folder if counts[card.name] > 1 else "" for card in cards}


def _counts(cards: list[Card], chosen: list[Card]) -> str:
    states: Mapping[str, int] = {name: sum(card.state.name == name for card in chosen) for name in STATES}
    parts = [
        f"{count} {'without sign of life' if name == 'silent' else name}" for name, count in states.items() if count
    ]
    shown = f"{len(chosen)} of {len(cards)} runs" if len(chosen) < len(cards) else f"{len(cards)} runs"
    shown = shown.replace("1 runs", "1 run") if len(cards) == 1 else shown
    return f"{shown}: {', '.join(parts)}" if parts else shown
