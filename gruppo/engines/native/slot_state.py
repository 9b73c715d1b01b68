"""What decoding steps read and write for each slot, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from gruppo.models.ops.pairs import Pair
from gruppo.utils.random_numbers import generator_of
from gruppo.utils.transfer import to_device, upload


class SlotState:
    """The last token of each slot, the number of its sampled tokens, and the uniform number of each of its tokens.

    The numbers of a completion depend only on its stream. They are float64, or `paired` (see `Pair`): [slots, tokens]
    or [slots, tokens, 2].
    """

    def __init__(self, slots: int, tokens: int, paired: bool, device: torch.device) -> None:
        self.token = torch.zeros(slots, dtype=torch.int64, device=device)
        self.length = torch.zeros(slots, dtype=torch.int64, device=device)
        shape, dtype = ((slots, tokens, 2), torch.float32) if paired else ((slots, tokens), torch.float64)
        self.uniforms = torch.zeros(shape, dtype=dtype, device=device)

    def admit(self, slots: np.ndarray, streams: Sequence[tuple[int, ...]], tokens: int) -> Int[Tensor, " n"]:
        """Begin completions of at most `tokens` tokens in these slots. Returns the slots, on the device.

        Without `streams` no random numbers are needed.
        """
        (on_device,) = upload([slots], torch.long, self.token.device)
        self.length.index_fill_(0, on_device, 0)
        if streams:
            numbers = torch.from_numpy(np.stack([generator_of(stream).random(tokens) for stream in streams]))
            if self.uniforms.dtype == torch.float32:
                pair = Pair.of(numbers)
                numbers = torch.stack([pair.high, pair.low], dim=-1)
            self.uniforms[on_device, :tokens] = to_device(numbers, self.uniforms.device)
        return on_device

    def append(self, slots: Int[Tensor, " n"], tokens: Int[Tensor, " n"], length: Int[Tensor, " n"]) -> None:
        """Append a token to each of the slots, whose length was `length`."""
        self.token[slots], self.length[slots] = tokens, length + 1
