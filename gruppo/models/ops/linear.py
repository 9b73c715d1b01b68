"""Matrix multiplications with weights prepared for them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear


def packed(weight: Float[Tensor, "O I"]) -> Tensor:
    """The weight in the layout that oneDNN's matmuls read, for bfloat16 on a CPU with AVX-512 or the like; in all other
    cases the weight itself.

    Matmuls with it are 1.1 (1,024 rows) to 2 times (8 rows) as fast. It can be used in `product` only.
    """
    operators = torch.ops.mkldnn
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return weight
    if not all(hasattr(operators, name) for name in names) or not operators._is_mkldnn_bf16_supported():
        return weight
    return operators._reorder_linear_weight(weight.detach())  # type: ignore[no-any-return]


def product(
    rows: Float[Tensor, "N I"], weight: Tensor, bias: Float[Tensor, " O"] | None = None
) -> Float[Tensor, "N O"]:
    """rows · weightᵀ + bias, in the dtype of the weight, which is plain or packed."""
    rows = rows.to(weight.dtype)
    if weight.is_mkldnn:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(rows.contiguous(), weight, bias, "none", [], "")
        return result
    return linear(rows, weight, bias)
