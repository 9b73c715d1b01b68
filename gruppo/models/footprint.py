"""Measures the memory of a model: weights, copies, and the tensors that it keeps for backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from gruppo.models.attention.backends import BACKENDS
from gruppo.models.four_bit import full_count, is_four_bit, scale_bytes
from gruppo.models.ops.cpu.build import why_missing
from gruppo.models.ops.linear import packed
from gruppo.models.packing import Batch, make_batch, score
from gruppo.models.policy import LanguageModel
from gruppo.models.value_head import ScalarModel
from gruppo.utils.progress import Progress
from gruppo.utils.system import release_memory

LATER = 95_000_000  # bytes that libraries allocate on first use: kernels, the table writer; measured on Linux
WORKSPACES = 64 * 2**20  # bytes that matmul libraries take from torch's allocator on first use, on an accelerator

BLOCK_8BIT = 256  # values of a moment that bitsandbytes scales together
SMALLEST_8BIT = 4096  # with optimizer.state = "8bit", parameters with fewer values keep float32 moments

# (prompt tokens, completions, tokens read per completion): one trial more than `_terms` has terms, chosen so that the
# terms can be told apart. A single completion would be kept in other shapes than several.
_TRIALS = ((8, 2, 4), (24, 2, 4), (8, 4, 4), (8, 2, 12), (8, 4, 12), (24, 4, 4), (12, 2, 16), (40, 2, 4))
_PROMPTS = ((8, 0, 0), (24, 0, 0), (40, 0, 0))  # the same for prompts without completions


# The groups of a micro-batch as the model reads them: tokens of the prompt, and of each completion.
Layout = Sequence[tuple[int, Sequence[int]]]


@dataclass(frozen=True)
class Footprint:
    """Memory of a model that does not depend on the workload, and memory per unit of work; in bytes.

    `process`: Python, torch and everything that is resident before the weights are loaded. `gradients`: as many bytes
    as the trainable weights have. `moments`: the optimizer's. `critic`: the weights of a value or reward model, its
    optimizer state and copies. `prepared`: copies of weights in the compute dtype, alive during computation. `kept`:
    what forward keeps for backward, one coefficient for each of `_terms`, NaN if not measured. `cache_token`: keys and
    values of one token in all layers. `state_token`: one hidden state. `logits_token`: the logits of one token in
    float32. `kept_logit`: bytes of a logit that is kept for the backward pass. `wide`: bytes of one number in the
    accumulation dtype. `accelerator`: the policy is not on a CPU. `gathered`: what a rank of several has gathered of
    the other ranks' weights at a time: two layers, and all that is outside of layers. `fused`: the policy is trained by
    gruppo's own decoder. `narrow`: bytes of a number in the compute dtype. `kernels`: gruppo's kernels attend and
    sample in decoding steps. `packed_head`: the copy of the output head that sampling makes.
    """

    process: int
    weights: int
    gradients: int
    moments: int
    reference: int
    critic: int
    prepared: int
    kept: tuple[float, ...]
    layers: int
    cache_token: int
    state_token: int
    logits_token: int
    wide: int
    accelerator: bool = False
    gathered: int = 0
    fused: bool = True
    narrow: int = 4
    kernels: bool = False
    packed_head: int = 0
    kept_logit: int = 4

    def activations(self, layout: Layout, recompute: bool) -> int:
        """Bytes that forward keeps for backward; with recomputation, the input of every layer and all of one layer."""
        kept = sum(rate * term for rate, term in zip(self.kept, _terms(layout), strict=True) if term)
        if not recompute:
            return int(kept)
        return int(kept / self.layers) + self.layers * self.state_token * layout_tokens(layout)


def process_bytes(device: torch.device) -> int:
    """Bytes that this process already uses and that count towards the estimate.

    On a CPU these are the resident bytes. On an accelerator only torch's allocations there count: other models.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss) if device.type == "cpu" else 0


def measure_footprint(
    model: LanguageModel | ScalarModel,
    process: int,
    progress: Progress,
    optimizer_state: str = "float32",
    trains: bool = True,
) -> Footprint:
    """Measure and count the memory of a model. `process`: `process_bytes` from before the weights were loaded.

    `optimizer_state`: the recipe's `optimizer.state`. `trains`: False to measure in a quarter of the time what sampling
    needs: prompts, and no completions. A value or reward model computes no logits.
    """
    scalar, policy = (model, model.policy) if isinstance(model, ScalarModel) else (None, model)
    layer: Any = policy.model.get_output_embeddings()
    config, weight = policy.model.config.get_text_config(), layer.weight
    wide, accelerator = torch.promote_types(policy.dtype, torch.float32).itemsize, policy.device.type != "cpu"
    if policy.attention.name == "flex":  # which pads all trials to the same length
        policy = replace(policy, attention=BACKENDS["sdpa"])
    trained = [each for each in (scalar.module if scalar else policy.model).parameters() if each.requires_grad]
    head = [] if scalar is None else [*scalar.head.parameters()]
    computed = policy if scalar is None else replace(scalar, policy=policy)
    prepared, *kept = _measure_kept(computed, _TRIALS if trains else _PROMPTS, progress)
    release_memory()
    return Footprint(
        process=process + (WORKSPACES if accelerator else LATER),
        weights=_bytes_of([*policy.model.parameters(), *policy.model.buffers(), *head])
        + sum(map(scale_bytes, policy.model.parameters())),
        gradients=_bytes_of(trained),
        moments=moments_bytes(trained, optimizer_state, accelerator),
        reference=_reference_bytes(policy),
        critic=_critic_bytes(policy, optimizer_state),
        prepared=int(prepared) + prepared_bytes(policy),
        kept=tuple(kept),
        layers=max(1, int(config.num_hidden_layers)),
        cache_token=policy.cache_bytes,
        state_token=wide * weight.shape[1],
        logits_token=wide * weight.shape[0] if scalar is None else 0,
        wide=wide,
        accelerator=accelerator,
        gathered=_gathered_bytes(policy),
        fused=policy.body is not None and policy.body.trains,
        narrow=policy.dtype.itemsize,
        kernels=policy.body is not None and why_missing(policy.dtype) is None,
        packed_head=0 if scalar else _packed_bytes(policy.head.weight),
        kept_logit=0 if scalar else policy.head.logit_dtype.itemsize,
    )


def prepared_bytes(policy: LanguageModel) -> int:
    """Bytes of copies of weights that autograd does not keep: those of the fused body, with adapters merged into them,
    or of one layer of 4 bits."""
    small = [full_count(parameter) for parameter in policy.model.parameters() if is_four_bit(parameter)]
    if small:
        return max(small) * policy.dtype.itemsize
    storages = {parameter.untyped_storage().data_ptr() for parameter in policy.model.parameters()}
    if policy.body is None:
        return 0
    copies = [linear.weight for layer in policy.body.prepare(policy.dtype, pack=False) for linear in layer.products]
    return _bytes_of([weight for weight in copies if weight.untyped_storage().data_ptr() not in storages])


def held_bytes(model: ScalarModel) -> int:
    """Bytes of a value or reward model that is not trained: its weights, and their copies in the compute dtype."""
    layers = model.policy.model
    return _bytes_of([*layers.parameters(), *layers.buffers(), *model.head.parameters()]) + prepared_bytes(model.policy)


def moments_bytes(parameters: Sequence[Tensor], state: str, accelerator: bool) -> int:
    """Bytes of the moments of trained parameters in the memory that computes."""
    if state == "cpu" and accelerator:
        return max((2 * parameter.nbytes for parameter in parameters), default=0)
    return sum(_moment_bytes(parameter, state) for parameter in parameters)


def _moment_bytes(parameter: Tensor, state: str) -> int:
    count = parameter.numel()
    if state != "8bit" or count < SMALLEST_8BIT:
        return 2 * parameter.nbytes
    return 2 * (count + 4 * -(-count // BLOCK_8BIT))


def _bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum({tensor.untyped_storage().data_ptr(): tensor.numel() * tensor.itemsize for tensor in tensors}.values())


@torch.no_grad()
def _packed_bytes(weight: Tensor) -> int:
    return 0 if packed(weight) is weight else weight.nbytes


def _gathered_bytes(policy: LanguageModel) -> int:
    """Bytes of two layers, of which one is computed and the next one gathered, and of the weights outside of layers."""
    layers = [_bytes_of([*layer.parameters()]) for layer in policy.layers]
    return _bytes_of([*policy.model.parameters()]) - sum(layers) + 2 * max(layers, default=0)


def _reference_bytes(policy: LanguageModel) -> int:
    """Bytes of `LanguageModel.frozen_copy`: linear layers in the compute dtype, everything else as in the policy."""
    shared = {id(module.weight) for module in policy.model.modules() if isinstance(module, nn.Embedding)}
    linear = [
        parameter
        for module in policy.model.modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in shared
        for parameter in module.parameters()
    ]
    saved = sum(parameter.numel() * (parameter.itemsize - policy.dtype.itemsize) for parameter in linear)
    return _bytes_of([*policy.model.parameters(), *policy.model.buffers()]) - saved


def _critic_bytes(policy: LanguageModel, optimizer_state: str) -> int:
    """Bytes of a value or reward model of the policy's size. All of it is trained, with or without adapters.

    Its gradients reuse the memory of the policy's gradients.
    """
    wide, parameters = torch.promote_types(policy.dtype, torch.float32).itemsize, list(policy.model.parameters())
    count = sum(map(full_count, parameters))
    moments = moments_bytes(parameters, optimizer_state, policy.device.type != "cpu")
    return count * (wide + policy.dtype.itemsize) + moments


def _terms(layout: Layout) -> list[int]:
    """The quantities that the bytes kept for backward can be proportional to.

    These are prompt tokens, completion tokens, completions, the copies of the prompt that precede the completions,
    their attention mask, and with eager attention their attention scores and those of the prompts.
    """
    totals = [0] * 7
    for prompt, completions in layout:
        count, length = len(completions), max(completions, default=0)
        row = length * (prompt + length)
        terms = (prompt, sum(completions), count, count * prompt, row, count * row, prompt * prompt)
        totals = [total + term for total, term in zip(totals, terms, strict=True)]
    return totals


def layout_tokens(layout: Layout) -> int:
    """Tokens that the model reads."""
    return sum(prompt + sum(completions) for prompt, completions in layout)


def _measure_kept(
    model: LanguageModel | ScalarModel, trials: Sequence[tuple[int, int, int]], progress: Progress
) -> list[float]:
    """Bytes that do not grow with the tokens (prepared weights), then bytes per unit of each of `_terms`; NaN for terms
    that all trials lack."""
    rows, kept = [], []
    with (
        (model.policy if isinstance(model, ScalarModel) else model).precision(),
        progress.bar("Measuring memory", len(trials), "trials") as advance,
    ):
        for prompt, count, length in trials:
            layout = [(prompt, [length] * count)]
            rows.append([1.0, *map(float, _terms(layout))])
            kept.append(float(saved_bytes(model, layout)))
            advance(1)
    matrix = torch.tensor(rows, dtype=torch.float64)
    measured = matrix.any(dim=0)
    solved = torch.full((matrix.shape[1],), math.nan, dtype=torch.float64)
    solved[measured] = torch.linalg.solve(matrix[:, measured], torch.tensor(kept, dtype=torch.float64)).clamp(min=0.0)
    return solved.tolist()


def saved_bytes(model: LanguageModel | ScalarModel, layout: Layout) -> int:
    """Bytes that autograd keeps of a forward pass on this layout, except parameters. Call it in `precision()`."""
    scalar, policy = (model, model.policy) if isinstance(model, ScalarModel) else (None, model)
    tensors = [*policy.model.parameters(), *policy.model.buffers(), *(scalar.head.parameters() if scalar else ())]
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a node that referenced its own output would never be freed

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        batch = trial_batch(policy, layout)
        result = score(policy, batch, 1.0) if scalar is None else scalar.numbers(batch)  # alive until all is counted
    del result
    return sum(seen.values())


def trial_batch(policy: LanguageModel, layout: Layout) -> Batch:
    """A micro-batch with this layout and arbitrary tokens."""
    ids: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    members = []
    for index, (prompt, completions) in enumerate(layout):
        end = len(ids) + prompt
        ids += range(1, prompt + 1)
        positions += range(prompt)
        for number, length in enumerate(completions):
            predictors += [end - 1, *range(len(ids), len(ids) + length)]
            ids += range(prompt + number, prompt + number + length)
            positions += range(prompt, prompt + length)
            members.append((index, number, length + 1))
    vocabulary = int(policy.model.config.get_text_config().vocab_size)
    count = len(predictors)
    return make_batch(
        [token % vocabulary for token in ids],
        positions,
        [(prompt, [length for length in completions if length]) for prompt, completions in layout],
        predictors,
        [0] * count,
        {"advantages": [1.0] * count, "weights": [1.0] * count, "sampling_logprobs": [0.0] * count},
        members,
        policy.device,
    )
