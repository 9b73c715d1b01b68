"""Visits to pages of the dashboard, and what is in them: elements, attributes, links, data."""

from __future__ import annotations

import html
import json
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any
from urllib.parse import quote

import httpx2
from fastapi.testclient import TestClient

HOST = "127.0.0.1:8642"
PATIENCE = 60.0  # seconds for the index of a small run
VOID = {"meta", "link", "input", "img", "br", "hr", "base"}


class Element:
    """An element of a page. `text`: all text in it."""

    def __init__(self, tag: str, attributes: list[tuple[str, str | None]], parent: Element | None) -> None:
        self.tag, self.parent, self.children = tag, parent, []  # type: ignore[var-annotated]
        self.attributes = {name: value or "" for name, value in attributes}
        self.text = ""
        self.doubled = len(attributes) > len(self.attributes)

    def __iter__(self) -> Iterator[Element]:
        yield self
        for child in self.children:
            yield from child

    def within(self) -> Iterator[Element]:
        """The element, and those around it."""
        around: Element | None = self
        while around is not None:
            yield around
            around = around.parent


class Page(HTMLParser):
    """A parsed page. `skeleton`: tags and names of attributes in order, without any text or value."""

    def __init__(self, content: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = self.here = Element("", [], None)
        self.skeleton: list[str] = []
        self.others: list[str] = []  # comments, declarations, processing instructions
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.skeleton.append(" ".join((tag, *(name for name, _ in attrs))))
        element = Element(tag, attrs, self.here)
        self.here.children.append(element)
        if tag not in VOID:
            self.here = element

    def handle_endtag(self, tag: str) -> None:
        self.skeleton.append("/" + tag)
        assert self.here.tag == tag, f"</{tag}> closes <{self.here.tag}>: {html.escape(self.here.text[:80])}"
        self.here = self.here.parent or self.root

    def handle_data(self, data: str) -> None:
        for element in self.here.within():
            element.text += data

    def handle_comment(self, data: str) -> None:
        self.others.append(data)

    handle_pi = unknown_decl = handle_comment

    def all(self, *tags: str) -> list[Element]:
        """The elements with these tags, all if there are none."""
        return [element for element in self.root if element.tag and (not tags or element.tag in tags)]

    def data(self) -> list[Any]:
        """The blocks of data."""
        return [json.loads(script.text) for script in self.all("script") if script.attributes.get("type")]

    def links(self) -> list[str]:
        """Every address in the page that the page or its reader can follow."""
        names = ("href", "src", "action", "data-src", "data-live", "data-indexing")
        found = [element.attributes[name] for element in self.all() for name in names if name in element.attributes]
        return [address for address in dict.fromkeys(found) if not address.startswith("#")]


class Visitor:
    """Visits the dashboard, and waits for the index of a run."""

    def __init__(self, client: TestClient) -> None:
        self.client = client

    def get(self, address: str) -> httpx2.Response:
        """The answer to a request, once the index that it needs is there."""
        end = time.monotonic() + PATIENCE
        while True:
            answer = self.client.get(address)
            waits = answer.status_code == 503 or (answer.status_code == 200 and "data-indexing=" in answer.text)
            if not waits:
                return answer
            assert time.monotonic() < end, f"{address}: the index is not ready"
            time.sleep(0.01)

    def page(self, address: str, status: int | None = 200) -> Page:
        """A page. `status`: what the answer must have."""
        answer = self.get(address)
        assert status is None or answer.status_code == status, f"{address}: {answer.status_code} {answer.text[:300]}"
        return Page(answer.text)


def addresses(
    key: str, steps: tuple[int, ...], groups: int, sets: list[str], prompts: list[str], last: int
) -> list[str]:
    """Addresses of every kind of page and data of a run."""
    base, api = f"/r/{key}", f"/api/r/{key}"
    found = [base, f"{base}?part=head", f"{base}?part=events", f"{base}/recipe"]
    found += [
        f"{base}/{name}" for name in ("steps", "steps?part=table", "questions", "evaluations", "evaluations?part=table")
    ]
    found += [f"{api}/index", *(f"{api}/series?axis={axis}" for axis in ("step", "tokens", "time"))]
    for step in steps:
        found.append(f"{base}/steps/{step}")
        found += [f"{where}/steps/{step}/groups/{group}" for group in range(groups) for where in (base, api)]
    found += [f"{base}/question?prompt={quote(prompt, safe='')}" for prompt in prompts]
    for name in sets:
        found.append(f"{base}/evaluations/{last}?set={quote(name, safe='')}")
        found += [
            f"{base}/evaluations/{last}/answers?set={quote(name, safe='')}&prompt={quote(prompt, safe='')}"
            for prompt in (prompts if name == sets[0] else [name])
        ]
    return found
