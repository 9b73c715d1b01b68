"""A counter of weight changes."""

from __future__ import annotations


class Generation:
    """A counter that increases whenever weights change.

    Everything prepared from weights (casts, stacked or packed copies) is prepared again when the counter differs. All
    code that changes weights calls `advance`: an optimizer step, the loading of a checkpoint, an engine that receives
    weights. Addresses and version counters of tensors are not reliable for this: sharded parameters share storage, and
    fused optimizers do not increase version counters.
    """

    def __init__(self) -> None:
        self.number = 0

    def advance(self) -> None:
        """Record that the weights have changed."""
        self.number += 1
