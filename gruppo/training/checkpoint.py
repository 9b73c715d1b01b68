"""Checkpoints: everything that a run needs to go on as if nothing had happened.

safetensors and JSON only. There is no random state to keep: every draw is a function of the seed, the step and the
numbers in `State`. What is frozen is not in a checkpoint, nor is a reference that is the start model, whose hash is in
environment.json; a later iteration's reference is, by a link to one file.
A manifest holds the hash of every file; a checkpoint that does not agree with its manifest is passed over.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gruppo.errors import RunError, UsageError
from gruppo.models.weights import trained_weights
from gruppo.runs.atomic import publish, recover, write_whole, writing
from gruppo.runs.folder import RunFolder, checkpoint_folders
from gruppo.runs.reading import read_object, reading
from gruppo.utils.files import file_sha256, link_file


@dataclass
class State:
    """Where a run stands. `step`: steps done; `cursor`: prompts drawn; `iteration`: iterations begun; `labels`: the
    hash of each table of labels, by its file's name; `evaluated`: the evaluation that is due at this step has been
    made; `evaluations`: their figures by step; `benchmarks`: those of other exams, by step and name; `lengths`: bytes
    of the append-only files."""

    step: int = 0
    cursor: int = 0
    iteration: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    evaluated: bool = False
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    benchmarks: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    train_seconds: float = 0.0
    peak_memory_bytes: int = 0
    lengths: dict[str, int] = field(default_factory=dict)


# What is trained beside the policy, by name: the start of its files' names.
Others = Mapping[str, tuple[nn.Module, torch.optim.Optimizer]]


def save_checkpoint(
    run: RunFolder,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: State,
    others: Others = MappingProxyType({}),
    files: Sequence[Path] = (),
) -> Path:
    """Write checkpoints/step-NNNNNN and drop old ones (see `drop_old`). `files` that nobody writes to any more belong
    to it too."""
    state.lengths = run.lengths()
    folder = run.path / "checkpoints" / f"step-{state.step:06d}"
    building = folder.with_name(f".writing-{folder.name}")
    with writing(folder, building):
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        for name, (module, own) in {"": (model, optimizer), **others}.items():
            weights = {key: tensor.cpu().contiguous() for key, tensor in trained_weights(module).items()}
            save_file(weights, building / _file(name, "weights"))
            save_file(_optimizer_tensors(module, own), building / _file(name, "optimizer"))
        for file in files:
            link_file(file, building / file.name)
        write_whole(building / "state.json", json.dumps(asdict(state), indent=2).encode())
        manifest = {path.name: file_sha256(path) for path in sorted(building.iterdir())}
        write_whole(building / "manifest.json", json.dumps(manifest, indent=2).encode())
        publish(building, folder)
    drop_old(run, state)
    return folder


def newest_checkpoint(run: RunFolder) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with those after it, in words. Raises RunError where there
    are some and none is whole: to begin again would throw away what the folder holds."""
    recover(run.path)
    recover(run.path / "checkpoints")
    problems: list[str] = []
    for folder in reversed(checkpoint_folders(run.path).values()):
        problem = problem_of(folder)
        if problem is None:
            return folder, problems
        problems.append(f"{folder.name}: {problem}")
    if problems:
        raise RunError(
            f"{run.path}: no checkpoint is whole ({'; '.join(problems)}), so there is nothing to go on from; put the "
            "files back from a copy, or begin again with another --out; metrics and tables are as they were"
        )
    return None, problems


def load_state(folder: Path) -> State:
    """The state in a checkpoint. Raises UsageError where it holds something else, whatever its hash says."""
    path = folder / "state.json"
    try:
        held = read_object(path)
        state = TypeAdapter(State).validate_json(json.dumps(held), strict=True)
    except ValidationError as error:
        raise UsageError(f"{path}: is damaged: no state of a run ({error.errors()[0]['msg']})") from None
    with reading(path, "take the checkpoint before it"):
        if more := held.keys() - asdict(state).keys():
            raise ValueError(f"{min(more)!r} is no field")
        if min(state.step, state.cursor, state.iteration, *state.lengths.values()) < 0:
            raise ValueError("a number is below 0")
        benchmarks = [figures for held in state.benchmarks.values() for figures in held.values()]
        for figures in [*state.evaluations.values(), *benchmarks]:
            float(figures["accuracy"]), tuple(map(float, figures["interval"])), int(figures["questions"])
    return state


def load_tensors(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, others: Others = MappingProxyType({})
) -> None:
    """Put a checkpoint's weights and optimizer states into what they are of."""
    for name, (module, own) in {"": (model, optimizer), **others}.items():
        load_weights_file(folder / _file(name, "weights"), module)
        parameters = dict(module.named_parameters())
        with reading(folder / _file(name, "optimizer"), "take the checkpoint before it"):
            for key, tensor in load_file(folder / _file(name, "optimizer")).items():
                kind, _, owner = key.partition(":")
                parameter = parameters[owner]
                if kind != "step" and tensor.shape != parameter.shape:
                    raise ValueError(f"{key} has the shape {tuple(tensor.shape)}")
                own.state[parameter][kind] = tensor if kind == "step" else tensor.to(parameter.device)


def _file(name: str, what: str) -> str:
    return f"{name}.{what}.safetensors" if name else f"{what}.safetensors"


def load_weights_file(path: Path, model: nn.Module) -> None:
    """Put the weights of a checkpoint's file into the model."""
    with reading(path, "take another checkpoint"):
        put_weights(load_file(path), trained_weights(model))


def put_weights(weights: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> None:
    """Copy tensors by name into those that are held."""
    assert weights.keys() == held.keys(), "the checkpoint is of another model"
    for name, tensor in held.items():
        tensor.copy_(weights[name])


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{kind}:{name}": value.cpu().contiguous()
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def problem_of(folder: Path) -> str | None:
    """What keeps a checkpoint from being used, in words; None where it agrees with its manifest."""
    try:
        manifest = read_object(folder / "manifest.json")
        for name, digest in manifest.items():
            if name != Path(name).name or name in {"", ".", ".."} or "\0" in name:
                return f"its manifest names {name!r}, which is no file of it"
            if file_sha256(folder / name) != digest:
                return f"{name} does not agree with its hash"
        if unknown := sorted({path.name for path in folder.glob("*.safetensors")} - set(manifest)):
            return f"cut manifest: {unknown[0]} is not in it"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"cannot be read ({error})"
    return None if {"weights.safetensors", "optimizer.safetensors", "state.json"} <= set(manifest) else "cut manifest"


def drop_old(run: RunFolder, state: State) -> None:
    """Keep the checkpoints of the last two steps and of the best; those of later steps than the state's could not be
    used, or the run would not be back at it."""
    folders = checkpoint_folders(run.path)
    steps = [step for step in folders if step <= state.step]
    scored = [step for step in steps if str(step) in state.evaluations]
    best = max(scored, key=lambda step: (state.evaluations[str(step)]["accuracy"], step), default=None)
    for step, folder in folders.items():
        if step not in {*steps[-2:], best}:
            shutil.rmtree(folder)
