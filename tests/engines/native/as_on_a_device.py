"""The native engine on the CPU, with the options that it has on an accelerator."""

from __future__ import annotations

from gruppo.engines.native.engine import DecodingOptions, NativeEngine
from gruppo.models.policy import LanguageModel


class EngineAsOnADevice(NativeEngine):
    """Small pages, tokens read one step late, random numbers in pairs. Keys and values in the accumulation dtype."""

    def __init__(self, policy: LanguageModel, slots: int) -> None:
        options = DecodingOptions(policy.cache_dtype, page_tokens=4, lag=1, paired_uniforms=True)
        super().__init__(policy, slots, options)
