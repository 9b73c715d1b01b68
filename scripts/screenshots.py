"""Takes the screenshots of docs/ui.md from real runs.

    python scripts/screenshots.py runs/quickstart runs/other-seed

The first run is shown page by page, and compared with the others. Needs Debian's chromium, or the browser that
PLAYWRIGHT_CHROMIUM names.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, chdir, contextmanager
from pathlib import Path

import uvicorn
from playwright.sync_api import Page, sync_playwright

from gruppo.ui.app import create_app
from gruppo.ui.catalog import run_key
from gruppo.ui.server import bound_socket

OUT = Path("docs/images").resolve()
CHROMIUM = os.environ.get("PLAYWRIGHT_CHROMIUM", "/usr/bin/chromium")
WIDTH, HEIGHT = 1200, 780


@contextmanager
def served(runs: list[Path]) -> Iterator[str]:
    """The address of a dashboard that shows the runs."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for run in runs:
            ignored = shutil.ignore_patterns("*.safetensors")
            shutil.copytree(run, Path(folder) / "runs" / run.name, ignore=ignored)
        stack.enter_context(chdir(folder))  # pages show where the runs are
        with bound_socket("127.0.0.1", None) as listening:
            app = create_app(Path("runs"), cache=Path(folder) / "cache")
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none"))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
            thread.start()
            try:
                yield f"http://127.0.0.1:{listening.getsockname()[1]}"
            finally:
                server.should_exit = True
                thread.join()


def shoot(page: Page, address: str, name: str, wait_for: str) -> None:
    """Open an address, wait for an element, and keep what the window shows."""
    page.goto(address)
    page.wait_for_selector(wait_for)
    page.wait_for_timeout(600)  # plotly's last layout
    page.screenshot(path=OUT / f"{name}.png")


def ready(page: Page, address: str) -> None:
    """Wait until the index of a run is built."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        page.goto(address)
        if page.locator("table").count():
            return
        page.wait_for_timeout(500)
    raise SystemExit(f"{address}: no table within a minute")


def main(runs: list[Path]) -> None:
    """Take all screenshots."""
    OUT.mkdir(exist_ok=True)
    with served(runs) as base, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-quic"],
        )
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        run = f"{base}/r/{run_key(runs[0].name)}"
        ready(page, f"{run}/steps")
        steps = page.locator("tbody tr").count()
        shoot(page, f"{base}/", "ui-runs", "table")
        shoot(page, run, "ui-run", ".js-plotly-plot")
        shoot(page, f"{run}/steps/{steps}", "ui-step", "table")
        page.goto(f"{run}/steps/{steps}?nonzero=1&sort=right&order=desc")
        group = page.locator("tbody th a").first.get_attribute("href")
        page.goto(f"{base}{group}")
        page.locator("[data-t]").nth(3).hover()
        page.locator(".controls").evaluate("element => element.scrollIntoView()")
        page.locator("[data-t]").nth(3).hover()
        page.screenshot(path=OUT / "ui-group.png")
        question = page.get_by_role("link", name="This question through time").get_attribute("href")
        shoot(page, f"{base}{question}", "ui-question", "h1")
        page.goto(f"{run}/evaluations")
        last = page.locator("tbody th a").last.get_attribute("href")
        shoot(page, f"{base}{last}", "ui-evaluation", "h2")
        keys = "&".join(f"run={run_key(each.name)}" for each in runs)
        shoot(page, f"{base}/compare?{keys}", "ui-compare", ".js-plotly-plot")
        browser.close()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main([Path(argument).resolve() for argument in sys.argv[1:]])
