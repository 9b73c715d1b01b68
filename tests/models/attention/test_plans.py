"""Every attention backend against each sequence alone, with gradients, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from gruppo.models.attention.flex import FlexAttention
from gruppo.models.attention.interface import Layer
from gruppo.models.attention.sdpa import SdpaAttention
from gruppo.models.attention.sequences import Repeat, prompt_and_completions
from tests.models.attention.references import ON_CPU, Groups, each_sequence_alone, seen_of

CPU = torch.device("cpu")
SINKS = torch.tensor([0.3, -1.0, 0.8, 2.0], dtype=torch.float64)
LAYERS = {
    "plain": Layer(0, 0.3),
    "window": Layer(0, 0.3, window=3),
    "window of 1": Layer(0, 0.3, window=1),
    "wide window": Layer(0, 0.3, window=1000),
    "cap": Layer(0, 0.7, softcap=1.5),
    "cap and window": Layer(0, 0.7, softcap=1.5, window=4),
    "sinks": Layer(0, 0.3, sinks=SINKS),
    "sinks and window": Layer(0, 0.3, sinks=SINKS, window=3),
}
LAYOUTS: dict[str, Groups] = {
    "even": [(5, (4, 4, 4)), (3, (6, 6))],
    "uneven": [(7, (1, 9, 2, 4)), (1, (1,)), (2, (16,)), (4, (3, 1))],
    "prompts alone": [(4, ()), (1, ()), (6, ())],
    "some prompts alone": [(4, ()), (3, (2, 5)), (9, ()), (2, (1,))],
    "one token": [(1, ())],
}
HEADS = {
    "multi-head": (4, 4, 8, 8),
    "grouped": (4, 2, 8, 8),
    "one key head": (4, 1, 8, 8),
    "narrow values": (4, 2, 8, 5),
}


def heads_of(groups: Groups, shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random queries, keys, values and gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(prompt + sum(completions) for prompt, completions in groups)
    queries, keys, width, value = shape
    sizes = ((queries, tokens, width), (keys, tokens, width), (keys, tokens, value), (tokens, queries, value))
    return [torch.randn(1, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def with_gradients(attend, layer: Layer, heads: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of queries, keys, values and sinks."""
    inputs = [tensor.clone().requires_grad_() for tensor in heads[:3]]
    if layer.sinks is not None:
        sinks = layer.sinks.clone().requires_grad_()
        layer = Layer(layer.index, layer.scale, layer.softcap, layer.window, sinks)
        inputs.append(sinks)
    output = attend(layer, *inputs[:3])
    return [output.detach(), *torch.autograd.grad(output, inputs, heads[3])]


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plan_equals_each_sequence_alone(backend: str, layer: str, layout: str) -> None:
    groups = LAYOUTS[layout]
    for shape in HEADS.values():
        heads = heads_of(groups, shape)
        plan = ON_CPU[backend](groups, CPU)
        found = with_gradients(plan.attend, LAYERS[layer], heads)
        expected = with_gradients(lambda *values: each_sequence_alone(groups, *values), LAYERS[layer], heads)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("backend", [name for name in ON_CPU if name != "cpu"])
def test_the_order_of_groups_and_completions_does_not_matter(backend: str) -> None:
    """The gradient of a prompt is that of its own completions, wherever they are."""
    groups, layer = [(3, (2, 5, 1)), (2, (4, 4))], LAYERS["plain"]
    query, key, value, grad = heads_of(groups, HEADS["grouped"])
    (first, second) = prompt_and_completions(groups)
    order = [second[0], second[1][1], second[1][0], first[0], first[1][2], first[1][0], first[1][1]]
    places = torch.cat([torch.from_numpy(part) for part in order])
    turned = [(2, (4, 4)), (3, (1, 2, 5))]
    found = with_gradients(ON_CPU[backend](groups, CPU).attend, layer, [query, key, value, grad])
    moved = [*(tensor[:, :, places] for tensor in (query, key, value)), grad[:, places]]
    again = with_gradients(ON_CPU[backend](turned, CPU).attend, layer, moved)
    torch.testing.assert_close(again[0], found[0][:, places], atol=1e-12, rtol=0)
    for one, other in zip(again[1:], found[1:], strict=True):
        torch.testing.assert_close(one, other[:, :, places], atol=1e-12, rtol=0)


def test_repeated_gradients_are_summed_in_float32() -> None:
    """256 gradients of 1 and one of 256: in bfloat16, which has 8 bits, the sum of them would stay at 256."""
    source = torch.zeros(257, dtype=torch.long).numpy()
    repeat = Repeat(source, 1, CPU)
    grad = torch.ones(257, 1, dtype=torch.bfloat16)
    grad[0] = 256
    assert repeat.backward(grad).item() == 512
    rows = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    repeat(rows).backward(grad)
    assert rows.grad is not None
    assert rows.grad.item() == 512


class _Operations(TorchDispatchMode):
    """Records the names of the operations inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["sdpa", "varlen"])
def test_gradients_of_shared_prompts_are_summed_without_indexed_additions(backend: str) -> None:
    """Their order on CUDA would differ from run to run. All other operations have a fixed order."""
    groups = LAYOUTS["uneven"]
    heads = [tensor.requires_grad_() for tensor in heads_of(groups, HEADS["grouped"])]
    output = ON_CPU[backend](groups, CPU).attend(LAYERS["plain"], *heads[:3])
    with _Operations() as backward:
        torch.autograd.grad(output, heads[:3], heads[3])
    assert "index_select" in backward.names
    assert not {name for name in backward.names if any(part in name for part in ("index_add", "index_put", "scatter"))}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_padded_to_less_than_twice_their_tokens(layout: str) -> None:
    groups = LAYOUTS[layout]
    plan = SdpaAttention(groups, CPU)
    needed = sum(prompt + length for prompt, lengths in groups for length in lengths or (0,))
    assert sum(rows.places for rows in plan.rows) < 2 * needed


def test_kernels_get_no_repeated_heads_and_no_masks(monkeypatch) -> None:
    """Layers without a window: torch's kernel can skip what is not seen. Grouped heads stay as they are."""
    groups, calls = LAYOUTS["uneven"], []

    def kernel(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        calls.append((query.shape[1], key.shape[1], value.shape[1], options["attn_mask"], options["is_causal"]))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)

    monkeypatch.setattr("gruppo.models.attention.sdpa.scaled_dot_product_attention", kernel)
    SdpaAttention(groups, CPU).attend(LAYERS["plain"], *heads_of(groups, HEADS["grouped"])[:3])
    assert calls
    assert set(calls) == {(4, 2, 2, None, True)}


def test_masks_are_made_once_per_window() -> None:
    groups = LAYOUTS["uneven"]
    heads = heads_of(groups, HEADS["grouped"])[:3]
    rows, flex = SdpaAttention(groups, CPU), ON_CPU["flex"](groups, CPU)
    assert isinstance(flex, FlexAttention)
    for plan in (rows, flex):
        plan.attend(LAYERS["window"], *heads)
    masks = dict(rows._masks), flex.block_mask(3)
    for plan in (rows, flex):
        plan.attend(LAYERS["cap and window"], *heads)
        plan.attend(LAYERS["window"], *heads)
    assert all(rows._masks[key] is mask for key, mask in masks[0].items())
    assert flex.block_mask(3) is masks[1]


# FlexAttention itself. torch has no backward pass of it for a CPU.

LONG: dict[str, Groups] = {
    "one prompt": [(700, ())],
    "long prompt": [(300, (40, 1, 129, 200))],
    "many groups": [(20, (30, 5, 50)), (130, (128, 128)), (64, (64, 300)), (1, (1, 1, 1)), (90, ())],
    "whole blocks": [(128, (128, 256)), (256, (128,))],
}


@pytest.mark.parametrize("window", [None, 1, 50, 128, 200, 10_000])
@pytest.mark.parametrize("layout", LONG)
def test_block_mask_equals_the_one_that_torch_computes(layout: str, window: int | None) -> None:
    """torch evaluates the mask for all pairs of tokens; gruppo computes the blocks from the lengths."""
    groups = LONG[layout]
    plan = FlexAttention(groups, CPU, flex_attention)
    mask, tokens = plan.block_mask(window), plan.length
    expected = create_block_mask(mask.mask_mod, None, None, tokens, tokens, device="cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(expected, name)), name
    for name in ("kv", "full_kv", "q", "full_q"):
        numbers, indices, others = (
            getattr(mask, f"{name}_num_blocks"), getattr(mask, f"{name}_indices"), getattr(expected, f"{name}_indices")
        )  # fmt: skip
        for row, count in enumerate(numbers[0, 0].tolist()):
            assert torch.equal(indices[0, 0, row, :count], others[0, 0, row, :count])
    seen = seen_of(mask, tokens)
    assert torch.equal(seen[: plan.tokens, : plan.tokens], visible(groups, window))
    assert torch.equal(seen[plan.tokens :], torch.eye(tokens, dtype=torch.bool)[plan.tokens :])  # padding


def visible(groups: Groups, window: int | None) -> Tensor:
    """The keys that each token sees, pair by pair."""
    rows = []
    for group, (prompt, completions) in enumerate(groups):
        rows += [(group, -1, position) for position in range(prompt)]
        rows += [(group, n, prompt + t) for n, length in enumerate(completions) for t in range(length)]
    columns = torch.tensor(rows).T
    query, key = columns[:, :, None], columns[:, None, :]
    same = (query[0] == key[0]) & ((query[1] == key[1]) | (key[1] == -1))
    before = query[2] - key[2]
    return same & (before >= 0) & (before < (window or 10**9))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("layout", ["long prompt", "many groups"])
def test_forward_pass_of_flex_attention(layer: str, layout: str) -> None:
    groups, plan = LONG[layout], FlexAttention(LONG[layout], CPU, flex_attention)
    query, key, value, _ = heads_of(groups, HEADS["grouped"], torch.float32)
    with torch.no_grad():
        found = plan.attend(LAYERS[layer], query, key, value)
        expected = ON_CPU["cpu"](groups, CPU).attend(LAYERS[layer], query, key, value)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
