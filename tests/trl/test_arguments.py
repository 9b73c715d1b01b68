"""Every argument of TRL's trainers is mapped, ignored or refused."""

from __future__ import annotations

import runpy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from gruppo.errors import UsageError
from gruppo.trl import DPOConfig, GRPOConfig, RLOOConfig, SFTConfig, TrlParser
from gruppo.trl.arguments import IGNORED, MAPPED, REFUSED, check, default_of, words_of
from gruppo.trl.configs import Earlier

CONFIGS = {kind.__name__: kind for kind in (GRPOConfig, RLOOConfig, DPOConfig, SFTConfig)}
EARLIER = {entry.name for entry in fields(Earlier)}
NAMES = {entry.name for kind in CONFIGS.values() for entry in fields(kind)}


def test_every_argument_is_in_exactly_one_list() -> None:
    assert sorted([*MAPPED, *IGNORED, *REFUSED]) == sorted(NAMES)
    for name in NAMES:
        assert len(words_of(name)) > 5, name


@pytest.mark.parametrize("name", CONFIGS)
def test_arguments_and_defaults_are_those_of_trl(name: str) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed, so there is nothing to compare with")
    ours = {entry.name: default_of(entry) for entry in fields(CONFIGS[name])}
    theirs = {entry.name: default_of(entry) for entry in fields(getattr(trl, name))}
    assert ours.keys() - EARLIER == theirs.keys() - EARLIER
    del theirs["optim"]  # depends on the version of torch
    assert {key: ours[key] for key in theirs} == theirs


def test_first_argument_is_output_dir() -> None:
    assert GRPOConfig("folder").output_dir == "folder"


def test_what_is_ignored_is_listed_and_defaults_are_not() -> None:
    assert check(GRPOConfig()) == []
    assert check(GRPOConfig(use_vllm=True, ddp_timeout=5, learning_rate=1.0)) == ["ddp_timeout", "use_vllm"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_p": 0.9}, ["top_p = 0.9", "full distribution", "remove it"]),
        ({"entropy_coef": 0.01}, ["entropy_coef = 0.01", "no entropy term"]),
        ({"sync_ref_model": True}, ["sync_ref_model = True", "the initial policy"]),
        ({"shuffle_dataset": False}, ["shuffle_dataset = False", "run.seed"]),
        ({"delta": 4.0, "top_k": 50}, ["delta = 4.0", "top_k = 50"]),
        ({"load_best_model_at_end": True}, ["the best checkpoint is kept"]),
    ],
)
def test_what_would_change_the_training_is_refused_with_words(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        check(GRPOConfig(**changes))
    assert all(word in str(caught.value) for word in ["GRPOConfig", *words])


@pytest.mark.parametrize("changes", [{"top_p": None}, {"top_k": -1}, {"min_p": 0.0}, {"lr_scheduler_kwargs": {}}])
def test_neutral_values_are_accepted(changes: dict[str, Any]) -> None:
    assert check(GRPOConfig(**changes)) == []


def test_options_written_as_text_become_mappings() -> None:
    """In Python as well as on a command line, whose parser changes the fields of the class."""
    text, options = '{"enable_thinking": false}', {"enable_thinking": False}
    config = GRPOConfig(chat_template_kwargs=text, evaluation_strategy="steps")
    assert config.chat_template_kwargs == options
    assert config.eval_strategy == "steps"
    (parsed,) = TrlParser(GRPOConfig).parse_args_and_config(["--chat_template_kwargs", text])
    assert parsed.chat_template_kwargs == options
    assert GRPOConfig(chat_template_kwargs=text).chat_template_kwargs == options


def test_tokens_are_not_printed() -> None:
    config = GRPOConfig("out", hub_token="secret")
    assert "secret" not in config.to_json_string()
    assert config.to_dict()["output_dir"] == "out"


def test_the_page_has_the_lists_of_the_code() -> None:
    page = Path("docs/coming_from_trl.md").read_text(encoding="utf-8")
    assert runpy.run_path("scripts/coming_from_trl.py")["page"]() == page, "run `make coming-from-trl`"
    assert all(f"| `{name}` |" in page for name in NAMES)
