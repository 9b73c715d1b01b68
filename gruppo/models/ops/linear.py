"""Matrix products with weights that were prepared for them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear


def packed(weight: Float[Tensor, "O I"]) -> Tensor:
    """The weight in the layout that oneDNN's products read, where there is one for it: bfloat16 on a CPU. Products
    with it are 1.1 (1,024 rows) to 2 times (8 rows) as fast; it is of no other use. Elsewhere the weight itself."""
    operators = torch.ops.mkldnn
    known = hasattr(operators, "_reorder_linear_weight") and hasattr(operators, "_linear_pointwise")
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not known:
        return weight
    return operators._reorder_linear_weight(weight.detach())  # type: ignore[no-any-return]


def product(
    rows: Float[Tensor, "N I"], weight: Tensor, bias: Float[Tensor, " O"] | None = None
) -> Float[Tensor, "N O"]:
    """rows · weightᵀ + bias in the dtype of the weight, which is plain or packed."""
    rows = rows.to(weight.dtype)
    if weight.is_mkldnn:
        made: Tensor = torch.ops.mkldnn._linear_pointwise(rows.contiguous(), weight, bias, "none", [], "")
        return made
    return linear(rows, weight, bias)
