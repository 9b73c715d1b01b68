"""Confinement of model-written Python: the command line of bubblewrap, and what the interpreter inside can see.

The interpreter gets namespaces of its own for everything, no network, no /proc, three devices, a private /tmp, and
read-only: the system's libraries, its own standard library, and the packages of PACKAGES. It runs as nobody, without
capabilities, behind a filter of system calls (gruppo.rollout.sandbox.seccomp). Nothing of the user's files is in its view.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from gruppo.errors import UsageError, one_line
from gruppo.rollout.sandbox.seccomp import MACHINES, last_filter

MIB = 2**20
PACKAGES = ("numpy", "sympy", "mpmath")
OLDEST = (0, 7)  # the first bubblewrap that can limit the size of /tmp
WORKER = Path(__file__).with_name("worker_main.py")

# What is less than this starts no interpreter.
_LEAST = {"memory": 48 * MIB, "output": 1, "file_size": 0, "open_files": 16, "temporary": 64 * 1024}
# More than this the system takes for no limit, or not at all.
_MOST = {"memory": 2**46, "output": 2**24, "file_size": 2**46, "open_files": 2**20, "temporary": 2**46}
_MOST_SECONDS = 10**9
_INSTALL = (
    "apt install bubblewrap (Debian, Ubuntu), dnf install bubblewrap (Fedora, Red Hat), "
    "pacman -S bubblewrap (Arch), zypper install bubblewrap (openSUSE), apk add bubblewrap (Alpine)"
)
_ALLOW = (
    "where user namespaces are off, allow them: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu 24.04 "
    "and later), sysctl -w kernel.unprivileged_userns_clone=1 (older Debian), sysctl -w user.max_user_namespaces=15000 "
    "(Red Hat); for a container of Docker or Podman, start it with --security-opt seccomp=unconfined "
    "--security-opt apparmor=unconfined"
)
# Threads are refused, so libraries must not try to start some.
_ENVIRONMENT = {
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
# The order of sets of strings is the same in every run; the block does not see this one.
_START = {"PYTHONHASHSEED": "0"}
# No site module (-S), no current folder before the standard library (-P), nothing compiled is written (-B).
_OPTIONS = ("-s", "-S", "-P", "-B", "-X", "utf8")
_PYTHON = "/python"


@dataclass(frozen=True)
class Limits:
    """What a block of model-written code may use, or a session of blocks. Raises UsageError for what cannot be."""

    seconds: float = 5.0
    """Wall time of a block."""
    processor_seconds: float = 5.0
    """Processor time of a block."""
    memory: int = 512 * MIB
    """Bytes of address space of the interpreter, itself included."""
    output: int = 4096
    """Characters that are kept of a block's output, with what is said about it."""
    file_size: int = 16 * MIB
    """Bytes of the largest file."""
    open_files: int = 64
    """Descriptors, some of them the interpreter's own."""
    temporary: int = 32 * MIB
    """Bytes of all files together; they are in memory, beside that of `memory`."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), _LEAST.get(field.name, 0)
            whole = field.name in _LEAST
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise UsageError(f"limits.{field.name} = {value!r}: write a {'whole ' * whole}number")
            if whole and value < least:
                raise UsageError(f"limits.{field.name} = {value}: write at least {least}")
            if whole and value > _MOST[field.name]:
                raise UsageError(f"limits.{field.name} = {value}: write at most {_MOST[field.name]}")
            if not whole and not 0 < value <= _MOST_SECONDS:
                raise UsageError(
                    f"limits.{field.name} = {value}: write a number of seconds above 0, at most {_MOST_SECONDS}"
                )


def find_bubblewrap() -> str:
    """Path of the program. Raises UsageError, with what to do, where it cannot be used on this machine."""
    if sys.platform != "linux":
        raise UsageError(f"the sandbox for model-written code needs Linux and bubblewrap; this is {sys.platform}")
    if platform.machine() not in MACHINES:
        raise UsageError(
            f"the sandbox for model-written code is for processors of {' and '.join(MACHINES)}; "
            f"this one is {platform.machine()}"
        )
    found = shutil.which("bwrap")
    if found is None:
        raise UsageError(f"the sandbox for model-written code needs bubblewrap, and there is no bwrap: {_INSTALL}")
    found = os.path.abspath(found)
    try:
        told = subprocess.run([found, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
        version = re.search(r"(\d+)\.(\d+)", told)
    except (OSError, subprocess.SubprocessError) as error:
        raise UsageError(f"{found} does not run ({error}): install bubblewrap anew: {_INSTALL}") from None
    if version and (int(version[1]), int(version[2])) < OLDEST:
        raise UsageError(f"{found} is {told.strip()}: the sandbox needs bubblewrap 0.7 or later (Debian 12, "
                         "Ubuntu 24.04, Fedora 37)")  # fmt: skip
    return found


def does_not_start(told: str) -> str:
    """The message where the sandbox does not start, from what bubblewrap or the interpreter in it said."""
    return (
        f'the sandbox for model-written code does not start: "{one_line(told.strip()) or "nothing was said"}"; {_ALLOW}'
    )


def cannot_be_asked_for(error: Exception) -> str:
    """The message where the trainer itself could not start the sandbox's process."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return (
            f"no sandbox can be started, as too many files are open ({error}): raise the limit of open files "
            "(ulimit -n), or let fewer completions be under way at a time"
        )
    return f"no sandbox can be started: {type(error).__name__}: {one_line(str(error))}"


def confined(
    bubblewrap: str, limits: Limits, mark: str, calls: int, answers: int, filter_from: int, info_to: int
) -> list[str]:
    """The command of a confined interpreter, which takes calls and gives answers on these descriptors. bubblewrap reads
    the first filter from `filter_from` and writes the number of its process to `info_to`. By the mark its processes are
    known (gruppo.rollout.sandbox.reaper)."""
    python, seen, environment = _interpreter()
    given = {**_ENVIRONMENT, **_START, **environment}
    setup = _setup(limits, mark, calls, answers, ["/packages"])
    setup |= {"filter": last_filter().hex(), "close": [filter_from, info_to]}
    return [
        *(bubblewrap, "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox"),
        *("--new-session", "--die-with-parent", "--as-pid-1", "--cap-drop", "ALL", "--clearenv"),
        *(each for item in given.items() for each in ("--setenv", *item)),
        *_system(),
        *seen,
        *_packages(),
        *("--ro-bind", str(WORKER), "/worker.py"),
        *(each for name in ("null", "zero", "urandom") for each in _device(f"/dev/{name}")),
        *("--size", str(limits.temporary), "--tmpfs", "/tmp", "--chdir", "/tmp"),
        *("--remount-ro", "/"),  # bubblewrap's own, in memory without a limit
        *("--seccomp", str(filter_from), "--info-fd", str(info_to), "--"),
        *(python, *_OPTIONS, "/worker.py", repr(setup)),
    ]


def unconfined(limits: Limits, mark: str, calls: int, answers: int) -> tuple[list[str], dict[str, str]]:
    """The command of an interpreter WITHOUT A SANDBOX, and its environment. Only limits of the process hold there."""
    folders = dict.fromkeys(str(folder.parent) for folder in _folders())
    setup = _setup(limits, mark, calls, answers, [*folders])
    setup |= {"filter": "", "close": [], "parent": os.getpid()}
    return [sys.executable, *_OPTIONS, str(WORKER), repr(setup)], {**_ENVIRONMENT, **_START, **_libraries()}


def watch_for_leftovers(mark: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start the process that kills what this one leaves behind, and the descriptor that has to stay open until then."""
    read, write = os.pipe()
    program = Path(__file__).with_name("reaper.py")
    try:
        process = subprocess.Popen(
            [sys.executable, *_OPTIONS, str(program), str(read), mark],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(read,),
            cwd="/",
            env=_libraries(),
            start_new_session=True,
        )
    except BaseException:
        os.close(write)
        raise
    finally:
        os.close(read)
    return process, write


def _libraries() -> dict[str, str]:
    """What Python may need to start, outside the sandbox."""
    return {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PYTHONHOME") if name in os.environ}


def _setup(limits: Limits, mark: str, calls: int, answers: int, path: Sequence[str]) -> dict[str, object]:
    return {
        "limits": asdict(limits),
        "mark": mark,
        "calls": calls,
        "answers": answers,
        "path": [*path],
        "environment": [*_ENVIRONMENT],
        "parent": 0,
    }


def _system() -> list[str]:
    """The system's libraries, where the system has them."""
    made = []
    for place in ("/usr/lib", "/usr/lib64", "/lib", "/lib64"):
        if os.path.islink(place):
            made += ["--symlink", os.readlink(place), place]
        elif os.path.isdir(place):
            made += ["--ro-bind", place, place]
    for place in ("/etc/ld.so.cache", "/etc/alternatives", "/usr/share/zoneinfo"):
        made += ["--ro-bind-try", place, place]
    return made


def _interpreter() -> tuple[str, list[str], dict[str, str]]:
    """The running Python as the sandbox sees it: its program, what is bound for it, and variables it needs.

    One that is not the system's may lie in the user's home, so its parts are bound under another name; its packages
    are left out.
    """
    program = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    prefix = Path(os.path.realpath(sys.base_prefix))
    if prefix == Path("/usr"):
        return program, ["--ro-bind", program, program], {}
    inside = f"{_PYTHON}/bin/{Path(program).name}"
    seen = ["--ro-bind", program, inside]
    for folder in dict.fromkeys(("lib", sys.platlibdir)):
        seen += [
            each
            for part in _parts(prefix / folder)
            for each in ("--ro-bind", str(part), f"{_PYTHON}/{part.relative_to(prefix)}")
        ]
        packages = f"{folder}/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
        if (prefix / packages).is_dir():
            seen += ["--tmpfs", f"{_PYTHON}/{packages}", "--remount-ro", f"{_PYTHON}/{packages}"]
    return inside, seen, {"LD_LIBRARY_PATH": f"{_PYTHON}/lib"}


def _parts(libraries: Path) -> Iterator[Path]:
    """What Python needs of a folder of libraries: of conda all, else its own."""
    if (libraries.parent / "conda-meta").is_dir():
        yield libraries
        return
    own = libraries / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    if own.is_dir():
        yield own
    yield from sorted(libraries.glob("libpython*.so*"))


def _folders() -> Iterator[Path]:
    for name in PACKAGES:
        found = importlib.util.find_spec(name)
        if found is not None and found.origin is not None and found.submodule_search_locations:
            yield Path(found.origin).parent


def _packages() -> list[str]:
    """The packages that are installed, one by one, with the libraries that lie beside them."""
    made = []
    for folder in _folders():
        made += ["--ro-bind", str(folder), f"/packages/{folder.name}"]
        made += ["--ro-bind-try", f"{folder}.libs", f"/packages/{folder.name}.libs"]
    return made


def _device(path: str) -> tuple[str, ...]:
    """A device that can be read and written, while nothing can change its permissions, which would be the machine's."""
    return ("--dev-bind", path, path, "--remount-ro", path)
