"""Rows of a Hugging Face data set: of the hub, or of a local folder (saved by `datasets`, or of data files)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gruppo.data.files import carried_columns, plain
from gruppo.errors import UsageError
from gruppo.types import Row
from gruppo.utils.hub import hub_reachable
from gruppo.utils.paths import user_path
from gruppo.utils.progress import Progress

MOST_FILES = 10_000  # of a folder that is read as a data set

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_REFUSED = {
    "split": "write the split as the task's own field",
    "streaming": "rows are drawn in random order, so that all of them are read; remove it",
    "trust_remote_code": "data sets that are programs are never run; take one of data files",
    "path": "the name of the task is the path; remove it",
}


def read_dataset(name: str, split: str, options: Mapping[str, Any], progress: Progress) -> Iterable[Row]:
    """The rows of a split; of a folder without splits, all of them are "train".

    `options` are those of `datasets.load_dataset` (name: the configuration; revision; data_files; …); a folder that
    `save_to_disk` wrote has none. Raises UsageError: nothing there, unknown split, hub out of reach.
    """
    for option, reason in _REFUSED.items():
        if option in options:
            raise UsageError(f"options.{option} = {options[option]!r}: {reason}")
    with progress.bar(f"Opening {name}", None, ""), _quiet():
        dataset = _open(name, split, options)
    names = carried_columns(dataset.features.arrow_schema, name, progress)
    for row in dataset.select_columns(names).with_format(None):
        yield plain(row)


def _open(name: str, split: str, options: Mapping[str, Any]) -> Dataset:
    import datasets

    folder = user_path(name)
    saved = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
    sliced = bool(set(split) & set("[+")) and not saved  # "train[:10%]"
    if saved and options:
        raise UsageError(f"options = {dict(options)}: a folder written by save_to_disk has no options; remove them")
    if not folder.is_dir():
        _require_hub(name)
    elif not saved:
        _require_few(folder)
    place = str(folder) if folder.is_dir() else name
    try:
        found: Dataset | DatasetDict = (
            datasets.load_from_disk(place)
            if saved
            else datasets.load_dataset(place, split=split if sliced else None, **options)
        )
    except Exception as error:  # data sets are other people's files: anything can be wrong with them
        lines = str(error).strip().splitlines() or [""]
        raise UsageError(f"it cannot be loaded ({type(error).__name__}: {lines[0]}); mend name or options") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise UsageError(f'split = "{split}": there is none of that name; write one of: {", ".join(found)}')
        return found[split]
    if split != "train" and not sliced:
        raise UsageError(f'split = "{split}": the data set has no splits; remove split')
    return found


def _require_hub(name: str) -> None:
    """Raise UsageError at once where a data set of the hub can be had from nowhere."""
    import datasets

    cached = (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()
    if not cached and not hub_reachable():
        raise UsageError(
            "there is no such folder, and the Hugging Face hub cannot be reached; go online, or give a file or a "
            "folder saved by datasets"
        )


def _require_few(folder: Path) -> None:
    """Raise UsageError for a folder that is no data set but a part of a disk, which `datasets` would look through."""
    count = 0
    for _, _, files in os.walk(folder):
        count += len(files)
        if count > MOST_FILES:
            raise UsageError(
                f"the folder holds more than {MOST_FILES:,} files; name the data set's own folder, or a file"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """The reporter shows progress, not `datasets`."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
