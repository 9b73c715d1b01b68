"""What a tracker gets from a run folder, and that it gets nothing twice; with made-up folders and a made-up tracker."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator
from tensorboard.summary.writer import event_file_writer

from gruppo.config.loading import load_recipe
from gruppo.config.sections import Tracker
from gruppo.errors import UsageError
from gruppo.runs import tracker_kinds, tracker_main
from gruppo.runs.tables import ROLLOUTS
from gruppo.runs.tail import Tail
from gruppo.runs.tracker_kinds import _mlflow_name, as_markdown
from gruppo.runs.tracker_main import MOST_TEXT, Follower, flat, sample
from gruppo.runs.trackers import Sent, read_sent, require_installed
from tests.small_runs import recipe


class Fake:
    """Stands in for the package trackio: keeps what it gets. `fails_at`: the step at which it raises."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.configs: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.fails_at: int | None = None
        self.finished = 0
        self.config = SimpleNamespace(update=lambda values, allow_val_change: self.configs.append(values))
        self.Table = SimpleNamespace

    def init(self, **options: Any) -> Fake:
        self.runs.append(options)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        if step == self.fails_at:
            raise ConnectionError("no server")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1

    @property
    def points(self) -> Counter[tuple[str, int]]:
        return Counter((name, step) for step, values in self.logged for name in values)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    tracker = Fake()
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    return tracker


class Folder:
    """A run folder of a run that computes nothing: `steps` writes the files of some steps."""

    def __init__(self, path: Path, **changes: Any) -> None:
        self.path = path
        (path / "trackers").mkdir(parents=True)
        (path / "rollouts").mkdir()
        self.write_recipe(**changes)

    def write_recipe(self, **changes: Any) -> None:
        (self.path / "recipe.toml").write_text(load_recipe(recipe("m", **changes)).to_toml())

    def steps(self, first: int, last: int, factor: float = 1.0) -> None:
        for step in range(first, last + 1):
            rows = [row(step, group, number) for group in range(6) for number in range(3)]
            pq.write_table(pa.Table.from_pylist(rows, ROLLOUTS), self.path / f"rollouts/step-{step:06d}.parquet")
            self.line({"step": step, "loss/total": factor * step / 7, "reward/mean": None if step == 2 else step / 3})

    def line(self, values: dict[str, Any] | str) -> None:
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write((values if isinstance(values, str) else json.dumps(values)) + "\n")

    def cut_back(self, step: int) -> None:
        lines = (self.path / "metrics.jsonl").read_text().splitlines(keepends=True)
        (self.path / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def row(step: int, group: int, number: int) -> dict[str, Any]:
    reward = None if group == 1 else [0.5, 1.0, 0.0][number]
    values = {"step": step, "group": group, "completion": number, "prompt": f"prompt {group}", "reward": reward}
    return {**values, "text": f"answer {step} {group} {number}", "finish_reason": "stop"}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "run")


def log(folder: Folder, step: int = 0, name: str = "trackio") -> Follower:
    """One session of a tracker, as after a start or resume at `step`."""
    follower = Follower(name, folder.path, step)
    follower.log_new()
    return follower


def test_every_name_is_one_of_accelerate() -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(get_args(Tracker)) == set(tracker_kinds._ARGUMENTS) <= set(LOGGER_TYPE_TO_CLASS)
    assert set(tracker_kinds._SEND) <= set(get_args(Tracker))


def test_the_recipe_and_every_finite_metric_are_logged(folder: Folder, fake: Fake) -> None:
    folder.steps(1, 3)
    log(folder)
    assert fake.runs[0]["project"] == "gruppo"
    assert fake.runs[0]["name"].startswith("tiny-")
    assert fake.configs[0]["method.kl_coef"] == 0.02
    assert fake.configs[0]["reward.functions"] == '["tests/rewards/functions.py:likes_letters"]'
    metrics = [entry for entry in fake.logged if "completions" not in entry[1]]
    assert metrics[0] == (1, {"loss/total": 1 / 7, "reward/mean": 1 / 3})
    assert metrics[1] == (2, {"loss/total": 2 / 7}), "null is left out"


def test_lines_are_logged_as_the_run_writes_them(folder: Folder, fake: Fake) -> None:
    follower = log(folder)
    folder.steps(1, 1)
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss/')
    follower.log_new()
    assert fake.points == {("loss/total", 1): 1, ("reward/mean", 1): 1, ("completions", 1): 1}
    folder.line('total": 4}')
    folder.line({"step": 2, "eval/accuracy": 0.5})  # an evaluation of the same step
    follower.log_new()
    assert fake.points[("loss/total", 2)] == fake.points[("eval/accuracy", 2)] == 1


def test_samples_are_of_the_first_and_last_step_and_of_those_with_a_checkpoint(folder: Folder, fake: Fake) -> None:
    folder.write_recipe(run__steps=7, run__checkpoint_every=3)
    folder.steps(1, 7)
    log(folder)
    assert [step for step, values in fake.logged if "completions" in values] == [1, 3, 6, 7]
    table = next(values["completions"] for _, values in fake.logged if "completions" in values)
    assert table.columns == ["step", "prompt", "text", "reward", "finish_reason"]
    best, worst, unscored, *_ = table.data
    assert best == [1, "prompt 0", "answer 1 0 1", 1.0, "stop"]
    assert worst == [1, "prompt 0", "answer 1 0 2", 0.0, "stop"]
    assert unscored == [1, "prompt 1", "answer 1 1 0", None, "stop"]
    assert {line[1] for line in table.data} == {f"prompt {group}" for group in range(4)}


@pytest.mark.parametrize("checkpoint", [0, 3, 5])
def test_a_resume_logs_nothing_twice(folder: Folder, fake: Fake, checkpoint: int) -> None:
    folder.steps(1, 5)
    log(folder)
    folder.cut_back(checkpoint)  # the run goes on from its checkpoint
    folder.steps(checkpoint + 1, 8)
    log(folder, checkpoint)
    assert set(fake.points.values()) == {1}
    assert {step for name, step in fake.points if name == "loss/total"} == set(range(1, 9))
    assert fake.runs[0] == fake.runs[1], "the same run is continued"
    assert len(fake.configs) == 1


def test_a_tracker_that_is_added_at_a_resume_gets_everything(folder: Folder, fake: Fake) -> None:
    folder.steps(1, 4)
    log(folder, step=4)
    assert {step for _, step in fake.points} == {1, 2, 3, 4}


def test_a_step_that_failed_is_logged_by_the_next_session(folder: Folder, fake: Fake) -> None:
    folder.steps(1, 5)
    fake.fails_at = 3
    with pytest.raises(ConnectionError):
        log(folder)
    assert {step for _, step in fake.points} == {1, 2}
    fake.fails_at = None
    log(folder, 5)
    assert set(fake.points.values()) == {1}
    assert {step for _, step in fake.points} == {1, 2, 3, 4, 5}


def test_a_killed_session_logs_nothing_twice(folder: Folder, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill right after a step was logged: what is noted before it has to be enough."""
    folder.steps(1, 5)
    original = Fake.log

    def dies(tracker: Fake, values: dict[str, Any], step: int) -> None:
        original(tracker, values, step)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Fake, "log", dies)
        with pytest.raises(KeyboardInterrupt):
            log(folder)
    log(folder, 5)
    assert set(fake.points.values()) == {1}
    assert {step for _, step in fake.points} == {1, 2, 3, 4, 5}


def test_a_changed_recipe_is_sent_again_where_it_can_change(
    folder: Folder, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.steps(1, 1)
    log(folder)
    folder.write_recipe(run__steps=9)
    log(folder, 1)
    assert [config["run.steps"] for config in fake.configs] == [6, 9]
    monkeypatch.setattr(tracker_main, "CONFIG_IS_FINAL", ("trackio",))
    folder.write_recipe(run__steps=12)
    log(folder, 1)
    assert len(fake.configs) == 2


def test_odd_values_break_no_tracker(folder: Folder, fake: Fake) -> None:
    folder.line(
        '{"step": 1, "nan": NaN, "inf": -Infinity, "huge": 1' + "0" * 400 + ', "text": "x", "yes": true, "ok": 2}'
    )
    folder.line('{"step": true, "ok": 3}')
    folder.line('{"ok": 4}')
    folder.line("not JSON")
    folder.line("[1, 2]")
    folder.line({"step": 2, "ok": 5})
    log(folder)
    assert fake.logged == [(1, {"ok": 2.0}), (2, {"ok": 5.0})]


def test_a_missing_or_damaged_table_is_said_in_the_log(
    folder: Folder, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.steps(1, 2)
    (folder.path / "rollouts/step-000001.parquet").write_bytes(b"PAR1 no table")
    (folder.path / "rollouts/step-000002.parquet").unlink()
    log(folder)
    assert {step for _, step in fake.points} == {1, 2}
    said = capsys.readouterr().err
    assert "step-000001.parquet: is damaged" in said
    assert "step-000002.parquet: is missing" in said


def test_long_and_hostile_texts_are_cut_off_and_stay_text(tmp_path: Path) -> None:
    hostile = "# Title\n\n<script>alert(1)</script> ![x](http://e.x/y)\x00\x1b[31m" + "é" * (MOST_TEXT + 5)
    values = [{**row(1, 0, number), "text": hostile, "reward": reward} for number, reward in enumerate([1.0, np.nan])]
    pq.write_table(pa.Table.from_pylist(values, ROLLOUTS), tmp_path / "t.parquet")
    rows = sample(tmp_path / "t.parquet")
    assert [line[3] for line in rows] == [1.0]
    text = rows[0][2]
    assert text == f"{hostile[:MOST_TEXT]}… ({len(hostile) - MOST_TEXT} more characters)"
    page = as_markdown([[1, "p\n**b**", text, None, "stop"]])
    assert page.startswith("**Step 1: no reward, stop**\n\nPrompt\n\n    p\n    **b**\n")
    assert all(line.startswith("    ") for line in page.split("\n") if "script" in line or "# Title" in line)


def test_a_recipe_is_flat() -> None:
    tables = {"a": {"b": {"c": 1}, "list": ["x", 2], "none": []}, "mixture": [{"name": "u"}, {"name": "v"}]}
    assert dict(flat(tables)) == {
        "a.b.c": 1, "a.list": '["x", 2]', "a.none": "[]", "mixture.0.name": "u", "mixture.1.name": "v",
    }  # fmt: skip
    assert set(map(type, dict(flat(load_recipe(recipe("m")).as_mapping())).values())) <= {str, int, float, bool}


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        ("reward/mean", "reward/mean"),
        ("reward.options.a:b[0]", "reward.options.a_b_0_"),
        ("/etc/x", "_etc_x"),
        ("../up", ".._up"),
        ("a//b", "a__b"),
        ("é\n" + "x" * 300, "x" * 200),
    ],
)
def test_names_for_mlflow(name: str, accepted: str) -> None:
    assert _mlflow_name(name) == accepted


def test_a_damaged_record_of_what_was_sent_is_refused_with_the_fix(folder: Folder, fake: Fake) -> None:
    folder.steps(1, 1)
    log(folder)
    file = folder.path / "trackers/trackio.json"
    kept = read_sent(file)
    assert kept is not None
    assert kept.steps == {"loss/total": 1, "reward/mean": 1, "completions": 1}
    for content in ("[]", "{", '{"name": 1}', json.dumps({**kept.__dict__, "steps": {"a": "b"}})):
        file.write_text(content)
        with pytest.raises(UsageError, match=r"trackio\.json: is damaged"):
            log(folder)


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_installed(["tensorboard", "wandb"])
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "comet_ml").mkdir()  # a folder of this name is no package
    with pytest.raises(UsageError, match=r'run\.trackers: "comet_ml" is not installed; .*`pip install comet-ml`'):
        require_installed(["tensorboard", "comet_ml"])


def test_a_file_that_is_cut_back_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    tail = Tail(path)
    assert tail.read() == (False, [])
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert tail.read() == (False, [{"a": 1}, {"a": 2}])
    path.write_text('{"a": 1}\n{"a": 3}\n{"a": 4}\n')
    assert tail.read() == (True, [{"a": 1}, {"a": 3}, {"a": 4}])


# TensorBoard, with its own reader.


@pytest.fixture(autouse=True)
def few_event_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads files in the order of their names: second, process, and a number in the process, as text."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def scalars(folder: Folder) -> dict[str, list[tuple[int, float]]]:
    reader = event_accumulator.EventAccumulator(str(folder.path / "trackers/tensorboard"), {"scalars": 0})
    reader.Reload()
    return {tag: [(entry.step, entry.value) for entry in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def texts(folder: Folder) -> list[int]:
    reader = plugin_event_accumulator.EventAccumulator(str(folder.path / "trackers/tensorboard"), {"tensors": 0})
    reader.Reload()
    return [entry.step for entry in reader.Tensors("completions/text_summary")]


def board_session(folder: Folder, step: int = 0) -> None:
    log(folder, step, "tensorboard").tracker.finish()


@pytest.mark.parametrize("checkpoint", [0, 3, 5])
def test_tensorboard_has_every_point_once_after_a_resume(folder: Folder, checkpoint: int) -> None:
    folder.steps(1, 5)
    board_session(folder)
    folder.cut_back(checkpoint)
    folder.steps(checkpoint + 1, 8, factor=2.0)  # other values, as after a change of the code
    board_session(folder, checkpoint)
    values = [(step, (1.0 if step <= checkpoint else 2.0) * step / 7) for step in range(1, 9)]
    assert scalars(folder)["loss/total"] == [(step, pytest.approx(value)) for step, value in values]
    assert texts(folder) == [1, 2, 4, 6, 8]


def test_tensorboard_loses_nothing_by_a_kill(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.steps(1, 3)

    def dies(self: Sent, path: Path) -> None:
        write(self, path)
        if self.last_step == 3:
            raise KeyboardInterrupt  # noted, but not logged

    write = Sent.write
    with monkeypatch.context() as patch:
        patch.setattr(Sent, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            board_session(folder)
    folder.steps(4, 4)
    board_session(folder, 3)
    assert [step for step, _ in scalars(folder)["loss/total"]] == [1, 2, 3, 4]
    assert texts(folder) == [1, 2, 4]


def test_the_recipe_of_a_folder_can_be_any_recipe(tmp_path: Path, fake: Fake) -> None:
    folder = Folder(tmp_path / "run")
    content = load_recipe({"model": {"name": "m"}, "mixture": [{"name": "gsm8k"}, {"name": "math"}]}).as_mapping()
    (folder.path / "recipe.toml").write_text(tomli_w.dumps(content))
    log(folder)
    assert fake.configs[0]["mixture.1.name"] == "math"
