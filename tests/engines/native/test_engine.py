"""Parts of the native engine: transfers, pages, and the options that it has on an accelerator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.native import engine as native
from gruppo.engines.native.engine import DecodingOptions, NativeEngine
from gruppo.engines.native.kv_cache import PAGE_TOKENS, PageStore, room
from gruppo.engines.native.transfer import Download
from gruppo.models.attention.interface import Layer
from gruppo.types import Completion
from gruppo.utils.transfer import upload
from tests.conftest import make_policy

CPU = torch.device("cpu")


def generate(options: DecodingOptions, dtype: torch.dtype, params: SamplingParams) -> list[Completion]:
    policy = make_policy(dtype, initializer_range=0.1)
    requests = [Request(tuple(range(3, 9 + size)), [(size, number) for number in range(6)]) for size in range(4)]
    return [
        completion for group in NativeEngine(policy, 24, options).generate(requests, params) for completion in group
    ]


def test_arrays_keep_their_shapes_and_numbers() -> None:
    arrays = [np.arange(6).reshape(2, 3), np.array([7]), np.zeros((0, 2), dtype=np.int64)]
    assert [tensor.tolist() for tensor in upload(arrays, torch.long, CPU)] == [[[0, 1, 2], [3, 4, 5]], [7], []]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_and_logprobs_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    logprobs = torch.tensor([-0.1, -1e-30, float("nan"), -123.456], dtype=dtype)
    tokens, read = Download(torch.tensor([0, 5, 151_935, 2]), logprobs).result()
    assert tokens.tolist() == [0, 5, 151_935, 2]
    assert read.tobytes() == logprobs.numpy().tobytes()


@pytest.mark.parametrize("lag", [0, 1])
def test_a_decoding_step_needs_one_transfer(monkeypatch: pytest.MonkeyPatch, lag: int) -> None:
    """One download per step; uploads only when rows or pages change, not once per token."""
    counts = {"upload": 0, "download": 0}

    def counting(name: str, function: Callable) -> Callable:
        def call(*args: object) -> object:
            counts[name] += 1
            return function(*args)

        return call

    for module in (native, native.DecodingLayout.__module__, native.SlotState.__module__):
        name = f"{module}.upload" if isinstance(module, str) else f"{module.__name__}.upload"
        monkeypatch.setattr(name, counting("upload", upload))
    monkeypatch.setattr(native, "Download", counting("download", Download))
    options, tokens = DecodingOptions(torch.float32, page_tokens=64, lag=lag), 50
    generate(options, torch.float32, SamplingParams(1.0, tokens, min_tokens=tokens))
    assert counts["download"] == tokens + lag
    assert counts["upload"] == 3, "prompts, slots, and one layout"


def test_a_completion_that_ended_is_not_sampled_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a lag, what was sampled behind an end is dropped: same tokens, same log-probabilities, same count."""
    params = SamplingParams(2.0, 40)
    plain = generate(DecodingOptions(torch.float32), torch.float32, params)
    late = generate(DecodingOptions(torch.float32, lag=1), torch.float32, params)
    assert [completion.token_ids for completion in late] == [completion.token_ids for completion in plain]
    assert len({len(completion.token_ids) for completion in plain}) > 5
    for one, other in zip(plain, late, strict=True):
        assert one.sampling_logprobs == pytest.approx(other.sampling_logprobs, abs=1e-5)


@pytest.mark.parametrize("page_tokens", [1, 3, 64])
def test_pages_change_nothing(page_tokens: int) -> None:
    params = SamplingParams(1.5, 40)
    plain = generate(DecodingOptions(torch.float64), torch.float64, params)
    paged = generate(DecodingOptions(torch.float64, page_tokens=page_tokens), torch.float64, params)
    assert [completion.token_ids for completion in paged] == [completion.token_ids for completion in plain]
    for one, other in zip(plain, paged, strict=True):
        assert one.sampling_logprobs == pytest.approx(other.sampling_logprobs, abs=1e-12)


def test_keys_and_values_in_bfloat16_stay_within_the_stated_bound() -> None:
    """The mean difference of log-probabilities, greedy over the same tokens, to float32 keys and values.

    docs/decisions.md states the bound: 0.05 nats.
    """
    params = SamplingParams(1.0, 24)
    wide = generate(DecodingOptions(torch.float32, page_tokens=8), torch.float32, params)
    narrow = generate(DecodingOptions(torch.bfloat16, page_tokens=8), torch.float32, params)
    differences = []
    for one, other in zip(wide, narrow, strict=True):
        for place, pair in enumerate(zip(one.sampling_logprobs, other.sampling_logprobs, strict=False)):
            if one.token_ids[: place + 1] != other.token_ids[: place + 1]:
                break
            differences.append(abs(pair[0] - pair[1]))
    assert len(differences) > 100
    assert 0 < float(np.mean(differences)) < 0.05


def test_pages_are_allocated_when_needed_and_never_copied() -> None:
    store = PageStore(4, 10, 4, torch.float32)
    pair = torch.zeros(2, 3, 8), torch.zeros(2, 3, 16)
    store.describe(0, pair)
    assert store.reserve(np.array([0, 2]), np.array([3, 4]))
    assert store.table.tolist() == [[0, -1, -1], [-1, -1, -1], [1, -1, -1], [-1, -1, -1]]
    first = store.pair(0, 0)
    assert [tensor.shape for tensor in first] == [(2, 2, 4, 8), (2, 2, 4, 16)]
    assert not store.reserve(np.array([0, 2]), np.array([4, 4]))
    assert store.reserve(np.array([0, 1]), np.array([5, 10]))
    assert store.block_starts == [0, 2, 6]
    assert store.pair(0, 0)[0].data_ptr() == first[0].data_ptr()
    store.release(0)
    assert store.reserve(np.array([3]), np.array([10]))
    assert store.table[3].tolist() == [0, 2, 6], "freed pages first"
    assert store.reserve(np.array([0]), np.array([10]))
    assert store.reserve(np.array([2]), np.array([10]))
    assert store.block_starts[-1] == 12, "never more than all sequences can need"
    assert sorted(store.table.ravel().tolist()) == list(range(12))


def test_what_a_page_holds_is_what_was_stored() -> None:
    store = PageStore(2, 10, 4, torch.float32)
    keys, values = torch.randn(2, 9, 8), torch.randn(2, 9, 8)
    store.describe(3, (keys, values))
    store.reserve(np.array([1]), np.array([9]))
    store.store(3, 1, (keys, values))
    pages = [store.locate(page) for page in store.table[1].tolist()]
    for number, expected in enumerate((keys, values)):
        read = torch.cat([store.pair(3, block)[number][index] for block, index in pages], dim=1)
        assert torch.equal(read[:, :9], expected)
        assert not read[:, 9:].any()


def test_pages_take_room_as_a_whole() -> None:
    assert [room(tokens, None) for tokens in (1, 255, 300)] == [1, 255, 300]
    assert [room(tokens, PAGE_TOKENS) for tokens in (1, 255, 256, 257, 1000)] == [1, 255, 256, 512, 1024]


def test_layers_are_allocated_as_they_come() -> None:
    cache = native.KVCache(2, 8, 1, 3, torch.float32, page_tokens=4)
    tensor = torch.ones(1, 3, 8)
    cache.store_prompts(Layer(0, 1.0), (tensor, tensor), [0], [3])
    assert cache.prompts.pair(0, 0)[0].shape == (1, 1, 3, 8)
    cache.users[0] = 1
    cache.leave_prompt(0)
    assert not cache.prompts.used.any()
