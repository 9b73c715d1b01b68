"""Freed slots are refilled without passes of their own: forward passes, rows and copies, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.native import engine as native
from gruppo.engines.native.engine import DecodingOptions, NativeEngine
from gruppo.engines.native.kv_cache import PageStore
from gruppo.engines.native.layout import DecodingLayout
from gruppo.models.logprobs import OutputHead
from gruppo.models.policy import LanguageModel
from tests.conftest import make_policy

SLOTS = 6
# No two slots finish together, so that every refill happens beside completions that go on.
LIMITS = [[3, 9, 14, 20], [25, 30, 7, 11], [5, 8, 2, 13], [4, 6, 1, 10]]


@pytest.fixture
def policy() -> LanguageModel:
    """Without EOS tokens, so that limits alone end completions."""
    return replace(make_policy(initializer_range=0.1), eos_ids=())


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """What the engine does: passes of the model and of the output head, with their rows, layouts and copied pages."""
    found: Counter = Counter()

    def count(owner: Any, name: str, seen: Callable[..., dict[str, int]]) -> None:
        original = getattr(owner, name)

        def counted(*arguments: Any) -> Any:
            found.update(seen(*arguments))
            return original(*arguments)

        monkeypatch.setattr(owner, name, counted)

    def passes(_: Any, ids: Tensor, *__: Any) -> dict[str, int]:
        name = "decoding" if ids.shape[1] == 1 else "prompt"
        return {f"{name} passes": 1, f"{name} rows": ids.numel()}

    count(LanguageModel, "hidden_states", passes)
    count(OutputHead, "part_logits", lambda _, hidden, __: {"head passes": 1, "head rows": len(hidden)})
    count(DecodingLayout, "__init__", lambda *_: {"layouts": 1})
    count(PageStore, "fill_gap", lambda *_: {"copies": 1})
    return found


def requests() -> list[Request]:
    return [
        Request(tuple(range(3, 8 + index)), [(index, number) for number in range(4)], limits=limits)
        for index, limits in enumerate(LIMITS)
    ]


def test_first_tokens_are_sampled_with_those_of_the_other_slots(policy: LanguageModel, counts: Counter) -> None:
    """The first completions fill all slots: their first tokens need no decoding step. Each later one has one row more
    than tokens to read, in the step that samples its first token."""
    groups = NativeEngine(policy, SLOTS).generate(requests(), SamplingParams(1.0, 30))
    lengths = [[len(completion.token_ids) for completion in group] for group in groups]
    assert lengths == LIMITS
    tokens = sum(map(sum, LIMITS))
    assert (counts["prompt passes"], counts["prompt rows"]) == (1, 5 + 6 + 7 + 8)
    assert counts["head passes"] == counts["decoding passes"] + 1
    assert (counts["head rows"], counts["decoding rows"]) == (tokens, tokens - SLOTS)


def test_pages_are_copied_only_when_nothing_waits(policy: LanguageModel, counts: Counter) -> None:
    NativeEngine(policy, SLOTS).generate(requests(), SamplingParams(1.0, 30))
    assert counts["copies"] < SLOTS
    counts.clear()
    NativeEngine(policy, 16).generate(requests(), SamplingParams(1.0, 30))
    assert counts["copies"] > SLOTS, "nothing ever waits"


@pytest.mark.parametrize("most", [1, 12, 4096])
@pytest.mark.parametrize("options", [DecodingOptions(torch.float64), DecodingOptions(torch.float64, 4, 1)])
def test_prompts_in_parts_and_refills_change_no_token(
    monkeypatch: pytest.MonkeyPatch, options: DecodingOptions, most: int
) -> None:
    policy, params = make_policy(torch.float64, initializer_range=0.1), SamplingParams(1.0, 30)
    expected = NativeEngine(policy, 16).generate(requests(), params)
    monkeypatch.setattr(native, "PREFILL_TOKENS", most)
    for slots in (1, 2, SLOTS, 15):
        found = NativeEngine(policy, slots, options).generate(requests(), params)
        for group, other in zip(found, expected, strict=True):
            for one, same in zip(group, other, strict=True):
                assert one.token_ids == same.token_ids
                assert one.sampling_logprobs == pytest.approx(same.sampling_logprobs, abs=1e-12)


def test_a_repeated_call_is_equal_to_the_last_bit(policy: LanguageModel) -> None:
    engine, params = NativeEngine(policy, SLOTS), SamplingParams(1.0, 30)
    assert engine.generate(requests(), params) == engine.generate(requests(), params)
