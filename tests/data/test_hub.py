"""Hugging Face datasets: saved folders, folders of files, and a stand-in for the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from gruppo.errors import UsageError
from tests.data.load import Notes, both_sides, given, questions, training
from tests.hub_server import Hub, serving, use

TRAIN = [{"prompt": [{"role": "user", "content": f"q{n}"}], "answer": str(n)} for n in range(5)]
TEST = [{"prompt": [{"role": "user", "content": f"t{n}"}], "answer": str(n)} for n in range(3)]
SPLITS = datasets.DatasetDict({"train": datasets.Dataset.from_list(TRAIN), "test": datasets.Dataset.from_list(TEST)})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    SPLITS.save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_splits_of_a_saved_folder(saved: Path) -> None:
    assert training(saved) == TRAIN
    assert training(saved, split="test") == TEST
    train, held_out = both_sides(saved)
    assert (train.rows, held_out.rows) == (TRAIN, TEST)
    assert held_out.name == f"{saved} (held out)"
    assert questions(saved).rows == TEST
    assert questions(saved, split="train").rows == TRAIN
    with pytest.raises(UsageError, match=r'task\.split = "dev".*train, test'):
        training(saved, split="dev")


def test_splits_from_python_are_named() -> None:
    with pytest.raises(UsageError, match=r'prompts gives the splits train, test,.*give one split: dataset\["train"\]'):
        given(SPLITS)
    assert given(SPLITS["train"]) == TRAIN


def test_a_folder_without_splits(tmp_path: Path) -> None:
    SPLITS["train"].shuffle(seed=0).sort("answer").save_to_disk(tmp_path / "one")
    assert training(tmp_path / "one") == TRAIN
    assert questions(tmp_path / "one").rows == TRAIN
    with pytest.raises(UsageError, match=r"task\.held_out = 0\.1"):
        both_sides(tmp_path / "one")
    for split in ("test", "train[:2]"):
        with pytest.raises(UsageError, match=r"task\.split.*no splits"):
            training(tmp_path / "one", split=split)
    with pytest.raises(UsageError, match=r"task\.options.*no options"):
        training(tmp_path / "one", options={"name": "main"})


def test_missing_test_split_error_names_the_fixes(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": SPLITS["train"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UsageError, match=r"held_out = 0\.1.*evaluation\.task"):
        both_sides(tmp_path / "saved")


def test_a_folder_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "clone").mkdir()
    for split in SPLITS:
        SPLITS[split].to_json(tmp_path / "clone" / f"{split}.jsonl")
    assert training(tmp_path / "clone") == TRAIN
    assert training(tmp_path / "clone", split="train[:2]") == TRAIN[:2]
    assert questions(tmp_path / "clone").rows == TEST
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"task\.name.*cannot be loaded"):
        training(tmp_path / "empty")


def test_a_hub_dataset_gets_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def load_dataset(path: str, **options: Any) -> datasets.DatasetDict:
        calls.append((path, options))
        return SPLITS

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("gruppo.data.hub.hub_reachable", lambda: True)
    assert training("owner/name", options={"name": "main", "revision": "abc"}, columns={"solution": "answer"}) == [
        {"solution": row["answer"], "prompt": row["prompt"]} for row in TRAIN
    ]
    assert calls == [("owner/name", {"split": None, "name": "main", "revision": "abc"})]
    with pytest.raises(UsageError, match=r"task\.options\.streaming = True"):
        training("owner/name", options={"streaming": True})


def test_unreachable_hub_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gruppo.data.hub.hub_reachable", lambda: False)
    with pytest.raises(UsageError, match=r'task\.name = "owner/no-such-name".*cannot be reached'):
        training("owner/no-such-name")


def test_a_revision_in_the_name_belongs_in_the_options() -> None:
    with pytest.raises(UsageError, match=r'write task\.name = "owner/rows" and task\.options = \{revision = "v1"\}'):
        training("owner/rows@v1")


def test_a_dataset_that_the_hub_refuses_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = Hub()
    hub.add("me/rows", {"train.jsonl": b'{"prompt": "a"}\n'}, "datasets")
    with serving(hub) as address:
        use(address, "hf_wrong", str(tmp_path), monkeypatch)
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", address)
        with pytest.raises(UsageError, match=r'task\.name = "me/rows": .*the token is not valid; .*log in with'):
            training("me/rows")


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "a/b/c", "~/none", "none/"])
def test_a_path_that_does_not_exist(name: str) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        training(name)


def test_bytes_columns_are_left_out_with_a_note(tmp_path: Path) -> None:
    image = {"bytes": b"\x89PNG", "path": None}
    features = datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image()})
    datasets.Dataset.from_dict({"prompt": ["x"], "image": [image]}, features=features).save_to_disk(tmp_path / "d")
    progress = Notes()
    assert training(tmp_path / "d", progress) == [{"prompt": "x"}]
    assert "image" in progress.notes[0]
