"""The probe finds engines that do not have the weights of the trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from gruppo.config.engine_section import Engine as EngineTable
from gruppo.engines import build_engine
from gruppo.engines.base import Engine, SamplingParams
from gruppo.engines.native.engine import NativeEngine
from gruppo.engines.probe import ProbedEngine, largest_drift, probe, probe_request
from gruppo.errors import RunError
from gruppo.models.policy import LanguageModel
from gruppo.models.weights import WeightSource
from tests.conftest import END, make_policy


class Copying(NativeEngine):
    """The native engine with weights of its own."""

    copies_weights = True
    loads: list[int]

    def __init__(self, policy: LanguageModel, slots: int) -> None:
        super().__init__(make_policy(policy.dtype, seed=99), slots)
        self.loads = []

    def load_weights(self, source: WeightSource, version: int) -> None:
        self.loads.append(version)
        super().load_weights(source, version)


def damaged(source: WeightSource, change: Callable[[str, torch.Tensor], torch.Tensor]) -> WeightSource:
    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, change(name, tensor)) for name, tensor in source)

    return WeightSource(source.module, tensors)


def failing(engine: Copying, times: int, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Let the next loads of the engine go wrong this many times."""
    load, left = engine.load_weights, [times]

    def wrong(source: WeightSource, version: int) -> None:
        left[0] -= 1
        load(damaged(source, change) if left[0] >= 0 else source, version)

    engine.load_weights = wrong  # type: ignore[method-assign]


def probed(policy: LanguageModel) -> tuple[ProbedEngine, Copying]:
    engine = Copying(policy, 4)
    return ProbedEngine(engine, policy, "copying"), engine


def zeros_in_one_layer(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor) if name == "model.layers.1.mlp.down_proj.weight" else tensor


def rounded(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.bfloat16().float()


def nan(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor * torch.nan


def test_the_same_weights_pass() -> None:
    policy = make_policy(seed=1)
    wrapped, engine = probed(policy)
    wrapped.load_weights(policy.weight_source(), 3)
    assert engine.loads == [3]
    assert probe(wrapped, policy) < 1e-5
    assert wrapped.generate([probe_request(policy)], SamplingParams(1.0, 2))[0][0].policy_version == 3


@pytest.mark.parametrize("change", [zeros_in_one_layer, rounded, nan])
def test_a_load_that_fails_once_is_repeated(change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    policy = make_policy(seed=1)
    wrapped, engine = probed(policy)
    failing(engine, 1, change)
    wrapped.load_weights(policy.weight_source(), 4)
    assert engine.loads == [4, 4]
    assert probe(wrapped, policy) < 1e-5


@pytest.mark.parametrize(
    ("change", "difference"), [(zeros_in_one_layer, r"\d[\d.]*"), (rounded, r"0\.\d+"), (nan, "inf")]
)
def test_a_load_that_fails_twice_ends_the_run(
    change: Callable[[str, torch.Tensor], torch.Tensor], difference: str
) -> None:
    policy = make_policy(seed=1)
    wrapped, engine = probed(policy)
    failing(engine, 2, change)
    words = (
        rf'engine "copying" does not have the weights of version 5: after 2 loads .* by {difference} and {difference} '
    )
    with pytest.raises(RunError, match=words):
        wrapped.load_weights(policy.weight_source(), 5)
    assert engine.loads == [5, 5]


def test_an_engine_that_keeps_its_old_weights_is_found() -> None:
    """trl#5312: an update that succeeds and changes nothing."""
    policy = make_policy(seed=1)
    wrapped, engine = probed(policy)
    wrapped.load_weights(policy.weight_source(), 0)
    engine.load_weights = lambda source, version: None  # type: ignore[method-assign]
    with torch.no_grad():
        policy.model.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    policy.generation.advance()
    with pytest.raises(RunError, match="version 1"):
        wrapped.load_weights(policy.weight_source(), 1)


def test_the_difference_is_the_mean_over_the_continuation() -> None:
    """Against log-probabilities of transformers' own module, of an engine with other weights."""
    policy, engine = make_policy(seed=1), Copying(make_policy(), 4)
    request = probe_request(policy)
    ((completion,),) = engine.generate([request], SamplingParams(0.0, 16))
    ids = torch.tensor([[*request.token_ids, *completion.token_ids]])
    with torch.no_grad():
        logprobs = policy.model(ids).logits[0, len(request.token_ids) - 1 : -1].log_softmax(-1)
    expected = logprobs.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    difference = (expected - torch.tensor(completion.sampling_logprobs)).abs().mean()
    assert probe(engine, policy) == pytest.approx(float(difference), rel=1e-4)
    assert difference > 0.1


def test_the_prompt_is_a_fixed_text_that_ends_no_turn() -> None:
    one, other = make_policy(seed=1), make_policy(seed=2)
    assert probe_request(one) == probe_request(other)
    ids = probe_request(one).token_ids
    assert len(ids) == 64, "half of the context"
    assert one.tokenizer.decode(ids).startswith("?he weights of a model"), "its tokenizer has no capital letters"
    assert len(probe_request(make_policy(max_position_embeddings=4096)).token_ids) == 96
    ends = replace(one, eos_ids=(END, *one.tokenizer("e")["input_ids"]))
    assert one.tokenizer.decode(probe_request(ends).token_ids).startswith("?h wights of a modl")


def test_bounds_by_dtype() -> None:
    assert (largest_drift(torch.bfloat16), largest_drift(torch.float32), largest_drift(torch.float64)) == (
        0.05, 1e-4, 1e-6,
    )  # fmt: skip


def test_engines_of_users_are_probed_and_the_native_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    monkeypatch.setattr(Copying, "close", lambda self: closed.append(self))  # noqa: PLW0108  a bound method
    settings, policy = EngineTable(name=f"{__name__}:Copying"), make_policy(seed=1)
    engine: Engine = build_engine(policy, 4, settings=settings)
    assert isinstance(engine, ProbedEngine)
    assert probe(engine, policy) < 1e-5, "it got the policy's weights"
    engine.slots = 2
    assert engine.engine.slots == 2
    assert type(build_engine(policy, 4)) is NativeEngine
    monkeypatch.setattr(Copying, "load_weights", lambda *arguments: None)
    with pytest.raises(RunError, match="version 0"):
        build_engine(policy, 4, settings=settings)
    assert len(closed) == 1, "an engine without the right weights is closed"


def test_weights_of_an_earlier_version_are_compared_with_the_copy_that_holds_them() -> None:
    """The trainer has gone on: compared with it, the engine would seem to have other weights."""
    policy = make_policy()
    engine, copying = probed(policy)
    kept = policy.sampling_copy()
    with torch.no_grad():
        for weight in policy.weights().values():
            weight.add_(0.05)
    policy.generation.advance()
    engine.load_weights(kept.weight_source(), 1)
    assert copying.loads == [1]
    assert probe(copying, kept) < largest_drift(torch.float32) < probe(copying, policy)
