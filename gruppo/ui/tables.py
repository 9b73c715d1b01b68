"""What the pages about steps, groups, questions and evaluations show, from the index and the tables of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gruppo.errors import UsageError
from gruppo.runs.eval_metrics import Question, compare, figures
from gruppo.runs.reading import read_object
from gruppo.ui.answers import first_answers
from gruppo.ui.catalog import Card
from gruppo.ui.index import Index
from gruppo.ui.queries import KINDS_OF_CHANGE, Filters, Page

LIMIT = 50  # rows of a page
TEXTS = 20  # evaluations whose answers are shown on the page of a question
HELD_OUT = "held out"  # the words for the set without a name


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


def question_values(index: Index, card: Card, prompt_id: str) -> dict[str, Any]:
    """A prompt through the run, with the texts of its evaluation answers, of the last `TEXTS` evaluations."""
    question = index.question(prompt_id)
    if question is None:
        raise UsageError(f"prompt {prompt_id[:200]!r}: this run has not used it; choose one from the list of questions")
    moments: list[dict[str, Any]] = [{**draw, "kind": "step", "text": None} for draw in question.draws]
    for number, row in enumerate(reversed(question.evaluations)):
        answer = None
        if number < TEXTS:
            answer = first_answers(card.path, row["step"], row["eval_set"], [prompt_id]).get(prompt_id)
        moments.append({**row, "kind": "evaluation", "text": answer and answer["answer"]})
    moments.sort(key=lambda row: (row["step"], row["kind"] == "evaluation"))
    return {"question": question, "moments": moments}


def evaluations_values(index: Index, card: Card) -> dict[str, Any]:
    """All evaluations, with accuracy and its interval, by set and step, and curves over the number of answers."""
    domains = set_domains(card)
    rows = []
    for row in index.evaluations():
        found = figures(questions(index, row["step"], row["eval_set"]))
        low, high = found["interval"]
        rows.append({**row, "low": low, "high": high, "curves": found.get("curves", {}), "samples": found["samples"]})
    names = list(dict.fromkeys(row["eval_set"] for row in rows))
    sets = [
        {"name": name, "title": name or HELD_OUT, "domain": domains.get(name, ""),
         "rows": [row for row in rows if row["eval_set"] == name]}
        for name in names
    ]  # fmt: skip
    return {"sets": sets, "answer_curves": [chart for found in sets if (chart := answers_chart(found)) is not None]}


def answers_chart(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """pass@k, maj@k and best-of-k of a set, at its first and last evaluation, in the form of a chart; None if every
    question has one answer."""
    rows = [row for row in found["rows"] if row["curves"]]
    if not rows:
        return None
    curves = []
    for number, row in enumerate(rows[:1] if len(rows) == 1 else (rows[0], rows[-1])):
        for place, (name, points) in enumerate(row["curves"].items()):
            ks = [int(k) for k in points]
            interval = [[point["interval"][end] for point in points.values()] for end in (0, 1)]
            label = f"{ {'pass': 'pass@k', 'maj': 'maj@k', 'best': 'best of k'}[name] }, step {row['step']}"
            curves.append(
                {"name": name, "label": label, "run": str(number), "color": place,
                 "dash": 1 - number if rows[1:] else 0, "x": ks, "y": [point["value"] for point in points.values()], "size": 1,
                 "band": [{"x": ks, "y": end, "size": 1} for end in interval]}
            )  # fmt: skip
    return {"id": f"answers {found['name']}", "title": f"{found['title']}: accuracy by number of answers",
            "help": "With 95% intervals over questions.", "unit": "share", "kind": "lines", "open": True,
            "curves": curves}  # fmt: skip


def set_domains(card: Card) -> dict[str, str]:
    """The domain of each benchmark, "in-domain" or "out-of-domain", by its name; known once the run has ended."""
    try:
        benchmarks = read_object(card.path / "summary.json").get("benchmarks")
    except (UsageError, OSError):
        return {}
    found = benchmarks.items() if isinstance(benchmarks, dict) else ()
    return {name: str(values.get("domain", "")) for name, values in found if isinstance(values, dict)}


def questions(index: Index, step: int, eval_set: str) -> list[Question]:
    """The verdicts of one evaluation."""
    found = []
    for row in index.verdicts(step, eval_set):
        scores = None if None in row["scores"] else row["scores"]
        found.append(Question(row["prompt_id"], "", row["correct"], row["votes"], scores))
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


def paired(first: Sequence[Question], second: Sequence[Question]) -> Mapping[str, Any] | None:
    """The difference (second - first) paired by question, see `gruppo.runs.eval_metrics.compare`; None if they share no
    question."""
    try:
        return compare(first, second)
    except UsageError:
        return None
