"""Time and memory of training: passes over the tokens of a step, on ranks that share weights and optimizer state."""

from __future__ import annotations

from dataclasses import dataclass

from gruppo.planning.assumptions import Assumptions
from gruppo.planning.devices import Cluster
from gruppo.planning.shape import BYTES, ModelShape

_ACTIVATIONS = 34  # bytes per token, layer and hidden number kept for backward (Korthikanti et al., 2205.05198, Eq. 2)
_LOGIT_BYTES = 1e9  # log-probabilities are computed in chunks
_FREE = 0.92  # share of a device's memory that tensors may use; the rest is contexts and fragments


@dataclass(frozen=True)
class Passes:
    """Passes over all tokens of a step.

    `scores`: forward passes without gradient (old and reference log-probabilities, values). `updates`: forward and
    backward passes. `recompute`: an additional forward pass in each update. `frozen`: only adapters are trained, so no
    gradients of the weights are computed.
    """

    scores: float
    updates: float
    recompute: bool = True
    frozen: bool = False

    @property
    def update_forwards(self) -> float:
        """Forward passes that take as long as one update: 1, and 2 for backward, or 1 without gradients of weights."""
        return 1.0 + (1.0 if self.frozen else 2.0) + (1.0 if self.recompute else 0.0)


@dataclass(frozen=True)
class State:
    """Bytes of all ranks together: trained weights with gradients and AdamW's state, and frozen weights."""

    trained: float
    frozen: float

    @property
    def bytes(self) -> float:
        """All of it."""
        return self.trained + self.frozen


@dataclass(frozen=True)
class TrainingTime:
    """Seconds of the passes of a step. `gathering`: weights arrive more slowly than they are used."""

    scores: float
    updates: float
    gathering: bool

    @property
    def seconds(self) -> float:
        """All passes."""
        return self.scores + self.updates


def rate_between(cluster: Cluster, devices: int, assumed: Assumptions) -> float:
    """Bytes per second from one to another of `devices` devices, which fill one machine after another."""
    link = cluster.device.link
    if devices > cluster.per_machine:
        link = min(link, assumed.network_gb_s * 1e9)
    return link * assumed.bandwidth_share


def training_time(
    shape: ModelShape, cluster: Cluster, ranks: int, passes: Passes, tokens: float, context: float, assumed: Assumptions
) -> TrainingTime:
    """Seconds of the passes over `tokens` tokens, each attending to `context` tokens on average, on `ranks` devices.

    With several ranks, every pass over a micro-batch gathers the weights (2 bytes each), once more for backward, and
    reduces the gradients (4 bytes each) while it computes; the longer of both counts. The optimizer reads and writes 28
    bytes per weight.
    """
    rate = ranks * cluster.device.flops * assumed.mfu_of(shape.experts)
    forward = tokens * shape.forward_flops(context) / rate
    batches = max(1.0, tokens / ranks / assumed.micro_batch_tokens)
    moved = batches * shape.parameters * (ranks - 1) / ranks / rate_between(cluster, ranks, assumed)
    score = max(forward, BYTES * moved)
    update = max(forward * passes.update_forwards, (BYTES if passes.frozen else 2 * BYTES + 4) * moved)
    optimizer = 0.0 if passes.frozen else 28 * shape.parameters / ranks / (
        cluster.device.bandwidth * assumed.bandwidth_share
    )  # fmt: skip
    gathering = update > forward * passes.update_forwards
    return TrainingTime(passes.scores * score, passes.updates * (update + optimizer), gathering)


def training_state(shape: ModelShape, copies: int, reference: bool, lora_rank: int | None) -> State:
    """Bytes of the training state of `copies` trained models (policy, value model), and of a reference.

    Trained weights take 16 bytes: 4 each for the weight, its gradient, and AdamW's two moments. A reference takes 4.
    With adapters, only they are trained, the model takes 2 bytes per weight, and is the reference too.
    """
    if lora_rank is not None:
        return State(16.0 * copies * shape.lora_parameters(lora_rank), BYTES * copies * shape.parameters)
    return State(16.0 * copies * shape.parameters, 4.0 * shape.parameters if reference else 0.0)


def rank_bytes(shape: ModelShape, state: State, ranks: int, recompute: bool, tokens: float) -> dict[str, float]:
    """Bytes of one rank, by part: its share of the state, gathered weights, activations and logits of a micro-batch.

    Several ranks hold two layers in bfloat16 at a time; a single one has all weights in bfloat16 besides the state.

    With recomputation, each layer keeps its input (2 bytes per hidden number), and one layer everything.
    """
    kept = tokens * shape.hidden * (2 * shape.layers + _ACTIVATIONS if recompute else _ACTIVATIONS * shape.layers)
    return {
        "state": state.bytes / ranks,
        "gathered weights": BYTES * shape.parameters * (2 / shape.layers if ranks > 1 else 1),
        "activations": kept,
        "logits": _LOGIT_BYTES,
    }


def rank_memory(cluster: Cluster) -> float:
    """Bytes of a device that a rank may use."""
    return cluster.device.memory * _FREE
