"""Find local copies of benchmarks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from gruppo.data.benchmark_table import SPLITS, Benchmark
from gruppo.data.files import FILES
from gruppo.errors import UsageError
from gruppo.utils.paths import is_dir, is_file

MOST_LISTED = 12  # file names that an error lists


MOST_FILES = 20_000  # maximum entries of a folder that is searched


def find_files(benchmark: Benchmark, data: Path, split: str) -> list[tuple[Path, str | None]]:
    """Files of a benchmark's split in the folder `data`, or `data` itself if it is a file.

    Every file comes with the name of its part if the benchmark consists of several, else None. Raises UsageError if no
    file matches, if several match that are not parts of one set, or if `data` is missing, too large a folder or an
    unknown type of file.
    """
    if is_file(data):
        if data.suffix.lower() not in FILES:
            raise UsageError(f'options.data = "{data}": unknown file type; write one of {", ".join(FILES)}')
        return [(data, None)]
    if not is_dir(data):
        raise UsageError(f'options.data = "{data}": there is no such file or folder (looked in {Path.cwd()})')
    found = _listed(data)
    for pattern in _patterns(benchmark, split):
        fitting = {key: files for key, files in found.items() if re.fullmatch(pattern, key)}
        usual = {key: files for key, files in fitting.items() if benchmark.config in key.split("/")}
        fitting = usual or fitting  # prefer the configuration that the hub's rows come from
        if len(fitting) == 1:
            return [(file, None) for file in next(iter(fitting.values()))]
        if len(fitting) > 1:
            names = [str(file.relative_to(data)) for files in fitting.values() for file in files]
            raise UsageError(
                f'options.data = "{data}": several files match {benchmark.title} ({shortened_list(names)}); '
                "write the path of one of them"
            )
    parts = _parts(benchmark, split, found)
    if parts:
        return parts
    # The folder may be that of one part: MATH/test/algebra, which contains 1.json and so on.
    above = "/".join(_as_key(part) for part in data.resolve().parts[-2:])
    parts = _parts(benchmark, split, {f"{above}/{key}": files for key, files in found.items()})
    if parts:
        return parts
    names = [str(file.relative_to(data)) for files in found.values() for file in files]
    raise UsageError(
        f'options.data = "{data}": no file of {benchmark.title} there; looked for {_looked_for(benchmark, split)} '
        f"(.jsonl, .json, .csv, .tsv, .parquet or .xml) and found {shortened_list(names) or 'no data files'}; "
        "write the path of the file"
    )


def _listed(folder: Path) -> dict[str, list[Path]]:
    """Data files of a folder by relative path, in lower case and without suffix; shards of one file are grouped."""
    found: dict[str, list[Path]] = {}
    files = list(islice(folder.rglob("*"), MOST_FILES + 1))
    if len(files) > MOST_FILES:
        raise UsageError(
            f'options.data = "{folder}": the folder contains more than {MOST_FILES:,} files; '
            "write the path of the data's own folder"
        )
    for file in sorted(files):
        if file.suffix.lower() in FILES and is_file(file):
            key = _as_key(file.relative_to(folder).with_suffix("").as_posix())
            found.setdefault(re.sub(r"_\d{5}_of_\d{5}(?:_[0-9a-f]+)?$|/\d{4}$", "", key), []).append(file)
    return found


def _as_key(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")


def _patterns(benchmark: Benchmark, split: str) -> Iterator[str]:
    """Patterns of file names for the split, most specific first."""
    aliases = "|".join(benchmark.aliases)
    splits = "|".join({split, benchmark.splits[split]} - ({"train"} if split == "test" else set()))
    yield rf"(?:.*/)?(?:{aliases})[_/.](?:.*/)?(?:{splits})"
    if split == "test":
        yield rf"(?:.*/)?(?:{aliases})(?:/(?:{aliases}))?"
    yield rf"(?:(?:main|data|default|raw|all|zh)/)?(?:{splits})"


def _parts(benchmark: Benchmark, split: str, found: Mapping[str, list[Path]]) -> list[tuple[Path, str | None]]:
    """Files of a benchmark that consists of several parts, with the names of the parts."""
    if not benchmark.several:
        return []
    aliases, parts = "|".join(benchmark.aliases), "|".join(benchmark.several)
    pattern = re.compile(rf"(.*/)?(?:(?:{aliases})[_/.])?({parts})(?:[_/](\w+))?(?:/\d+)?")
    chosen: list[tuple[Path, str | None]] = []
    for key, files in found.items():
        if named := pattern.fullmatch(key):
            sides = SPLITS & {*(named[1] or "").split("/"), named[3]}
            if sides & {split, benchmark.splits[split]} or (split == "test" and not sides):
                chosen += [(file, named[2]) for file in files]
    return chosen


def _looked_for(benchmark: Benchmark, split: str) -> str:
    alias = benchmark.aliases[0]
    names = [f"{alias}_{split}", f"{alias}/{split}", *([alias] if split == "test" else []), split]
    return ", ".join([*names, *(f"{alias}_{part}" for part in benchmark.several[:2])])


def shortened_list(names: Sequence[str]) -> str:
    """The first `MOST_LISTED` names separated by commas, and how many more there are."""
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return ", ".join(names[:MOST_LISTED]) + more
