"""Ranks that are lost: how often a run starts again, and what it records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gruppo.errors import RunError
from gruppo.runs.folder import RunFolder
from gruppo.runs.recorder import FileSink, Recorder
from gruppo.training.attempts import run_attempts
from gruppo.training.lost_ranks import LostRanks, RankLostError
from gruppo.utils.progress import NullProgress
from tests.engines.fleet.running import events


class Attempt:
    """A run that saves checkpoints, by their steps, or loses a rank (None), and then ends."""

    def __init__(self, folder: Path, happens: Sequence[int | None]) -> None:
        self.folder, self.happens, self.resumed = folder, list(happens), list[bool]()
        self.progress = NullProgress()

    def execute(self, team: Any, resume: bool, lost: LostRanks) -> str:
        self.resumed.append(resume)
        while self.happens:
            step = self.happens.pop(0)
            if step is None:
                raise RankLostError(f"rank 1 has ended, attempt {len(self.resumed)}")
            (self.folder / f"checkpoints/step-{step:06d}").mkdir(parents=True)
        return "done"


def run(folder: Path, *happens: int | None) -> Attempt:
    attempt: Any = Attempt(folder, happens)
    team: Any = SimpleNamespace(size=2)
    assert run_attempts(attempt, team, resume=False) == "done"
    return attempt  # type: ignore[no-any-return]


def test_a_run_starts_again_as_long_as_it_moves_on(tmp_path: Path) -> None:
    assert run(tmp_path, None, None, 2, None, None, 4, None).resumed == [False, True, True, True, True, True]


@pytest.mark.parametrize("happens", [(None, None, None), (2, None, None, None, 4)])
def test_a_run_that_does_not_move_on_stops(tmp_path: Path, happens: tuple[int | None, ...]) -> None:
    with pytest.raises(RunError, match=r"trainers = 2: ranks were lost 3 times .* the last time: rank 1 .* attempt 3;"):
        run(tmp_path, *happens)


def test_each_loss_has_one_event_whatever_is_undone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    recorder, lost = Recorder(NullProgress(), [FileSink(folder)]), LostRanks(wanted=3)
    causes = ["rank 1 has ended", "rank 1 has ended", "rank 2 is silent"]
    for count, cause in enumerate(causes, 1):
        if count == 3:
            (tmp_path / "events.jsonl").unlink()
        lost.messages.append(cause)
        lost.record(recorder, tmp_path, 4, size=2)
        lost.record(recorder, tmp_path, 4, size=2)
        assert len(events(tmp_path, "rank_lost")) == count
    last = events(tmp_path, "rank_lost")[-1]
    assert last["message"] == f"{causes[-1]}; the run continues after step 4 on 2 ranks of 3, for which there is room"
    folder.close()
