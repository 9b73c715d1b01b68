"""What a tracker of a run has got so far, and whether the trackers of a recipe are installed.

A tracker is a program that shows runs: TensorBoard, Weights & Biases, MLflow, … Each one runs in a process of its own
(`gruppo.runs.tracker_main`), which follows the run folder as any reader does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from secrets import token_hex

from gruppo.errors import UsageError
from gruppo.runs.atomic import write_whole
from gruppo.runs.reading import read_object
from gruppo.utils.imports import installed

FOLDER = "trackers"  # in the run folder


def require_installed(names: Iterable[str]) -> None:
    """Raise UsageError if the package of one of these trackers is not installed. Nothing is imported."""
    for name in names:
        if not installed(name):
            package = name.replace("_", "-")
            raise UsageError(
                f'run.trackers: "{name}" is not installed; install it with `pip install {package}`, or remove it from '
                "run.trackers"
            )


@dataclass
class Sent:
    """What a tracker has got: the content of trackers/NAME.json.

    `name`: what the run is called there. `run_id`: its id there. `config`: the flat recipe that was sent last. `steps`:
    metric -> the highest step that was sent; "completions" stands for the samples of completions.
    """

    name: str
    run_id: str = field(default_factory=lambda: token_hex(16))
    config: dict[str, str | int | float | bool] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        """The highest step of anything that was sent; -1 if there is none."""
        return max(self.steps.values(), default=-1)

    def forget_after(self, step: int) -> None:
        """Send everything after this step again."""
        self.steps = {name: min(last, step) for name, last in self.steps.items()}

    def write(self, path: Path) -> None:
        """Write trackers/NAME.json atomically."""
        write_whole(path, (json.dumps(asdict(self), indent=1) + "\n").encode())


def read_sent(path: Path) -> Sent | None:
    """What a tracker has got, from trackers/NAME.json; None if there is no such file. Raises UsageError if it is
    damaged."""
    if not path.is_file():
        return None
    content = read_object(path)
    steps = content.get("steps")
    texts = isinstance(content.get("name"), str) and isinstance(content.get("run_id"), str)
    if not (texts and isinstance(steps, dict) and isinstance(content.get("config"), dict)) or not all(
        type(step) is int for step in steps.values()
    ):
        raise UsageError(f"{path}: is damaged; remove it, and the tracker begins a new run")
    return Sent(content["name"], content["run_id"], content["config"], steps)
