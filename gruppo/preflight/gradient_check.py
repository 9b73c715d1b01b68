"""The trainer's gradient compared with finite differences of the same objective, on the model to be trained.

(L(θ + εv) - L(θ - εv)) / 2ε should equal ∇L·v. v has random signs, and ε is 1e-5 of the weights' norm. L is computed
in a float64 copy with transformers' own modules, so that the two sides share neither rounding nor the trainer's
kernels. Without memory for the copy, v is the direction of the gradient and L is computed in float32. This reveals a
gradient of wrong length, but not one with missing parts.
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
from gruppo.models.footprint import process_bytes
from gruppo.models.lora import AdaptedModel
from gruppo.models.packing import Batch, pack
from gruppo.models.policy import LanguageModel
from gruppo.training.policy_loss import batch_loss, token_weights
from gruppo.types import Completion, Group, Reward, Steps
from gruppo.utils.metrics import Metrics
from gruppo.utils.system import free_memory, release_memory

DIRECTIONS = 2
TOKENS = 12  # maximum tokens per completion
STEP = 1e-5  # relative to the weights' norm
BYTES = 8 + 4 + 1  # per weight: the float64 copy, the float32 copy it is converted from, and a sign


@dataclass(frozen=True)
class Derivative:
    """Directional derivatives from backward and from finite differences, with the dtypes of both."""

    backward: Sequence[float]
    differences: Sequence[float]
    backward_dtype: str
    differences_dtype: str

    @property
    def error(self) -> float:
        """|backward - differences| / |differences|, over all directions."""
        distance = math.dist(self.backward, self.differences)
        size = math.hypot(*self.differences)
        return distance / size if size else math.inf if distance else 0.0


def shortened(groups: Sequence[Group], most: int) -> list[Group]:
    """New groups with at most `most` completions each, truncated to `TOKENS` tokens."""
    return [
        Group(
            group.prompt,
            [_truncated(completion) for completion in group.completions[:most]],
            list(group.rewards[:most]),
        )
        for group in groups
    ]


def _truncated(completion: Completion) -> Completion:
    return replace(
        completion,
        token_ids=completion.token_ids[:TOKENS],
        sampling_logprobs=completion.sampling_logprobs[:TOKENS],
        mask=completion.mask[:TOKENS],
    )


def with_arbitrary_rewards(groups: Sequence[Group], method: Method) -> list[Group]:
    """The groups with arbitrary, different rewards: half of the completions are correct.

    If the method learns from step rewards, completions have steps too.
    """
    source = np.random.default_rng(0)
    rewarded = []
    for group in groups:
        rewards = []
        for number, completion in enumerate(group.completions):
            value = method.success_threshold + (1 if number % 2 else -1) * (0.5 + source.random())
            last = len(completion.token_ids) - 1
            ends = tuple(sorted({last // 2, last}))
            steps = {"step": Steps(tuple(source.random(len(ends)).tolist()), ends)} if method.credit == "step" else {}
            rewards.append(Reward(value, {}, steps=steps))
        rewarded.append(Group(group.prompt, group.completions, rewards))
    return rewarded


def fill_advantages(
    groups: Sequence[Group], method: Method, critic: Critic, weights: dict[str, float] | None = None
) -> None:
    """Fill in the advantages that these groups would have at the start of a run.

    At that point, policy and reference are the same, and the value model predicts 0.
    """
    mark_trained(groups, method.mask_truncated)
    select(groups, method)
    for group in groups:
        zeros = [[0.0] * len(completion.token_ids) for completion in group.completions]
        group.old_logprobs, group.ref_logprobs = list(zeros), list(zeros)
        group.values = [[*row, 0.0] for row in zeros] if method.needs_critic else []
    assign_advantages(groups, method, Metrics(), weights, critic)


def compare(
    policy: LanguageModel, groups: Sequence[Group], recipe: Recipe, micro_batch_tokens: int, allowed: int
) -> Derivative | None:
    """Compare both derivatives on groups with known rewards.

    `allowed`: bytes that the process may use. None if the objective has no gradient on these groups, or if there is no
    memory for a float64 copy and matmuls are in bfloat16.
    """
    method, temperature = _smooth(recipe.method), recipe.sampling.temperature
    exact = policy if isinstance(policy, AdaptedModel) else replace(policy, dtype=_at_least_float32(policy.dtype))
    fill_advantages(groups, method, recipe.critic)
    weights = token_weights(method, recipe.sampling.max_tokens)
    batches = pack(groups, weights, micro_batch_tokens, with_kl=method.kl_in_loss, device=policy.device)
    if not batches:
        return None
    parameters = {name: weight for name, weight in exact.model.named_parameters() if weight.requires_grad}
    room = free_memory(policy.device)
    if policy.device.type == "cpu":
        room = min(room, allowed - process_bytes(policy.device))
    count = sum(weight.numel() for weight in exact.model.parameters())
    in_float64 = policy.device.type != "mps" and count * BYTES <= room
    copy = exact.float64_copy() if in_float64 else None
    try:
        backward = _gradients(exact, batches, method, temperature, parameters)
        if not any(bool(gradient.any()) for gradient in backward.values()):
            return None
        if copy is None and exact.dtype == torch.bfloat16:
            return None
        differentiable = _without_detached(method)
        if copy is not None:
            derivatives = _along_signs(copy, batches, differentiable, temperature, backward)
        else:
            derivatives = _along_gradient(exact, batches, differentiable, temperature, backward)
    finally:
        exact.model.zero_grad(set_to_none=True)
        del copy
        release_memory()
    return Derivative(*derivatives, _name(exact.dtype), "float64" if in_float64 else _name(exact.dtype))


def _smooth(method: Method) -> Method:
    """The method with clip ranges in which the initial ratio of 1 is a smooth point, and without `mask_truncated`,
    because all completions are truncated."""
    clips = {name: max(getattr(method, name), 1e-2) for name in ("clip_low", "clip_high")}
    return method.model_copy(update={**clips, "mask_truncated": False})


def _without_detached(method: Method) -> Method:
    """The method with a policy term that has the same gradient at the start and detaches nothing.

    If a term detaches its ratio, its value does not change as its gradient says.
    """
    detached = method.surrogate == "clipped-weight"
    return method.model_copy(update={"surrogate": "log-likelihood"}) if detached else method


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _gradients(
    policy: LanguageModel, batches: Sequence[Batch], method: Method, temperature: float,
    parameters: dict[str, torch.nn.Parameter],
) -> dict[str, Tensor]:  # fmt: skip
    """The gradient from backward, as in a training step. Afterwards the batches contain π_old and π_ref."""
    policy.model.zero_grad(set_to_none=True)
    with policy.precision():
        for batch in batches:
            loss = batch_loss(policy, policy, batch, method, temperature, Metrics())
            with torch.autocast(policy.device.type, enabled=False):
                loss.backward()
    return {name: weight.grad for name, weight in parameters.items() if weight.grad is not None}


@torch.no_grad()
def _loss(policy: LanguageModel, batches: Sequence[Batch], method: Method, temperature: float) -> float:
    with policy.precision():
        return math.fsum(float(batch_loss(policy, None, batch, method, temperature, Metrics())) for batch in batches)


@torch.no_grad()
def _along_signs(
    copy: LanguageModel, batches: Sequence[Batch], method: Method, temperature: float, gradients: dict[str, Tensor]
) -> tuple[list[float], list[float]]:
    """Both derivatives along random signs; the differences are computed in the float64 copy."""
    for batch in batches:
        batch.old_logprobs = None if batch.old_logprobs is None else batch.old_logprobs.double()
        batch.ref_logprobs = None if batch.ref_logprobs is None else batch.ref_logprobs.double()
    weights = {name: weight for name, weight in copy.model.named_parameters() if name in gradients}
    count = sum(weight.numel() for weight in weights.values())
    size = math.sqrt(math.fsum(float(weight.square().sum()) for weight in weights.values()))
    step = STEP * (size or 1.0) / math.sqrt(count)  # per weight
    generator = torch.Generator().manual_seed(0)
    backward, differences = [], []
    for _ in range(DIRECTIONS):
        signs = {
            name: torch.randint(0, 2, weight.shape, generator=generator, dtype=torch.int8)
            .mul_(2)
            .sub_(1)
            .to(weight.device)
            for name, weight in weights.items()
        }
        backward.append(math.fsum(float((gradients[name].double() * signs[name]).sum()) for name in weights))
        losses = []
        for move in (step, -2 * step):
            for name, weight in weights.items():
                weight.add_(signs[name], alpha=move)
            copy.generation.advance()
            losses.append(_loss(copy, batches, method, temperature))
        for name, weight in weights.items():
            weight.add_(signs[name], alpha=step)
        differences.append((losses[0] - losses[1]) / (2 * step))
    return backward, differences


@torch.no_grad()
def _along_gradient(
    policy: LanguageModel, batches: Sequence[Batch], method: Method, temperature: float, gradients: dict[str, Tensor]
) -> tuple[list[float], list[float]]:
    """The norm of the gradient, and the difference along it, in the policy itself, whose weights are then restored."""
    weights = {name: weight for name, weight in policy.model.named_parameters() if name in gradients}
    norm = math.sqrt(math.fsum(float(gradient.cpu().double().square().sum()) for gradient in gradients.values()))
    originals = {name: weight.clone() for name, weight in weights.items()}
    step, losses = 1e-3 / norm**2, []
    for sign in (1, -1):
        for name, weight in weights.items():
            weight.copy_(originals[name]).add_(gradients[name], alpha=sign * step)
        policy.generation.advance()
        losses.append(_loss(policy, batches, method, temperature))
    for name, weight in weights.items():
        weight.copy_(originals[name])
    policy.generation.advance()
    return [norm], [(losses[0] - losses[1]) / (2 * step * norm)]
