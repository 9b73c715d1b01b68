"""A run folder read back: figures and tables as data frames, the trained model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gruppo.errors import UsageError
from gruppo.runs.reading import read_lines, read_metrics, read_object, read_table, reading, require_own, step_of

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel


_WHOLE = "put it back as the run wrote it"


@dataclass(frozen=True)
class Result:
    """What a run came to, or has come to so far. `metrics`: the lines of metrics.jsonl; `summary`: the content of
    summary.json, with the state alone ("unfinished") where there is none yet."""

    path: Path
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]

    def __repr__(self) -> str:
        """A few lines: where it is, how far it came, and its held-out accuracy."""
        summary = self.summary
        lines = [f"Result({str(self.path)!r}: {summary.get('state', 'unknown')}"]
        if "steps" in summary:
            lines[0] += f", {summary['steps']} steps, {summary.get('train_seconds', 0.0):.0f} s of training"
        before, after = summary.get("accuracy_before"), summary.get("accuracy_after")
        if isinstance(before, float):
            lines.append(f"  held-out accuracy {before:.1%}" + (f" -> {after:.1%}" if isinstance(after, float) else ""))
        lines.append("  .frame(), .rollouts(step), .evaluations(step), .events(), .load_model()")
        return "\n".join(lines) + ")"

    @classmethod
    def read(cls, path: str | Path) -> Result:
        """The result in a run folder, finished or not. Raises UsageError where the folder holds no run."""
        folder = Path(path)
        if not (folder / "recipe.toml").is_file():
            raise UsageError(f"{folder}: holds no run; give the folder of one, e.g. runs/quickstart")
        require_own(folder)
        held = folder / "summary.json"
        summary = read_object(held) if held.is_file() else {"state": "unfinished"}
        return cls(folder, read_metrics(folder / "metrics.jsonl"), {"state": "unknown", **summary})

    def frame(self) -> pd.DataFrame:
        """The metrics, a row a step and a column a metric; an evaluation stands in the row of the step it came after,
        so that row 0 holds nothing else. NaN where a metric was not taken."""
        import pandas as pd

        rows: dict[int, dict[str, Any]] = {}
        with reading(self.path / "metrics.jsonl", _WHOLE):
            for line in self.metrics:
                rows.setdefault(line["step"], {}).update({k: v for k, v in line.items() if k != "step"})
            return pd.DataFrame.from_dict(rows, orient="index").rename_axis("step").sort_index().astype(float)

    def rollouts(self, step: int | None = None) -> pd.DataFrame:
        """Every completion of a step, or of all: a row each, with the columns of gruppo.runs.tables.ROLLOUTS."""
        return self._tables("rollouts", step)

    def evaluations(self, step: int | None = None) -> pd.DataFrame:
        """Every answer to a held-out question, of one evaluation or of all, with the step it came after; the columns
        are those of gruppo.runs.tables.EVALUATIONS. Their figures are in `frame`."""
        return self._tables("evaluations", step)

    def events(self) -> pd.DataFrame:
        """What a person should know of: abstentions, resumes, warnings; a row each."""
        import pandas as pd

        with reading(self.path / "events.jsonl", _WHOLE):
            found = pd.DataFrame(read_lines(self.path / "events.jsonl"))
        return found if len(found) else pd.DataFrame(columns=["time", "step", "kind", "message"])

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
        frames = [read_table(paths[each]).to_pandas().assign(step=each) for each in chosen]
        whole = pd.concat(frames, ignore_index=True)
        return whole[["step", *(name for name in whole.columns if name != "step")]]


def load_result(path: str | Path) -> Result:
    """The result in a run folder, finished or not; the same as `Result.read`."""
    return Result.read(path)


def _known(steps: Iterable[int]) -> str:
    found = list(steps)
    return f"it has those of {', '.join(map(str, found))}" if found else "it has none yet"
