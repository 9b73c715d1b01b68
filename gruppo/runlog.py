"""The run folder: what a run was asked, what it did, and what came out. Everything that shows a run reads it alone.

    recipe.toml  environment.json  metrics.jsonl  events.jsonl  rewards.log  summary.json
    rollouts/step-000012.parquet  evaluations/step-000012.parquet  labels/step-000012.parquet
    checkpoints/step-000010/  reference/ (of a later iteration)  reward_model/ (trained in the run)
    base/ (config, generation config and tokenizer of the start model)  model/ (the result)

Whole files are written under a temporary name, synced and renamed; metrics and events are appended to, a synced line
at a time.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gruppo.config import Recipe, load_recipe
from gruppo.errors import RunError, UsageError

APPENDED = ("metrics.jsonl", "events.jsonl")
TABLES = ("rollouts", "evaluations", "labels")
_FILES = (*APPENDED, "recipe.toml", "folder.json", "environment.json", "summary.json", "rewards.log", "lock")
_FOLDERS = (*TABLES, "checkpoints", "base", "model", "adapter", "reference", "reward_model")
RUN, LABELS, REWARD_MODEL = "run", "set of labels", "reward model"  # what a folder can hold
_ASIDE = ".replaced-"


class RunFolder:
    """A run folder that this process holds the lock of."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / "lock").open("a")
        except OSError as error:
            raise UsageError(f"--out {path}: cannot be written to ({error}); choose another folder") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UsageError(
                f"--out {path}: another run is writing to this folder; wait for it, or choose another"
            ) from None

    def close(self) -> None:
        """Give up the lock (a process that dies does so too)."""
        self._lock.close()

    def start(self, recipe: Recipe, kind: str = RUN) -> None:
        """Write the resolved recipe, and of what the folder is, unless it is a run's."""
        if kind != RUN:
            self.write_json("folder.json", {"kind": kind})
        write_whole(self.path / "recipe.toml", recipe.to_toml().encode())

    def metric(self, values: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        self._append("metrics.jsonl", values)

    def event(self, kind: str, message: str, step: int, **details: Any) -> None:
        """Append a line to events.jsonl: something that a person should know of."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._append("events.jsonl", {"time": now, "step": step, "kind": kind, "message": message, **details})

    def table(self, folder: str, step: int, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> Path:
        """Write rows as `folder`/step-NNNNNN.parquet."""
        path = self.path / folder / f"step-{step:06d}.parquet"
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".writing")
        pq.write_table(pa.Table.from_pylist(list(rows), schema), temporary, compression="zstd")
        publish(temporary, path)
        return path

    @contextmanager
    def building(self, name: str) -> Iterator[Path]:
        """A folder to fill, which gets its name when the block ends well."""
        folder = self.path / f".writing-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder
        publish(folder, self.path / name)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file whole."""
        write_whole(self.path / name, (json.dumps(content, indent=2) + "\n").encode())

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read a JSON file; None where there is none."""
        path = self.path / name
        if not path.is_file():
            return None
        with reading(path, "start again with another --out"):
            return read_object(path)

    def lengths(self) -> dict[str, int]:
        """Bytes of each append-only file."""
        return {name: (self.path / name).stat().st_size if (self.path / name).exists() else 0 for name in APPENDED}

    def cut_back(self, lengths: Mapping[str, int], step: int) -> None:
        """Undo what was written after a checkpoint: append-only files to its lengths, tables of later steps gone."""
        for name in APPENDED:
            path = self.path / name
            if path.exists():
                with path.open("r+b") as stream:
                    stream.truncate(min(lengths.get(name, 0), path.stat().st_size))
                    os.fsync(stream.fileno())
        for folder in TABLES:
            for path in (self.path / folder).glob("step-*"):
                if path.suffix == ".writing" or step_of(path) > step:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        return read_lines(self.path / "metrics.jsonl")

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        line = json.dumps(values, allow_nan=False).encode() + b"\n"
        with (self.path / name).open("ab", buffering=0) as stream:
            stream.write(line)
            os.fsync(stream.fileno())


def check_folder(path: Path, recipe: Recipe, resume: bool, kind: str = RUN) -> None:
    """Raise UsageError where a run with this recipe (or what else `kind` says) may not go into the folder; write
    nothing."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"--out {path}: is a file; choose a folder")
    for name in (*_FILES, *_FOLDERS):
        if (path / name).exists() and (path / name).is_dir() != (name in _FOLDERS):
            raise UsageError(
                f"--out {path}: {name} is not what a run makes of it; put it back, or choose another folder"
            )
    held = path / "recipe.toml"
    if not held.is_file():
        others = (
            [entry.name for entry in path.iterdir() if entry.name not in {"lock", "rewards.log"}]
            if path.is_dir()
            else []
        )
        if others:
            raise UsageError(f"--out {path}: the folder holds other files ({others[0]}, …); choose an empty one")
        return
    marked = path / "folder.json"
    with reading(marked, "choose another folder with --out"):
        found = read_object(marked)["kind"] if marked.is_file() else RUN
    if found != kind:
        raise UsageError(f"--out {path}: the folder holds a {found}, and not a {kind}; choose another one")
    if not resume:
        raise UsageError(
            f"--out {path}: the folder holds a {kind} already; continue it with --resume, or choose another with --out"
        )
    with (
        reading(held, "put the recipe of the run back, or choose another folder with --out"),
        held.open("rb") as stream,
    ):
        before = tomllib.load(stream)
    # Read as a recipe, so that fields that are younger than the run have their defaults.
    changes = _differences(load_recipe(before).as_mapping(), recipe.as_mapping())
    if changes:
        raise UsageError(
            f"--resume {path}: the recipe has changed since: {'; '.join(changes)}; put it back, or choose another "
            "folder with --out"
        )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; none where there is no file. A last line that is still being written is left
    out. Raises UsageError where a line is no object."""
    if not path.is_file():
        return []
    with reading(path, "put the file back as the run wrote it"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]
        if odd := [row for row in rows if not isinstance(row, dict)]:
            raise ValueError(f"{odd[0]!r:.60} is no object")
        return rows


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises ValueError for anything else."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{content!r:.60} is no object")
    return content


def step_of(path: Path) -> int:
    """The step in the name of a file or folder; -1 where the name is not of a run's."""
    number = path.stem.removeprefix("step-")
    return int(number) if number.isascii() and number.isdecimal() else -1


@contextmanager
def reading(what: Path, fix: str) -> Iterator[None]:
    """Whatever fails in the block, which reads files that may be damaged or a stranger's, is a UsageError that names
    `what` and says the `fix`; a disk that is full is not."""
    try:
        yield
    except (UsageError, RunError):
        raise
    except Exception as error:  # anything can be wrong with such a file
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise
        why = (str(error).strip().splitlines() or [""])[0][:200]
        raise UsageError(f"{what}: is damaged ({type(error).__name__}: {why}); {fix}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or as it was before."""
    temporary = path.with_name(path.name + ".writing")
    temporary.write_bytes(content)
    publish(temporary, path)


def publish(temporary: Path, path: Path) -> None:
    """Sync a finished file or folder and give it its name, replacing what had it.

    A folder cannot replace a folder in one stroke: the old one is set aside, and `recover` brings it back where a kill
    came in between.
    """
    for each in [*temporary.rglob("*"), temporary] if temporary.is_dir() else [temporary]:
        _sync(each)
    aside = path.with_name(_ASIDE + path.name)
    if path.is_dir():
        path.rename(aside)
    temporary.replace(path)
    _sync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def recover(parent: Path) -> None:
    """Undo what a kill left half done in a folder of folders: bring back what was set aside, drop what was begun."""
    for aside in parent.glob(_ASIDE + "*"):
        path = parent / aside.name.removeprefix(_ASIDE)
        if path.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(path)
    for begun in parent.glob(".writing-*"):
        shutil.rmtree(begun)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    changes = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            changes.append(f"{prefix}{key} was {old!r} and is {new!r}")
    return changes
