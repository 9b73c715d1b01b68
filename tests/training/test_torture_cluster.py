"""What `make torture-cluster` does without Ray: its faults are repeatable, and it notices what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.torture_cluster import Inflicted, Life, miscounted, unreported
from tests.torture_faults import CASES, Case, Fault, plan

TALLY = {"sampling": 12, "updating": 6, "writing a line": 8, "loading": 1}
LOST = "engine 0 (process 7 on a): its process was killed or crashed (Ray does not know the signal); no work is lost"


def test_faults_depend_on_the_seed_and_the_number_of_the_run_alone() -> None:
    for name, case in CASES.items():
        runs = [plan(name, TALLY, 20.0, 3, run) for run in range(12)]
        assert runs == [plan(name, TALLY, 20.0, 3, run) for run in range(12)]
        assert runs != [plan(name, TALLY, 20.0, 4, run) for run in range(12)]
        assert {fault.victim for faults in runs for fault in faults} == set(case.victims)
        assert {fault.phase for faults in runs for fault in faults} <= {"time", "restoring", *TALLY}


def life(way: str, *events: str, log: str = "", code: int = 0, victim: str = "engine", lines: int = 6) -> Life:
    happened = [Inflicted(Fault(victim, way, "sampling", 1, False, 0.0), 7, 2)]
    return Life(code, happened, [], log, [{"kind": "engine_lost", "message": message} for message in events], lines)


@pytest.mark.parametrize(
    ("found", "reported"),
    [
        (life("killed", LOST), True),
        (life("killed"), False),
        (life("killed", lines=3), True),  # the run was over before anyone had to notice
        (life("killed", code=-9), True),
        (life("killed", LOST, LOST), False),
        (life("killed", LOST.replace("process 7", "process 8")), False),
        (life("killed", LOST.replace("; no", "\nno")), False),
        (life("killed", "engine 0 (process 7 on a): for some reason; no work is lost"), False),
        (life("stopped", LOST), False),
        (life("stopped", "engine 0 (process 7 on a): silent for 12 s while sampling, so it was killed"), True),
        (life("killed", victim="leader", code=-9), True),
    ],
)
def test_a_death_that_is_not_reported_in_one_line_is_noticed(found: Life, reported: bool) -> None:
    assert bool(unreported(found, CASES["engines"])) != reported


def test_the_death_of_a_rank_of_a_launcher_is_in_the_log() -> None:
    case = Case({"trainers": 2}, ("rank",), launched=2)
    said = "gruppo: rank 0: rank 1 has ended, or is silent since 12:00:00 (cluster.patience = 12)\n"
    assert unreported(life("killed", victim="rank", code=1, log=said), case) == []
    assert len(unreported(life("killed", victim="rank", code=1), case)) == 1
    assert len(unreported(life("killed", victim="rank", code=1, log=said * 2), case)) == 1


def test_completions_that_are_lost_or_trained_twice_are_noticed(tmp_path: Path) -> None:
    rows = [
        {"step": step, "group": group, "completion": number, "prompt_id": f"{step} {group}", "reward": 1.0}
        for step in (1, 2)
        for group in range(2)
        for number in range(2)
    ]
    (tmp_path / "rollouts").mkdir()

    def problems(rows: list[dict[str, Any]]) -> list[str]:
        for step in (1, 2):
            table = pa.Table.from_pylist([row for row in rows if row["step"] == step])
            pq.write_table(table, tmp_path / f"rollouts/step-{step:06d}.parquet")
        return miscounted(tmp_path)

    assert problems(rows) == []
    assert "is there 2 times" in problems([*rows, rows[-1]])[-1]
    assert "has no reward" in problems([*rows[:-1], {**rows[-1], "reward": None}])[0]
    assert problems(rows[:-1]) == ["rollouts: groups have [1, 2] completions"]
    again = [{**row, "group": row["group"] + 2, "prompt_id": "1 0"} for row in rows[:4]]
    assert "unequally often" in problems([*rows, *again])[0]
