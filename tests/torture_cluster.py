"""`make torture-cluster`: compare runs with [cluster] whose processes die or hang with runs that nothing happens to.

Every case first does one tiny run undisturbed. The same command then runs again and again, and each time some of its
processes are killed (SIGKILL), stopped for good (SIGSTOP), or lose their machine. If a fault ends the run, the same
command continues it. In the end the run folder must equal the undisturbed one to the last bit, as in tests/torture.py,
but for

- `engine/idle_share` and `engine/load_seconds`, which are times;
- `engine/0/version` and so on: an engine that is being replaced has older weights, or none (-1), when a step ends;
- the events that report what happened.

Besides, every step must have trained on all of its prompts and on no completion twice, every death must be reported in
one line with its cause, a run must go on or end within `cluster.patience` and a margin, and no process may be left.

    python -m tests.torture_cluster [--faults 48] [--cases "engines; ranks"] [--seed 0] [--run 3]

A fault comes at a random time, or just before or after a random call of one phase in the process that leads the run; it
waits meanwhile. Processes of a run are forked as in tests/torture.py; those of Ray are started by Ray. Two
machines are network namespaces, for which root is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import pyarrow.parquet as pq

from gruppo.actors import needs
from gruppo.runs.reading import read_lines
from tests.forked import around, end_survivors, fork_command, save_tiny_model
from tests.machines import TOKEN, Scene, free_port, no_machines, scene
from tests.outcomes import LOSSES, OF_LOSSES, differences, outcome
from tests.small_runs import recipe_folder
from tests.torture_faults import CASES, Case, Fault, plan

PATIENCE = 12.0  # cluster.patience of all runs
STARTING = 75.0  # in place of the five minutes that an engine may take to start
MARGIN = 90.0  # seconds that a fault may cost besides: a start of an engine, on a busy machine
LEFT_SECONDS = 20.0  # that processes have to notice that the run is over
LEFT_OF_RAY = 150.0  # that the small agents of a Ray have whose run was killed
ACTORS = {"engine": "EngineActor", "rank": "RankActor", "reward host": "HostActor"}  # victim -> class of its actor
UNREACHABLE = "it cannot be reached"  # Ray says so at first of a process, or a machine, that is gone or hangs
CAUSES = {
    "killed": rf"killed or crashed|machine is gone|has ended, or is silent since|{UNREACHABLE}",
    "stopped": rf"silent for \d+ s|is silent since|{UNREACHABLE}",
    "unplugged": rf"silent for \d+ s|machine is gone|killed or crashed|{UNREACHABLE}",
}


@dataclass
class Inflicted:
    """A fault that has happened. `pid`: of its victim, 0 if nobody has to notice. `lines`: of metrics.jsonl by then."""

    fault: Fault
    pid: int
    lines: int


class Hooks:
    """In the leader: counts calls. At the moment of a fault, tells the number of the fault, and waits until it has
    happened."""

    def __init__(self, calls: dict[str, str], faults: Sequence[Fault], tell: int, hear: int) -> None:
        self.due = {(fault.phase, fault.moment, fault.after): number for number, fault in enumerate(faults)}
        self.tell, self.hear, self.lock = tell, hear, threading.Lock()
        self.tally: Counter[str] = Counter()
        for name, target in calls.items():
            around(target, partial(self.call, name, False), partial(self.call, name, True))

    def call(self, name: str, after: bool) -> None:
        with self.lock:
            self.tally[name] += not after
            number = self.due.pop((name, self.tally[name], after), None)
        if number is not None:
            os.write(self.tell, bytes([number]))
            os.read(self.hear, 1)


@dataclass
class Life:
    """One start of the command, until its processes have ended."""

    code: int = 0
    inflicted: list[Inflicted] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    log: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    lines: int = 0


@dataclass
class Trial:
    """A case under test: its folder, and duration, call counts and outcome of its undisturbed run."""

    name: str
    case: Case
    folder: Path
    scene: Scene
    seconds: float = 0.0
    tally: dict[str, int] = field(default_factory=dict)
    expected: dict[str, Any] = field(default_factory=dict)

    def live(self, out: Path, faults: Sequence[Fault]) -> Life:
        """Start the command, let the faults happen, and wait for the end of its processes."""
        life, log = Life(), self.folder / "log.txt"
        log.unlink(missing_ok=True)
        mark = f"{os.getpid()}-{random.randrange(2**32)}"
        told, tell = os.pipe()
        hear, answer = os.pipe()
        port = free_port()
        calls = [fault for fault in faults if fault.phase != "time"]

        def prepare(rank: int) -> Callable[[], None]:
            self.scene.home.enter()
            if self.case.launched > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.case.launched)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            if rank:
                return lambda: None
            needs.START_SECONDS = STARTING
            hooks = Hooks(self.case.calls, calls, tell, hear)
            return lambda: (self.folder / "tally.json").write_text(json.dumps(hooks.tally)) and None

        command = ["gruppo", "train", str(self.folder / "recipe.toml"), "--out", str(out), "--resume"]
        ranks = [fork_command(command, log, mark, partial(prepare, rank)) for rank in range(self.case.launched)]
        self.scene.home.roots |= set(ranks) if self.case.local else set()
        watch = Watch(self, out, ranks, life)
        watch.later += [(watch.began + fault.moment, fault) for fault in faults if fault.phase == "time"]
        try:
            self._attend(watch, told, answer, calls)
        finally:
            watch.end()
            for descriptor in (told, tell, hear, answer):
                os.close(descriptor)
        if alive := end_survivors(mark, False, LEFT_OF_RAY if self.case.local and life.code < 0 else LEFT_SECONDS):
            life.problems.append(f"left alive: {alive}")
        self.scene.home.roots -= set(ranks)
        if alive := self.scene.left(ACTORS.values(), LEFT_SECONDS):
            life.problems.append(f"left alive: {alive}")
        life.log = log.read_text()
        life.events = list(read_lines(out / "events.jsonl")) if (out / "events.jsonl").is_file() else []
        life.lines = lines_of(out)
        if any(fault.victim == "machine" for fault in faults):
            self.scene.restore()
        return life

    def _attend(self, watch: Watch, told: int, answer: int, calls: Sequence[Fault]) -> None:
        """Let faults happen until the processes have ended. `calls`: those that come with a call of the leader."""
        while not watch.over():
            if select.select([told], [], [], 0.05)[0]:
                fault = calls[os.read(told, 1)[0]]
                if fault.phase == "starting" and fault.victim in ACTORS:  # its process comes later
                    watch.later.append((time.monotonic() + 5 * fault.which, fault))
                else:
                    watch.inflict(fault)
                os.write(answer, b".")
            watch.tick()


class Watch:
    """Does things to the processes of a life, and waits for their end."""

    def __init__(self, trial: Trial, out: Path, ranks: list[int], life: Life) -> None:
        self.trial, self.out, self.life = trial, out, life
        self.ranks: list[int | None] = [*ranks]
        self.codes: list[int] = [0] * len(ranks)
        self.began = time.monotonic()
        self.deadline = self.began + 3 * trial.seconds + MARGIN
        self.later: list[tuple[float, Fault]] = []
        self.links: list[float] = []

    def inflict(self, fault: Fault) -> None:
        """Let a fault happen, if its victim is there."""
        scene, sign = self.trial.scene, signal.SIGSTOP if fault.way == "stopped" else signal.SIGKILL
        lines = lines_of(self.out)
        if fault.victim == "machine":
            pids = [one.pid for name in ACTORS.values() for one in scene.machines[1].actors(name)] or [0]
            if fault.way == "killed, and back":
                scene.restore()
            elif fault.way == "killed":
                scene.machines[1].kill()
            else:
                scene.machines[1].connect(False)
            if fault.way == "unplugged for 3 s":
                self.links.append(time.monotonic() + 3)
                pids = [0]
        else:
            pids = self._pids(fault.victim)
            pids = pids[int(fault.which * len(pids)) :][:1]
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sign)
        self.life.inflicted += [Inflicted(fault, pid, lines) for pid in pids]
        self.deadline += (PATIENCE + MARGIN) if pids else 0

    def _pids(self, victim: str) -> list[int]:
        if victim in ACTORS and self.trial.case.launched == 1:
            return [process.pid for process in self.trial.scene.actors(ACTORS[victim])]
        ranks = self.ranks[:1] if victim == "leader" else self.ranks[1:]
        return [pid for pid in ranks if pid is not None]

    def tick(self) -> None:
        """Do what is due. A process that Ray starts may come later."""
        now = time.monotonic()
        for due, fault in [*self.later]:
            if now > due and self._is_there(fault):
                self.later.remove((due, fault))
                self.inflict(fault)
        for due in [due for due in self.links if now > due]:
            self.links.remove(due)
            self.trial.scene.machines[1].connect(True)
        if now > self.deadline:
            self.life.problems.append(f"hangs after {now - self.began:.0f} s")
            for pid in self._alive():
                os.kill(pid, signal.SIGUSR1)  # writes its stacks into the log
            time.sleep(1)
            self.end()

    def _is_there(self, fault: Fault) -> bool:
        if fault.victim not in ACTORS or self.trial.case.launched > 1:
            return True
        titles = [process.cmdline()[0] for process in self.trial.scene.actors(ACTORS[fault.victim])]
        return any(title.endswith(".hello") for title in titles) if fault.phase == "starting" else bool(titles)

    def over(self) -> bool:
        """Whether all processes of the command have ended. Does what a launcher does: once one has failed, those that
        were stopped are killed, and the others have to notice."""
        for place, pid in enumerate(self.ranks):
            if pid is not None and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                self.ranks[place], self.codes[place] = None, os.waitstatus_to_exitcode(ended[1])
                if self.codes[place]:
                    self.deadline = min(self.deadline, time.monotonic() + PATIENCE + MARGIN)
        alive = self._alive()
        stopped = {one.pid for one in self.life.inflicted if one.fault.way == "stopped"}
        if any(self.codes) and alive and stopped.issuperset(alive):
            self.end()
        self.life.code = next((code for code in self.codes if code), 0)
        return not alive

    def _alive(self) -> list[int]:
        return [pid for pid in self.ranks if pid is not None]

    def end(self) -> None:
        """Kill the processes of the command that are alive."""
        for pid in self._alive():
            os.kill(pid, signal.SIGKILL)


def lines_of(out: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return (out / "metrics.jsonl").read_text().count("\n")
    return 0


def unreported(life: Life, case: Case) -> list[str]:
    """What a life should have reported in one line, and has not. A fault near its end may stay unnoticed."""
    problems, lag = [], int(case.cluster.get("lag", 0))
    lost = [event for event in life.events if event["kind"].endswith("_lost")]
    for one in life.inflicted:
        fault = one.fault
        if (fault.victim == "leader" and case.launched == 1) or not one.pid:
            continue
        if fault.victim in case.fatal:
            said = [line for line in life.log.splitlines() if line.startswith("gruppo: rank")]
        else:
            ended = life.code != 0 or life.lines - one.lines < 2 + lag  # before anyone had to notice
            said = [event["message"] for event in lost if f"process {one.pid} " in event["message"]]
            if not said:  # it had not said yet which process it is
                said = [event["message"] for event in lost if "(process" not in event["message"]][:1]
            if ended and not said:
                continue
        ways = [other.fault.way for other in life.inflicted if other.pid == one.pid]  # either may be noticed
        cause = "|".join(CAUSES[way.split(",")[0].split(" ")[0]] for way in ways)
        if len(said) != 1 or "\n" in said[0] or not re.search(cause, said[0]):
            problems.append(f"{fault} (process {one.pid}) is not reported in one line with its cause: {said}")
    return problems


def miscounted(out: Path) -> list[str]:
    """Whether a run has lost a completion, has not rewarded one, or has one twice, and whether its steps went through
    the prompts in turn."""
    problems, prompts = [], Counter[str]()
    steps = [pq.read_table(path).to_pylist() for path in sorted((out / "rollouts").iterdir())]
    for rows in steps:
        places = Counter((row["step"], row["group"], row["completion"]) for row in rows)
        groups = {(row["step"], row["group"]): row["prompt_id"] for row in rows}
        sizes = {size for _, size in Counter((row["step"], row["group"]) for row in rows).items()}
        prompts.update(groups.values())
        problems += [f"rollouts: groups have {sorted(sizes)} completions"] if len(sizes) > 1 else []
        problems += [f"rollouts: {place} is there {count} times" for place, count in places.items() if count > 1]
        problems += [f"rollouts: {row['prompt_id']} has no reward" for row in rows if row["reward"] is None]
    if max(prompts.values()) > min(prompts.values()) + 1:
        problems.append(f"rollouts: prompts are sampled unequally often: {prompts}")
    return problems


def torture(trial: Trial, seed: int, run: int) -> tuple[list[Inflicted], list[str]]:
    """One run with its faults. Returns those that happened, and what is wrong afterwards."""
    out, pending, problems = trial.folder / "run", plan(trial.name, trial.tally, trial.seconds, seed, run), list[str]()
    inflicted: list[Inflicted] = []
    finished = False
    while not (finished or problems):
        fatal = next((place for place, fault in enumerate(pending) if fault.victim in trial.case.fatal), len(pending))
        life = trial.live(out, pending[: fatal + 1])
        inflicted += life.inflicted
        happened = [one.fault for one in life.inflicted]
        pending = [fault for fault in pending if fault not in happened]
        problems += life.problems + unreported(life, trial.case)
        finished = life.code == 0
        if not finished and not any(fault.victim in trial.case.fatal for fault in happened):
            problems.append(f"exit code {life.code}")
        if problems:
            problems.append("\n" + "\n".join(life.log.splitlines()[-40:]))
    if finished:
        problems += differences(outcome(out, OF_LOSSES, LOSSES), trial.expected)[:8] + miscounted(out)
    if problems:
        shutil.copytree(out, trial.folder / f"failed-{run}", dirs_exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    return inflicted, problems


def prepare(name: str, root: Path, scene: Scene) -> Trial:
    """Write a case's recipe and do its undisturbed run."""
    case, folder = CASES[name], root / name.replace(" ", "-")
    cluster = {"cluster__address": scene.address, "cluster__patience": PATIENCE}
    cluster |= {f"cluster__{field}": value for field, value in case.cluster.items()}
    recipe_folder(folder, root / "model", **{**cluster, "sampling__max_tokens": 24, **case.changes})
    trial = Trial(name, case, folder, scene, 600.0)
    start = time.monotonic()
    life = trial.live(folder / "whole", [])
    trial.seconds = time.monotonic() - start
    if life.code or life.problems:
        raise AssertionError(f"{name}: cannot be run: {life.code} {life.problems}\n{life.log}")
    trial.tally = json.loads((folder / "tally.json").read_text())
    trial.expected = outcome(folder / "whole", OF_LOSSES, LOSSES)
    problems = miscounted(folder / "whole")
    assert not problems, problems
    return trial


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 if all faults happened and all runs passed."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n", maxsplit=1)[0])
    parser.add_argument("--faults", type=int, default=48, help="least number of faults, over all cases")
    parser.add_argument("--cases", default="; ".join(CASES), help="cases to test, separated by semicolons")
    parser.add_argument("--seed", type=int, default=0, help="determines the faults")
    parser.add_argument("--run", type=int, help="do only the run with this number of each case")
    parser.add_argument("--keep", type=Path, help="work in this new folder and keep everything in it")
    args = parser.parse_args(arguments)
    os.environ |= TOKEN
    names = [name.strip() for name in args.cases.split(";")]
    if "machines" in names and (why := no_machines()):
        print(f"machines: skipped: {why}")
        names.remove("machines")
    counts, failed = Counter[str](), 0
    with contextlib.ExitStack() as stack:
        root = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root.mkdir(exist_ok=True)
        save_tiny_model(root / "model")
        for place, name in enumerate(names):
            share = args.faults * (place + 1) // len(names) - args.faults * place // len(names)
            with scene(name == "machines", not CASES[name].local) as place_of_runs:
                trial = prepare(name, root, place_of_runs)
                print(f"{name}: undisturbed in {trial.seconds:.0f} s", flush=True)
                done = 0
                for run in itertools.count() if args.run is None else [args.run]:
                    if done >= share and args.run is None:
                        break
                    began = time.monotonic()
                    inflicted, problems = torture(trial, args.seed, run)
                    done += len(inflicted)
                    counts.update(f"{one.fault.victim} {one.fault.way}" for one in inflicted)
                    where = ", ".join(str(one.fault) for one in inflicted) or "nothing happened"
                    result = "; ".join(problems) or "equal"
                    print(f"{name}, run {run} ({time.monotonic() - began:.0f} s): {where}: {result}", flush=True)
                    if problems:
                        failed += 1
                        again = f'--cases "{name}" --seed {args.seed} --run {run}'
                        print(f"to repeat: python -m tests.torture_cluster {again}", flush=True)
    print("faults: " + ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    print(f"{sum(counts.values())} faults, {failed} runs failed")
    return int(failed > 0 or (args.run is None and sum(counts.values()) < args.faults))


if __name__ == "__main__":
    sys.exit(main())
