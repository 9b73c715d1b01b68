"""Damaged files of a run folder are detected, reported, and never used as if intact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gruppo.errors import RunError, UsageError
from gruppo.runs.folder import RunFolder
from gruppo.runs.reading import read_lines, read_table
from gruppo.runs.results import load_result
from gruppo.training.run import TrainingRun
from tests.small_runs import fingerprint, small_run

STEPS = {"run__steps": 6, "run__checkpoint_every": 2}


@pytest.fixture(scope="module")
def finished(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    small_run(tiny_folder, out, **STEPS)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def flip(path: Path, place: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def forget(name: str) -> Callable[[Path], None]:
    """A manifest that is valid JSON but lacks one of its files."""

    def damage(path: Path) -> None:
        manifest = json.loads(path.read_text())
        del manifest[name]
        path.write_text(json.dumps(manifest))

    return damage


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("weights.safetensors", flip, "weights.safetensors does not match its hash"),
        ("optimizer.safetensors", Path.unlink, "optimizer.safetensors is missing"),
        ("state.json", cut, "state.json does not match its hash"),
        ("manifest.json", cut, "cannot be read"),
        ("manifest.json", Path.unlink, "manifest.json is missing"),
        ("manifest.json", forget("optimizer.safetensors"), "truncated manifest"),
    ],
)
def test_the_previous_checkpoint_is_used_and_the_damage_is_reported(
    file: str, damage: Callable[[Path], None], said: str, run: Path, finished: Path, tiny_folder: str
) -> None:
    damage(run / "checkpoints/step-000006" / file)
    small_run(tiny_folder, run, resume=True, **STEPS)
    assert fingerprint(run) == fingerprint(finished)
    events = read_lines(run / "events.jsonl")
    assert [event["kind"] for event in events] == ["checkpoint_unusable", "resume"]
    assert events[0]["message"].startswith("step-000006: ")
    assert said in events[0]["message"]


def test_without_an_intact_checkpoint_resume_is_refused_and_nothing_is_lost(run: Path, tiny_folder: str) -> None:
    flip(run / "checkpoints/step-000006/weights.safetensors")
    (run / "checkpoints/step-000004/state.json").unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"}
    with pytest.raises(RunError) as error:
        small_run(tiny_folder, run, resume=True, **STEPS)
    for words in (
        "no checkpoint is intact",
        "step-000006: weights",
        "step-000004: state.json is missing",
        "another out=",
    ):
        assert words in str(error.value)
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"}
    assert {path for path in before if before[path] != after.get(path)} == set()


def test_a_damaged_checkpoint_does_not_displace_an_intact_one(
    run: Path, tiny_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in between: the checkpoints of steps 4 and 5 are the last two, and that of step 6 is deleted."""
    flip(run / "checkpoints/step-000006/weights.safetensors")
    original = TrainingRun.finish_step

    def stops(self: TrainingRun, *arguments) -> None:
        original(self, *arguments)
        self.stop.request()

    monkeypatch.setattr(TrainingRun, "finish_step", stops)
    small_run(tiny_folder, run, resume=True, **STEPS)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000004", "step-000005"]


def test_other_folders_next_to_checkpoints_are_ignored(run: Path, finished: Path, tiny_folder: str) -> None:
    """For example a copy of a checkpoint that a user has made."""
    shutil.copytree(run / "checkpoints/step-000004", run / "checkpoints/step-000004.mine")
    shutil.copytree(run / "checkpoints/step-000004", run / "checkpoints/step-of-mine")
    flip(run / "checkpoints/step-000006/weights.safetensors")
    small_run(tiny_folder, run, resume=True, **STEPS)
    assert json.loads((run / "summary.json").read_text())["state"] == "done"
    assert len(list((run / "checkpoints").iterdir())) == 4


@pytest.mark.parametrize("content", [b"\x00" * 40, b'{"step": 2, "reward', b"[1]", b"\xff\xfe", b"[" * 5000])
def test_a_damaged_line_is_removed_with_an_event_and_the_others_stay(
    content: bytes, run: Path, tiny_folder: str
) -> None:
    lines = (run / "metrics.jsonl").read_bytes().split(b"\n")
    kept, size = read_lines(run / "metrics.jsonl"), len(lines[1])
    lines[1] = content[:size].ljust(size, b"x") if content[:1] != b"[" else content[:size].ljust(size)
    (run / "metrics.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(UsageError, match=r"metrics\.jsonl: line 2 is damaged"):
        load_result(run)
    result = small_run(tiny_folder, run, resume=True, **STEPS)
    assert [line["step"] for line in result.metrics] == [1, 3, 4, 5, 6]
    assert result.metrics == [line for line in kept if line["step"] != 2]
    assert (run / "metrics.jsonl.damaged").read_bytes() == b"\n".join(lines)
    (event,) = [each for each in read_lines(run / "events.jsonl") if each["kind"] == "damaged"]
    assert event["message"].startswith("metrics.jsonl: line 2 cannot be read")


def test_missing_lines_and_tables_are_reported(run: Path, tiny_folder: str) -> None:
    cut(run / "metrics.jsonl")
    (run / "rollouts/step-000002.parquet").unlink()
    cut(run / "rollouts/step-000005.parquet")
    result = small_run(tiny_folder, run, resume=True, **STEPS)
    assert [line["step"] for line in result.metrics] == [1, 2, 3]
    messages = [event["message"] for event in read_lines(run / "events.jsonl") if event["kind"] == "damaged"]
    assert messages[0].startswith("metrics.jsonl: its end is missing")
    assert messages[1].startswith("metrics.jsonl: line 4 cannot be read")
    assert messages[2:] == ["rollouts/step-000002.parquet is missing", "rollouts/step-000005.parquet is damaged"]
    with pytest.raises(UsageError, match=r"step-000005\.parquet: is damaged"):
        result.rollouts(5)


def test_a_flipped_bit_in_a_table_is_detected_on_reading(run: Path) -> None:
    """Pages have checksums; undetected flips are in headers and change nothing."""
    path = run / "rollouts/step-000001.parquet"
    whole, seen, right = path.read_bytes(), 0, read_table(path)
    places = range(4, len(whole) - int.from_bytes(whole[-8:-4], "little") - 8, 13)
    for place in places:
        path.write_bytes(whole)
        flip(path, place)
        try:
            assert read_table(path).equals(right)
        except UsageError:
            seen += 1
    assert seen > len(places) / 2


def test_a_line_that_lacks_only_its_newline_is_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    (folder.path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    assert folder.cut_back({"metrics.jsonl": 100}, 2) == ["metrics.jsonl: its end is missing, 77 of 100 bytes"]
    assert folder.metrics() == [{"step": 1}, {"step": 2}]
    folder.close()


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("recipe.toml", cut, "recipe.toml: is damaged"),
        ("environment.json", cut, "environment.json: is damaged"),
        ("environment.json", Path.unlink, "environment.json, which records what the run chose"),
    ],
)
def test_missing_or_damaged_essential_files_are_reported(
    file: str, damage: Callable[[Path], None], said: str, run: Path, tiny_folder: str
) -> None:
    damage(run / file)
    with pytest.raises(UsageError, match=said):
        small_run(tiny_folder, run, resume=True, **STEPS)


def test_a_damaged_summary_is_rewritten(run: Path, finished: Path, tiny_folder: str) -> None:
    cut(run / "summary.json")
    with pytest.raises(UsageError, match=r"summary\.json: is damaged"):
        load_result(run)
    small_run(tiny_folder, run, resume=True, **STEPS)
    assert fingerprint(run) == fingerprint(finished)


def test_files_left_by_a_kill_before_the_recipe_exists_do_not_block_the_folder(
    tiny_folder: str, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    for name in ("recipe.toml.writing", "lock", "rewards.log"):
        (tmp_path / "run" / name).write_text("half")
    assert small_run(tiny_folder, tmp_path / "run", resume=True, run__steps=1).summary["state"] == "done"
    assert not list((tmp_path / "run").glob("*.writing"))
