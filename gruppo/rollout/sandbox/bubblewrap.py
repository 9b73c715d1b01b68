"""Confinement of model-written Python: the bubblewrap command line, and the files that the interpreter can see.

The interpreter gets its own namespaces of every kind, no network, no /proc, three devices and a private /tmp. The
system's libraries, its own standard library and PACKAGES are mounted read-only. It runs as user nobody, without
capabilities, behind a system call filter (gruppo.rollout.sandbox.seccomp). It cannot see any of the user's files.
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
OLDEST = (0, 7)  # the first bubblewrap version that can limit the size of /tmp
WORKER = Path(__file__).with_name("worker_main.py")

# With less than this, no interpreter starts.
_LEAST = {"memory": 48 * MIB, "output": 1, "file_size": 0, "open_files": 16, "temporary": 64 * 1024}
# The system treats more than this as no limit or refuses it.
_MOST = {"memory": 2**46, "output": 2**24, "file_size": 2**46, "open_files": 2**20, "temporary": 2**46}
_MOST_SECONDS = 10**9
_INSTALL = (
    "apt install bubblewrap (Debian, Ubuntu), dnf install bubblewrap (Fedora, Red Hat), "
    "pacman -S bubblewrap (Arch), zypper install bubblewrap (openSUSE), apk add bubblewrap (Alpine)"
)
_ALLOW = (
    "if user namespaces are disabled, allow them: "
    "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu 24.04 and later), "
    "sysctl -w kernel.unprivileged_userns_clone=1 (older Debian), sysctl -w user.max_user_namespaces=15000 (Red Hat); "
    "start a Docker or Podman container with `--security-opt seccomp=unconfined --security-opt apparmor=unconfined`"
)
# The sandbox refuses threads, so libraries must not try to start any.
_ENVIRONMENT = {
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
# Makes the order of sets of strings the same in every run. Blocks do not see this variable.
_START = {"PYTHONHASHSEED": "0"}
# No site module (-S), the current folder is not put before the standard library (-P), no
# bytecode is written (-B).
_OPTIONS = ("-s", "-S", "-P", "-B", "-X", "utf8")
_PYTHON = "/python"


@dataclass(frozen=True)
class Limits:
    """Limits of a block of model-written code, or of a session of blocks. Raises UsageError if a value is invalid."""

    seconds: float = 5.0
    """Wall time of a block, in seconds."""
    processor_seconds: float = 5.0
    """Processor time of a block, in seconds."""
    memory: int = 512 * MIB
    """Address space of the interpreter in bytes, its own code included."""
    output: int = 4096
    """Characters kept of a block's output, notes about it included."""
    file_size: int = 16 * MIB
    """Size of the largest file, in bytes."""
    open_files: int = 64
    """Number of open file descriptors; the interpreter itself uses some of them."""
    temporary: int = 32 * MIB
    """Size of all files together, in bytes. They are kept in memory, in addition to `memory`."""

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
    """Path of the program. Raises UsageError, with the remedy, if it cannot be used on this machine."""
    if sys.platform != "linux":
        raise UsageError(f"the sandbox for model-written code needs Linux and bubblewrap; this is {sys.platform}")
    if platform.machine() not in MACHINES:
        raise UsageError(
            f"the sandbox for model-written code supports the processors {' and '.join(MACHINES)}; "
            f"this one is {platform.machine()}"
        )
    found = shutil.which("bwrap")
    if found is None:
        raise UsageError(f"the sandbox for model-written code needs bubblewrap, but there is no bwrap: {_INSTALL}")
    found = os.path.abspath(found)
    try:
        reported = subprocess.run([found, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
        version = re.search(r"(\d+)\.(\d+)", reported)
    except (OSError, subprocess.SubprocessError) as error:
        raise UsageError(f"{found} does not run ({error}): install bubblewrap again: {_INSTALL}") from None
    if version and (int(version[1]), int(version[2])) < OLDEST:
        raise UsageError(f"{found} is {reported.strip()}: the sandbox needs bubblewrap 0.7 or later (Debian 12, "
                         "Ubuntu 24.04, Fedora 37)")  # fmt: skip
    return found


def does_not_start(output: str) -> str:
    """The error message for a sandbox that does not start, with the output of bubblewrap or of the interpreter."""
    return f'the sandbox for model-written code does not start: "{one_line(output.strip()) or "no output"}"; {_ALLOW}'


def cannot_be_asked_for(error: Exception) -> str:
    """The error message for a sandbox process that the trainer could not start."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return (
            f"no sandbox can be started because too many files are open ({error}): raise the limit of open files "
            "(ulimit -n) or sample fewer completions concurrently"
        )
    return f"no sandbox can be started: {type(error).__name__}: {one_line(str(error))}"


def confined(
    bubblewrap: str, limits: Limits, mark: str, calls: int, answers: int, filter_from: int, info_to: int
) -> list[str]:
    """The command line of a confined interpreter.

    `calls`, `answers`: descriptors on which it reads calls and writes answers. bubblewrap reads the first filter from
    `filter_from` and writes the process id of its child to `info_to`. `mark` identifies the processes of a pool
    (gruppo.rollout.sandbox.reaper).
    """
    python, mounts, environment = _interpreter()
    variables = {**_ENVIRONMENT, **_START, **environment}
    setup = _setup(limits, mark, calls, answers, ["/packages"])
    setup |= {"filter": last_filter().hex(), "close": [filter_from, info_to]}
    return [
        *(bubblewrap, "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox"),
        *("--new-session", "--die-with-parent", "--as-pid-1", "--cap-drop", "ALL", "--clearenv"),
        *(part for item in variables.items() for part in ("--setenv", *item)),
        *_system(),
        *mounts,
        *_packages(),
        *("--ro-bind", str(WORKER), "/worker.py"),
        *(part for name in ("null", "zero", "urandom") for part in _device(f"/dev/{name}")),
        *("--size", str(limits.temporary), "--tmpfs", "/tmp", "--chdir", "/tmp"),
        *("--remount-ro", "/"),  # bubblewrap's root, which is in memory and has no size limit
        *("--seccomp", str(filter_from), "--info-fd", str(info_to), "--"),
        *(python, *_OPTIONS, "/worker.py", repr(setup)),
    ]


def unconfined(limits: Limits, mark: str, calls: int, answers: int) -> tuple[list[str], dict[str, str]]:
    """The command line and environment of an interpreter WITHOUT A SANDBOX. Only process limits apply to it."""
    folders = dict.fromkeys(str(folder.parent) for folder in _folders())
    setup = _setup(limits, mark, calls, answers, [*folders])
    setup |= {"filter": "", "close": []}
    return [sys.executable, *_OPTIONS, str(WORKER), repr(setup)], {**_ENVIRONMENT, **_START, **_libraries()}


def watch_for_leftovers(mark: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start the process that kills sandboxes which this process leaves behind. Returns it and the descriptor that must
    stay open until then."""
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
    """Environment variables that Python may need to start outside the sandbox."""
    return {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PYTHONHOME") if name in os.environ}


def _setup(limits: Limits, mark: str, calls: int, answers: int, path: Sequence[str]) -> dict[str, object]:
    return {
        "limits": asdict(limits),
        "mark": mark,
        "calls": calls,
        "answers": answers,
        "path": [*path],
        "environment": [*_ENVIRONMENT],
    }


def _system() -> list[str]:
    """Mounts of the system's libraries, in the places where this system has them."""
    arguments = []
    for place in ("/usr/lib", "/usr/lib64", "/lib", "/lib64"):
        if os.path.islink(place):
            arguments += ["--symlink", os.readlink(place), place]
        elif os.path.isdir(place):
            arguments += ["--ro-bind", place, place]
    for place in ("/etc/ld.so.cache", "/etc/alternatives", "/usr/share/zoneinfo"):
        arguments += ["--ro-bind-try", place, place]
    return arguments


def _interpreter() -> tuple[str, list[str], dict[str, str]]:
    """The running Python inside the sandbox: path of its program, mounts, and environment variables.

    A Python that is not the system's may be in the user's home, so its parts are mounted under another path, without
    its packages.
    """
    program = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    prefix = Path(os.path.realpath(sys.base_prefix))
    if prefix == Path("/usr"):
        return program, ["--ro-bind", program, program], {}
    inside = f"{_PYTHON}/bin/{Path(program).name}"
    mounts = ["--ro-bind", program, inside]
    for folder in dict.fromkeys(("lib", sys.platlibdir)):
        mounts += [
            argument
            for part in _parts(prefix / folder)
            for argument in ("--ro-bind", str(part), f"{_PYTHON}/{part.relative_to(prefix)}")
        ]
        packages = f"{folder}/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
        if (prefix / packages).is_dir():
            mounts += ["--tmpfs", f"{_PYTHON}/{packages}", "--remount-ro", f"{_PYTHON}/{packages}"]
    return inside, mounts, {"LD_LIBRARY_PATH": f"{_PYTHON}/lib"}


def _parts(libraries: Path) -> Iterator[Path]:
    """The parts of a library folder that Python needs: everything in a conda environment, else its own files."""
    if (libraries.parent / "conda-meta").is_dir():
        yield libraries
        return
    standard = libraries / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    if standard.is_dir():
        yield standard
    yield from sorted(libraries.glob("libpython*.so*"))


def _folders() -> Iterator[Path]:
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and spec.submodule_search_locations:
            yield Path(spec.origin).parent


def _packages() -> list[str]:
    """Mounts of the installed packages, each with the library folder next to it."""
    arguments = []
    for folder in _folders():
        arguments += ["--ro-bind", str(folder), f"/packages/{folder.name}"]
        arguments += ["--ro-bind-try", f"{folder}.libs", f"/packages/{folder.name}.libs"]
    return arguments


def _device(path: str) -> tuple[str, ...]:
    """Mount of a device that can be read and written. Its permissions, which are those of the machine, cannot be
    changed."""
    return ("--dev-bind", path, path, "--remount-ro", path)
