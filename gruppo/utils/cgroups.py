"""Limits that the system puts on this process: memory and processors of its control groups, and resource limits.

A process belongs to a control group (cgroup) of version 1 or 2, and the limits of all of its parents hold too. Slurm,
Docker and systemd nest groups, and a container may see only a part of the tree. This module does not import torch.
"""

from __future__ import annotations

import math
import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import psutil

_UNLIMITED = 2**60  # version 1 writes "no limit" as the largest multiple of a page that fits into 63 bits


@dataclass(frozen=True)
class Group:
    """A control group as a folder. `version`: 1 or 2; `is_lowest`: the group of the process, or the closest to it that
    can be seen."""

    folder: Path
    version: int
    is_lowest: bool

    def number(self, name: str) -> int | None:
        """The number in one of its files; None for "max", a missing file or anything else."""
        with suppress(OSError, ValueError):
            number = int((self.folder / name).read_text())
            return None if number >= _UNLIMITED or number < 0 else number
        return None

    def numbers(self, name: str) -> dict[str, int]:
        """The lines "key number" of one of its files; empty if there is no such file."""
        found: dict[str, int] = {}
        with suppress(OSError, ValueError):
            for line in (self.folder / name).read_text().splitlines():
                key, _, number = line.partition(" ")
                found[key] = int(number)
        return found

    @property
    def memory_limit(self) -> int | None:
        """Bytes that the group may use; None if it sets no limit."""
        if self.version == 2:
            limits = [self.number("memory.max"), self.number("memory.high")]
        elif self.is_lowest:  # the limit of parents that are out of sight is in memory.stat
            of_parents = self.numbers("memory.stat").get("hierarchical_memory_limit", _UNLIMITED)
            limits = [self.number("memory.limit_in_bytes"), of_parents if of_parents < _UNLIMITED else None]
        elif self.number("memory.use_hierarchy") == 0:  # its limit does not hold for its children
            limits = []
        else:
            limits = [self.number("memory.limit_in_bytes")]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def memory_used(self) -> int:
        """Bytes in use by the group and its children, without the page cache that the system can drop at once."""
        used, cache = ("memory.current", "inactive_file")
        if self.version == 1:
            used, cache = ("memory.usage_in_bytes", "total_inactive_file")
        return max(0, (self.number(used) or 0) - self.numbers("memory.stat").get(cache, 0))

    @property
    def processors(self) -> float | None:
        """Processors' worth of time that the group may use; None if it sets no limit."""
        if self.version == 1:
            quota, period = self.number("cpu.cfs_quota_us"), self.number("cpu.cfs_period_us")
            return quota / period if quota and period else None
        with suppress(OSError, ValueError):
            quota_text, period_text = (self.folder / "cpu.max").read_text().split()
            return None if quota_text == "max" else int(quota_text) / int(period_text)
        return None


def groups_of(controller: str, root: Path = Path("/")) -> list[Group]:
    """The control groups of this process that can limit a `controller` ("memory" or "cpu"), from its own to the top.

    `root`: the folder that contains proc and sys. Empty if the system has no control groups.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = list(_mounts((root / "proc/self/mountinfo").read_text()))
    except (OSError, ValueError):
        return []
    found: list[Group] = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = 1 if controllers else 2
        if version == 1 and controller not in controllers.split(","):
            continue
        fitting = [
            (inner, root / mount.point.lstrip("/"))
            for mount in mounts
            if mount.version == version and (version == 2 or controller in mount.options)
            if (inner := _below(path, mount.root)) is not None
        ]
        for inner, place in fitting:
            folders = [folder for folder in (place / inner, *(place / inner).parents) if folder.is_relative_to(place)]
            there = [folder for folder in folders if folder.is_dir()]
            found += [Group(folder, version, is_lowest=folder == there[0]) for folder in there]
    return found


@dataclass(frozen=True)
class _Mount:
    """A mounted hierarchy of groups. `root`: path of the group that the mount `point` shows."""

    root: str
    point: str
    version: int
    options: frozenset[str]


def _mounts(mountinfo: str) -> Iterator[_Mount]:
    """The hierarchies in /proc/self/mountinfo, see proc(5)."""
    for line in mountinfo.splitlines():
        before, separator, after = line.partition(" - ")
        fields, kinds = before.split(" "), after.split(" ")
        if separator and len(fields) >= 5 and kinds[0] in ("cgroup", "cgroup2"):
            options = frozenset(kinds[-1].split(","))
            yield _Mount(_unescaped(fields[3]), _unescaped(fields[4]), 2 if kinds[0] == "cgroup2" else 1, options)


def _unescaped(path: str) -> str:
    r"""A path in mountinfo, where blanks and backslashes are written as \040 and so on."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _below(path: str, root: str) -> PurePosixPath | None:
    """The path of a group relative to the group `root` of a mount; None if the mount does not contain it.

    Both begin at the top of the control group namespace of the process. A mount from outside the namespace has a `root`
    like "/../..", which is above it; the names in between are unknown, so only the mount's own group is used.
    """
    inside, above = PurePosixPath(path), PurePosixPath(root).parts[1:]
    if inside.is_relative_to(root):
        inner = inside.relative_to(root)
        return None if ".." in inner.parts else inner
    is_parent = set(above) == {".."} and inside.parts.count("..") < len(above)
    return PurePosixPath() if is_parent else None


def group_memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes that the control groups of this process allow; None if there is no limit."""
    limits = (group.memory_limit for group in groups_of("memory", root))
    return min((limit for limit in limits if limit is not None), default=None)


def group_free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still allocate within the limits of its control groups; None without a limit."""
    limited = [(limit, group) for group in groups_of("memory", root) if (limit := group.memory_limit) is not None]
    return min((max(0, limit - group.memory_used) for limit, group in limited), default=None)


def machine_memory(root: Path = Path("/")) -> int:
    """Memory of this machine in bytes, or the limit of the control groups of this process if that is lower."""
    total, limit = int(psutil.virtual_memory().total), group_memory_limit(root)
    return total if limit is None else min(total, limit)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that this process can allocate now: what the machine has left, within the limits of control
    groups and of the process (`ulimit -v`, `ulimit -d`)."""
    available = [int(psutil.virtual_memory().available), group_free_memory(root), _free_address_space()]
    return max(0, min(number for number in available if number is not None))


def _free_address_space() -> int | None:
    """Bytes left below RLIMIT_AS and RLIMIT_DATA; None without a limit, and on other systems than Linux."""
    if sys.platform != "linux":
        return None
    memory, left = psutil.Process().memory_info(), []
    for limit, used in ((resource.RLIMIT_AS, memory.vms), (resource.RLIMIT_DATA, memory.data)):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            left.append(soft - used)
    return min(left, default=None)


def processors(root: Path = Path("/")) -> int:
    """Number of processors that this process may use: those it may run on (affinity, cpuset), within the quotas of its
    control groups, rounded up. At least 1."""
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quotas = (group.processors for group in groups_of("cpu", root))
    quota = min((quota for quota in quotas if quota is not None), default=math.inf)
    return max(1, allowed if quota >= allowed else math.ceil(quota))


class Memory(NamedTuple):
    """Bytes that a process holds, and that its machine has left."""

    used: int
    free: int

    @classmethod
    def now(cls) -> Memory:
        """That of this process."""
        return cls(psutil.Process().memory_info().rss, available_memory())
