"""The probe: an engine with weights of its own shows that they are the trainer's, before it samples.

A load of weights can seem to succeed and leave the old weights, a part of them, or garbage in the engine. So after each
load the engine continues a fixed prompt, and the trainer scores the continuation. A prefix cache of old weights is
found too, because the prompt is the same each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gruppo.algorithms.aggregation import sequence_mean_weights
from gruppo.engines.base import Engine, Request, SamplingParams
from gruppo.engines.completions import NonFiniteError
from gruppo.errors import RunError
from gruppo.models.packing import pack, score
from gruppo.models.policy import LanguageModel
from gruppo.models.weights import WeightSource
from gruppo.types import Completion, Group, Prompt
from gruppo.utils.progress import Advance

PROBE_TOKENS = 16
PROMPT_TOKENS = 96  # at least one whole block of a prefix cache
LONGEST = PROMPT_TOKENS + PROBE_TOKENS
ATTEMPTS = 2


def largest_drift(dtype: torch.dtype) -> float:
    """The mean difference between log-probabilities of engine and trainer that rounding explains, in nats per token."""
    return 0.05 if dtype == torch.bfloat16 else 1e-4


def probe_request(policy: LanguageModel) -> Request:
    """The fixed prompt: random tokens that have a text and end no turn, at most half of the context."""
    usable = sorted(set(range(policy.head_size)) - set(policy.eos_ids) - policy.ids_without_text) or [0]
    length = max(1, min(PROMPT_TOKENS, policy.context // 2))
    places = np.random.Generator(np.random.Philox(0)).integers(len(usable), size=length)
    return Request(tuple(usable[place] for place in places), [(0,)])


def probe(engine: Engine, policy: LanguageModel) -> float:
    """The mean absolute difference between the log-probabilities of engine and trainer, in nats per token.

    The engine continues the fixed prompt greedily for up to 16 tokens. Infinite if its log-probabilities are not
    finite.
    """
    request = probe_request(policy)
    most = max(1, min(PROBE_TOKENS, policy.context - len(request.token_ids)))
    try:
        ((completion,),) = engine.generate([request], SamplingParams(0.0, most))
    except NonFiniteError:
        return float("inf")
    group = Group(Prompt("probe", "", request.token_ids, "probe", {}), [completion], [])
    group.trained, group.advantages = [True], [[1.0] * len(completion.token_ids)]
    (batch,) = pack([group], sequence_mean_weights, policy.context, with_kl=True, device=policy.device)
    with torch.no_grad(), policy.precision():
        logprobs, _ = score(policy, batch, 1.0)
    return float((logprobs.double().cpu() - torch.tensor(completion.sampling_logprobs).double()).abs().mean())


@dataclass
class ProbedEngine(Engine):
    """Wraps an engine and probes it after each load. `name`: the engine in messages. `policy`: what its weights are
    compared with."""

    engine: Engine
    policy: LanguageModel
    name: str

    @property
    def slots(self) -> int:
        """See `Engine`."""
        return self.engine.slots

    @slots.setter
    def slots(self, slots: int) -> None:
        self.engine.slots = slots

    def stream(
        self, requests: Sequence[Request], params: SamplingParams, advance: Advance | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        """See `Engine`."""
        return self.engine.stream(requests, params, advance)

    def load_weights(self, source: WeightSource, version: int) -> None:
        """See `Engine`. A load that fails the probe is repeated once.

        Raises RunError if the engine fails the probe again.
        """
        limit, differences = largest_drift(self.policy.dtype), []
        for _ in range(ATTEMPTS):
            self.engine.load_weights(source, version)
            differences.append(probe(self.engine, self.policy))
            if differences[-1] <= limit:
                return
        found = " and ".join(f"{difference:.3g}" for difference in differences)
        raise RunError(
            f'engine "{self.name}" does not have the weights of version {version}: after {ATTEMPTS} loads its '
            f"log-probabilities differ from the trainer's by {found} nats per token on average, and rounding explains "
            f"at most {limit:g}; the last checkpoint is intact: resume the run, or start again "
            'with engine.name = "native"'
        )

    def sleep(self) -> None:
        """See `Engine`."""
        self.engine.sleep()

    def close(self) -> None:
        """See `Engine`."""
        self.engine.close()
