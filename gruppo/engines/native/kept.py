"""Keys and values that stay between calls of the engine, for requests that continue a completion.

A conversation is a prompt and the tokens that followed it. A request that begins with all tokens of a kept conversation
continues it: only its further tokens are computed. Which conversations are kept depends on the requests and on the
number of slots alone, never on time or on the memory that is free, so a run that is repeated computes the same numbers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

Pairs = Mapping[int, tuple[Tensor, Tensor]]  # keys and values [heads, tokens, D] by layer


@dataclass(frozen=True, eq=False)
class KeptPrompt:
    """A prompt with its keys and values. Conversations share it."""

    token_ids: tuple[int, ...]
    pairs: Pairs


@dataclass(frozen=True, eq=False)
class Conversation:
    """A prompt and the tokens that followed it, `own`, with the keys and values of both."""

    prompt: KeptPrompt
    own: tuple[int, ...]
    pairs: Pairs


class Conversations:
    """The conversations that are kept, by all of their tokens."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, ...], Conversation] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, conversation: Conversation, most: int) -> None:
        """Keep one more conversation, and drop the oldest if there are more than `most`."""
        token_ids = (*conversation.prompt.token_ids, *conversation.own)
        self._kept.pop(token_ids, None)
        self._kept[token_ids] = conversation
        while len(self._kept) > most:
            del self._kept[next(iter(self._kept))]

    def take(self, sequences: Sequence[tuple[int, ...]]) -> list[Conversation | None]:
        """For each sequence of token ids, the longest conversation that it continues by at least one token.

        Conversations that are continued are no longer kept.
        """
        kept = sorted(self._kept)
        found = [_longest_prefix(kept, token_ids) for token_ids in sequences]
        conversations = [None if key is None else self._kept[key] for key in found]
        for key in found:
            if key is not None:
                self._kept.pop(key, None)
        return conversations

    def clear(self) -> None:
        """Drop all conversations."""
        self._kept.clear()


def _longest_prefix(kept: Sequence[tuple[int, ...]], token_ids: tuple[int, ...]) -> tuple[int, ...] | None:
    """The longest of the sorted `kept` that `token_ids` begin with, and that is shorter; None if there is none."""
    wanted = token_ids[:-1]
    while place := bisect_right(kept, wanted):
        nearest = kept[place - 1]
        if wanted[: len(nearest)] == nearest:
            return nearest
        # Every prefix of `wanted` that is kept comes before `nearest`, and is a prefix of what both have in common.
        pairs = zip(nearest, wanted, strict=False)
        wanted = wanted[: next(place for place, (one, other) in enumerate(pairs) if one != other)]
    return None
