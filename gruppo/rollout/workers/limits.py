"""Limits of worker processes: environment variables and memory.

This protects against mistakes and keeps secrets from code that does not need them. It is not a sandbox: a reward is a
program of the user, with access to the user's files.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# Names of variables that every worker process gets: locations of programs, libraries and caches, and how to use the
# machine. Variables that are meant for secrets are not passed, nor a proxy's address if it contains a password.
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

# Those of them that belong to a machine: where programs, libraries, caches and devices are, and how it reaches others.
_OF_MACHINE = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|TMPDIR|TEMP|TMP|XDG_\w+|(DY)?LD_LIBRARY_PATH|PYTHON(PATH|HOME|USERBASE|PYCACHEPREFIX)"
    r"|VIRTUAL_ENV|CONDA_PREFIX|JAVA_HOME|GRUPPO_CACHE|CUDA_\w+|(HIP|ROCR)_VISIBLE_DEVICES|(PYTORCH|TORCH)_\w*HOME"
    r"|HF_(HOME|\w+_CACHE)|TRANSFORMERS_CACHE|SSL_CERT_\w+|\w+_CA_BUNDLE|\w+_PROXY",
    re.IGNORECASE,
)


def clean_environment(asked: Sequence[str]) -> dict[str, str]:
    """Environment of a worker process: variables matched by `_PASSED`, and those named in the recipe."""
    return {name: value for name, value in os.environ.items() if name in asked or _passed(name, value)}


def environment_here(sent: Mapping[str, str]) -> dict[str, str]:
    """The environment of a worker process of a run on another machine, whose own would be `sent`."""
    of_run = {name: value for name, value in sent.items() if not _OF_MACHINE.fullmatch(name)}
    return of_run | {name: value for name, value in clean_environment(()).items() if _OF_MACHINE.fullmatch(name)}


def withheld(environment: Mapping[str, str], text: str) -> list[str]:
    """Variables of this process that the text mentions and that are missing from `environment`."""
    words = set(re.findall(r"\w{4,}", text))
    return sorted(name for name in os.environ if name in words and name not in environment)


def _passed(name: str, value: str) -> bool:
    match = _PASSED.fullmatch(name)
    return match is not None and not (match["address"] and "@" in value)


def confine(memory_bytes: int) -> None:
    """Limit the private memory of this process and of each process it starts; 0 for no limit.

    If memory runs out anyway, the system will kill this process before the trainer. Core dumps are disabled: they would
    be as large as the process.
    """
    _lower(resource.RLIMIT_CORE, 0)
    if memory_bytes:
        _lower(resource.RLIMIT_DATA, memory_bytes)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")


def _lower(limit: int, most: int) -> None:
    _, hard = resource.getrlimit(limit)
    lowered = most if hard == resource.RLIM_INFINITY else min(most, hard)
    with contextlib.suppress(OSError, ValueError):  # a system without this limit
        resource.setrlimit(limit, (lowered, lowered))
