"""How often the weights of a model have changed."""

from __future__ import annotations


class Generation:
    """A number that goes up whenever weights change. Whatever is prepared from weights (casts, stacked or packed copies)
    is prepared again when it finds another number.

    Whoever changes weights calls `advance`: an optimizer's step, the loading of a checkpoint, an engine that receives
    weights. Addresses and version counters of tensors do not tell: sharded parameters share storage, and fused
    optimizers do not count.
    """

    def __init__(self) -> None:
        self.number = 0

    def advance(self) -> None:
        """The weights have changed."""
        self.number += 1
