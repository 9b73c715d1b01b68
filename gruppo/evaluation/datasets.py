"""The training and evaluation rows of a recipe, with a grader for each evaluation set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gruppo.config.labels import options_name, split_label
from gruppo.config.recipe import Recipe
from gruppo.config.sections import Evaluation
from gruppo.data.benchmark_table import default_grader, domain
from gruppo.data.loading import Dataset, load_questions, load_training
from gruppo.data.references import alternatives, answer_text, likely_column, reference_of
from gruppo.errors import UsageError
from gruppo.rewards import REWARDS, RewardFunction, check_option_names, reward_path, split_prefix
from gruppo.rewards.grading.graders import COMPARISONS, Named, find_grader
from gruppo.rewards.grading.last_number import last_number
from gruppo.runs.folder import check_folder
from gruppo.runs.trackers import require_installed
from gruppo.types import Row
from gruppo.utils.paths import user_path
from gruppo.utils.progress import Progress


@dataclass(frozen=True)
class EvalSetRows:
    """The rows of one evaluation set.

    `name`: "" for the run's [evaluation], otherwise the name of one of its [[benchmarks]]. `parts`: several if the set
    consists of the held-out rows of mixed tasks. `graders`: by part name. `domain`: "in-domain" if the recipe trains on
    questions of the same kind, otherwise "out-of-domain"; None if it trains on nothing.
    """

    name: str
    settings: Evaluation
    parts: list[Dataset]
    graders: dict[str, Named]
    domain: str | None


@dataclass(frozen=True)
class Data:
    """The rows of a run: training rows by task, and evaluation sets. `completion_columns`: the names of what
    completions bring for rewards besides."""

    training: list[Dataset]
    eval_sets: list[EvalSetRows]
    completion_columns: tuple[str, ...] = ()

    @property
    def partial_columns(self) -> dict[str, str]:
        """Columns that some training rows have and others lack, with words that say how many and which."""
        total = sum(len(part.rows) for part in self.training)
        counts = Counter(name for part in self.training for row in part.rows for name in row)
        found = {}
        for name, count in counts.items():
            if count < total:
                places = ((part, place) for part in self.training for place in range(len(part.rows)))
                part, place = next((part, place) for part, place in places if name not in part.rows[place])
                found[name] = f"{count} of {total} rows have it, but not {part.name}, row {part.numbers[place] + 1}"
        return found

    @property
    def columns(self) -> list[str]:
        """The columns that rewards receive: those that every training row has, except the prompt, and those of
        completions."""
        shared = set.intersection(*(set(row) for part in self.training for row in part.rows)) - {"prompt"}
        return sorted({*shared, *self.completion_columns})


def preflight(
    recipe: Recipe,
    folder: Path,
    resume: bool,
    rewards: Sequence[str | RewardFunction],
    rows: Sequence[Row] | None,
    progress: Progress,
) -> Data:
    """Check folder, trackers, reward names, audit and data, and read the data. Raises UsageError."""
    check_folder(folder, recipe, resume)
    require_installed(recipe.run.trackers)
    if not (folder / "recipe.toml").is_file():  # a run that was started before this check existed can be resumed
        require_independent_audit(recipe, rewards)
    return read_data(recipe, rewards, rows, progress)


def require_independent_audit(recipe: Recipe, rewards: Sequence[str | RewardFunction]) -> None:
    """Raise UsageError if the audit is a function that the run is trained on, with the same options.

    An audit shows what a reward gets wrong only if it judges by other rules. A function of weight 0 is not trained on.
    """
    if recipe.audit is None:
        return
    weights = recipe.reward.weights or [1.0] * len(rewards)
    audit = _path(recipe.audit.function), recipe.audit.options
    for reward, weight in zip(rewards, weights, strict=False):
        if not isinstance(reward, str) or not weight:
            continue
        if (_path(reward), recipe.reward.options.get(options_name(reward), {})) == audit:
            raise UsageError(
                f'audit.function = "{recipe.audit.function}": is in reward.functions too, so it audits itself; write '
                "another function, e.g. a stricter grader, or leave [audit] out"
            )


def _path(reward: str) -> str:
    """The import path of a reward, with the whole path of its file."""
    _, reward = split_label(reward)
    path = REWARDS.get(reward, reward)
    location, _, name = path.rpartition(":")
    prefix, location = split_prefix(location)
    return f"{prefix}:{user_path(location).resolve()}:{name}" if location.endswith(".py") else path


def read_data(
    recipe: Recipe, rewards: Sequence[str | RewardFunction], rows: Sequence[Row] | None, progress: Progress
) -> Data:
    """Check reward names and data, and read the data. Raises UsageError."""
    if recipe.method.source == "dataset" and rewards:
        raise UsageError(f'reward = {rewards[0]!r}: method.source = "dataset" scores nothing; leave it out')
    names = [reward_path(reward) for reward in rewards if isinstance(reward, str)]
    check_option_names(rewards, recipe.reward.options)
    data = _read(recipe, rows, progress)
    for reward in rewards:
        wanted = _REFERENCES.get(reward_path(reward), ()) if isinstance(reward, str) else ()
        given = recipe.reward.options.get(options_name(reward), {}) if isinstance(reward, str) else {}
        if wanted and not set(wanted) & given.keys():
            _require_references(
                data.training, wanted, f"reward.functions = {recipe.reward.functions}", fields_of(recipe)
            )
    if REWARDS["last_number"] in names:
        _require_numbers(data)
    if REWARDS["reasoning_gym"] in names and not any(
        {"dataset", "parameters"} <= set(part.rows[0]) for part in data.training
    ):
        raise UsageError(
            'reward.functions = ["reasoning_gym"]: scores only rows of reasoning-gym, and no task has any; write e.g. '
            'task.name = "reasoning-gym/leg_counting", or another reward'
        )
    return data


# Columns that built-in rewards compare with.
_REFERENCES = {
    REWARDS["last_number"]: ("answer",),
    REWARDS["exact_match"]: ("answer",),
    REWARDS["choice"]: ("answer",),
    REWARDS["math_verify"]: ("answer", "solution"),
}


def _require_references(parts: Sequence[Dataset], names: Sequence[str], what: str, fields: Sequence[str]) -> None:
    """Raise UsageError unless every row has a reference in one of the columns `names`.

    `what`: the field that needs the references, with its value. `fields`: the task table of each part.
    """
    for part, field in zip(parts, fields, strict=True):
        if part.rows and not any(name in row for row in part.rows for name in names):
            raise UsageError(f"{what}: {_no_column(part, names, field)}")
        lacking = []
        for number, row in zip(part.numbers, part.rows, strict=True):
            try:
                if not reference_of(row, names)[1]:
                    lacking.append((number + 1, row))
            except UsageError as error:
                raise UsageError(f"{part.name}, row {number + 1}: {error}") from None
        if lacking:
            number, row = lacking[0]
            shown = [f"{name} = {row[name]!r}" for name in names if name in row] or [f"no column {' or '.join(names)}"]
            raise UsageError(
                f"{what}: {len(lacking)} of {len(part.rows)} rows of {part.name} have no answer to compare with (the "
                f"first: row {number}, {', '.join(shown)}); give each of them one, or leave these rows out"
            )


def _no_column(part: Dataset, names: Sequence[str], field: str) -> str:
    """Words for a part without a column of references, with the column that probably has them."""
    columns = dict.fromkeys(name for row in part.rows for name in row if name != "prompt")
    likely = likely_column(columns)
    fix = f'{field}.columns = {{{names[0]} = "{likely or "…"}"}}'
    return (
        f"{part.name} has no column {' or '.join(names)} with the answers to compare with (columns: "
        f"{', '.join(['prompt', *columns])}); " + (f"write {fix}" if likely else f"add it, or name one: {fix}")
    )


def _require_numbers(data: Data) -> None:
    """Raise UsageError if a training row has an answer that contains no number."""
    for part in data.training:
        for number, row in zip(part.numbers, part.rows, strict=True):
            wanted = alternatives(row.get("answer"))
            if wanted and all(last_number(answer_text(one)) is None for one in wanted):
                raise UsageError(
                    f"{part.name}, row {number + 1}: answer = {row['answer']!r} contains no number, which the reward "
                    '"last_number" compares with; write a number, or use "exact_match"'
                )


def _read(recipe: Recipe, rows: Sequence[Row] | None, progress: Progress) -> Data:
    settings = recipe.evaluation
    uses_held_out = settings is not None and settings.task is None
    fields = fields_of(recipe)
    training, held_out = [], []
    for task, field in zip(recipe.tasks, fields, strict=True):
        train, rest = load_training(task, field, uses_held_out, progress, rows, recipe.method.source == "dataset")
        training.append(train)
        held_out += [] if rest is None else [rest]
    eval_sets = []
    if settings is not None and uses_held_out:
        parts = _with_unique_names(held_out)
        names = [task.name if rows is None else "" for task in recipe.tasks]
        graders = {part.name: _grader(settings, name) for part, name in zip(parts, names, strict=True)}
        _require_gradable(parts, graders, settings, "evaluation.", fields)
        eval_sets = [EvalSetRows("", settings, parts, graders, "in-domain")]
    return Data(_with_unique_names(training), eval_sets + _sets_with_tasks(recipe, progress))


def fields_of(recipe: Recipe) -> list[str]:
    """The recipe's tables that the prompts come from, in the order of `recipe.tasks`."""
    return [f"mixture[{place}]" for place in range(len(recipe.mixture))] or ["task"]


def read_eval_sets(recipe: Recipe, progress: Progress) -> list[EvalSetRows]:
    """Read the evaluation sets of a recipe.

    Training rows are read only if the evaluation uses held-out rows. Raises UsageError.
    """
    if recipe.evaluation is not None and recipe.evaluation.task is None:
        return _read(recipe, None, progress).eval_sets
    return _sets_with_tasks(recipe, progress)


def _sets_with_tasks(recipe: Recipe, progress: Progress) -> list[EvalSetRows]:
    """The evaluation sets that name a task."""
    trains = bool("task" in recipe.model_fields_set or recipe.mixture or recipe.reward.functions)
    trained = [task.name for task in recipe.tasks] if trains else None  # an evaluation alone trains on nothing
    sources = [("", "evaluation.task", recipe.evaluation)] if recipe.evaluation and recipe.evaluation.task else []
    sources += [
        (benchmark.title, f"benchmarks[{place}].task", benchmark) for place, benchmark in enumerate(recipe.benchmarks)
    ]
    eval_sets = []
    for name, field, settings in sources:
        assert settings.task is not None
        part = load_questions(settings.task, field, progress)
        grader = _grader(settings, settings.task.name)
        _require_gradable([part], {part.name: grader}, settings, field.removesuffix("task"), [field])
        set_domain = None if trained is None else domain(settings.task.name, trained)
        eval_sets.append(EvalSetRows(name, settings, [part], {part.name: grader}, set_domain))
    return eval_sets


def _grader(settings: Evaluation, task: str) -> Named:
    """The grader for a task's answers. Raises UsageError if it is unknown."""
    name = settings.grader or default_grader(task)
    return Named(name, find_grader(name))


def _require_gradable(
    parts: Sequence[Dataset], graders: Mapping[str, Named], settings: Evaluation, table: str, fields: Sequence[str]
) -> None:
    """Raise UsageError if a built-in grader has no reference for one of the questions. `fields`: the parts' tasks."""
    for part, field in zip(parts, fields, strict=True):
        name = graders[part.name].name
        if name in COMPARISONS:
            asked = replace(part, rows=part.rows[: settings.questions], numbers=part.numbers[: settings.questions])
            _require_references([asked], COMPARISONS[name].names, f'{table}grader = "{name}"', [field])


def _with_unique_names(parts: Sequence[Dataset]) -> list[Dataset]:
    """The parts, renamed if necessary so that no two prompts have the same id."""
    names = [part.name for part in parts]
    return [
        part if (before := names[:place].count(part.name)) == 0 else replace(part, name=f"{part.name}#{before + 1}")
        for place, part in enumerate(parts)
    ]
