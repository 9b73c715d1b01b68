"""Compiling `kernels.c` on the machine that runs it, once, into the cache: a second with a C compiler that is there.

Where there is none (or no OpenMP runtime that torch has loaded, whose threads it shares), there are no kernels, and
torch computes the same in more passes over memory. GRUPPO_KERNELS=0 chooses that.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from gruppo.utils.system import cache_dir

NO_KERNELS = "none"
SOURCE = Path(__file__).with_name("kernels.c")
_EXACT = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")  # NaN and inf are kept
_FLAGS = ("-O3", "-march=native", "-fPIC", "-fopenmp", *_EXACT)
_DEFINES = {torch.bfloat16: ["-DBFLOAT16"], torch.float32: []}


class _Missing(Exception):  # noqa: N818  a state, not an error
    """Why there are no kernels, in words."""


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for products of this dtype; None where there are none."""
    found = _found(dtype)
    return None if isinstance(found, str) else found


def kernels_sha256(dtype: torch.dtype) -> str:
    """What tells one set of kernels from another: a hash of source, compiler, options and processor."""
    found = _found(dtype)
    return NO_KERNELS if isinstance(found, str) else Path(found._name).stem


def why_missing(dtype: torch.dtype) -> str | None:
    """Why there are no kernels for products of this dtype, in words; None where there are some."""
    found = _found(dtype)
    return found if isinstance(found, str) else None


@cache
def _found(dtype: torch.dtype) -> ctypes.CDLL | str:
    try:
        path = _compiled(dtype)
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # cut by a crash of the machine, say: once more
            path.unlink(missing_ok=True)
            return ctypes.CDLL(str(_compiled(dtype)))
    except _Missing as reason:
        return str(reason)
    except OSError as error:
        return f"what was compiled cannot be loaded ({error})"


def _compiled(dtype: torch.dtype) -> Path:
    """The library's file, made first if this machine has not made it before."""
    if os.environ.get("GRUPPO_KERNELS") == "0":
        raise _Missing("GRUPPO_KERNELS is 0")
    if dtype not in _DEFINES:
        raise _Missing(f"there are none for products in {str(dtype).removeprefix('torch.')}")
    if sys.platform != "linux":
        raise _Missing("they are compiled on Linux only")
    compiler = shlex.split(os.environ.get("CC", "")) or [each for each in map(shutil.which, ("gcc", "cc")) if each][:1]
    if not compiler:
        raise _Missing("there is no C compiler (on Debian and Ubuntu: apt install gcc)")
    flags = [*_FLAGS, *_DEFINES[dtype], *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else [])]
    threads = _openmp()
    key = "\n".join([*compiler, *flags, threads, _processor(), _run(*compiler, "--version")])
    try:
        folder = cache_dir() / "kernels"
    except RuntimeError as error:  # nobody's home
        raise _Missing(f"there is no place for them: {error}; set GRUPPO_CACHE") from error
    target = folder / f"{hashlib.sha256(SOURCE.read_bytes() + key.encode()).hexdigest()[:32]}.so"
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".compiling-") as building:
            made = Path(building)
            _run(*compiler, *flags, "-c", str(SOURCE), "-o", str(made / "kernels.o"))
            _run(*compiler, "-shared", str(made / "kernels.o"), threads, "-lm", "-o", str(made / "kernels.so"))
            with (made / "kernels.so").open("rb") as file:
                os.fsync(file.fileno())
            (made / "kernels.so").rename(target)  # whole, or not at all
    except OSError as error:
        raise _Missing(f"{folder} cannot be written to ({error})") from error
    return target


def _run(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=60,
            env=os.environ | {"LC_ALL": "C"},
        )  # fmt: skip
        return done.stdout
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines() or ["no word"]
        raise _Missing(f"{command[0]} failed ({said[0]})") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Missing(f"{command[0]} cannot be run ({error})") from error


def _openmp() -> str:
    """The OpenMP runtime that torch has loaded: a second one beside it would fight it for the cores."""
    torch.get_num_threads()
    loaded: list[str] = sorted(
        set(
            re.findall(
                r"(/\S*lib[gi]?omp[^/\s]*\.so\S*)$",
                Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace"),
                re.M,
            )
        )
    )
    if len(loaded) != 1:
        raise _Missing(f"torch has loaded {len(loaded)} OpenMP runtimes, and not one")
    return loaded[0]


def _processor() -> str:
    """What instructions the processor has: the cache may lie on a file system that several machines share."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))
