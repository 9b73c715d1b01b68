"""What the pages are made from: the runs, their indexes, and the templates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastapi import HTTPException
from fastapi.responses import HTMLResponse

from gruppo.errors import RunError, UsageError
from gruppo.ui.catalog import Card, Catalog
from gruppo.ui.index import Index
from gruppo.ui.indexes import FOLLOW_SECONDS, Indexes, NotReadyError
from gruppo.ui.pages import Templates
from gruppo.ui.runs import OpenRuns

T = TypeVar("T")


@dataclass(frozen=True)
class Dashboard:
    """The parts of a dashboard over the runs below `root`."""

    root: Path
    catalog: Catalog
    runs: OpenRuns
    templates: Templates
    indexes: Indexes

    def card(self, key: str) -> Card:
        """A run. Raises HTTPException if there is no such run."""
        path = self.catalog.path(key)
        if path is None:
            raise HTTPException(404, "There is no such run in this folder. It may have been deleted or moved.")
        return self.catalog.card(key, path)

    def index(self, card: Card, part: str = "") -> Index:
        """The index of a run. Raises NotReadyError while it is being built.

        `part`: of a page, if only that is asked for; then the index has all tables that are there now, because the page
        asks again only when there are more.
        """
        return self.indexes.of(card.path, FOLLOW_SECONDS, 0.0) if part else self.indexes.of(card.path)

    def index_if_ready(self, card: Card, ask: Callable[[Index], T]) -> T | None:
        """The answer of the index; None while it is being built, or if it gives none."""
        try:
            return ask(self.indexes.of(card.path, wait=0.1))
        except (NotReadyError, UsageError, RunError):
            return None

    def page(self, name: str, **values: Any) -> HTMLResponse:
        """A rendered template."""
        return HTMLResponse(self.templates.render(name, **values))
