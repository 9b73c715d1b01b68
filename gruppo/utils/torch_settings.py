"""Settings of torch that have to be made before its first tensor. This module does not import torch."""

from __future__ import annotations

import os


def configure_torch() -> None:
    """Set what torch and oneDNN read from the environment, unless it is set already."""
    # torch asks for huge pages for large tensors: fewer page faults.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # oneDNN keeps what it has compiled for 1,024 shapes, 0.6 MB each, and every micro-batch has shapes of its own.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
