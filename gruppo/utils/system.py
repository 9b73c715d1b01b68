"""Memory of this machine, and the machine description in `environment.json` of a run."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # constants of malloc.h
_PACKAGES = ("gruppo", "torch", "transformers", "accelerate", "safetensors", "numpy", "pyarrow", "datasets")


def keep_freed_memory() -> None:
    """Let glibc keep freed memory of large tensors for later allocations; with another C library, do nothing.

    By default glibc returns every block of some megabytes to the system, which then zeroes and maps its pages again,
    one by one. That takes a sixth of a step's time.
    """
    if _glibc():
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 2**31 - 1)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def cache_dir() -> Path:
    """Folder of converted weights and compiled kernels: GRUPPO_CACHE, or ~/.cache/gruppo."""
    return Path(os.environ.get("GRUPPO_CACHE") or Path.home() / ".cache" / "gruppo")


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on the device now; on a CPU, limited by the control group (cgroup)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else max(0, min(available, int(limit) - used))


def release_memory() -> None:
    """Return freed memory that glibc keeps to the system; with another C library, do nothing.

    Called between phases that allocate blocks of different sizes.
    """
    if _glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def peak_memory(device: torch.device) -> int:
    """Peak memory so far in bytes: allocated by torch on cuda, else the resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe(device: torch.device) -> dict[str, Any]:
    """Versions, git revision and machine, for reproducing a run."""
    return {
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "git_revision": _git_revision(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Git revision of the checkout that gruppo runs from; None if it is not a checkout."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=5,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
