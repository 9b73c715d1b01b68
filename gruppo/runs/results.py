"""Reads a run folder: metrics and tables as data frames, and the trained model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gruppo.errors import UsageError
from gruppo.runs.missing import missing_parts, steps_text
from gruppo.runs.reading import read_lines, read_metrics, read_object, read_table, reading, require_own, step_of
from gruppo.utils.imports import needing_ui

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

_WHOLE = "restore it as the run wrote it"


@dataclass(frozen=True)
class Result:
    """The outcome of a run, finished or not.

    `metrics`: the lines of metrics.jsonl. `summary`: the content of summary.json; only the state "unfinished" if there
    is no such file yet.
    """

    path: Path
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]

    def __repr__(self) -> str:
        """A few lines: the path, the progress and the held-out accuracy."""
        summary = self.summary
        lines = [f"Result({str(self.path)!r}: {summary.get('state', 'unknown')}"]
        if "steps" in summary:
            lines[0] += f", {summary['steps']} steps, {summary.get('train_seconds', 0.0):.0f} s of training"
        before, after = summary.get("accuracy_before"), summary.get("accuracy_after")
        if isinstance(before, float):
            lines.append(f"  held-out accuracy {before:.1%}" + (f" -> {after:.1%}" if isinstance(after, float) else ""))
        lines.append(
            "  .frame(), .rollouts(step), .evaluations(step), .events(), .view(step), .report(), .load_model(), "
            ".push_to_hub(name)"
        )
        return "\n".join(lines) + ")"

    def _repr_html_(self) -> str:
        """In a notebook: a small table with a curve for each metric."""
        from gruppo.runs.notebook import result_html

        return result_html(self)

    @classmethod
    def read(cls, path: str | Path) -> Result:
        """The result in a run folder, finished or not. Warns of missing parts. Raises UsageError if the folder contains
        no run."""
        folder = Path(path)
        if not (folder / "recipe.toml").is_file():
            raise UsageError(f"{folder}: contains no run; give a run folder, e.g. runs/quickstart")
        require_own(folder)
        file = folder / "summary.json"
        summary = read_object(file) if file.is_file() else {"state": "unfinished"}
        result = cls(folder, read_metrics(folder / "metrics.jsonl"), {"state": "unknown", **summary})
        for problem in result.missing:
            warnings.warn(f"{folder}: {problem}", stacklevel=2)
        return result

    @property
    def missing(self) -> list[str]:
        """Descriptions of what was deleted from the folder or is missing from its files, and what is lost."""
        if (self.path / "folder.json").is_file():  # labels or a reward model
            return []
        return missing_parts(self.path)

    def frame(self) -> pd.DataFrame:
        """The metrics, with one row per step and one column per metric.

        An evaluation is in the row of the step that it came after, so row 0 contains only an evaluation. NaN if a
        metric was not recorded.
        """
        import pandas as pd

        if not self.metrics and (problem := next((text for text in self.missing if text.startswith("metrics")), "")):
            raise UsageError(f"{self.path}: {problem}; restore it from a copy; rollouts() and evaluations() still work")
        rows: dict[int, dict[str, Any]] = {}
        with reading(self.path / "metrics.jsonl", _WHOLE):
            for line in self.metrics:
                rows.setdefault(line["step"], {}).update({k: v for k, v in line.items() if k != "step"})
            return pd.DataFrame.from_dict(rows, orient="index").rename_axis("step").sort_index().astype(float)

    def rollouts(self, step: int | None = None) -> pd.DataFrame:
        """Completions of one step or of all, one per row, with the columns of gruppo.runs.tables.ROLLOUTS."""
        return self._tables("rollouts", step)

    def evaluations(self, step: int | None = None) -> pd.DataFrame:
        """Answers to held-out questions, of one evaluation or of all, with the step that the evaluation came after.

        The columns are those of gruppo.runs.tables.EVALUATIONS. The metrics of the evaluations are in `frame`.
        """
        return self._tables("evaluations", step)

    def events(self) -> pd.DataFrame:
        """What the user should know: excluded completions, resumes, warnings; one row per event."""
        import pandas as pd

        with reading(self.path / "events.jsonl", _WHOLE):
            found = pd.DataFrame(read_lines(self.path / "events.jsonl"))
        return found if len(found) else pd.DataFrame(columns=["time", "step", "kind", "message"])

    def view(self, step: int, group: int = 0) -> Any:
        """A group of completions token by token (a gruppo.ui.notebook.TokenView): in a notebook a view, elsewhere text.
        `step` counts from 1, `group` from 0.

        At most 16 completions are shown; `gruppo ui` shows all. Needs the extra `ui`. Raises UsageError if the step has
        no such group.
        """
        return _dashboard("notebook", "the token view").TokenView.of(self.path, step, group)

    def report(self, out: str | Path = "report.html", *, force: bool = False, **limits: float) -> Path:
        """Write the run as one file that opens in a browser without a network. Returns its path.

        `force`: replace a file that is not a report. `limits`: `steps`, `groups`, `questions` and `megabytes`, see
        gruppo.ui.sampling.Limits. Needs the extra `ui`. Raises UsageError if the file cannot be written there.
        """
        module = _dashboard("report", "a report")
        return Path(module.write_report([self.path], Path(out), module.Limits(**limits), force=force).path)

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Export a checkpoint and upload it with its model card to a repository of the Hugging Face hub, "OWNER/NAME".

        Returns the URL of the commit. `options`: `private`, `revision` (a branch), `to` (a folder to keep), and those
        of `gruppo.export`; see gruppo.training.hub_push. Raises UsageError before the export is written if the
        repository is out of reach, and RunError if the upload or, with `verify`, the verification fails.
        """
        module = import_module("gruppo.training.hub_push")  # it builds on this package, so it is imported by name
        return str(module.push_to_hub(self.path, repository, **options).url)

    def load_model(self, *, trust_remote_code: bool = False) -> PreTrainedModel:
        """The trained model as transformers loads it from the run folder's model/, where its tokenizer is too.
        `trust_remote_code`: run the Python files that the model came with."""
        state = self.summary["state"]
        if state not in ("done", "stopped"):
            raise UsageError(f"{self.path}: the run is {state}; resume it until it is done, or export a checkpoint")
        from transformers import AutoModelForCausalLM

        with reading(self.path / "model", "export a checkpoint of the run"):
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                self.path / "model", use_safetensors=True, trust_remote_code=trust_remote_code
            )
            return model

    def _tables(self, folder: str, step: int | None) -> pd.DataFrame:
        import pandas as pd

        found = {step_of(path): path for path in sorted((self.path / folder).glob("step-*.parquet"))}
        paths = {number: path for number, path in found.items() if number is not None}
        if not paths or (step is not None and step not in paths):
            raise UsageError(f"{self.path}: has no {folder} of step {step}; {_known(paths)}")
        chosen: Iterable[int] = paths if step is None else [step]
        frames = []
        for number in chosen:
            frame = read_table(paths[number]).to_pandas()
            if "step" in frame and (others := set(frame["step"]) - {number}):
                warnings.warn(f"{paths[number]}: has the rows of {steps_text(others)}; it was replaced", stacklevel=3)
            frames.append(frame.assign(step=number))
        whole = pd.concat(frames, ignore_index=True)
        return whole[["step", *(name for name in whole.columns if name != "step")]]


def load_result(path: str | Path) -> Result:
    """The result in a run folder, finished or not; the same as `Result.read`."""
    return Result.read(path)


def _dashboard(module: str, what: str) -> ModuleType:
    """A module of gruppo.ui, for `what`. It builds on this package, so it is imported by name, when it is used."""
    with needing_ui(what):
        return import_module(f"gruppo.ui.{module}")


def _known(steps: Iterable[int]) -> str:
    found = list(steps)
    return f"it has those of {', '.join(map(str, found))}" if found else "it has none yet"
