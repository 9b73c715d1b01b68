"""What this machine has: memory, and the description that goes into a run's `environment.json`."""

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

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_PACKAGES = ("gruppo", "torch", "transformers", "accelerate", "safetensors", "numpy", "pyarrow", "datasets")


def keep_freed_memory() -> None:
    """Let the C library keep what large tensors free for the next ones, where it is glibc. It would give every block
    of some megabytes back to the system, which hands out zeroed pages again, one by one: a sixth of a step's time."""
    if _glibc():
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 2**31 - 1)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def cache_dir() -> Path:
    """Where converted weights and compiled kernels are kept: GRUPPO_CACHE, or ~/.cache/gruppo."""
    return Path(os.environ.get("GRUPPO_CACHE") or Path.home() / ".cache" / "gruppo")


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated now on the device; on a CPU also within the control group's limit."""
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
    """Give back to the system what was freed and kept, between phases that need blocks of other sizes; where the C
    library is not glibc nothing is done."""
    if _glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by torch on an accelerator, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe(device: torch.device) -> dict[str, Any]:
    """Versions, git revision and machine, for a reader who wants to do the same again."""
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
    """Revision of the checkout that gruppo is run from, if it is one."""
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
