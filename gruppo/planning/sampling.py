"""Time of sampling: an engine that reads its weights and the caches of all running completions for every token."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass

from gruppo.planning.assumptions import Assumptions
from gruppo.planning.devices import Device
from gruppo.planning.lengths import Lengths
from gruppo.planning.shape import BYTES, ModelShape

_SIMULATED = 384  # completions that are simulated; each stands for an equal share of all


@dataclass(frozen=True)
class Engine:
    """One engine: a copy of the model on `devices` devices.

    `memory`: bytes per device for weights and cache. `slots`: number of concurrent completions, limited by the cache.
    """

    shape: ModelShape
    device: Device
    devices: int
    memory: float
    assumptions: Assumptions

    @property
    def cache_memory(self) -> float:
        """Bytes of all its devices that are left for the cache; negative if the weights do not fit."""
        return self.devices * self.memory - self.shape.weight_bytes

    @property
    def most_slots(self) -> float:
        """Maximum number of concurrent completions, if the cache has room for them."""
        return self.assumptions.slots or self.device.slots

    @property
    def rate(self) -> float:
        """Floating-point operations per second of all its devices."""
        return self.devices * self.device.flops * self.assumptions.mfu_of(self.shape.experts)

    def slots(self, context: float) -> int:
        """Number of concurrent completions, if each has `context` cached tokens on average; 0 if none fits."""
        return int(max(0.0, min(self.most_slots, self.cache_memory / (self.shape.cache_bytes * context))))

    def token_seconds(self, running: float, context: float) -> float:
        """Seconds for one more token of each of `running` completions with `context` cached tokens on average.

        Matrix multiplications take the longer of reading the weights and computing; attention reads the cache.
        Several devices add up their parts twice in each layer.
        """
        assumed, device = self.assumptions, self.device
        bandwidth = self.devices * device.bandwidth * assumed.bandwidth_share
        weights = self.shape.read_bytes(running) / bandwidth
        computing = 2.0 * self.shape.active * running / self.rate
        cache = running * context * self.shape.cache_bytes / bandwidth
        return max(weights, computing) + cache + self._sum_seconds(running) + assumed.iteration_ms / 1e3

    def _sum_seconds(self, running: float) -> float:
        """Seconds of the two sums over devices in each layer: their latency, and 2 (n − 1) / n times their bytes."""
        if self.devices == 1:
            return 0.0
        sent = 2 * (self.devices - 1) / self.devices * BYTES * self.shape.hidden * running
        transfer = sent / (self.device.link * self.assumptions.bandwidth_share)
        return 2 * self.shape.layers * (1e-6 * self.assumptions.reduce_us + transfer)

    def prefill_seconds(self, tokens: float, context: float) -> float:
        """Seconds to compute the caches of `tokens` prompt tokens."""
        return tokens * self.shape.forward_flops(context) / self.rate


@dataclass(frozen=True)
class SamplingTime:
    """Seconds to sample the completions of a step, and what limits it.

    `tail`: seconds after 90% of the completions are finished. `running`: concurrent completions of an engine at the
    start. `limit`: "cache" or "slots" if more completions wait than run, else "completions".
    """

    seconds: float
    tail: float
    running: int
    limit: str


@dataclass(frozen=True)
class Samples:
    """The completions of a step, and their `prompts`, each with `prompt` tokens.

    `longest`: tokens of the longest completion.
    """

    completions: int
    prompts: int
    prompt: float
    lengths: Lengths
    longest: float


def sampling_time(engine: Engine, engines: int, samples: Samples) -> SamplingTime:
    """Seconds until `engines` equal engines have sampled all completions of a step.

    Work is shared evenly. A completion that ends makes room for one that waits, and all running ones advance by one
    token in the same time. Completions start in an arbitrary fixed order. Requires room for at least one completion
    (`Engine.slots`).
    """
    prompt, lengths = samples.prompt, samples.lengths
    share = -(-samples.completions // engines)
    context = lengths.mean_context(prompt)
    room = engine.slots(context)
    assert room > 0
    slots = min(room, share)
    simulated = min(share, _SIMULATED)
    lanes = max(1, round(slots * simulated / share))
    weight = slots / lanes
    values = [lengths.values[(2 * index + 1) * len(lengths.values) // (2 * simulated)] for index in range(simulated)]
    values[-1] = max(values[-1], samples.longest)
    random.Random(0).shuffle(values)

    running: list[tuple[float, float]] = []  # for each: the iteration at which it ends, and at which it started
    waiting = iter(values)
    now = seconds = started = after_most = 0.0
    finished = 0
    for _ in range(lanes):
        heapq.heappush(running, (next(waiting), 0.0))
    while running:
        end, start = heapq.heappop(running)
        cached = prompt + (now + end) / 2 - started / (len(running) + 1)
        seconds += (end - now) * engine.token_seconds(weight * (len(running) + 1), cached)
        now = end
        started -= start
        finished += 1
        if finished == -(-9 * simulated // 10):
            after_most = seconds
        following = next(waiting, None)
        if following is not None:
            heapq.heappush(running, (now + following, now))
            started += now
    prefill = engine.prefill_seconds(prompt * samples.prompts / engines, prompt / 2)
    limited = "slots" if room >= engine.most_slots else "cache"
    limit = "completions" if room >= share else limited
    return SamplingTime(prefill + seconds, seconds - after_most, slots, limit)
