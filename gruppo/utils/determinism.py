"""Deterministic kernels on cuda, so that a resumed run equals an uninterrupted one bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Let torch use deterministic kernels on cuda inside the block, where it has them; elsewhere change nothing.

    A sum over an index (`index_add_`, the gradients of `index_select` and of an attention's keys) otherwise adds its
    terms in the order in which threads arrive. Where torch has no deterministic kernel, it prints a warning that names
    the operation. A stricter setting by the caller stays.
    """
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        yield
        return
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False  # nothing here reads memory before it is written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fill_uninitialized_memory = filled
