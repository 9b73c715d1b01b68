"""Questions that reasoning-gym generates, and its own scoring of answers.

Some of its generators walk through Python sets, whose order changes from process to process. Rows are therefore made
in a process of their own with a fixed hash seed: the same options give the same rows, in every run and after a resume.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import pickle
import re
import subprocess
import sys
import typing
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from gruppo.errors import UsageError, nearest
from gruppo.types import Row

PREFIX = "reasoning-gym/"
SIZE = 1000

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
# What reading a malformed answer raises in a scorer.
_UNREADABLE = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, SyntaxError, AssertionError)


def generate(name: str, options: Mapping[str, Any]) -> Iterable[Row]:
    """Rows of the data set `name`. `options`: its own parameters, size (default 1000) and seed (default 0).

    A row has prompt (the question as a conversation), question, answer, metadata, and, for the scorer, dataset and
    parameters. Raises UsageError: unknown data set, unknown or impossible parameter.
    """
    parameters = {"size": SIZE, "seed": 0, **options}
    make_dataset(name, parameters)
    command = [sys.executable, "-c", "from gruppo.data.reasoning_gym import write_entries; write_entries()"]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with process.stdin:
                pickle.dump((name, parameters), process.stdin)
            for number in range(parameters["size"]):
                entry = _read_entry(process.stdout, number)
                yield {
                    "prompt": [{"role": "user", "content": entry["question"]}],
                    "question": entry["question"],
                    "answer": entry["answer"],
                    "metadata": entry["metadata"],
                    "dataset": name,
                    "parameters": parameters,
                }
        finally:
            process.kill()


def _read_entry(stream: typing.IO[bytes], number: int) -> dict[str, Any]:
    try:
        entry: dict[str, Any] | str = pickle.load(stream)
    except EOFError:
        raise UsageError(f"the process that generates it died at row {number + 1}; see what it wrote above") from None
    if isinstance(entry, str):
        raise UsageError(f"row {number + 1} cannot be generated ({entry}); change its options")
    return entry


def write_entries() -> None:
    """The process that generates: name and parameters from standard input, entries to standard output, as pickles."""
    with os.fdopen(os.dup(1), "wb") as output:
        os.dup2(2, 1)  # whatever the generator prints
        name, parameters = pickle.load(sys.stdin.buffer)
        try:
            dataset = make_dataset(name, parameters)
            for number in range(parameters["size"]):
                pickle.dump(dataset[number], output)
        except Exception as error:  # noqa: BLE001  generators are other people's code
            pickle.dump(f"{type(error).__name__}: {error}", output)


def score(text: str, columns: Mapping[str, Any]) -> float:
    """Score of an answer by its data set's own rules, from 0 to 1 (a few data sets go below 0).

    The answer is what stands in the last <answer>…</answer>, or else the whole text. One that the scorer cannot read
    (it raises what reading raises) scores 0. Raises UsageError where the row was not made by reasoning-gym.
    """
    missing = [name for name in ("question", "answer", "metadata", "dataset", "parameters") if name not in columns]
    if missing:
        raise UsageError(f'a row has no {", ".join(missing)}; "reasoning_gym" scores rows of "{PREFIX}NAME" only')
    dataset = _scorer(columns["dataset"], pickle.dumps(columns["parameters"]))
    entry = {name: columns[name] for name in ("question", "answer", "metadata")}
    found = _ANSWER.findall(text)
    try:
        return float(dataset.score_answer((found[-1] if found else text).strip(), entry))
    except _UNREADABLE:
        return 0.0


@lru_cache(maxsize=64)
def _scorer(name: str, parameters: bytes) -> Any:
    return make_dataset(name, pickle.loads(parameters))


def make_dataset(name: str, parameters: Mapping[str, Any]) -> Any:
    """The data set of reasoning-gym with these parameters. Raises UsageError for an unknown name or parameter."""
    known = import_datasets()
    if name not in known:
        raise UsageError(f"reasoning-gym has no data set of that name{nearest(name, known)}")
    dataset, config = known[name]
    kinds = typing.get_type_hints(config)
    fields = [field.name for field in dataclasses.fields(config)]
    for option in parameters:
        if option not in fields:
            raise UsageError(
                f"options.{option} = {parameters[option]!r}: {name} has no such parameter; "
                f"its parameters: {', '.join(fields)}"
            )
    size = parameters.get("size")
    if type(size) is not int or size < 1:
        raise UsageError(f"options.size = {size!r}: must be a whole number from 1; write size = {SIZE}")
    given = {option: _as_type(value, kinds[option], option) for option, value in parameters.items()}
    try:
        made = config(**given)
        if hasattr(made, "validate"):
            made.validate()
        return dataset(config=made)
    except Exception as error:  # its own checks, mostly assertions
        raise UsageError(
            f"options = {dict(parameters)}: {name} refuses them ({str(error) or type(error).__name__}); change them"
        ) from error


def import_datasets() -> dict[str, Any]:
    """reasoning-gym's data sets by name. Raises UsageError where the package is not installed."""
    try:
        import reasoning_gym.composite
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UsageError(f'reasoning-gym cannot be imported ({error}); run: pip install "gruppo[tasks]"') from None
    assert reasoning_gym.composite
    return dict(DATASETS)


def _as_type(value: Any, kind: Any, option: str) -> Any:
    """A value of TOML as the type of a parameter: lists as tuples, text as members of enumerations, tables as
    configurations."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Union:
        return None if value is None else _as_type(value, inner[0], option)
    if isinstance(value, list) and (origin or kind) in (list, tuple):
        of = [inner[0] if inner and (origin is list or inner[1:] == (...,)) else Any] * len(value)
        if origin is tuple and len(inner) == len(value):
            of = list(inner)
        return (origin or kind)(_as_type(each, part, option) for each, part in zip(value, of, strict=True))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        by_name = {str(key).lower(): member for member in kind for key in (member.name, member.value)}
        if str(value).lower() not in by_name:
            raise UsageError(f"options.{option} = {value!r}: unknown{nearest(str(value), by_name)}")
        return by_name[str(value).lower()]
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        try:
            return kind(**value)  # type: ignore[operator]
        except TypeError as error:
            names = ", ".join(field.name for field in dataclasses.fields(kind))
            raise UsageError(f"options.{option} = {value!r}: {error}; its fields: {names}") from None
    simple = {int: (int,), float: (int, float), str: (str,), bool: (bool,)}.get(kind)
    if simple and (not isinstance(value, simple) or (isinstance(value, bool) and kind is not bool)):
        raise UsageError(f"options.{option} = {value!r}: must be of type {kind.__name__}; write one")
    return value
