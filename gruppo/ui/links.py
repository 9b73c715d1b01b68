"""The addresses of the dashboard's pages. Templates ask here, so the same templates serve the one-file report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode


class Links:
    """The addresses on the server. A method returns None if there is no such page, as in a report; then templates show
    text without a link."""

    live = True  # whether pages follow the run

    def runs(self, **query: Any) -> str | None:
        """The list of runs."""
        return _address("/", query)

    def compare(self, *keys: str, **query: Any) -> str | None:
        """Several runs side by side."""
        return _address("/compare", {"run": list(keys), **query})

    def compare_data(self, *keys: str, **query: Any) -> str | None:
        """The curves of several runs."""
        return _address("/api/compare", {"run": list(keys), **query})

    def run(self, key: str, page: str = "", **query: Any) -> str | None:
        """A run, or one of its pages: "steps", "questions", "evaluations", "recipe"."""
        return _address(f"/r/{quote(key, safe='')}" + (f"/{page}" if page else ""), query)

    def step(self, key: str, step: int, **query: Any) -> str | None:
        """The groups of a step."""
        return self.run(key, f"steps/{step}", **query)

    def group(self, key: str, step: int, group: int, completion: int | None = None) -> str | None:
        """A group, token by token."""
        address = self.run(key, f"steps/{step}/groups/{group}")
        return address if completion is None or address is None else f"{address}#c{completion}"

    def question(self, key: str, prompt_id: str, **query: Any) -> str | None:
        """A prompt through time."""
        return self.run(key, "question", prompt=prompt_id, **query)

    def evaluation(self, key: str, step: int, **query: Any) -> str | None:
        """The answers of one evaluation."""
        return self.run(key, f"evaluations/{step}", **query)

    def answers(self, key: str, step: int, eval_set: str, prompt_id: str) -> str | None:
        """The answers to one question of an evaluation, token by token."""
        return self.run(key, f"evaluations/{step}/answers", set=eval_set, prompt=prompt_id)

    def file(self, key: str, name: str) -> str | None:
        """A file of the run folder, to download."""
        return self.run(key, f"files/{quote(name)}")

    def data(self, key: str, name: str, **query: Any) -> str | None:
        """Data that a page fetches while it is open."""
        return _address(f"/api/r/{quote(key, safe='')}/{name}", query)

    def static(self, name: str) -> str | None:
        """A style sheet or a script."""
        return f"/static/{name}"


def _address(path: str, query: Mapping[str, Any]) -> str:
    known = {name: value for name, value in query.items() if value is not None and value != ""}
    return path + (f"?{urlencode(known, doseq=True)}" if known else "")
