"""Rows of a Hugging Face dataset, from the hub or from a local folder (saved by `datasets`, or with data files)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gruppo.data.arrow import ROW_BYTES, carried_columns, converter
from gruppo.data.folder import Splits, read_folder, split_files
from gruppo.data.values import require_memory
from gruppo.errors import UsageError
from gruppo.types import Row
from gruppo.utils.hub import hub_problem, hub_reachable
from gruppo.utils.paths import user_path
from gruppo.utils.progress import Progress

MOST_FILES = 10_000  # maximum files of a folder that is read as a dataset

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_REFUSED = {
    "split": "set the task's field split instead",
    "streaming": "rows are sampled in random order, so all of them must be read; remove it",
    "trust_remote_code": "datasets that are programs are never run; use one with data files",
    "path": "the task's name is the path; remove it",
}


def read_dataset(name: str, split: str, options: Mapping[str, Any], limit: int, progress: Progress) -> Iterable[Row]:
    """The rows of one split of a dataset. In a folder without splits, all rows are "train".

    `options`: those of `datasets.load_dataset` (name: the configuration; revision; data_files; …), except the ones in
    `_REFUSED`; those of `read_file` for a folder of such files; none for a folder that `save_to_disk` wrote. Raises
    UsageError, when iterated, if an option is refused, if the dataset cannot be loaded, if it has more rows than fit in
    `limit` bytes, if the split is unknown, or if the hub cannot be reached.
    """
    for option, reason in _REFUSED.items():
        if option in options:
            raise UsageError(f"options.{option} = {options[option]!r}: {reason}")
    with progress.bar(f"Opening {name}", None, ""), _quiet():
        dataset = _open(name, split, options)
    if isinstance(dataset, Mapping):
        yield from read_folder(user_path(name), dataset, split, options, limit, progress)
        return
    require_memory(len(dataset) * ROW_BYTES, limit)
    yield from dataset_rows(dataset, name, progress)


def dataset_rows(dataset: Dataset, source: str, progress: Progress) -> Iterator[Row]:
    """The rows of a dataset of the `datasets` library, in JSON types (see `gruppo.data.arrow`), without bytes.

    `source`: name of the dataset in messages.
    """
    dataset = dataset.select_columns(carried_columns(dataset.features.arrow_schema, source, progress))
    convert = {field.name: converter(field.type) for field in dataset.features.arrow_schema}
    for row in dataset.with_format(None):
        yield {name: convert[name](value) for name, value in row.items()}


def _open(name: str, split: str, options: Mapping[str, Any]) -> Dataset | Splits:
    """The dataset, or the files of each split of a folder whose files gruppo reads itself."""
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
        if folder.is_dir() and not saved and (files := split_files(folder, options)):
            return files
        found: Dataset | DatasetDict = (
            datasets.load_from_disk(place)
            if saved
            else datasets.load_dataset(place, split=split if sliced else None, **options)
        )
    except Exception as error:  # third-party files: anything can be wrong with them
        if not folder.is_dir() and (problem := hub_problem(error)):
            raise UsageError(problem) from error
        lines = str(error).strip().splitlines() or [""]
        raise UsageError(
            f"it cannot be loaded ({type(error).__name__}: {lines[0]}); fix the name or the options"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise UsageError(f'split = "{split}": no such split; write one of: {", ".join(found)}')
        return found[split]
    if split != "train" and not sliced:
        raise UsageError(f'split = "{split}": the dataset has no splits; remove split')
    return found


def _require_hub(name: str) -> None:
    """Raise UsageError early if a dataset of the hub is neither cached nor available online."""
    import datasets

    cached = (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()
    if not cached and not hub_reachable():
        raise UsageError(
            "there is no such folder, and the Hugging Face hub cannot be reached; go online, or give a file or a "
            "folder saved by datasets"
        )


def _require_few(folder: Path) -> None:
    """Raise UsageError for a folder with too many files to be a dataset, all of which `datasets` would scan."""
    count = 0
    for _, _, files in os.walk(folder):
        count += len(files)
        if count > MOST_FILES:
            raise UsageError(
                f"the folder contains more than {MOST_FILES:,} files; give the dataset's own folder, or a file"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Disable the progress bars of `datasets`: progress is shown by our reporter."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
