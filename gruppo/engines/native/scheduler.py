"""Which completion each slot works on, and how far it has come."""

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
    """A completion whose prompt is computed: `state` is the hidden state that its first token is sampled from."""

    request: int
    number: int
    stream: tuple[int, ...]
    limit: int
    place: int
    state: Tensor


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished completion. `text_end`: where a stop text begins, if one ended it."""

    tokens: list[int]
    logprobs: list[float]
    text_end: int | None


class Scheduler:
    """The slots, and the queues of what is to come.

    A slot whose completion is finished takes the next one of the queue. When the queue is empty the last slot moves
    into the gap, so that slots 0..live-1 are always those in use.
    """

    def __init__(self, requests: Sequence[Request], slots: int, params: SamplingParams, cache: KVCache) -> None:
        self.slots, self.params, self.cache, self.live = slots, params, cache, 0
        self.queue = deque(enumerate(requests))
        self.waiting: deque[Waiting] = deque()
        self.owner: list[tuple[int, int]] = [(0, 0)] * slots  # request, and number of the completion in it
        self.place = np.zeros(slots, dtype=np.int64)  # where its prompt is in the cache
        self.length = np.zeros(slots, dtype=np.int64)
        self.limit = np.zeros(slots, dtype=np.int64)
        self.tokens = np.zeros((slots, params.max_tokens), dtype=np.int64)
        self.logprobs = np.zeros((slots, params.max_tokens))
        self.uniforms = np.zeros((slots, params.max_tokens))
        self._unfinished = {index: len(request.streams) for index, request in enumerate(requests)}
        self._finished: dict[int, dict[int, Finished]] = {index: {} for index in self._unfinished}

    @property
    def free(self) -> int:
        """Slots that work on nothing."""
        return self.slots - self.live

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.queue or self.waiting or self.live)

    @property
    def can_admit(self) -> bool:
        """Whether a slot is free and something waits for it."""
        return bool(self.free and (self.queue or self.waiting))

    def next_prompts(self, most_tokens: int) -> list[tuple[int, Request, int]]:
        """Requests whose prompts are to be computed now, with a place in the cache for each: as many as free slots,
        free places and `most_tokens` allow."""
        chosen: list[tuple[int, Request, int]] = []
        places = deque(self.cache.free_places)
        room, tokens = self.free - len(self.waiting), 0
        while (
            self.queue
            and room > 0
            and places
            and (not chosen or tokens + len(self.queue[0][1].token_ids) <= most_tokens)
        ):
            index, request = self.queue.popleft()
            tokens, room = tokens + len(request.token_ids), room - len(request.streams)
            chosen.append((index, request, places.popleft()))
        return chosen

    def add(self, index: int, request: Request, place: int, state: Tensor) -> None:
        """The prompt of a request is computed: its completions wait for slots."""
        self.cache.prompt_lengths[place], self.cache.users[place] = len(request.token_ids), len(request.streams)
        most = self.params.max_tokens
        for number, stream in enumerate(request.streams):
            limit = most if request.limits is None else min(most, request.limits[number])
            self.waiting.append(Waiting(index, number, tuple(stream), limit, place, state))

    def seat(self) -> list[Tensor]:
        """Give the free slots behind the live ones to waiting completions; their states, slot by slot."""
        states = []
        while self.waiting and self.free:
            new, slot = self.waiting.popleft(), self.live
            self.owner[slot], self.place[slot], self.length[slot] = (new.request, new.number), new.place, 0
            self.limit[slot] = new.limit
            if self.params.temperature:
                generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(new.stream)))
                self.uniforms[slot] = generator.random(self.params.max_tokens)
            states.append(new.state)
            self.live += 1
        return states

    @property
    def positions(self) -> np.ndarray:
        """Of each live slot's last token."""
        return self.cache.prompt_lengths[self.place[: self.live]] + self.length[: self.live] - 1

    def append(self, slots: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """One more token for each of the slots."""
        position = self.length[slots]
        self.tokens[slots, position], self.logprobs[slots, position] = tokens, logprobs
        self.length[slots] += 1

    def retire(self, slot: int, text_end: int | None) -> None:
        """Keep what a slot has sampled, and move the last live slot into it."""
        length = int(self.length[slot])
        tokens, logprobs = self.tokens[slot, :length].tolist(), self.logprobs[slot, :length].tolist()
        request, number = self.owner[slot]
        self._finished[request][number] = Finished(tokens, logprobs, text_end)
        self._unfinished[request] -= 1
        self.cache.users[self.place[slot]] -= 1
        self.live -= 1
        last = self.live
        if slot == last:
            return
        self.owner[slot] = self.owner[last]
        for array in (self.place, self.length, self.limit, self.tokens, self.logprobs, self.uniforms):
            array[slot] = array[last]
        self.cache.move(last, slot, int(self.length[slot]))

    def take_finished(self) -> list[tuple[int, list[Finished]]]:
        """Requests all of whose completions have become finished since the last call."""
        done = [index for index, count in self._unfinished.items() if not count]
        groups = []
        for index in done:
            del self._unfinished[index]
            own = self._finished.pop(index)
            groups.append((index, [own[number] for number in range(len(own))]))
        return groups
