"""Damaged weights are named as such, with the tensor, before any other advice; everywhere that weights are read."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gruppo.errors import UsageError
from gruppo.models.compatibility import wrap_model
from gruppo.models.loading import find_model, load_model
from gruppo.models.reward_model import load_reward_model, save_reward_model
from gruppo.models.weights import damage_of, not_finite_in
from gruppo.rewards.classifier import Classifier
from gruppo.training.export import export
from gruppo.utils.files import file_sha256
from tests.conftest import make_policy
from tests.models.test_loading import write_gguf
from tests.models.test_reward_model import scalar
from tests.rewards.test_classifier import save_llama
from tests.small_runs import small_run

Change = Callable[[dict[str, Tensor]], None]
UP = "model.layers.1.mlp.up_proj.weight"


def put(name: str, value: float, count: int = 1) -> Change:
    """Overwrite the last values of a tensor, as a file does whose end is damaged."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[-count:] = value

    return change


def zero(tensors: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        tensor.zero_()


def damage(file: Path, change: Change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put(UP, math.nan), f"{UP} has 1 NaN of 1,536 values"),
        (put(UP, math.nan, 7), f"{UP} has 7 NaN of 1,536 values"),
        (put(UP, math.inf), f"{UP} has 1 infinite of 1,536 values"),
        (put(UP, -math.inf, 2), f"{UP} has 2 infinite of 1,536 values"),
        (put("model.norm.weight", math.nan), "model.norm.weight has 1 NaN of 32 values"),
        (put("model.embed_tokens.weight", math.nan), "model.embed_tokens.weight has 1 NaN"),
        (zero, "matrices contain only zeros"),
    ],
)
def test_a_damaged_folder_is_refused_with_the_tensor(
    change: Change, words: str, tiny_folder: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    damage(folder / "model.safetensors", change)
    with pytest.raises(UsageError) as error:
        load_model(find_model(str(folder)), "cpu", "float32")
    message = str(error.value)
    assert message.startswith(f"model: the weights in {folder} are damaged: ")
    assert words in message
    assert "undamaged copy" in message
    assert "attention" not in message


def test_several_tensors_are_counted() -> None:
    whole = {"a": torch.ones(3), "b": torch.tensor([1.0, math.nan, math.inf]), "c": torch.tensor([math.nan]),
             "d": torch.tensor([1, 2]), "e": torch.zeros(0)}  # fmt: skip
    assert not_finite_in(whole) == "b has 1 NaN and 1 infinite of 3 values, and 1 other tensors"
    assert not_finite_in({"a": torch.tensor([3e38, 3e38])}) is None  # their sum is infinite
    assert not_finite_in({"a": torch.tensor([3e38, -math.inf]).bfloat16()}) is not None


def test_zeros_and_infinite_buffers_that_are_intended() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.zero_()
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    assert damage_of(model) is None
    model.register_buffer("bias", torch.tensor([0.0, math.nan]))
    assert damage_of(model) == "bias has 1 NaN of 2 values"


def test_a_model_in_memory() -> None:
    policy = make_policy()
    with torch.no_grad():
        policy.model.get_parameter(UP)[0, 0] = math.nan
    with pytest.raises(UsageError, match=f"weights are damaged: {UP}"):
        wrap_model(policy.model, policy.tokenizer)
    with pytest.raises(UsageError, match=f"the weights in memory are damaged: {UP}"):
        load_model(find_model(policy.model, tokenizer=policy.tokenizer), "cpu", "float32")


def test_finite_weights_that_give_logits_that_are_not(tiny_folder: str, tmp_path: Path) -> None:
    """A flipped bit in an exponent: the number is finite, but products with it are not."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    damage(folder / "model.safetensors", put("model.norm.weight", 3e38, 32))
    with pytest.raises(UsageError) as error:
        load_model(find_model(str(folder)), "cpu", "float32")
    assert "not finite in transformers too" in str(error.value)
    assert "3e+38 in model.norm.weight" in str(error.value)


def test_a_damaged_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRUPPO_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf")
    content = bytearray((tmp_path / "tiny.gguf").read_bytes())
    content[-4:] = b"\x00\x00\xc0\x7f"
    (tmp_path / "tiny.gguf").write_bytes(content)
    with pytest.raises(UsageError, match=r"tiny\.gguf are damaged: model\..* has 1 NaN of"):
        find_model(str(tmp_path / "tiny.gguf"))
    assert not list((tmp_path / "cache" / "models").iterdir())


@pytest.mark.parametrize("name", [UP.removeprefix("model."), "score"])
def test_a_damaged_reward_model(name: str, tmp_path: Path) -> None:
    save_reward_model(scalar("outcome", dtype=torch.float32), "outcome", tmp_path / "model")
    key = next(key for key in load_file(tmp_path / "model" / "model.safetensors") if name in key)
    damage(tmp_path / "model" / "model.safetensors", put(key, math.nan))
    with pytest.raises(UsageError, match=r"reward_model\.name = .* damaged: .* has 1 NaN"):
        load_reward_model(find_model(str(tmp_path / "model")), "outcome", "cpu", "float32")


def test_a_damaged_classifier(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    damage(tmp_path / "model" / "model.safetensors", put("score.weight", math.inf))
    with pytest.raises(UsageError, match=r"weights are damaged: score\.weight has 1 infinite of 32 values"):
        Classifier(folder)


@pytest.mark.parametrize("file", ["weights", "optimizer"])
def test_a_checkpoint_whose_manifest_fits(file: str, tiny_folder: str, tmp_path: Path) -> None:
    steps = {"run__steps": 3, "run__checkpoint_every": 2}
    small_run(tiny_folder, tmp_path / "run", **steps)
    newest = tmp_path / "run" / "checkpoints" / "step-000003"
    path = newest / f"{file}.safetensors"
    key = next(key for key in load_file(path) if "up_proj" in key and not key.startswith("step"))
    damage(path, put(key, math.nan))
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps({**manifest, path.name: file_sha256(path)}))
    words = rf"{file}\.safetensors: is damaged \(ValueError: .*up_proj.* has 1 NaN"
    with pytest.raises(UsageError, match=words):
        small_run(tiny_folder, tmp_path / "run", resume=True, **steps)
    if file == "weights":
        with pytest.raises(UsageError, match=words):
            export(tmp_path / "run", tmp_path / "to", progress=False)
        assert export(tmp_path / "run", tmp_path / "to", checkpoint=2, progress=False).step == 2
    shutil.rmtree(newest)
    assert small_run(tiny_folder, tmp_path / "run", resume=True, **steps).summary["state"] == "done"
