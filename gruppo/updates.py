"""One step of AdamW on a loss that is a sum over micro-batches: policy, value model and reward model alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gruppo.machine import release_memory
from gruppo.models import LanguageModel
from gruppo.packing import Batch
from gruppo.reporting import Advance

# Called with a number, what it is, and the micro-batches it is of; raises where the number is not finite.
Require = Callable[[float, str, Sequence[Batch]], None]


def update(
    batches: Sequence[Batch],
    loss_of: Callable[[Batch], Tensor],
    computed_by: LanguageModel,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    rate: float,
    max_grad_norm: float,
    require_finite: Require,
    advance: Advance,
) -> tuple[float, float]:
    """The loss, and the gradient's norm before it was clipped. `module` holds what is trained; `advance` is called
    once a micro-batch. Where a number is not finite, `require_finite` raises before the optimizer has moved."""
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    with computed_by.precision():
        for batch in batches:
            loss = loss_of(batch)
            require_finite(float(loss.detach()), "loss", [batch])
            with torch.autocast(computed_by.device.type, enabled=False):
                loss.backward()
            total += float(loss.detach())
            release_memory()
            advance(1)
    norm = float(torch.nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm))
    require_finite(norm, "gradient norm", batches)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm
