"""Load the rows of the source that a recipe names, and split them into training and held-out rows."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gruppo.config.units import as_bytes
from gruppo.data.arrow import frame_rows, note_left_out, table_rows
from gruppo.data.chat_options import ChatOptions
from gruppo.data.transform import in_held_out, prompt_text, transform
from gruppo.data.values import has_bytes
from gruppo.errors import UsageError, nearest
from gruppo.types import Row
from gruppo.utils.imports import import_attribute
from gruppo.utils.paths import is_dir, is_file, not_a_file, user_path
from gruppo.utils.progress import Advance, NullProgress, Progress

if TYPE_CHECKING:
    from gruppo.config.sections import Task

TASKS = {"arithmetic": "gruppo.data.arithmetic:load"}


_GYM = "reasoning-gym/"


# Rows between two progress updates.
_SHOWN = 64


_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".xml")


_KINDS = (
    f'"{_GYM}NAME", a file ({", ".join(_FILES)}), a folder saved by datasets, a dataset on the hub ("owner/name") or '
    '"package.module:function"'
)


@dataclass(frozen=True)
class Dataset:
    """Rows of one task before tokenization.

    `name` and `numbers` (the rows' indices in the source, from 0) form the prompt ids. `field`: name of the task's
    table in errors. `max_prompt_tokens`, `filter_overlong` and `chat`: settings of the task.
    """

    name: str
    rows: Sequence[Row]
    numbers: Sequence[int]
    field: str = "task"
    max_prompt_tokens: int | None = None
    filter_overlong: bool = False
    chat: ChatOptions = dataclasses.field(default_factory=ChatOptions)


def load_training(
    task: Task,
    field: str,
    with_held_out: bool,
    progress: Progress,
    given: Iterable[Row] | None = None,
    answered: bool = False,
) -> tuple[Dataset, Dataset | None]:
    """Training rows of a task and, if `with_held_out`, its held-out rows, else None.

    With task.held_out, a hash of the question decides which rows are held out; without it, the held-out rows are the
    source's split "test". `given`: rows passed from Python, used in place of the task's source. `answered`: training
    rows include completions. Raises UsageError if the task is unknown, if options, columns or rows are wrong, or if
    held-out rows are requested and there are none.
    """
    whole, keys = _load(task, field, task.split or "train", progress, given, answered)
    if task.held_out:
        train, held_out = _divide(whole, keys, task)
        return train, held_out if with_held_out else None
    if not with_held_out:
        return whole, None
    fixes = f"write {field}.held_out = 0.1, or set evaluation.task"
    if given is not None or not _has_test(task.name) or task.split not in (None, "train"):
        raise UsageError(f"evaluation: {whole.name} has no held-out rows; {fixes}")
    try:
        held_out, _ = _load(task, field, "test", progress)
    except UsageError as error:
        raise UsageError(f"evaluation: {whole.name} has no held-out rows ({error}); {fixes}") from None
    return whole, replace(held_out, name=f"{whole.name} (held out)")


def load_questions(task: Task, field: str, progress: Progress) -> Dataset:
    """The rows of a task that is used for evaluation only.

    With task.held_out, the held-out rows; else those of task.split, else of "test", or all rows if the source has no
    "test". Raises UsageError if the task is unknown or if options, columns or rows are wrong.
    """
    if task.held_out:
        return _divide(*_load(task, field, task.split or "train", progress), task)[1]
    return _load(task, field, task.split or ("test" if _has_test(task.name) else "train"), progress)[0]


def _load(
    task: Task,
    field: str,
    split: str,
    progress: Progress,
    given: Iterable[Row] | None = None,
    answered: bool = False,
) -> tuple[Dataset, list[str]]:
    """The rows of a task, and the texts that decide which of them are held out."""
    name = task.name if given is None else "prompts"
    with progress.bar(f"Reading {name}", None, "rows") as advance:
        source = _source(task, field, split, progress) if given is None else _checked(given, name, progress)
        transformed = transform(_counted(source, advance), task, field, name, answered)
    rows = _without_bytes([entry.row for entry in transformed], name, progress)
    keys = [entry.key for entry in transformed]
    chat = ChatOptions.of(task)
    trains = field.startswith(("task", "mixture"))  # evaluation tasks can have inherited the options
    if trains and (chat.kwargs or chat.tools) and all(isinstance(row["prompt"], str) for row in rows):
        raise UsageError(
            f"{field}.{'chat_template_kwargs' if chat.kwargs else 'tools'}: the prompts of {name} are plain text, "
            f'which no template renders; write {field}.system = "" to turn them into conversations, or remove it'
        )
    numbers = range(len(rows))
    dataset = Dataset(name, rows, numbers, field, task.max_prompt_tokens, task.overlong == "filter", chat)
    return dataset, keys


def _source(task: Task, field: str, split: str, progress: Progress) -> Iterator[Row]:
    """The unchanged rows of the source; any failure becomes a UsageError that names the task's field."""
    try:
        yield from _checked(_open(task, field, split, progress), task.name, progress)
    except UsageError as error:
        message = str(error)
        if message.startswith(("options", "split", "memory")):
            raise UsageError(f"{field}.{message}") from None
        raise UsageError(message if message.startswith(field) else f'{field}.name = "{task.name}": {message}') from None
    except (Exception, SystemExit) as error:
        raise UsageError(f'{field}.name = "{task.name}": it fails ({type(error).__name__}: {error}); fix it') from error


def _open(task: Task, field: str, split: str, progress: Progress) -> Iterable[Row]:
    name, options, limit = task.name, task.options, as_bytes(task.memory)
    if _is_file(name):
        _only_train(split, "a file")
        from gruppo.data.files import read_file

        return read_file(data_file(name), options, limit, progress)
    if name.startswith(_GYM):
        _only_train(split, "reasoning-gym")
        from gruppo.data.reasoning_gym import generate

        return generate(name.removeprefix(_GYM), options)
    from gruppo.data.benchmark_table import BENCHMARKS
    from gruppo.data.benchmarks import load_benchmark

    if name in BENCHMARKS:
        try:
            inspect.signature(load_benchmark).bind(name, split, limit, progress, **options)
        except TypeError as error:
            raise UsageError(
                f"options = {dict(options)}: {error}; its options are: data, prompt, shots, format"
            ) from None
        return load_benchmark(name, split, limit, progress, **options)
    folder = user_path(name)
    if name in TASKS or (":" in name and not is_dir(folder)):
        load = import_attribute(TASKS.get(name, name), f"{field}.name")
        try:
            inspect.signature(load).bind(split, **options)
        except TypeError as error:
            raise UsageError(f"options = {dict(options)}: {error}; {_options(load)}") from None
        return load(split, **options)  # type: ignore[no-any-return]
    if is_dir(folder) or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        from gruppo.data.hub import read_dataset

        return read_dataset(name, split, options, limit, progress)
    if is_file(folder):
        raise UsageError(f"unknown file type; use a file that ends in {', '.join(_FILES)}")
    from gruppo.utils.hub import split_revision

    repository, revision = split_revision(name)
    if revision is not None:
        raise UsageError(f'write {field}.name = "{repository}" and {field}.options = {{revision = "{revision}"}}')
    if "/" in name:
        raise UsageError(f"there is no such file or folder (looked in {Path.cwd()}); give its path")
    raise UsageError(f"unknown task{nearest(name, (*TASKS, *BENCHMARKS))}; or write {_KINDS}")


def _only_train(split: str, source: str) -> None:
    if split != "train":
        raise UsageError(
            f'split = "{split}": {source} has no splits; remove split, or hold rows out with held_out = 0.1'
        )


def _is_file(name: str) -> bool:
    return name.lower().endswith(_FILES) and not is_dir(user_path(name))


def _has_test(name: str) -> bool:
    """Whether a source can have a split "test"."""
    return not (_is_file(name) or name.startswith(_GYM) or is_file(user_path(name) / "state.json"))


def _options(load: Any) -> str:
    names = [name for name in inspect.signature(load).parameters if name != "split"]
    return f"its options are: {', '.join(names)}" if names else "it has no options"


def data_file(path: str) -> Path:
    """Resolve the path of a data file. Raises UsageError if there is no such file."""
    file = user_path(path)
    if found := not_a_file(file):
        raise UsageError(f"{path} is {found}; write the rows to a file and give its path")
    if not is_file(file):
        raise UsageError(f"there is no such file (looked in {Path.cwd()}); give the path of a file")
    return file


def _checked(rows: Any, source: str, progress: Progress) -> Iterable[Row]:
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # a data frame, which would iterate over column names
        return frame_rows(rows, source)
    if getattr(rows, "features", None) is not None and hasattr(rows, "with_format"):
        from gruppo.data.hub import dataset_rows

        return dataset_rows(rows, source, progress)
    if hasattr(rows, "to_pylist") and hasattr(rows, "schema"):
        return table_rows(rows, source, progress)
    if isinstance(rows, Mapping) and rows and all(hasattr(part, "features") for part in rows.values()):
        raise UsageError(
            f"{source} gives the splits {', '.join(map(str, rows))}, not a list of rows; give one split: "
            f'dataset["{next(iter(rows))}"]'
        )
    if isinstance(rows, str | bytes | Mapping) or not hasattr(rows, "__iter__"):
        raise UsageError(f'{source} gives {str(rows)[:40]!r}, not a list of rows; write [{{"prompt": "text"}}, …]')
    return rows  # type: ignore[no-any-return]


def _without_bytes(rows: list[Row], source: str, progress: Progress) -> list[Row]:
    """The rows without the columns that have bytes in any row; a progress note lists them."""
    dropped = list(dict.fromkeys(name for row in rows for name, value in row.items() if has_bytes(value)))
    note_left_out(dropped, source, progress)
    return [{name: row[name] for name in row if name not in dropped} for row in rows] if dropped else rows


def _counted(rows: Iterable[Row], advance: Advance) -> Iterator[Row]:
    number = 0
    for number, row in enumerate(rows, start=1):
        yield row
        if number % _SHOWN == 0:
            advance(_SHOWN)
    advance(number % _SHOWN)


def _divide(whole: Dataset, keys: Sequence[str], task: Task) -> tuple[Dataset, Dataset]:
    """Split rows into training and held-out rows by the hash of their keys.

    A held-out question that occurs several times is kept once: repetitions would make confidence intervals too narrow.
    Raises UsageError if one side would be empty.
    """
    is_held_out = [in_held_out(key, task.held_out) for key in keys]
    if len(set(is_held_out)) < 2:
        raise UsageError(
            f"{whole.field}.held_out = {task.held_out}: of the {len(is_held_out)} rows of {whole.name} "
            f"{'all' if is_held_out[0] else 'none'} would be held out; write another share, or give more rows"
        )
    places = [place for place, side in enumerate(is_held_out) if not side]
    asked = {prompt_text(whole.rows[place]): place for place in reversed(range(len(is_held_out))) if is_held_out[place]}
    train, test = (
        replace(whole, rows=[whole.rows[place] for place in side], numbers=[whole.numbers[place] for place in side])
        for side in (places, sorted(asked.values()))
    )
    return train, replace(test, name=f"{whole.name} (held out)")


def checked_rows(rows: Iterable[Row], source: str) -> list[Row]:
    """Check rows and return them as a list; the prompt of every row is text or messages.

    `source`: name of the rows in errors. Raises UsageError if there are no rows or a row has no usable prompt.
    """
    from gruppo.config.sections import Task

    return [entry.row for entry in transform(_checked(rows, source, NullProgress()), Task(), "task", source)]
