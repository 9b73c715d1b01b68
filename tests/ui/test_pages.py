"""Every page of every run can be shown, and no text of a run becomes a part of a page."""

from __future__ import annotations

import json
from urllib.parse import quote, urlsplit

import pytest

from tests.ui.attacks import ATTACKS, MARK, SURROGATE, harmless
from tests.ui.conftest import Runs
from tests.ui.visits import Page, Visitor, addresses

SCRIPTS = {f"/static/{name}.js" for name in ("app", "charts", "indexing", "runs", "text", "tokens", "plotly.min")}
ADDRESSES = (
    "/", "/?sort=name&order=asc", "/?q={attack}&state={attack}", "/compare?run={hostile}&run={twin}", "/r/{attack}",
    "/compare?run={hostile}&set={attack}", "/static/{attack}", "/r/{hostile}/files/{attack}",
    "/r/{hostile}/steps?sort={attack}", "/r/{hostile}/steps/1?text={attack}&low={attack}",
    "/r/{hostile}/steps/{attack}", "/r/{hostile}/questions?text={attack}", "/r/{hostile}/question?prompt=no{attack}",
    "/r/{hostile}/evaluations/2?set={attack}&kind={attack}",
    "/r/{hostile}/evaluations/2/answers?prompt=no{attack}",
)  # fmt: skip
CONTROLS = {"input", "select", "textarea", "button", "progress", "meter"}


def problems(page: Page) -> list[str]:
    """What must not be in a page."""
    found = [f"comment {other[:40]!r}" for other in page.others]
    for element in page.all():
        where = f"<{element.tag} {element.attributes}>"[:200]
        found += [
            f"{where}: {name}" for name in element.attributes if name.startswith("on") or name in ("srcdoc", "ping")
        ]
        if element.doubled:
            found.append(f"{where}: an attribute twice")
        is_data = element.attributes.get("type") == "application/json" and "src" not in element.attributes
        if element.tag == "script" and not is_data and element.attributes.get("src", "") not in SCRIPTS:
            found.append(f"{where}: a script")
        for name in ("href", "src", "action", "formaction", "data-src", "data-live", "data-stream"):
            parts = urlsplit(element.attributes.get(name, ""))
            if (
                parts.scheme
                or parts.netloc
                or element.attributes.get(name, "/").lstrip("\t\n /\\#?") == "" != parts.path.strip("/")
            ):
                found.append(f"{where}: leads away")
        if element.tag in {"iframe", "object", "embed", "base", "style", "img", "svg", "math", "video", "audio"}:
            found.append(f"{where}: such an element")
    return found


def defects(page: Page) -> list[str]:
    """What a whole page must have, for people who hear it or use the keyboard."""
    found = []
    if [element.attributes.get("lang") for element in page.all("html")] != ["en"]:
        found.append("no language")
    if len(page.all("title")) != 1 or not page.all("title")[0].text.strip():
        found.append("no title")
    if not any(element.attributes.get("data-view") for element in page.all()) and len(page.all("h1")) != 1:
        found.append(f"{len(page.all('h1'))} headings of the first level")
    labelled = {element.attributes.get("for") for element in page.all("label")}
    for element in page.all(*CONTROLS):
        words = element.text if element.tag == "button" else ""
        words += element.attributes.get("aria-label", "")
        words += "".join(around.text for around in element.within() if around.tag == "label")
        if (
            element.attributes.get("type") != "hidden"
            and not words.strip()
            and element.attributes.get("id") not in labelled
        ):
            found.append(f"<{element.tag} {element.attributes}> has no label")
    ids = [element.attributes["id"] for element in page.all() if "id" in element.attributes]
    if len(ids) > len(set(ids)):
        found.append("an id twice")
    return found


def of_texts(key: str, texts: list[str] | tuple[str, ...]) -> list[str]:
    """The pages of a run of `write_run`."""
    return addresses(key, (1, 2), len(texts), list(texts), list(texts), 2)


def test_every_link_of_a_real_run_leads_somewhere(runs: Runs, visitor: Visitor) -> None:
    """From its first page on, all links of a run are followed, with every order and filter that a page links to."""
    key = runs.key("seed-0")
    waiting, seen = [f"/r/{key}"], set()
    while waiting:
        address = waiting.pop()
        if address in seen:
            continue
        seen.add(address)
        answer = visitor.get(address)
        assert answer.status_code == 200, address
        if "html" in answer.headers["content-type"]:
            page = Page(answer.text)
            assert not problems(page), address
            assert "part=" in address or not defects(page), address
            waiting += [link for link in page.links() if link.startswith((f"/r/{key}", f"/api/r/{key}", "/static"))]
    assert len(seen) > 100
    for kind in ("groups/1", "answers?", "question?", "series", "files/rollouts", "before=", "plotly"):
        assert any(kind in address for address in seen), kind


def test_hostile_texts_change_nothing_in_a_page(runs: Runs, visitor: Visitor) -> None:
    """A page of a hostile run has the elements and attributes of the same page of its harmless twin, and no other."""
    pages = zip(of_texts(runs.key("hostile"), ATTACKS), of_texts(runs.key("twin"), harmless()), strict=True)
    shown = 0
    for address, other in pages:
        answer, twin = visitor.get(address), visitor.get(other)
        assert answer.status_code == twin.status_code == 200, (address, answer.text[:300])
        if "html" in answer.headers["content-type"]:
            page = Page(answer.text)
            assert not problems(page), address
            assert "part=" in address or not defects(page), address
            assert page.skeleton == Page(twin.text).skeleton, address
            shown += MARK in answer.text
    assert shown > 100


@pytest.mark.parametrize("address", ADDRESSES)
def test_hostile_addresses(address: str, runs: Runs, visitor: Visitor) -> None:
    for attack in ATTACKS[:-1] if "{attack}" in address else ("",):
        values = {"attack": attack, "hostile": runs.key("hostile"), "twin": runs.key("twin")}
        answer = visitor.get(address.format(**{name: quote(value, safe="") for name, value in values.items()}))
        assert answer.status_code in (200, 404, 422), (address, answer.status_code)
        assert not problems(Page(answer.text)), address
        assert not defects(Page(answer.text)), address


def test_every_page_of_every_other_run(runs: Runs, visitor: Visitor) -> None:
    """Damaged, partial and foreign folders, links and pipes: a page or a message, and never an error of the server."""
    wrong = []
    for name in runs.paths.keys() - {"hostile", "twin", "seed-0"}:
        for address in addresses(runs.key(name), (1, 2), 1, ["text 0", ""], ["text 1", "a"], 2):
            answer = visitor.get(address)
            wrong += [f"{name} {address}: {answer.status_code}"] * (answer.status_code not in (200, 404))
            if "html" in answer.headers["content-type"]:
                page = Page(answer.text)
                wrong += [f"{name} {address}: {problem}" for problem in problems(page)]
                wrong += [f"{name} {address}: {defect}" for defect in defects(page) if "part=" not in address]
            else:
                json.loads(answer.content)
    assert not wrong


def test_lone_surrogates_are_shown_as_something_else(runs: Runs, visitor: Visitor) -> None:
    """JSON can hold halves of characters, which no page can."""
    key = runs.key("hostile")
    for address in (f"/r/{key}", f"/r/{key}/recipe"):
        assert "\ufffd lone \ufffd pwned" in visitor.get(address).text
    for address in (f"/api/r/{key}/series", f"/api/r/{key}/steps/1/groups/0", "/api/runs"):
        assert "pwned" in json.dumps(visitor.get(address).json())
    assert SURROGATE.encode("utf-8", "replace").count(b"?") == 2
