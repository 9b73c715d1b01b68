"""What `gruppo eval` was asked for: recipes of evaluations from its options, and what it shows."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gruppo.config import Benchmark, Recipe, load_recipe
from gruppo.disk import writing
from gruppo.errors import UsageError
from gruppo.figures import draw_curves, told, told_difference
from gruppo.interruption import Interrupted, stop_on_signals
from gruppo.runlog import publish
from gruppo.tasks.benchmarks import BENCHMARKS

if TYPE_CHECKING:
    from gruppo.console import ConsoleReporter
    from gruppo.measuring import Measured

_ALL = 2**31


@dataclass(frozen=True)
class Asking:
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
            made["benchmarks"] = [self._table(own or {}, self._task(name)) for name in self.tasks]
            return load_recipe(made)
        for name, value in (("--option", min(self.options, default=None)), ("--data", None if exams else self.data)):
            if value is not None:
                raise UsageError(f"{name} {value}: belongs to --task, which is missing; name the task too")
        if own is not None:
            made["evaluation"] = self._table(own, None)
        made["benchmarks"] = [self._table(each, None) for each in made["benchmarks"]]
        return load_recipe(made)

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
        if self.data is not None and name not in BENCHMARKS:
            raise UsageError(f"--data {self.data}: {name} is no benchmark; give its file as --task")
        data = {} if self.data is None else {"data": str(self.data)}
        return {"name": name, "options": {**data, **self.options}}

    def _judge(self, name: str) -> dict[str, Any]:
        """The tables of a recipe in which a reward model of its kind can stand."""
        from gruppo.reward_model import kind_of

        kind = kind_of(name)
        return {
            "reward_model": {"name": name, "kind": kind, "prompts": 0},
            "method": {"name": "grpo-process" if kind == "process" else "grpo"},
        }


def evaluate_as_asked(
    asked: Asking,
    model: str | None,
    other: str | None,
    answers: Path | None,
    out: Path | None,
    resume: bool,
    curves: Path | None,
    as_json: bool,
    reporter: ConsoleReporter,
) -> None:
    """Evaluate, compare if there is an `other` model, and show what came out. Raises UsageError, and ends the process
    with 130 where a signal came."""
    names = [str(answers)] if model is None else [model, *([other] if other is not None else [])]
    folders = [out / part if out is not None and len(names) > 1 else out for part in ("first", "second")]
    recipes = [None if _is_done(name) else asked.recipe_of(name) for name in names]
    from gruppo.measuring import compare_all, grade_file, measure, read_evaluation

    made: list[Measured] = []
    try:
        with stop_on_signals(kills=True) as stop, stop.anywhere():
            for name, recipe, folder in zip(names, recipes, folders, strict=False):
                if recipe is None:
                    made.append(read_evaluation(Path(name)))
                elif answers is not None:
                    asks = bool(asked.tasks or asked.recipe)
                    made.append(grade_file(recipe, answers, asks, folder, resume, reporter, stop))
                else:
                    made.append(measure(recipe, folder, resume, reporter, stop))
    except Interrupted:
        if out is not None:
            sys.stderr.write(
                "Interrupted; what was answered before is kept. Go on with the same command and --resume\n"
            )
        raise
    compared = compare_all(*made) if len(made) > 1 else {}
    if curves is not None:
        _draw(made, curves)
    _show(made, compared, as_json, reporter)


def _is_done(name: str) -> bool:
    """Whether a name is a folder of an evaluation, and not a model."""
    return (Path(name) / "results.json").is_file()


def _show(
    made: Sequence[Measured], compared: Mapping[str, Mapping[str, Any]], as_json: bool, reporter: ConsoleReporter
) -> None:
    if as_json:
        content = {"evaluations": [each.as_dict() for each in made], "differences": compared}
        reporter.result(json.dumps(content if len(made) > 1 else made[0].as_dict()))
        return
    for each in made:
        if len(made) > 1:
            reporter.result(each.model)
        for name, sheet in each.sheets.items():
            note = f", {sheet.domain}" if sheet.domain else ""
            for line in told(name, sheet.figures, note):
                reporter.result(line)
            shares = [("ends by itself", "ended_share"), ("has an answer", "answered_share")]
            shown = [f"{words} {sheet.figures[key]:.1%}" for words, key in shares if key in sheet.figures]
            odd = sheet.figures["disagreement_share"]
            reporter.result(f"  {', '.join(shown)}, rules of extraction disagree on {odd:.1%}")
        if each.path is not None:
            reporter.result(f"  every sample: {each.path}/samples.parquet")
    for name, found in compared.items():
        for line in told_difference(name, made[0].model, made[1].model, found):
            reporter.result(line)


def _draw(made: Sequence[Measured], path: Path) -> None:
    """The curves of the first exam that all have."""
    name = next(name for name in made[0].sheets if all(name in each.sheets for each in made))
    sets = {each.model: each.sheets[name].figures for each in made}
    temporary = path.with_name(f".writing-{path.name}")
    with writing(path, temporary):
        draw_curves(sets, name, partial(_save, temporary, path.suffix.removeprefix(".")))
        publish(temporary, path)


def _save(path: Path, kind: str, figure: Any) -> None:
    figure.savefig(path, format=kind, metadata={"Date": None} if kind == "svg" else None)
