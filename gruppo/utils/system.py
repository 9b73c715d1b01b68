"""Memory and threads of this process, and the machine description in `environment.json` of a run."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from gruppo.utils.cgroups import available_memory, processors

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


def limit_threads() -> None:
    """Let torch use no more threads than there are processors for this process, unless OMP_NUM_THREADS is set.

    torch does not know the quotas of control groups. With more threads than the quota allows, all of them wait.
    """
    if "OMP_NUM_THREADS" not in os.environ and (allowed := processors()) < torch.get_num_threads():
        torch.set_num_threads(allowed)


def visible_devices() -> list[str]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


class Memory(NamedTuple):
    """Bytes that a process holds, and that its machine has left."""

    used: int
    free: int

    @classmethod
    def now(cls) -> Memory:
        """That of this process."""
        return cls(psutil.Process().memory_info().rss, available_memory())


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on the device now; on a CPU, see `gruppo.utils.cgroups.available_memory`.

    On cuda this includes what torch's allocator has reserved and not in use.
    """
    if device.type != "cuda":
        return available_memory()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


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


def describe(device: torch.device, more: Sequence[str] = ()) -> dict[str, Any]:
    """Versions, git revision and machine, for reproducing a run. `more`: further packages, if they are installed."""
    return {
        "python": platform.python_version(),
        "packages": {name: version for name in (*_PACKAGES, *more) if (version := _version(name))},
        "git_revision": _git_revision(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def _git_revision() -> str | None:
    """Git revision of the checkout that gruppo runs from, when it was first asked for; None if it is not a checkout."""
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
