"""Where sampling and training run, and how long a step takes there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from gruppo.planning.assumptions import Assumptions
from gruppo.planning.devices import Cluster
from gruppo.planning.lengths import Lengths
from gruppo.planning.sampling import Engine, Samples, SamplingTime, sampling_time
from gruppo.planning.shape import ModelShape
from gruppo.planning.trainer import (
    Passes,
    State,
    TrainingTime,
    rank_bytes,
    rank_memory,
    rate_between,
    training_time,
)

_ENGINE_SIZES = (1, 2, 4, 8)
_SPLITS = 64  # numbers of trainers that are tried, at most
_MOST = 2**20  # ranks; what is not divided among so many never fits

Kind = Literal["colocated", "synchronous", "ahead"]


@dataclass(frozen=True)
class Work:
    """The work of a step.

    `prompt_copies`: prompts that are trained on: one per group if completions share it in a packed row, else one per
    completion. `longest`: maximum length of a completion in tokens. `sampled`: whether completions are sampled at all.
    """

    completions: int
    prompts: int
    prompt_copies: int
    prompt: float
    longest: int
    lengths: Lengths
    passes: Passes
    state: State
    sampled: bool = True

    @property
    def completion_tokens(self) -> float:
        """Tokens of all completions."""
        return self.completions * self.lengths.mean

    @property
    def training_tokens(self) -> float:
        """Tokens that a training pass computes."""
        return self.completion_tokens + self.prompt_copies * self.prompt


@dataclass(frozen=True)
class Placement:
    """Devices of trainers and engines, and the predicted times in seconds.

    `kind`: "colocated" (the same devices take turns), "synchronous" (devices of their own, which wait for each other)
    or "ahead" (engines sample the next step while trainers train). `transfer`: until the engines have new weights.
    """

    kind: Kind
    trainers: int
    engines: int
    engine_devices: int
    sampling: SamplingTime | None
    training: TrainingTime
    transfer: float
    step: float

    @property
    def sampling_seconds(self) -> float:
        """Seconds of sampling; 0 if nothing is sampled."""
        return 0.0 if self.sampling is None else self.sampling.seconds

    @property
    def idle(self) -> tuple[float, float]:
        """Shares of a step in which trainers and engines wait or move data; without the tail of sampling."""
        if self.kind == "colocated":
            busy = (self.training.seconds + self.sampling_seconds) / self.step
            return 1 - busy, 1 - busy
        return 1 - self.training.seconds / self.step, 1 - self.sampling_seconds / self.step

    @property
    def bottleneck(self) -> str:
        """The part that takes longest, in words."""
        sampling, training = self.sampling_seconds, self.training.seconds
        if self.transfer > max(sampling, training):
            return "the transfer of weights"
        if training >= sampling:
            return "training, which waits for gathered weights" if self.training.gathering else "training"
        assert self.sampling is not None
        if self.sampling.tail > sampling / 2:
            return "the longest completions: over half of sampling is its last tenth"
        return {
            "cache": "sampling, whose concurrent completions are limited by the KV cache",
            "slots": "sampling, whose concurrent completions are limited by the slots of an engine",
            "completions": "sampling",
        }[self.sampling.limit]


def place(
    shape: ModelShape,
    cluster: Cluster,
    work: Work,
    assumed: Assumptions,
    kind: Kind,
    trainers: int,
    engine_devices: int,
) -> Placement | None:
    """The placement with this number of trainers; the other devices sample. None if the engines do not fit.

    With kind = "colocated", all devices train and sample. Their state leaves the device while they sample, except on a
    single device, where it stays.
    """
    colocated = kind == "colocated"
    engines = (cluster.devices if colocated else cluster.devices - trainers) // engine_devices
    memory = engine_memory(cluster, assumed)
    if colocated and cluster.devices == 1:
        memory -= work.state.bytes
    engine = Engine(shape, cluster.device, engine_devices, memory, assumed)
    sampling = None
    if work.sampled:
        if engines < 1 or engine.slots(work.prompt + work.longest) < 1:
            return None
        longest = assumed.longest_share * work.longest
        samples = Samples(work.completions, work.prompts, work.prompt, work.lengths, longest)
        sampling = sampling_time(engine, engines, samples)
    training = training_time(
        shape, cluster, trainers, work.passes, work.training_tokens, work.lengths.training_context(work.prompt), assumed
    )
    rate = min(rate_between(cluster, cluster.devices, assumed), assumed.transfer_gb_s * 1e9)
    transfer = 0.0 if sampling is None or cluster.devices == 1 else shape.weight_bytes / rate
    seconds = 0.0 if sampling is None else sampling.seconds
    busy = max(seconds, training.seconds) if kind == "ahead" else seconds + training.seconds
    step = (busy + transfer) * (1 + assumed.other_share)
    return Placement(
        kind, trainers, 0 if sampling is None else engines, engine_devices, sampling, training, transfer, step
    )


def trainer_parts(shape: ModelShape, work: Work, assumed: Assumptions, trainers: int) -> dict[str, float]:
    """Bytes of a rank, by part. A micro-batch holds at least one completion of maximum length, and no more than the
    rank's part of a step."""
    tokens = max(work.prompt + work.longest, min(assumed.micro_batch_tokens, work.training_tokens / trainers))
    return rank_bytes(shape, work.state, trainers, work.passes.recompute, tokens)


def trainers_fit(shape: ModelShape, cluster: Cluster, work: Work, assumed: Assumptions, trainers: int) -> bool:
    """Whether a rank fits on its device."""
    return sum(trainer_parts(shape, work, assumed, trainers).values()) <= rank_memory(cluster)


def fewest_trainers(shape: ModelShape, cluster: Cluster, work: Work, assumed: Assumptions) -> int | None:
    """The smallest number of ranks that fit on devices of this kind; None if a micro-batch alone does not fit.

    More ranks always need less each, from two on.
    """
    if trainers_fit(shape, cluster, work, assumed, 1):
        return 1
    low, high = 1, 2
    while not trainers_fit(shape, cluster, work, assumed, high):
        low, high = high, 2 * high
        if high > _MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if trainers_fit(shape, cluster, work, assumed, middle):
            high = middle
        else:
            low = middle
    return high


def engine_memory(cluster: Cluster, assumed: Assumptions) -> float:
    """Bytes of a device that an engine may use."""
    return cluster.device.memory * assumed.engine_memory


def engine_sizes(cluster: Cluster) -> list[int]:
    """Devices that one engine may have: powers of two within a machine."""
    return [size for size in _ENGINE_SIZES if size <= cluster.per_machine]


def best_placement(
    shape: ModelShape, cluster: Cluster, work: Work, assumed: Assumptions, kind: Kind
) -> Placement | None:
    """The placement with the shortest step among those that fit; None if none does."""
    found = [
        placed
        for trainers in _trainer_counts(cluster, kind, work.sampled)
        if trainers_fit(shape, cluster, work, assumed, trainers)
        for size in engine_sizes(cluster)
        if kind == "colocated" or (cluster.devices - trainers) % size == 0
        if (placed := place(shape, cluster, work, assumed, kind, trainers, size)) is not None
    ]
    return min(found, key=lambda placed: placed.step, default=None)


def _trainer_counts(cluster: Cluster, kind: Kind, sampled: bool) -> Iterator[int]:
    """Numbers of trainers to try."""
    if kind == "colocated" or not sampled:
        yield cluster.devices
        return
    stride = max(1, cluster.devices // _SPLITS)
    yield from range(stride, cluster.devices, stride)
