"""Quantized weights that a script asks for: the frozen weights under LoRA adapters may be in 4 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gruppo.errors import UsageError

BASE = 'model.lora.base = "4bit"'  # what it becomes in a recipe
_WRITE = "quantization_config=BitsAndBytesConfig(load_in_4bit=True) with a peft_config"
REFUSED = (
    f"trained weights are float32; only weights under LoRA adapters are quantized, to 4 bits ({BASE}): write {_WRITE}"
)
FORM = (
    f"{BASE}: weights under adapters are NF4 in blocks of 64 with float32 scales, whichever bnb_4bit_quant_type and "
    "bnb_4bit_use_double_quant say"
)


def asks_for_four_bits(config: Any, field: str, adapters: bool) -> bool:
    """Whether a quantization config, or a mapping like it, asks for 4-bit weights; False for None.

    `field`: the argument that has it; `adapters`: whether LoRA adapters are trained. Raises UsageError for weights that
    gruppo does not quantize.
    """
    if config is None:
        return False
    wanted = config.get("load_in_4bit") if isinstance(config, Mapping) else getattr(config, "load_in_4bit", False)
    if not wanted or not adapters:
        missing = " without a peft_config" if wanted else ""
        raise UsageError(f"{field} = {_short(config)}{missing}: {REFUSED}")
    return True


def check_model(model: Any) -> None:
    """Raise UsageError for a model in memory whose weights are quantized."""
    if getattr(model, "is_quantized", False):
        raise UsageError(f"model: its weights are quantized; {REFUSED}, and give the name of the model")


def _short(config: Any) -> str:
    return repr(config) if isinstance(config, Mapping) else type(config).__name__
