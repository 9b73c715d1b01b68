"""Scheduling of completions onto slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.native.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class Waiting:
    """A completion whose prompt is computed and that waits for a slot.

    `number`: its index within the request. `limit`: its maximum number of tokens. `entry`: the prompt's entry in
    the cache. `state`: the hidden state that its first token is sampled from.
    """

    request: int
    number: int
    stream: tuple[int, ...]
    limit: int
    entry: int
    state: Tensor


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished completion. `text_end`: where a stop string ended its text, if one did."""

    tokens: list[int]
    logprobs: list[float]
    text_end: int | None


class Scheduler:
    """The slots, and the queues of requests and completions that wait for them.

    A completion keeps its slot. The rows of a decoding step are the live slots, in the order of `active`. A finished
    completion is replaced by the next one of the queue. When the queue is empty, the last row moves into the gap; where
    the cache has one page per slot, so does its page, so that rows 0, 1, … are pages 0, 1, ….

    `sampled` counts the tokens of a slot that are sampled, `length` those of them that the host has read.
    """

    def __init__(self, requests: Sequence[Request], slots: int, params: SamplingParams, cache: KVCache) -> None:
        self.slots, self.params, self.cache, self.live = slots, params, cache, 0
        self.queue = deque((index, request) for index, request in enumerate(requests) if request.streams)
        self.waiting: deque[Waiting] = deque()
        self.rows = np.arange(slots)  # the first `live` are those of the live slots, the others are free
        self.owner: list[tuple[int, int]] = [(0, 0)] * slots  # (request, index of the completion in it)
        self.entry = np.zeros(slots, dtype=np.int64)  # entry of its prompt in the cache
        self.sampled = np.zeros(slots, dtype=np.int64)
        self.length = np.zeros(slots, dtype=np.int64)
        self.limit = np.zeros(slots, dtype=np.int64)
        self.tokens = np.zeros((slots, params.max_tokens), dtype=np.int64)
        self.logprobs = np.zeros((slots, params.max_tokens))
        self._unfinished = {index: len(request.streams) for index, request in enumerate(requests)}
        self._finished: dict[int, dict[int, Finished]] = {index: {} for index in self._unfinished}

    @property
    def active(self) -> np.ndarray:
        """The live slots, row by row."""
        return self.rows[: self.live]

    @property
    def free(self) -> int:
        """Number of slots that are not in use."""
        return self.slots - self.live

    @property
    def busy(self) -> bool:
        """Whether any completion is unfinished."""
        return bool(self.queue or self.waiting or self.live)

    @property
    def can_admit(self) -> bool:
        """Whether a slot is free and a request or completion waits for it."""
        return bool(self.free and (self.queue or self.waiting))

    def next_prompts(self, most_tokens: int) -> list[tuple[int, Request, int]]:
        """Take the requests to prefill now from the queue, each with its index and a free prompt entry of the cache.

        Takes as many as free slots, free entries and `most_tokens` prompt tokens allow. The first one may be longer.
        """
        chosen: list[tuple[int, Request, int]] = []
        entries = deque(self.cache.free_entries)
        room, tokens = self.free - len(self.waiting), 0
        while (
            self.queue
            and room > 0
            and entries
            and (not chosen or tokens + len(self.queue[0][1].token_ids) <= most_tokens)
        ):
            index, request = self.queue.popleft()
            tokens, room = tokens + len(request.token_ids), room - len(request.streams)
            chosen.append((index, request, entries.popleft()))
        return chosen

    def add(self, index: int, request: Request, entry: int, state: Tensor) -> None:
        """Queue the completions of a request whose prompt is computed."""
        self.cache.prompt_lengths[entry], self.cache.users[entry] = len(request.token_ids), len(request.streams)
        for number, stream in enumerate(request.streams):
            limit = request.limit(number, self.params)
            self.waiting.append(Waiting(index, number, tuple(stream), limit, entry, state))

    def fill_slots(self) -> list[Waiting]:
        """Assign waiting completions to the free slots, which become the last rows. Returns them, row by row."""
        filled = []
        while self.waiting and self.free:
            new, slot = self.waiting.popleft(), int(self.rows[self.live])
            self.owner[slot], self.entry[slot], self.limit[slot] = (new.request, new.number), new.entry, new.limit
            self.sampled[slot] = self.length[slot] = 0
            filled.append(new)
            self.live += 1
        return filled

    def append(self, slots: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Append one token to each of the slots."""
        position = self.length[slots]
        self.tokens[slots, position], self.logprobs[slots, position] = tokens, logprobs
        self.length[slots] += 1

    def retire(self, slot: int, text_end: int | None) -> None:
        """Record the completion of a slot as finished, and move the last row into its place."""
        length = int(self.length[slot])
        tokens, logprobs = self.tokens[slot, :length].tolist(), self.logprobs[slot, :length].tolist()
        request, number = self.owner[slot]
        self._finished[request][number] = Finished(tokens, logprobs, text_end)
        self._unfinished[request] -= 1
        self.cache.leave_prompt(int(self.entry[slot]))
        self.cache.completions.release(slot)
        self.live -= 1
        row, last = int(np.flatnonzero(self.rows == slot)[0]), int(self.rows[self.live])
        self.rows[row], self.rows[self.live] = last, slot
        if self.cache.whole and row != self.live and self.sampled[last] > 1:  # the last token is not in the cache yet
            self.cache.completions.fill_gap(last, row, int(self.sampled[last]) - 1)

    def take_finished(self) -> list[tuple[int, list[Finished]]]:
        """The requests whose last completion finished since the previous call, with their completions in order."""
        done = [index for index, count in self._unfinished.items() if not count]
        groups = []
        for index in done:
            del self._unfinished[index]
            completions = self._finished.pop(index)
            groups.append((index, [completions[number] for number in range(len(completions))]))
        return groups
