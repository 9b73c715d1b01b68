"""The files for Slurm and Kubernetes. Neither runs here: what they say is checked, and what the script calls."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from gruppo.cli.main import app
from gruppo.config.loading import load_recipe
from gruppo.config.recipe import Recipe
from gruppo.config.units import as_bytes

SCRIPT = Path("examples/slurm.sbatch").resolve()
# The fields of KubeRay's CRDs (ray.io/v1) that the manifest may use, by the kind of object; "!" marks required ones.
FIELDS = {
    "RayJob": "apiVersion! kind! metadata! spec!",
    "job": "entrypoint! rayClusterSpec! backoffLimit shutdownAfterJobFinishes ttlSecondsAfterFinished submissionMode",
    "cluster": "headGroupSpec! rayVersion! authOptions! workerGroupSpecs",
    "head": "rayStartParams! template!",
    "workers": "groupName! rayStartParams! template! minReplicas! maxReplicas! replicas!",
    "pod": "containers! volumes",
    "container": "name! image! env ports resources! volumeMounts",
    "volume": "name! persistentVolumeClaim configMap emptyDir",
}
NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")


def has_fields(value: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    fields = FIELDS[kind].split()
    assert value.keys() <= {field.rstrip("!") for field in fields}, kind
    assert value.keys() >= {field[:-1] for field in fields if field.endswith("!")}, kind
    return value


@pytest.fixture(scope="module")
def documents() -> dict[str, Any]:
    found = list(yaml.safe_load_all(Path("examples/kuberay.yaml").read_text()))
    assert all(NAME.fullmatch(each["metadata"]["name"]) for each in found)
    return {each["kind"]: each for each in found}


@pytest.fixture(scope="module")
def recipe(documents: dict[str, Any]) -> Recipe:
    return load_recipe(tomllib.loads(documents["ConfigMap"]["data"]["recipe.toml"]))


def pods(documents: dict[str, Any]) -> Iterator[tuple[str, int, Mapping[str, Any], Mapping[str, Any]]]:
    """(kind, number of pods, group, its pod) for the head and the workers."""
    cluster = documents["RayJob"]["spec"]["rayClusterSpec"]
    groups = [("head", 1, cluster["headGroupSpec"])]
    groups += [("workers", group["replicas"], group) for group in cluster["workerGroupSpecs"]]
    for kind, count, group in groups:
        assert group["template"].keys() == {"spec"}
        yield kind, count, has_fields(group, kind), has_fields(group["template"]["spec"], "pod")


def test_the_manifest_has_the_fields_of_the_resource(documents: dict[str, Any]) -> None:
    assert documents.keys() == {"ConfigMap", "RayJob"}
    job = has_fields(documents["RayJob"], "RayJob")
    assert job["apiVersion"] == "ray.io/v1"
    cluster = has_fields(has_fields(job["spec"], "job")["rayClusterSpec"], "cluster")
    assert cluster["authOptions"] == {"mode": "token"}
    pinned = next(line for line in Path("pyproject.toml").read_text().splitlines() if line.startswith("cluster ="))
    version = re.search(r"ray==([\d.]+)\.\*", pinned)
    assert version is not None
    assert cluster["rayVersion"].startswith(f"{version[1]}.")
    for kind, _, group, pod in pods(documents):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert kind == "head" or group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        (container,) = pod["containers"]
        assert NAME.fullmatch(has_fields(container, "container")["name"])
        assert container["image"] == "IMAGE"
        assert container["resources"]["requests"] == container["resources"]["limits"]
        volumes = {has_fields(volume, "volume")["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts.keys() == volumes.keys()
        (shared,) = (name for name, path in mounts.items() if path == "/dev/shm")
        assert volumes[shared]["emptyDir"]["medium"] == "Memory"
        assert not any("TOKEN" in variable["name"] for variable in container["env"])  # it is in a secret of KubeRay
        assert all(isinstance(variable["value"], str) for variable in container["env"])


def test_the_manifest_has_as_many_devices_as_its_recipe_needs(documents: dict[str, Any], recipe: Recipe) -> None:
    cluster = recipe.cluster
    assert cluster is not None
    found = {"head": 0, "workers": 0}
    for kind, count, group, pod in pods(documents):
        limits = pod["containers"][0]["resources"]["limits"]
        found[kind] += count * int(limits["nvidia.com/gpu"])
        offered = group["rayStartParams"]
        assert (offered.get("num-gpus"), offered.get("num-cpus")) == (("0", "0") if kind == "head" else (None, None))
        assert kind == "head" or int(limits["cpu"]) >= int(limits["nvidia.com/gpu"])
    assert found == {"head": cluster.trainers, "workers": cluster.engines * cluster.engine_devices}
    assert cluster.address == "auto"


def test_shared_memory_holds_the_weights(documents: dict[str, Any]) -> None:
    """Of a model with 1.54 billion weights in bfloat16, 2.5 times."""
    for _, _, _, pod in pods(documents):
        (limit,) = (volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if "emptyDir" in volume)
        assert as_bytes(limit.replace("Gi", " GB")) >= 2.5 * 2 * 1.54e9


def test_the_entrypoint_starts_the_recipe(documents: dict[str, Any], recipe: Recipe) -> None:
    launcher, _, command = documents["RayJob"]["spec"]["entrypoint"].partition(" gruppo ")
    assert recipe.cluster is not None
    assert launcher == f"torchrun --nproc-per-node {recipe.cluster.trainers} --no-python"
    (_, _, _, pod), _ = pods(documents)
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert parsed(command) == {
        "recipe": f"{mounts['recipe']}/recipe.toml",
        "out": f"{mounts['runs']}/mine",
        "resume": True,
    }


def parsed(command: str) -> dict[str, Any]:
    """The recipe, folder and --resume of a `train …` as typer reads it."""
    name, *arguments = shlex.split(command)
    train = get_command(app).commands[name]  # type: ignore[attr-defined]
    values = train.make_context(name, arguments, resilient_parsing=False).params
    return {name: str(values[name]) if name != "resume" else values[name] for name in ("recipe", "out", "resume")}


# ---------------------------------------------------------------- Slurm

FAKES = {
    "hostname": 'if [ "$#" = 0 ]; then echo node1; else echo "10.0.0.1 fe80::1"; fi',
    "srun": 'log "srun $*"',
    "scontrol": 'log "scontrol $*"',
    "sleep": ":",
    "ray": """
        case "$1" in
        get-auth-token) [ "${2:-}" = --generate ] && log "ray $*"; [ "${2:-}" = --generate ] ;;
        status) log "ray $*"; [ "${BROKEN:-}" = "" ] ;;
        *) log "[$CUDA_VISIBLE_DEVICES] ray $*" ;;
        esac""",
    "torchrun": """
        log "torchrun $*"
        if [ "${WAITS:-}" ]; then
          trap 'log saved; exit 143' TERM
          touch "$WAITS"
          while :; do :; done
        fi
        exit "${CODE:-0}" """,
}


class Slurm:
    """A place to run the script, in which all programs that it calls only write down how they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        for name, body in FAKES.items():
            program = folder / name
            program.write_text(f'#!/bin/bash\nlog() {{ echo "$*" >> {shlex.quote(str(self.calls))}; }}\n{body}\n')
            program.chmod(0o755)

    def start(self, *arguments: str, nodes: int = 3, **environment: str) -> subprocess.Popen[str]:
        variables = {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_JOB_ID": "7",
        }
        return subprocess.Popen(
            ["bash", SCRIPT, *arguments], env=variables | environment, text=True, stderr=subprocess.PIPE
        )

    def called(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


TORCHRUN = (
    "torchrun --nproc-per-node 4 --shutdown-timeout 240 --no-python gruppo train recipe.toml --out runs/mine --resume"
)


def test_the_script_starts_ray_everywhere_and_the_ranks_on_the_first_node(slurm: Slurm) -> None:
    script = slurm.start("recipe.toml", "runs/mine")
    _, errors = script.communicate(timeout=60)
    assert (script.returncode, errors) == (0, "")
    called = slurm.called()
    assert called[0] == "ray get-auth-token --generate"
    assert set(called[1:]) == {
        "[4,5,6,7] ray start --head --block --port 6379 --include-dashboard=false",
        "ray status --address 10.0.0.1:6379",
        "srun --nodes=2 --ntasks=2 --exclude=node1 ray start --address 10.0.0.1:6379 --block",
        TORCHRUN,
    }
    assert parsed(TORCHRUN.partition(" gruppo ")[2]) == {"recipe": "recipe.toml", "out": "runs/mine", "resume": True}


def test_the_script_on_one_node_starts_no_others(slurm: Slurm) -> None:
    assert slurm.start("recipe.toml", "runs/mine", nodes=1).wait(60) == 0
    assert not [call for call in slurm.called() if call.startswith("srun")]


def test_the_script_ends_with_the_exit_code_of_the_run(slurm: Slurm) -> None:
    assert slurm.start("recipe.toml", "runs/mine", CODE="3").wait(60) == 3
    assert not [call for call in slurm.called() if call.startswith("scontrol")]


def test_before_the_end_of_its_time_the_run_is_saved_and_the_job_queued_again(slurm: Slurm, tmp_path: Path) -> None:
    waits = tmp_path / "waits"
    script = slurm.start("recipe.toml", "runs/mine", WAITS=str(waits))
    while not waits.exists():
        assert script.poll() is None
    script.send_signal(signal.SIGTERM)
    assert script.wait(60) == 0
    assert slurm.called()[-2:] == ["saved", "scontrol requeue 7"]


def test_a_ray_that_does_not_start_ends_the_script(slurm: Slurm) -> None:
    script = slurm.start("recipe.toml", "runs/mine", BROKEN="1")
    _, errors = script.communicate(timeout=60)
    assert (script.returncode, errors) == (
        1, "slurm.sbatch: Ray does not start on node1; its output is above\n",
    )  # fmt: skip
    assert TORCHRUN not in slurm.called()


def test_a_script_without_arguments_says_how_to_use_it(slurm: Slurm) -> None:
    script = slurm.start("recipe.toml")
    _, errors = script.communicate(timeout=60)
    assert script.returncode != 0
    assert "usage: sbatch slurm.sbatch RECIPE FOLDER" in errors
    assert slurm.called() == []
