"""Finding local copies of benchmarks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from gruppo.data.benchmark_table import SPLITS, Benchmark
from gruppo.data.files import FILES
from gruppo.errors import UsageError
from gruppo.utils.paths import is_dir, is_file

MOST_LISTED = 12  # files that an error names


MOST_FILES = 20_000  # of a folder that is looked through


def find_files(benchmark: Benchmark, data: Path, split: str) -> list[tuple[Path, str | None]]:
    """The files of a benchmark in a folder (or the one that `data` is), each with its part of the set where several
    make it up. Raises UsageError where none or several others fit."""
    if is_file(data):
        if data.suffix.lower() not in FILES:
            raise UsageError(
                f'options.data = "{data}": this kind of file is not known; write one of {", ".join(FILES)}'
            )
        return [(data, None)]
    if not is_dir(data):
        raise UsageError(f'options.data = "{data}": there is no such file or folder (looked in {Path.cwd()})')
    found = _listed(data)
    for pattern in _patterns(benchmark, split):
        fitting = {key: files for key, files in found.items() if re.fullmatch(pattern, key)}
        usual = {key: files for key, files in fitting.items() if benchmark.config in key.split("/")}
        fitting = usual or fitting  # the configuration that the hub's rows are of, beside others
        if len(fitting) == 1:
            return [(file, None) for file in next(iter(fitting.values()))]
        if len(fitting) > 1:
            names = [str(file.relative_to(data)) for files in fitting.values() for file in files]
            raise UsageError(
                f'options.data = "{data}": several files there may be {benchmark.title} ({shortened_list(names)}); '
                "name one of them"
            )
    parts = _parts(benchmark, split, found)
    if parts:
        return parts
    # The folder may be one part's own: MATH/test/algebra, which holds 1.json and so on.
    above = "/".join(_as_key(each) for each in data.resolve().parts[-2:])
    parts = _parts(benchmark, split, {f"{above}/{key}": files for key, files in found.items()})
    if parts:
        return parts
    names = [str(file.relative_to(data)) for files in found.values() for file in files]
    raise UsageError(
        f'options.data = "{data}": no file of {benchmark.title} there; looked for {_looked_for(benchmark, split)} '
        f"(.jsonl, .json, .csv, .tsv or .parquet) and found {shortened_list(names) or 'no such files'}; name the file itself"
    )


def _listed(folder: Path) -> dict[str, list[Path]]:
    """Data files of a folder by their path in it, in small letters and without endings; the shards of one together."""
    found: dict[str, list[Path]] = {}
    files = list(islice(folder.rglob("*"), MOST_FILES + 1))
    if len(files) > MOST_FILES:
        raise UsageError(
            f'options.data = "{folder}": the folder holds more than {MOST_FILES:,} files; name the data\'s own folder'
        )
    for file in sorted(files):
        if file.suffix.lower() in FILES and is_file(file):
            key = _as_key(file.relative_to(folder).with_suffix("").as_posix())
            found.setdefault(re.sub(r"_\d{5}_of_\d{5}(?:_[0-9a-f]+)?$|/\d{4}$", "", key), []).append(file)
    return found


def _as_key(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")


def _patterns(benchmark: Benchmark, split: str) -> Iterator[str]:
    """What a file of the split may be called, the surest first."""
    own = "|".join(benchmark.aliases)
    theirs = "|".join({split, benchmark.splits[split]} - ({"train"} if split == "test" else set()))
    yield rf"(?:.*/)?(?:{own})[_/.](?:.*/)?(?:{theirs})"
    if split == "test":
        yield rf"(?:.*/)?(?:{own})(?:/(?:{own}))?"
    yield rf"(?:(?:main|data|default|raw|all|zh)/)?(?:{theirs})"


def _parts(benchmark: Benchmark, split: str, found: Mapping[str, list[Path]]) -> list[tuple[Path, str | None]]:
    """The files of a set that is made up of several, each with its part's name."""
    if not benchmark.several:
        return []
    own, parts = "|".join(benchmark.aliases), "|".join(benchmark.several)
    pattern = re.compile(rf"(.*/)?(?:(?:{own})[_/.])?({parts})(?:[_/](\w+))?(?:/\d+)?")
    chosen: list[tuple[Path, str | None]] = []
    for key, files in found.items():
        if named := pattern.fullmatch(key):
            sides = SPLITS & {*(named[1] or "").split("/"), named[3]}
            if sides & {split, benchmark.splits[split]} or (split == "test" and not sides):
                chosen += [(file, named[2]) for file in files]
    return chosen


def _looked_for(benchmark: Benchmark, split: str) -> str:
    own = benchmark.aliases[0]
    names = [f"{own}_{split}", f"{own}/{split}", *([own] if split == "test" else []), split]
    return ", ".join([*names, *(f"{own}_{part}" for part in benchmark.several[:2])])


def shortened_list(names: Sequence[str]) -> str:
    """The first names of a list, in words."""
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return ", ".join(names[:MOST_LISTED]) + more
