"""The reward "reasoning_gym": the score of an answer by its dataset's own rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gruppo.data.reasoning_gym import import_datasets, score
from gruppo.rewards import text_of

import_datasets()  # takes seconds: here, so that the first call is not slow


def reasoning_gym(
    completions: Sequence[Any],
    question: Sequence[str] | None = None,
    answer: Sequence[str | None] | None = None,
    metadata: Sequence[Mapping[str, Any]] | None = None,
    dataset: Sequence[str] | None = None,
    parameters: Sequence[Mapping[str, Any]] | None = None,
    **_: Any,
) -> list[float | None]:
    """Score by the rules of the row's dataset, from 0 to 1 (a few datasets go below 0); None for rows of other tasks.

    See `gruppo.data.reasoning_gym.score`. All completions of a call share one row.
    """
    if question is None or answer is None or metadata is None or dataset is None or parameters is None:
        return [None] * len(completions)
    entry = {
        "question": question[0],
        "answer": answer[0],
        "metadata": metadata[0],
        "dataset": dataset[0],
        "parameters": parameters[0],
    }
    return [score(text_of(completion), entry) for completion in completions]
