"""The transfer of sampled tokens from a device to the host."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


class Download:
    """Tokens and log-probabilities of a step on their way to the host, as one transfer.

    On CUDA, the transfer begins when the step is done, and steps that are launched later do not delay it.
    """

    def __init__(self, tokens: Int[Tensor, " N"], logprobs: Float[Tensor, " N"]) -> None:
        self._bits = {torch.float32: torch.int32, torch.float64: torch.int64}[logprobs.dtype]
        both = torch.stack([tokens.to(self._bits), logprobs.view(self._bits)])
        self._event: torch.cuda.Event | None = None
        if both.device.type != "cuda":
            self._both = both
            return
        self._both = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
        self._both.copy_(both, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Wait for the tokens (int64) and log-probabilities (nats)."""
        if self._event is not None:
            self._event.synchronize()
        tokens, logprobs = self._both.cpu().numpy()
        return tokens.astype(np.int64), logprobs.view(np.float32 if self._bits == torch.int32 else np.float64)
