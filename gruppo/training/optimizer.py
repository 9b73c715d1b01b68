"""AdamW, and one update, for policy, value model and reward model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gruppo.config.sections import Optimizer
from gruppo.errors import RunError, first_line, out_of_memory
from gruppo.models.packing import Batch
from gruppo.models.policy import LanguageModel
from gruppo.models.ranks import ALONE, Ranks
from gruppo.models.value_head import ScalarModel
from gruppo.training.lean_optimizers import OffloadedAdamW, make_8bit
from gruppo.utils.progress import Advance
from gruppo.utils.system import release_memory
from gruppo.utils.transfer import as_floats

# Called with a value, its name, and the micro-batches that it comes from; raises if the value is not finite.
RequireFinite = Callable[[float, str, Sequence[Batch]], None]


@dataclass(frozen=True)
class Trainable:
    """A value or reward model with its optimizer, which is None if the model is not trained."""

    model: ScalarModel
    optimizer: torch.optim.Optimizer | None


def make_optimizer(settings: Optimizer, model: nn.Module, computed_by: LanguageModel) -> torch.optim.Optimizer:
    """AdamW over a model's trained float32 weights, with weight decay on matrices only.

    `settings.state` selects how the moments are kept (see `gruppo.training.lean_optimizers`). Every optimizer step
    marks the weights of `computed_by` as changed.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    common: dict[str, Any] = {
        "lr": settings.learning_rate, "betas": (settings.beta1, settings.beta2), "eps": settings.epsilon,
    }  # fmt: skip
    fused = parameters[0].device.type in {"cpu", "cuda"}
    optimizer: torch.optim.Optimizer
    if settings.state == "8bit":
        optimizer = make_8bit(groups, **common)
    elif settings.state == "cpu":
        optimizer = OffloadedAdamW(groups, **common, fused=fused)
    else:
        optimizer = torch.optim.AdamW(groups, **common, fused=fused)
    optimizer.register_step_post_hook(lambda *_: computed_by.generation.advance())
    return optimizer


def update(
    batches: Sequence[Batch],
    loss_of: Callable[[Batch], Tensor],
    computed_by: LanguageModel,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    rate: float,
    max_grad_norm: float,
    require_finite: RequireFinite,
    advance: Advance,
    ranks: Ranks = ALONE,
    observe: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """One optimizer step on a loss that is a sum over micro-batches, those of all ranks.

    `module` holds the trained parameters; `advance` is called once per micro-batch, and `observe` when the module has
    the gradient, before it is clipped. Returns the loss, and the norm of
    the gradient before clipping. The host waits for the device once, after the last micro-batch. If a value is not
    finite on any rank, `require_finite` then raises on all of them, before the optimizer step.

    An error leaves no gradient behind, and weights and moments unchanged. The one exception is an error in the
    optimizer step itself. If memory runs out there, RunError is raised, because the update may be half done and must
    not be retried.
    """
    optimizer.zero_grad(set_to_none=True)
    try:
        losses = accumulate(batches, loss_of, computed_by, advance)
        observe()
        gradient_norm = ranks.clip(module, max_grad_norm)
        *values, norm = as_floats([*losses, gradient_norm])
        wrong = [found for found in zip(values, batches, strict=True) if not math.isfinite(found[0])]
        shares = ranks.gather((values, wrong[:1]))
        for value, batch in [found for _, share in shares for found in share]:
            require_finite(value, "loss", [batch])
        everything = batches if math.isfinite(norm) else [batch for share in ranks.gather(batches) for batch in share]
        require_finite(norm, "gradient norm", everything)
        for group in optimizer.param_groups:
            group["lr"] = rate
        try:
            optimizer.step()
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise RunError(
                f"out of memory in the optimizer's step ({first_line(error)}), which may be half done; resume from the "
                "last checkpoint with more memory free, or start again with a smaller model or [model.lora]"
            ) from error
    finally:
        optimizer.zero_grad(set_to_none=True)
    return sum(value for values, _ in shares for value in values), norm


def accumulate(
    batches: Sequence[Batch],
    loss_of: Callable[[Batch], Tensor],
    computed_by: LanguageModel,
    advance: Advance,
) -> list[Tensor]:
    """Accumulate the gradients of all micro-batches. Returns their losses, which the host does not wait for."""
    losses = []
    with computed_by.precision():
        for batch in batches:
            loss = loss_of(batch)
            with torch.autocast(computed_by.device.type, enabled=False):
                loss.backward()
            losses.append(loss.detach())
            release_memory()
            advance(1)
    return losses
