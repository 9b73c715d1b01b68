"""Reading the arguments of another trainer: a YAML file, a shell script, or a command line. Nothing of it is run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml

from gruppo.conversion.given import Source, Trainer, as_number
from gruppo.conversion.shell import Command, commands
from gruppo.errors import UsageError
from gruppo.utils.nesting import MAX_DEPTH
from gruppo.utils.paths import is_file, not_a_file

_MAX_SCRIPT, _MAX_YAML, _MAX_VALUES = 64 * 2**10, 256 * 2**10, 5_000

# The methods of each trainer, as `gruppo convert --source` names them.
SOURCES = ("trl-grpo", "trl-rloo", "trl-dpo", "trl-sft", "trl-reward", "verl", "openrlhf")

_PROGRAMS = {
    r"verl\.trainer\.main_ppo|(?:.*[./])?main_(?:ppo|dapo)(?:\.py)?|.*\.main_(?:ppo|dapo)": "verl",
    r"openrlhf\.cli\.train_ppo(?:_ray)?|(?:.*/)?train_ppo(?:_ray)?\.py": "openrlhf",
    r"(?:.*[/_.-])?(grpo|rloo|dpo|sft)(?:[_-]\w*)?\.py": "trl-",
    r"(?:.*/)?(reward_modeling|reward)\.py": "trl-reward",
}
_REFUSED = {
    r"openrlhf\.cli\.\w+": "gruppo convert reads the arguments of openrlhf.cli.train_ppo_ray only",
    r"verl\.trainer\.\w+": "gruppo convert reads the arguments of verl.trainer.main_ppo only",
}


@cache
def names() -> dict[str, list[str]]:
    """The names of the options of each trainer and method, from the file names.yaml beside this module."""
    text = resources.files("gruppo.conversion").joinpath("names.yaml").read_text(encoding="utf-8")
    return {key: value.split() for key, value in yaml.safe_load(text).items()}


def read(arguments: Sequence[str], source: str | None, processes: int | None) -> Source:
    """What the arguments name: a file, possibly followed by overrides, or a command line.

    `source` is one of SOURCES, or None to find out. Raises UsageError with the place and the fix if the arguments
    cannot be read, or are of no known trainer.
    """
    if source is not None and source not in SOURCES:
        raise UsageError(f"--source {source}: unknown; write one of {', '.join(SOURCES)}")
    if not arguments:
        raise UsageError("gruppo convert: give a YAML file, a shell script or a command line")
    path = Path(arguments[0])
    if is_file(path):
        found = _read_file(path, [*arguments[1:]], source)
    elif len(arguments) == 1 and not re.search(r"[\s=]", arguments[0]):
        raise UsageError(f"{path}: is {not_a_file(path) or 'not there'}; give a YAML file, a shell script or arguments")
    else:
        words = tuple(arguments)
        if len(words) == 1:
            words = tuple(word for command in commands(words[0], "arguments") for word in command.words)
        command = Command(words, (frozenset(),) * len(words))
        found = _of_command(command, "the command line", source, Path())
    return found if processes is None else _with(found, processes=processes)


def _with(source: Source, **changes: Any) -> Source:
    return Source(**{**vars(source), **changes})


def _text(path: Path, limit: int) -> str:
    try:
        with path.open("rb") as stream:
            content = stream.read(limit + 1)
        if len(content) > limit:
            raise UsageError(f"{path}: is larger than {limit // 2**10} KiB; give the arguments of one training")
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error}); give a readable file") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is not UTF-8 text; give a YAML file or a shell script") from None
    if re.search(r"[\x00-\x02]", text):
        raise UsageError(f"{path}: is not text; give a YAML file or a shell script")
    return text.replace("\r\n", "\n")


def _read_file(path: Path, overrides: list[str], source: str | None) -> Source:
    if path.suffix.lower() in {".yaml", ".yml", ".json"}:
        values = read_yaml(_text(path, _MAX_YAML), str(path))
        return _of_values(values, overrides, str(path), source)
    text = _text(path, _MAX_SCRIPT)
    trainings = [
        command for command in commands(text, str(path)) if source or _program(command.words) or _refused(command.words)
    ]
    if not trainings:
        raise UsageError(
            f"{path}: starts no training that gruppo knows (trl, verl.trainer.main_ppo, openrlhf.cli.train_ppo_ray); "
            f"give its arguments, with --source={'|'.join(SOURCES)}"
        )
    # With a source, the command with the most options is the training.
    chosen = trainings[0] if source is None else max(trainings, key=lambda command: len(command.words))
    more = Command((*chosen.words, *overrides), (*chosen.missing, *[frozenset[str]()] * len(overrides)))
    found = _of_command(more, str(path), source, path.parent)
    if source is None and len(trainings) > 1:
        note = f"{path} starts {len(trainings)} trainings; this is the first of them"
        found = _with(found, notes=(*found.notes, note))
    return found


def read_yaml(text: str, where: str) -> dict[str, Any]:
    """A YAML document as nested mappings of plain values. Raises UsageError for anything else, however large."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is not None:
            _require_small(node, where)
        data = None if node is None else loader.construct_document(node)
        json.dumps(data, ensure_ascii=False, default=str).encode()  # refuses halves of surrogate pairs
    except UsageError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"{where}: cannot be read as plain YAML ({reason}); write plain values") from None
    if not isinstance(data, dict):
        raise UsageError(f"{where}: must be a list of names with values, such as learning_rate: 1e-6")
    return {str(name): value for name, value in data.items()}


def _require_small(node: yaml.Node, where: str) -> None:
    """Raise UsageError if the document, with its anchors written out, has too many values or is nested too deeply."""
    sizes: dict[int, int] = {}

    def size(item: yaml.Node, depth: int) -> int:
        if depth > MAX_DEPTH:
            raise UsageError(f"{where}: is nested more than {MAX_DEPTH} levels deep; write plain values")
        if id(item) not in sizes:
            sizes[id(item)] = _MAX_VALUES + 1  # of an anchor inside itself
            inner = [part for pair in item.value for part in pair] if isinstance(item, yaml.MappingNode) else item.value
            parts = inner if isinstance(item, yaml.CollectionNode) else ()
            sizes[id(item)] = 1 + sum(size(part, depth + 1) for part in parts)
        return sizes[id(item)]

    if size(node, 1) > _MAX_VALUES:
        raise UsageError(f"{where}: has more than {_MAX_VALUES} values; give the arguments of one training")


def _of_values(values: dict[str, Any], overrides: list[str], where: str, source: str | None) -> Source:
    """Of a YAML file: TRL's arguments side by side, or verl's tables."""
    if source is None:
        source = "verl" if {"actor_rollout_ref", "algorithm", "trainer"} & values.keys() else _trl_method(values, where)
    if source == "verl":
        flat = flattened(values)
        changes, unknown = _hydra(overrides, [frozenset[str]()] * len(overrides))
        return Source("verl", "ppo", where, {**flat, **changes}, unknown=unknown)
    changes, unknown = _options(overrides, [frozenset[str]()] * len(overrides))
    trainer, method = _named(source)
    merged = {**values, **changes}
    count = as_number(merged.get("num_processes"))
    return Source(trainer, method, where, merged, processes=int(count) if count else None, unknown=unknown)


def _named(source: str) -> tuple[Trainer, str]:
    trainer, _, method = source.partition("-")
    known = {name.lower(): name for name in get_args(Trainer)}
    return known[trainer], method or "ppo"


def _trl_method(values: Mapping[str, Any], where: str) -> str:
    """The method whose arguments these are: the one with the most names that other methods do not have."""
    methods = ("grpo", "rloo", "dpo", "sft", "reward")
    known = names()
    common = {*known["training"], *known["model"], *known["script"]}
    if not values.keys() & {*common, *(name for method in methods for name in known[method])}:
        raise UsageError(f"{where}: has no name of TRL or verl; give a file with the arguments of a trainer")
    hint = re.search(r"(?:^|[^a-z])(grpo|rloo|dpo|sft|reward)(?:[^a-z]|$)", where.lower())
    scores = {method: len(values.keys() & set(known[method])) for method in methods}
    best = [method for method in methods if scores[method] == max(scores.values())]
    if hint and hint[1] in best:
        return f"trl-{hint[1]}"
    if len(best) == 1:
        return f"trl-{best[0]}"
    if "num_generations" in values:
        return "trl-grpo"
    if hint:
        return f"trl-{hint[1]}"
    raise UsageError(f"{where}: could be of several methods; write --source={'|'.join(f'trl-{one}' for one in best)}")


def flattened(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables as names with dots. An empty table is a value; OmegaConf's references to other values are
    followed, and left out if they lead nowhere."""
    flat: dict[str, Any] = {}

    def add(prefix: str, table: Mapping[str, Any]) -> None:
        for key, value in table.items():
            if isinstance(value, Mapping) and value:
                add(f"{prefix}{key}.", value)
            elif key not in {"defaults", "_target_"}:
                flat[f"{prefix}{key}"] = value

    add("", {key: value for key, value in values.items() if key != "hydra"})
    return {name: found for name in flat if (found := _followed(flat, name)) is not _NOWHERE}


_NOWHERE = object()
_REFERENCE = re.compile(r"\$\{(?:oc\.select:)?([\w.]+)(?:,([^${}]*))?\}")


def _followed(flat: Mapping[str, Any], name: str, steps: int = 10) -> Any:
    value = flat.get(name, _NOWHERE)
    if not isinstance(value, str) or "${" not in value:
        return value
    match = _REFERENCE.fullmatch(value)
    if match is None or not steps:
        return _NOWHERE
    target = match[1] if not match[1].startswith(".") else name.rpartition(".")[0] + match[1]
    found = _followed(flat, target, steps - 1)
    if found is _NOWHERE and match[2] is not None:
        return plain(match[2])
    return found


def _program(words: Sequence[str]) -> tuple[int, str] | None:
    """Where a command names a training program, and which one."""
    for index, word in enumerate(words):
        if word == "trl" or word.endswith("/trl"):
            method = words[index + 1] if index + 1 < len(words) else ""
            if f"trl-{method}" in SOURCES:
                return index + 1, f"trl-{method}"
        for pattern, source in _PROGRAMS.items():
            if match := re.fullmatch(pattern, word):
                return index, source + match[1] if source == "trl-" else source
        if word.startswith("--") and "=" not in word and index > 0 and _is_option_of_training(words[:index]):
            return None
    return None


def _is_option_of_training(words: Sequence[str]) -> bool:
    return any(word.endswith(".py") for word in words)


def _refused(words: Sequence[str]) -> str | None:
    return next((why for word in words for pattern, why in _REFUSED.items() if re.fullmatch(pattern, word)), None)


def _of_command(command: Command, where: str, source: str | None, folder: Path) -> Source:
    program = _program(command.words)
    if source is None and program is None:
        if why := _refused(command.words):
            raise UsageError(f"{where}: {why}")
        source = (
            "verl" if _looks_like_hydra(command.words) else "openrlhf" if _looks_like_openrlhf(command.words) else None
        )
        if source is None:
            raise UsageError(
                f"{where}: names no training program that gruppo knows; write --source={'|'.join(SOURCES)} before it"
            )
    index, found = (-1, str(source)) if program is None else program
    launcher, rest = command.words[: index + 1], command.words[index + 1 :]
    missing = command.missing[index + 1 :]
    chosen = source or found
    if chosen == "verl":
        values, unknown = _hydra(rest, missing)
        return Source("verl", "ppo", where, values, unknown=unknown)
    values, unknown = _options(rest, missing)
    trainer, method = _named(chosen)
    notes: tuple[str, ...] = ()
    if trainer == "TRL" and isinstance(config := values.pop("config", None), str):
        file = next((place for place in (folder / config, Path(config)) if is_file(place)), None)
        if file is None:
            notes = (f"the file {config}, which the command reads, is not there: convert it as well",)
        else:
            values = {**read_yaml(_text(file, _MAX_YAML), str(file)), **values}
    return Source(trainer, method, where, values, _processes(launcher), unknown, notes)


def _looks_like_hydra(words: Sequence[str]) -> bool:
    known = {name.partition(".")[0] for name in names()["verl"]}
    return any(
        re.match(r"[+~]*(\w+)\.[\w.]+=", word) and word.lstrip("+~").partition(".")[0] in known for word in words
    )


def _looks_like_openrlhf(words: Sequence[str]) -> bool:
    known = set(names()["openrlhf"])
    return any(word.lstrip("-").partition("=")[0] in known for word in words if word.startswith("--") and "." in word)


def _processes(words: Sequence[str]) -> int | None:
    """How many processes a launcher such as accelerate or torchrun starts; None if it does not say."""
    given, _ = _options(words, [frozenset[str]()] * len(words))

    def count(*candidates: str) -> int | None:
        first = (value[0] if isinstance(value := given.get(name), list) else value for name in candidates)
        return next((int(number) for one in first if (number := as_number(one))), None)

    if (total := count("num_processes")) is not None:
        return total
    per_node = count("nproc_per_node", "num_gpus")
    return None if per_node is None else per_node * (count("nnodes", "num_nodes") or 1)


def plain(text: str) -> Any:
    """A value of a command line, as in YAML; the text itself if it is not plain YAML."""
    if len(text) > 10_000:
        return text
    try:
        return read_yaml(f"value: {text}", "value")["value"]
    except UsageError:
        return text


def _hydra(words: Sequence[str], missing: Iterable[frozenset[str]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Overrides such as a.b=c, +a.b=c and ~a.b, and the names whose values are not in the file."""
    values: dict[str, Any] = {}
    unknown: dict[str, str] = {}
    for word, gaps in zip(words, missing):
        name, equals, text = word.lstrip("+~").partition("=")
        if not equals or word.startswith(("-", "~")) or not re.fullmatch(r"[\w.@/-]+", name):
            continue
        if gaps:
            unknown[name] = f"{text} depends on {', '.join(sorted(gaps))}"
            continue
        value = plain(text)
        values.update(flattened({name: value}) if isinstance(value, dict) and value else {name: value})
    return values, unknown


def _options(words: Sequence[str], missing: Iterable[frozenset[str]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Options such as --a 1, --a=1, --a 1 2 and --flag, and the names whose values are not in the file."""
    collected: dict[str, list[str]] = {}
    unknown: dict[str, set[str]] = {}
    name = ""
    for word, gaps in zip(words, missing):
        if re.match(r"--?[A-Za-z]", word):
            name, equals, text = word.lstrip("-").partition("=")
            name = name.replace("-", "_")
            collected[name] = [text] if equals else []
            unknown.pop(name, None)
        elif name:
            collected[name].append(word)
        if gaps and name:
            unknown.setdefault(name, set()).update(gaps)
    values: dict[str, Any] = {}
    for name, texts in collected.items():
        items = [plain(text) for text in texts]
        if name not in unknown:
            values[name] = True if not items else items[0] if len(items) == 1 else items
    reasons = {
        name: f"{' '.join(collected[name])} depends on {', '.join(sorted(gaps))}" for name, gaps in unknown.items()
    }
    return values, reasons
