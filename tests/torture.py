"""`make torture`: runs that are killed at any instant and resumed by the same command, against runs that nobody kills.

For every method a tiny run is made in peace. Then the same command is killed with SIGKILL, again and again, and at last
left to end; what it left behind is compared bit for bit: weights, optimizer and state of every checkpoint, the result,
every table, every metric but time/* and memory/*, every event but resumes. No file may be left half written, and no
reward process alive.

    python -m tests.torture [--kills 140] [--cases "grpo; ppo"] [--seed 0] [--forked]

A kill comes at a random time, just before or after a random call of one phase (sampling, rewarding, updating, …), just
before a random operation on a file of the run (open, rename, link, remove), or as a power cut: where a file would be
synced, what was not synced yet is cut off or zeroed first. The hooks stand here, none in the product.

Processes are forked from one that has imported gruppo, so that a start takes a fraction of a second; they run the
command line's own `main`. In full, each method's undisturbed run and one of its kills are of `python -m gruppo.cli.main`.
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
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import psutil
import tomli_w

import gruppo.cli.main
import gruppo.training.loop
import gruppo.training.setup
from gruppo.runs.reading import read_lines
from tests.conftest import make_policy
from tests.small_runs import ROWS, recipe

LETTERS = "tests/rewards/functions.py:likes_letters"
FIRST_LETTER = "tests/rewards/functions.py:begins_with_a_letter"
VOWELS = "tests/rewards/functions.py:ends_in_a_vowel"
RULE = {"reward__functions": [FIRST_LETTER], "sampling__temperature": 0.7}
ITERATED = {
    "run__iterations": 3, "reward__functions": [VOWELS], "reward__weights": [0.0], "reward_model__prompts": 8,
    "reward_model__epochs": 2, "reward_model__batch_size": 8, "reward_model__learning_rate": 1e-3,
    "reward_model__replay_fraction": 0.2,
}  # fmt: skip

# Changes to the recipe of tests/small_runs.py; "None" takes a field away.
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"method__inner_updates": 2, "audit__function": VOWELS, "audit__window": 4},
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
        "environment__name": "tests/rollout/environments/worlds.py:Letters", "environment__workers": 1, "sampling__max_tokens": 16,
    },
    "grpo-process": {"method__name": "grpo-process", "reward__functions": ["tests/rewards/functions.py:steps"]},
}  # fmt: skip
QUICK = ("grpo", "iterative, process", "ppo")

# What is counted of each phase; a kill comes just before or just after one of these calls.
CALLS = {
    "loading": "gruppo.training.setup.load_model",
    "restoring": "gruppo.training.checkpointer.load_tensors",
    "sampling": "gruppo.engines.native.engine._Decoder.decode",
    "rewarding": "gruppo.rollout.workers.process.Worker._receive",
    "evaluating": "gruppo.evaluation.verdicts.mark",
    "labelling": "gruppo.training.iterations.label_rows",
    "training a reward model": "gruppo.training.reward_model.update",
    "computing a loss": "gruppo.training.optimizer.release_memory",
    "updating": "gruppo.training.optimizer.torch.optim.AdamW.step",
    "writing a checkpoint": "gruppo.training.checkpoint.save_file",
    "writing a table": "gruppo.runs.folder.pq.write_table",
    "writing a line": "gruppo.runs.folder.RunFolder._append",
}
FILES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"}
MARK = "GRUPPO_TORTURE"  # in the environment of a run and of all that it starts
PATIENCE = 10.0  # seconds in which reward processes notice that they are alone
LIFE = 5  # kills of a run, at the most


@dataclass(frozen=True)
class Kill:
    """`how`: "time", "file" or "power", or a phase of CALLS; `moment`: seconds, or which of the operations or calls;
    `after`: behind that call; `everything`: reward processes are killed too, else they have to die by themselves."""

    how: str
    moment: float
    after: bool = False
    everything: bool = False


@dataclass
class Case:
    """A method: its recipe's folder, and of its undisturbed run seconds, counts and all that it left behind."""

    name: str
    folder: Path
    seconds: float = 0.0
    tally: dict[str, int] = field(default_factory=dict)
    wanted: dict[str, Any] = field(default_factory=dict)

    def command(self, out: Path) -> list[str]:
        """What a user types."""
        return ["gruppo", "train", str(self.folder / "recipe.toml"), "--out", str(out), "--resume"]


class Hooks:
    """In a forked process: counts what happens, and dies at one of it."""

    def __init__(self, out: Path, kill: Kill | None, seed: int) -> None:
        self.out, self.kill, self.random = str(out), kill, random.Random(seed)
        self.tally: Counter[str] = Counter()
        self.start = time.time_ns()
        self.synced: dict[int, tuple[int, int]] = {}  # inode -> (time, size) of its last sync
        for name, target in CALLS.items():
            self._count(name, target)
        sync = os.fsync

        def synced(descriptor: int) -> None:
            if self._due("power"):
                self._cut(descriptor)
                die()
            sync(descriptor)
            held = os.fstat(descriptor)
            self.synced[held.st_ino] = (time.time_ns(), held.st_size)

        os.fsync = synced
        sys.addaudithook(self._audit)

    def _due(self, name: str, after: bool = False) -> bool:
        self.tally[name] += not after
        kill = self.kill
        return kill is not None and (name, self.tally[name], after) == (kill.how, kill.moment, kill.after)

    def _count(self, name: str, target: str) -> None:
        place, _, attribute = target.rpartition(".")
        original = resolve_name(target)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._due(name):
                die()
            result = original(*args, **kwargs)
            if self._due(name, after=True):
                die()
            return result

        setattr(resolve_name(place), attribute, counted)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Operations on files of the run; those of rmtree name a file by its folder's descriptor."""
        if event not in FILES or not isinstance(arguments[0], str | Path):
            return
        path = str(arguments[0])
        if not path.startswith(self.out) and not (event in {"os.remove", "os.rmdir"} and not os.path.isabs(path)):
            return
        if event == "open":
            if not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return
            with contextlib.suppress(FileNotFoundError):
                held = os.stat(path)
                self.synced.setdefault(held.st_ino, (self.start, held.st_size))
        if event == "os.rename":
            self._check_synced(Path(path))
        if self._due("file"):
            die()

    def _check_synced(self, path: Path) -> None:
        """What gets a name has to be on the disk by then."""
        for each in [path, *path.rglob("*")]:
            held = each.stat()
            if stat.S_ISREG(held.st_mode) and held.st_mtime_ns > self.synced.get(held.st_ino, (self.start, 0))[0]:
                self.tally[f"not synced: {each.name}"] += 1

    def _cut(self, descriptor: int) -> None:
        """What a power cut may do to a file: of what was not synced some is gone, or there as zeros."""
        held = os.fstat(descriptor)
        when, whole = self.synced.get(held.st_ino, (self.start, 0))
        if not stat.S_ISREG(held.st_mode) or held.st_mtime_ns <= when:
            return
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        os.truncate(path, self.random.randint(min(whole, held.st_size), held.st_size))
        if self.random.random() < 0.5:
            os.truncate(path, held.st_size)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def become(case: Case, out: Path, kill: Kill | None, seed: int, mark: str) -> NoReturn:
    """In a forked process: run the command line's main, and write what was counted."""
    code = 1
    try:
        os.setsid()
        log = os.open(case.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ[MARK] = mark
        hooks = Hooks(out, kill, seed)
        sys.argv = case.command(out)
        try:
            gruppo.cli.main.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stdout.flush()
        (case.folder / "tally.json").write_text(json.dumps(hooks.tally))
    except BaseException:  # noqa: BLE001  nothing of this process may run on in the parent's code
        traceback.print_exc()
    finally:
        os._exit(code)


def run_forked(case: Case, out: Path, kill: Kill | None, seed: int, mark: str) -> int:
    """The command in a forked process; its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        become(case, out, kill, seed, mark)
    if kill and kill.how == "time":
        time.sleep(kill.moment)
        os.kill(child, signal.SIGKILL)  # nobody has waited for it yet: the number is still its own
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_real(case: Case, out: Path, kill: Kill | None, mark: str) -> int:
    """The same by `python -m gruppo.cli.main`, which can be killed at a time only."""
    command = [sys.executable, "-m", "gruppo.cli.main", *case.command(out)[1:]]
    with (case.folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, MARK: mark})
        try:
            return process.wait(kill.moment if kill else None)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def survivors(mark: str) -> list[psutil.Process]:
    """The processes that a run has started and that are alive."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def left_alone(mark: str, everything: bool) -> list[str]:
    """Wait for, or kill, what a dead run has started; the commands of what does not end."""
    if everything:
        for process in survivors(mark):
            with contextlib.suppress(psutil.Error):
                process.kill()
    _, alive = psutil.wait_procs(survivors(mark), PATIENCE)
    commands = [" ".join(process.cmdline()) for process in alive]
    for process in alive:
        process.kill()
    return commands


def outcome(out: Path) -> dict[str, Any]:
    """All that two equal runs have in common, by name. Files are compared byte by byte, but for times, memory, places
    in files that hold times, and events of resumes."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file() or path.name.startswith(".")):
        name = str(path.relative_to(out))
        if path.suffix in {".safetensors", ".parquet"} or ".writing" in name or path.name.startswith("."):
            found[name] = path.read_bytes() if path.is_file() else ""
        elif path.name == "state.json":
            found[name] = without(json.loads(path.read_text()), {"train_seconds", "peak_memory_bytes", "lengths"})
        elif path.name == "manifest.json":
            found[name] = without(json.loads(path.read_text()), {"state.json"})
    found["summary.json"] = without(
        json.loads((out / "summary.json").read_text()), {"train_seconds", "peak_memory_bytes"}
    )
    for number, line in enumerate(read_lines(out / "metrics.jsonl")):
        found[f"metrics.jsonl, line {number + 1}"] = {
            name: value for name, value in line.items() if not name.startswith(("time/", "memory/"))
        }
    events = [event for event in read_lines(out / "events.jsonl") if event["kind"] != "resume"]
    found["events.jsonl"] = [without(event, {"time"}) for event in events]
    return found


def without(content: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in names}


def differences(got: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The names of what is not the same in both."""
    return [
        f"{name} {'is missing' if name not in got else 'is there' if name not in wanted else 'differs'}"
        for name in sorted({*got, *wanted})
        if (name in got) != (name in wanted) or got[name] != wanted[name]
    ]


def prepare(name: str, root: Path, real: bool) -> Case:
    """Write a case's recipe, and make the run that nobody kills."""
    folder = root / name.replace(", ", "-")
    folder.mkdir()
    rows = [{**row, "completion": row["prompt"] + "z"} for row in ROWS] if name == "sft" else ROWS
    for file, content in {"rows": rows, "questions": [{"prompt": each, "answer": "a"} for each in "abc"]}.items():
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    changes = {"evaluation__grader": "exact_match", "evaluation__every": 2, "evaluation__samples": 2,
               "evaluation__decoding": {"temperature": 1.0}, **CASES[name]}  # fmt: skip
    data = recipe(str(root / "model"), **changes)
    data = {section: {key: value for key, value in held.items() if value is not None} for section, held in data.items()}
    data["run"]["memory"] = "2 GB"
    data["task"] = {"name": str(folder / "rows.jsonl")}
    data["evaluation"]["task"] = str(folder / "questions.jsonl")
    (folder / "recipe.toml").write_text(tomli_w.dumps(data))
    case = Case(name, folder)
    start = time.monotonic()
    ended = {"forked": run_forked(case, folder / "whole", None, 0, "whole")}
    case.seconds = time.monotonic() - start
    case.tally = json.loads((folder / "tally.json").read_text())
    assert not [each for each in case.tally if each.startswith("not synced")], case.tally
    case.wanted = outcome(folder / "whole") if ended["forked"] == 0 else {}
    if real and not ended["forked"]:
        ended["real"] = run_real(case, folder / "real", None, "real")
        problems = differences(outcome(folder / "real"), case.wanted) if ended["real"] == 0 else []
        assert not problems, f"{name}: a run in a process of its own differs: {problems[:5]}"
    assert not any(ended.values()), f"{name}: cannot be run: {ended}\n{tail(case)}"
    return case


def tail(case: Case) -> str:
    return "\n".join((case.folder / "log.txt").read_text().splitlines()[-15:])


def choose(case: Case, begun: bool, hit: Counter[str], source: random.Random) -> Kill:
    """Somewhere in the run, more often near its start, as a run that goes on does less than a whole one; of phases one
    that was hit least so far. `begun`: there may be something to go back to."""
    everything = source.random() < 0.5
    how = source.choice(["time", "file", "power", *(3 * ["call"])])
    if how == "time":
        return Kill("time", source.uniform(0, case.seconds), everything=everything)
    if how == "call":
        phases = [name for name in CALLS if (begun if name == "restoring" else case.tally.get(name))]
        how = min(source.sample(phases, len(phases)), key=lambda name: hit[name])
    most = max(1, case.tally.get(how, 1) // source.choice([1, 3, 10]))
    return Kill(how, source.randint(1, most), how in CALLS and source.random() < 0.5, everything)


@dataclass
class Report:
    """Kills by where they came; of runs that came out equal, and of others."""

    where: Counter[str] = field(default_factory=Counter)
    passed: int = 0
    failed: int = 0


def torture(case: Case, kills: int, source: random.Random, real: bool, report: Report) -> None:
    """Kill runs of the case so often, a few times each, and compare what they come to at last."""
    done = 0
    while done < kills:
        out, suffered, problems, ended = case.folder / "run", list[Kill](), list[str](), False
        while not ended:
            seed = source.randrange(2**32)
            mark = f"{os.getpid()}-{seed}"
            kill = (
                choose(case, bool(suffered), report.where, source) if len(suffered) < min(LIFE, kills - done) else None
            )
            if real and kill and kill.how == "time" and source.random() < 0.3:
                kill = Kill("time", source.uniform(3, 12), everything=kill.everything)
                code = run_real(case, out, kill, mark)
            else:
                code = run_forked(case, out, kill, seed, mark)
            if alive := left_alone(mark, bool(kill and kill.everything)):
                problems.append(f"left alive: {alive}")
            if code == -signal.SIGKILL and kill:
                suffered.append(kill)
            elif code:
                problems.append(f"exit code {code}: {tail(case)}")
            ended = code != -signal.SIGKILL
        problems += differences(outcome(out), case.wanted) if not problems else []
        where = ", ".join(f"{kill.how} {kill.moment:.3g}{'+' * kill.after}" for kill in suffered)
        print(f"{case.name}: killed at {where or 'nothing'}: {'; '.join(problems[:8]) or 'equal'}", flush=True)
        report.where.update(kill.how for kill in suffered)
        report.passed += 0 if problems else len(suffered)
        report.failed += max(1, len(suffered)) if problems else 0
        done += max(1, len(suffered)) if problems else len(suffered)
        if problems:
            shutil.copytree(out, case.folder / f"failed-{report.failed}", dirs_exist_ok=True)
        shutil.rmtree(out)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 where all passed."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n", maxsplit=1)[0])
    parser.add_argument("--kills", type=int, default=140, help="in all")
    parser.add_argument("--cases", default="; ".join(CASES), help="which methods, with ; between them")
    parser.add_argument("--seed", type=int, default=0, help="decides the kills, but for what a time hits")
    parser.add_argument("--forked", action="store_true", help="no processes of their own: quicker")
    parser.add_argument("--keep", type=Path, help="work in this new folder, and leave everything there")
    asked = parser.parse_args(arguments)
    names = [name.strip() for name in asked.cases.split(";")]
    report, source = Report(), random.Random(asked.seed)
    with contextlib.ExitStack() as stack:
        root = asked.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root.mkdir(exist_ok=True)
        if os.fork() == 0:  # so that no torch thread ever runs in the process that is forked
            from gruppo.models.weights import save_model

            save_model(make_policy(initializer_range=0.02), root / "model")
            os._exit(0)
        os.wait()
        for place, name in enumerate(names):
            case = prepare(name, root, not asked.forked)
            share = asked.kills * (place + 1) // len(names) - asked.kills * place // len(names)
            torture(case, share, source, not asked.forked, report)
    print("kills: " + ", ".join(f"{name} {count}" for name, count in report.where.most_common()))
    print(f"{report.passed} passed, {report.failed} failed")
    return int(report.failed > 0 or report.passed < asked.kills)


if __name__ == "__main__":
    sys.exit(main())
