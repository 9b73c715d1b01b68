"""The table [engine]."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from gruppo.config.sections import Section
from gruppo.config.units import share_or_size
from gruppo.errors import nearest

# name -> import path of a class; see `gruppo.engines.build_engine`
ENGINES = {
    "native": "gruppo.engines.native.engine:NativeEngine",
    "vllm": "gruppo.engines.vllm.engine:VllmEngine",
}


class Engine(Section):
    """What samples completions, in training and in evaluation."""

    name: str = "native"
    """"native": the trained model itself, in the process of the run. "vllm": vLLM, in a process of its own, which needs
    `pip install "gruppo[vllm]"` (see docs/vllm.md). "package.module:Class" or "file.py:Class": your own engine."""
    memory: float | str = 0.3
    """Memory of vLLM, in addition to run.memory: a fraction of the memory of the device (on a CPU, of the machine), or
    a size such as "20 GB"."""
    device: Annotated[int, Field(ge=0)] | None = None
    """Number of the CUDA device that vLLM uses. Default: the device of the trained model; vLLM then frees its memory
    while the model is trained."""

    _checked_memory = field_validator("memory", mode="before")(share_or_size)

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in ENGINES and ":" not in name:
            raise PydanticCustomError(
                "engine",
                'must be "native", "vllm" or an import path such as "my_engine.py:MyEngine"{near}',
                {"near": nearest(name, ENGINES)},
            )
        return name

    @property
    def has_own_process(self) -> bool:
        """Whether sampling needs no memory in the process of the run."""
        return self.name == "vllm"
