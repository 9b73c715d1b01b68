"""Settings of torch that must be made before the first tensor is created. This module does not import torch."""

from __future__ import annotations

import os


def configure_torch() -> None:
    """Set the environment variables that torch, OpenMP, oneDNN and cuBLAS read, unless they are already set."""
    # Huge pages for large tensors: fewer page faults.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # By default oneDNN caches kernels for 1,024 shapes, 0.6 MB each, and every micro-batch has different shapes.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    # cuBLAS is deterministic only with workspaces of fixed sizes; torch's name for eight of 4 MiB.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Threads of OpenMP spin while they wait for others, by default for milliseconds. Beside other processes that costs
    # their time slices. 1,000 iterations take microseconds, which is as long as most waits inside a decoding step.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
