"""What the pages about steps, groups, questions and evaluations show, from the index and the tables of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gruppo.errors import UsageError
from gruppo.runs.eval_metrics import Question as Verdicts
from gruppo.runs.eval_metrics import compare, figures
from gruppo.runs.reading import read_object
from gruppo.ui.answers import best_completion, first_answers, reference
from gruppo.ui.catalog import Card, regular
from gruppo.ui.index import Index
from gruppo.ui.live import LiveRun
from gruppo.ui.queries import KINDS_OF_CHANGE, Filters, Page, Question

LIMIT = 50  # rows of a page
MOMENTS = 20  # rows on the page of a question, which reads a table for each
WORDS = {"pass": "pass@k", "maj": "maj@k", "best": "best of k"}
HELD_OUT = "Held-out questions"  # the words for the set without a name


@dataclass(frozen=True)
class View:
    """How a table is sorted and paged, and the address of the same table with other settings.

    `values`: further settings that stay in addresses, such as filters.
    """

    sort: str
    descending: bool
    offset: int
    base: Callable[..., str | None]
    values: Mapping[str, Any]
    limit: int = LIMIT
    total: int = 0

    def address(self, **changed: Any) -> str | None:
        """The same table with some settings changed; a change of the order begins at the first page."""
        order = "desc" if self.descending else "asc"
        return self.base(**{**self.values, "sort": self.sort, "order": order, **changed})

    def of(self, page: Page) -> View:
        """The same with the number of rows."""
        return replace(self, total=page.total)


def steps_values(index: Index, view: View) -> dict[str, Any]:
    """The table of steps."""
    page = index.steps(view.sort, view.descending, view.offset, view.limit)
    return {"counts": index.counts(), "rows": page.rows, "view": view.of(page), "problems": index.problems().rows}


def step_values(index: Index, step: int, view: View, filters: Filters) -> dict[str, Any]:
    """The groups of a step."""
    row = index.step(step)
    if row is None:
        problem = next((found["problem"] for found in index.problems().rows if found["step"] == step), "")
        raise UsageError(problem or f"step {step}: this run has recorded no completions of it; choose another step")
    page = index.groups(step, view.sort, view.descending, filters, view.offset, view.limit)
    return {"step": row, "rows": page.rows, "view": view.of(page), "filters": filters}


def questions_values(index: Index, search: str, view: View) -> dict[str, Any]:
    """The table of prompts."""
    page = index.questions(search, view.sort, view.descending, view.offset, view.limit)
    return {"rows": page.rows, "view": view.of(page), "search": search}


def question_values(index: Index, card: Card, prompt_id: str, view: View) -> dict[str, Any]:
    """A prompt through the run: the best completion of every step that sampled it, and the first answer of every
    evaluation that asked it."""
    question = index.question(prompt_id)
    if question is None:
        raise UsageError(f"prompt {prompt_id[:200]!r}: this run has not used it; choose one from the list of questions")
    moments = [{**draw, "kind": "step"} for draw in question.draws]
    moments += [{**row, "kind": "evaluation"} for row in question.evaluations]
    moments.sort(key=lambda row: (row["step"], row["kind"] == "evaluation"), reverse=view.descending)
    chosen = moments[view.offset : view.offset + view.limit]
    known: dict[str, Any] | None = None
    for row in chosen:
        if row["kind"] == "step":
            answer = best_completion(card.path, row["step"], row["group"])
            row["text"] = answer and answer["text"]
        else:
            answer = first_answers(card.path, row["step"], row["eval_set"], [prompt_id]).get(prompt_id)
            row["text"] = answer and answer["answer"]
        row["turn"] = _turn(question, row)
        known = known or answer
    return {"question": question, "moments": chosen, "view": replace(view, total=len(moments)),
            "reference": reference(known)}  # fmt: skip


def _turn(question: Question, row: Mapping[str, Any]) -> str:
    """Whether a row of the page of a question is its first right answer after wrong ones, or a regression; "" if it is
    neither."""
    if row["kind"] == "step":
        first, draw = question.first_right, question.draws[0]
        here = (row["step"], row["group"])
        is_first = first is not None and (first["step"], first["group"]) == here != (draw["step"], draw["group"])
        return "first right" if is_first else ""
    if any(after == row["step"] for _, after in question.regressions.get(row["eval_set"], ())):
        return "regression"
    return "first right" if question.first_right_evaluations.get(row["eval_set"]) == row["step"] else ""


def evaluations_values(index: Index, card: Card, live: LiveRun) -> dict[str, Any]:
    """All evaluations, by set and step, with accuracy and the interval that the run recorded. If questions have several
    answers, also curves over their number, for the first and the last evaluation of a set."""
    domains = set_domains(card)
    rows = [{**row, **_interval(live, row)} for row in index.evaluations()]
    names = list(dict.fromkeys(row["eval_set"] for row in rows))
    sets = [
        {"name": name, "title": name or HELD_OUT, "domain": domains.get(name, ""),
         "rows": [row for row in rows if row["eval_set"] == name]}
        for name in names
    ]  # fmt: skip
    return {"sets": sets, "answer_curves": [chart for found in sets if (chart := answers_chart(index, found))]}


def _interval(live: LiveRun, row: Mapping[str, Any]) -> dict[str, float | None]:
    """The recorded interval of an evaluation's accuracy; None where it was not recorded."""
    prefix = f"eval/{row['eval_set']}/accuracy" if row["eval_set"] else "eval/accuracy"
    return {end: live.at(f"{prefix}_{end}", row["step"]) for end in ("low", "high")}


def answers_chart(index: Index, found: Mapping[str, Any]) -> dict[str, Any] | None:
    """pass@k, maj@k and best-of-k of a set, at its last and its first evaluation, in the form of a chart; None if every
    question has one answer."""
    rows = [row for row in found["rows"] if row["answers"] > row["questions"]]
    curves = []
    for number, row in enumerate(rows[:-2:-1] + rows[: len(rows) - 1][:1]):
        by_name = figures(questions(index, row["step"], row["eval_set"])).get("curves", {})
        for place, (name, points) in enumerate(by_name.items()):
            ks = [int(k) for k in points]
            interval = [[point["interval"][end] for point in points.values()] for end in (0, 1)]
            label, values = f"{WORDS[name]}, step {row['step']}", [point["value"] for point in points.values()]
            curve = {"name": name, "label": label, "run": str(number), "color": place, "dash": number, "size": 1,
                     "x": ks, "y": values}  # fmt: skip
            if number == 0:
                curve["band"] = [{"x": ks, "y": end, "size": 1} for end in interval]
            curves.append(curve)
    if not curves:
        return None
    words = "Solid: the last evaluation, with 95% intervals over questions. Dashed: the first one."
    return {"id": f"answers {found['name']}", "title": f"{found['title']}: accuracy by number of answers",
            "help": words, "unit": "share", "kind": "lines", "open": True, "curves": curves}  # fmt: skip


def set_domains(card: Card) -> dict[str, str]:
    """The domain of each benchmark, "in-domain" or "out-of-domain", by its name; known once the run has ended."""
    path = card.path / "summary.json"
    try:
        benchmarks = read_object(path).get("benchmarks") if regular(path) else None
    except (UsageError, OSError):
        return {}
    found = benchmarks.items() if isinstance(benchmarks, dict) else ()
    return {name: str(values.get("domain", "")) for name, values in found if isinstance(values, dict)}


def questions(index: Index, step: int, eval_set: str) -> list[Verdicts]:
    """The verdicts of one evaluation."""
    found = []
    for row in index.verdicts(step, eval_set):
        scores = None if None in row["scores"] else row["scores"]
        found.append(Verdicts(row["prompt_id"], "", row["correct"], row["votes"], scores))
    return found


def evaluation_values(
    index: Index, step: int, before: int | None, eval_set: str, kind: str, view: View
) -> dict[str, Any]:
    """The questions of one evaluation beside those of an earlier one: fixed, broken, still wrong, still right."""
    evaluations = [row for row in index.evaluations() if row["eval_set"] == eval_set]
    steps = [row["step"] for row in evaluations]
    if step not in steps:
        raise UsageError(f"step {step}: there is no evaluation of {eval_set or HELD_OUT} after it; choose another")
    before = before if before is not None and before in steps else int(steps[0])
    counts, page = index.changes(before, step, eval_set, kind, view.offset, view.limit)
    return {
        "steps": steps, "step": step, "before": before, "eval_set": eval_set, "title": eval_set or HELD_OUT,
        "counts": counts, "kinds": KINDS_OF_CHANGE, "kind": kind, "rows": page.rows, "view": view.of(page),
        "test": paired(questions(index, before, eval_set), questions(index, step, eval_set)),
        "figures": {row["step"]: row for row in evaluations},
    }  # fmt: skip


def paired(first: Sequence[Verdicts], second: Sequence[Verdicts]) -> Mapping[str, Any] | None:
    """The difference (second - first) paired by question, see `gruppo.runs.eval_metrics.compare`; None if they share no
    question."""
    try:
        return compare(first, second)
    except UsageError:
        return None
