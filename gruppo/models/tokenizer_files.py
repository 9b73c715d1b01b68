"""Saves a tokenizer so that it loads with every version of transformers that loads the initial model.

A version of transformers names its own classes and keys in the files that it writes, and it may write another pipeline
than it read. So the files of the initial model are kept as they are. A tokenizer without files, or one that was changed
in Python, is described in words that all versions from 4.40 on know.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

_CONFIG, _TEMPLATES = "tokenizer_config.json", ("chat_template.jinja", "chat_template.json")
_FILES = (
    "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip
_OF_VERSION_5 = ("backend", "is_local", "local_files_only")  # keys that describe the machine that wrote them


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the files of a tokenizer: those that it was loaded from, if it is still the same."""
    tokenizer.save_pretrained(folder)
    found = _found(tokenizer, (_CONFIG, *_TEMPLATES, *_FILES))
    start = json.loads(found[_CONFIG].read_text(encoding="utf-8")) if _CONFIG in found else {}
    if "auto_map" in start:  # its class is a Python file, which was saved with it
        return
    original = _original(tokenizer.name_or_path, _stamps(found)) if start else None
    if original is None or not _same_tokens(tokenizer, original):
        written = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        _write(folder, _for_all_versions(written, start.get("tokenizer_class")))
        return
    same_template = original.chat_template == tokenizer.chat_template
    for name in (*_FILES, *(_TEMPLATES if same_template else ())):
        if name in found:
            shutil.copyfile(found[name], folder / name)
    if same_template:
        shutil.copyfile(found[_CONFIG], folder / _CONFIG)
    else:
        _write(folder, {key: value for key, value in start.items() if key != "chat_template"})


def _write(folder: Path, config: Mapping[str, Any]) -> None:
    text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
    (folder / _CONFIG).write_text(text + "\n", encoding="utf-8")


def _found(tokenizer: PreTrainedTokenizerBase, names: tuple[str, ...]) -> dict[str, Path]:
    """The files that a tokenizer was loaded from, in a folder or in the cache of the hub, by name."""
    where = str(tokenizer.name_or_path or "")
    if not where:
        return {}
    if Path(where).is_dir():
        return {name: Path(where) / name for name in names if (Path(where) / name).is_file()}
    try:
        cached = {name: try_to_load_from_cache(where, name) for name in names}
    except HFValidationError:
        return {}
    return {name: Path(path) for name, path in cached.items() if isinstance(path, str)}


def _stamps(files: Mapping[str, Path]) -> tuple[tuple[str, int, int], ...]:
    """What changes when one of the files does: names, sizes and times."""
    statuses = {str(path): path.stat() for path in files.values()}
    return tuple((name, status.st_size, status.st_mtime_ns) for name, status in sorted(statuses.items()))


@lru_cache(maxsize=1)
def _original(where: str, _: tuple[tuple[str, int, int], ...]) -> PreTrainedTokenizerBase | None:
    """The tokenizer as it is in its files; None if they cannot be loaded any more. A run saves it several times."""
    try:
        return AutoTokenizer.from_pretrained(where, local_files_only=True, trust_remote_code=False)
    except Exception:  # noqa: BLE001  third-party files can fail in any way
        return None


def _same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    backends = [getattr(tokenizer, "backend_tokenizer", None) for tokenizer in (one, other)]
    same = type(one) is type(other) and one.special_tokens_map == other.special_tokens_map
    if None in backends:
        return same and one.get_vocab() == other.get_vocab()
    return same and len({backend.to_str() for backend in backends if backend is not None}) == 1


def _for_all_versions(written: Mapping[str, Any], start_class: str | None) -> dict[str, Any]:
    """What transformers wrote, with a class and keys that its earlier versions know, too."""
    config = {key: value for key, value in written.items() if key not in _OF_VERSION_5}
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if start_class is not None or config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = start_class or "PreTrainedTokenizerFast"
    return config
