"""`TokenScorer` reads every weight inside its `forward`, so one module can be wrapped, hooked or sharded."""

from __future__ import annotations

import torch
from torch import nn

from gruppo.algorithms.aggregation import sequence_mean_weights
from gruppo.models.packing import pack, score
from gruppo.models.policy import LanguageModel, TokenScorer
from tests.conftest import make_policy, random_groups


def make_batch():
    groups = random_groups()
    for group in groups:
        group.trained = [True] * len(group.completions)
        group.advantages = [[1.0] * len(completion.token_ids) for completion in group.completions]
    (batch,) = pack(groups, sequence_mean_weights, 10**9, with_kl=False)
    return batch


def arguments(batch) -> tuple:
    return batch.token_ids, batch.positions, batch.layout, batch.predictors, batch.targets, 0.7


def test_forward_reads_the_weights_of_that_moment(policy: LanguageModel) -> None:
    """Sharding gathers weights in a hook before `forward` and frees them after it; read outside, they are empty."""
    policy = make_policy(tie_word_embeddings=False)
    scorer, batch = policy.scorer, make_batch()
    expected = [value.detach().clone() for value in scorer(*arguments(batch))]
    full = {name: tensor.clone() for name, tensor in policy.weights().items()}

    def gather(module: nn.Module, _: object) -> None:
        policy.generation.advance()
        for name, tensor in policy.weights().items():
            tensor.copy_(full[name])

    def free(module: nn.Module, *_: object) -> None:
        policy.generation.advance()
        for tensor in policy.weights().values():
            tensor.fill_(torch.nan)

    free(scorer)
    scorer.register_forward_pre_hook(gather)
    scorer.register_forward_hook(free)
    with torch.no_grad():
        scored = scorer(*arguments(batch))
    assert torch.equal(scored[0], expected[0])
    assert torch.equal(scored[1], expected[1])
    assert all(tensor.isnan().all() for tensor in policy.weights().values())


def test_its_parameters_are_all_of_the_policy(policy: LanguageModel) -> None:
    names = {id(parameter) for parameter in policy.model.parameters()}
    assert {id(parameter) for parameter in policy.scorer.parameters()} == names


def test_scoring_is_a_call_of_the_module(policy: LanguageModel, monkeypatch) -> None:
    calls = []
    forward = TokenScorer.forward
    monkeypatch.setattr(TokenScorer, "forward", lambda *values: calls.append(1) or forward(*values))
    score(policy, make_batch(), 1.0)
    assert calls == [1]
