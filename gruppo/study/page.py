"""The page of a study, in Markdown. Equal results give equal pages: it has no dates and no durations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gruppo.study.arms import Study
from gruppo.study.contamination import NEAR, NGRAM
from gruppo.study.file import BEFORE, INITIAL
from gruppo.utils.paths import from_here


def page_of(study: Study, content: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    """The page. `content`: of study.json. `figures`: the path of every figure, relative to the page."""
    head = study.file.study
    sections = [
        [f"# {content['title']}"],
        [head.text.strip()] if head.text else [],
        _answers(study, content),
        _values(study, content),
        _figures(study, figures),
        _arms(study, content),
        _runs(content),
        _contamination(content),
        _recall(study, content),
        ["## What a reader may and may not conclude", "", head.conclusions.strip()] if head.conclusions else [],
        _again(study),
    ]
    return "\n\n".join("\n".join(section) for section in sections if section) + "\n"


def _answers(study: Study, content: Mapping[str, Any]) -> list[str]:
    if not content["questions"]:
        return []
    rows = [
        [
            f"**{found['id']}.** {found['text']}",
            f"{found['answer']}",
            f"`{found['metric']}`: {_title(study, found, 1)} minus {_title(study, found, 0)}",
            "" if found["difference"] is None else f"{100 * found['difference']:+.1f}",
            "" if found["interval"] is None else f"{_points(found['interval'])}",
            _p(found["p"]) + ("" if found["alternative"] == "two-sided" else f" ({found['alternative']})"),
            _p(found["p_holm"]),
            f"{len(found['seeds'])} × {found['questions']}",
        ]
        for found in content["questions"]
    ]
    names = ["question", "answer", "difference of", "points", "95% interval", "p", "p (Holm)", "seeds × questions"]
    return ["## Answers", "", *_table(names, rows), "", content["method"]]


def _title(study: Study, question: Mapping[str, Any], place: int) -> str:
    """The title of one of the arms of a question."""
    name = question["arms"][place]
    return study.file.initial_title(question["arms"], BEFORE) if name == INITIAL else study.file.arm(name).title


def _values(study: Study, content: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, found in content["evaluations"].items():
        for metric, values in found["metrics"].items():
            rows = []
            titles = {arm.name: arm.title for arm in study.file.arms}
            for model, value in values.items():
                title = titles.get(model) or model.replace(INITIAL, BEFORE, 1)
                seeds = ", ".join(f"{seed}: {mean:.1%}" for seed, mean in value["seeds"].items())
                interval = f"{value['interval'][0]:.1%} to {value['interval'][1]:.1%}"
                rows.append([title, f"{value['mean']:.1%}", interval, seeds, f"{value['questions']:,}"])
            if rows:
                samples = f", {found['samples']} answers per question" if found["samples"] > 1 else ""
                lines += ["", f"### {name}: {metric}{samples}", ""]
                lines += _table(["model", "mean", "95% interval", "by seed", "questions"], rows)
    note = (
        "Intervals are over seeds and questions; over questions alone for one seed, where they say nothing about "
        "other seeds, and for the model before training."
    )
    return ["## Trained models", "", note, *lines] if lines else []


def _figures(study: Study, figures: Mapping[str, str]) -> list[str]:
    shown = []
    for table in study.file.figures:
        title = table.title or table.metric or table.evaluation
        image, of = figures.get(table.name), table.metric or table.evaluation
        shown.append(f"![{title}]({image})" if image else f"*{title}:* no results for `{of}` yet.")
    return ["## Figures", "", "\n\n".join(shown)] if shown else []


def _arms(study: Study, content: Mapping[str, Any]) -> list[str]:
    shared = content["recipe"]
    base = f"`{shared}`" if isinstance(shared, str) else "the recipe in the study's file"
    has_starts = any(arm.start for arm in study.file.arms)
    has_budgets = any(arm.budget for arm in study.file.arms)
    rows = []
    for arm, table in zip(content["arms"], study.file.arms, strict=True):
        own = arm["recipe"]
        recipe = base if own is None else f"`{own}`" if isinstance(own, str) else "a recipe of its own"
        changes = "<br>".join(f"`{_cell(line)}`" for line in arm["changes"]) or "none"
        begins = [study.file.arm(table.start).title if table.start else "its recipe's model"] if has_starts else []
        budget = [str(study.file.budget_of(table))] if has_budgets else []
        seeds, chosen_on = _list(arm["seeds"]), arm["chosen_on"] or "not searched"
        rows.append([arm["label"], recipe, changes, *begins, *budget, seeds, chosen_on])
    end = ", unless the table has another" if has_budgets else ""
    lines = ["## Arms", "", f"Every run has a budget of {study.file.study.budget}{end}."]
    if content["chosen_on"]:
        lines.append(f"Settings of all arms were chosen on: {content['chosen_on']}")
    more = ["begins with"] * has_starts + ["budget"] * has_budgets
    return [*lines, "", *_table(["arm", "recipe", "changes", *more, "seeds", "settings chosen on"], rows)]


def _runs(content: Mapping[str, Any]) -> list[str]:
    """Everything that was started, also what failed or was left over."""
    rows = [
        [
            run["name"],
            run["state"],
            f"{run['steps']:,}",
            f"{run['tokens']:,}",
            f"{run['tokens'] + run['label_tokens']:,}",
            _list(run["warnings"]),
            _cell("; ".join(run["notes"])),
        ]
        for run in content["runs"]
    ]
    names = ["run", "state", "steps", "sampled tokens", "with labels", "warnings", "notes"]
    lines = ["## Runs", "", "All runs that were started or planned.", "", *_table(names, rows)]
    ended = [found for found in content["attempts"] if found["outcome"] not in ("done", "stopped")]
    if ended:
        lines += ["", "Attempts that did not end by themselves:", ""]
        words = {"started": "its process ended without a word"}
        lines += [
            f"- {found['name']}: {words.get(found['outcome'], found['outcome'])}"
            + (f" ({_cell(found['message'])})" if found["message"] else "")
            for found in ended
        ]
    return lines


def _contamination(content: Mapping[str, Any]) -> list[str]:
    if not content["contamination"]:
        return []
    rows = []
    for entry in content["contamination"]:
        found = entry["found"]
        numbers = ["not checked"] + [""] * 3
        if found is not None:
            numbers = [f"{found[name]:,}" for name in ("questions", "training", "exact", "near")]
        rows.append([entry["evaluation"], _list(entry["arms"]), *numbers])
    note = (
        "Questions of an evaluation that are also training questions: with the same words, or with at least "
        f"{NEAR:.0%} of their {NGRAM}-grams in one training question. This says nothing about the data of the model "
        "before training."
    )
    names = ["evaluation", "training data of", "questions", "training questions", "same", "near"]
    return ["## Contamination", "", note, "", *_table(names, rows)]


def _recall(study: Study, content: Mapping[str, Any]) -> list[str]:
    if not content["recall"]:
        return []
    rows = []
    for entry in content["recall"]:
        found = entry["found"] or {}
        table = study.file.evaluation(entry["evaluation"])
        for name, title in (("questions", table.title), ("control", f"control for {table.title}")):
            if name == "control" and table.recall_control is None:
                continue
            value = found.get(name)
            numbers = ["not measured", "", ""]
            if value is not None:
                numbers = [f"{value['questions']:,}", f"{value['exact']:.1%}", f"{value['words']:.1%}"]
            rows.append([title, _list(entry["arms"]), *numbers])
    note = (
        "How much of a question the model before training continues by itself from the first half, with the most "
        "likely tokens and without a chat template: the share of questions whose second half it writes word for word, "
        "and the share of the second half that it has up to the first word that differs. Ends of questions can be "
        "guessed, so a value alone says little. Compare it with that of the control, whose questions the model cannot "
        "have seen: if it is clearly higher, the questions were probably in the data of the model before training."
    )
    names = ["questions", "model before training of", "number", "word for word", "words up to a difference"]
    return ["## Recall", "", note, "", *_table(names, rows)]


def _again(study: Study) -> list[str]:
    path = from_here(study.path)
    name = path.name if path.is_absolute() else path.as_posix()  # the folders of this machine say nothing to others
    return ["## Again", "", f"    gruppo study {name}", "", "repeats the study, and uses what is done."]


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    return lines + [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]


def _cell(text: str) -> str:
    return " ".join(text.split())


def _list(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def _points(interval: Sequence[float]) -> str:
    return f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}"


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
