"""The table [cluster]: training on several ranks, sampling with several engines, and sampling ahead."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gruppo.config.sections import Section

LOCAL = "local"  # the address of a Ray that is started for the run


class Cluster(Section):
    """Training on several ranks, sampling with several engines, and sampling ahead. Leave the table out for one process
    that samples and trains in turn."""

    trainers: Annotated[int, Field(ge=1)] = 1
    """Number of ranks: processes with one device each, which hold the weights in shards. The run starts them through
    Ray, which needs `pip install "gruppo[cluster]"`, unless torchrun has started them."""
    shards: Annotated[int, Field(ge=0)] = 0
    """Number of ranks over which one copy of the weights is sharded; the other ranks hold further copies. 0 stands for
    all ranks."""
    engines: Annotated[int, Field(ge=0)] = 0
    """Number of engines in processes of their own, on any machine of Ray (see docs/scale.md). Each is what engine.name
    says. 0: the run samples in its own process. Needs `pip install "gruppo[cluster]"`."""
    engine_devices: Annotated[int, Field(ge=1)] = 1
    """CUDA devices of each engine. vLLM splits the model over them (tensor parallelism)."""
    address: Annotated[str, Field(min_length=1)] = LOCAL
    """"local": Ray is started on this machine for the run, and ends with it. "auto" or "HOST:PORT": a Ray that runs
    already, which needs RAY_AUTH_MODE=token."""
    weights: Literal["objects", "files"] = "objects"
    """How weights get to the engines: through Ray's object store, or as files in the run folder, which all machines
    must then see."""
    patience: Annotated[float, Field(gt=0)] = 600.0
    """Seconds of silence after which a rank is taken for lost, and an engine is killed and replaced. Ranks that the run
    has started itself start again then; others end."""
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
