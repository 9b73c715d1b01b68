"""Deterministic kernels on cuda, so that a resumed run equals an uninterrupted one bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic

_changing = threading.Lock()
_blocks = 0  # how many are active, in all threads: the settings are those of the process
_filled = True  # torch's setting from before the first of them


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Let torch use deterministic kernels on cuda inside the block, where it has them; elsewhere change nothing.

    A sum over an index (`index_add_`, the gradients of `index_select` and of an attention's keys) otherwise adds its
    terms in the order in which threads arrive. Where torch has no deterministic kernel, it prints a warning that names
    the operation. A stricter setting by the caller stays. Blocks of several threads may overlap.
    """
    if device.type != "cuda" or not _entered():
        yield
        return
    try:
        yield
    finally:
        _left()


def _entered() -> bool:
    """Begin a block, unless the caller has a setting of their own."""
    global _blocks, _filled
    with _changing:
        if not _blocks:
            if torch.are_deterministic_algorithms_enabled():
                return False
            settings: Any = torch.utils.deterministic
            _filled = settings.fill_uninitialized_memory
            torch.use_deterministic_algorithms(True, warn_only=True)
            settings.fill_uninitialized_memory = False  # nothing here reads memory before it is written
        _blocks += 1
        return True


def _left() -> None:
    global _blocks
    with _changing:
        _blocks -= 1
        if not _blocks:
            torch.use_deterministic_algorithms(False)
            settings: Any = torch.utils.deterministic
            settings.fill_uninitialized_memory = _filled
