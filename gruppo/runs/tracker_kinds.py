"""How each tracker is opened through accelerate, and how it gets a sample of completions.

accelerate and the trackers are imported only where a tracker is opened: accelerate imports torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gruppo.runs.trackers import Sent

PROJECT = "gruppo"  # the project or experiment that runs belong to, unless the tracker's own variable names another

COLUMNS = ("step", "prompt", "text", "reward", "finish_reason")  # of a sample of completions

TENSORBOARD = "tensorboard"
CONFIG_IS_FINAL = ("mlflow",)  # trackers that refuse another value for a parameter

Rows = Sequence[Sequence[Any]]


def open_tracker(name: str, folder: Path, sent: Sent, purge: int) -> Any:
    """A started tracker, which continues the run `sent.run_id`.

    `folder`: for TensorBoard's files; other trackers keep theirs where they always do. `purge`: TensorBoard drops what
    it has from this step on. It takes the first such mark in a folder for the start of the run, so the first session
    leaves one too. Raises anything that the tracker raises.
    """
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState(cpu=True)  # the trackers ask it whether this is the main process
    arguments, options = _ARGUMENTS[name](folder, sent, purge)
    tracker = LOGGER_TYPE_TO_CLASS[name](*arguments, **options)
    tracker.start()
    if name == "mlflow":
        sent.run_id = tracker.tracker.info.run_id
        return _Mlflow(tracker)
    return tracker


Arguments = tuple[list[str], dict[str, Any]]


def _tensorboard(folder: Path, sent: Sent, purge: int) -> Arguments:
    return [TENSORBOARD, str(folder)], {"purge_step": purge}


def _wandb(folder: Path, sent: Sent, _: int) -> Arguments:
    # Its files stay out of the run folder: among them are links to its logs, and a run folder has no links out of it.
    options = {"id": sent.run_id, "name": sent.name, "resume": "allow"}
    return [os.environ.get("WANDB_PROJECT") or PROJECT], options


def _mlflow(folder: Path, sent: Sent, _: int) -> Arguments:
    return [PROJECT], {"run_id": sent.run_id if sent.steps or sent.config else None, "run_name": sent.name}


def _trackio(folder: Path, sent: Sent, _: int) -> Arguments:
    # A run is identified by its name.
    return [PROJECT], {"name": f"{sent.name}-{sent.run_id[:8]}", "resume": "allow"}


def _comet_ml(folder: Path, sent: Sent, _: int) -> Arguments:
    import comet_ml

    settings = comet_ml.ExperimentConfig(name=sent.name)
    options = {"experiment_key": sent.run_id, "mode": "get_or_create", "experiment_config": settings}
    return [os.environ.get("COMET_PROJECT_NAME") or PROJECT], options


def _swanlab(folder: Path, sent: Sent, _: int) -> Arguments:
    options = {"id": sent.run_id, "name": sent.name, "resume": "allow"}
    return [os.environ.get("SWANLAB_PROJ_NAME") or PROJECT], options


_ARGUMENTS: dict[str, Callable[[Path, Sent, int], Arguments]] = {
    TENSORBOARD: _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
    "comet_ml": _comet_ml,
    "swanlab": _swanlab,
}


class _Mlflow:
    """MLflow's tracker, with names that it accepts."""

    def __init__(self, tracker: Any) -> None:
        self._tracker = tracker
        self.finish = tracker.finish

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._tracker.store_init_configuration({_mlflow_name(name): value for name, value in values.items()})

    def log(self, values: dict[str, float], step: int) -> None:
        self._tracker.log({_mlflow_name(name): value for name, value in values.items()}, step=step)


def _mlflow_name(name: str) -> str:
    """The name with only the characters that MLflow allows, and as a path that leads nowhere else."""
    clean = re.sub(r"[^\w./ -]", "_", name, flags=re.ASCII)[-200:]
    return clean if os.path.normpath(clean) == clean and not clean.startswith(("/", "..")) else clean.replace("/", "_")


def send_completions(name: str, tracker: Any, rows: Rows, step: int) -> None:
    """Log a sample of completions: a table where the tracker has tables, text elsewhere. `rows`: have `COLUMNS`."""
    _SEND.get(name, _send_text)(tracker, rows, step)


def _send_text(tracker: Any, rows: Rows, step: int) -> None:
    tracker.log({"completions": as_markdown(rows)}, step=step)


def _send_wandb(tracker: Any, rows: Rows, step: int) -> None:
    tracker.log_table("completions", columns=list(COLUMNS), data=[list(row) for row in rows], step=step)


def _send_mlflow(tracker: Any, rows: Rows, step: int) -> None:
    import mlflow

    columns = {column: [row[place] for row in rows] for place, column in enumerate(COLUMNS)}
    mlflow.log_table(columns, f"completions/step-{step:06d}.json")


def _send_trackio(tracker: Any, rows: Rows, step: int) -> None:
    import trackio

    tracker.log({"completions": trackio.Table(columns=list(COLUMNS), data=[list(row) for row in rows])}, step=step)


def _send_comet_ml(tracker: Any, rows: Rows, step: int) -> None:
    tracker.tracker.log_text(as_markdown(rows), step=step)


def _send_swanlab(tracker: Any, rows: Rows, step: int) -> None:
    import swanlab

    tracker.log({"completions": swanlab.Text(as_markdown(rows))}, step=step)


_SEND: dict[str, Callable[[Any, Rows, int], None]] = {
    "wandb": _send_wandb,
    "mlflow": _send_mlflow,
    "trackio": _send_trackio,
    "comet_ml": _send_comet_ml,
    "swanlab": _send_swanlab,
}


def as_markdown(rows: Rows) -> str:
    """A sample of completions as Markdown. Prompts and completions are indented, so that none of their characters is
    Markdown or HTML."""
    return "\n\n".join(map(_completion, rows))


def _completion(row: Sequence[Any]) -> str:
    values = dict(zip(COLUMNS, row, strict=True))
    reward = "no reward" if values["reward"] is None else f"reward {values['reward']:.6g}"
    title = f"**Step {values['step']}: {reward}, {values['finish_reason']}**"
    return f"{title}\n\nPrompt\n\n{_indented(values['prompt'])}\n\nCompletion\n\n{_indented(values['text'])}"


def _indented(text: Any) -> str:
    return "\n".join(f"    {line}" for line in str(text).splitlines() or [""])
