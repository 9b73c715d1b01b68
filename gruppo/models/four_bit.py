"""Frozen weights of linear layers in 4 bits, under adapters (QLoRA, arXiv 2305.14314), by bitsandbytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gruppo.errors import UsageError
from gruppo.utils.imports import installed

BLOCK = 64  # weights that are scaled together, by their largest magnitude, in float32


def check_package(field: str) -> None:
    """Raise UsageError if bitsandbytes, which `field` needs, is not installed."""
    if not installed("bitsandbytes"):
        raise UsageError(f'{field}: needs the package bitsandbytes: pip install "gruppo[lean]"; or leave the field out')


def check_layers(layers: Mapping[str, nn.Module]) -> None:
    """Raise UsageError if a layer has no 4-bit form: if it is not `nn.Linear`, or if its rows are not whole blocks.

    bitsandbytes 0.50 stores rows of other lengths without an error, and computes them back with scales of other blocks
    on a CPU.
    """
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            problem = f"is a {type(layer).__name__}"
        elif layer.in_features % BLOCK:
            problem = f"has {layer.in_features} inputs, which is not a multiple of {BLOCK}"
        else:
            continue
        raise UsageError(
            f'model.lora.base = "4bit": the layer {name} {problem}, so it has no 4-bit form; write base = "full"'
        )


@torch.no_grad()
def quantize_layers(model: nn.Module, layers: Mapping[str, nn.Module], dtype: torch.dtype) -> None:
    """Replace linear layers, by name, with layers whose weight is stored in NF4: 4.5 bits per weight.

    Each weight becomes one of 16 values, the quantiles of a normal distribution, times the largest magnitude in its
    block of 64. It is computed back to `dtype`, the compute dtype, at each use. Biases are unchanged. Raises UsageError
    as `check_layers` does.
    """
    check_layers(layers)
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, layer in layers.items():
        assert isinstance(layer, nn.Linear)
        bias = layer.bias
        small = Linear4bit(layer.in_features, layer.out_features, bias is not None, dtype, False, "nf4", device="meta")
        weight = Params4bit(layer.weight.data, requires_grad=False, compress_statistics=False, quant_type="nf4")
        small.weight = weight.to(layer.weight.device)
        small.weight.module = small
        small.quant_state = small.weight.quant_state
        small.bias = bias
        small.support_avx512bf16_for_cpu = False  # it would pack the weight anew, for sampling alone
        model.set_submodule(name, small)


def is_four_bit(weight: Tensor) -> bool:
    """Whether a weight is stored in 4 bits."""
    return getattr(weight, "quant_state", None) is not None


def full_weight(weight: Any) -> Tensor:
    """The weight that a layer computes with: of a 4-bit weight its 16 values times their scales, in float32."""
    if not is_four_bit(weight):
        return weight  # type: ignore[no-any-return]
    from bitsandbytes.functional import dequantize_4bit

    full: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return full.float()


def full_count(weight: Any) -> int:
    """Number of weights in a tensor, 4-bit or not."""
    return int(weight.quant_state.shape.numel()) if is_four_bit(weight) else int(weight.numel())


def scale_bytes(weight: Any) -> int:
    """Bytes of the scales of a 4-bit weight, which are not a part of the tensor; 0 for other weights."""
    return int(weight.quant_state.absmax.nbytes) if is_four_bit(weight) else 0
