"""Ray for the duration of a run: started on this machine, or joined where it runs already."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from gruppo.actors.needs import cpus_needed, free_devices, store_bytes
from gruppo.config.cluster_section import LOCAL, Cluster
from gruppo.errors import RunError, first_line


class Runtime:
    """A connection to Ray. `close` leaves Ray, and ends it if it was started here."""

    def __init__(self, cluster: Cluster, accelerated: bool, weight_bytes: int | None, followers: int = 0) -> None:
        """Start Ray on this machine, or join the one at `cluster.address`. A Ray that this process is connected to
        already is used as it is.

        `weight_bytes`: of one version of the weights; None if it is not known yet, and Ray chooses the size of its
        store: up to a third of the free memory, as far as /dev/shm has room. `followers`: ranks that Ray is to start.
        Raises RunError if Ray cannot be reached or started.
        """
        self.owned = not ray.is_initialized()
        self.local = cluster.address == LOCAL
        if not self.owned:
            return
        options: dict[str, Any] = {"address": cluster.address, "log_to_driver": False, "logging_level": "ERROR"}
        if self.local:
            options |= {"include_dashboard": False, "num_cpus": cpus_needed(cluster, followers)}
            if weight_bytes is not None:
                options["object_store_memory"] = store_bytes(weight_bytes)
        devices = free_devices(cluster, followers) if accelerated and self.local else None
        try:
            with _signals_kept(), _devices_shown(devices):
                self.folder = ray.init(**options).address_info["session_dir"]
        except Exception as error:
            raise RunError(
                f'cluster.address = "{cluster.address}": Ray cannot be {"started" if self.local else "reached"} '
                f"({first_line(error)}); see docs/scale.md"
            ) from error

    def close(self) -> None:
        """Leave Ray, and end it if it was started here."""
        if not self.owned or not ray.is_initialized():
            return
        with _signals_kept():
            ray.shutdown()
        if self.local:
            shutil.rmtree(self.folder, ignore_errors=True)


def room(cluster: Cluster, accelerated: bool, followers: int = 0) -> str:
    """What Ray has, and what the engines, the reward hosts and the ranks that it is to start need, in words."""
    total = ray.cluster_resources()
    has = f"Ray has {total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs"
    who = [f"{followers} ranks besides the leader"] if followers else []
    who += [f"{cluster.engines} engines"] if cluster.engines else []
    who += [f"{cluster.reward_hosts} reward hosts"] if cluster.reward_hosts else []
    devices = followers + cluster.engines * cluster.engine_devices if accelerated else 0
    gpus = f" and {devices} GPUs" if devices else ""
    return f"{has}; {' and '.join(who)} need {cpus_needed(cluster, followers)} CPUs{gpus}"


@contextmanager
def _devices_shown(devices: list[str] | None) -> Iterator[None]:
    """Let processes that start inside the block see these CUDA devices only."""
    if devices is None:
        yield
        return
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    try:
        yield
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES")
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Restore the handler of SIGTERM, which Ray replaces in the main thread by one that ends the process."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
