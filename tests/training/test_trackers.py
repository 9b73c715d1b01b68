"""Trackers of real runs, in their own processes: TensorBoard and W&B with what they wrote, and trackers that fail."""

from __future__ import annotations

import json
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from gruppo.errors import UsageError
from gruppo.preflight.check import check_recipe
from gruppo.training.api import train
from tests.small_runs import ROWS, fingerprint, killed, recipe, small_run

FINISH = "gruppo.training.trackers.FINISH_SECONDS"

# Packages that misbehave in the place of real ones.
TRACKIO = """
def init(**options):
    print("looking for a server")
    raise ConnectionError("no server")
"""
SWANLAB = """
class Config(dict):
    def update(self, values, allow_val_change):
        pass
class Text:
    def __init__(self, text):
        pass
class Run:
    def log(self, values, step):
        if step == 3:
            raise OSError("connection lost")
config, init = Config(), lambda **options: Run()
"""
MLFLOW = """
import os, signal
def search_experiments(filter_string):
    os.kill(os.getpid(), signal.SIGKILL)
"""
COMET_ML = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(10**6)"])
while True:
    time.sleep(1)
"""


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is, no tracker is ended because of it."""
    monkeypatch.setattr(FINISH, 3600.0)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "packages"
    for name, code in (("trackio", TRACKIO), ("swanlab", SWANLAB), ("mlflow", MLFLOW), ("comet_ml", COMET_ML)):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")


@pytest.fixture(scope="module")
def untracked(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("runs") / "untracked"
    small_run(tiny_folder, out, run__steps=6)
    assert not (out / "trackers").exists()
    return fingerprint(out)


def events(out: Path) -> dict[str, dict[str, Any]]:
    """The events of trackers that ended, by tracker."""
    found = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    ended = [event for event in found if event["kind"] == "tracker"]
    assert len({event["tracker"] for event in ended}) == len(ended), "each is recorded once"
    return {event["tracker"]: event for event in ended}


def processes(word: str) -> list[psutil.Process]:
    """Descendants of this process with a word in their command line."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if word in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for as long as it takes, but not forever."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("it has not happened in ten minutes")


@pytest.mark.usefixtures("packages")
def test_trackers_that_raise_or_die_are_events_and_change_nothing(
    tiny_folder: str, tmp_path: Path, untracked: dict[str, Any]
) -> None:
    out, names = tmp_path / "run", ["trackio", "swanlab", "mlflow"]

    def after_the_first_step(step: int, metrics: Mapping[str, Any], groups: Any) -> None:
        if step == 1:
            wait_until(lambda: not processes("tracker_main trackio"))

    settings = recipe(tiny_folder, run__steps=6, run__trackers=names)
    train(settings, prompts=ROWS, out=out, callbacks=[after_the_first_step], progress=False)
    assert fingerprint(out) == untracked
    ended = events(out)
    assert set(ended) == set(names)
    assert ended["trackio"]["step"] == 2, "it was noticed after the next step"
    assert ended["trackio"]["message"] == (
        "trackio has ended (exit code 1): ConnectionError: no server; see trackers/trackio.log"
    )
    assert "looking for a server" in (out / "trackers/trackio.log").read_text()
    assert ended["trackio"]["output"][-1] == "ConnectionError: no server"
    assert "has ended (exit code 1): OSError: connection lost" in ended["swanlab"]["message"]
    assert json.loads((out / "trackers/swanlab.json").read_text())["steps"]["loss/total"] == 2
    assert "mlflow has ended (signal SIGKILL)" in ended["mlflow"]["message"]


@pytest.mark.usefixtures("packages")
def test_a_tracker_that_hangs_is_ended_after_the_run_with_all_its_processes(
    tiny_folder: str, tmp_path: Path, untracked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FINISH, 0.0)
    out = tmp_path / "run"

    def until_it_hangs(step: int, metrics: Mapping[str, Any], groups: Any) -> None:
        if step == 6:
            wait_until(lambda: bool(processes("time.sleep(10**6)")))

    settings = recipe(tiny_folder, run__steps=6, run__trackers=["comet_ml"])
    result = train(settings, prompts=ROWS, out=out, callbacks=[until_it_hangs], progress=False)
    assert result.summary["state"] == "done"
    assert fingerprint(out) == untracked
    assert events(out)["comet_ml"]["message"].startswith("comet_ml was ended, as it took longer than 0 s after the run")
    assert processes("tracker_main") == processes("time.sleep(10**6)") == []


def test_a_tracker_that_cannot_be_started_is_an_event(
    tiny_folder: str, tmp_path: Path, untracked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("gruppo.training.trackers.Supervised", refuses)
    small_run(tiny_folder, tmp_path / "run", run__steps=6, run__trackers=["tensorboard"])
    assert fingerprint(tmp_path / "run") == untracked
    message = events(tmp_path / "run")["tensorboard"]["message"]
    assert message.startswith("tensorboard could not be started ([Errno 11] Resource temporarily unavailable)")


def test_a_tracker_without_its_package_is_refused_first(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    settings = recipe(tiny_folder, run__trackers=["mlflow"])
    for refused in (lambda: train(settings, prompts=ROWS, out=tmp_path / "run"), lambda: check_recipe(settings)):
        with pytest.raises(UsageError, match=r'run\.trackers: "mlflow" is not installed; .*`pip install mlflow`'):
            refused()
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def tracked(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed before step 4 and resumed from the checkpoint of step 2, so step 3 was done twice."""
    out = tmp_path_factory.mktemp("runs") / "tracked"
    evaluation = {"evaluation__every": 2, "evaluation__grader": "exact_match", "task__held_out": 0.2}
    changes: dict[str, Any] = {"run__steps": 6, "run__trackers": ["tensorboard", "wandb"], **evaluation}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FINISH, 3600.0)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DIR", str(out.parent))
        patch.setenv("WORLD_SIZE", "8")  # of a launcher, for whose other processes accelerate would wait
        with killed(patch, "gruppo.training.run.TrainingRun.start_step", 4):
            small_run(tiny_folder, out, **changes)
        small_run(tiny_folder, out, resume=True, **changes)
    assert events(out) == {}
    return out


def recorded(out: Path) -> dict[str, list[tuple[int, float]]]:
    """The values of metrics.jsonl by name."""
    values: dict[str, list[tuple[int, float]]] = {}
    for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        for name, value in line.items():
            if name != "step" and value is not None:
                values.setdefault(name, []).append((line["step"], value))
    assert len(values) > 30
    assert len(values["loss/total"]) == 6
    assert len(values["eval/accuracy"]) == 4
    return values


def test_tensorboard_has_exactly_the_metrics(tracked: Path) -> None:
    reader = event_accumulator.EventAccumulator(str(tracked / "trackers/tensorboard"), {"scalars": 0})
    reader.Reload()
    found = {name: [(one.step, one.value) for one in reader.Scalars(name)] for name in reader.Tags()["scalars"]}
    as_stored = {
        name: [(step, float(np.float32(value))) for step, value in one] for name, one in recorded(tracked).items()
    }
    assert found == as_stored


def test_tensorboard_has_the_recipe_and_completions(tracked: Path) -> None:
    reader = plugin_event_accumulator.EventAccumulator(str(tracked / "trackers/tensorboard"), {"tensors": 0})
    reader.Reload()
    samples = reader.Tensors("completions/text_summary")
    assert [sample.step for sample in samples] == [1, 2, 4, 6]
    text = samples[-1].tensor_proto.string_val[0].decode()
    assert text.count("**Step 6: reward ") == 8, "the best and the worst of four groups"
    parameters = {}
    for folder in {path.parent for path in (tracked / "trackers/tensorboard").glob("*/events*")}:
        other = plugin_event_accumulator.EventAccumulator(str(folder))
        other.Reload()
        content = other.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        data = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
        parameters |= dict(data.hparams.items())
    assert parameters["run.steps"].number_value == 6
    assert parameters["model.dtype"].string_value == "float32"


def test_wandb_offline_has_every_point_once(tracked: Path) -> None:
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    points: Counter[tuple[str, int]] = Counter()
    values, configs, runs, tables = {}, {}, set(), []
    for path in (tracked.parent / "wandb").glob("offline-run-*/*.wandb"):
        for content in wandb_records(path):
            record = pb.Record.FromString(content)
            configs |= {item.key: json.loads(item.value_json) for item in record.config.update}
            if record.run.run_id:
                runs.add((record.run.run_id, record.run.project, record.run.display_name))
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            if items:
                row = {name: value for name, value in items.items() if not name.startswith(("_", "completions"))}
                values |= {(name, items["_step"]): value for name, value in row.items()}
                points.update((name, items["_step"]) for name in row)
                tables += [items["_step"]] if any(name.startswith("completions") for name in items) else []
    expected = {(name, step): value for name, series in recorded(tracked).items() for step, value in series}
    assert values.keys() == expected.keys()
    measured = ("time/", "memory/")  # of step 3, those of the first time
    assert {at: one for at, one in values.items() if not at[0].startswith(measured)} == {
        at: one for at, one in expected.items() if not at[0].startswith(measured)
    }
    assert set(points.values()) == {1}
    assert len(list((tracked.parent / "wandb").glob("offline-run-*"))) == 2
    assert len(runs) == 1, "the same run at W&B"
    assert next(iter(runs))[1:] == ("gruppo", "tiny")
    assert configs["sampling.group_size"] == 4
    assert sorted(tables) == [1, 2, 4, 6]
    table = json.loads(next((tracked.parent / "wandb").rglob("completions_6_*.table.json")).read_text())
    assert table["columns"] == ["step", "prompt", "text", "reward", "finish_reason"]
    assert len(table["data"]) == 8


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of an offline file of W&B, which has the format of LevelDB's log after 7 bytes."""
    content, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""
