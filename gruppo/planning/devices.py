"""Devices and their published figures, from devices.yaml."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

import yaml

from gruppo.errors import UsageError, nearest

_OTHER_NAMES = {"A100": "A100-80GB", "4090": "RTX4090", "H100-80GB": "H100", "H200-141GB": "H200", "H20-96GB": "H20"}
_MACHINE = 8  # devices of a machine, if the number of machines is not given


@dataclass(frozen=True)
class Device:
    """Peak figures of one device: operations per second, bytes, and bytes per second. See devices.yaml."""

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    source: str
    read_in: str

    @property
    def slots(self) -> int:
        """vLLM's default for the maximum number of concurrent completions."""
        return 1024 if self.memory >= 70 * 2**30 and not self.name.startswith("A100") else 256


@dataclass(frozen=True)
class Cluster:
    """Equal devices in equal machines."""

    device: Device
    machines: int
    per_machine: int

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.machines * self.per_machine

    def __str__(self) -> str:
        if self.machines == 1:
            return f"{self.per_machine} x {self.device.name} in one machine"
        return f"{self.devices} x {self.device.name} in {self.machines} machines of {self.per_machine}"


@cache
def known_devices() -> dict[str, Device]:
    """Every device of the table, by name."""
    text = resources.files("gruppo.planning").joinpath("devices.yaml").read_text(encoding="utf-8")
    return {name: Device(name=name, **figures) for name, figures in yaml.safe_load(text).items()}


def read_cluster(text: str) -> Cluster:
    """The cluster of "8xH100" (machines of at most 8 devices) or "4x8xH100" (4 machines of 8).

    Raises UsageError for another form or an unknown device.
    """
    match = re.fullmatch(r"\s*(?:(\d{1,6})\s*[x*]\s*)?(\d{1,6})\s*[x*]\s*([A-Za-z][\w-]*|4090)\s*", text, re.IGNORECASE)
    if match is None or not int(match[2]) or (match[1] is not None and not int(match[1])):
        raise UsageError(f"--devices {text}: must be NUMBERxDEVICE or MACHINESxNUMBERxDEVICE; write e.g. 8xH100")
    device = _find_device(match[3], text)
    machines, number = match[1], int(match[2])
    if machines is not None:
        return Cluster(device, int(machines), number)
    if number > _MACHINE and number % _MACHINE:
        raise UsageError(
            f"--devices {text}: {number} devices do not fill machines of {_MACHINE}; write the number of machines too, "
            f"e.g. 2x{max(1, number // 2)}x{match[3]}"
        )
    return Cluster(device, max(1, number // _MACHINE), min(number, _MACHINE))


def _find_device(name: str, text: str) -> Device:
    known = known_devices()
    names = {each.upper(): each for each in [*known, *_OTHER_NAMES]}
    found = names.get(name.upper().replace("_", "-"))
    if found is None:
        raise UsageError(f"--devices {text}: unknown device {name}{nearest(name.upper(), known)}")
    return known[_OTHER_NAMES.get(found, found)]
