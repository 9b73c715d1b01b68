"""Ranks that are lost while a run goes on: how often that may happen, and what the run records of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gruppo.errors import RunError
from gruppo.runs.folder import checkpoint_folders
from gruppo.runs.reading import read_lines
from gruppo.runs.recorder import Recorder

KIND = "rank_lost"  # of the events
MOST = 3  # losses without a checkpoint in between


class RankLostError(RunError):
    """A rank has ended or is silent. `cause`: in a line, without advice."""

    def __init__(self, cause: str, message: str = "") -> None:
        super().__init__(message or cause)
        self.cause = cause


@dataclass
class LostRanks:
    """The losses of ranks in this process. `wanted`: the number of ranks that the run should have."""

    wanted: int = 1
    messages: list[str] = field(default_factory=list)  # of all losses, oldest first
    _saved: int = -1  # the step of the newest checkpoint at the last loss
    _count: int = 0  # losses since that checkpoint

    def add(self, error: RankLostError, folder: Path) -> None:
        """Count a loss. Raises RunError if there were too many without a checkpoint in between. `folder`: the run
        folder."""
        saved = max(checkpoint_folders(folder), default=0)
        self._count = self._count + 1 if saved == self._saved else 1
        self._saved = saved
        self.messages.append(error.cause)
        if self._count >= MOST:
            raise RunError(
                f"cluster.trainers = {self.wanted}: ranks were lost {MOST} times without a checkpoint in between; the "
                f"last time: {error.cause}; resume with --resume"
            ) from error

    def record(self, recorder: Recorder, folder: Path, step: int, size: int) -> None:
        """Record the losses that events.jsonl does not have: the last one, and those whose events were undone because
        the run went back to a checkpoint. `step`: the one that the run continues after, on `size` ranks."""
        known = [event["message"] for event in read_lines(folder / "events.jsonl") if event["kind"] == KIND]
        for place, cause in enumerate(self.messages):
            if recorded := next((message for message in known if message.startswith(cause)), None):
                known.remove(recorded)
                continue
            message = cause
            if place == len(self.messages) - 1:
                ranks = f"{size} rank{'s' * (size > 1)}"
                fewer = f" of {self.wanted}, for which there is room" if size < self.wanted else ""
                goes_on = f"the run continues after step {step} on {ranks}{fewer}"
                message = f"{cause}; {goes_on}"
                recorder.note(f"Note: {goes_on}")
            recorder.event(KIND, message, step, ranks=size)
