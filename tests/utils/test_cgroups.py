"""Limits of control groups, on folders that look like /proc and /sys of other systems, and on this system if it can."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import torch

from gruppo.rollout.workers import limits
from gruppo.utils import cgroups, system
from gruppo.utils.cgroups import (
    available_memory,
    group_free_memory,
    group_memory_limit,
    groups_of,
    machine_memory,
    processors,
)

MB = 10**6
NONE_V1 = 9223372036854771712
BOUND = "30 23 0:26 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup rw"
CPU = "sys/fs/cgroup/cpu,cpuacct"
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
V1_CPU = "36 31 0:33 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
HYBRID = "37 31 0:34 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"


def tree(root: Path, own: str, mounts: str, files: Mapping[str, object]) -> Path:
    """A root folder whose proc shows the process in `own` and the `mounts`. `files`: by path from the root."""
    shown = {"proc/self/cgroup": own, "proc/self/mountinfo": f"1 0 8:1 / / rw - ext4 /dev/sda rw\n{mounts}", **files}
    for name, content in shown.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


def v2(limit: object, used: int = 0, cache: int = 0, high: object = "max", where: str = "") -> dict[str, object]:
    place = f"sys/fs/cgroup{where}"
    stat = f"anon 5\nfile {cache}\ninactive_file {cache}\nactive_file 7"
    names = {"memory.max": limit, "memory.high": high, "memory.current": used, "memory.stat": stat}
    return {f"{place}/{name}": value for name, value in names.items()}


def v1(limit: object, used: int = 0, cache: int = 0, whole: int = NONE_V1, where: str = "") -> dict[str, object]:
    place = f"sys/fs/cgroup/memory{where}"
    stat = f"cache 1\ninactive_file 3\nhierarchical_memory_limit {whole}\ntotal_inactive_file {cache}"
    names = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}
    return {f"{place}/{name}": value for name, value in names.items()}


SLURM = "/system.slice/slurmstepd.scope/job_7/step_0/user/task_0"
SYSTEMD = "/user.slice/user-1000.slice/user@1000.service/app.slice/run.scope"
POD = "/kubepods/burstable/pod1/container"
CASES = {
    # own line of /proc/self/cgroup, mounts, files; then the limit and what is free, in MB
    "version 2, no limit": ("0::/a", V2, v2("max", 9 * MB, where="/a"), None, None),
    "version 2, own limit": ("0::/a", V2, v2(100 * MB, 30 * MB, where="/a"), 100, 70),
    "version 2, Slurm limits the job above the task": (
        f"0::{SLURM}", V2, v2("max", 1 * MB, where=SLURM) | v2(200 * MB, 150 * MB, where=SLURM[:43]), 200, 50,
    ),
    "version 2, systemd limits the user's slice by memory.high": (
        f"0::{SYSTEMD}", V2,
        v2("max", 1, where=SYSTEMD) | v2("max", 80 * MB, high=90 * MB, where="/user.slice/user-1000.slice"), 90, 10,
    ),
    "version 2, the parent has less left although its limit is higher": (
        "0::/a/b", V2, v2(50 * MB, 10 * MB, where="/a/b") | v2(100 * MB, 95 * MB, where="/a"), 50, 5,
    ),
    "version 2, page cache can be dropped": ("0::/a", V2, v2(100 * MB, 90 * MB, 60 * MB, where="/a"), 100, 70),
    "version 2, more in use than allowed": ("0::/a", V2, v2(100 * MB, 120 * MB, where="/a"), 100, 0),
    "version 2, a limit of 0": ("0::/a", V2, v2(0, 1, where="/a"), 0, 0),
    "version 2, Docker with its own namespace": ("0::/", V2, v2(100 * MB, 40 * MB), 100, 60),
    "version 2, Docker in the namespace of the host": (
        "0::/docker/abc", BOUND, v2(100 * MB, 40 * MB), 100, 60,
    ),
    "version 2, a group inside a container": (
        "0::/docker/abc/sub", BOUND,
        v2(100 * MB, 40 * MB) | v2("max", 1, where="/sub"), 100, 60,
    ),
    "version 2, its own folder is not visible": ("0::/docker/abc", V2, v2(100 * MB, 40 * MB), 100, 60),
    "version 2, a namespace below the mount": (
        "0::/", "30 23 0:26 /../.. /sys/fs/cgroup ro - cgroup2 cgroup rw", v2(100 * MB, 40 * MB), 100, 60,
    ),
    "version 2, outside the namespace, below a mount from outside": (
        "0::/../../x", "30 23 0:26 /../.. /sys/fs/cgroup ro - cgroup2 cgroup rw", v2(100 * MB, where="/x"), 100, 100,
    ),
    "version 2, outside the namespace: another group's limit does not count": (
        "0::/../x", V2, v2(100 * MB, 40 * MB), None, None,
    ),
    "version 2, a mount of another container does not count": (
        "0::/docker/abc", "30 23 0:26 /docker/xyz /sys/fs/cgroup ro - cgroup2 cgroup rw", v2(9 * MB), None, None,
    ),
    "version 2, mounted twice": (
        "0::/docker/abc", f"{V2}\n31 23 0:26 /docker/abc /mnt/own ro - cgroup2 cgroup rw",
        v2(70 * MB, 40 * MB, where="/docker") | v2("max", 1, where="/docker/abc"), 70, 30,
    ),
    "version 2, a mount point with a blank": (
        "0::/a", "30 23 0:26 / /sys/fs/c\\040group rw - cgroup2 cgroup2 rw", {"sys/fs/c group/a/memory.max": MB}, 1, 1,
    ),
    "version 2, optional fields in mountinfo": (
        "0::/a", "30 23 0:26 / /sys/fs/cgroup rw shared:9 master:4 - cgroup2 cgroup2 rw", v2(100 * MB, where="/a"),
        100, 100,
    ),
    "version 2, files are missing": ("0::/a", V2, {"sys/fs/cgroup/a/memory.max": 100 * MB}, 100, 100),
    "version 2, files are damaged": (
        "0::/a", V2, {"sys/fs/cgroup/a/memory.max": "many", "sys/fs/cgroup/memory.max": ""}, None, None,
    ),
    "version 1, no limit": ("4:memory:/a", V1, v1(NONE_V1, 9 * MB, where="/a"), None, None),
    "version 1, own limit": ("4:memory:/a", V1, v1(100 * MB, 30 * MB, 10 * MB, where="/a"), 100, 80),
    "version 1, Slurm limits the job above the task": (
        "4:memory:/slurm/uid_1/job_7/step_0", V1,
        v1(NONE_V1, 1, where="/slurm/uid_1/job_7/step_0") | v1(200 * MB, 150 * MB, where="/slurm/uid_1/job_7"), 200, 50,
    ),
    "version 1, a parent's limit in memory.stat only": (
        "4:memory:/docker/abc", "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory",
        v1(NONE_V1, 30 * MB, whole=90 * MB), 90, 60,
    ),
    "version 1, a parent whose limit is not passed on": (
        "4:memory:/a/b", V1, v1(NONE_V1, 1, where="/a/b") | v1(5 * MB, where="/a")
        | {"sys/fs/cgroup/memory/a/memory.use_hierarchy": 0}, None, None,
    ),
    "version 1, memory together with another controller": (
        "4:hugetlb,memory:/a", "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,hugetlb,memory",
        v1(100 * MB, where="/a"), 100, 100,
    ),
    "version 1, Kubernetes": (
        f"4:memory:{POD}\n3:cpu:/x", f"{V1}\n{V1_CPU}",
        v1(300 * MB, 10 * MB, where=POD) | v1(250 * MB, 90 * MB, where=POD[:-10]), 250, 160,
    ),
    "both versions, memory in version 1": (
        "4:memory:/a\n1:name=systemd:/b\n0::/b", f"{V1}\n{HYBRID}",
        v1(100 * MB, 20 * MB, where="/a") | {"sys/fs/cgroup/unified/b/cgroup.procs": 1}, 100, 80,
    ),
    "no memory controller": ("3:cpu:/a", V1_CPU, {}, None, None),
    "no control groups": ("", "", {}, None, None),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_limits_of_all_groups_hold(name: str, tmp_path: Path) -> None:
    own, mounts, files, limit, free = CASES[name]
    root = tree(tmp_path, own, mounts, files)
    assert group_memory_limit(root) == (None if limit is None else limit * MB)
    assert group_free_memory(root) == (None if free is None else free * MB)


def test_memory_of_the_machine_is_used_up_to_the_limit(tmp_path: Path) -> None:
    assert group_memory_limit(tmp_path) is None  # no /proc
    assert machine_memory(tmp_path) == psutil.virtual_memory().total
    root = tree(tmp_path, "0::/a", V2, v2(100 * MB, 30 * MB, where="/a"))
    assert (machine_memory(root), available_memory(root)) == (100 * MB, 70 * MB)
    (root / "sys/fs/cgroup/a/memory.max").write_text(str(2**50))  # more than there is
    assert machine_memory(root) == psutil.virtual_memory().total


def test_run_memory_and_reward_memory_use_the_same_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gruppo.config.sections import Reward
    from gruppo.engines.memory import Free
    from gruppo.models.footprint import process_bytes
    from gruppo.rollout.workers.rewards import memory_per_process

    root = tree(tmp_path, "0::/a/b", V2, v2("max", 1, where="/a/b") | v2(8000 * MB, 30 * MB, where="/a"))
    monkeypatch.setattr(cgroups, "groups_of", lambda controller, _: groups_of(controller, root))
    cpu = torch.device("cpu")
    free = min(7970 * MB, psutil.virtual_memory().available)
    assert abs(Free.now(0.5, cpu).budget - (free + process_bytes(cpu)) // 2) < 200 * MB
    assert memory_per_process(Reward(memory=0.5, workers=2)) == min(8000 * MB, psutil.virtual_memory().total) // 4
    assert not hasattr(limits, "machine_memory")


QUOTAS = {
    "version 2": ("0::/a/b", V2, {"sys/fs/cgroup/a/b/cpu.max": "max 1000", "sys/fs/cgroup/a/cpu.max": "1500 1000"}, 2),
    "version 2, half a processor": ("0::/a", V2, {"sys/fs/cgroup/a/cpu.max": "50000 100000"}, 1),
    "version 2, no limit": ("0::/a", V2, {"sys/fs/cgroup/a/cpu.max": "max 100000"}, 64),
    "version 2, more than there are": ("0::/a", V2, {"sys/fs/cgroup/a/cpu.max": "9900000 100000"}, 64),
    "version 2, damaged": ("0::/a", V2, {"sys/fs/cgroup/a/cpu.max": "max"}, 64),
    "version 1": (
        "3:cpu,cpuacct:/a/b", V1_CPU,
        {f"{CPU}/a/b/cpu.cfs_quota_us": -1, f"{CPU}/a/b/cpu.cfs_period_us": 100_000,
         f"{CPU}/a/cpu.cfs_quota_us": 300_000, f"{CPU}/a/cpu.cfs_period_us": 100_000},
        3,
    ),
    "no control groups": ("", "", {}, 64),
}  # fmt: skip


@pytest.mark.parametrize("name", QUOTAS)
def test_processors_within_the_quota(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, mounts, files, count = QUOTAS[name]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert processors(tree(tmp_path, own, mounts, files)) == count


def test_processors_of_a_process_that_may_run_on_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5}, raising=False)
    assert processors(tree(tmp_path, "0::/a", V2, {"sys/fs/cgroup/a/cpu.max": "400000 100000"})) == 1


def test_torch_gets_no_more_threads_than_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(system, "processors", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    system.limit_threads()
    assert given == []  # the user's choice
    monkeypatch.delenv("OMP_NUM_THREADS")
    system.limit_threads()
    assert given == [2]
    monkeypatch.setattr(system, "processors", lambda: 16)
    system.limit_threads()
    assert given == [2]


@pytest.mark.skipif(sys.platform != "linux", reason="the limits of Linux")
@pytest.mark.parametrize("name", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_the_limits_of_the_process_hold(name: str) -> None:
    program = (
        "import resource, psutil\n"
        "from gruppo.utils.cgroups import available_memory\n"
        "memory = psutil.Process().memory_info()\n"
        f"used = memory.vms if '{name}' == 'RLIMIT_AS' else memory.data\n"
        f"resource.setrlimit(resource.{name}, (used + 50_000_000, resource.RLIM_INFINITY))\n"
        "print(available_memory())\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert 30 * MB < int(ran.stdout) <= 50 * MB
    assert resource.getrlimit(getattr(resource, name))[0] == resource.RLIM_INFINITY


@contextlib.contextmanager
def nested_group() -> Iterator[tuple[Path, Path]]:
    """A group with a limit of 500 MB in the group of this process, and a group without a limit in that one."""
    made: list[Path] = []
    try:
        for group in groups_of("memory"):
            outer = group.folder / f"gruppo-test-{os.getpid()}"
            name = "memory.limit_in_bytes" if group.version == 1 else "memory.max"
            if not group.is_lowest or not (group.folder / "memory.stat").exists():
                continue
            try:
                for folder in (outer, outer / "inner"):
                    folder.mkdir()
                    made.append(folder)
                with contextlib.suppress(OSError):
                    (outer / "memory.use_hierarchy").write_text("1")
                (outer / name).write_text(str(500 * MB))
                if (outer / "inner" / name).exists():
                    yield outer, outer / "inner"
                    return
            except OSError:
                continue
        pytest.skip("this system allows no new control groups")
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()


def test_a_real_group_in_a_group() -> None:
    program = (
        "import os, sys\n"
        "open(sys.argv[1] + '/cgroup.procs', 'w').write(str(os.getpid()))\n"
        "from gruppo.utils.cgroups import group_free_memory, group_memory_limit, machine_memory\n"
        "kept = bytearray(os.urandom(1000)) * 100_000\n"
        "print(group_memory_limit(), machine_memory(), group_free_memory())\n"
    )
    with nested_group() as (_, inner):
        ran = subprocess.run(
            [sys.executable, "-c", program, str(inner)], capture_output=True, text=True, check=True, timeout=60
        )
    limit, machine, free = map(int, ran.stdout.split())
    assert limit == machine
    assert abs(limit - 500 * MB) < 1 * MB
    assert 200 * MB < free < 400 * MB
