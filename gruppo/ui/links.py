"""The addresses of the dashboard's pages. Templates ask here, so the same templates serve the one-file report."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping
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


class ReportLinks(Links):
    """The addresses in a one-file report, such as "#/r/quickstart-1a2b/steps/3".

    `front`: the first page. `pages`: the names of the pages that the file has ("/r/quickstart-1a2b/steps/3"); None: not
    known yet, so that every page has an address. `firsts`: (run, set) -> the step of the evaluation that others are
    compared with unless an address names another one.
    """

    live = False

    def __init__(self, front: str, pages: Container[str] | None, firsts: Mapping[tuple[str, str], int]) -> None:
        self.front, self.pages, self.firsts = front, pages, firsts

    def runs(self, **query: Any) -> str | None:
        """The first page of the file."""
        return self._known(self.front, query)

    def compare(self, *keys: str, **query: Any) -> str | None:
        """All runs of the file side by side."""
        return self._known("/compare", query)

    def compare_data(self, *keys: str, **query: Any) -> str | None:
        """None: the curves are in the page."""
        return None

    def run(self, key: str, page: str = "", **query: Any) -> str | None:
        """See `Links.run`."""
        return self._known(f"/r/{quote(key, safe='')}" + (f"/{page}" if page else ""), query)

    def question(self, key: str, prompt_id: str, **query: Any) -> str | None:
        """See `Links.question`."""
        return self.run(key, f"questions/{_digest(prompt_id)}", **query)

    def evaluation(self, key: str, step: int, **query: Any) -> str | None:
        """See `Links.evaluation`. Another set, another evaluation before it than the first one, and one kind of
        questions are pages of their own."""
        name, before, kind = query.get("set") or "", query.get("before"), query.get("kind") or ""
        rest = (name, kind, None if before == self.firsts.get((key, name)) else before)
        return self.run(key, f"evaluations/{step}" + (f"/{_digest(repr(rest))}" if any(rest) else ""))

    def answers(self, key: str, step: int, eval_set: str, prompt_id: str) -> str | None:
        """See `Links.answers`."""
        return self.run(key, f"evaluations/{step}/answers/{_digest(repr((eval_set, prompt_id)))}")

    def file(self, key: str, name: str) -> str | None:
        """None: a report has no files of the run."""
        return None

    def data(self, key: str, name: str, **query: Any) -> str | None:
        """None: the data is in the page."""
        return None

    def static(self, name: str) -> str | None:
        """None: style sheets and scripts are in the file."""
        return None

    def _known(self, page: str, query: Mapping[str, Any]) -> str | None:
        """The address of a page, if the file has it. It has no page that is sorted or filtered in another way."""
        known = self.pages is None or page in self.pages
        return f"#{page}" if known and not any(query.values()) else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _address(path: str, query: Mapping[str, Any]) -> str:
    known = {name: value for name, value in query.items() if value is not None and value != ""}
    return path + (f"?{urlencode(known, doseq=True)}" if known else "")
