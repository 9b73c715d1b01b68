"""Steps of a completion: where they end, in characters and in tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from operator import index
from typing import TYPE_CHECKING

from gruppo.errors import RunError, UsageError
from gruppo.types import Completion
from gruppo.utils.imports import import_attribute

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Callable[[str], Sequence[int]]


def lines(text: str) -> list[int]:
    """The end of each line that holds anything, without the white space behind it."""
    return [match.end() for match in re.finditer(r"[^\n]*\S", text)]


@cache
def find_split(name: str) -> Split:
    """The rule of that name or import path. Raises UsageError where it cannot be imported, or fails on a trial."""
    split: Split = lines if name == "lines" else import_attribute(name, "reward_model.split")
    try:
        checked_ends(split, "First.\nThen 2.")
    except RunError as error:
        raise UsageError(f"{error}; write def split(text) -> list of ends") from error
    return split


def checked_ends(split: Split, text: str) -> list[int]:
    """What the rule gives for a text; a blank one has no steps. Raises RunError unless it is whole numbers that rise,
    from 1 to the text's length."""
    if not text.strip():
        return []
    try:
        ends = [index(end) for end in split(text)]
    except Exception as error:  # the rule is the user's
        raise RunError(f"reward_model.split: fails ({type(error).__name__}: {error}) on {text[:60]!r}") from error
    if not all(0 < end <= len(text) for end in ends) or any(before >= after for before, after in pairwise(ends)):
        raise RunError(
            f"reward_model.split: gives {ends[:20]} for a text of {len(text)} characters, not ends that rise within it"
        )
    return ends


def step_tokens(
    completion: Completion, ends: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, int]]:
    """For each end of a step in the completion's text the token, counted from 0, that holds the step's last character,
    with that end. Where one token holds the ends of several steps they are one; an end behind all tokens is none."""
    ids, text = list(completion.token_ids), completion.text

    def written(count: int) -> int:
        """Characters of the text that the first `count` tokens hold whole."""
        made = str(tokenizer.decode(ids[:count], skip_special_tokens=True))
        while not text.startswith(made):
            made = made[:-1]  # a character that is not whole yet
        return len(made)

    found: dict[int, int] = {}
    low = 0
    for end in ends:
        high = len(ids)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if written(middle + 1) >= end else (middle + 1, high)
        if low < len(ids):
            found[low] = end
    return list(found.items())
