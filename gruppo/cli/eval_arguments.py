"""`gruppo eval`: its options as recipes, and its output."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gruppo.cli.options import require_consent
from gruppo.config.loading import RecipeError, load_recipe
from gruppo.config.recipe import Recipe
from gruppo.config.sections import Benchmark
from gruppo.data.benchmark_table import BENCHMARKS
from gruppo.data.transform import INHERITED
from gruppo.errors import UsageError
from gruppo.evaluation.formatting import format_difference, format_results
from gruppo.evaluation.plots import draw_curves, save_figure
from gruppo.runs.folder import EVALUATION
from gruppo.runs.reading import read_object
from gruppo.runs.trust import evaluation_code
from gruppo.utils.signals import Interrupted, stop_on_signals

if TYPE_CHECKING:
    from gruppo.evaluation.results import EvalResult
    from gruppo.runs.console import ConsoleProgress

_ALL = 2**31


@dataclass(frozen=True)
class EvalArguments:
    """The options of `gruppo eval` that define the evaluation.

    `fields`: fields of [evaluation]; `model`: fields of [model] except its name; `options`: options of the tasks;
    `prompts`: their fields columns, template and system. `trust`: run code that the recipe names, even if it lies in a
    run folder from somebody else.
    """

    recipe: Path | None = None
    tasks: Sequence[str] = ()
    data: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    prompts: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    temperature: float | None = None
    reward_model: str | None = None
    environment: str | None = None
    overrides: Sequence[str] = ()
    model: Mapping[str, Any] = field(default_factory=dict)
    trust: bool = False

    def require_consent(self, recipe: Recipe) -> None:
        """Raise UsageError for code of a run folder from somebody else without consent. `recipe`: see `recipe_of`."""
        if self.recipe is None or not (self.recipe.resolve().parent / "environment.json").is_file():
            return
        folder = self.recipe.resolve().parent
        require_consent(self.recipe.parent, evaluation_code(folder, recipe), self.trust)

    def recipe_of(self, model: str) -> Recipe:
        """The recipe that evaluates a model: one [[benchmarks]] table per task.

        With --recipe and without --task, the evaluation sets of that recipe. Raises UsageError for invalid or
        contradictory options.
        """
        base: dict[str, Any] = {} if self.recipe is None else load_recipe(self.recipe).as_mapping()
        has_sets = bool(base.get("evaluation") or base.get("benchmarks"))
        if self.tasks or not has_sets:
            base["evaluation"] = {"questions": _ALL, "task": "arithmetic", **base.get("evaluation", {})}
        base["model"] = {"name": model, **self.model}
        base.pop("reward_model", None)
        if self.reward_model is not None:
            base |= self._reward_model_tables(self.reward_model)
        uses_tools = self.options.get("prompt") == "tool" and "environment" not in base
        if name := self.environment or ("python" if uses_tools else None):
            base["environment"] = {**base.get("environment", {}), "name": name}
        recipe = load_recipe(base, self.overrides).as_mapping()
        if self.recipe is None:
            del recipe["task"]  # the default training task; nothing is trained here
        evaluation = recipe.pop("evaluation", None)
        if self.tasks:
            if self.data is not None and not any(name in BENCHMARKS for name in self.tasks):
                raise UsageError(f"--data {self.data}: {self.tasks[0]} is not a benchmark; give its file as --task")
            recipe["benchmarks"] = [self._table(evaluation or {}, self._task(name)) for name in self.tasks]
            return load_recipe(recipe)
        ignored = [("--option", min(self.options, default=None)), ("--data", None if has_sets else self.data)]
        for name, value in [*ignored, *((f"--{name}", value) for name, value in self.prompts.items())]:
            if value is not None:
                raise UsageError(f"{name} {value}: needs --task, which is missing; name the task too")
        if evaluation is not None:
            recipe["evaluation"] = self._table(evaluation, None)
        recipe["benchmarks"] = [self._table(benchmark, None) for benchmark in recipe["benchmarks"]]
        result = load_recipe(recipe)
        sets = [*([result.evaluation] if result.evaluation else []), *result.benchmarks]
        if self.data is not None and not any(table.task and table.task.name in BENCHMARKS for table in sets):
            raise UsageError(
                f"--data {self.data}: no evaluation set of {self.recipe} is a benchmark, so nothing would be read from "
                "it; name the file as --task, or leave --data out"
            )
        return result

    def require_fitting(self, answers: Path | None, done: bool, out: Path | None, resume: bool) -> None:
        """Raise UsageError for options that would be ignored.

        `answers`: the file of --answers, if any. `done`: only finished evaluations are read, so nothing is evaluated.
        """
        if resume and out is None:
            raise UsageError("--resume: needs the folder to resume; name it with --out")
        sampled = {"--samples": "samples", "--questions": "questions", "--max-tokens": "max_tokens"}
        ignored = [option for option, name in sampled.items() if name in self.fields]
        ignored += ["--temperature"] if self.temperature is not None else []
        ignored += ["--reward-model"] if self.reward_model is not None else []
        ignored += ["--environment"] if self.environment is not None else []
        if answers is not None and ignored:
            raise UsageError(
                f"{ignored[0]}: controls how a model answers, but --answers reads the answers; leave it out"
            )
        if answers is not None and len(self.tasks) > 1:
            raise UsageError(f"--task {self.tasks[1]}: --answers grades one task; run it once per task")
        if not done:
            return
        ignored += ["--task"] if self.tasks else []
        ignored += ["--recipe"] if self.recipe is not None else []
        ignored += ["--grader"] if "grader" in self.fields else []
        ignored += ["--out"] if out is not None else []
        if ignored:
            raise UsageError(f"{ignored[0]}: cannot change an evaluation that is already finished; leave it out")

    def in_options(self, error: UsageError) -> UsageError:
        """The error in the words of the options. Fields that only a recipe file sets keep their names."""
        options = set(_OPTIONS)
        if self.recipe is not None:
            options = {f"--{name.replace('_', '-')}" for name in self.fields}
            options |= {"--temperature"} if self.temperature is not None else set()
            options |= {"--task", "--data", "--option", "--columns", "--template", "--system"} if self.tasks else set()
        lines = [re.sub(r"^recipe: ", "", line) for line in str(error).splitlines()]
        return RecipeError(*(_with_options(line, sorted(options, reverse=True)) for line in lines))

    def _table(self, base: Mapping[str, Any], task: dict[str, Any] | None) -> dict[str, Any]:
        """An evaluation table with the options of the command line, which take precedence over `base`."""
        table = {**base, **self.fields}
        if task is not None:
            table |= {"task": task, "name": Benchmark.model_validate({"task": task}).title}
        elif self.data is not None and isinstance(old := table.get("task"), dict) and old["name"] in BENCHMARKS:
            table["task"] = {**old, "options": {**old.get("options", {}), "data": str(self.data)}}
        if self.temperature is not None:
            table["decoding"] = {**table.get("decoding", {}), "temperature": self.temperature}
        return table

    def _task(self, name: str) -> dict[str, Any]:
        """The task table of a --task, with --data and the options of --option."""
        data = {"data": str(self.data)} if self.data is not None and name in BENCHMARKS else {}
        return {"name": name, "options": {**data, **self.options}, **self.prompts}

    def _reward_model_tables(self, name: str) -> dict[str, Any]:
        """The recipe tables that a reward model of this kind needs."""
        from gruppo.models.reward_model import kind_of

        kind = kind_of(name)
        return {
            "reward_model": {"name": name, "kind": kind, "prompts": 0},
            "method": {"name": "grpo-process" if kind == "process" else "grpo"},
        }


def evaluate_command(
    arguments: EvalArguments,
    model: str | None,
    other: str | None,
    answers: Path | None,
    out: Path | None,
    resume: bool,
    curves: Path | None,
    as_json: bool,
    progress: ConsoleProgress,
) -> None:
    """Evaluate, compare if an `other` model is given, and print the results.

    Raises UsageError for options that do not fit, and Interrupted (exit code 130) after a signal.
    """
    names = [str(answers)] if model is None else [model, *([other] if other is not None else [])]
    done = [answers is None and _is_evaluation(name) for name in names]
    arguments.require_fitting(answers, all(done), out, resume)
    folders = [out / part if out is not None and len(names) > 1 else out for part in ("first", "second")]
    try:
        recipes = [None if finished else arguments.recipe_of(name) for name, finished in zip(names, done, strict=True)]
    except UsageError as error:
        raise arguments.in_options(error) from error
    if evaluated := [recipe for recipe in recipes if recipe is not None]:
        arguments.require_consent(evaluated[0])  # the code of the others is the same
    from gruppo.evaluation.compare import compare_all, read_evaluation
    from gruppo.evaluation.eval_run import grade_file, run_evaluation

    results: list[EvalResult] = []
    try:
        with stop_on_signals(kills=True) as stop, stop.interruptible():
            if len(names) > 1 and evaluated:
                _require_models(evaluated, progress)
            for name, recipe, folder in zip(names, recipes, folders, strict=False):
                if recipe is None:
                    results.append(read_evaluation(Path(name)))
                elif answers is not None:
                    has_task = bool(arguments.tasks or arguments.recipe)
                    results.append(grade_file(recipe, answers, has_task, folder, resume, progress, stop))
                else:
                    results.append(run_evaluation(recipe, folder, resume, progress, stop))
    except UsageError as error:
        raise arguments.in_options(error) from error
    except Interrupted:
        if out is not None:
            sys.stderr.write("Interrupted; the answers so far are kept. Resume with the same command and --resume\n")
        raise
    compared = compare_all(*results) if len(results) > 1 else {}
    _show(results, compared, as_json, progress)
    if curves is not None:
        _draw(results, curves)


# A table of an evaluation, the value of a field, and the fields that options set.
_TABLE = r"(?<![\w./-])(?:benchmarks\[\d+\]|evaluation)\."
_VALUE = r""" = (?:"([^"]*)"|'([^']*)'|([^\s:;,{]+))"""
_OPTIONS = {
    "--questions": _TABLE + "questions",
    "--samples": _TABLE + "samples",
    "--max-tokens": _TABLE + "max_tokens",
    "--grader": _TABLE + "grader",
    "--temperature": _TABLE + r"decoding\.temperature",
    "--data": _TABLE + r"task\.options\.data",
    "--task": _TABLE + r"task\.name",
    "--template": _TABLE + r"task\.template",
    "--system": _TABLE + r"task\.system",
    "--columns": _TABLE + r"task\.columns",
    "--option": _TABLE + r"task\.options(?: = \{[^}]*\})?(?!\.)",
    "--device": r"(?<![\w./-])model\.device",
    "--dtype": r"(?<![\w./-])model\.dtype",
    "--environment": r"(?<![\w./-])environment\.name",
    "--reward-model": r"(?<![\w./-])reward_model\.name",
}


def _with_options(message: str, options: Collection[str]) -> str:
    """A message about fields of a recipe, in the words of the options that set them, as far as these are in `options`.

    A model is named by the argument.
    """
    message = re.sub(r"(?<![\w./-])model\.name" + _VALUE, lambda found: f"model {_written(found)}", message)
    if "--temperature" in options:
        message = re.sub(r"a temperature in \[[\w\[\]]+\.decoding\]", "--temperature", message)
    if "--columns" in options:
        message = re.sub(_TABLE + r'task\.columns = \{(\w+) = "([^"]+)"\}', r"--columns \1=\2", message)
        message = message.replace(INHERITED, "")
    if "--option" in options:
        named = _TABLE + r"task\.options\.(?!data\b)(\w+)" + _VALUE
        message = re.sub(named, lambda found: f"--option {found[1]}={_written(found)}", message)
    message = re.sub(r"lower max_tokens, or write \S+\.overlong = \"filter\" to leave such rows out", _SHORTER, message)
    for option in options:
        field = option.removeprefix("--").replace("-", "_")
        message = re.sub(_OPTIONS[option] + r"(?![\w.])", option, message)
        message = re.sub(rf"\b(write e\.g\.|write|or) {field}(?= = )", rf"\1 {option}", message)
    return re.sub(rf"(--[a-z-]+){_VALUE}", lambda found: f"{found[1]} {_written(found)}", message)


_SHORTER = "or lower --max-tokens"


def _written(found: re.Match[str]) -> str:
    """The value of a field as on a command line."""
    return shlex.quote(next(value for value in found.groups()[-3:] if value is not None))


def _require_models(recipes: Sequence[Recipe], progress: ConsoleProgress) -> None:
    """Raise UsageError if the rows cannot be read or one of the models does not exist, before the first one answers."""
    from gruppo.evaluation.datasets import read_eval_sets
    from gruppo.models.loading import find_model

    read_eval_sets(recipes[0], progress)  # those of the others are the same
    for recipe in recipes:
        find_model(recipe.model.name, progress, trust_remote_code=recipe.model.trust_remote_code)


def _is_evaluation(name: str) -> bool:
    """Whether the name is a folder written by `gruppo eval --out` rather than a model."""
    marker = Path(name) / "folder.json"
    return marker.is_file() and read_object(marker).get("kind") == EVALUATION


def _labels(results: Sequence[EvalResult]) -> list[str]:
    """Labels of the compared models: their names; if these are equal, their folders; if needed, also their order."""
    names = [result.model for result in results]
    if len(set(names)) < len(names):
        names = [name if result.path is None else str(result.path) for name, result in zip(names, results, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{name} ({order})" for name, order in zip(names, ("first", "second"), strict=True)]
    return names


def _show(
    results: Sequence[EvalResult], compared: Mapping[str, Mapping[str, Any]], as_json: bool, progress: ConsoleProgress
) -> None:
    if as_json:
        content = {"evaluations": [result.as_dict() for result in results], "differences": compared}
        progress.result(json.dumps(content if len(results) > 1 else results[0].as_dict()))
        return
    labels = _labels(results) if len(results) > 1 else [""]
    for label, result in zip(labels, results, strict=True):
        if label:
            progress.result(label)
        for name, eval_set in result.sets.items():
            figures = eval_set.figures
            note = f", {figures['domain']}" if figures["domain"] else ""
            if figures.get("unanswered"):
                note += f"; {figures['unanswered']:,} questions have no answer and are not counted"
            for line in format_results(name, figures, note):
                progress.result(line)
            shares = [("finished (EOS)", "finished_share"), ("has an answer", "answered_share")]
            shown = [f"{words} {figures[key]:.1%}" for words, key in shares if key in figures]
            shown.append(f"ambiguous answer extraction {figures['ambiguous_share']:.1%}")
            progress.result(f"  {', '.join(shown)}")
        if result.path is not None:
            progress.result(f"  all samples: {result.path}/samples.parquet")
    for name, comparison in compared.items():
        for line in format_difference(name, labels[0], labels[-1], comparison):
            progress.result(line)


def _draw(results: Sequence[EvalResult], path: Path) -> None:
    """Plot the curves of the first evaluation set that all results have."""
    name = next(name for name in results[0].sets if all(name in result.sets for result in results))
    labels = _labels(results) if len(results) > 1 else [results[0].model]
    sets = [(label, result.sets[name].figures) for label, result in zip(labels, results, strict=True)]
    save_figure(draw_curves(sets, name), path)
