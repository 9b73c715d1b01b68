"""What `gruppo ui` takes on the runs of benchmarks/ui_scale.py: seconds per page, memory, and processor time."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

TOKEN = "measured"
OPENINGS = 100  # of every kind of page
TICKS = os.sysconf("SC_CLK_TCK")
RESULTS = Path(__file__).with_name("ui_scale.json")


@dataclass
class Server:
    """A `gruppo ui` process. `process_id`: of the server itself."""

    process_id: int
    port: int
    local: threading.local = field(default_factory=threading.local)

    def get(self, address: str) -> tuple[float, bytes]:
        """Seconds until the whole answer was there, and the answer. Raises RuntimeError unless its code is 200."""
        started = time.perf_counter()
        response = self.open(address)
        content = response.read()
        if response.status != 200:
            raise RuntimeError(f"{address}: {response.status} {content[:300]!r}")
        return time.perf_counter() - started, content

    def open(self, address: str) -> http.client.HTTPResponse:
        """The beginning of an answer, on a connection of this thread."""
        if not hasattr(self.local, "connection"):
            self.local.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            return self._answer(address)
        except ConnectionError:  # the server has closed a connection that was not used for a while
            self.local.connection.close()
            return self._answer(address)

    def _answer(self, address: str) -> http.client.HTTPResponse:
        self.local.connection.request("GET", address, headers={"cookie": f"gruppo_{self.port}={TOKEN}"})
        return self.local.connection.getresponse()

    def json(self, address: str) -> Any:
        return json.loads(self.get(address)[1])

    def peak_megabytes(self) -> float:
        """The most memory that the process has had (VmHWM)."""
        status = Path(f"/proc/{self.process_id}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1000  # type: ignore[index]

    def processor_seconds(self) -> float:
        """User and system time of the process."""
        fields = Path(f"/proc/{self.process_id}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """`gruppo ui` over a folder, with an empty cache."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        environment = {**os.environ, "GRUPPO_UI_TOKEN": TOKEN, "XDG_CACHE_HOME": str(Path(cache) / ".cache")}
        command = [sys.executable, "-c", "from gruppo.cli.main import main; main()", "ui", str(folder)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                port = int(re.search(r":(\d+)/", process.stdout.readline())[1])  # type: ignore[index]
                server = Server(process.pid, port)
                for _ in range(200):
                    try:
                        server.get("/static/style.css")
                        break
                    except ConnectionError:
                        server.local = threading.local()
                        time.sleep(0.1)
                yield server
            finally:
                process.terminate()


def served_copy(run: Path, root: Path, name: str, **changes: str) -> Path:
    """A copy of a run that shares its tables (hard links). `changes`: texts of the recipe -> what replaces them."""
    copy = root / name
    for path in run.rglob("*"):
        target = copy / path.relative_to(run)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            os.link(path, target)
        else:
            shutil.copy(path, target)
    recipe = (copy / "recipe.toml").read_text(encoding="utf-8")
    for old, new in changes.items():
        assert old in recipe
        recipe = recipe.replace(old, new)
    (copy / "recipe.toml").write_text(recipe, encoding="utf-8")
    return copy


@contextmanager
def beside(run: Path) -> Iterator[Path]:
    """A folder beside a run, so that tables can be linked; it is deleted at the end."""
    with tempfile.TemporaryDirectory(dir=run.resolve().parent, prefix="served-") as folder:
        yield Path(folder)


def first_opening(server: Server, key: str) -> dict[str, Any]:
    """How long it takes until the pages of a run can be opened, and what is shown meanwhile."""
    started = time.perf_counter()
    seconds, page = server.get(f"/r/{key}/steps")
    shown = [] if b"data-indexing" not in page else [(0, 0)]
    while not (now := server.json(f"/api/r/{key}/index"))["ready"]:
        if (now["done"], now["total"]) != shown[-1]:
            shown.append((now["done"], now["total"]))
        time.sleep(0.1)
    return {
        "answer_seconds": round(seconds, 3),
        "index_seconds": round(time.perf_counter() - started, 1),
        "states_of_progress_shown": len(shown),
    }


def addresses(key: str, other: str, steps: int, groups: int, source: random.Random) -> Mapping[str, Callable[[], str]]:
    """For every kind of page, a function that returns the address of a random one."""
    run = f"/r/{key}"

    def query(path: str, **values: Any) -> str:
        return f"{path}?{urlencode(values, doseq=True)}"

    def order() -> str:
        return source.choice(("asc", "desc"))

    def step() -> int:
        return source.randint(1, steps)

    def evaluated() -> int:
        return source.randrange(0, steps + 1, 100)

    def prompt() -> str:
        return f"arithmetic/{source.randrange(8_000)}"

    def held_out() -> str:
        return f"arithmetic (held out)/{source.randrange(200)}"

    def filtered() -> str:
        filters = {"text": source.choice(("", str(source.randint(10, 99)))), "nonzero": source.choice(("", "0", "1")),
                   "truncated": source.choice(("", "1")), "low": source.choice(("", "0.3"))}  # fmt: skip
        return query(f"{run}/steps/{step()}", sort=source.choice(("group", "mean", "std", "prompt", "longest")),
                     order=order(), **filters)  # fmt: skip

    return {
        "list of runs": lambda: query("/", sort=source.choice(("", "name", "reward", "accuracy")), order=order()),
        "run": lambda: run,
        "run: head": lambda: query(run, part="head"),
        "run: events": lambda: query(run, part="events"),
        "run: curves (JSON)": lambda: query(
            f"/api{run}/series", axis=source.choice(("step", "tokens", "time"))
        ),
        "run: a part of the curves (JSON)": lambda: query(
            f"/api{run}/series", first=(low := step()), last=min(steps, low + 1_000)
        ),
        "steps": lambda: query(f"{run}/steps", sort=source.choice(("step", "mean", "nonzero", "length", "truncated")),
                               order=order(), offset=source.randrange(0, steps, 50)),
        "step": lambda: f"{run}/steps/{step()}",
        "step: sorted and filtered": filtered,
        "group": lambda: f"{run}/steps/{step()}/groups/{source.randrange(groups)}",
        "group (JSON)": lambda: f"/api{run}/steps/{step()}/groups/{source.randrange(groups)}",
        "questions": lambda: query(f"{run}/questions", sort=source.choice(("draws", "prompt", "change", "best")),
                                   order=order(), offset=source.randrange(0, 8_000, 50)),
        "questions: searched": lambda: query(f"{run}/questions", text=str(source.randint(100, 9_999))),
        "question": lambda: query(f"{run}/question", prompt=prompt(), order=order(), offset=source.choice((0, 0, 20))),
        "question: held out": lambda: query(f"{run}/question", prompt=held_out(), order=order()),
        "evaluations": lambda: f"{run}/evaluations",
        "evaluation": lambda: query(f"{run}/evaluations/{evaluated()}", before=evaluated(),
                                    kind=source.choice(("", "fixed", "broken", "still wrong"))),
        "answers": lambda: query(f"{run}/evaluations/{evaluated()}/answers", prompt=held_out()),
        "recipe": lambda: f"{run}/recipe",
        "compare": lambda: query("/compare", run=[key, other], band=source.choice("01")),
        "compare: curves (JSON)": lambda: query("/api/compare", run=[key, other], band=source.choice("01")),
        "file": lambda: f"{run}/files/{quote(source.choice(('recipe.toml', 'events.jsonl', 'summary.json')))}",
    }  # fmt: skip


def timed(server: Server, address: Callable[[], str], openings: int) -> dict[str, float]:
    """Seconds per opening of pages of one kind."""
    found = [server.get(address()) for _ in range(openings)]
    return summary([seconds for seconds, _ in found]) | {"kilobytes": round(len(found[-1][1]) / 1000)}


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, 95th percentile and maximum, in milliseconds."""
    ranks = statistics.quantiles(seconds, n=20, method="inclusive")
    return {"p50_ms": round(ranks[9] * 1e3), "p95_ms": round(ranks[18] * 1e3), "max_ms": round(max(seconds) * 1e3)}


def measure(run: Path, openings: int = OPENINGS) -> dict[str, Any]:
    """Every kind of page of a run and of its comparison with a copy that has another recipe."""
    source = random.Random(0)
    with beside(run) as root:
        served_copy(run, root, "one")
        served_copy(run, root, "two", **{"kl_coef = 0.02": "kl_coef = 0.01"})
        with serving(root) as server:
            first_list, _ = server.get("/")
            keys = {card["folder"]: card["key"] for card in server.json("/api/runs")}
            key, other = keys["one"], keys["two"]
            steps = next(card["steps"] for card in server.json("/api/runs") if card["key"] == key)
            first_run, _ = server.get(f"/r/{key}")
            first = {"list_seconds": round(first_list, 2), "run_seconds": round(first_run, 2)}
            first |= first_opening(server, key)
            first["compare_seconds"] = round(server.get(f"/compare?run={key}&run={other}")[0], 2)
            first |= {f"second_{name}": value for name, value in first_opening(server, other).items()}
            indexed = server.peak_megabytes()
            groups = len(set(_groups_of(server, key)))
            pages = {name: timed(server, address, openings)
                     for name, address in addresses(key, other, steps, groups, source).items()}  # fmt: skip
            return {
                "first": first, "pages": pages, "peak_megabytes": round(server.peak_megabytes()),
                "peak_megabytes_after_first_opening": round(indexed),
            }  # fmt: skip


def _groups_of(server: Server, key: str) -> list[str]:
    _, page = server.get(f"/r/{key}/steps/1")
    return re.findall(r"steps/1/groups/(\d+)", page.decode())


class Watcher(threading.Thread):
    """Holds the event stream of a run open and, on each event, fetches what an open page fetches."""

    def __init__(self, server: Server, key: str, parts: list[str]) -> None:
        super().__init__(daemon=True)
        self.server, self.parts = server, parts
        self.stream = Server(server.process_id, server.port).open(f"/api/r/{key}/live")
        self.events = 0
        self.seconds: list[float] = []
        self.seen: dict[int, float] = {}  # step -> when it was first on the page
        self.known: dict[str, str] = {}  # what the page adds to an address

    def run(self) -> None:
        while line := self.stream.readline():
            if line.startswith(b"data:"):
                self.events += 1
                for part in self.parts:
                    seconds, content = self.server.get(part + self.known.get(part, ""))
                    self.seconds.append(seconds)
                    if part.startswith("/api/"):  # the curves; next time only the new points
                        now = json.loads(content)
                        self.known[part] = f"&since={now['step']}&generation={now['generation']}"
                    for step in map(int, re.findall(rb"/steps/(\d+)\"", content)):
                        self.seen.setdefault(step, time.monotonic())


def live(run: Path, minutes: float, pause: float, write_step: Callable[[Path, int], None]) -> dict[str, Any]:
    """Two pages follow a run that writes a step every `pause` seconds; the share of a core that the server takes."""
    with beside(run) as root:
        copy = served_copy(run, root, "one")
        last = max(int(path.stem[5:]) for path in copy.glob("rollouts/*.parquet"))
        total = last + 1_000_000
        beat(copy, last, total)
        with serving(root) as server:
            key = server.json("/api/runs")[0]["key"]
            first_opening(server, key)
            steps = f"/r/{key}/steps?sort=step&order=desc&part=table"
            watchers = [
                Watcher(
                    server, key, [f"/r/{key}?part=head", f"/r/{key}?part=events", f"/api/r/{key}/series?axis=step"]
                ),
                Watcher(server, key, [steps]),
            ]
            for watcher in watchers:
                watcher.start()
            time.sleep(3)
            started, before, written = time.monotonic(), server.processor_seconds(), {}
            events = [watcher.events for watcher in watchers]
            while (passed := time.monotonic() - started) < minutes * 60:
                if passed >= len(written) * pause:
                    last += 1
                    write_step(copy, last)
                    written[last] = time.monotonic()
                beat(copy, last, total)
                time.sleep(1)
            passed, taken = time.monotonic() - started, server.processor_seconds() - before
            time.sleep(3)
            assert all(watcher.is_alive() for watcher in watchers)
            return {
                "minutes": round(passed / 60, 1), "seconds_between_steps": pause, "steps_written": len(written),
                "processor_seconds": round(taken, 2), "share_of_a_core": round(taken / passed, 4),
                "events": [watcher.events - count for watcher, count in zip(watchers, events, strict=True)],
                "fetches": summary([seconds for watcher in watchers for seconds in watcher.seconds]),
                "seconds_until_shown": summary([watchers[1].seen[step] - moment for step, moment in written.items()]),
                "peak_megabytes": round(server.peak_megabytes()),
            }  # fmt: skip


def beat(run: Path, step: int, steps: int) -> None:
    """Write status.json as a run does every second."""
    content = {"state": "running", "phase": "Sampling", "done": 0, "total": None, "unit": "", "step": step,
               "steps": steps, "process_id": os.getpid(), "attempt": 1, "checkpoint": 0, "truncated_to": {},
               "heartbeat": datetime.now(UTC).isoformat(timespec="milliseconds")}  # fmt: skip
    (run / "status.json.writing").write_text(json.dumps(content))
    (run / "status.json.writing").replace(run / "status.json")


def list_runs(root: Path, openings: int = OPENINGS) -> dict[str, Any]:
    """The list of all runs below a folder: the first opening, and later ones."""
    with serving(root) as server:
        first, page = server.get("/")
        count = len(server.json("/api/runs"))
        source = random.Random(0)
        sorts = ("", "name", "state", "model", "step", "left", "reward", "accuracy")
        pages = timed(server, lambda: f"/?sort={source.choice(sorts)}&order={source.choice(('asc', 'desc'))}", openings)
        return {"runs": count, "first_seconds": round(first, 3), "pages": {"list of runs": pages},
                "kilobytes": round(len(page) / 1000), "peak_megabytes": round(server.peak_megabytes())}  # fmt: skip


def record(name: str, found: Mapping[str, Any]) -> None:
    """Add figures to the results, with the command and the load of the machine, and print them."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    load = [round(value, 1) for value in os.getloadavg()]
    command = " ".join(["benchmarks/ui_scale.py", *(Path(word).name if "/" in word else word for word in sys.argv[1:])])
    results[name] = {"command": command, "cores": os.cpu_count(), "load_after": load, **found}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for page, figures in found.get("pages", {}).items():
        print(f"{page:<34}", *(f"{figures[rank]:>6}" for rank in ("p50_ms", "p95_ms", "max_ms", "kilobytes")))
    print(json.dumps({name: value for name, value in results[name].items() if name != "pages"}, indent=1))
