"""How well the models before training know the questions of a study's evaluations by heart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from gruppo.config.recipe import Recipe
from gruppo.data.loading import load_questions
from gruppo.data.tokenization import tokenize_rows
from gruppo.engines import check_engine
from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.memory import Free, Sampled, open_engine_within
from gruppo.errors import UsageError
from gruppo.evaluation.datasets import read_eval_sets
from gruppo.models.attention.backends import check_compute
from gruppo.models.loading import ModelSource, find_model, load_model
from gruppo.models.policy import LanguageModel
from gruppo.study.arms import Study
from gruppo.study.contamination import halves, recall, texts_of, words_of
from gruppo.study.evaluations import PlannedEvaluation, untrained_evaluation
from gruppo.study.record_files import read_facts, write_facts
from gruppo.utils.progress import Progress
from gruppo.utils.signals import Stop

FILE = "recall.json"
_EXTRA = 16  # tokens of a continuation, besides twice the number of tokens of the first half


def recall_left(study: Study) -> list[PlannedEvaluation]:
    """An evaluation of every model before training whose recall is to be measured, and is not measured yet."""
    known = read_facts(study.records / FILE)
    left = {key: planned for key, planned in _planned(study) if key not in known}
    return list(left.values())


def recall_of(study: Study) -> list[dict[str, Any]]:
    """What was found, one entry per evaluation and model: `evaluation`, `arms` that start from the model, and `found`,
    which is None if it is not measured yet: the recall of its `questions`, and of the `control` or None."""
    known = read_facts(study.records / FILE)
    entries: dict[str, dict[str, Any]] = {}
    for key, planned in _planned(study):
        new: dict[str, Any] = {"evaluation": planned.table.title, "arms": [], "found": known.get(key)}
        entries.setdefault(key, new)["arms"].append(planned.run.arm.name)
    return list(entries.values())


def measure_recall(study: Study, planned: PlannedEvaluation, progress: Progress, stop: Stop) -> None:
    """Measure the recall of an evaluation's questions by the model that it evaluates, and write it to FILE.

    The texts are given as they are, without a chat template, and continued with the most likely tokens. Raises
    UsageError if rows or the model cannot be read.
    """
    table, recipe = planned.table, planned.recipe
    (rows,) = read_eval_sets(recipe, progress)
    asked = {"questions": _usable(texts_of(rows.parts)[: table.questions], table.title, "recall = true")}
    if table.recall_control is not None:
        part = load_questions(table.recall_control, f"evaluations: {table.title}: recall_control", progress)
        asked["control"] = _usable(texts_of([part])[: table.questions], table.title, "recall_control")
    device, dtype = check_compute(recipe.model)
    check_engine(recipe, device, dtype)
    settings = recipe.model
    source = find_model(settings.name, progress, trust_remote_code=settings.trust_remote_code)
    free = Free.now(recipe.run.memory, device)
    policy = load_model(source, settings.device, settings.dtype, progress, settings.attention)

    def complete(texts: Sequence[str]) -> list[str]:
        with ExitStack() as stack:
            return _continued(texts, source, free, policy, recipe, table.title, stack, progress, stop)

    found = {name: dict(recall(texts, complete)) for name, texts in asked.items()}
    path = study.records / FILE
    write_facts(path, {**read_facts(path), _key(planned): {"control": None, **found}})


def _continued(
    texts: Sequence[str],
    source: ModelSource,
    free: Free,
    policy: LanguageModel,
    recipe: Recipe,
    title: str,
    stack: ExitStack,
    progress: Progress,
    stop: Stop,
) -> list[str]:
    """Greedy continuations of texts, each a little more than twice as long as its text, if the context allows it."""
    rows = [{"prompt": text} for text in texts]
    prompts = tokenize_rows(rows, source.tokenizer, source.context, _EXTRA, title, source.vocabulary)
    lengths = [len(prompt.token_ids) for prompt in prompts]
    limits = [min(2 * length + _EXTRA, source.context - length) for length in lengths]
    requests = [
        Request(prompt.token_ids, [(0, place)], [limit])
        for place, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    work = Sampled(len(requests), len(requests), max(lengths), max(limits), "greedy", f"text in {title}")
    engine, _ = open_engine_within(free, policy, recipe.engine, [work], stack, progress)
    with progress.bar(f"Recall of {title}", sum(limits), "tokens") as show:

        def advance(tokens: float) -> None:
            stop.check()
            show(tokens)

        answers = engine.generate(requests, SamplingParams(0.0, max(limits)), advance)
    return [completion.text for (completion,) in answers]


def _usable(texts: Sequence[str], title: str, field: str) -> list[str]:
    """The texts that have two halves. Raises UsageError if there is none."""
    usable = [text for text in texts if len(words_of(text)) > 1 and words_of(halves(text)[1])]
    if not usable:
        raise UsageError(f"evaluations: {title}: {field}: no question has two words, so none has two halves; remove it")
    return usable


def _planned(study: Study) -> list[tuple[str, PlannedEvaluation]]:
    """The evaluations whose recall counts, one per arm without a start, with a hash of what it depends on."""
    found = [
        untrained_evaluation(study, table, study.runs_of(arm.name)[0])
        for table in study.file.evaluations
        if table.recall
        for arm in study.file.arms
        if arm.start is None
    ]
    return [(_key(planned), planned) for planned in found]


def _key(planned: PlannedEvaluation) -> str:
    recipe, control = planned.recipe, planned.table.recall_control
    tables = [recipe.model, *recipe.tasks, *(entry.task for entry in recipe.benchmarks), recipe.engine, control]
    values = [None if table is None else table.model_dump(exclude_defaults=True) for table in tables]
    text = json.dumps([planned.table.questions, *values], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
