"""Uploads to the hub, with a stand-in for its client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest

from gruppo.errors import UsageError
from gruppo.trl import GRPOConfig, upload
from gruppo.trl.upload import upload as push


class Hub:
    """Records what it is asked for, or has no connection."""

    calls: list[tuple[str, dict[str, Any]]]
    offline: bool | BaseException = False

    def __init__(self, token: str | None = None) -> None:
        type(self).calls = [("token", {"token": token})]

    def create_repo(self, name: str, **options: Any) -> Any:
        if self.offline:
            raise self.offline if isinstance(self.offline, Exception) else ConnectionError("no route")
        self.calls.append(("create", {"name": name, **options}))
        return type("Url", (str,), {"repo_id": f"me/{Path(name).name}"})(f"hub://{name}")

    def create_branch(self, repo: str, **options: Any) -> None:
        self.calls.append(("branch", {"repo": repo, **options}))

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload", options))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(upload, "HfApi", Hub)
    monkeypatch.setattr(Hub, "offline", False)
    return Hub


def test_name_token_visibility_and_branch_are_those_of_the_arguments(hub: type[Hub], tmp_path: Path) -> None:
    args = GRPOConfig("out/mine", hub_model_id="me/model", hub_token="t", hub_private_repo=True, hub_revision="dev")
    assert push(tmp_path, args, "done", {}) == "hub://me/model"
    assert hub.calls == [
        ("token", {"token": "t"}),
        ("create", {"name": "me/model", "private": True, "exist_ok": True}),
        ("branch", {"repo": "me/model", "branch": "dev", "exist_ok": True}),
        ("upload", {"repo_id": "me/model", "folder_path": tmp_path, "commit_message": "done", "revision": "dev"}),
    ]


def test_the_name_is_that_of_the_folder_and_options_come_first(hub: type[Hub], tmp_path: Path) -> None:
    push(tmp_path, GRPOConfig("out/mine", hub_token="t"), "done", {"token": "other"})
    assert hub.calls[:2] == [
        ("token", {"token": "other"}),
        ("create", {"name": "mine", "private": None, "exist_ok": True}),
    ]


def test_a_hub_out_of_reach_is_an_error_in_words(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "offline", True)
    with pytest.raises(UsageError, match=r"mine cannot be uploaded \(ConnectionError: no route\); log in"):
        push(tmp_path, GRPOConfig("out/mine"), "done", {})
    monkeypatch.setattr(hub, "offline", httpx2.ConnectError("no name"))
    with pytest.raises(UsageError, match=r"mine cannot be uploaded \(the Hugging Face hub .* cannot be reached"):
        push(tmp_path, GRPOConfig("out/mine"), "done", {})
