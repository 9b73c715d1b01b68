"""The options of `gruppo eval` as recipes, and what it shows."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gruppo.config.loading import load_recipe
from gruppo.config.recipe import Recipe
from gruppo.config.sections import Benchmark
from gruppo.data.benchmark_table import BENCHMARKS
from gruppo.errors import UsageError
from gruppo.evaluation.formatting import told, told_difference
from gruppo.evaluation.plots import draw_curves
from gruppo.runs.atomic import publish, writing
from gruppo.runs.folder import EVALUATION
from gruppo.runs.reading import read_object
from gruppo.utils.signals import Interrupted, stop_on_signals

if TYPE_CHECKING:
    from gruppo.evaluation.results import EvalResult
    from gruppo.runs.console import ConsoleProgress

_ALL = 2**31


@dataclass(frozen=True)
class EvalArguments:
    """The options of `gruppo eval` that say what is asked, and how. `fields`: those of [evaluation]; `model`: those of
    [model] but its name."""

    recipe: Path | None = None
    tasks: Sequence[str] = ()
    data: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    temperature: float | None = None
    reward_model: str | None = None
    environment: str | None = None
    overrides: Sequence[str] = ()
    model: Mapping[str, Any] = field(default_factory=dict)

    def recipe_of(self, model: str) -> Recipe:
        """The recipe of an evaluation of a model: a table of [[benchmarks]] for each task; with a recipe and no task,
        its own exams. Raises UsageError."""
        base: dict[str, Any] = {} if self.recipe is None else load_recipe(self.recipe).as_mapping()
        exams = bool(base.get("evaluation") or base.get("benchmarks"))
        if self.tasks or not exams:
            base["evaluation"] = {"questions": _ALL, "task": "arithmetic", **base.get("evaluation", {})}
        base["model"] = {"name": model, **self.model}
        base.pop("reward_model", None)
        if self.reward_model is not None:
            base |= self._judge(self.reward_model)
        uses_tools = self.options.get("prompt") == "tool" and "environment" not in base
        if name := self.environment or ("python" if uses_tools else None):
            base["environment"] = {**base.get("environment", {}), "name": name}
        made = load_recipe(base, self.overrides).as_mapping()
        if self.recipe is None:
            del made["task"]  # the default of what is trained on, which nothing is
        own = made.pop("evaluation", None)
        if self.tasks:
            if self.data is not None and not any(name in BENCHMARKS for name in self.tasks):
                raise UsageError(f"--data {self.data}: {self.tasks[0]} is no benchmark; give its file as --task")
            made["benchmarks"] = [self._table(own or {}, self._task(name)) for name in self.tasks]
            return load_recipe(made)
        for name, value in (("--option", min(self.options, default=None)), ("--data", None if exams else self.data)):
            if value is not None:
                raise UsageError(f"{name} {value}: belongs to --task, which is missing; name the task too")
        if own is not None:
            made["evaluation"] = self._table(own, None)
        made["benchmarks"] = [self._table(each, None) for each in made["benchmarks"]]
        return load_recipe(made)

    def require_fitting(self, answers: Path | None, done: bool, out: Path | None, resume: bool) -> None:
        """Raise UsageError for options that would be ignored: beside answers from elsewhere, or where nothing but
        evaluations that are `done` is asked for."""
        if resume and out is None:
            raise UsageError("--resume: goes on with the folder that --out names; name it")
        sampled = {"--samples": "samples", "--questions": "questions", "--max-tokens": "max_tokens"}
        odd = [option for option, name in sampled.items() if name in self.fields]
        odd += ["--temperature"] if self.temperature is not None else []
        odd += ["--reward-model"] if self.reward_model is not None else []
        odd += ["--environment"] if self.environment is not None else []
        if answers is not None and odd:
            raise UsageError(f"{odd[0]}: says how a model answers, and --answers has its answers; leave it out")
        if answers is not None and len(self.tasks) > 1:
            raise UsageError(f"--task {self.tasks[1]}: a file of --answers answers one task; grade it once for each")
        if not done:
            return
        odd += ["--task"] if self.tasks else []
        odd += ["--recipe"] if self.recipe is not None else []
        odd += ["--grader"] if "grader" in self.fields else []
        odd += ["--out"] if out is not None else []
        if odd:
            raise UsageError(
                f"{odd[0]}: what is asked for is an evaluation that is done, which it cannot change; leave it out"
            )

    def _table(self, below: Mapping[str, Any], task: dict[str, Any] | None) -> dict[str, Any]:
        made = {**below, **self.fields}
        if task is not None:
            made |= {"task": task, "name": Benchmark.model_validate({"task": task}).title}
        elif self.data is not None and isinstance(held := made.get("task"), dict) and held["name"] in BENCHMARKS:
            made["task"] = {**held, "options": {**held.get("options", {}), "data": str(self.data)}}
        if self.temperature is not None:
            made["decoding"] = {**made.get("decoding", {}), "temperature": self.temperature}
        return made

    def _task(self, name: str) -> dict[str, Any]:
        data = {"data": str(self.data)} if self.data is not None and name in BENCHMARKS else {}
        return {"name": name, "options": {**data, **self.options}}

    def _judge(self, name: str) -> dict[str, Any]:
        """The tables of a recipe in which a reward model of its kind can stand."""
        from gruppo.models.reward_model import kind_of

        kind = kind_of(name)
        return {
            "reward_model": {"name": name, "kind": kind, "prompts": 0},
            "method": {"name": "grpo-process" if kind == "process" else "grpo"},
        }


def evaluate_command(
    asked: EvalArguments,
    model: str | None,
    other: str | None,
    answers: Path | None,
    out: Path | None,
    resume: bool,
    curves: Path | None,
    as_json: bool,
    progress: ConsoleProgress,
) -> None:
    """Evaluate, compare if there is an `other` model, and show what came out. Raises UsageError, and ends the process
    with 130 where a signal came."""
    names = [str(answers)] if model is None else [model, *([other] if other is not None else [])]
    done = [answers is None and _is_evaluation(name) for name in names]
    asked.require_fitting(answers, all(done), out, resume)
    folders = [out / part if out is not None and len(names) > 1 else out for part in ("first", "second")]
    recipes = [None if there else asked.recipe_of(name) for name, there in zip(names, done, strict=True)]
    from gruppo.evaluation.compare import compare_all, read_evaluation
    from gruppo.evaluation.eval_run import grade_file, measure

    made: list[EvalResult] = []
    try:
        with stop_on_signals(kills=True) as stop, stop.interruptible():
            for name, recipe, folder in zip(names, recipes, folders, strict=False):
                if recipe is None:
                    made.append(read_evaluation(Path(name)))
                elif answers is not None:
                    asks = bool(asked.tasks or asked.recipe)
                    made.append(grade_file(recipe, answers, asks, folder, resume, progress, stop))
                else:
                    made.append(measure(recipe, folder, resume, progress, stop))
    except Interrupted:
        if out is not None:
            sys.stderr.write(
                "Interrupted; what was answered before is kept. Go on with the same command and --resume\n"
            )
        raise
    compared = compare_all(*made) if len(made) > 1 else {}
    _show(made, compared, as_json, progress)
    if curves is not None:
        _draw(made, curves)


def _is_evaluation(name: str) -> bool:
    """Whether a name is a folder that `gruppo eval --out` wrote, and not a model."""
    marked = Path(name) / "folder.json"
    return marked.is_file() and read_object(marked).get("kind") == EVALUATION


def _labels(made: Sequence[EvalResult]) -> list[str]:
    """What models are called beside each other: by their folders, or their order, where they have one name."""
    names = [each.model for each in made]
    if len(set(names)) < len(names):
        names = [name if each.path is None else str(each.path) for name, each in zip(names, made, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{name} ({order})" for name, order in zip(names, ("first", "second"), strict=True)]
    return names


def _show(
    made: Sequence[EvalResult], compared: Mapping[str, Mapping[str, Any]], as_json: bool, progress: ConsoleProgress
) -> None:
    if as_json:
        content = {"evaluations": [each.as_dict() for each in made], "differences": compared}
        progress.result(json.dumps(content if len(made) > 1 else made[0].as_dict()))
        return
    labels = _labels(made) if len(made) > 1 else [""]
    for label, each in zip(labels, made, strict=True):
        if label:
            progress.result(label)
        for name, sheet in each.sheets.items():
            note = f", {sheet.figures['domain']}" if sheet.figures["domain"] else ""
            if sheet.figures.get("unanswered"):
                note += f"; {sheet.figures['unanswered']:,} questions are not answered and not counted"
            for line in told(name, sheet.figures, note):
                progress.result(line)
            shares = [("ends by itself", "finished_share"), ("has an answer", "answered_share")]
            shown = [f"{words} {sheet.figures[key]:.1%}" for words, key in shares if key in sheet.figures]
            odd = sheet.figures["ambiguous_share"]
            progress.result(f"  {', '.join(shown)}, rules of extraction disagree on {odd:.1%}")
        if each.path is not None:
            progress.result(f"  every sample: {each.path}/samples.parquet")
    for name, found in compared.items():
        for line in told_difference(name, labels[0], labels[-1], found):
            progress.result(line)


def _draw(made: Sequence[EvalResult], path: Path) -> None:
    """The curves of the first exam that all have."""
    name = next(name for name in made[0].sheets if all(name in each.sheets for each in made))
    labels = _labels(made) if len(made) > 1 else [made[0].model]
    sets = [(label, each.sheets[name].figures) for label, each in zip(labels, made, strict=True)]
    temporary = path.with_name(f".writing-{path.name}")
    with writing(path, temporary):
        draw_curves(sets, name, partial(_save, temporary, path.suffix.removeprefix(".")))
        publish(temporary, path)


def _save(path: Path, kind: str, figure: Any) -> None:
    figure.savefig(path, format=kind, metadata={"Date": None} if kind == "svg" else None)
