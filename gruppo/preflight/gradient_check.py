"""The trainer's gradient beside finite differences of the same objective, on the model that is to be trained.

(L(θ + εv) - L(θ - εv)) / 2ε should be ∇L·v. v has random signs; ε is 1e-5 of the weights' norm, and L is taken in a
float64 copy that transformers' own modules compute, so that neither rounding nor the trainer's own kernels stand on
both sides. Where there is no memory for that copy, v is the gradient's own direction and L is float32's: that shows a
gradient of another length, but not one that leaves something out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gruppo.algorithms.credit import assign_advantages
from gruppo.algorithms.filtering import mark_trained, select
from gruppo.config.method_section import Critic, Method
from gruppo.config.recipe import Recipe
from gruppo.models.lora import AdaptedModel
from gruppo.models.packing import Batch, pack
from gruppo.models.policy import LanguageModel
from gruppo.training.memory_estimate import process_bytes
from gruppo.training.policy_loss import batch_loss, token_weights
from gruppo.types import Completion, Group, Reward, Steps
from gruppo.utils.metrics import Metrics
from gruppo.utils.system import free_memory, release_memory

DIRECTIONS = 2
TOKENS = 12  # of a completion that the objective is taken of
STEP = 1e-5  # of the weights' norm
BYTES = 8 + 4 + 1  # a weight: the float64 copy, what it is made from, and a sign


@dataclass(frozen=True)
class Derivative:
    """Directional derivatives by backward and by finite differences, and the dtypes of both sides."""

    backward: Sequence[float]
    differences: Sequence[float]
    backward_dtype: str
    differences_dtype: str

    @property
    def error(self) -> float:
        """|backward - differences| / |differences|, over all directions."""
        apart = math.dist(self.backward, self.differences)
        size = math.hypot(*self.differences)
        return apart / size if size else math.inf if apart else 0.0


def shortened(groups: Sequence[Group], most: int) -> list[Group]:
    """The groups anew, with `most` completions at the most, cut to a few tokens."""
    return [
        Group(group.prompt, [_cut(each) for each in group.completions[:most]], list(group.rewards[:most]))
        for group in groups
    ]


def _cut(completion: Completion) -> Completion:
    return replace(
        completion,
        token_ids=completion.token_ids[:TOKENS],
        sampling_logprobs=completion.sampling_logprobs[:TOKENS],
        mask=completion.mask[:TOKENS],
    )


def with_arbitrary_rewards(groups: Sequence[Group], method: Method) -> list[Group]:
    """The groups with rewards that differ, half of them right, and with steps where the method learns from steps."""
    source = np.random.default_rng(0)
    made = []
    for group in groups:
        rewards = []
        for number, completion in enumerate(group.completions):
            value = method.success_threshold + (1 if number % 2 else -1) * (0.5 + source.random())
            last = len(completion.token_ids) - 1
            ends = tuple(sorted({last // 2, last}))
            steps = {"step": Steps(tuple(source.random(len(ends)).tolist()), ends)} if method.credit == "step" else {}
            rewards.append(Reward(value, {}, steps=steps))
        made.append(Group(group.prompt, group.completions, rewards))
    return made


def signal(groups: Sequence[Group], method: Method, critic: Critic, weights: dict[str, float] | None = None) -> None:
    """Fill in the advantages that these groups would have at the start of a run, where policy and reference are the
    same and a value model expects 0."""
    mark_trained(groups, method.mask_truncated)
    select(groups, method)
    for group in groups:
        zeros = [[0.0] * len(completion.token_ids) for completion in group.completions]
        group.old_logprobs, group.ref_logprobs = list(zeros), list(zeros)
        group.values = [[*each, 0.0] for each in zeros] if method.needs_critic else []
    assign_advantages(groups, method, Metrics(), weights, critic)


def compare(
    policy: LanguageModel, groups: Sequence[Group], recipe: Recipe, micro_batch_tokens: int, allowed: int
) -> Derivative | None:
    """The comparison on these groups, whose rewards are known; None where the objective has no gradient on them, or
    where there is no memory and products are bfloat16. `allowed`: bytes that the process may hold."""
    method, temperature = _smooth(recipe.method), recipe.sampling.temperature
    exact = policy if isinstance(policy, AdaptedModel) else replace(policy, dtype=_wide(policy.dtype))
    signal(groups, method, recipe.critic)
    weights = token_weights(method, recipe.sampling.max_tokens)
    batches = pack(groups, weights, micro_batch_tokens, with_kl=method.kl_in_loss, device=policy.device)
    if not batches:
        return None
    parameters = {name: each for name, each in exact.model.named_parameters() if each.requires_grad}
    room = free_memory(policy.device)
    if policy.device.type == "cpu":
        room = min(room, allowed - process_bytes(policy.device))
    count = sum(each.numel() for each in exact.model.parameters())
    wide = policy.device.type != "mps" and count * BYTES <= room
    copy = exact.float64_copy() if wide else None
    try:
        backward = _gradients(exact, batches, method, temperature, parameters)
        if not any(bool(each.any()) for each in backward.values()):
            return None
        if copy is None and exact.dtype == torch.bfloat16:
            return None
        whole = _without_detached(method)
        if copy is not None:
            made = _along_signs(copy, batches, whole, temperature, backward)
        else:
            made = _along_gradient(exact, batches, whole, temperature, backward)
    finally:
        exact.model.zero_grad(set_to_none=True)
        del copy
        release_memory()
    return Derivative(*made, _name(exact.dtype), "float64" if wide else _name(exact.dtype))


def _smooth(method: Method) -> Method:
    """The method with clips that leave the start, where the ratio is 1, on a smooth stretch, and without a mask for
    what is cut, as all is."""
    clips = {name: max(getattr(method, name), 1e-2) for name in ("clip_low", "clip_high")}
    return method.model_copy(update={**clips, "mask_truncated": False})


def _without_detached(method: Method) -> Method:
    """The method with a policy term that has the same gradient at the start and detaches nothing: the value of one that
    detaches its ratio moves otherwise than its gradient says."""
    detached = method.surrogate == "clipped-weight"
    return method.model_copy(update={"surrogate": "log-likelihood"}) if detached else method


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _gradients(
    policy: LanguageModel, batches: Sequence[Batch], method: Method, temperature: float,
    parameters: dict[str, torch.nn.Parameter],
) -> dict[str, Tensor]:  # fmt: skip
    """By backward, as a training step takes it; afterwards the batches hold π_old and π_ref."""
    policy.model.zero_grad(set_to_none=True)
    with policy.precision():
        for batch in batches:
            loss = batch_loss(policy, policy, batch, method, temperature, Metrics())
            with torch.autocast(policy.device.type, enabled=False):
                loss.backward()
    return {name: each.grad for name, each in parameters.items() if each.grad is not None}


@torch.no_grad()
def _loss(policy: LanguageModel, batches: Sequence[Batch], method: Method, temperature: float) -> float:
    with policy.precision():
        return math.fsum(
            float(batch_loss(policy, None, batch, method, temperature, Metrics(), first=False)) for batch in batches
        )


@torch.no_grad()
def _along_signs(
    copy: LanguageModel, batches: Sequence[Batch], method: Method, temperature: float, gradients: dict[str, Tensor]
) -> tuple[list[float], list[float]]:
    """Both derivatives along random signs, the differences in the float64 copy."""
    for batch in batches:
        batch.old_logprobs = None if batch.old_logprobs is None else batch.old_logprobs.double()
        batch.ref_logprobs = None if batch.ref_logprobs is None else batch.ref_logprobs.double()
    held = {name: each for name, each in copy.model.named_parameters() if name in gradients}
    count = sum(each.numel() for each in held.values())
    size = math.sqrt(math.fsum(float(each.square().sum()) for each in held.values()))
    step = STEP * (size or 1.0) / math.sqrt(count)  # of each weight
    generator = torch.Generator().manual_seed(0)
    backward, differences = [], []
    for _ in range(DIRECTIONS):
        signs = {
            name: torch.randint(0, 2, each.shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1).to(each.device)
            for name, each in held.items()
        }
        backward.append(math.fsum(float((gradients[name].double() * signs[name]).sum()) for name in held))
        losses = []
        for move in (step, -2 * step):
            for name, each in held.items():
                each.add_(signs[name], alpha=move)
            copy.generation.advance()
            losses.append(_loss(copy, batches, method, temperature))
        for name, each in held.items():
            each.add_(signs[name], alpha=step)
        differences.append((losses[0] - losses[1]) / (2 * step))
    return backward, differences


@torch.no_grad()
def _along_gradient(
    policy: LanguageModel, batches: Sequence[Batch], method: Method, temperature: float, gradients: dict[str, Tensor]
) -> tuple[list[float], list[float]]:
    """The gradient's norm, and the difference along it, in the policy itself, which is put back."""
    held = {name: each for name, each in policy.model.named_parameters() if name in gradients}
    norm = math.sqrt(math.fsum(float(each.double().square().sum()) for each in gradients.values()))
    kept = {name: each.clone() for name, each in held.items()}
    step, losses = 1e-3 / norm**2, []
    for sign in (1, -1):
        for name, each in held.items():
            each.copy_(kept[name]).add_(gradients[name], alpha=sign * step)
        policy.generation.advance()
        losses.append(_loss(policy, batches, method, temperature))
    for name, each in held.items():
        each.copy_(kept[name])
    policy.generation.advance()
    return [norm], [(losses[0] - losses[1]) / (2 * step * norm)]
