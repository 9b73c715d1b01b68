"""The memory of sampling: counted by hand, and the number of slots that a budget holds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import pytest

from gruppo.config.engine_section import Engine as EngineTable
from gruppo.engines.base import SamplingParams
from gruppo.engines.memory import (
    FRAGMENTS,
    Decoding,
    Free,
    Sampled,
    decoding_of,
    forecast_sampling,
    logit_bytes,
    open_engine_within,
    sampling_bytes,
)
from gruppo.engines.native.engine import NativeEngine
from gruppo.errors import UsageError
from gruppo.models.footprint import Footprint, measure_footprint
from gruppo.models.policy import LanguageModel
from gruppo.utils.progress import NullProgress
from tests.conftest import make_policy

WORK = Sampled(completions=24, prompts=8, prompt_tokens=50, max_tokens=20)
# 2 layers, 10 bytes of activations per prompt token, 100 logits of 4 bytes.
MODEL = Footprint(
    process=1000, weights=500, gradients=0, moments=0, reference=0, critic=0, prepared=200, kept=(10.0,) + (0.0,) * 6,
    layers=2, cache_token=16, state_token=32, logits_token=400, wide=4, narrow=2, kernels=True, packed_head=70,
)  # fmt: skip


@pytest.mark.parametrize(
    ("params", "decoding"),
    [
        (SamplingParams(1.0, 5), "full"),
        (SamplingParams(0.7, 5, min_tokens=3), "full"),
        (SamplingParams(0.0, 5, top_p=0.5), "greedy"),
        (SamplingParams(1.0, 5, top_k=10), "truncated"),
        (SamplingParams(1.0, 5, top_p=0.9), "truncated"),
        (SamplingParams(1.0, 5, min_p=0.1), "truncated"),
    ],
)
def test_temporaries_of_logits_depend_on_how_tokens_are_chosen(params: SamplingParams, decoding: Decoding) -> None:
    assert decoding_of(params) == decoding


def test_temporaries_of_logits_counted_by_hand() -> None:
    """bfloat16 logits, with and without the kernel that reads them as they are."""
    plain = replace(MODEL, kernels=False)
    assert [logit_bytes(MODEL, each) for each in ("full", "greedy", "truncated")] == [2, 10, 40]
    assert [logit_bytes(plain, each) for each in ("full", "greedy", "truncated")] == [18, 10, 40]


def test_cache_and_temporaries_counted_by_hand() -> None:
    """Prefill of 400 tokens takes 2,000 bytes in a layer, the logits of 24 rows 2 or 40 bytes each."""
    cache = 16 * (24 * 20 + 8 * 50)
    assert sampling_bytes(MODEL, 256, WORK) == (cache, 70 + int(FRAGMENTS * 2 * 100 * 24))
    assert sampling_bytes(MODEL, 4, WORK) == (16 * (4 * 20 + 4 * 50), 70 + int(FRAGMENTS * 1000))
    truncated = replace(WORK, decoding="truncated")
    assert sampling_bytes(MODEL, 256, truncated) == (cache, 70 + int(FRAGMENTS * 40 * 100 * 24))
    without = replace(MODEL, kernels=False, packed_head=0)
    assert sampling_bytes(without, 256, truncated) == (cache, int(FRAGMENTS * (40 * 100 * 24 + cache // 2)))


@pytest.mark.parametrize(("slots", "tokens"), [(256, 24 * 20 + 24 * 70), (4, 2 * (4 * 20 + 4 * 50))])
def test_turns_are_kept_or_have_a_prompt_for_every_completion(slots: int, tokens: int) -> None:
    work = replace(WORK, turns=True)
    assert sampling_bytes(MODEL, slots, work)[0] == 16 * tokens
    assert (WORK.longest, work.longest) == (70, 90)


def test_the_peak_is_that_of_the_largest_work_beside_other_models() -> None:
    small = forecast_sampling(MODEL, [WORK], 8)
    large = forecast_sampling(MODEL, [WORK, replace(WORK, max_tokens=200)], 8, others=33)
    assert large.cache - small.cache == 16 * 8 * 180
    assert (large.others, large.process, large.weights, large.prepared) == (33, 1000, 500, 200)
    assert large.peak == sum(large.parts.values()) == large.as_dict()["peak"]
    elsewhere = forecast_sampling(MODEL, [WORK], 8, elsewhere=True)
    assert (elsewhere.cache, elsewhere.work) == (0, 0)


@pytest.mark.parametrize("slots", [1, 2, 7, 23, 24])
def test_slots_are_the_most_that_the_budget_holds(slots: int) -> None:
    policy = make_policy()
    footprint = measure_footprint(policy, 0, NullProgress())
    budget = forecast_sampling(footprint, [WORK], slots).peak
    with ExitStack() as stack:
        engine, memory = open_engine_within(Free(budget, 0), policy, EngineTable(), [WORK], stack, NullProgress())
    assert (engine.slots, memory.peak) == (slots, budget)


def test_the_stack_closes_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[NativeEngine] = []
    monkeypatch.setattr(NativeEngine, "close", lambda self: closed.append(self))  # noqa: PLW0108  a bound method
    with ExitStack() as stack:
        engine, _ = open_engine_within(Free(10**12, 0), make_policy(), EngineTable(), [WORK], stack, NullProgress())
        assert not closed
    assert closed == [engine]


@pytest.mark.parametrize("change", [lambda policy: policy, lambda policy: replace(policy, body=None)])
def test_prompts_are_measured_as_if_all_was(change: Callable[[LanguageModel], LanguageModel]) -> None:
    policy = change(make_policy())
    whole, prompts = (measure_footprint(policy, 0, NullProgress(), trains=trains) for trains in (True, False))
    found, expected = (forecast_sampling(footprint, [WORK], 8).parts for footprint in (prompts, whole))
    assert found == pytest.approx(expected, abs=2)
    with pytest.raises(ValueError, match="NaN"):
        prompts.activations([(8, [4, 4])], recompute=False)


def test_too_little_memory_is_refused_with_field_value_and_fix() -> None:
    work = replace(WORK, field="evaluation.max_tokens")
    with ExitStack() as stack, pytest.raises(UsageError) as error:
        open_engine_within(Free(10**7, 0), make_policy(), EngineTable(), [work], stack, NullProgress())
    message = str(error.value)
    for words in (
        "run.memory: allows 0.01 GB, but sampling needs at least 0.10 GB",
        "most of it for process (0.10 GB)",
        "one completion of 50 + 20 tokens",
        'e.g. "0.2 GB"',
        "a smaller evaluation.max_tokens or model",
    ):
        assert words in message
