"""Nodes of Ray for tests: on this machine, and on two machines that network namespaces of Linux stand in for.

A namespace has a network, a host name and processes of its own. It shares this machine's files, memory and process ids
with the other: so `ray stop` in one would stop both, and nodes are ended by their processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

TOKEN = {
    "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_USAGE_STATS_ENABLED": "0",
}  # fmt: skip
STORE_BYTES = 200 * 2**20  # of each node's object store
NETWORK = 0x40000000  # CLONE_NEWNET
NAMES = 0x04000000  # CLONE_NEWUTS


@dataclass
class Machine:
    """A machine, or the stand-in for one. `namespace`: "" for this machine itself. `link`: its network interface."""

    address: str
    namespace: str = ""
    link: str = ""
    nodes: list[subprocess.Popen[str]] = field(default_factory=list)
    roots: set[int] = field(default_factory=set)  # processes whose descendants are its own
    folders: list[str] = field(default_factory=list)  # of Ray

    def command(self, *words: str) -> list[str]:
        """A command that runs on it."""
        if not self.namespace:
            return [*words]
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.namespace]
        return ["ip", "netns", "exec", self.namespace, *named, *words]

    def enter(self) -> None:
        """Let the calling process, which has one thread, run on it from now on."""
        if not self.namespace:
            return
        libc = ctypes.CDLL(None, use_errno=True)
        with Path(f"/run/netns/{self.namespace}").open() as file:
            if libc.setns(file.fileno(), NETWORK) or libc.unshare(NAMES):
                raise OSError(ctypes.get_errno(), f"cannot enter {self.namespace}")
        socket.sethostname(self.namespace)

    def start_node(self, cpus: int, head: str = "", port: int = 0) -> str:
        """Start a node of Ray, which joins the one at the address `head`, or is one at `port`. Returns the address of
        the head."""
        ray = str(Path(sys.executable).with_name("ray"))
        words = [ray, "start", "--block", "--node-ip-address", self.address, "--num-cpus", str(cpus), "--num-gpus", "0"]
        words += ["--object-store-memory", str(STORE_BYTES)]
        if head:
            words += ["--address", head]
        else:
            self.folders.append(tempfile.mkdtemp(prefix="gruppo-ray-"))
            words += ["--head", "--port", str(port), "--include-dashboard=false", "--temp-dir", self.folders[-1]]
        node = subprocess.Popen(
            self.command(*words), env=os.environ | TOKEN, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        self.nodes.append(node)
        self.roots.add(node.pid)
        seen: list[str] = []
        assert node.stdout is not None
        for line in node.stdout:
            seen.append(line)
            if "Ray runtime started" in line:
                return head or f"{self.address}:{port}"
        raise AssertionError("".join(seen))

    def processes(self) -> list[psutil.Process]:
        """Its roots and what they have started, and all others if it has a namespace."""
        found: set[psutil.Process] = set()
        for root in self.roots:
            with contextlib.suppress(psutil.NoSuchProcess):
                one = psutil.Process(root)
                found |= {one, *one.children(recursive=True)}
        if self.namespace:
            for number in _ip("netns", "pids", self.namespace).split():
                with contextlib.suppress(psutil.NoSuchProcess):
                    found.add(psutil.Process(int(number)))
        return [one for one in found if _alive(one)]

    def actors(self, name: str) -> list[psutil.Process]:
        """Processes of Ray that hold an actor whose class has this name, by age."""
        found = [one for one in self.processes() if actor_class(one) == name]
        return sorted(found, key=lambda process: (process.create_time(), process.pid))

    def kill(self) -> None:
        """End all of its processes at once, as when its power fails."""
        while processes := self.processes():
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, 1)
        for node in self.nodes:
            node.wait()
            assert node.stdout is not None
            node.stdout.close()
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)
        self.roots.clear()
        self.nodes.clear()
        self.folders.clear()

    def connect(self, connected: bool) -> None:
        """Take its network link down, or up again."""
        _ip("-n", self.namespace, "link", "set", self.link, "up" if connected else "down")


def no_machines() -> str:
    """Why this machine cannot stand in for two, in words; "" if it can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "two machines are simulated by network namespaces, which only root of a Linux machine can make"
    if missing := [name for name in ("ip", "unshare", "hostname") if shutil.which(name) is None]:
        return f"two machines are simulated by network namespaces, and the command {missing[0]} is missing"
    try:
        with two_machines():
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"two machines are simulated by network namespaces, which this machine refuses: {error}"


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Two machines with one network, 10.77.0.0/24."""
    number = os.getpid()
    one, two = machines = tuple(
        Machine(f"10.77.0.{place + 1}", f"gruppo-{number}-{letter}", f"g{number}{letter}")
        for place, letter in enumerate("ab")
    )
    with contextlib.ExitStack() as stack:
        for machine in machines:
            _ip("netns", "add", machine.namespace)
            stack.callback(_ip, "netns", "delete", machine.namespace)
            stack.callback(machine.kill)
        _ip(
            *("link", "add", one.link, "netns", one.namespace, "type", "veth"),
            *("peer", "name", two.link, "netns", two.namespace),
        )
        for machine in machines:
            _ip("-n", machine.namespace, "address", "add", f"{machine.address}/24", "dev", machine.link)
            for link in ("lo", machine.link):
                _ip("-n", machine.namespace, "link", "set", link, "up")
        yield one, two


@dataclass
class Scene:
    """Where runs take place: the first machine has the run, and Ray's nodes are on all. `address`: of Ray."""

    machines: tuple[Machine, ...]
    address: str

    @property
    def home(self) -> Machine:
        return self.machines[0]

    def actors(self, name: str) -> list[psutil.Process]:
        """See `Machine.actors`, of all machines."""
        return [process for machine in self.machines for process in machine.actors(name)]

    def left(self, names: Iterable[str], seconds: float) -> list[str]:
        """The classes that actors still have after some seconds, on the machine that has the run."""
        deadline = time.monotonic() + seconds
        while alive := [name for name in names if self.home.actors(name)]:
            if time.monotonic() > deadline:
                return alive
            time.sleep(0.2)
        return []

    def join(self) -> None:
        """Start the node of the second machine."""
        self.machines[1].start_node(1, head=self.address)

    def restore(self) -> None:
        """Connect and start the second machine again."""
        self.machines[1].connect(True)
        self.machines[1].kill()
        self.join()


@contextlib.contextmanager
def scene(two: bool, ray: bool = True) -> Iterator[Scene]:
    """Two machines with a Ray that has room for an actor on each, or this one with room for four. Ray ends with the
    block. Without `ray`, a run starts its own."""
    with contextlib.ExitStack() as stack:
        machines: tuple[Machine, ...] = stack.enter_context(two_machines()) if two else (Machine("127.0.0.1"),)
        found = Scene(machines, "local")
        if ray:
            stack.callback(found.home.kill)
            found.address = found.home.start_node(1 if two else 4, port=free_port())
            if two:
                found.join()
        yield found


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def actor_class(process: psutil.Process) -> str:
    """The class of the actor of Ray in a process, "" if there is none. Ray writes it into the process's title."""
    with contextlib.suppress(psutil.Error):
        title = (process.cmdline() or [""])[0]
        if title.startswith("ray::"):
            return title.removeprefix("ray::").split(".")[0].split("(")[0]
    return ""
