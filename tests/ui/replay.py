"""A run that grows: the files of a finished one, written again step by step in the order of a run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from gruppo.runs.status import StatusFile

START = ("recipe.toml", "environment.json")


class Replay:
    """Writes `run` again into `folder`; `steps` says how many steps there are now."""

    def __init__(self, run: Path, folder: Path) -> None:
        self.run, self.folder, self.steps = run, folder, 0
        self.lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        folder.mkdir()
        for name in START:
            shutil.copy(run / name, folder / name)
        for name in ("rollouts", "evaluations"):
            (folder / name).mkdir()
        (folder / "metrics.jsonl").touch()
        (folder / "events.jsonl").touch()
        self.say()

    def say(self, **changes: Any) -> None:
        """A sign of life."""
        status = StatusFile(self.folder, steps=100)
        status.update(now=True, step=self.steps, phase="Sampling", **changes)

    def grow(self, steps: int = 1) -> None:
        """Write some steps more; beyond its last one the finished run begins anew."""
        for _ in range(steps):
            self.steps += 1
            number = (self.steps - 1) % 4 + 1
            shutil.copy(
                self.run / f"rollouts/step-{number:06d}.parquet",
                self.folder / f"rollouts/step-{self.steps:06d}.parquet",
            )
            for line in self.lines:
                if line["step"] == number:
                    with (self.folder / "metrics.jsonl").open("a") as stream:
                        stream.write(json.dumps({**line, "step": self.steps}) + "\n")
        self.say()

    def warn(self, name: str, message: str) -> None:
        """Write a warning."""
        with (self.folder / "events.jsonl").open("a") as stream:
            event = {"step": self.steps, "kind": "warning", "warning": name, "message": message}
            stream.write(json.dumps(event) + "\n")
        self.say()

    def cut_back(self, steps: int) -> None:
        """Resume from a checkpoint: what came after it is deleted, and the steps are written anew from there."""
        kept = [
            line
            for line in (self.folder / "metrics.jsonl").read_text().splitlines()
            if json.loads(line)["step"] <= steps
        ]
        os.truncate(self.folder / "metrics.jsonl", sum(len(line) + 1 for line in kept))
        for step in range(steps + 1, self.steps + 1):
            (self.folder / f"rollouts/step-{step:06d}.parquet").unlink()
        self.steps = steps
        self.say()
