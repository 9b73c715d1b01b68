"""The run folder: the recipe, the record and the results of a run. Everything that displays a run reads only this.

    recipe.toml  environment.json  metrics.jsonl  events.jsonl  rewards.log  summary.json
    failures/step-000012-….json (calls of rewards)  rewards.old.log  reward_cache.sqlite (answers of reward servers)
    rollouts/step-000012.parquet  evaluations/step-000012.parquet  labels/step-000012.parquet
    checkpoints/step-000010/  reference/ (of a later iteration)  reward_model/ (trained in the run)
    base/ (config, generation config and tokenizer of the initial model)  model/ (the result)
    trackers/ (what each tracker has got, its log; TensorBoard's files)

Whole files are written under a temporary name, synced and renamed. Metrics and events are appended one synced line at a
time. If a write fails, for instance because the disk is full, WriteError is raised and nothing is left half written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import threading
import tomllib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gruppo.config.loading import load_recipe
from gruppo.config.recipe import Recipe
from gruppo.config.renames import translate_recipe
from gruppo.errors import UsageError
from gruppo.runs.atomic import WriteError, publish, write_whole, writing
from gruppo.runs.changes import Change, allowed_changes, differences
from gruppo.runs.reading import object_of, read_metrics, read_object, reading, require_own, step_of
from gruppo.runs.tables import versioned
from gruppo.runs.trust import remember
from gruppo.utils.disk import free_bytes, gigabytes, held_bytes

APPENDED = ("metrics.jsonl", "events.jsonl")


TABLES = ("rollouts", "evaluations", "labels")


_LOGS = ("rewards.log", "rewards.old.log", "environment.log", "environment.old.log")  # output of user-defined code


REWARD_CACHE = "reward_cache.sqlite"  # answers of judges and reward servers


_FILES = (
    *APPENDED, "recipe.toml", "folder.json", "environment.json", "summary.json", "results.json", "status.json",
    *_LOGS, REWARD_CACHE, "lock",
)  # fmt: skip


_FOLDERS = (*TABLES, "checkpoints", "base", "model", "adapter", "reference", "reward_model", "trackers")


# In environment.json: the local time at which the contents of the folder were started.
START_TIME = "start_time"
PENDING = "recipe"  # in environment.json, while recipe.toml is being replaced


# What a folder can hold.
RUN, LABELS, REWARD_MODEL, EVALUATION = "run", "set of labels", "reward model", "evaluation"


_INTERRUPTED = (".writing", ".damaged")  # ends of names beside those above


_FIRST = {"lock", *_LOGS, "recipe.toml.writing", "folder.json", "folder.json.writing"}  # may exist before the recipe


_locked: weakref.WeakSet[RunFolder] = weakref.WeakSet()


class RunFolder:
    """A run folder whose lock this process holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._appending = threading.RLock()  # another thread records what the run waits for
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / "lock").open("a+")
        except OSError as error:
            raise UsageError(f"--out {path}: cannot be written to ({error}); choose another folder") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            message = self._refusal(error)
            self._lock.close()
            raise UsageError(message) from None
        _locked.add(self)
        with contextlib.suppress(OSError):  # on a full disk; this line is only for messages
            self._lock.truncate(0)
            self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._lock.flush()

    def _refusal(self, error: OSError) -> str:
        if error.errno not in {errno.EWOULDBLOCK, errno.EACCES}:
            return (
                f"--out {self.path}: its file system does not support locks ({os.strerror(error.errno or 0)}), without "
                "which a second run could write to the folder too; choose a folder on another file system, or mount "
                "this one with locks"
            )
        self._lock.seek(0)
        holder = self._lock.read(200).strip()
        return (
            f"--out {self.path}: another run is writing to this folder{holder and f' ({holder})'}; wait for it, or "
            "choose another"
        )

    def close(self) -> None:
        """Release the lock. A process that dies also releases it, even if its children live on."""
        self._lock.close()

    def start(self, recipe: Recipe, kind: str = RUN) -> None:
        """Write the resolved recipe, and the kind of the folder unless it is a run."""
        if kind != RUN:
            self.write_json("folder.json", {"kind": kind})
        write_whole(self.path / "recipe.toml", recipe.to_toml().encode())
        remember(self.path)

    def start_same(
        self,
        recipe: Recipe,
        kind: str,
        identity: Mapping[str, Any],
        time: datetime | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Like `start`, and record what the contents of the folder depend on.

        `time`: see `start_time`. `facts`: what may differ at a resume, such as sizes. Raises UsageError if the folder
        was started with a different `identity`.
        """
        before = self.read_json("environment.json")
        if time is not None and (before is None or START_TIME in before):
            identity = {**identity, START_TIME: time.isoformat()}
        changed = (
            None if before is None else next((name for name in identity if before.get(name) != identity[name]), None)
        )
        if changed is not None:
            raise UsageError(f"--resume {self.path}: {changed} has changed since the start; choose another --out")
        self.start(recipe, kind)
        self.write_json("environment.json", {**identity, **(facts or {})})

    def metric(self, values: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        self._append("metrics.jsonl", values)

    def event(self, kind: str, message: str, step: int, **details: Any) -> None:
        """Append a line to events.jsonl: something that the user should know."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._append("events.jsonl", {"time": now, "step": step, "kind": kind, "message": message, **details})

    def table(self, folder: str, step: int, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> Path:
        """Write rows as `folder`/step-NNNNNN.parquet."""
        path = self.path / folder / f"step-{step:06d}.parquet"
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".writing")
        content = pa.Table.from_pylist(list(rows), versioned(schema))
        with writing(path, temporary):
            pq.write_table(content, temporary, compression="zstd", write_page_checksum=True)
            publish(temporary, path)
        return path

    @contextmanager
    def building(self, name: str) -> Iterator[Path]:
        """A folder to fill, which is renamed to `name` if the block succeeds."""
        folder = self.path / f".writing-{name}"
        with writing(self.path / name, folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            yield folder
            publish(folder, self.path / name)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file atomically."""
        write_whole(self.path / name, (json.dumps(content, indent=2) + "\n").encode())

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read a JSON file; None if it does not exist."""
        path = self.path / name
        if not path.is_file():
            return None
        with reading(path, "start again with another --out"):
            return read_object(path)

    def lengths(self) -> dict[str, int]:
        """Bytes of each append-only file."""
        with self._appending:
            return {name: (self.path / name).stat().st_size if (self.path / name).exists() else 0 for name in APPENDED}

    def cut_back(self, lengths: Mapping[str, int], step: int) -> list[str]:
        """Undo what was written after a checkpoint: truncate append-only files, and delete tables of later steps.

        Returns descriptions of damage in the remaining lines (see `_blank_damaged_lines`).
        """
        problems: list[str] = []
        for name in APPENDED:
            path, length = self.path / name, lengths.get(name, 0)
            size = path.stat().st_size if path.exists() else 0
            if length and not path.exists():
                problems.append(f"{name} is missing; its {length} bytes are lost, and it goes on at step {step + 1}")
            elif size < length:
                problems.append(f"{name}: its end is missing, {length - size} of {length} bytes")
            if size:
                with path.open("r+b") as stream:
                    stream.truncate(min(length, size))
                    os.fsync(stream.fileno())
                problems += self._blank_damaged_lines(name)
        for folder in TABLES:
            for path in (self.path / folder).glob("step-*"):
                if path.suffix == ".writing" or (step_of(path) or 0) > step:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in (self.path / "failures").glob("step-*"):
            if path.suffix == ".writing" or (step_of(Path(path.name[: len("step-000000")])) or 0) > step:
                path.unlink()
        return problems

    def _blank_damaged_lines(self, name: str) -> list[str]:
        """Replace damaged lines with blanks, which readers skip, so that no length changes.

        The original file is kept as NAME.damaged. Returns descriptions of the damage.
        """
        lines = (self.path / name).read_bytes().split(b"\n")
        damaged = [place for place, line in enumerate(lines) if line.strip() and object_of(line) is None]
        if lines[-1].strip() and len(lines) - 1 not in damaged:
            lines.append(b"")  # complete except for the newline
        elif not damaged:
            return []
        else:
            shutil.copyfile(self.path / name, self.path / f"{name}.damaged")
            lines = [b" " * len(line) if place in damaged else line for place, line in enumerate(lines)]
            lines += [b""] if lines[-1] else []
        write_whole(self.path / name, b"\n".join(lines))
        numbers = ", ".join(str(place + 1) for place in damaged[:5]) + (", …" if len(damaged) > 5 else "")
        return [f"{name}: line {numbers} cannot be read and was removed ({name}.damaged has it)"] if damaged else []

    def table_problems(self, folder: str, steps: Iterable[int]) -> list[str]:
        """Descriptions of tables of these steps that are missing or cannot be opened."""
        found = []
        for step in steps:
            path = self.path / folder / f"step-{step:06d}.parquet"
            try:
                pq.read_metadata(path)
            except (OSError, pa.ArrowException) as error:
                why = "is missing" if isinstance(error, FileNotFoundError) else "is damaged"
                found.append(f"{folder}/{path.name} {why}")
        return found

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        return read_metrics(self.path / "metrics.jsonl")

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        line, path = json.dumps(values, allow_nan=False).encode() + b"\n", self.path / name
        with self._appending, writing(path), path.open("ab", buffering=0) as stream:
            before = os.fstat(stream.fileno()).st_size
            try:
                while line:  # a nearly full disk may accept only a part
                    line = line[stream.write(line) :]
                os.fsync(stream.fileno())
            except OSError:
                stream.truncate(before)
                raise


def _release_after_fork() -> None:
    """Release the locks in a forked process: a lock is held as long as any copy of its descriptor is open."""
    for run in _locked:
        run.close()


os.register_at_fork(after_in_child=_release_after_fork)


@contextmanager
def explaining_write_errors(folder: Path) -> Iterator[None]:
    """Add to a WriteError of the block how much space the run needs, and which checkpoint is intact."""
    try:
        yield
    except WriteError as error:
        raise WriteError(f"{error}; {_space_and_checkpoint(folder)}") from error


def _space_and_checkpoint(folder: Path) -> str:
    words = [f"{gigabytes(free_bytes(folder))} free"]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        needed = json.loads((folder / "environment.json").read_text())["disk_forecast"]["peak"] - held_bytes(folder)
        if needed > 0:
            words.append(f"the run needs about {gigabytes(needed)} more")
    steps = checkpoint_folders(folder)
    words.append(f"the checkpoint of step {max(steps)} is intact" if steps else "there is no checkpoint yet")
    return ", ".join(words[:-1]) + f"; {words[-1]}"


def start_time(folder: Path | None) -> datetime:
    """The local time at which a run, an evaluation or a set of labels was started; the current time if `folder` has
    none of them, or was started by a version that did not record it.

    Chat templates that print the date print this one, so a resume has the same prompts. Raises UsageError if the record
    is damaged.
    """
    path = None if folder is None else folder / "environment.json"
    if path is None or not path.is_file():
        return datetime.now()
    with reading(path, "start again with another --out"):
        recorded = read_object(path).get(START_TIME)
        return datetime.now() if recorded is None else datetime.fromisoformat(recorded)


def foreign_entries(folder: Path) -> list[str]:
    """The names of what is in a run folder and was not written by the run."""
    own = {*_FILES, *_FOLDERS, "failures"}
    names = sorted(path.name for path in folder.iterdir())
    return [name for name in names if name not in own and not name.startswith(".") and not name.endswith(_INTERRUPTED)]


def checkpoint_folders(folder: Path) -> dict[int, Path]:
    """The checkpoints in a run folder by step, in order."""
    found = {path.name.removeprefix("step-"): path for path in (folder / "checkpoints").glob("step-*")}
    return dict(sorted((int(step), path) for step, path in found.items() if re.fullmatch(r"\d{6,}", step)))


def check_folder(
    path: Path, recipe: Recipe, resume: bool, kind: str = RUN, links_to: Path | None = None
) -> list[Change]:
    """Raise UsageError if a run with this recipe (or another `kind`) must not use the folder; write nothing.

    Returns what has changed in the recipe since the run in the folder was started or last resumed (see
    `gruppo.runs.changes`). `links_to`: a folder that links may lead into and that was checked before.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"--out {path}: is a file; choose a folder")
    require_own(path, links_to)
    for name in (*_FILES, *_FOLDERS):
        if (path / name).exists() and (path / name).is_dir() != (name in _FOLDERS):
            raise UsageError(
                f"--out {path}: {name} must be a {'folder' if name in _FOLDERS else 'file'}; restore it, or choose "
                "another folder"
            )
    recipe_file = path / "recipe.toml"
    if not recipe_file.is_file():
        if (path / "environment.json").is_file() or checkpoint_folders(path):
            raise UsageError(
                f"--out {path}: recipe.toml is missing from this run; restore it from a copy, or choose another folder"
            )
        others = [entry.name for entry in path.iterdir() if entry.name not in _FIRST] if path.is_dir() else []
        if others:
            raise UsageError(f"--out {path}: the folder contains other files ({others[0]}, …); choose an empty one")
        return []
    marked = path / "folder.json"
    found = _kind(marked) if marked.is_file() else RUN
    if found != kind:
        raise UsageError(
            f"--out {path}: the folder contains {_article(found)}, not {_article(kind)}; choose another one"
        )
    if not resume:
        raise UsageError(
            f"--out {path}: the folder already contains {_article(kind)}; continue it with --resume, or choose another "
            "with --out"
        )
    with reading(recipe_file, "restore the recipe of the run, or choose another folder with --out"):
        content = translate_recipe(tomllib.loads(_pending_recipe(path) or recipe_file.read_text(encoding="utf-8")))
    before = load_recipe(content)  # so that fields newer than the run get their defaults
    if kind == RUN:
        return allowed_changes(path, before, recipe, checkpoint_folders(path))
    if changes := differences(before, recipe):
        listed = "; ".join(change.message for change in changes)
        raise UsageError(
            f"--resume {path}: the recipe has changed since: {listed}; restore it, or choose another folder with --out"
        )
    return []


def _pending_recipe(path: Path) -> str | None:
    """The recipe that a resume had begun to store when it was killed, if there is one."""
    file = path / "environment.json"
    recipe = read_object(file).get(PENDING) if file.is_file() else None
    return recipe if isinstance(recipe, str) else None


def _article(kind: str) -> str:
    return f"{'an' if kind[:1] in 'aeiou' else 'a'} {kind}"


def _kind(marked: Path) -> str:
    kind = read_object(marked).get("kind")
    if not isinstance(kind, str):
        raise UsageError(f"{marked}: is damaged; start again with another --out")
    return kind
