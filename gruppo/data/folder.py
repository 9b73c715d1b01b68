"""Rows of a folder of files: those that its files give one by one, in the splits that `datasets` puts the files in."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from gruppo.data.files import FILES, read_file
from gruppo.errors import UsageError
from gruppo.types import Row
from gruppo.utils.progress import NullProgress, Progress

Splits = Mapping[str, Sequence[Path]]

_OF_FILES = ("delimiter", "header")  # options of `read_file`
_OF_PLACES = ("data_dir", "data_files")  # options of `load_dataset` that say where the files are
_FORMATS = ("csv", "json", "parquet", "xml")  # formats of `datasets` that gruppo reads itself, by their names there
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
_DOCUMENTS = (".md", ".toml")  # beside the data, whatever `datasets` takes them for


def split_files(folder: Path, options: Mapping[str, Any]) -> Splits | None:
    """The files of every split of a folder, by the rules of `datasets`; documents and files of other types left out.

    None if `datasets` has to read the folder: it is empty, it has a dataset card with configurations, other `options`
    than those of files and places, compressed files, or more files of a type that only `datasets` reads. Raises the
    errors of `datasets` for wrong options.
    """
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns, sanitize_patterns

    if set(options) - {*_OF_FILES, *_OF_PLACES} or _is_configured(folder):
        return None
    base = str((folder / options.get("data_dir", "")).resolve())
    try:
        patterns = sanitize_patterns(options["data_files"]) if "data_files" in options else get_data_patterns(base)
    except EmptyDatasetError:
        return None
    if any("://" in pattern for listed in patterns.values() for pattern in listed):
        return None
    found = DataFilesDict.from_local_or_remote(patterns, base_path=base)
    splits = {str(split): list(map(Path, dict.fromkeys(paths))) for split, paths in found.items()}
    if not _are_ours([path for paths in splits.values() for path in paths if path.suffix.lower() not in _DOCUMENTS]):
        return None
    own = {split: [path for path in paths if _is_ours(path)] for split, paths in splits.items()}
    return {split: paths for split, paths in own.items() if paths}


def _is_configured(folder: Path) -> bool:
    """Whether the folder says itself how `datasets` reads it."""
    from datasets import config
    from huggingface_hub import metadata_load

    names = (config.REPOYAML_FILENAME, config.DATASETDICT_INFOS_FILENAME, f"{folder.resolve().name}.py")
    if any((folder / name).is_file() for name in names):
        return True
    card = folder / config.REPOCARD_FILENAME
    return card.is_file() and not {"configs", "dataset_info"}.isdisjoint(metadata_load(card) or {})


def _is_ours(path: Path) -> bool:
    return path.suffix.lower() in FILES


def _are_ours(paths: Sequence[Path]) -> bool:
    """Whether most files are of the formats that gruppo reads, and none is so in a form that only `datasets` reads."""
    from datasets.load import infer_module_for_data_files_list

    def format_of(*these: Path) -> str | None:
        return infer_module_for_data_files_list(list(map(str, these)))[0]  # type: ignore[no-any-return]

    if not any(map(_is_ours, paths)) or any(path.suffix == ".zip" for path in paths):
        return False
    others = [path if path.suffix in _COMPRESSED else Path(path.suffix) for path in paths if not _is_ours(path)]
    return format_of(*paths) in _FORMATS and not any(format_of(other) in _FORMATS for other in others)


def read_folder(
    folder: Path, splits: Splits, split: str, options: Mapping[str, Any], limit: int, progress: Progress
) -> Iterator[Row]:
    """The rows of one split, or of a selection such as "train[:10%]" or "train+test", file by file.

    `options` and `limit`: those of `read_file`; other options are ignored. Raises UsageError, when iterated, if the
    split is unknown or a file cannot be read.
    """
    options = {name: value for name, value in options.items() if name in _OF_FILES}
    if split in splits:
        yield from _rows(splits[split], folder, options, limit, progress)
        return
    if not set(split) & set("[+"):
        raise UsageError(f'split = "{split}": no such split; write one of: {", ".join(splits)}')
    sizes = {
        name: sum(1 for _ in _rows(paths, folder, options, limit, NullProgress())) if name in split else 0
        for name, paths in splits.items()
    }
    for name, start, end in _selected(split, sizes):
        yield from islice(_rows(splits[name], folder, options, limit, progress), start, end)


def _selected(split: str, sizes: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Splits with the first row and the one after the last that a selection in the form of `datasets` takes of them."""
    from datasets import ReadInstruction

    try:
        return [(part.splitname, part.from_, part.to) for part in ReadInstruction.from_spec(split).to_absolute(sizes)]
    except ValueError as error:
        raise UsageError(
            f'split = "{split}": {str(error).rstrip(".")}; write e.g. "{next(iter(sizes))}[:100]"'
        ) from None


def _rows(
    paths: Sequence[Path], folder: Path, options: Mapping[str, Any], limit: int, progress: Progress
) -> Iterator[Row]:
    for path in paths:
        try:
            yield from read_file(path, options, limit, progress)
        except UsageError as error:
            message = str(error)
            if message.startswith(("options", "memory")):
                raise
            raise UsageError(
                f"{os.path.relpath(path, folder.resolve())}: {message.removeprefix(f'{path.name}: ')}"
            ) from None
