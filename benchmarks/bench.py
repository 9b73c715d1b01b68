"""Compare gruppo with its peers in one run: `make bench`, or `.venv/bin/python benchmarks/bench.py --help`.

Every side is a separate long-lived process that does one step per command. First, every setting of a peer is tried in
one pair of steps (the peer's, then ours). Then pairs in its fastest setting follow. The side that is not working is
suspended. Linux only.

Works: A and B are whole training steps against TRL's GRPOTrainer; "generation" is sampling alone against vLLM and
llama.cpp. llama.cpp is compared twice: with weights as precise as ours, or in float16, and with weights in 8 bits. A
peer whose environment is missing is left out if its work has another one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from report import Pair, Results, Start, write_results
from works import Work, make_works

from gruppo.models.precision import choose_dtype

HERE = Path(__file__).parent
ROOT = HERE.parent
# work -> its peers
WORKS = {"A": ("trl",), "B": ("trl",), "generation": ("vllm", "llama.cpp")}
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
# Of the mean difference of log-probabilities from those of float32, by the dtype of llama.cpp's weights.
LOGPROB_TOLERANCE = {"float32": 0.01, "float16": 0.01, "bfloat16": 0.05, "q8_0": 0.1}

Setting = dict[str, Any]


@dataclass(frozen=True)
class Race:
    """A comparison with a peer in the fastest of several settings. `name`: of the peer, in the tables."""

    peer: str
    name: str
    settings: Sequence[Setting]


class SideError(Exception):
    """The process of a side exited without an answer; the message is the last line of its log."""


class DifferentWorkError(Exception):
    """The two sides do not do the same work, so their times cannot be compared."""


class Side:
    """A process that waits for commands; a context manager, ready as soon as it is constructed."""

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str], log: Path, spare: bool) -> None:
        """`spare`: if memory runs out, the kernel kills this process first."""
        self.name, self.log, started = name, log, time.perf_counter()
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True
        )
        if spare:
            with contextlib.suppress(OSError):
                Path(f"/proc/{self.process.pid}/oom_score_adj").write_text("900")
        self.ready = self._answer()
        self.load_seconds = time.perf_counter() - started

    def call(self, command: str, **options: Any) -> dict[str, Any]:
        """Send a command and return its answer. Raises SideError if the process exits."""
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
            raise SideError("killed: out of memory")
        last = [text for text in self.log.read_text().splitlines() if text.strip()][-1:]
        raise SideError(f"exit {code}: {''.join(last)[:300]}")

    def _tree(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def peak_bytes(self) -> int:
        """Peak resident memory in bytes since the start, including loading, summed over its processes."""
        total = 0
        for process in self._tree():
            status = Path(f"/proc/{process.pid}/status").read_text()
            kilobytes = next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")), "0")
            total += 1024 * int(kilobytes)
        return total

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Suspend its processes: a few hundredths of a core used here cost the other side a tenth of its time."""
        tree = self._tree()
        for process in tree:
            process.suspend()
        try:
            yield
        finally:
            for process in reversed(tree):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    def processor_seconds(self) -> float:
        """CPU time of its processes so far, in seconds."""
        return sum(sum(process.cpu_times()[:2]) for process in self._tree())

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
    """One benchmark run: its temporary files and its results."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.started = args, folder, time.perf_counter()
        threads = len(os.sched_getaffinity(0))
        self.environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # Compilation caches are empty at the start of a run, so that vLLM's first start is a cold one.
            "VLLM_CACHE_ROOT": str(folder / "vllm"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TRITON_CACHE_DIR": str(folder / "triton"),
        }
        self.results = Results(threads=threads, quick=args.quick)
        self.expected: dict[str, Any] = {}  # completions of `check_llama`, with our log-probabilities

    def log(self, text: str) -> None:
        """Print a line of progress."""
        print(f"{time.perf_counter() - self.started:6.0f} s  {text}", flush=True)

    def start(self, name: str, work: Work | None, option: str = "") -> Side:
        """Start a side on a work; `option`: its second command-line argument."""
        return self.start_on(name, None if work is None else self.folder / f"{work.name}.json", option)

    def start_on(self, name: str, file: Path | None, option: str = "") -> Side:
        """Start a side on a work file."""
        peer = name not in {"gruppo", "rates"}
        script = {"gruppo": "ours.py", "rates": "rates.py"}.get(name, f"{_short(name)}_side.py")
        python = python_of(self.args, name) if peer else sys.executable
        arguments = [] if file is None else [str(file), option]
        command = [str(python), str(HERE / "sides" / script), *arguments]
        side = Side(name, command, self.environment, self.folder / f"{name}.log", spare=peer)
        self.results.versions[name] = side.ready["versions"]
        return side

    def measure_rates(self) -> None:
        """Measure matmul rates; the best value of the run is kept."""
        with self.start("rates", None) as side:
            for name, value in side.call("rates")["rates"].items():
                self.results.rates[name] = max(value, self.results.rates.get(name, 0.0))
        self.log(", ".join(f"{name} {value:.0f} GFLOP/s" for name, value in self.results.rates.items()))

    def check(self, work: Work, setting: Setting) -> None:
        """Compare loss and gradient norm of both sides on the same completions in float64.

        Raises DifferentWorkError if they differ by more than the tolerance.
        """
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
                f"work {work.name}: {name.replace('_', ' ')} of one step's completions in float64: {mine:.8g} by "
                f"gruppo, {other:.8g} by TRL's `_compute_loss`; relative difference {relative:.1e} "
                f"(allowed: {tolerance:.0e})"
            )
            self.require(relative <= tolerance, fact)

    def compare(self, work: Work, missing: Sequence[str]) -> None:
        """Compare with the peers of a work that are not missing, and write the results after each comparison."""
        self.measure_rates()
        self.results.failures += [f"work {work.name}: {peer}: its environment is missing" for peer in missing]
        self.results.works.append(work)
        races = [race for race in races_of(work, self.args.quick) if race.peer not in missing]
        peers = {race.peer for race in races}
        if "trl" in peers:
            self.check(work, {"bf16": False, "micro_batch": races[0].settings[0]["micro_batch"]})
        if "llama.cpp" in peers:
            self.write_llama_files(work, races)
        for race in races:
            self.race(work, race)
            write_results(self.results, self.args.out)

    def write_llama_files(self, work: Work, races: Sequence[Race]) -> None:
        """Write the GGUF files of llama.cpp's settings, and sample the completions of `check_llama`."""
        dtypes = sorted({setting["dtype"] for race in races if race.peer == "llama.cpp" for setting in race.settings})
        with self.start("gruppo", work, "check") as side:
            self.expected = side.call("check", dtypes=dtypes)

    def check_llama(self, work: Work, side: Side, setting: Setting) -> None:
        """Compare llama.cpp's log-probabilities with ours, on our completions, decoded as those that are timed.

        Raises DifferentWorkError if they differ by more than the tolerance.
        """
        theirs = side.call("score", completions=self.expected["completions"])["logprobs"]
        pairs = zip(_flat(self.expected["logprobs"]), _flat(theirs), strict=True)
        differences = [abs(mine - other) for mine, other in pairs]
        mean, allowed = statistics.mean(differences), LOGPROB_TOLERANCE[setting["dtype"]]
        peer = f"llama.cpp ({describe('llama.cpp', setting, work)})"
        fact = (
            f"work {work.name}: log-probabilities of {len(differences)} sampled tokens by {peer} and by gruppo in "
            f"float32: the mean difference is {mean:.2g} (allowed: {allowed:g}), the largest {max(differences):.2g}"
        )
        self.require(mean <= allowed, fact)

    def require(self, holds: bool, fact: str) -> None:
        """Log and record a check of the work. Raises DifferentWorkError unless it holds; a NaN does not."""
        self.log(fact)
        if not holds:
            raise DifferentWorkError(fact)
        self.results.checks.append(fact)

    def race(self, work: Work, race: Race) -> None:
        """Try all settings of a peer on a work, then alternate with it in its fastest setting."""
        with self.start("gruppo", work, "run") as ours:
            self._warm(ours, work, "gruppo", ours.ready["setting"])
            tried: list[tuple[float, Setting]] = []
            for setting in race.settings:
                text = describe(race.peer, setting, work)
                try:
                    with self.start(race.peer, work, json.dumps(setting)) as side:
                        if race.peer == "llama.cpp":
                            self.check_llama(work, side, setting)
                        self._warm(side, work, race.name, text)
                        pair = self._pair(work, race.name, side, ours, setting, trial=True)
                except SideError as error:
                    self.results.failures.append(f"work {work.name}: {race.name}, {text}: {error}")
                    self.log(self.results.failures[-1])
                    continue
                tried.append((pair.peer_seconds, setting))
            if not tried:
                raise SideError(self.results.failures[-1])
            best = min(tried, key=lambda trial: trial[0])[1]
            with self.start(race.peer, work, json.dumps(best)) as side:
                self._warm(side, work, race.name, describe(race.peer, best, work))
                for _ in range(self.args.pairs):
                    self._pair(work, race.name, side, ours, best, trial=False)

    def _warm(self, side: Side, work: Work, name: str, setting: str) -> None:
        first = side.call("warm").get("first_token")
        self.results.starts.append(Start(work.name, name, setting, side.load_seconds, first))
        self.log(f"work {work.name}: {name}, {setting}: loaded in {side.load_seconds:.1f} s")

    def _pair(self, work: Work, name: str, peer: Side, ours: Side, setting: Setting, trial: bool) -> Pair:
        """A step of the peer, then one of ours. Raises DifferentWorkError if lengths differ from the work file."""
        theirs, idle_ours = self._step(work, peer, ours)
        mine, idle_theirs = self._step(work, ours, peer)
        pair = Pair(
            work=work.name,
            peer=name,
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
        self.log(
            f"work {work.name}: {pair.peer} {pair.peer_seconds:.2f} s ({pair.setting}), gruppo {pair.our_seconds:.2f} "
            f"s: {pair.ratio:.2f} times as fast"
        )
        return pair

    def _step(self, work: Work, side: Side, idle: Side) -> tuple[dict[str, Any], float]:
        """One step of a side while the other is suspended, and the share of a core that the other still used."""
        before = idle.processor_seconds()
        with idle.paused():
            step = side.call("step")
        used = (idle.processor_seconds() - before) / step["seconds"]
        if step["lengths"] != work.lengths:
            raise DifferentWorkError(f"work {work.name}: {side.name} sampled completions of {step['lengths']} tokens")
        return step, used


def describe(peer: str, setting: Setting, work: Work) -> str:
    """Description of a peer's setting for the table."""
    if peer == "vllm":
        return setting["dtype"] + "".join(f", {name} {value}" for name, value in setting.items() if name != "dtype")
    if peer == "llama.cpp":
        unified = ", one buffer of keys and values" if setting.get("unified") else ""
        as_in_file = ", weights as in the file" if setting.get("as_in_file") else ""
        return setting["dtype"].replace("q8_0", "Q8_0") + unified + as_in_file
    size = setting["micro_batch"]
    return f"{'bf16 autocast' if setting['bf16'] else 'float32'}, micro-batches {size} × {work.completions // size}"


def races_of(work: Work, quick: bool) -> list[Race]:
    """The comparisons of a work. The settings of each are those to try, smallest memory first."""
    if work.name == "generation":
        dtype = str(choose_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
        plain: Setting = {"dtype": dtype}
        llama: list[Setting] = [
            {"dtype": name, "unified": unified} for name in ("float16", dtype) for unified in (False, True)
        ]
        return [
            Race("vllm", "vllm", [plain] if quick else [plain, plain | {"block_size": 32}]),
            Race("llama.cpp", "llama.cpp", llama),
            # On processors with AMX, llama.cpp may fail on weights that it has rearranged.
            Race("llama.cpp", "llama.cpp Q8_0", [{"dtype": "q8_0"}, {"dtype": "q8_0", "as_in_file": True}]),
        ]
    whole = work.completions
    few = whole // 2 if quick else 32 if work.name == "B" else 16
    tried = [(True, few), (False, few), (True, whole)]
    return [Race("trl", "trl", [{"bf16": bf16, "micro_batch": size} for bf16, size in tried])]


def python_of(args: argparse.Namespace, peer: str) -> Path:
    """The Python of a peer's environment."""
    python: Path = getattr(args, f"{_short(peer)}_python")
    return python


def _short(peer: str) -> str:
    """The name of a peer in options and file names."""
    return peer.removesuffix(".cpp")


def _flat(groups: Sequence[Sequence[Sequence[float]]]) -> list[float]:
    return [value for group in groups for values in group for value in values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", default=",".join(WORKS), help="works, separated by commas (default: all)")
    parser.add_argument("--pairs", type=int, default=2, help="pairs of steps in the peer's fastest setting")
    parser.add_argument(
        "--quick", action="store_true", help="tiny works to test the benchmark itself; the figures mean nothing"
    )
    parser.add_argument(
        "--out", type=Path, default=HERE / "results.json", help="results file; the table is written next to it as .md"
    )
    parser.add_argument("--trl-python", type=Path, default=ROOT / ".venv-trl/bin/python")
    parser.add_argument("--vllm-python", type=Path, default=ROOT / ".venv-vllm/bin/python")
    parser.add_argument("--llama-python", type=Path, default=ROOT / ".venv-gguf/bin/python")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that sides are stopped and files are removed
    chosen = args.works.split(",")
    if unknown := sorted(set(chosen) - set(WORKS)):
        parser.error(f"--works {args.works}: {unknown[0]!r} is not one of {', '.join(WORKS)}")
    if args.pairs < 1:
        parser.error(f"--pairs {args.pairs}: must be at least 1")
    missing = {name: [peer for peer in WORKS[name] if not python_of(args, peer).is_file()] for name in chosen}
    for name, peers in missing.items():
        files = ", ".join(f"--{_short(peer)}-python {python_of(args, peer)}" for peer in peers)
        if len(peers) == len(WORKS[name]):
            parser.error(f"{files}: file not found; run make bench, which creates it")
        if peers:
            print(
                f"bench: work {name} is not compared with {', '.join(peers)}: {files}: file not found; run make bench, "
                "which creates it",
                file=sys.stderr,
            )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gruppo-bench-")))
        works, bench = make_works(folder, args.quick), Bench(args, folder)
        try:
            for work in (works[name] for name in chosen):
                (folder / f"{work.name}.json").write_text(json.dumps(asdict(work)))
                bench.compare(work, missing[work.name])
        except (SideError, DifferentWorkError) as error:
            print(f"bench: {error}", file=sys.stderr)
            sys.exit(1)
    print(args.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
