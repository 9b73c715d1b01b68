"""Steps of a completion: where they end, in characters and tokens."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, pairwise
from operator import index
from typing import TYPE_CHECKING

from gruppo.errors import RunError, UsageError
from gruppo.types import Completion
from gruppo.utils.imports import import_attribute
from gruppo.utils.token_text import TokenTexts, shared_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Callable[[str], Sequence[int]]


def lines(text: str) -> list[int]:
    """End of every non-blank line, as a character index, without trailing white space."""
    return [match.end() for match in re.finditer(r"[^\n]*\S", text)]


@cache
def find_split(name: str) -> Split:
    """Return the splitting rule with this name or import path.

    Raises UsageError if it cannot be imported or fails on a sample text.
    """
    split: Split = lines if name == "lines" else import_attribute(name, "reward_model.split")
    try:
        checked_ends(split, "First.\nThen 2.")
    except RunError as error:
        raise UsageError(f"{error}; write def split(text) -> list of ends") from error
    return split


def checked_ends(split: Split, text: str) -> list[int]:
    """Step ends of a text by the rule `split`, as character indices; [] for a blank text.

    Raises RunError if the rule fails, or unless its ends are whole numbers that strictly increase, from 1 to the
    length of the text.
    """
    if not text.strip():
        return []
    try:
        ends = [index(end) for end in split(text)]
    except Exception as error:  # user code
        raise RunError(f"reward_model.split: fails ({type(error).__name__}: {error}) on {text[:60]!r}") from error
    if not all(0 < end <= len(text) for end in ends) or any(before >= after for before, after in pairwise(ends)):
        raise RunError(
            f"reward_model.split: returns {ends[:20]} for a text of {len(text)} characters; ends must "
            f"strictly increase, from 1 to {len(text)}"
        )
    return ends


def step_tokens(
    completion: Completion, ends: Sequence[int], tokenizer: PreTrainedTokenizerBase, before: Sequence[int]
) -> list[tuple[int, int]]:
    """Map step ends in a completion's text to tokens. `before`: the tokens of its prompt.

    Returns pairs (index of the token that holds the step's last character, end); tokens count from 0, ends are
    character indices in ascending order. Steps that end in the same token are merged into one, which keeps the last
    end. Ends beyond the last token are dropped.
    """
    pieces = TokenTexts(tokenizer).of(completion.token_ids, before)
    same = shared_length("".join(pieces), completion.text)
    written = [min(end, same) for end in accumulate(map(len, pieces))]  # characters of the text after each token
    end_of_token: dict[int, int] = {}
    for end in ends:
        token = bisect_left(written, end)
        if token < len(written):
            end_of_token[token] = end
    return list(end_of_token.items())
