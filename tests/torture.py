"""`make torture`: compare runs that are killed at any instant and resumed with runs that are never killed.

Every method first does one tiny run undisturbed; the case "extended" reaches its length in several runs, of which each
extends the one before. The same command is then killed with SIGKILL several times and finally
allowed to finish. Its run folder must equal the undisturbed one exactly: weights, optimizer and state of every
checkpoint, the result, every table, every metric except time/* and memory/*, every event except resumes. No file may be
left half written, and no reward process alive.

    python -m tests.torture [--kills 140] [--cases "grpo; ppo"] [--seed 0] [--forked]

A kill comes at a random time, just before or after a random call of one phase (sampling, rewarding, updating, …), just
before a random operation on a file of the run (open, rename, link, remove), or as a power cut: when a file is about to
be synced, its unsynced part is cut off or zeroed first. All hooks are in this file; gruppo itself has none.

Processes are forked from one that has imported gruppo, so that a start takes a fraction of a second. They run the
command line's `main`. Without --forked, every method does one undisturbed run with `python -m gruppo.cli.main` too, and
some of its kills at a time hit that command.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from tests.forked import MARK, around, end_survivors, fork_command, save_tiny_model
from tests.outcomes import differences, outcome
from tests.small_runs import ROWS, recipe_folder

LETTERS = "tests/rewards/functions.py:likes_letters"
FIRST_LETTER = "tests/rewards/functions.py:begins_with_a_letter"
VOWELS = "tests/rewards/functions.py:ends_in_a_vowel"
RULE = {"reward__functions": [FIRST_LETTER], "sampling__temperature": 0.7}
ITERATED = {
    "run__iterations": 3, "reward__functions": [VOWELS], "reward__weights": [0.0], "reward_model__prompts": 8,
    "reward_model__epochs": 2, "reward_model__batch_size": 8, "reward_model__learning_rate": 1e-3,
    "reward_model__replay_fraction": 0.2,
}  # fmt: skip

# Changes to the recipe of tests/small_runs.py; None removes a field.
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"method__inner_updates": 2, "method__minibatches": 2, "audit__function": VOWELS, "audit__window": 4},
    "lora": {"model__lora": {"rank": 2}, "method__inner_updates": 2},
    "iterative, outcome": {**ITERATED, "reward_model__kind": "outcome"},
    "iterative, process": {
        **ITERATED, "method__name": "grpo-process", "reward_model__kind": "process", "reward_model__continuations": 2,
        "reward_model__split": "tests/functions_of_users.py:every_two",
    },
    "ppo": {"method__name": "ppo", "method__kl_coef": None, **RULE},
    "dapo": {"method__name": "dapo", "method__kl_coef": None, **RULE},
    "sft": {"method__name": "sft", "method__kl_coef": None, "reward__functions": None, "reward__workers": None},
    "rft": {"method__name": "rft", "method__kl_coef": None, **RULE},
    "online-rft": {"method__name": "online-rft", "method__kl_coef": None, **RULE},
    "dpo": {"method__name": "dpo", "method__kl_coef": None, **RULE},
    "rloo": {"method__name": "rloo", "method__kl_coef": None, **RULE},
    "reinforce-pp": {"method__name": "reinforce-pp", "method__kl_coef": None, **RULE},
    "gspo": {"method__name": "gspo", "method__kl_coef": None, **RULE},
    "several turns": {
        "environment__name": "tests/rollout/environments/worlds.py:Letters", "environment__workers": 1,
        "sampling__max_tokens": 16,
    },
    "grpo-process": {"method__name": "grpo-process", "reward__functions": ["tests/rewards/functions.py:steps"]},
    "ahead": {
        "method__name": "dapo", "method__kl_coef": None, "method__tis_cap": 2.0, "cluster__lag": 2, **RULE,
    },
    "extended": {"optimizer__schedule": "constant", "method__inner_updates": 2},
}  # fmt: skip
LENGTHS = {"extended": (2, 4)}  # steps of the runs that are extended to the length of the recipe
QUICK = ("grpo", "iterative, process", "ppo", "extended")

# Phase -> the function whose calls are counted; a kill comes just before or just after one of these calls.
CALLS = {
    "loading": "gruppo.training.setup.load_model",
    "restoring": "gruppo.training.model_files.load_models",
    "sampling": "gruppo.engines.native.engine._Decoder.decode",
    "rewarding": "gruppo.rollout.workers.process.Worker._receive",
    "evaluating": "gruppo.evaluation.verdicts.grade_answer",
    "labelling": "gruppo.training.iterations.label_rows",
    "training a reward model": "gruppo.training.reward_model.update",
    "computing a loss": "gruppo.training.optimizer.release_memory",
    "updating": "gruppo.training.optimizer.torch.optim.AdamW.step",
    "writing a checkpoint": "gruppo.training.shard_files.save_file",
    "writing a table": "gruppo.runs.folder.pq.write_table",
    "writing a line": "gruppo.runs.folder.RunFolder._append",
}
FILES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"}
PATIENCE = 10.0  # seconds that reward processes have to notice that the run is dead
MAX_KILLS = 5  # per run


@dataclass(frozen=True)
class Kill:
    """When and how a run is killed.

    `how`: "time", "file", "power" or a phase of CALLS. `moment`: seconds, or the number of the operation or call,
    counted from 1. `after`: just after that call. `everything`: reward processes are killed too; otherwise they have to
    exit on their own.
    """

    how: str
    moment: float
    after: bool = False
    everything: bool = False


@dataclass
class Case:
    """A method under test: its folder, and duration, call counts and outcome of its undisturbed run."""

    name: str
    folder: Path
    seconds: float = 0.0
    tally: dict[str, int] = field(default_factory=dict)
    expected: dict[str, Any] = field(default_factory=dict)

    def command(self, out: Path) -> list[str]:
        """The command line that a user would type. A run that is extended goes on to its next length."""
        command = ["gruppo", "train", str(self.folder / "recipe.toml"), "--out", str(out), "--resume"]
        length = self.next_length(out)
        return command if length is None else [*command, "--set", f"run.steps={length}"]

    def next_length(self, out: Path) -> int | None:
        """The first length that the run in the folder has not finished; None for that of the recipe."""
        done = 0
        with contextlib.suppress(FileNotFoundError, ValueError):
            summary = json.loads((out / "summary.json").read_text())
            done = summary["steps"] if summary["state"] == "done" else 0
        newest = max((int(path.name[5:]) for path in out.glob("checkpoints/step-??????")), default=0)
        lengths = LENGTHS.get(self.name, ()) if out.name == "run" else ()
        return next((length for length in lengths if length > done and length >= newest), None)


class Hooks:
    """Counts calls and file operations in a forked process, and kills the process at the moment that `kill` names."""

    def __init__(self, out: Path, kill: Kill | None, seed: int) -> None:
        self.out, self.kill, self.random = str(out), kill, random.Random(seed)
        self.tally: Counter[str] = Counter()
        self.start = time.time_ns()
        self.synced: dict[int, tuple[int, int]] = {}  # inode -> (time, size) of its last sync
        for name, target in CALLS.items():
            around(target, partial(self._call, name, False), partial(self._call, name, True))

        def synced(descriptor: int) -> None:
            """In place of os.fsync, whose work a kill cannot show; `_cut` does what it prevents."""
            if self._due("power"):
                self._cut(descriptor)
                die()
            status = os.fstat(descriptor)
            self.synced[status.st_ino] = (time.time_ns(), status.st_size)

        os.fsync = synced
        sys.addaudithook(self._audit)

    def _due(self, name: str, after: bool = False) -> bool:
        self.tally[name] += not after
        kill = self.kill
        return kill is not None and (name, self.tally[name], after) == (kill.how, kill.moment, kill.after)

    def _call(self, name: str, after: bool) -> None:
        if self._due(name, after):
            die()

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Count operations on files of the run; rmtree names files relative to a folder descriptor."""
        if event not in FILES or not isinstance(arguments[0], str | Path):
            return
        path = str(arguments[0])
        if not path.startswith(self.out) and not (event in {"os.remove", "os.rmdir"} and not os.path.isabs(path)):
            return
        if event == "open":
            if not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(path)
                self.synced.setdefault(status.st_ino, (self.start, status.st_size))
        if event == "os.rename":
            self._check_synced(Path(path))
        if self._due("file"):
            die()

    def _check_synced(self, path: Path) -> None:
        """Count files that were not synced before they get their final name."""
        for file in [path, *path.rglob("*")]:
            status = file.stat()
            if stat.S_ISREG(status.st_mode) and status.st_mtime_ns > self.synced.get(status.st_ino, (self.start, 0))[0]:
                self.tally[f"not synced: {file.name}"] += 1

    def _cut(self, descriptor: int) -> None:
        """Do to a file what a power cut may do: part of its unsynced data is lost or becomes zeros."""
        status = os.fstat(descriptor)
        when, whole = self.synced.get(status.st_ino, (self.start, 0))
        if not stat.S_ISREG(status.st_mode) or status.st_mtime_ns <= when:
            return
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        os.truncate(path, self.random.randint(min(whole, status.st_size), status.st_size))
        if self.random.random() < 0.5:
            os.truncate(path, status.st_size)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_forked(case: Case, out: Path, kill: Kill | None, seed: int, mark: str) -> int:
    """Run the command in a forked process; returns its exit code, or minus the signal that ended it. The process writes
    its counts to tally.json."""
    log = case.folder / "log.txt"
    log.unlink(missing_ok=True)

    def hooked() -> Callable[[], None]:
        hooks = Hooks(out, kill, seed)
        return lambda: (case.folder / "tally.json").write_text(json.dumps(hooks.tally)) and None

    child = fork_command(case.command(out), log, mark, hooked)
    if kill and kill.how == "time":
        time.sleep(kill.moment)
        os.kill(child, signal.SIGKILL)  # not waited for yet, so the process id cannot have been reused
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_real(case: Case, out: Path, kill: Kill | None, mark: str) -> int:
    """The same with `python -m gruppo.cli.main`, which can only be killed at a time."""
    command = [sys.executable, "-m", "gruppo.cli.main", *case.command(out)[1:]]
    with (case.folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, MARK: mark})
        try:
            return process.wait(kill.moment if kill else None)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def prepare(name: str, root: Path, real: bool) -> Case:
    """Write a case's recipe and do its undisturbed run."""
    folder = root / name.replace(", ", "-")
    rows = [{**row, "completion": row["prompt"] + "z"} for row in ROWS] if name == "sft" else ROWS
    recipe_folder(folder, root / "model", rows, **CASES[name])
    case = Case(name, folder)
    start = time.monotonic()
    codes = {"forked": run_forked(case, folder / "whole", None, 0, "whole")}
    case.seconds = time.monotonic() - start
    case.tally = json.loads((folder / "tally.json").read_text())
    assert not [name for name in case.tally if name.startswith("not synced")], case.tally
    case.expected = outcome(folder / "whole") if codes["forked"] == 0 else {}
    if real and not codes["forked"]:
        codes["real"] = run_real(case, folder / "real", None, "real")
        problems = differences(outcome(folder / "real"), case.expected) if codes["real"] == 0 else []
        assert not problems, f"{name}: a run of the real command differs: {problems[:5]}"
    assert not any(codes.values()), f"{name}: cannot be run: exit codes {codes}\n{tail(case)}"
    return case


def tail(case: Case) -> str:
    return "\n".join((case.folder / "log.txt").read_text().splitlines()[-15:])


def choose_kill(case: Case, resumed: bool, hit: Counter[str], source: random.Random) -> Kill:
    """Choose a random moment to kill a run.

    Numbers of calls are small more often than large, because a resumed run makes fewer of them than a whole one. Among
    the phases, one of those hit least so far is chosen. `resumed`: the run may have a checkpoint to restore.
    """
    everything = source.random() < 0.5
    how = source.choice(["time", "file", "power", *(3 * ["call"])])
    if how == "time":
        return Kill("time", source.uniform(0, case.seconds), everything=everything)
    if how == "call":
        phases = [name for name in CALLS if (resumed if name == "restoring" else case.tally.get(name))]
        how = min(source.sample(phases, len(phases)), key=lambda name: hit[name])
    highest = max(1, case.tally.get(how, 1) // source.choice([1, 3, 10]))
    return Kill(how, source.randint(1, highest), how in CALLS and source.random() < 0.5, everything)


@dataclass
class Report:
    """Number of kills by `Kill.how`, in runs that came out equal, and in all others."""

    where: Counter[str] = field(default_factory=Counter)
    passed: int = 0
    failed: int = 0


def torture(case: Case, kills: int, source: random.Random, real: bool, report: Report) -> None:
    """Do `kills` kills, up to MAX_KILLS per run, and compare every run's final outcome with the undisturbed one."""
    done = 0
    while done < kills:
        out, inflicted, problems, finished = case.folder / "run", list[Kill](), list[str](), False
        while not finished:
            extends = case.next_length(out) is not None
            seed = source.randrange(2**32)
            mark = f"{os.getpid()}-{seed}"
            kill = (
                choose_kill(case, bool(inflicted), report.where, source)
                if len(inflicted) < min(MAX_KILLS, kills - done)
                else None
            )
            if real and kill and kill.how == "time" and source.random() < 0.3:
                kill = Kill("time", source.uniform(3, 12), everything=kill.everything)
                code = run_real(case, out, kill, mark)
            else:
                code = run_forked(case, out, kill, seed, mark)
            if alive := end_survivors(mark, bool(kill and kill.everything), PATIENCE):
                problems.append(f"left alive: {alive}")
            if code == -signal.SIGKILL and kill:
                inflicted.append(kill)
            elif code:
                problems.append(f"exit code {code}: {tail(case)}")
            finished = bool(problems) or (code != -signal.SIGKILL and not extends)
        problems += differences(outcome(out), case.expected) if not problems else []
        where = ", ".join(f"{kill.how} {kill.moment:.3g}{'+' * kill.after}" for kill in inflicted)
        print(f"{case.name}: killed at {where or 'no point'}: {'; '.join(problems[:8]) or 'equal'}", flush=True)
        report.where.update(kill.how for kill in inflicted)
        report.passed += 0 if problems else len(inflicted)
        report.failed += max(1, len(inflicted)) if problems else 0
        done += max(1, len(inflicted)) if problems else len(inflicted)
        if problems:
            shutil.copytree(out, case.folder / f"failed-{report.failed}", dirs_exist_ok=True)
        shutil.rmtree(out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 if all kills were done and all runs passed."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n", maxsplit=1)[0])
    parser.add_argument("--kills", type=int, default=140, help="total number of kills")
    parser.add_argument("--cases", default="; ".join(CASES), help="methods to test, separated by semicolons")
    parser.add_argument("--seed", type=int, default=0, help="determines the kills, except what a kill at a time hits")
    parser.add_argument("--forked", action="store_true", help="forked processes only, which is faster")
    parser.add_argument("--keep", type=Path, help="work in this new folder and keep everything in it")
    args = parser.parse_args(arguments)
    names = [name.strip() for name in args.cases.split(";")]
    report, source = Report(), random.Random(args.seed)
    with contextlib.ExitStack() as stack:
        root = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root.mkdir(exist_ok=True)
        save_tiny_model(root / "model")
        for place, name in enumerate(names):
            case = prepare(name, root, not args.forked)
            share = args.kills * (place + 1) // len(names) - args.kills * place // len(names)
            torture(case, share, source, not args.forked, report)
    print("kills: " + ", ".join(f"{name} {count}" for name, count in report.where.most_common()))
    print(f"{report.passed} passed, {report.failed} failed")
    return int(report.failed > 0 or report.passed < args.kills)


if __name__ == "__main__":
    sys.exit(main())
