"""Uploads to a stand-in for the hub, downloads from it by name and revision, and its errors in words."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gruppo.errors import RunError, UsageError
from gruppo.models.loading import find_model, load_model
from gruppo.models.lora import skeleton
from gruppo.runs.results import Result
from gruppo.training.hub_push import push_to_hub
from tests.fuzzing import command
from tests.hub_server import READER, WRITER, Hub, serving, use
from tests.small_runs import small_run


@pytest.fixture(scope="module")
def finished(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return small_run(tiny_folder, tmp_path_factory.mktemp("run") / "tiny", run__steps=2)


@pytest.fixture
def hub() -> Hub:
    return Hub()


@pytest.fixture
def address(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The address of the stand-in, where this process is logged in as the owner of "me"."""
    with serving(hub) as found:
        use(found, WRITER, str(tmp_path / "hub cache"), monkeypatch)
        yield found


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.usefixtures("address")
def test_a_pushed_model_is_the_exported_one_with_its_card(hub: Hub, finished: Result, tmp_path: Path) -> None:
    url = finished.push_to_hub("me/tiny", private=True, to=tmp_path / "kept", progress=False)
    repository = hub.repositories["models", "me/tiny"]
    files = repository.files()
    assert url == f"{hub.address}/me/tiny/commit/{repository.branches['main']}"
    assert repository.private
    assert repository.log[-1] == "tiny: step 2, float32"
    assert {path.name for path in (tmp_path / "kept").iterdir()} == files.keys() - {".gitattributes"}
    assert all((tmp_path / "kept" / name).read_bytes() == files[name] for name in files.keys() - {".gitattributes"})
    assert b"# tiny" in files["README.md"]
    loaded = load_model(find_model("me/tiny"), "cpu", "float32")
    trained = weights_of(finished.path / "model")
    assert all(
        torch.equal(trained[name], tensor) for name, tensor in loaded.model.state_dict().items() if name in trained
    )


@pytest.mark.usefixtures("address")
def test_a_push_replaces_all_weights_and_leaves_other_files(hub: Hub, finished: Result) -> None:
    old = {
        "model-00001-of-00002.safetensors": b"x",
        "model.safetensors.index.json": b"{}",
        "adapter_config.json": b"{}",
    }
    repository = hub.add("me/tiny", {**old, "notes.md": b"mine", ".gitattributes": b""})
    pushed = push_to_hub(finished.path, "me/tiny", dtype="bfloat16", progress=False)
    assert not old.keys() & repository.files().keys()
    assert repository.files()["notes.md"] == b"mine"
    assert not pushed.private
    assert not pushed.exported.path.exists(), "nobody asked to keep the folder"
    assert repository.log[-1] == "tiny: step 2, bfloat16"


@pytest.mark.usefixtures("address")
def test_models_are_read_by_name_and_revision(hub: Hub, finished: Result) -> None:
    push_to_hub(finished.path, "me/tiny", checkpoint=2, progress=False)
    first = hub.repositories["models", "me/tiny"].branches["main"]
    push_to_hub(finished.path, "me/tiny", revision="exp/one", checkpoint=2, dtype="bfloat16", progress=False)
    names = {"main": torch.float32, first: torch.float32, "exp/one": torch.bfloat16}
    for revision, dtype in names.items():
        folder = Path(find_model(f"me/tiny@{revision}").location)
        assert weights_of(folder)["model.embed_tokens.weight"].dtype == dtype
    with pytest.raises(
        UsageError, match=r"model\.name = 'me/tiny@v9': the repository has no such revision; write one of"
    ):
        find_model("me/tiny@v9")


@pytest.mark.usefixtures("address")
def test_a_revision_is_downloaded_without_pickles_and_programs(hub: Hub, tiny_folder: str) -> None:
    files = {path.name: path.read_bytes() for path in Path(tiny_folder).iterdir()}
    hub.add("me/tiny", {**files, "pytorch_model.bin": b"x", "modeling.py": b"x", "weights.gguf": b"x"})
    folder = Path(find_model("me/tiny@main").location)
    assert {path.name for path in folder.iterdir()} == files.keys()


@pytest.mark.usefixtures("address")
def test_an_adapter_names_the_revision_of_its_base_model(hub: Hub, tiny_folder: str, tmp_path: Path) -> None:
    base = hub.add("me/base", {"README.md": b"no model"})
    base.commit("v1", {path.name: path.read_bytes() for path in Path(tiny_folder).iterdir()})
    small_run("me/base@v1", tmp_path / "run", run__steps=1, model__lora={"rank": 2, "targets": ["q_proj"]})
    push_to_hub(tmp_path / "run", "me/adapter", adapter=True, progress=False)
    files = hub.repositories["models", "me/adapter"].files()
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/base", "v1")
    assert b"base_model: me/base\n" in files["README.md"]
    assert skeleton(find_model("me/adapter@main").config, False) is not None, "merged into me/base@v1"


def spoiled(hub: Hub, case: str, patch: pytest.MonkeyPatch, address: str, cache: str) -> None:
    """Make a push to me/tiny fail in some way."""
    if case == "no token":
        use(address, None, cache, patch)
    if case == "wrong token":
        use(address, "hf_wrong", cache, patch)
    if case == "reader":
        use(address, READER, cache, patch)
    if case == "reader of an existing repository":
        hub.add("me/tiny", {".gitattributes": b""})
        use(address, READER, cache, patch)
    if case == "public":
        hub.add("me/tiny", {".gitattributes": b""})
    if case == "busy":
        hub.fail["repos/create"] = 429
    if case == "broken":
        hub.fail["auth-check"] = 503
    if case == "offline":
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if case == "no network":
        use("http://127.0.0.1:9", WRITER, cache, patch)


REFUSALS = [
    ("no token", "there is no token of the Hugging Face hub; log in with `hf auth login`, or set HF_TOKEN"),
    ("wrong token", r"the token is not valid; .*log in with"),
    ("reader", r"the token does not allow this; .*may write to this repository"),
    ("reader of an existing repository", r"the token does not allow this"),
    ("public", r"private=True: the repository me/tiny exists and is public; make it private in its settings"),
    ("busy", r"too many requests .*; wait a few minutes and try again"),
    ("broken", r"a problem of its own \(HTTP 503\); try again later"),
    ("offline", r"HF_HUB_OFFLINE is set"),
    ("no network", r"the Hugging Face hub \(http://127\.0\.0\.1:9\) cannot be reached; go online"),
]


@pytest.mark.parametrize(("case", "words"), REFUSALS)
def test_refused_pushes_are_explained_before_anything_is_written(
    case: str, words: str, hub: Hub, address: str, finished: Result, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spoiled(hub, case, monkeypatch, address, str(tmp_path / "hub cache"))
    with pytest.raises(UsageError, match=words) as caught:
        push_to_hub(finished.path, "me/tiny", private=True, to=tmp_path / "out", progress=False)
    assert "me/tiny" in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not any("commit" in path for _, path in hub.requests)


@pytest.mark.usefixtures("address")
def test_mistakes_are_reported_before_the_hub_is_asked(hub: Hub, finished: Result, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for run, name, options, words in (
        (
            finished.path,
            "tiny",
            {},
            r"push = tiny: is no name of a repository; write OWNER/NAME",
        ),
        (finished.path, "me/a b", {}, "is no name of a repository"),
        (tmp_path / "none", "me/tiny", {}, "contains no run"),
        (finished.path, "me/tiny", {"to": tmp_path / "full"}, "already exists"),
        (finished.path, "me/tiny", {"checkpoint": 9}, "no such checkpoint"),
        (finished.path, "me/tiny", {"verify": True}, r"has no \[evaluation\]"),
    ):
        with pytest.raises(UsageError, match=words):
            push_to_hub(run, name, progress=False, **options)
    assert hub.requests == []


@pytest.mark.usefixtures("address")
def test_an_upload_that_fails_keeps_the_folder(hub: Hub, finished: Result, tmp_path: Path) -> None:
    hub.fail["/commit/"] = 409
    with pytest.raises(
        RunError, match=r"the upload failed: it was changed at the same time; .*; the folder .* complete"
    ):
        push_to_hub(finished.path, "me/tiny", to=tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "case", "words"),
    [
        ("me/none@main", "", "there is no such repository, or it is private; correct the name, or log in"),
        ("me/gated@main", "", "its owner must grant access first; ask for it on the repository's page"),
        ("me/gated", "", "its owner must grant access first"),
        ("me/other@main", "", r"the folder has no config\.json"),
        ("me/secret@main", "no token", "there is no such repository, or it is private"),
        ("me/tiny@main", "no network", r"the Hugging Face hub \(http://127\.0\.0\.1:9\) cannot be reached"),
        ("me/tiny@main", "offline", "HF_HUB_OFFLINE is set"),
    ],
)
def test_models_that_cannot_be_read_are_explained(
    name: str, case: str, words: str, hub: Hub, address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.add("me/gated", {"config.json": b"{}"}, gated=True)
    hub.add("me/other", {"README.md": b"data"})
    hub.add("me/secret", {"config.json": b"{}"}, private=True)
    spoiled(hub, case, monkeypatch, address, str(tmp_path / "hub cache"))
    with pytest.raises(UsageError, match=words) as caught:
        find_model(name)
    assert str(caught.value).startswith(f"model.name = '{name}': ")


def test_options_of_a_push_need_a_repository(finished: Result, tmp_path: Path) -> None:
    for arguments, words in (
        (["--to", str(tmp_path / "out"), "--private"], "--private: describes an upload"),
        (["--to", str(tmp_path / "out"), "--revision", "v1"], "--revision: describes an upload"),
        ([], "--to: missing"),
    ):
        code, _, err = command("export", str(finished.path), *arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert words in err
    assert not (tmp_path / "out").exists()


def run(address: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user with a login and HF_ENDPOINT does."""
    settings: dict[str, Any] = {"HF_ENDPOINT": address, "HF_TOKEN": WRITER, "HF_HOME": str(home),
                                "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | settings
    line = [sys.executable, "-m", "gruppo.cli.main", *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300, check=False)


def test_the_command_line_pushes_and_reads_models_and_data(hub: Hub, finished: Result, tmp_path: Path) -> None:
    with serving(hub) as address:
        pushed = run(
            address, tmp_path, "export", str(finished.path), "--push", "me/tiny", "--private", "--revision", "v1"
        )
        assert pushed.returncode == 0, pushed.stderr
        sha = hub.repositories["models", "me/tiny"].branches["v1"]
        assert pushed.stdout.endswith(f"in {address}/me/tiny/commit/{sha} (private)\n")
        assert "model.safetensors" not in hub.repositories["models", "me/tiny"].files("main")
        rows = hub.add("me/rows", {"test.jsonl": b'{"prompt": "a", "answer": "b"}\n' * 3}, "datasets", private=True)
        rows.commit("short", {"test.jsonl": b'{"prompt": "a", "answer": "b"}\n'})
        shutil.rmtree(tmp_path / "hub", ignore_errors=True)
        evaluated = run(address, tmp_path, "eval", "me/tiny@v1", "--task", "me/rows", "--option", "revision=short",
                        "--max-tokens", "4", "--grader", "exact_match")  # fmt: skip
        assert evaluated.returncode == 0, evaluated.stderr
        assert "1 questions" in evaluated.stdout
