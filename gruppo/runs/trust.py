"""Consent to the code that a run folder names.

A recipe is a program: it names functions, classes and models with Python files. Whoever passes a recipe has chosen it.
A run folder that comes from somebody else has not been chosen in this sense, so its code runs only after consent. The
cache records which folders this user has written, by path and recipe; nothing in a folder can claim this.
Nothing is imported here.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from gruppo.config.labels import options_name, split_label
from gruppo.config.loading import load_recipe
from gruppo.config.recipe import Recipe
from gruppo.config.sections import Task
from gruppo.errors import UsageError
from gruppo.utils.files import file_sha256
from gruppo.utils.imports import IN_MEMORY
from gruppo.utils.paths import cache_dir, is_file, user_path

RECIPE = "recipe.toml"

_FILES, _GYM = (".jsonl", ".json", ".csv", ".tsv", ".parquet"), "reasoning-gym/"  # tasks that are data
_PREFIXES = ("verl:", "verifiers:")
_SENDING = ("llm_judge", "remote")  # built-in rewards that send rows, and an environment variable, to an address


@dataclass(frozen=True)
class Code:
    """Code that a recipe or a saved reward call names.

    `place`: the field that names it. `name`: an import path, or what else runs. `options`: arguments that it gets.
    `variables`: environment variables that are passed to it.
    """

    place: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    variables: Sequence[str] = ()

    def __str__(self) -> str:
        """One line that says where the code is."""
        words = [f'{self.place} = "{self.name}"', *_location(self.name)]
        words += [f"with the options {json.dumps(dict(self.options), default=str)}"] if self.options else []
        words += [f"with the environment variables {', '.join(self.variables)}"] if self.variables else []
        return ", ".join(words)


def code_of(recipe: Recipe) -> list[Code]:
    """All code that a recipe names, in the order of its tables. Built-in names are not code of the recipe, except those
    of rewards that send data to an address that the recipe names."""
    return list(_code_of(recipe))


def _code_of(recipe: Recipe) -> Iterator[Code]:
    if recipe.model.trust_remote_code:
        yield Code("model.trust_remote_code", f"the Python files of {recipe.model.name}")
    names = [f"mixture[{place}]" for place in range(len(recipe.mixture))] or ["task"]
    for name, task in zip(names, recipe.tasks, strict=True):
        yield from _task(name, task)
    rewards = recipe.reward
    for reward in rewards.functions:
        options = rewards.options.get(options_name(reward), {})
        yield from _named("reward.functions", split_label(reward)[1], options, rewards.environment)
    if recipe.reward_model is not None:
        yield from _named("reward_model.split", recipe.reward_model.split)
    if recipe.environment is not None:
        yield from _named("environment.name", recipe.environment.name, recipe.environment.options, rewards.environment)
        if recipe.environment.run_model_code_WITHOUT_A_SANDBOX:
            yield Code("environment.run_model_code_WITHOUT_A_SANDBOX", "Python code that the model writes")
    if recipe.audit is not None:
        function = split_label(recipe.audit.function)[1]
        yield from _named("audit.function", function, recipe.audit.options, rewards.environment)
    yield from _named("method.surrogate", recipe.method.surrogate)
    sections = [("evaluation", recipe.evaluation)] if recipe.evaluation else []
    sections += [(f"benchmarks[{place}]", benchmark) for place, benchmark in enumerate(recipe.benchmarks)]
    for name, settings in sections:
        if settings.task is not None:
            yield from _task(f"{name}.task", settings.task)
        if settings.grader is not None:
            yield from _named(f"{name}.grader", settings.grader)


def _task(place: str, task: Task) -> Iterator[Code]:
    if not task.name.lower().endswith(_FILES) and not task.name.startswith(_GYM):
        yield from _named(f"{place}.name", task.name, task.options)


def _named(
    place: str, name: str, options: Mapping[str, Any] | None = None, variables: Sequence[str] = ()
) -> Iterator[Code]:
    """The code behind a name, if it is an import path, or a built-in reward that sends what it gets to an address. A
    function that was passed from Python is not in the folder."""
    if name in _SENDING or (":" in name and not name.startswith(IN_MEMORY)):
        yield Code(place, name, options or {}, tuple(variables))


def _location(name: str) -> list[str]:
    """The file that would be imported first for an import path. Nothing is imported to find out."""
    path = next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)
    location, colon, _ = path.rpartition(":")
    if not colon:
        return []
    if location.endswith(".py"):
        file = user_path(location)
        return [f"in {file.resolve()}" if is_file(file) else "a file that does not exist"]
    with suppress(Exception):  # finders of third-party packages can fail in any way
        found = PathFinder.find_spec(location.partition(".")[0], [str(Path.cwd()), *sys.path])
        if found is not None and found.origin:
            return [f"in {found.origin}"]
    return []


def foreign_code(folder: Path, used: Recipe) -> list[Code]:
    """The code that `used`, the recipe of a command, takes over from the recipe in a run folder.

    Empty if this user wrote the folder.
    """
    if is_own(folder):
        return []
    names = {code.name for code in code_of(load_recipe(folder / RECIPE))}
    return [code for code in code_of(used) if code.name in names]


def evaluation_code(folder: Path, used: Recipe) -> list[Code]:
    """The part of `foreign_code` that runs when the evaluation sets of `used` are run."""
    unused = ["model", "reward", "audit", "method"]
    if used.evaluation is None or used.evaluation.task is not None:  # otherwise it uses held-out training rows
        unused += ["task", "mixture"]
    return [item for item in foreign_code(folder, used) if not item.place.startswith(tuple(unused))]


def code_of_call(folder: Path, call: Mapping[str, Any]) -> list[Code]:
    """The code that a reward call in a run folder names; empty if this user wrote the folder, and its recipe names the
    function too."""
    function = split_label(call["function"] or "")[1]
    named = list(_named("function", function, call["options"], call["environment"]))
    if named and is_own(folder) and call["function"] in load_recipe(folder / RECIPE).reward.functions:
        return []
    return named


def refusal(source: Path, code: Collection[Code], fix: str) -> UsageError:
    """The error for code without consent. `fix`: how to give consent."""
    listed = "; ".join(map(str, code))
    return UsageError(
        f"{source}: names code, and does not come from this user on this machine: {listed}. Read it: it runs with your "
        f"permissions. If you trust it, {fix}"
    )


def remember(folder: Path) -> None:
    """Record that this user wrote the recipe in a folder. Without a cache, gruppo asks again."""
    with suppress(OSError):
        record = _record(folder)
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(file_sha256(folder / RECIPE), encoding="ascii")


def is_own(folder: Path) -> bool:
    """Whether this user wrote the recipe that is in the folder now."""
    with suppress(OSError):
        return _record(folder).read_text(encoding="ascii") == file_sha256(folder / RECIPE)
    return False


def _record(folder: Path) -> Path:
    return cache_dir() / "folders" / hashlib.sha256(str(folder.resolve()).encode("utf-8", "replace")).hexdigest()
