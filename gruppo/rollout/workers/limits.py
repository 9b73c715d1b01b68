"""What a reward process may have: of the trainer's environment, of the machine's memory; and how it ends for good.

This guards against mistakes, and keeps secrets from code that has no use for them. It is no sandbox: a reward is a
program of the user's, and reads and writes the files that the user can.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

# Names of variables that every reward process has: where programs, libraries and caches are, how the machine is to be
# used. Nothing whose use is to hold a secret; a proxy's address is left out where it holds a password.
_PASSED = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|TERM|TZ|LANG|LANGUAGE|LC_\w+|TMPDIR|TEMP|TMP|XDG_(CACHE|CONFIG|DATA)_HOME"
    r"|(DY)?LD_LIBRARY_PATH|PYTHON(PATH|HOME|HASHSEED|UTF8|IOENCODING|WARNINGS|NOUSERSITE|USERBASE|DONTWRITEBYTECODE)"
    r"|PYTHONPYCACHEPREFIX|VIRTUAL_ENV|CONDA_PREFIX|JAVA_HOME|GRUPPO_CACHE"
    r"|(OMP|MKL|OPENBLAS|NUMEXPR|VECLIB|BLIS)_\w*THREADS|CUDA_(VISIBLE_DEVICES|HOME|PATH|DEVICE_ORDER)"
    r"|(HIP|ROCR)_VISIBLE_DEVICES|(PYTORCH|TORCH)_\w*(CONF|HOME|DEVICE)|TOKENIZERS_PARALLELISM"
    r"|HF_(HOME|HUB_CACHE|HUB_OFFLINE|ENDPOINT|DATASETS_CACHE|DATASETS_OFFLINE|ASSETS_CACHE|XET_CACHE)"
    r"|TRANSFORMERS_(OFFLINE|CACHE|VERBOSITY)|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE"
    r"|(?P<address>(HTTPS?|FTP|ALL|NO)_PROXY)",
    re.IGNORECASE,
)
_PR_SET_PDEATHSIG = 1
_MARK = "GRUPPO_REWARD_PROCESS"  # by which the descendants of a reward process are known


def clean_environment(asked: Sequence[str], mark: str) -> dict[str, str]:
    """The environment of a reward process: what `_PASSED` names, what the recipe asks for by name, and its mark."""
    return {name: value for name, value in os.environ.items() if name in asked or _passed(name, value)} | {_MARK: mark}


def withheld(environment: Mapping[str, str], text: str) -> list[str]:
    """Variables of this process that a text names and that the environment lacks."""
    words = set(re.findall(r"\w{4,}", text))
    return sorted(name for name in os.environ if name in words and name not in environment)


def _passed(name: str, value: str) -> bool:
    found = _PASSED.fullmatch(name)
    return found is not None and not (found["address"] and "@" in value)


def confine(memory_bytes: int) -> None:
    """Limit this process and what it starts, each to so much private memory; if memory runs out all the same, the
    system is to end it before the trainer. No core dumps: they would be as large as the process."""
    _lower(resource.RLIMIT_CORE, 0)
    if memory_bytes:
        _lower(resource.RLIMIT_DATA, memory_bytes)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")


def _lower(what: int, most: int) -> None:
    _, hard = resource.getrlimit(what)
    own = most if hard == resource.RLIM_INFINITY else min(most, hard)
    with contextlib.suppress(OSError, ValueError):  # a system without this limit
        resource.setrlimit(what, (own, own))


def end_descendants(mark: str) -> None:
    """Kill every process that carries the mark: what a reward started, also in a session of its own."""
    for _ in range(5):  # one can start another while we look
        found = [process for process in psutil.process_iter() if _carries(process, mark)]
        if not found:
            return
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()


def _carries(process: psutil.Process, mark: str) -> bool:
    try:
        return bool(process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE)
    except (psutil.Error, OSError):
        return False


def machine_memory() -> int:
    """Bytes of memory that this machine has, or that its control group allows."""
    total = int(psutil.virtual_memory().total)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return total if limit == "max" else min(total, int(limit))


def serve_pipes(serve: Callable[[Connection, Connection], None]) -> None:
    """What a process of the trainer's does: serve the pipe ends given on the command line, within its memory; die with
    the trainer, whose number comes last, and ignore its Ctrl-C."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    read, write, memory, trainer = (int(argument) for argument in sys.argv[1:5])
    if os.getppid() != trainer:  # it died before this process could ask to die with it
        return
    confine(memory)
    serve(Connection(read, writable=False), Connection(write, readable=False))
