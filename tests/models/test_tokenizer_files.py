"""A saved tokenizer has the class and the keys that the files of the initial model have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gruppo.models.tokenizer_files import save_tokenizer
from gruppo.models.weights import save_model
from tests.conftest import make_policy
from tests.odd_tokenizers import CHATML, byte_level, metaspace

NEW_KEYS = {"backend", "is_local", "local_files_only", "extra_special_tokens"}


def files_of_version_4(folder: Path, **config: object) -> Path:
    """A tokenizer as transformers 4 wrote it: other class names, the template in the config, and a map of tokens."""
    tokenizer = byte_level()
    tokenizer.save_pretrained(folder)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    added = {
        str(index): {"content": token.content, "special": True, "normalized": False, "lstrip": False, "rstrip": False,
                     "single_word": False}
        for index, token in tokenizer.added_tokens_decoder.items()
    }  # fmt: skip
    content = {
        "added_tokens_decoder": added, "additional_special_tokens": ["<|im_end|>"], "chat_template": CHATML,
        "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast", **names, **config,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    return folder


def config_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "Qwen2TokenizerFast", "GPT2Tokenizer"])
def test_an_unchanged_tokenizer_keeps_the_files_of_the_initial_model(tmp_path: Path, kind: str) -> None:
    start = files_of_version_4(tmp_path / "start", tokenizer_class=kind)
    tokenizer = AutoTokenizer.from_pretrained(start)
    for folder in (tmp_path / "base", tmp_path / "model"):  # the second is saved from the first
        save_tokenizer(tokenizer, folder)
        for name in ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"):
            assert (folder / name).read_bytes() == (start / name).read_bytes()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == CHATML


def test_a_saved_model_keeps_them_too(tmp_path: Path) -> None:
    start = files_of_version_4(tmp_path / "start")
    policy = make_policy()
    object.__setattr__(policy, "tokenizer", AutoTokenizer.from_pretrained(start))
    save_model(policy, tmp_path / "model")
    assert config_of(tmp_path / "model") == config_of(start)


def test_a_changed_tokenizer_keeps_the_class_and_has_its_changes(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(
        files_of_version_4(tmp_path / "start", tokenizer_class="GPT2TokenizerFast")
    )
    tokenizer.chat_template = "{{ 'another' }}"
    save_tokenizer(tokenizer, tmp_path / "template")
    config = config_of(tmp_path / "template")
    assert config["tokenizer_class"] == "GPT2TokenizerFast"
    assert "chat_template" not in config
    assert AutoTokenizer.from_pretrained(tmp_path / "template").chat_template == "{{ 'another' }}"
    tokenizer.pad_token = "</s>"
    tokenizer.add_tokens(["<new>"], special_tokens=True)
    save_tokenizer(tokenizer, tmp_path / "changed")
    config = config_of(tmp_path / "changed")
    assert config["tokenizer_class"] == "GPT2TokenizerFast"
    assert not NEW_KEYS & config.keys()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "changed")
    assert loaded.pad_token == "</s>"
    assert "<new>" in loaded.get_vocab()


def test_a_tokenizer_from_memory_has_a_class_that_all_versions_know(tmp_path: Path) -> None:
    tokenizer: PreTrainedTokenizerFast = metaspace(template=CHATML)
    save_tokenizer(tokenizer, tmp_path)
    config = config_of(tmp_path)
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not NEW_KEYS & config.keys()
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == CHATML


def test_the_files_of_another_tokenizer_in_the_same_place_are_not_copied(tmp_path: Path) -> None:
    start = files_of_version_4(tmp_path / "start")
    tokenizer = AutoTokenizer.from_pretrained(start)
    metaspace().save_pretrained(start)  # somebody replaced the model during the run
    save_tokenizer(tokenizer, tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab() == tokenizer.get_vocab()
