"""Reading a run folder, as in a notebook."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import gruppo
from gruppo.errors import UsageError
from gruppo.runs.results import Result
from gruppo.runs.tables import SCHEMA_VERSION
from tests.small_runs import small_run


@pytest.fixture(scope="module")
def finished(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Result:
    path = tmp_path_factory.mktemp("data") / "test.jsonl"
    path.write_text("".join(json.dumps({"prompt": letter, "answer": "a"}) + "\n" for letter in "abc"))
    changes = {"evaluation__task": str(path), "evaluation__grader": "exact_match", "evaluation__every": 2}
    return small_run(tiny_folder, tmp_path_factory.mktemp("run") / "tiny", **changes)


def test_frame_has_one_row_per_step_with_its_evaluation(finished: Result) -> None:
    frame = finished.frame()
    assert list(frame.index) == [0, 1, 2, 3, 4, 5, 6]
    assert frame.index.name == "step"
    assert "step" not in frame.columns
    for line in finished.metrics:
        for name, value in line.items():
            if name != "step":
                held = frame.loc[line["step"], name]
                assert held == value if value is not None else math.isnan(held)
    assert list(frame["eval/accuracy"].dropna().index) == [0, 2, 4, 6]
    assert math.isnan(frame.loc[0, "reward/mean"])


def test_rollouts_of_one_step_and_of_all(finished: Result) -> None:
    every = finished.rollouts()
    assert len(every) == 6 * 16
    assert list(every["step"].unique()) == [1, 2, 3, 4, 5, 6]
    one = finished.rollouts(3)
    assert one["text"].tolist() == every[every["step"] == 3]["text"].tolist()
    assert one.loc[0, "token_ids"].dtype == "int64"


def test_evaluations_contain_every_answer(finished: Result) -> None:
    every = finished.evaluations()
    assert len(every) == 4 * 3
    accuracy = every.groupby("step")["correct"].mean()
    assert accuracy.to_dict() == finished.frame()["eval/accuracy"].dropna().to_dict()
    assert finished.evaluations(6)["answer"].tolist() == every[every["step"] == 6]["answer"].tolist()


def test_tables_name_the_version_of_their_schema(finished: Result) -> None:
    for table in ("rollouts", "evaluations"):
        schema = pq.read_schema(finished.path / table / "step-000002.parquet")
        assert schema.metadata[b"gruppo_schema"] == str(SCHEMA_VERSION).encode()


@pytest.mark.parametrize(("table", "steps"), [("rollouts", "1, 2, 3, 4, 5, 6"), ("evaluations", "0, 2, 4, 6")])
def test_a_missing_step_is_reported_with_the_existing_ones(finished: Result, table: str, steps: str) -> None:
    with pytest.raises(UsageError, match=f"of step 7; it has those of {steps}"):
        getattr(finished, table)(7)


def test_run_without_evaluations(tiny_folder: str, tmp_path: Path) -> None:
    result = small_run(tiny_folder, tmp_path / "run", run__steps=1)
    with pytest.raises(UsageError, match="it has none yet"):
        result.evaluations()


def test_events(finished: Result, tmp_path: Path, tiny_folder: str) -> None:
    assert list(finished.events().columns) == ["time", "step", "kind", "message"]
    assert len(finished.events()) == 0
    small_run(tiny_folder, tmp_path / "run", run__steps=1)
    again = small_run(tiny_folder, tmp_path / "run", run__steps=1, resume=True)
    assert again.events()["kind"].tolist() == ["resume"]


def test_a_result_read_from_the_folder_is_the_same(finished: Result) -> None:
    for opened in (gruppo.load_result(finished.path), Result.read(str(finished.path))):
        assert opened == finished
    assert opened.load_model().num_parameters() > 0


def test_a_run_in_progress_can_be_read(finished: Result, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text((finished.path / "recipe.toml").read_text())
    lines = (finished.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    result = gruppo.load_result(tmp_path)
    assert len(result.metrics) == 3, "a line that is still being written is left out"
    assert result.summary == {"state": "unfinished"}
    with pytest.raises(UsageError, match="the run is unfinished"):
        result.load_model()


def test_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="contains no run"):
        gruppo.load_result(tmp_path)
