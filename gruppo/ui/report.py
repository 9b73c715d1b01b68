"""`gruppo report`: the pages of the dashboard as one file that opens without a network.

The file is written from run folders alone; the same folders and limits give the same bytes. It names no folder of the
machine, and the policy in it lets the browser run the scripts of this package only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from gruppo import __version__
from gruppo.errors import UsageError
from gruppo.runs.atomic import write_whole
from gruppo.runs.reading import require_own
from gruppo.runs.screen import state_of
from gruppo.runs.status import read_status
from gruppo.ui import comparing
from gruppo.ui.catalog import Card, Catalog, run_key
from gruppo.ui.compare_routes import answers_values, seeds_text
from gruppo.ui.dashboard import Dashboard
from gruppo.ui.index import Index
from gruppo.ui.indexes import Indexes, NotReadyError, default_cache
from gruppo.ui.inline import assets
from gruppo.ui.links import ReportLinks
from gruppo.ui.pages import Templates
from gruppo.ui.private import Private, every_text
from gruppo.ui.report_pages import ANSWERS, POINTS, SETS, ReportPage, RunPages, charts_of_axes
from gruppo.ui.runs import OpenRuns
from gruppo.ui.sampling import Limits
from gruppo.ui.tokens import PAGE_COMPLETIONS, PAGE_TOKENS
from gruppo.utils.progress import NullProgress, Progress

GENERATOR = "gruppo report"
SCRIPTS = ("app.js", "text.js", "tokens.js", "plotly.min.js", "charts.js", "report.js")
STYLES = ("style.css", "tokens.css")
COMPARE, ABOUT, MISSING = "/compare", "/about", "/missing"


@dataclass(frozen=True)
class Written:
    """A report that was written. `size`: in bytes. `left_out`: for each run, what it does not hold; "" for nothing."""

    path: Path
    size: int
    left_out: list[str]


def write_report(
    runs: Sequence[Path],
    out: Path,
    limits: Limits | None = None,
    *,
    force: bool = False,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write a report of one or several runs, finished or not, to the file `out`, whole or not at all.

    A file that is no report is replaced only with `force`. `cache`: where indexes are kept, by default the dashboard's.
    Raises UsageError if a folder contains no run, or `out` cannot be written there.
    """
    folders = list(dict.fromkeys(_run_folder(folder) for folder in runs))
    if not 1 <= len(folders) <= comparing.MOST:
        raise UsageError(f"{len(folders)} runs: a report holds 1 to {comparing.MOST}; choose among them")
    _check_out(out, folders, force)
    content, left_out = _content(folders, limits or Limits(), cache or default_cache(), progress or NullProgress())
    write_whole(out, content)
    return Written(out, len(content), left_out)


def _run_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise UsageError(f"{folder}: is not a folder; give a run folder, e.g. runs/quickstart")
    if not (folder / "recipe.toml").is_file() or (folder / "folder.json").is_file():
        raise UsageError(f"{folder}: contains no run; give a run folder, e.g. runs/quickstart")
    require_own(folder)
    return folder.resolve()


def _check_out(out: Path, folders: Sequence[Path], force: bool) -> None:
    if out.exists() and not out.is_file():
        raise UsageError(f"--out {out}: is a folder or a device; name a file, e.g. report.html")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}; make it first")
    if any(out.resolve().is_relative_to(folder) for folder in folders):
        raise UsageError(f"--out {out}: is inside of a run folder, which a report does not change; name another place")
    if out.exists() and not force and not _is_report(out):
        raise UsageError(f"--out {out}: exists and is no report; name another file, or replace it with --force")


def _is_report(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return f'<meta name="generator" content="{GENERATOR}"'.encode() in stream.read(4096)
    except OSError:
        return False


def _names(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: its last part, or as many as tell it apart from the others."""
    names, parts = [folder.name for folder in folders], 1
    while len(set(names)) < len(names):
        parts += 1
        names = ["/".join(folder.parts[-parts:]).lstrip("/") for folder in folders]
    return names


def _content(folders: Sequence[Path], limits: Limits, cache: Path, progress: Progress) -> tuple[bytes, list[str]]:
    """The file, and what it leaves out of each run."""
    names = _names(folders)
    private = Private(dict(zip(folders, names, strict=True)))
    keys = [run_key(name) for name in names]
    front = f"/r/{keys[0]}" if len(keys) == 1 else COMPARE
    firsts: dict[tuple[str, str], int] = {}
    known: set[str] = {COMPARE, ABOUT, MISSING}
    links, every = ReportLinks(front, known, firsts), ReportLinks(front, None, firsts)
    indexes = Indexes(cache, most=len(folders))
    templates = Templates(links, "report", lambda value: private.folders(value) if type(value) is str else value)
    state = Dashboard(folders[0].parent, Catalog(folders[0].parent), OpenRuns(len(folders)), templates, indexes)
    try:
        reports = []
        with progress.bar("Reading tokens", None, "pages") as advance:
            for folder, name, key in zip(folders, names, keys, strict=True):
                index = _index(indexes, folder, progress)
                one = RunPages(state, index, _card(folder, name, key), private, limits, every)
                firsts |= {(key, row["eval_set"]): row["step"] for row in reversed(one.evaluations)}
                one.collect(limits.megabytes / len(folders), advance)
                reports.append(one)
        pages = [page for one in reports for page in one.pages()]
        known |= {page.address for page in pages}
        if len(reports) > 1:
            pages.insert(0, _comparison(state, reports, private))
        summaries = [(one.card.folder, one.summary()) for one in reports]
        pages += [_about(summaries, limits), ReportPage(MISSING, "report/missing.html", {})]
        title = names[0] if len(names) == 1 else f"{len(names)} runs"
        document = _document(templates, pages, title, front)
    finally:
        indexes.close()
    return document.encode("utf-8", "replace"), [text for _, text in summaries]


def _index(indexes: Indexes, folder: Path, progress: Progress) -> Index:
    """The index of a run, once it is up to date."""
    with progress.bar("Reading tables", None, "tables") as advance:
        done = 0
        while True:
            try:
                return indexes.of(folder, wait=0.5)
            except NotReadyError as error:
                advance(error.done - done)
                done = error.done


def _card(folder: Path, name: str, key: str) -> Card:
    """The line of a run. Its words do not depend on the time at which the report is made."""
    card = replace(Catalog(folder.parent).card(key, folder), folder=name)
    status = read_status(folder)
    if status is None or status.state != "running":
        return card
    alive = card.state.name == "running"
    words = state_of(status, {}, now=0.0).words if alive else f"no sign of life, at step {status.step}"
    return replace(card, state=replace(card.state, words=f"{words}; last sign of life {status.heartbeat}"))


def _comparison(state: Dashboard, reports: Sequence[RunPages], private: Private) -> ReportPage:
    """The page of all runs side by side."""
    runs = comparing.opened([(one.card, state.runs.live(one.path)) for one in reports])
    charts = charts_of_axes(lambda axis: comparing.payload(runs, axis, points=POINTS))
    values: dict[str, Any] = {
        "runs": runs, "names": comparing.labels(runs), "charts": charts, "charts_stream": None, "charts_source": None,
        "band": True, "other_band": None, "without": [], "seeds": seeds_text(runs),
        "differences": every_text(comparing.recipe_table(runs), private.paths), **answers_values(state, runs, ""),
    }  # fmt: skip
    return ReportPage(COMPARE, "compare.html", values)


def _about(summaries: Sequence[tuple[str, str]], limits: Limits) -> ReportPage:
    values = {"runs": summaries, "limits": limits, "version": __version__, "answers": ANSWERS, "sets": SETS,
              "points": POINTS, "completions": PAGE_COMPLETIONS, "tokens": PAGE_TOKENS}  # fmt: skip
    return ReportPage(ABOUT, "report/about.html", values)


def _document(templates: Templates, pages: Sequence[ReportPage], title: str, front: str) -> str:
    rendered = [
        Markup(templates.render(page.template, address=page.address, note=page.note, **page.values)) for page in pages
    ]
    return templates.render(
        "report/document.html", pages=rendered, title=title, front=front, generator=GENERATOR, **assets(SCRIPTS, STYLES)
    )
