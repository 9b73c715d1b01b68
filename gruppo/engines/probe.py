"""The probe: an engine with weights of its own shows that they are the trainer's, before it samples.

A load of weights can seem to succeed and leave the old weights, a part of them, or garbage in the engine. So after each
load the engine continues a fixed prompt, and the trainer scores the continuation. A prefix cache of old weights is
found too, because the prompt is the same each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch

from gruppo.algorithms.aggregation import sequence_mean_weights
from gruppo.engines.base import Engine, Request, SamplingParams
from gruppo.engines.completions import NonFiniteError
from gruppo.engines.wrapper import EngineWrapper
from gruppo.errors import RunError
from gruppo.models.packing import pack, score
from gruppo.models.policy import LanguageModel
from gruppo.models.weights import WeightSource
from gruppo.types import Completion, Group, Prompt

PROBE_TOKENS = 16
PROMPT_TOKENS = 96  # at least one whole block of a prefix cache
TEXT = (
    "The weights of a model are the numbers that it has learned. After each step of training they change a little, and "
    "a program that samples with them has to use the new ones. "
)
LONGEST = PROMPT_TOKENS + PROBE_TOKENS
ATTEMPTS = 2


def probed_length(policy: LanguageModel, length: int | None) -> int:
    """The longest sequence, in tokens, of an engine that samples sequences of this length (None: the policy's context)
    and is probed."""
    return min(policy.context, max(length or policy.context, LONGEST))


def largest_drift(dtype: torch.dtype) -> float:
    """The mean difference between log-probabilities of engine and trainer that rounding explains, in nats per token."""
    return {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]


def probe_request(policy: LanguageModel) -> Request:
    """The fixed prompt: plain text, at most half of the context. Tokens that end a turn or have no text are left out.

    On random tokens bfloat16 rounds so differently that the bound could not tell rounding from a mistake: with vLLM,
    0.051 nats in place of 0.007 (SmolLM2-135M).
    """
    ids = [int(token) for token in policy.tokenizer(TEXT)["input_ids"]]
    usable = [token for token in ids if token < policy.head_size and token not in policy.eos_ids]
    usable = [token for token in usable if token not in policy.ids_without_text] or [0]
    length = max(1, min(PROMPT_TOKENS, policy.context // 2))
    return Request(tuple(islice(cycle(usable), length)), [(0,)])


def probe_params(policy: LanguageModel) -> SamplingParams:
    """The continuation of the fixed prompt: greedy, up to 16 tokens."""
    return SamplingParams(0.0, max(1, min(PROBE_TOKENS, policy.context - len(probe_request(policy).token_ids))))


def probe(engine: Engine, policy: LanguageModel) -> float:
    """The mean absolute difference between the log-probabilities of engine and trainer, in nats per token.

    The engine continues the fixed prompt greedily for up to 16 tokens. Infinite if its log-probabilities are not
    finite.
    """
    try:
        ((completion,),) = engine.generate([probe_request(policy)], probe_params(policy))
    except NonFiniteError:
        return float("inf")
    return drift(policy, completion)


def drift(policy: LanguageModel, completion: Completion) -> float:
    """The mean absolute difference between the log-probabilities of the policy and of the engine that continued the
    fixed prompt with this completion, in nats per token."""
    group = Group(Prompt("probe", "", probe_request(policy).token_ids, "probe", {}), [completion], [])
    group.trained, group.advantages = [True], [[1.0] * len(completion.token_ids)]
    (batch,) = pack([group], sequence_mean_weights, policy.context, with_kl=True, device=policy.device)
    with torch.no_grad(), policy.precision():
        logprobs, _ = score(policy, batch, 1.0)
    return float((logprobs.double().cpu() - torch.tensor(completion.sampling_logprobs).double()).abs().mean())


def wrong_weights(name: str, version: int, differences: Sequence[float], dtype: torch.dtype) -> RunError:
    """The error of an engine that has failed the probe with these differences, once for each attempt."""
    found = " and ".join(f"{difference:.3g}" for difference in differences)
    return RunError(
        f"engine {name} does not have the weights of version {version}: after {ATTEMPTS} loads its log-probabilities "
        f"differ from the trainer's by {found} nats per token on average, and rounding explains at most "
        f"{largest_drift(dtype):g}; the last checkpoint is intact: resume the run, or start again with engine.name = "
        '"native"'
    )


@dataclass
class ProbedEngine(EngineWrapper):
    """Probes an engine after each load. `name`: the engine in messages. `policy`: what its weights are compared
    with."""

    policy: LanguageModel
    name: str

    def load_weights(self, source: WeightSource, version: int) -> None:
        """See `Engine`. A load that fails the probe is repeated once. Weights of an earlier version are compared with
        the model that holds them.

        Raises RunError if the engine fails the probe again.
        """
        limit, differences, policy = largest_drift(self.policy.dtype), [], source.scored_by or self.policy
        for _ in range(ATTEMPTS):
            self.engine.load_weights(source, version)
            differences.append(probe(self.engine, policy))
            if differences[-1] <= limit:
                return
        raise wrong_weights(f'"{self.name}"', version, differences, self.policy.dtype)
