"""One step of AdamW on a loss that is a sum over micro-batches: policy, value model and reward model alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gruppo.errors import RunError, first_line, out_of_memory
from gruppo.models.policy import LanguageModel
from gruppo.training.packing import Batch
from gruppo.utils.progress import Advance
from gruppo.utils.system import release_memory

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
    once a micro-batch. Where a number is not finite, `require_finite` raises before the optimizer has moved.

    An error leaves no gradient, and weights and moments as they were; but for one in the optimizer's own step, which
    is then a RunError where memory ran out in it: such an update may be half made, and nobody may make it again.
    """
    optimizer.zero_grad(set_to_none=True)
    try:
        total = _accumulate(batches, loss_of, computed_by, require_finite, advance)
        norm = float(torch.nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm))
        require_finite(norm, "gradient norm", batches)
        for group in optimizer.param_groups:
            group["lr"] = rate
        try:
            optimizer.step()
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise RunError(
                f"memory ran out in the optimizer's step ({first_line(error)}), which may be half made; resume from "
                "the last checkpoint with more memory free, or begin again with a smaller model or [model.lora]"
            ) from error
    finally:
        optimizer.zero_grad(set_to_none=True)
    return total, norm


def _accumulate(
    batches: Sequence[Batch],
    loss_of: Callable[[Batch], Tensor],
    computed_by: LanguageModel,
    require_finite: Require,
    advance: Advance,
) -> float:
    """Add every micro-batch's gradient to what is there; the sum of their losses."""
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
    return total
