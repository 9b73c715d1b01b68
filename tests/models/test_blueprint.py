"""A blueprint has everything of a policy but its weights."""

from __future__ import annotations

import pytest

from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.native.engine import NativeEngine
from gruppo.models.blueprint import built, sampling_blueprint
from gruppo.models.weights import named_weights
from tests.architectures import ARCHITECTURES, make_architecture

REQUESTS = [Request((5, 6, 7), [(0, index) for index in range(4)]), Request((8,), [(1, 0)])]
PARAMS = SamplingParams(1.0, 12)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_blueprint_has_everything_but_the_weights(name: str) -> None:
    policy = make_architecture(name)
    blueprint, empty = sampling_blueprint(policy, "cpu")
    assert all(weight.is_meta for weight in empty.model.parameters())
    copy = built(blueprint)
    engine = NativeEngine(copy, 8)
    engine.load_weights(policy.weight_source(), 0)
    assert (copy.body is None) == (policy.body is None)
    assert engine.generate(REQUESTS, PARAMS) == NativeEngine(policy, 8).generate(REQUESTS, PARAMS)
    tied = len({id(weight) for weight in policy.model.state_dict().values()})
    assert len(named_weights(copy.model)) == len(named_weights(policy.model)) <= tied
