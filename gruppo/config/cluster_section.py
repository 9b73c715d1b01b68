"""The table [cluster]: training on several ranks, and sampling ahead."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from gruppo.config.sections import Section


class Cluster(Section):
    """Training on several ranks: processes with one device each, which hold the weights in shards. Leave the table out
    for one process. `lag` lets one process, too, sample while it trains."""

    trainers: Annotated[int, Field(ge=1)] = 1
    """Number of ranks: the number of processes that torchrun starts."""
    shards: Annotated[int, Field(ge=0)] = 0
    """Number of ranks over which one copy of the weights is sharded; the other ranks hold further copies. 0 stands for
    all ranks."""
    patience: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that a rank waits for the others before the run ends with an error."""
    lag: Annotated[int, Field(ge=0)] = 0
    """Steps that sampling may be ahead of training. A step is sampled and scored while the `lag` steps before it train,
    wholly by the weights after step max(0, step - 1 - lag). 0: step by step. Needs method.tis_cap."""

    @model_validator(mode="after")
    def _shards_divide(self) -> Self:
        if self.shards and self.trainers % self.shards:
            raise ValueError(
                f"shards = {self.shards}: must divide trainers = {self.trainers}; write a divisor of it, or 0"
            )
        return self
