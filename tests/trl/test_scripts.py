"""Command-line scripts: the parser, the arguments of models and data sets, and TRL's rewards by name."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification

from gruppo.errors import UsageError
from gruppo.trl import (
    DatasetMixtureConfig,
    GRPOConfig,
    GRPOTrainer,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_kbit_device_map,
    get_peft_config,
    get_quantization_config,
    rewards,
)
from gruppo.trl.quantization import asks_for_four_bits
from gruppo.trl.scripts import DatasetConfig
from tests.conftest import make_tokenizer

KINDS = (ScriptArguments, GRPOConfig, ModelConfig, DatasetMixtureConfig)


def test_command_line_and_file_fill_the_dataclasses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRUPPO_OF_TEST", raising=False)
    config = tmp_path / "config.yaml"
    config.write_text(
        "learning_rate: 0.5\nmodel_name_or_path: tiny\nenv:\n  GRUPPO_OF_TEST: 7\n"
        "lora_target_modules: [q_proj, v_proj]\n"
    )
    line = [
        "--config",
        str(config),
        "--num_generations",
        "4",
        "--use_peft",
        "--dataset_name",
        "rows",
        "--learning_rate",
    ]
    script, training, model, mixture = TrlParser(KINDS).parse_args_and_config([*line, "0.25", "--bf16", "False"])
    assert (training.learning_rate, training.num_generations, training.bf16) == (0.25, 4, False)
    assert (script.dataset_name, script.dataset_train_split, mixture.datasets) == ("rows", "train", [])
    assert os.environ.pop("GRUPPO_OF_TEST") == "7"
    peft = get_peft_config(model)
    assert peft is not None
    assert (peft.r, peft.lora_alpha, sorted(peft.target_modules)) == (16, 32, ["q_proj", "v_proj"])
    assert get_quantization_config(model) is get_kbit_device_map() is get_peft_config(ModelConfig()) is None


def test_unknown_names(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("learning_rat: 0.5\n")
    parser = TrlParser(ScriptArguments)
    with pytest.raises(UsageError, match=r"unknown arguments --learning_rat 0\.5"):
        parser.parse_args_and_config(["--config", str(config)])
    assert len(parser.parse_args_and_config(["--config", str(config)], fail_with_unknown_args=False)) == 1
    rest = parser.parse_args_and_config(["--config", str(config), "--more", "1"], return_remaining_strings=True)
    assert rest[1] == ["--learning_rat", "0.5", "--more", "1"]
    _, *split = parser.parse_args_and_config(
        ["--config", str(config), "--more", "1"], return_remaining_strings=True, separate_remaining_strings=True
    )
    assert split == [["--learning_rat", "0.5"], ["--more", "1"]]


@pytest.mark.parametrize("content", ["- 1\n", "a: [\n", "env: 3\n", "!!python/object/apply:os.getcwd []\n"])
def test_files_that_are_no_configuration_are_refused(tmp_path: Path, content: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(content)
    with pytest.raises(UsageError, match="config = "):
        TrlParser(ScriptArguments).parse_args_and_config(["--config", str(config)])


def test_a_field_called_config_is_refused() -> None:
    @dataclass
    class Mine:
        config: str = ""

    with pytest.raises(UsageError, match="Mine: has a field config"):
        TrlParser(Mine)


@pytest.mark.parametrize("kind", [ScriptArguments, ModelConfig, DatasetMixtureConfig])
def test_fields_are_those_of_trl(kind: type) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed, so there is nothing to compare with")
    ours, theirs = ({entry.name for entry in fields(one)} for one in (kind, getattr(trl, kind.__name__)))
    assert theirs <= ours <= theirs | {"torch_dtype"}


def test_a_mixture_of_data_sets(tmp_path: Path) -> None:
    for name, count in (("a", 8), ("b", 4)):
        (tmp_path / name).mkdir()
        Dataset.from_list([{"prompt": f"{name}{n}", "extra": n} for n in range(count)]).to_parquet(
            str(tmp_path / name / "train.parquet")
        )
    parts: list[Any] = [{"path": str(tmp_path / name), "columns": ["prompt"]} for name in "ab"]
    mixed = get_dataset(DatasetMixtureConfig(datasets=parts))
    assert (len(mixed["train"]), mixed["train"].column_names) == (12, ["prompt"])
    shares = [DatasetConfig(str(tmp_path / name), fraction=0.5) for name in "ab"]
    assert len(get_dataset(DatasetMixtureConfig(datasets=shares))["train"]) == 8
    split = get_dataset(DatasetMixtureConfig(datasets=shares, test_split_size=0.25))
    assert (len(split["train"]), len(split["test"])) == (6, 2)
    with pytest.raises(UsageError, match="every data set one"):
        get_dataset(DatasetMixtureConfig(datasets=[shares[0], DatasetConfig(str(tmp_path / "b"))]))
    with pytest.raises(UsageError, match="name at least one"):
        get_dataset(DatasetMixtureConfig())


def test_quantization() -> None:
    config = get_quantization_config(ModelConfig(load_in_4bit=True))
    assert asks_for_four_bits(config, "quantization_config", adapters=True)
    with pytest.raises(UsageError, match=r"load_in_8bit = True: .*model.lora.base"):
        get_quantization_config(ModelConfig(load_in_8bit=True))


def test_trl_is_not_needed() -> None:
    code = """
import sys
sys.modules["trl"] = None
from gruppo.trl import *
from gruppo.trl import GRPOTrainer, TrlParser, rewards, upload
import gruppo.trl.rewards
assert not [name for name in sys.modules if name.startswith("trl.")]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_names_are_told() -> None:
    import gruppo.trl

    with pytest.raises(AttributeError, match="has no attribute 'PPOTrainer'; it has"):
        _ = gruppo.trl.PPOTrainer  # type: ignore[attr-defined]
    assert "GRPOTrainer" in dir(gruppo.trl)


TEXTS = ["<think>a</think>\\boxed{2}", "<think>a\\boxed{2}", r"\boxed{2.0}", "3", ""]


@pytest.mark.parametrize("name", ["accuracy_reward", "reasoning_accuracy_reward", "think_format_reward"])
def test_rewards_are_those_of_trl(name: str) -> None:
    trl = pytest.importorskip("trl.rewards", reason="TRL is not installed, so there is nothing to compare with")
    completions = [[{"role": "assistant", "content": text}] for text in TEXTS]
    options = {} if name == "think_format_reward" else {"solution": ["$2$"] * len(TEXTS)}
    ours = getattr(rewards, name)(completions, **options)
    assert ours == getattr(trl, name)(completions, **options)
    assert len(set(ours)) > 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("get_soft_overlong_punishment", {"max_completion_len": 8, "soft_punish_cache": 4}),
        ("get_repetition_penalty_reward", {"ngram_size": 2, "max_penalty": -0.5}),
        ("get_cosine_scaled_reward", {"max_len": 6}),
    ],
)
def test_made_rewards_are_those_of_trl(name: str, options: dict[str, Any]) -> None:
    trl = pytest.importorskip("trl.rewards", reason="TRL is not installed, so there is nothing to compare with")
    ids = [[1], [1, 2, 1, 2, 1], [3] * 6, [5] * 20, []]
    completions = [[{"role": "assistant", "content": text}] for text in TEXTS]
    arguments = {"completions": completions, "completion_ids": ids, "solution": ["$2$"] * len(TEXTS)}
    ours, theirs = (getattr(one, name)(**options)(**arguments) for one in (rewards, trl))
    assert ours == pytest.approx(theirs)


def test_reward_models_by_folder_and_in_memory(tiny_folder: str, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1,
        pad_token_id=0, max_position_embeddings=128,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "scores")
    make_tokenizer().save_pretrained(tmp_path / "scores")
    args = GRPOConfig(
        str(tmp_path / "out"), max_steps=1, max_completion_length=4, disable_tqdm=True, logging_steps=1, bf16=False
    )
    trainer = GRPOTrainer(
        tiny_folder, [str(tmp_path / "scores"), model], args, [{"prompt": "ab"}],
        reward_processing_classes=[None, make_tokenizer()],
    )  # fmt: skip
    trainer.train()
    line = trainer.state.log_history[0]
    means = [value for name, value in line.items() if name.startswith("rewards/") and name.endswith("/mean")]
    assert "rewards/scores/mean" in line
    assert means[0] == pytest.approx(means[1])
    model.config.num_labels = 2
    with pytest.raises(UsageError, match="2 outputs"):
        GRPOTrainer(tiny_folder, model, args, [{"prompt": "ab"}])
