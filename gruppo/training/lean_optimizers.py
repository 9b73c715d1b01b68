"""AdamW with less memory on the device: moments of 8 bits, or moments that stay in CPU memory."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from gruppo.models.footprint import SMALLEST_8BIT
from gruppo.models.four_bit import check_package


def check_state(state: str) -> None:
    """Raise UsageError if `optimizer.state` needs a package that is not installed."""
    if state == "8bit":
        check_package('optimizer.state = "8bit"')


def make_8bit(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW with moments of 8 bits (arXiv 2110.02861).

    After each step, m and v are rounded to one of 256 values, spaced like a float with a moving exponent, times the
    largest magnitude in their block of 256. The gradient is not rounded. Parameters with fewer
    than 4,096 values keep float32 moments. With the same gradients, the distance to the weights of AdamW is about 1 %
    of the distance that they have moved. A resume continues exactly.
    """
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(groups, min_8bit_size=SMALLEST_8BIT, **settings)
    return optimizer


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW whose moments are in CPU memory, and on the device for one parameter at a time.

    Gradients and updates are those of AdamW, bit for bit. A step moves the moments to the device and back: 16 bytes per
    trained weight.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient. A closure is not supported."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the moments are whole before anyone reads them

    def _update(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        if not self.state[parameter]:
            zeros = {name: _on_host(torch.zeros_like(parameter, device="cpu")) for name in ("exp_avg", "exp_avg_sq")}
            self.state[parameter] = {"step": torch.zeros(()), **zeros}
        state = self.state[parameter]
        kinds = ("exp_avg", "exp_avg_sq", "step") if group["fused"] else ("exp_avg", "exp_avg_sq")
        visiting = {kind: state[kind].to(parameter.device, non_blocking=True) for kind in kinds}
        beta1, beta2 = group["betas"]
        assert parameter.grad is not None
        adamw(
            [parameter], [parameter.grad], [visiting["exp_avg"]], [visiting["exp_avg_sq"]], [],
            [visiting.get("step", state["step"])], fused=group["fused"], foreach=False, amsgrad=False, beta1=beta1,
            beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip
        for kind, tensor in visiting.items():
            state[kind].copy_(tensor, non_blocking=True)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As for any optimizer, but the moments stay in CPU memory."""
        super().load_state_dict({**state_dict, "state": {}})
        parameters = list(chain.from_iterable(group["params"] for group in self.param_groups))
        for number, tensors in state_dict["state"].items():
            self.state[parameters[number]] = {kind: _on_host(tensor) for kind, tensor in tensors.items()}


def _on_host(tensor: Tensor) -> Tensor:
    """The tensor in memory from which cuda copies without waiting, if there is cuda."""
    return tensor.pin_memory() if torch.cuda.is_available() and tensor.ndim else tensor
