"""The dashboard in Debian's chromium: what a person sees and does by mouse and keyboard, light and dark, on a phone."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow.parquet as pq
import pytest
import uvicorn

from gruppo.ui.app import create_app
from gruppo.ui.report import write_report
from gruppo.ui.server import bound_socket
from tests.ui.attacks import ATTACKS
from tests.ui.conftest import Runs
from tests.ui.replay import Replay
from tests.ui.visits import addresses

if os.environ.get("CI"):
    pytest.skip("no browser in CI", allow_module_level=True)
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("there is no chromium; apt-get install chromium, and these tests run", allow_module_level=True)

from axe_playwright_python.sync_playwright import Axe  # noqa: E402
from playwright.sync_api import Browser, Page, expect, sync_playwright  # noqa: E402

OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-quic"]
TIMEOUT = 30_000  # milliseconds that a condition may take on a busy machine
REWARD = """document.querySelector('[data-chart=reward] .plot, [data-chart="reward/mean"] .plot')"""
POINTS = f"{REWARD}?.data?.findLast(curve => curve.name && curve.name !== 'events')?.x.length"
NAMES = f"{REWARD}?.data?.filter(curve => curve.name).map(curve => curve.name)"
ZOOM = f"{REWARD}.layout.xaxis.range.map(Number)"
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield opened
        opened.close()


@contextmanager
def serving(root: Path, cache: Path) -> Iterator[str]:
    """The address of a server over the runs in a folder."""
    with bound_socket("127.0.0.1", 0) as listening:
        config = uvicorn.Config(create_app(root, cache=cache), log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


@pytest.fixture(scope="module")
def address(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server over all kinds of runs."""
    with serving(runs.root, tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """A new page of a new visitor: open_page(address, **options). At the end: it reported no error, whether of a script
    or of the policy, showed no dialog, and asked no other host."""
    wrong: list[str] = []
    contexts = []

    def opened(address: str, **options: Any) -> Page:
        context = browser.new_context(**options)
        context.set_default_timeout(TIMEOUT)
        contexts.append(context)
        page = context.new_page()
        host = urlsplit(address).netloc
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda request: wrong.append(request.url) if is_foreign(request.url, host) else None)
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not wrong


def is_foreign(address: str, host: str) -> bool:
    """Whether a request goes to another host; one to data in the page goes to none."""
    return urlsplit(address).netloc not in (host, "")


def ready(page: Page, address: str) -> None:
    """Open an address, and wait until the tables are read, and curves and tokens are drawn."""
    page.goto(address)
    page.wait_for_function(
        """() => !document.querySelector("[data-indexing]")
            && [...document.querySelectorAll(".charts-section")].every(section => section.querySelector(".plot"))
            && [...document.querySelectorAll("[data-view=tokens]")].every(
                view => view.querySelector("[data-t], .rendered"))"""
    )


def test_a_growing_run_is_followed_without_a_reload(real_runs: Runs, tmp_path: Path, open_page: Open) -> None:
    """Curves, figures, events and tables follow; the zoom stays; a resumed run, which is cut back, is followed too."""
    (tmp_path / "runs").mkdir()
    replay = Replay(real_runs.paths["seed-0"], tmp_path / "runs/grows")
    replay.grow(3)
    with serving(tmp_path / "runs", tmp_path / "cache") as address:
        follow(open_page(address), replay)


def follow(page: Page, replay: Replay) -> None:
    """What `test_a_growing_run_is_followed_without_a_reload` does."""
    page.get_by_role("link", name="tiny-0").click()
    page.wait_for_function(f"() => {POINTS} === 3")
    page.evaluate("window.isTheSamePage = true")
    expect(page.get_by_text("None so far.")).to_be_visible()

    plot = page.locator("[data-chart=reward] .nsewdrag")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box is not None
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.2, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.7, y, steps=4)
    page.mouse.up()
    page.wait_for_function(f"() => {REWARD}.layout.xaxis.autorange === false")
    zoomed = page.evaluate(ZOOM)
    assert 1 < zoomed[0] < zoomed[1] < 3

    replay.grow(4)
    replay.warn("kl_explodes", "the policy is far from the reference")
    page.wait_for_function(f"() => {POINTS} === 7")
    assert page.evaluate(ZOOM) == zoomed
    expect(page.get_by_text("the policy is far from the reference").first).to_be_visible()
    expect(page.get_by_text("Lower optimizer.learning_rate").first).to_be_visible()
    expect(page.locator(".figures").first).to_contain_text("7/100")

    replay.cut_back(2)
    page.wait_for_function(f"() => {POINTS} === 2")
    replay.grow(3)
    page.wait_for_function(f"() => {POINTS} === 5")
    assert page.evaluate(ZOOM) == zoomed
    page.get_by_role("button", name="Reset zoom").click()
    page.wait_for_function(f"() => {ZOOM}[0] < 1.01")
    assert page.evaluate("window.isTheSamePage")

    page.get_by_role("link", name="Steps", exact=True).click()
    expect(page.get_by_role("link", name="step 5")).to_be_visible()
    page.evaluate("window.isTheSamePage = true")
    replay.grow()
    expect(page.get_by_role("link", name="step 6")).to_be_visible()
    replay.cut_back(4)
    expect(page.get_by_role("link", name="step 5")).to_have_count(0)
    expect(page.get_by_role("link", name="step 4")).to_be_visible()
    assert page.evaluate("window.isTheSamePage")
    page.context.close()


def test_a_group_token_by_token(runs: Runs, address: str, open_page: Open) -> None:
    """From the list of runs to a token: its advantage is read with the mouse, and with the keyboard alone."""
    table = pq.read_table(runs.paths["seed-0"] / "rollouts/step-000002.parquet").to_pylist()
    row = next(row for row in table if row["group"] == 1 and row["advantages"] and row["advantages"][0])
    page = open_page(address)
    page.get_by_role("link", name="tiny-0").click()
    page.get_by_role("link", name="Steps", exact=True).click()
    page.get_by_role("link", name="step 2").click()
    page.get_by_role("link", name="group 1").click()
    completion = page.locator(f"#c{row['completion']}")
    tokens = completion.locator("[data-t]")
    expect(tokens).to_have_count(len(row["token_ids"]))
    assert [token.text_content() for token in tokens.all()] == row["token_texts"]

    panel = page.get_by_role("complementary", name="Numbers of a token")
    tokens.first.hover()
    advantage = panel.get_by_role("row", name="advantage").get_by_role("cell")
    assert float(str(advantage.text_content()).replace("−", "-")) == pytest.approx(row["advantages"][0], rel=1e-6)
    expect(panel).to_contain_text(f"token 1 of {len(row['token_ids'])}, id {row['token_ids'][0]}")

    page.mouse.move(0, 0)
    tokens.first.focus()
    status = page.get_by_role("status")
    for place in (1, 2):
        page.keyboard.press("ArrowRight")
        expect(tokens.nth(place)).to_be_focused()
        expect(panel).to_contain_text(f"token {place + 1} of")
        expect(status).to_contain_text(f"Token {place + 1} of {len(row['token_ids'])}")
    page.keyboard.press("End")
    expect(tokens.last).to_be_focused()
    page.keyboard.press("Home")
    expect(tokens.first).to_be_focused()
    page.keyboard.press("Escape")
    expect(panel).to_contain_text("Point at a token")

    page.locator(".controls").get_by_label("Color").select_option("sampling_logprob")
    tokens.first.hover()
    expect(panel.locator("tr.chosen")).to_contain_text("log-probability, engine")
    page.get_by_role("button", name="Rendered").click()
    expect(tokens).to_have_count(0)
    page.get_by_role("link", name="This question through time").click()
    expect(page.get_by_role("heading", name="A question through time")).to_be_visible()


def test_the_keyboard_reaches_everything(runs: Runs, address: str, open_page: Open) -> None:
    """The first stop leads to the content; every stop shows that it has the focus."""
    page = open_page(f"{address}/r/{runs.key('seed-0')}")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()
    names = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        names.add(page.evaluate("document.activeElement.textContent.trim() || document.activeElement.dataset.control"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert {"Overview", "Steps", "smoothing", "logarithmic", "Reset zoom"} <= names


def test_two_runs_are_compared(address: str, open_page: Open) -> None:
    page = open_page(address)
    button = page.get_by_role("button", name="Tick runs to compare")
    expect(button).to_be_disabled()
    for name in ("seed-0", "seed-1"):
        page.get_by_role("checkbox", name=f"Compare {name}").check()
    page.get_by_role("button", name="Compare 2 runs").click()
    expect(page.get_by_role("heading", name="Comparing 2 runs")).to_be_visible()
    page.wait_for_function(f"() => {NAMES}?.length === 2")
    assert sorted(page.evaluate(NAMES)) == ["tiny-0", "tiny-1"]
    page.get_by_role("link", name="Show seeds as one band").click()
    page.wait_for_function(f"() => {NAMES}?.length === 1")
    assert page.evaluate(NAMES)[0].endswith(" (2 seeds)")
    expect(page.get_by_text("the band goes from the lowest to the highest seed").first).to_be_visible()
    page.get_by_label("Axis").select_option("tokens")
    page.wait_for_function(f"() => {REWARD}.layout.xaxis.title.text === 'sampled tokens'")
    page.get_by_role("link", name="Remove").first.click()
    expect(page.get_by_role("heading", name="Comparing 1 run")).to_be_visible()


def test_a_report_opens_without_a_network(runs: Runs, tmp_path: Path, open_page: Open) -> None:
    """From a file: a group token by token, with its numbers, curves, and the comparison."""
    write_report([runs.paths["seed-0"], runs.paths["seed-1"]], tmp_path / "report.html")
    file = tmp_path / "report.html"
    group = re.search(r"#/r/[^/\"]*seed-0[^/\"]*/steps/2/groups/1(?=\")", file.read_text(encoding="utf-8"))
    assert group
    table = pq.read_table(runs.paths["seed-0"] / "rollouts/step-000002.parquet").to_pylist()
    row = next(row for row in table if row["group"] == 1 and row["advantages"] and row["advantages"][0])
    page = open_page(f"{file.as_uri()}{group[0]}", offline=True)
    page.locator(f"#c{row['completion']} [data-t]").first.hover()
    panel = page.get_by_role("complementary", name="Numbers of a token")
    advantage = panel.get_by_role("row", name="advantage").get_by_role("cell")
    assert float(str(advantage.text_content()).replace("−", "-")) == pytest.approx(row["advantages"][0], rel=1e-6)
    for route in ("#/compare", group[0].partition("/steps/")[0]):
        page.goto(f"{file.as_uri()}{route}")
        page.wait_for_function("document.querySelector('.charts-section .plot')")


def every_page(runs: Runs, name: str = "seed-0", sets: tuple[str, ...] = ("",), prompt: str = "") -> list[str]:
    """One address of every kind of page."""
    key = runs.key(name)
    prompt = prompt or pq.read_table(runs.paths[name] / "evaluations/step-000004.parquet")["prompt_id"][0].as_py()
    last = 4 if name == "seed-0" else 2
    found = addresses(key, (2,), 1, list(sets), [prompt], last)
    pages = [path for path in found if path.startswith("/r/") and "part=" not in path]
    return ["/", f"/compare?run={key}&run={runs.key('seed-1')}", *pages]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_accessible(scheme: str, runs: Runs, address: str, open_page: Open) -> None:
    """axe-core finds no violation of its rules."""
    page, axe, found = open_page(address, color_scheme=scheme), Axe(), []
    for path in every_page(runs):
        ready(page, address + path)
        for violation in axe.run(page).response["violations"]:
            targets = [node["html"][:300] for node in violation["nodes"]][:4]
            found.append(f"{path}: {violation['id']}: {violation['help']}: {targets}")
    assert not found, "\n".join(found)


def test_pages_fit_a_phone(runs: Runs, address: str, open_page: Open) -> None:
    """No page scrolls sideways; what is wide scrolls by itself."""
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
    page, wide = open_page(address, **phone), []
    for path in every_page(runs):
        ready(page, address + path)
        width = page.evaluate("document.scrollingElement.scrollWidth")
        wide += [f"{path}: {width}"] * (width > 390)
    assert not wide


def test_hostile_texts_run_nothing(runs: Runs, address: str, open_page: Open) -> None:
    """A browser reads the attacks as texts: no script of theirs runs, nothing is loaded, no element is theirs."""
    page = open_page(address)
    texts, key, shown = tuple(ATTACKS), runs.key("hostile"), 0
    pages = every_page(runs, "hostile", texts[:1], texts[3])
    pages += [f"/r/{key}/steps/1/groups/{group}" for group in range(0, len(texts), 4)]
    for path in pages:
        ready(page, address + path)
        rendered = page.get_by_role("button", name="Rendered")
        if rendered.count():
            rendered.click()
            expect(page.locator(".body.rendered").first).to_be_visible()
        assert page.evaluate("window.pwned") is None, path
        theirs = page.evaluate(
            """() => [...document.querySelectorAll(
                "main img, iframe, object, embed, base, main style, main link, [onerror], [onload], [onmouseover]"
            )].map(element => element.outerHTML)"""
        )
        assert not theirs, path
        shown += "pwned" in page.evaluate("document.body.textContent")
    assert shown >= len(pages) - 2, "all but tables of numbers"
