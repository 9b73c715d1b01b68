"""Untrusted run folders: damaged, malicious and huge ones give a one-line error, and none of their code runs."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gruppo
from gruppo.errors import UsageError
from gruppo.runs import reading as opening
from gruppo.runs.console import ConsoleProgress
from gruppo.runs.report import describe_run
from gruppo.runs.results import load_result
from gruppo.training.api import train
from gruppo.training.checkpoint import problem_of
from gruppo.utils.progress import visible
from tests.small_runs import ROWS, recipe


@pytest.fixture(scope="module")
def finished(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("strangers") / "run"
    data = recipe(tiny_folder, run__steps=2, evaluation__questions=4, evaluation__grader="exact_match")
    data["task"] = {"held_out": 0.3}
    train(data, prompts=ROWS, out=out)
    return out


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def linked(folder: Path) -> None:
    (folder / "rewards.log").unlink(missing_ok=True)
    (folder / "rewards.log").symlink_to(folder.parent / "outside")


def linked_weights(folder: Path) -> None:
    weights = sorted(folder.glob("checkpoints/*/weights.safetensors"))[-1]
    weights.unlink()
    weights.symlink_to("/etc/hostname")


def linked_folder(folder: Path) -> None:
    shutil.rmtree(folder / "rollouts")
    (folder / "rollouts").symlink_to("/")


def to_itself(folder: Path) -> None:
    (folder / "loop").symlink_to(folder / "loop")


def pipe(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")


@pytest.mark.parametrize("harm", [linked, linked_weights, linked_folder, to_itself, pipe])
def test_links_out_of_a_folder_and_devices_are_refused(
    harm: Callable[[Path], None], folder: Path, tmp_path: Path, tiny_folder: str
) -> None:
    harm(folder)
    words = "neither a file nor a folder" if harm is pipe else "leads out of the folder"
    for use in (
        lambda: load_result(folder),
        lambda: gruppo.export(folder, tmp_path / "out"),
        lambda: train(recipe(tiny_folder), prompts=ROWS, out=folder, resume=True),
    ):
        with pytest.raises(UsageError, match=words):
            use()
    assert not (tmp_path / "outside").exists()


def test_links_within_a_folder_are_allowed(folder: Path) -> None:
    (folder / "latest").symlink_to("rollouts")
    assert load_result(folder).summary["state"] == "done"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("summary.json", "[" * 100_000),
        ("summary.json", "[]"),
        ("metrics.jsonl", "{}\n"),
        ("metrics.jsonl", '{"step": "\\u001b[2J"}\n'),
        ("metrics.jsonl", '{"step": 1, "reward/mean": {}}\n'),
        ("metrics.jsonl", "[" * 100_000 + "\n"),
        ("metrics.jsonl", '{"step": 1' + "0" * 5000 + "}\n"),
    ],
)
def test_malicious_json_is_a_one_line_error(file: str, content: str, folder: Path) -> None:
    (folder / file).write_text(content)
    with pytest.raises(UsageError) as caught:
        load_result(folder)
    assert "\n" not in str(caught.value)


def test_huge_files_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (folder / "summary.json").open("ab") as file:
        file.truncate(opening.MOST_JSON + 10)  # no bytes on the disk
    with pytest.raises(UsageError, match="larger than 64 MiB"):
        load_result(folder)
    with (folder / "recipe.toml").open("ab") as file:
        file.truncate(2**30)
    with pytest.raises(UsageError, match="larger than 16 MiB"):
        gruppo.export(folder, folder.parent / "out")
    monkeypatch.setattr(opening, "MOST_TABLE", 10**6)
    bomb = pa.table({"text": pa.array(["x" * 100] * 10**6)})
    pq.write_table(bomb, folder / "bomb.parquet", compression="zstd")
    assert (folder / "bomb.parquet").stat().st_size < 10**5
    with pytest.raises(UsageError, match="it is not read"):
        opening.read_table(folder / "bomb.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" * 100, b"\x80\x04\x95"])
def test_damaged_tables_are_a_one_line_error(content: bytes, folder: Path) -> None:
    (folder / "rollouts/step-000001.parquet").write_bytes(content)
    (folder / "rollouts/step-evil.parquet").write_bytes(content)
    with pytest.raises(UsageError, match="not a table of a run"):
        load_result(folder).rollouts()
    assert len(load_result(folder).rollouts(2)) == 16


@pytest.mark.parametrize("name", ["../../../../../etc/hostname", "/dev/zero", "..", "", "a\0b", "sub/file"])
def test_manifest_cannot_name_files_outside_the_checkpoint(name: str, folder: Path) -> None:
    checkpoint = sorted(folder.glob("checkpoints/*"))[-1]
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps({name: "", **manifest}))
    assert "which is not one of its files" in str(problem_of(checkpoint))


@pytest.mark.parametrize("content", ['{"step": "x"}', '{"labels": []}', "[]", '{"evaluations": {"1": 3}}'])
def test_invalid_state_is_refused(content: str, folder: Path) -> None:
    from gruppo.utils.files import file_sha256

    for checkpoint in folder.glob("checkpoints/*"):
        (checkpoint / "state.json").write_text(content)
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        manifest["state.json"] = file_sha256(checkpoint / "state.json")
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=r"state\.json"):
        gruppo.export(folder, folder.parent / "out")


def test_code_that_a_run_names_does_not_run(folder: Path) -> None:
    """Reading and exporting import nothing from the run."""
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\ndef f(completions): pass\n")
    text = (folder / "recipe.toml").read_text()
    evil = f"{folder}/evil.py:f"
    text = text.replace("tests/rewards/functions.py:likes_letters", evil).replace(
        'surrogate = "clipped"', f"surrogate = '{evil}'"
    )
    (folder / "recipe.toml").write_text(text.replace('grader = "exact_match"', f"grader = '{evil}'"))
    (folder / "base/adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere", "peft_type": "LORA"}')
    result = load_result(folder)
    result.frame(), result.rollouts(), result.evaluations(), result.events(), result.load_model()
    describe_run(folder, result.summary, result.metrics)
    gruppo.export(folder, folder.parent / "out")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("text", "shown"),
    [("\x1b[2J\x07", r"\x1b[2J\x07"), ("\x9b31m", r"\x9b31m"), ("a\tb\nc", "a\tb\nc"), ("\u202eabc", r"\u202eabc"),
     ("\u061cabc", r"\u061cabc"),
     ("\ud800", r"\ud800"), ("\r", r"\r"), ("日本 é 🎉", "日本 é 🎉")],
)  # fmt: skip
def test_control_characters_are_shown_visibly(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_console_does_not_interpret_markup_and_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ConsoleProgress()
    for text in ("[red]no[/]", "[/] [bold", "\x1b]0;title\x07", ":smile:"):
        progress.note(text)
        progress.result(text)
        with progress.bar(text, 1, "things") as advance:
            advance(1)
    shown = capsys.readouterr()
    lines = ["[red]no[/]", "[/] [bold", r"\x1b]0;title\x07", ":smile:"]
    assert shown.out.splitlines() == shown.err.splitlines() == lines


def test_bars_do_not_interpret_markup() -> None:
    from rich.console import Console

    progress = ConsoleProgress()
    progress.console = progress._bars.live.console = Console(force_terminal=True, width=200, record=True, quiet=False)
    with progress.bar("Opening [/] [red]x\x1b[2J", 1, "") as advance:
        advance(1)
        progress._bars.refresh()
    assert r"Opening [/] [red]x\x1b[2J" in progress.console.export_text()


def test_compressed_files_are_read_up_to_the_same_size(tmp_path: Path) -> None:
    """A small file can be large once it is decompressed."""
    path = tmp_path / "lines.jsonl.gz"
    path.write_bytes(gzip.compress(b"a" * 100_000))
    assert path.stat().st_size < 1000
    assert opening.read_content(path, 100_000) == b"a" * 100_000
    with pytest.raises(UsageError, match="is larger than"):
        opening.read_content(path, 99_999)
    path.write_bytes(b"a" * 100_000)
    with pytest.raises(UsageError, match="is larger than"):
        opening.read_content(path, 99_999)
    with pytest.raises(zlib.error):
        opening.read_content(path)
