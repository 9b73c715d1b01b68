"""Scheduling of completions onto slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.native.kept import Conversation
from gruppo.engines.native.kv_cache import KVCache


@dataclass(slots=True)
class Job:
    """A request of a call, number `index`.

    `prompt`: the tokens that it shares with other requests, in an entry of the cache. `own`: the tokens between them
    and a completion, in the pages of each completion. `kept`: the conversation that it continues, until the last of
    its completions has a slot. `known`: how many of the own tokens are in that conversation.
    """

    index: int
    request: Request
    prompt: tuple[int, ...]
    own: tuple[int, ...]
    kept: Conversation | None
    known: int

    @classmethod
    def of(cls, index: int, request: Request, kept: Conversation | None) -> Job:
        """The job of a request that continues `kept`, or nothing."""
        token_ids = request.token_ids
        shared = len(token_ids) if request.shared is None else request.shared
        if kept is None:
            return cls(index, request, token_ids[:shared], token_ids[shared:], None, 0)
        prompt = kept.prompt.token_ids
        return cls(index, request, prompt, token_ids[len(prompt) :], kept, len(kept.own))


@dataclass(frozen=True, slots=True)
class Waiting:
    """A completion whose prompt is computed and that waits for a slot.

    `number`: its index within the request. `limit`: its maximum number of tokens. `entry`: the prompt's entry in
    the cache. `state`: the hidden state that its first token is sampled from; None if that is not the prompt's last.
    """

    job: Job
    number: int
    stream: tuple[int, ...]
    limit: int
    entry: int
    state: Tensor | None


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished completion. `text_end`: where a stop string ended its text, if one did."""

    tokens: list[int]
    logprobs: list[float]
    text_end: int | None


class Scheduler:
    """The slots, and the queues of requests and completions that wait for them.

    A completion keeps its slot. The rows of a decoding step are the live slots, in the order of `active`. A finished
    completion leaves a gap, which the next one of the queue takes. When the queue is empty, the last row moves into
    it; where the cache has one page per slot, so does its page, so that rows 0, 1, … are pages 0, 1, ….

    `sampled` counts the tokens of a slot that are sampled, `length` those of them that the host has read, and `before`
    the own tokens of its request, which precede them in its pages.
    """

    def __init__(self, jobs: Sequence[Job], slots: int, params: SamplingParams, cache: KVCache) -> None:
        self.slots, self.params, self.cache, self.live = slots, params, cache, 0
        self.queue = deque(job for job in jobs if job.request.streams)
        self.waiting: deque[Waiting] = deque()
        self.rows = np.arange(slots)  # first those of the live slots, with gaps between them; the others are free
        self.gaps: list[int] = []  # rows
        self.owner: list[tuple[int, int]] = [(0, 0)] * slots  # (request, index of the completion in it)
        self.entry = np.zeros(slots, dtype=np.int64)  # entry of its prompt in the cache
        self.before = np.zeros(slots, dtype=np.int64)
        self.sampled = np.zeros(slots, dtype=np.int64)
        self.length = np.zeros(slots, dtype=np.int64)
        self.limit = np.zeros(slots, dtype=np.int64)
        self.tokens = np.zeros((slots, params.max_tokens), dtype=np.int64)
        self.logprobs = np.zeros((slots, params.max_tokens))
        self._entries: dict[tuple[int, ...], int] = {}  # that have these prompts, for requests with own tokens
        self._unfinished = {job.index: len(job.request.streams) for job in jobs}
        self._finished: dict[int, dict[int, Finished]] = {index: {} for index in self._unfinished}

    @property
    def active(self) -> np.ndarray:
        """The live slots, row by row."""
        return np.delete(self.rows[: self.live + len(self.gaps)], self.gaps)

    @property
    def next_place(self) -> np.ndarray:
        """Where the next key and value of each slot belong, in its pages; those of a slot without a token at its first
        token's."""
        return self.before + np.maximum(self.sampled, 1) - 1

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

    def next_jobs(self, most_tokens: int) -> list[tuple[Job, int, bool]]:
        """Take the next requests from the queue, each with its entry of the cache, and whether its prompt is in it.

        Takes none if enough completions wait for the free slots, and otherwise as many as free entries and
        `most_tokens` prompt tokens to compute allow, so that prompts are computed together, also those of completions
        that have no slot yet. The first prompt to compute may be longer.
        """
        taken: list[tuple[Job, int, bool]] = []
        entries = deque(self.cache.free_entries)
        tokens = 0
        while self.queue and len(self.waiting) < self.free:
            job = self.queue[0]
            entry = self._entries.get(job.prompt) if job.own else None
            there, size = entry is not None, len(job.prompt) if job.kept is None else 0
            if entry is None:
                if not entries or (tokens and tokens + size > most_tokens):
                    break
                entry, tokens = entries.popleft(), tokens + size
                self._entries.setdefault(job.prompt, entry)
            self.queue.popleft()
            taken.append((job, entry, there))
        return taken

    def add(self, job: Job, entry: int, state: Tensor | None) -> None:
        """Queue the completions of a request whose prompt is in the cache. `state`: see `Waiting`."""
        self.cache.prompt_lengths[entry] = len(job.prompt)
        self.cache.users[entry] += len(job.request.streams)
        for number, stream in enumerate(job.request.streams):
            limit = job.request.limit(number, self.params)
            self.waiting.append(Waiting(job, number, tuple(stream), limit, entry, state))

    def fill_slots(self, most_tokens: int) -> list[tuple[int, Waiting]]:
        """Assign waiting completions to the free slots, first to those in gaps. Returns both, row by row.

        Takes as many as free slots and `most_tokens` own tokens to compute allow. The first may have more.
        """
        filled: list[tuple[int, Waiting]] = []
        tokens = 0
        while self.waiting and self.free:
            job = self.waiting[0].job
            more = len(job.own) - job.known
            if tokens and tokens + more > most_tokens:
                break
            gap = min(self.gaps, default=None)
            if gap is not None:
                self.gaps.remove(gap)
            new, slot = self.waiting.popleft(), int(self.rows[self.live if gap is None else gap])
            self.owner[slot], self.entry[slot], self.limit[slot] = (job.index, new.number), new.entry, new.limit
            self.sampled[slot] = self.length[slot] = 0
            self.before[slot] = len(job.own)
            filled.append((slot, new))
            self.live += 1
            tokens += more
        return filled

    def append(self, slots: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Append one token to each of the slots."""
        position = self.length[slots]
        self.tokens[slots, position], self.logprobs[slots, position] = tokens, logprobs
        self.length[slots] += 1

    def retire(self, slot: int, text_end: int | None) -> None:
        """Record the completion of a slot as finished. Its row becomes a gap."""
        length = int(self.length[slot])
        tokens, logprobs = self.tokens[slot, :length].tolist(), self.logprobs[slot, :length].tolist()
        request, number = self.owner[slot]
        self._finished[request][number] = Finished(tokens, logprobs, text_end)
        self._unfinished[request] -= 1
        entry = int(self.entry[slot])
        if self.cache.leave_prompt(entry):
            self._entries = {prompt: place for prompt, place in self._entries.items() if place != entry}
        self.cache.completions.release(slot)
        self.live -= 1
        self.gaps.append(int(np.flatnonzero(self.rows == slot)[0]))

    def close_gaps(self) -> None:
        """Move the last rows into the gaps."""
        for row in sorted(self.gaps, reverse=True):
            end = self.live + len(self.gaps) - 1
            last = int(self.rows[end])
            self.rows[[row, end]] = last, self.rows[row]
            self.gaps.remove(row)
            if self.cache.whole and row != end and self.cache.completions.table[last, 0] >= 0:
                self.cache.completions.fill_gap(last, row, int(self.next_place[last]))

    def take_finished(self) -> list[tuple[int, list[Finished]]]:
        """The requests whose last completion finished since the previous call, with their completions in order."""
        done = [index for index, count in self._unfinished.items() if not count]
        groups = []
        for index in done:
            del self._unfinished[index]
            completions = self._finished.pop(index)
            groups.append((index, [completions[number] for number in range(len(completions))]))
        return groups
