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

from gruppo.actors.needs import ACTOR_CPUS, free_devices, store_bytes
from gruppo.config.cluster_section import LOCAL, Cluster
from gruppo.errors import RunError, first_line


class Runtime:
    """A connection to Ray. `close` leaves Ray, and ends it if it was started here."""

    def __init__(self, cluster: Cluster, accelerated: bool, weight_bytes: int, followers: int = 0) -> None:
        """Start Ray on this machine, or join the one at `cluster.address`. A Ray that this process is connected to
        already is used as it is.

        `weight_bytes`: of one version of the weights. `followers`: ranks that Ray is to start. Raises RunError if Ray
        cannot be reached or started.
        """
        self.owned = not ray.is_initialized()
        self.local = cluster.address == LOCAL
        if not self.owned:
            return
        options: dict[str, Any] = {"address": cluster.address, "log_to_driver": False, "logging_level": "ERROR"}
        if self.local:
            options |= {"include_dashboard": False, "num_cpus": ACTOR_CPUS * (cluster.engines + followers)}
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
    """What Ray has, and what the engines and the ranks that it is to start need, in words."""
    total = ray.cluster_resources()
    has = f"Ray has {total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs"
    who = [f"{followers} ranks besides the leader"] if followers else []
    who += [f"{cluster.engines} engines"] if cluster.engines else []
    gpus = f" and {followers + cluster.engines * cluster.engine_devices} GPUs" if accelerated else ""
    return f"{has}; {' and '.join(who)} need {ACTOR_CPUS * (followers + cluster.engines)} CPUs{gpus}"


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
