"""gruppo beside its peers, alternately and in one go: `make bench`, or `.venv/bin/python benchmarks/bench.py --help`.

Every side is a process of its own, kept alive, that makes one step when it is told to. A peer's settings are tried
first, each in one pair of steps (the peer's, then ours); pairs in its quickest setting follow. The side that is not
asked stands still. Linux only.

Works: A and B are whole training steps against TRL's GRPOTrainer, "generation" is sampling alone against vLLM.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from report import Pair, Results, Start, write_results
from works import Work, make_works

HERE = Path(__file__).parent
ROOT = HERE.parent
WORKS = ("A", "B", "generation")
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4

Setting = dict[str, Any]


class SideError(Exception):
    """A side's process has ended without an answer; the text is the end of what it printed."""


class DifferentWorkError(Exception):
    """The two sides do not do the same work: nothing that was timed would mean anything."""


class Side:
    """A process that waits for commands. Use it as a context; it is ready when that begins."""

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str], log: Path, spare: bool) -> None:
        """`spare`: where memory runs out, this process is the one to go."""
        self.name, self.log, begun = name, log, time.perf_counter()
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True
        )
        if spare:
            with contextlib.suppress(OSError):
                Path(f"/proc/{self.process.pid}/oom_score_adj").write_text("900")
        self.ready = self._answer()
        self.load_seconds = time.perf_counter() - begun

    def call(self, command: str, **options: Any) -> dict[str, Any]:
        """Have a command done. Raises SideError."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"command": command, **options}) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self.process.wait()
        if code == -9:
            raise SideError("killed, as memory ran out")
        last = [each for each in self.log.read_text().splitlines() if each.strip()][-1:]
        raise SideError(f"exit {code}: {''.join(last)[:300]}")

    def _tree(self) -> list[psutil.Process]:
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def peak_bytes(self) -> int:
        """Most bytes resident since its start, loading included, summed over its processes."""
        total = 0
        for each in self._tree():
            status = Path(f"/proc/{each.pid}/status").read_text()
            kilobytes = next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")), "0")
            total += 1024 * int(kilobytes)
        return total

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """None of its processes runs meanwhile: a few hundredths of a core cost the other side a tenth of its time."""
        tree = self._tree()
        for each in tree:
            each.suspend()
        try:
            yield
        finally:
            for each in reversed(tree):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.resume()

    def processor_seconds(self) -> float:
        """Processor time of its processes so far."""
        return sum(sum(each.cpu_times()[:2]) for each in self._tree())

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Bench:
    """A run of the benchmark: where its files are, and what it has measured."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given, self.folder, self.begun = given, folder, time.perf_counter()
        threads = len(os.sched_getaffinity(0))
        self.environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # What is compiled is compiled in this run, so that the first start of vLLM is a first start.
            "VLLM_CACHE_ROOT": str(folder / "vllm"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TRITON_CACHE_DIR": str(folder / "triton"),
        }
        self.results = Results(threads=threads, quick=given.quick)

    def tell(self, text: str) -> None:
        """A line of progress."""
        print(f"{time.perf_counter() - self.begun:6.0f} s  {text}", flush=True)

    def start(self, name: str, work: Work | None, option: str = "") -> Side:
        """Start a side; `option`: its second argument."""
        return self.start_on(name, None if work is None else self.folder / f"{work.name}.json", option)

    def start_on(self, name: str, file: Path | None, option: str = "") -> Side:
        """The same with the file that the work is in."""
        script, python = {
            "gruppo": ("ours.py", sys.executable),
            "rates": ("rates.py", sys.executable),
            "trl": ("trl_side.py", getattr(self.given, "trl_python", None)),
            "vllm": ("vllm_side.py", getattr(self.given, "vllm_python", None)),
        }[name]
        arguments = [] if file is None else [str(file), option]
        command = [str(python), str(HERE / "sides" / script), *arguments]
        peer = name in {"trl", "vllm"}
        side = Side(name, command, self.environment, self.folder / f"{name}.log", spare=peer)
        self.results.versions[name] = side.ready["versions"]
        return side

    def measure_rates(self) -> None:
        """Rates of products now; the best of the run counts."""
        with self.start("rates", None) as side:
            for name, value in side.call("rates")["rates"].items():
                self.results.rates[name] = max(value, self.results.rates.get(name, 0.0))
        self.tell(", ".join(f"{name} {value:.0f} GFLOP/s" for name, value in self.results.rates.items()))

    def check(self, work: Work, setting: Setting) -> None:
        """Both sides' losses and gradients on the same completions, in float64. Raises DifferentWorkError."""
        with self.start("gruppo", work, "check") as side:
            ours = side.call("check")
        rollouts = self.folder / "rollouts.json"
        rollouts.write_text(json.dumps(ours["rollouts"]))
        with self.start("trl", work, json.dumps(setting)) as side:
            theirs = side.call("check", rollouts=str(rollouts))
        for name, tolerance in (("loss", LOSS_TOLERANCE), ("gradient_norm", GRADIENT_TOLERANCE)):
            mine, other = ours[name], theirs[name]
            relative = abs(mine - other) / abs(other)
            fact = (
                f"work {work.name}: the {name.replace('_', ' ')} of one step's completions in float64 is {mine:.8g} "
                f"by gruppo and {other:.8g} by TRL's own `_compute_loss`, a relative difference of {relative:.1e} "
                f"(allowed {tolerance:.0e})"
            )
            self.tell(fact)
            if not relative <= tolerance:
                raise DifferentWorkError(fact)
            self.results.checks.append(fact)

    def race(self, work: Work, peer: str, settings: Sequence[Setting]) -> None:
        """Try a peer's settings on a work, then alternate in the best one."""
        with self.start("gruppo", work, "run") as ours:
            self._warm(ours, work, ours.ready["setting"])
            tried: list[tuple[float, Setting]] = []
            for setting in settings:
                try:
                    with self.start(peer, work, json.dumps(setting)) as side:
                        self._warm(side, work, describe(peer, setting, work))
                        pair = self._pair(work, side, ours, setting, trial=True)
                except SideError as died:
                    self.results.failures.append(f"work {work.name}: {peer}, {describe(peer, setting, work)}: {died}")
                    self.tell(self.results.failures[-1])
                    continue
                tried.append((pair.peer_seconds, setting))
            if not tried:
                raise SideError(self.results.failures[-1])
            best = min(tried, key=lambda each: each[0])[1]
            with self.start(peer, work, json.dumps(best)) as side:
                self._warm(side, work, describe(peer, best, work))
                for _ in range(self.given.pairs):
                    self._pair(work, side, ours, best, trial=False)

    def _warm(self, side: Side, work: Work, setting: str) -> None:
        first = side.call("warm").get("first_token")
        self.results.starts.append(Start(work.name, side.name, setting, side.load_seconds, first))
        self.tell(f"work {work.name}: {side.name}, {setting}: loaded in {side.load_seconds:.1f} s")

    def _pair(self, work: Work, peer: Side, ours: Side, setting: Setting, trial: bool) -> Pair:
        """A step of the peer, then one of ours. Raises DifferentWorkError where their completions are not as long."""
        theirs, idle_ours = self._step(work, peer, ours)
        mine, idle_theirs = self._step(work, ours, peer)
        pair = Pair(
            work=work.name,
            peer=peer.name,
            setting=describe(peer.name, setting, work),
            our_setting=ours.ready["setting"],
            trial=trial,
            peer_seconds=theirs["seconds"],
            our_seconds=mine["seconds"],
            peer_phases=theirs["phases"],
            our_phases=mine["phases"],
            peer_peak=peer.peak_bytes(),
            our_peak=ours.peak_bytes(),
            idle=max(idle_ours, idle_theirs),
        )
        self.results.pairs.append(pair)
        self.tell(
            f"work {work.name}: {pair.peer} {pair.peer_seconds:.2f} s ({pair.setting}), gruppo {pair.our_seconds:.2f} "
            f"s: {pair.ratio:.2f} times as fast"
        )
        return pair

    def _step(self, work: Work, side: Side, idle: Side) -> tuple[dict[str, Any], float]:
        """One step of a side while the other is paused, and the share of a core that the other used all the same."""
        before = idle.processor_seconds()
        with idle.paused():
            made = side.call("step")
        used = (idle.processor_seconds() - before) / made["seconds"]
        if made["lengths"] != work.lengths:
            raise DifferentWorkError(f"work {work.name}: {side.name} made completions of {made['lengths']} tokens")
        return made, used


def describe(peer: str, setting: Setting, work: Work) -> str:
    """A peer's setting in words."""
    if peer == "vllm":
        return "bfloat16" + "".join(f", {name} {value}" for name, value in setting.items())
    size = setting["micro_batch"]
    return f"{'bf16 autocast' if setting['bf16'] else 'float32'}, micro-batches {size} × {work.completions // size}"


def settings_of(work: Work, quick: bool) -> list[Setting]:
    """What is tried of a peer on a work, the smallest in memory first."""
    if work.name == "generation":
        return [{}] if quick else [{}, {"block_size": 32}]
    whole = work.completions
    few = whole // 2 if quick else 32 if work.name == "B" else 16
    tried = [(True, few), (False, few), (True, whole)]
    return [{"bf16": bf16, "micro_batch": size} for bf16, size in tried]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", default=",".join(WORKS), help="which of them, with commas (default: all)")
    parser.add_argument("--pairs", type=int, default=2, help="pairs of steps in the peer's best setting")
    parser.add_argument(
        "--quick", action="store_true", help="works of a second, to try the machinery; figures mean nothing"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results.json", help="the table goes beside it, as .md")
    parser.add_argument("--trl-python", type=Path, default=ROOT / ".venv-trl/bin/python")
    parser.add_argument("--vllm-python", type=Path, default=ROOT / ".venv-vllm/bin/python")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that sides end and files go
    chosen = given.works.split(",")
    if unknown := sorted(set(chosen) - set(WORKS)):
        parser.error(f"--works {given.works}: {unknown[0]!r} is none of {', '.join(WORKS)}")
    if given.pairs < 1:
        parser.error(f"--pairs {given.pairs}: must be at least 1")
    for work in chosen:
        name, python = ("vllm", given.vllm_python) if work == "generation" else ("trl", given.trl_python)
        if not python.is_file():
            parser.error(f"--{name}-python {python}: there is no such file; run make bench, which builds it")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gruppo-bench-")))
        works, bench = make_works(folder, given.quick), Bench(given, folder)
        try:
            for work in (works[name] for name in chosen):
                (folder / f"{work.name}.json").write_text(json.dumps(asdict(work)))
                bench.measure_rates()
                settings = settings_of(work, given.quick)
                if work.name == "generation":
                    bench.race(work, "vllm", settings)
                else:
                    bench.check(work, {"bf16": False, "micro_batch": settings[0]["micro_batch"]})
                    bench.race(work, "trl", settings)
                bench.results.works.append(work)
                write_results(bench.results, given.out)
        except (SideError, DifferentWorkError) as error:
            print(f"bench: {error}", file=sys.stderr)
            sys.exit(1)
    print(given.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
