"""Models by their name on the hub, from a stand-in for it: downloaded once, then read from the cache."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from gruppo.errors import UsageError
from gruppo.models.loading import find_model, load_model
from gruppo.trl import GRPOTrainer
from tests.hub_server import WRITER, Hub, serving, use
from tests.trl.test_trainer import ROWS, arguments, counted


def files_of(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A stand-in for the hub that is served."""
    hub = Hub()
    with serving(hub) as address:
        use(address, WRITER, str(tmp_path / "cache"), monkeypatch)
        yield hub


class Down:
    """Refuses every connection. `tried`: how many; `waits`: how often somebody waited to try again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.tried = self.waits = 0
        use("http://127.0.0.1:9", None, str(cache), monkeypatch)
        monkeypatch.setattr(socket, "create_connection", self.refuse)
        monkeypatch.setattr(time, "sleep", self.wait)

    def refuse(self, *_: Any, **__: Any) -> Any:
        self.tried += 1
        raise ConnectionRefusedError("nobody listens")

    def wait(self, _: float) -> None:
        self.waits += 1


@pytest.mark.parametrize("name", ["me/tiny", "me/tiny@main"])
def test_a_cached_model_needs_no_more_than_one_request(
    hub: Hub, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    hub.add("me/tiny", files_of(tiny_folder))
    before = load_model(find_model(name), "cpu", "float32").model.state_dict()
    down = Down(monkeypatch, tmp_path / "cache")
    source = find_model(name)
    after = load_model(source, "cpu", "float32").model.state_dict()
    assert (down.tried, down.waits) == (1, 0)
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())
    assert Path(source.location).is_dir()


def test_a_trainer_with_a_tokenizer_of_a_cached_model(
    hub: Hub, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("me/tiny", files_of(tiny_folder))
    tokenizer = AutoTokenizer.from_pretrained("me/tiny")
    find_model("me/tiny")
    down = Down(monkeypatch, tmp_path / "cache")
    trainer = GRPOTrainer("me/tiny", counted, arguments(tmp_path), ROWS, processing_class=tokenizer)
    assert down.waits == 0
    assert trainer._plan().recipe.model.name == "me/tiny"


def test_weights_in_other_formats_are_not_downloaded(hub: Hub, tiny_folder: str) -> None:
    others = {"consolidated.safetensors": b"x", "onnx/model.safetensors": b"x", "pytorch_model.bin": b"x"}
    hub.add("me/tiny", {**files_of(tiny_folder), **others})
    folder = Path(find_model("me/tiny").location)
    assert {path.name for path in folder.iterdir()} == files_of(tiny_folder).keys()


@pytest.mark.parametrize("name", ["me/old", "me/old@main"])
def test_a_model_without_safetensors_is_named(hub: Hub, tiny_folder: str, name: str) -> None:
    files = files_of(tiny_folder)
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    hub.add("me/old", files)
    with pytest.raises(UsageError, match=rf"model\.name = '{name}': has no safetensors weights"):
        find_model(name)
