"""The file of a study: arms, seeds, budget, evaluations, questions and figures."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from gruppo.config.loading import wrong_value
from gruppo.config.sections import Benchmark, Section, Task
from gruppo.errors import UsageError, nearest
from gruppo.utils.crossed import Alternative

INITIAL = "initial"  # stands for the model before training, in questions and figures
BEFORE = "before training"  # the same, for readers
_RESERVED = (INITIAL, "evaluations", "records")
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60)]


class Table(BaseModel):
    """A table of a study's file."""

    model_config = Section.model_config


class Budget(Table):
    """What every run may spend; one of the three."""

    tokens: Annotated[int, Field(ge=1)] | None = None
    """Sampled tokens. A run stops after the step with which it reaches them. For method.source = "dataset", the tokens
    of the completions that it reads."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Steps, in place of run.steps."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes of training, with that of reward models and without evaluations. A run stops after the step with which it
    reaches them."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if len(self.given) != 1:
            raise ValueError("tokens, steps, minutes: write exactly one of them, e.g. budget = { steps = 100 }")
        return self

    @property
    def given(self) -> dict[str, float]:
        """The amounts that are set, by unit."""
        return self.model_dump(exclude_none=True)

    @property
    def unit(self) -> str:
        """Tokens, steps or minutes."""
        return next(iter(self.given))

    @property
    def amount(self) -> float:
        """How much of the unit."""
        return self.given[self.unit]

    def __str__(self) -> str:
        """The budget in words."""
        return f"{self.amount:,} sampled tokens" if self.unit == "tokens" else f"{self.amount:,} {self.unit}"


class Head(Table):
    """[study]: what is studied, where its runs are, and what all arms share."""

    name: Name
    """Begins the names of its runs."""
    title: str = ""
    """Title of the page. Default: the name."""
    text: str = ""
    """What the study is about, in Markdown: the first paragraphs of the page."""
    runs: str = ""
    """Folder of the runs, relative to the study's file. Default: runs/NAME."""
    records: str = ""
    """Folder of the records of runs and evaluations, relative to the study's file. Default: records in `runs`. Put it
    next to the file to commit it."""
    page: str = ""
    """The page that is written, relative to the study's file; figures go next to it. Default: study.md in `runs`."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=1)]
    """Values of run.seed. Every arm is trained with each of them."""
    budget: Budget
    """Of every run: { tokens = … }, { steps = … } or { minutes = … }. Arms can have their own."""
    chosen_on: str = ""
    """How settings that all arms share were chosen, if a search chose them: on which data, among which values."""
    conclusions: str = ""
    """What a reader may and may not conclude, in Markdown."""


class Arm(Table):
    """[[arms]]: a recipe to compare."""

    name: Name
    """Name of its folder and in questions and figures."""
    label: str = ""
    """Name on the page and in figures. Default: the name."""
    recipe: str | dict[str, Any] | None = None
    """In place of the study's [recipe]: a file, the name of a packaged recipe, or tables."""
    changes: dict[str, Any] = {}
    """Fields of the recipe with other values: { "method.name" = "rft" }."""
    start: str | None = None
    """The arm whose trained model this arm begins with, in place of model.name: the run with the same seed, or else
    with that arm's first seed."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] | None = None
    """In place of the study's seeds."""
    budget: Budget | None = None
    """In place of the study's budget."""
    chosen_on: str = ""
    """How its settings were chosen, if a search chose them."""

    @property
    def title(self) -> str:
        """Name for readers."""
        return self.label or self.name


class EvaluationSet(Benchmark):
    """[[evaluations]]: a set of questions that every trained model answers, and the model before training: the fields
    of [[benchmarks]] in a recipe."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Random seed of the answers; the same for all models."""
    recall: bool = False
    """Measure how much of its questions the model before training can continue from their first half."""
    recall_control: Task | None = None
    """Questions of the same kind that the model cannot have seen: a table like [task], or only its name. Recall is
    compared with theirs."""

    @field_validator("recall_control", mode="before", json_schema_input_type=Task | str)
    @classmethod
    def _control_by_name(cls, task: Any) -> Any:
        return {"name": task} if isinstance(task, str) else task

    @model_validator(mode="after")
    def _control_is_used(self) -> Self:
        if self.recall_control is not None and not self.recall:
            raise ValueError("recall_control: has no effect without recall = true; write it, or remove recall_control")
        return self

    @property
    def benchmark(self) -> dict[str, Any]:
        """What is set of the fields that [[benchmarks]] has too."""
        own = set(EvaluationSet.model_fields) - set(Benchmark.model_fields)
        return self.model_dump(exclude=own, exclude_none=True, exclude_unset=True)


class Question(Table):
    """[[questions]]: a question that the study answers, by a comparison of two arms."""

    id: Name
    """Short name."""
    text: str
    """The question in words."""
    metric: str
    """EVALUATION/accuracy, EVALUATION/maj@K or EVALUATION/pass@K."""
    arms: Annotated[list[str], Field(min_length=2, max_length=2)]
    """Two arms. The difference is the second minus the first. "initial" is the model before training."""
    alternative: Alternative = "two-sided"
    """The claim to test: the difference is not 0 ("two-sided"), above 0 ("greater") or below 0 ("less")."""


class FigureTable(Table):
    """[[figures]]: a figure of the page."""

    name: Name
    """Name of its files."""
    kind: Literal["curve", "bars", "samples"]
    """"curve": a metric during training, with its range over seeds. "bars": a metric of the trained models. "samples":
    pass@k and maj@k as functions of k."""
    title: str = ""
    """Title. Default: the metric."""
    metric: str = ""
    """For a curve a metric of metrics.jsonl; for bars a metric as in [[questions]]."""
    evaluation: str = ""
    """For samples: the evaluation."""
    by: Literal["tokens", "steps"] = "tokens"
    """What a curve is drawn over."""
    smooth: Annotated[int, Field(ge=1)] = 1
    """Points of a curve that are averaged."""
    arms: list[str] = []
    """The arms that are shown. Default: all."""


class StudyFile(Table):
    """The tables of a study's file."""

    study: Head
    recipe: str | dict[str, Any] | None = None
    """The recipe that arms share: a file, the name of a packaged recipe, or tables."""
    arms: Annotated[list[Arm], Field(min_length=1)]
    evaluations: list[EvaluationSet] = []
    questions: list[Question] = []
    figures: list[FigureTable] = []

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        _require_unique("arms", "name", [arm.name for arm in self.arms])
        _require_unique("evaluations", "name", [entry.title for entry in self.evaluations])
        _require_unique("questions", "id", [question.id for question in self.questions])
        _require_unique("figures", "name", [figure.name for figure in self.figures])
        for arm in self.arms:
            if arm.name in _RESERVED:
                raise ValueError(f'arms: name = "{arm.name}": is reserved; write another name')
            if arm.recipe is None and self.recipe is None:
                raise ValueError(f'arms: {arm.name} has no recipe; write recipe = "FILE", or [recipe] for all arms')
            _require_unique(f"arms: {arm.name}", "seeds", self.seeds_of(arm))
        for arm in self.arms:
            self._require_start(arm)
        for entry in self.evaluations:
            if entry.every:
                raise ValueError(
                    f"evaluations: {entry.title}: every = {entry.every}: a study evaluates before and after training; "
                    "for an evaluation in between, write [[benchmarks]] in the recipe"
                )
        for question in self.questions:
            self._require_arms(f"questions: {question.id}", question.arms)
            self.parsed(question.metric, f"questions: {question.id}")
        for figure in self.figures:
            self._require_arms(f"figures: {figure.name}", figure.arms)
            self._require_figure(figure)
        return self

    def _require_start(self, arm: Arm) -> None:
        if arm.start is None:
            return
        where, starts = f'arms: {arm.name}: start = "{arm.start}"', {one.name: one.start for one in self.arms}
        if arm.start not in starts:
            raise ValueError(f"{where}: is no arm{nearest(arm.start, starts.keys() - {arm.name})}")
        way: list[str] = []
        name: str | None = arm.name
        while name is not None and name not in way:
            way.append(name)
            name = starts.get(name)
        if name == arm.name:
            chain = " begins with ".join([*way, name])
            raise ValueError(f"{where}: {chain}, so none can be trained first; name another arm, or remove start")

    def _require_arms(self, where: str, names: Sequence[str]) -> None:
        known = [arm.name for arm in self.arms] + [INITIAL]
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f'{where}: arms: "{unknown[0]}" is no arm{nearest(unknown[0], known)}')
        _require_unique(where, "arms", names)

    def _require_figure(self, figure: FigureTable) -> None:
        where = f"figures: {figure.name}"
        if figure.kind == "samples":
            entry = self.evaluation(figure.evaluation, where)
            if entry.samples < 2:
                raise ValueError(f"{where}: {entry.title} has one answer per question; write samples = 2 or more")
        elif not figure.metric:
            raise ValueError(f'{where}: metric: missing; write e.g. metric = "reward/mean"')
        elif figure.kind == "bars":
            self.parsed(figure.metric, where)

    def evaluation(self, name: str, where: str = "evaluations") -> EvaluationSet:
        """The evaluation of this name. Raises ValueError if there is none."""
        known = {entry.title: entry for entry in self.evaluations}
        if name not in known:
            raise ValueError(f'{where}: "{name}" is no evaluation{nearest(name, known)}')
        return known[name]

    def parsed(self, metric: str, where: str = "metric") -> tuple[str, str, int]:
        """Evaluation, kind ("accuracy", "maj" or "pass") and k of a metric. Raises ValueError for another form."""
        name, _, what = metric.rpartition("/")
        kind, at, number = what.partition("@")
        is_curve = kind in ("maj", "pass") and at and number.isdecimal() and int(number) > 0
        if not name or not (what == "accuracy" or is_curve):
            raise ValueError(
                f'{where}: metric = "{metric}": must be EVALUATION/accuracy, EVALUATION/maj@K or EVALUATION/pass@K; '
                'write e.g. "gsm8k/accuracy"'
            )
        entry, k = self.evaluation(name, where), int(number or 1)
        if k > entry.samples:
            raise ValueError(f'{where}: metric = "{metric}": {name} has samples = {entry.samples}; write samples = {k}')
        return name, kind, k

    def seeds_of(self, arm: Arm) -> list[int]:
        """The seeds that an arm is trained with."""
        return self.study.seeds if arm.seeds is None else arm.seeds

    def budget_of(self, arm: Arm) -> Budget:
        """What a run of an arm may spend."""
        return arm.budget or self.study.budget

    def arm(self, name: str) -> Arm:
        """The arm of this name."""
        return next(arm for arm in self.arms if arm.name == name)

    def initial_title(self, arms: Sequence[str], untrained: str) -> str:
        """What "initial" is, for readers, beside these arms: the arm that another of them begins with, or else
        `untrained`."""
        starts = [arm.start for arm in self.arms if arm.name in arms and arm.start is not None]
        return self.arm(starts[0]).title if starts else untrained

    def shown_arms(self, figure: FigureTable) -> list[Arm]:
        """The arms in a figure."""
        return [arm for arm in self.arms if not figure.arms or arm.name in figure.arms]


def _require_unique(where: str, field: str, values: Sequence[Any]) -> None:
    if twice := [value for value, count in Counter(values).items() if count > 1]:
        raise ValueError(f"{where}: {field} = {twice[0]!r} is there twice; write it once")


def read_study(path: Path) -> StudyFile:
    """Read the file of a study. Raises UsageError with one line per mistake."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file; give the .toml file of a study") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read as TOML ({error}); fix it") from None
    try:
        return StudyFile.model_validate(content)
    except ValidationError as error:
        lines = dict.fromkeys(_mistakes(error))
        raise UsageError("; ".join(f"{path}: {line}" for line in lines)) from None


def _mistakes(error: ValidationError) -> Iterator[str]:
    for details in error.errors():
        path = [str(part) for part in details["loc"] if part not in ("dict[str,any]", "str")]
        place = ".".join(path)
        if details["type"] == "value_error":
            yield f"{place}: {details['ctx']['error']}".removeprefix(": ")
        elif details["type"] == "extra_forbidden":
            name = str(details["loc"][-1])
            yield f"{place}: unknown field{nearest(name, _fields(details['loc'][:-1]))}"
        elif details["type"] == "missing":
            yield f"{place}: missing; add it"
        else:
            yield wrong_value(place, path, details, StudyFile)


_TABLES: Mapping[str, type[BaseModel]] = {
    "study": Head, "arms": Arm, "evaluations": EvaluationSet, "questions": Question, "figures": FigureTable,
    "budget": Budget,
}  # fmt: skip


def _fields(place: Sequence[str | int]) -> list[str]:
    """The fields of the table at a place of the file."""
    names = [part for part in place if isinstance(part, str)]
    table = _TABLES.get(names[-1], StudyFile) if names else StudyFile
    return list(table.model_fields)
