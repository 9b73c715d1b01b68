"""Where the processes of a run with [cluster] go, the memory that each needs, and the weights that travel between them.

Memory is that of `gruppo.training.memory_estimate`, which is of the leader; what another process does not do is left
out. Nothing is started, and no Ray is asked.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gruppo.actors.needs import ACTOR_CPUS, store_bytes
from gruppo.config.cluster_section import LOCAL, Cluster
from gruppo.config.recipe import Recipe
from gruppo.config.units import bytes_of
from gruppo.engines.fleet.received import received_bytes, received_dtypes
from gruppo.models.blueprint import sampling_blueprint
from gruppo.models.footprint import process_bytes
from gruppo.models.policy import LanguageModel
from gruppo.preflight.findings import Finding
from gruppo.training.memory_estimate import PHASES, Memory
from gruppo.utils.cgroups import machine_memory
from gruppo.utils.system import free_memory

COPIED = 64 * 2**20  # bytes that are copied to measure a rate
REPEATS = 3  # the fastest copy counts
SHARED_MEMORY = Path("/dev/shm")  # where Ray keeps objects
MOST_ELSEWHERE = 10**10  # bytes of an object store that Ray starts outside of /dev/shm
_OF_SAMPLING = ("cache", "work")


class Machine(NamedTuple):
    """The machine of the leader. `devices`: its CUDA devices, 0 on a CPU. `free` and `total`: bytes of one device, or
    of the machine on a CPU; `free` includes what this process has. `shared`: free bytes of /dev/shm, None without one.
    `rate`: bytes per second of a copy in its memory."""

    devices: int
    free: int
    total: int
    shared: int | None
    rate: float


@dataclass(frozen=True)
class Member:
    """`count` equal processes. `place`: what they are and on which device, in words. `parts`: bytes of each process on
    each of its devices, by name."""

    name: str
    count: int
    place: str
    parts: Mapping[str, int]

    @property
    def bytes(self) -> int:
        """Bytes of each process on each of its devices."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Placement:
    """The processes of a run. `ray`: what Ray is asked for, empty without it. `transfer_bytes`: weights that are
    copied after each step, 0 if none are. `rate`: see `Machine`."""

    members: tuple[Member, ...]
    ray: str
    transfer_bytes: int
    rate: float

    @property
    def transfer_seconds(self) -> float:
        """Seconds of one copy of the weights at `rate`."""
        return self.transfer_bytes / self.rate

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        members = [{**asdict(member), "bytes": member.bytes} for member in self.members]
        return {**asdict(self), "members": members, "transfer_seconds": self.transfer_seconds}


def measure_machine(device: torch.device) -> Machine:
    """The machine that this process is on. Copies 64 MiB a few times."""
    accelerated = device.type == "cuda"
    source, target = torch.ones(COPIED, dtype=torch.uint8), torch.empty(COPIED, dtype=torch.uint8)
    target.copy_(source)  # touches every page
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return Machine(
        devices=torch.cuda.device_count() if accelerated else 0,
        free=free_memory(device) + process_bytes(device),
        total=torch.cuda.get_device_properties(device).total_memory if accelerated else machine_memory(),
        shared=shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None,
        rate=COPIED / min(seconds),
    )


def measure_sent(recipe: Recipe, policy: LanguageModel) -> int:
    """Bytes of one version of the policy's weights as engines get it, and as a leader of ranks samples from it."""
    _, copy = sampling_blueprint(policy, "meta")
    return received_bytes(copy, received_dtypes(copy, policy.dtype if recipe.engine.has_own_process else None))


def place_processes(recipe: Recipe, memory: Memory, sent: int, machine: Machine) -> Placement | None:
    """The placement of a recipe's processes, None if there is only one.

    `memory`: the estimate for the leader. `sent`: see `measure_sent`.
    """
    cluster = recipe.cluster
    if cluster is None or (cluster.trainers == 1 and not cluster.uses_ray):
        return None
    members = tuple(_members(recipe, cluster, memory, sent, machine))
    travels = cluster.trainers > 1 or cluster.engines > 0
    return Placement(members, _ray(cluster, machine, sent), sent if travels else 0, machine.rate)


def _members(recipe: Recipe, cluster: Cluster, memory: Memory, sent: int, machine: Machine) -> Iterator[Member]:
    device = "the first CUDA device of its machine" if machine.devices else "CPU"
    yield Member("rank 0", 1, f"leader, {device}", _leader(cluster, memory))
    if cluster.trainers > 1:
        others = cluster.trainers - 1
        device = f"{others} more CUDA device{'s' * (others > 1)}" if machine.devices else "CPU"
        parts = _without(memory.parts("training"), ("versions", *_OF_SAMPLING))
        yield Member(_numbered("rank", 1, others), others, f"follower{'s' * (others > 1)}, {device}", parts)
    if cluster.engines:
        name, count = recipe.engine.name, cluster.engine_devices
        device = f"{count} CUDA device{'s' * (count > 1)} for each" if machine.devices else "CPU"
        parts = _vllm(recipe, cluster, sent, machine) if recipe.engine.has_own_process else _native(memory, sent)
        yield Member(_numbered("engine", 0, cluster.engines), cluster.engines, f"{name}, {device}", parts)
    if cluster.reward_hosts:
        yield Member(_numbered("reward host", 0, cluster.reward_hosts), cluster.reward_hosts, _of_host(recipe), {})


def _of_host(recipe: Recipe) -> str:
    """What a reward host holds, and the limit of its memory, in words. What functions need is not known."""
    reward, environment = recipe.reward, recipe.environment
    memory = f"{reward.memory:.0%} of its memory" if isinstance(reward.memory, float) else reward.memory
    parts = [f"{reward.workers} process{'es' * (reward.workers != 1)} of rewards, up to {memory}"]
    if environment is not None:
        parts.append(f"{environment.workers} of environments, up to {environment.memory} each")
    return ", ".join(parts)


def _numbered(name: str, first: int, count: int) -> str:
    return f"{name} {first}" if count == 1 else f"{name}s {first}-{first + count - 1}"


def _leader(cluster: Cluster, memory: Memory) -> dict[str, int]:
    """The parts of the phase in which the leader needs most. It samples only without engines."""
    if cluster.engines:
        return _without(memory.parts("training"), _OF_SAMPLING)
    return max(map(memory.parts, PHASES), key=lambda parts: sum(parts.values()))


def _without(parts: Mapping[str, int], names: Collection[str]) -> dict[str, int]:
    return {name: size for name, size in parts.items() if name not in names}


def _native(memory: Memory, sent: int) -> dict[str, int]:
    """The parts of a native engine, in the larger of sampling and evaluation."""
    phase = max(("sampling", "evaluation"), key=lambda name: getattr(memory, name))
    parts = memory.parts(phase)
    return {"weights": sent} | {name: parts[name] for name in ("process", "prepared", *_OF_SAMPLING)}


def _vllm(recipe: Recipe, cluster: Cluster, sent: int, machine: Machine) -> dict[str, int]:
    """The parts of a vLLM engine on each of its devices: its weights, and a cache of the rest of engine.memory. On a
    CPU, vLLM holds the weights twice."""
    held = sent // cluster.engine_devices if machine.devices else 2 * sent
    return {"weights": held, "cache": max(0, bytes_of(recipe.engine.memory, machine.total) - held)}


def _ray(cluster: Cluster, machine: Machine, sent: int) -> str:
    """What Ray is asked for, in words."""
    if not cluster.uses_ray and cluster.trainers == 1:
        return ""
    asked = []
    if cluster.trainers > 1:
        gpu = " and 1 GPU" if machine.devices else ""
        asked.append(f"{cluster.trainers - 1} times {ACTOR_CPUS} CPU{gpu} for ranks (unless torchrun starts them)")
    if cluster.engines:
        gpus = f" and {cluster.engine_devices} GPU{'s' * (cluster.engine_devices > 1)}" if machine.devices else ""
        asked.append(f"{cluster.engines} times {ACTOR_CPUS} CPU{gpus} for engines")
    if cluster.reward_hosts:
        asked.append(f"{cluster.reward_hosts} times {ACTOR_CPUS} CPU for reward hosts")
    processes = ", ".join(asked)
    if cluster.address != LOCAL:
        return f'{processes}, on any machine of the Ray at "{cluster.address}", which was not asked'
    store = store_bytes(sent if cluster.engines else 0)
    return f"{processes}, on this machine, and an object store of {store / 1e9:.2f} GB"


def check_placement(recipe: Recipe, placement: Placement, machine: Machine) -> list[Finding]:
    """What does not fit. Ranks may be on several machines, so they are refused only where one alone is too large."""
    cluster = recipe.cluster
    assert cluster is not None
    problems = [
        *_check_devices(cluster, machine),
        *_check_memory(cluster, placement, machine),
        *_check_engines(recipe, placement, machine),
        *_check_store(cluster, placement, machine),
    ]
    known = {"rank": cluster.trainers, "engine": cluster.engines}
    known |= {"reward host": cluster.reward_hosts} if cluster.reward_hosts else {}
    *first, last = (f"{count} {noun}{'s' * (count != 1)}" for noun, count in known.items())
    what = f"{', '.join(first)} and {last}: no problem found on this machine"
    return problems or [Finding("ok", "placement", what, figures=placement.as_dict())]


def _check_devices(cluster: Cluster, machine: Machine) -> list[Finding]:
    """Whether this machine has the CUDA devices of all processes that are known to be on it."""
    if not machine.devices:
        return []
    local = cluster.engines * cluster.engine_devices if cluster.address == LOCAL else 0
    figures = {"devices": machine.devices, "engine_devices": local, "trainers": cluster.trainers}
    if local + 1 > machine.devices:
        return [Finding(
            "problem", "placement", f"cluster.engines = {cluster.engines}: {local} CUDA devices for engines and one "
            f"for rank 0, and this machine has {machine.devices}", "the run is refused at its start",
            "write fewer engines, or the address of a Ray with more machines in cluster.address", figures,
        )]  # fmt: skip
    if local + cluster.trainers > machine.devices:
        return [Finding(
            "warning", "placement", f"cluster.trainers = {cluster.trainers}: with {local} devices for engines, this "
            f"machine has {machine.devices - local} of {machine.devices} CUDA devices left for ranks",
            "not all ranks can start here", "use several machines (cluster.address, or torchrun on each of them), or "
            "lower cluster.trainers",
            figures,
        )]  # fmt: skip
    return []


def _check_memory(cluster: Cluster, placement: Placement, machine: Machine) -> list[Finding]:
    """Whether each rank fits on its device; on a CPU, whether the processes of this machine fit together."""
    ranks = [member for member in placement.members if member.name.startswith("rank")]
    largest = max(ranks, key=lambda member: member.bytes)
    fix = "lower run.memory or sampling.max_tokens, or use more ranks"
    if largest.bytes > machine.free:
        return [Finding(
            "problem", "placement", f"{largest.name}: {largest.bytes / 1e9:.2f} GB, and {machine.free / 1e9:.2f} GB "
            "are available", "the run would be killed, or run out of memory", fix,
            {"needed_bytes": largest.bytes, "there_bytes": machine.free},
        )]  # fmt: skip
    if machine.devices:
        return []
    here = [one for one in placement.members if one.parts and (one in ranks or cluster.address == LOCAL)]
    together = sum(member.count * member.bytes for member in here)
    if together <= machine.free:
        return []
    severity: Any = "warning" if cluster.trainers > 1 else "problem"
    return [Finding(
        severity, "placement", f"{', '.join(member.name for member in here)}: {together / 1e9:.2f} GB together, and "
        f"{machine.free / 1e9:.2f} GB are available on this machine", "processes on one machine would be killed",
        "lower run.memory, start fewer processes, or use several machines",
        {"needed_bytes": together, "there_bytes": machine.free},
    )]  # fmt: skip


def _check_engines(recipe: Recipe, placement: Placement, machine: Machine) -> list[Finding]:
    """Whether an engine fits on a device like that of the leader."""
    engines = [member for member in placement.members if member.name.startswith("engine")]
    if not engines:
        return []
    (engine,), field = engines, f"engine.memory = {recipe.engine.memory!r}"
    held, own = engine.parts["weights"], recipe.engine.has_own_process
    if own and not engine.parts["cache"]:
        return [Finding(
            "problem", "placement", f"{field}: vLLM's weights alone take {held / 1e9:.2f} GB",
            "the engines do not start", "raise engine.memory"
            + (", or cluster.engine_devices" if machine.devices else ""), {"weights_bytes": held},
        )]  # fmt: skip
    if machine.devices and engine.bytes > machine.total:
        return [Finding(
            "problem", "placement", f"{engine.name}: {engine.bytes / 1e9:.2f} GB on each device, and one like that of "
            f"rank 0 has {machine.total / 1e9:.2f} GB", "the engines run out of memory",
            "lower engine.memory" if own else "lower run.memory",
            {"needed_bytes": engine.bytes, "there_bytes": machine.total},
        )]  # fmt: skip
    return []


def _check_store(cluster: Cluster, placement: Placement, machine: Machine) -> list[Finding]:
    """Whether /dev/shm has room for the object store of a Ray that is started here."""
    store = store_bytes(placement.transfer_bytes)
    if not cluster.engines or cluster.address != LOCAL or machine.shared is None or store <= machine.shared:
        return []
    refused = store > MOST_ELSEWHERE
    return [Finding(
        "problem" if refused else "warning", "object store", f"Ray's object store needs {store / 1e9:.2f} GB in "
        f"{SHARED_MEMORY}, and {machine.shared / 1e9:.2f} GB are free",
        "Ray does not start" if refused else "Ray keeps weights in files under /tmp, so they arrive more slowly",
        "enlarge it (`docker run --shm-size`, or a volume of medium Memory in Kubernetes)",
        {"needed_bytes": store, "there_bytes": machine.shared},
    )]  # fmt: skip
