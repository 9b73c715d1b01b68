"""Compilation of `kernels.c` on the machine that runs it, once, into the cache. It takes about a second.

It needs a C compiler and the OpenMP runtime that torch has loaded, whose threads the kernels share. Without them there
are no kernels, and torch computes the same with more passes over memory. GRUPPO_KERNELS=0 turns the kernels off.
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

from gruppo.utils.paths import cache_dir

NO_KERNELS = "none"
SOURCE = Path(__file__).with_name("kernels.c")
_EXACT = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")  # NaN and inf are kept
_FLAGS = ("-O3", "-march=native", "-fPIC", "-fopenmp", *_EXACT)
_DEFINES = {torch.bfloat16: ["-DBFLOAT16"], torch.float32: []}


class _Missing(Exception):  # noqa: N818  a state, not an error
    """There are no kernels. The message says why."""


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernel library for this compute dtype, or None if there are no kernels."""
    result = _found(dtype)
    return None if isinstance(result, str) else result


def kernels_sha256(dtype: torch.dtype) -> str:
    """The identity of the kernels: a hash of source, compiler, options and processor; "none" without kernels."""
    result = _found(dtype)
    return NO_KERNELS if isinstance(result, str) else Path(result._name).stem


def why_missing(dtype: torch.dtype) -> str | None:
    """The reason why there are no kernels for this compute dtype, or None if there are."""
    result = _found(dtype)
    return result if isinstance(result, str) else None


@cache
def _found(dtype: torch.dtype) -> ctypes.CDLL | str:
    try:
        path = _compiled(dtype)
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # e.g. truncated when the machine crashed: compile it again
            path.unlink(missing_ok=True)
            return ctypes.CDLL(str(_compiled(dtype)))
    except _Missing as reason:
        return str(reason)
    except OSError as error:
        return f"the compiled library cannot be loaded ({error})"


def _compiled(dtype: torch.dtype) -> Path:
    """The path of the library, which is compiled first if it is not in the cache."""
    if os.environ.get("GRUPPO_KERNELS") == "0":
        raise _Missing("GRUPPO_KERNELS is 0")
    if dtype not in _DEFINES:
        raise _Missing(f"they do not support the compute dtype {str(dtype).removeprefix('torch.')}")
    if sys.platform != "linux":
        raise _Missing("they are compiled on Linux only")
    compiler = shlex.split(os.environ.get("CC", "")) or [path for path in map(shutil.which, ("gcc", "cc")) if path][:1]
    if not compiler:
        raise _Missing("there is no C compiler (on Debian and Ubuntu: apt install gcc)")
    flags = [*_FLAGS, *_DEFINES[dtype], *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else [])]
    threads = _openmp()
    key = "\n".join([*compiler, *flags, threads, _processor(), _run(*compiler, "--version")])
    try:
        folder = cache_dir() / "kernels"
    except RuntimeError as error:  # the user has no home folder
        raise _Missing(f"there is no cache folder for them: {error}; set GRUPPO_CACHE") from error
    target = folder / f"{hashlib.sha256(SOURCE.read_bytes() + key.encode()).hexdigest()[:32]}.so"
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".compiling-") as building:
            output = Path(building)
            _run(*compiler, *flags, "-c", str(SOURCE), "-o", str(output / "kernels.o"))
            _run(*compiler, "-shared", str(output / "kernels.o"), threads, "-lm", "-o", str(output / "kernels.so"))
            with (output / "kernels.so").open("rb") as file:
                os.fsync(file.fileno())
            (output / "kernels.so").rename(target)  # atomic
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
        lines = error.stderr.strip().splitlines() or ["no output"]
        raise _Missing(f"{command[0]} failed ({lines[0]})") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Missing(f"{command[0]} cannot be run ({error})") from error


def _openmp() -> str:
    """The path of the OpenMP runtime that torch has loaded. A second runtime would compete with it for the cores."""
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
        raise _Missing(f"torch has loaded {len(loaded)} OpenMP runtimes instead of one")
    return loaded[0]


def _processor() -> str:
    """The model and instruction sets of the processor. Several machines may share one cache folder."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))
