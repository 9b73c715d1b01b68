"""Uploads of TRL's trainers to a stand-in for the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gruppo.errors import UsageError
from gruppo.trl import GRPOConfig
from gruppo.trl.upload import upload
from tests.hub_server import READER, WRITER, Hub, serving, use


@pytest.fixture
def hub() -> Hub:
    return Hub()


@pytest.fixture
def address(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The address of the stand-in, where this process is not logged in."""
    with serving(hub) as found:
        use(found, None, str(tmp_path / "cache"), monkeypatch)
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"new")
    return model


@pytest.mark.usefixtures("address")
def test_name_token_visibility_and_branch_are_those_of_the_arguments(hub: Hub, folder: Path) -> None:
    args = GRPOConfig("out/mine", hub_model_id="me/model", hub_token=WRITER, hub_private_repo=True, hub_revision="dev")
    url = upload(folder, args, "done", {})
    repository = hub.repositories["models", "me/model"]
    assert url == f"{hub.address}/me/model/commit/{repository.branches['dev']}"
    assert repository.private
    assert repository.files("dev")["model.safetensors"] == b"new"
    assert "model.safetensors" not in repository.files("main")
    assert repository.log[-1] == "done"


@pytest.mark.usefixtures("address")
def test_the_name_is_that_of_the_folder_and_options_come_first(hub: Hub, folder: Path) -> None:
    upload(folder, GRPOConfig("out/mine", hub_token=READER), "done", {"token": WRITER})
    assert hub.repositories["models", "me/mine"].files()["model.safetensors"] == b"new"


@pytest.mark.usefixtures("address")
def test_the_weights_of_an_earlier_upload_are_replaced_and_other_files_stay(hub: Hub, folder: Path) -> None:
    old = {"model-00001-of-00002.safetensors": b"x", "model.safetensors.index.json": b"{}", "notes.md": b"mine"}
    hub.add("me/model", {**old, ".gitattributes": b""})
    upload(folder, GRPOConfig("out/mine", hub_model_id="me/model", hub_token=WRITER), "done", {})
    files = hub.repositories["models", "me/model"].files()
    assert files.keys() - {".gitattributes"} == {"model.safetensors", "notes.md"}


@pytest.mark.usefixtures("address")
def test_a_refusal_is_an_error_in_words(hub: Hub, folder: Path) -> None:
    with pytest.raises(
        UsageError, match=r"push_to_hub: mine cannot be uploaded \(there is no such repository, or it is"
    ):
        upload(folder, GRPOConfig("out/mine", hub_token="hf_wrong"), "done", {})
    hub.fail = {"create": 503}
    with pytest.raises(UsageError, match=r"the hub has a problem of its own \(HTTP 503\); try again later\)\. The run"):
        upload(folder, GRPOConfig("out/mine", hub_token=WRITER), "done", {})


def test_a_hub_out_of_reach_is_an_error_in_words(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use("http://127.0.0.1:9", WRITER, str(tmp_path / "cache"), monkeypatch)  # nothing listens there
    with pytest.raises(UsageError, match=r"mine cannot be uploaded \(the Hugging Face hub .* cannot be reached"):
        upload(folder, GRPOConfig("out/mine"), "done", {})
