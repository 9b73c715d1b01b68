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
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from playwright.sync_api import Page, sync_playwright

from gruppo.ui.app import create_app
from gruppo.ui.catalog import run_key
from gruppo.ui.server import bound_socket

OUT = Path("docs/images")
CHROMIUM = os.environ.get("PLAYWRIGHT_CHROMIUM", "/usr/bin/chromium")
WIDTH, HEIGHT = 1200, 780


@contextmanager
def served(runs: list[Path]) -> Iterator[str]:
    """The address of a dashboard that shows the runs."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "runs"
        for run in runs:
            shutil.copytree(run, root / run.name, ignore=shutil.ignore_patterns("checkpoints", "model", "base"))
        with bound_socket("127.0.0.1", None) as listening:
            app = create_app(root, cache=Path(folder) / "cache")
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
        group = f"{run}/steps/{steps}/groups/0"
        shoot(page, f"{base}/", "ui-runs", "table")
        shoot(page, run, "ui-run", ".js-plotly-plot")
        shoot(page, f"{run}/steps/{steps}", "ui-step", "table")
        shoot(page, group, "ui-group", ".tokens [data-t]")
        browser.close()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main([Path(argument) for argument in sys.argv[1:]])
