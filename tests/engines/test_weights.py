"""`Engine.load_weights` and `Engine.stream`: where an engine's weights come from, and when its results arrive."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gruppo.config.engine_section import Engine as EngineTable
from gruppo.engines import build_engine
from gruppo.engines.base import Request, SamplingParams
from gruppo.errors import UsageError
from gruppo.models.policy import LanguageModel
from gruppo.models.weights import WeightSource
from gruppo.utils.oom_retry import BatchSizes
from tests.conftest import make_policy

RESET = Path("/proc/self/clear_refs")
GREEDY = SamplingParams(0.0, 12)
REQUESTS = [Request((5, 6, 7), [(0,), (1,)]), Request((8, 9), [(2,)])]


def tokens(policy: LanguageModel) -> list[tuple[int, ...]]:
    engine = build_engine(policy, 4)
    return [completion.token_ids for group in engine.generate(REQUESTS, GREEDY) for completion in group]


def peak_growth(action: Callable[[], None]) -> int:
    """Bytes by which the resident memory of this process rises above its present value, at most."""

    def resident(name: str) -> int:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
        return int(line.split()[1]) * 1024

    gc.collect()
    RESET.write_text("5")
    before = resident("VmRSS")
    action()
    return resident("VmHWM") - before


def storages(policy: LanguageModel) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in policy.weights().values()}


def test_engine_samples_with_weights_of_another_model() -> None:
    trained, other = make_policy(seed=1), make_policy(seed=2)
    expected = tokens(trained)
    engine = build_engine(other, 4)
    before = [completion.token_ids for group in engine.generate(REQUESTS, GREEDY) for completion in group]
    engine.load_weights(trained.weight_source(), 7)
    after = engine.generate(REQUESTS, GREEDY)
    assert before != expected
    assert [completion.token_ids for group in after for completion in group] == expected
    assert {completion.policy_version for group in after for completion in group} == {7}


def test_weights_are_read_one_at_a_time() -> None:
    trained, other = make_policy(seed=1), make_policy(seed=2)
    gathered: list[weakref.ref[Tensor]] = []
    alive = []

    def gather() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in trained.weights().items():
            full = tensor.clone()
            gathered.append(weakref.ref(full))
            alive.append(sum(reference() is not None for reference in gathered))
            yield name, full

    build_engine(other, 4).load_weights(WeightSource(trained.model, gather), 1)
    assert len(alive) == len(trained.weights()) > 10
    assert max(alive) <= 2  # the tensor that the engine has copied, and the next one


def test_engine_of_the_trained_module_shares_its_weights() -> None:
    policy = make_policy(seed=1)

    def refuse() -> Iterator[tuple[str, Tensor]]:
        raise AssertionError("weights that the engine samples with are read again")

    before = storages(policy)
    engine = build_engine(policy, 4)
    engine.load_weights(WeightSource(policy.model, refuse), 3)
    assert storages(policy) == before
    (group, _) = engine.generate(REQUESTS, GREEDY)
    assert {completion.policy_version for completion in group} == {3}


@pytest.mark.skipif(not RESET.exists(), reason="the peak memory of a process can be reset on Linux only")
def test_peak_memory_of_new_weights() -> None:
    """Sharing needs no memory; copying needs that of one tensor, not of a second model."""
    size = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    trained, other = make_policy(seed=1, **size), make_policy(seed=2, **size)
    tensors = trained.weights().values()
    total, largest = (function(tensor.nbytes for tensor in tensors) for function in (sum, max))
    assert total > 100e6

    def gathered() -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor.clone()) for name, tensor in trained.weights().items())

    engine = build_engine(trained, 4)
    assert peak_growth(lambda: engine.load_weights(trained.weight_source(), 1)) < largest
    engine = build_engine(other, 4)
    assert peak_growth(lambda: engine.load_weights(WeightSource(trained.model, gathered), 1)) < 4 * largest < total / 4


def test_an_update_in_place_reaches_the_engine() -> None:
    policy, other = make_policy(seed=1), make_policy(seed=2)
    engine = build_engine(policy, 4)
    engine.generate(REQUESTS, GREEDY)
    with torch.no_grad():
        for name, tensor in policy.weights().items():
            tensor.copy_(other.weights()[name])
    policy.generation.advance()
    engine.load_weights(policy.weight_source(), 1)
    sampled = [completion.token_ids for group in engine.generate(REQUESTS, GREEDY) for completion in group]
    assert sampled == tokens(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights | {"extra": torch.zeros(1)}, "'extra'.*no weight of that name"),
        (lambda weights: dict(list(weights.items())[:-1]), "missing"),
    ],
)
def test_weights_of_another_architecture_are_refused(change, message: str) -> None:
    trained, other = make_policy(seed=1), make_policy(seed=2)
    source = WeightSource(trained.model, lambda: iter(change(trained.weights()).items()))
    with pytest.raises(ValueError, match=message):
        build_engine(other, 4).load_weights(source, 1)


def test_groups_arrive_as_they_finish() -> None:
    policy = make_policy(seed=3)
    long = Request((5, 6), [(0,), (1,)], limits=[12, 12])
    short = Request((7, 8), [(2,), (3,)], limits=[2, 2])
    params = SamplingParams(1.0, 12, min_tokens=12)
    engine = build_engine(policy, 8)
    sampled = 0

    def advance(count: float) -> None:
        nonlocal sampled
        sampled += int(count)

    seen = []
    for index, completions in engine.stream([long, short], params, advance):
        seen.append((index, sampled, completions))
    assert [index for index, _, _ in seen] == [1, 0]
    assert seen[0][1] < seen[1][1] == 12 * 2 + 2 * 2  # the short group arrived before the long one was sampled
    together = engine.generate([long, short], params)
    assert [completions for _, _, completions in sorted(seen, key=lambda item: item[0])] == together


def test_a_source_of_groups_can_be_left_early() -> None:
    engine = build_engine(make_policy(seed=3), 1)
    stream = engine.stream(REQUESTS, GREEDY)
    index, _ = next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert index == 0
    assert len(engine.generate(REQUESTS, GREEDY)) == 2


def test_an_engine_is_named_by_an_import_path() -> None:
    engine = build_engine(make_policy(), 4, settings=EngineTable(name="gruppo.engines.native.engine:NativeEngine"))
    assert engine.generate(REQUESTS, GREEDY) == build_engine(make_policy(), 4).generate(REQUESTS, GREEDY)
    with pytest.raises(UsageError, match="nowhere"):
        build_engine(make_policy(), 4, settings=EngineTable(name="nowhere.engine:Engine"))


def test_smaller_slots_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy()
    engine = build_engine(policy, 4, BatchSizes(64, 4))
    calls = []
    original = type(policy).hidden_states

    def fails_with_many(self, ids, positions, plan):
        calls.append(len(ids))
        if len(ids) > 2:
            raise MemoryError("out of memory")
        return original(self, ids, positions, plan)

    monkeypatch.setattr(type(policy), "hidden_states", fails_with_many)
    groups = engine.generate(REQUESTS, GREEDY)
    assert engine.slots == 2
    monkeypatch.undo()
    assert [c.token_ids for group in groups for c in group] == tokens(policy)
