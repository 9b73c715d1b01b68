"""Checkpoints: everything that a run needs to continue as if it had never stopped.

safetensors and JSON only. There is no random state to save: every sample is a function of the seed, the step and the
numbers in `State`. Frozen weights are not in a checkpoint. Neither is a reference that is the initial model, whose hash
is in environment.json. A later iteration's reference is included, as a link to one file.
A manifest holds the hash of every file. A checkpoint that does not match its manifest is skipped.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gruppo.errors import RunError, UsageError
from gruppo.models.weights import not_finite_in, trained_weights
from gruppo.runs.atomic import publish, recover, write_whole, writing
from gruppo.runs.folder import RunFolder, checkpoint_folders
from gruppo.runs.reading import read_object, reading
from gruppo.training.shard_files import TensorFiles, as_rows_of, local_tensor, save_tensors, shard_names
from gruppo.utils.files import file_sha256, link_file
from gruppo.utils.waiting import waiting_for


@dataclass
class State:
    """State of a run.

    `step`: steps done. `cursor`: prompts sampled. `iteration`: outer iterations begun. `labels`: the hash of each table
    of labels, by file name. `evaluated`: the evaluation due at this step is done. `evaluations`: its metrics by step.
    `benchmarks`: metrics of the other evaluation sets, by step and name. `lengths`: bytes of the append-only files.
    `evaluations_from`: the first step whose evaluation is comparable with later ones, after a change of [evaluation].
    """

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
    evaluations_from: int = 0

    @property
    def comparable(self) -> dict[str, dict[str, Any]]:
        """The evaluations that can be compared with each other, by step."""
        return {step: figures for step, figures in self.evaluations.items() if int(step) >= self.evaluations_from}


# The trained modules with their optimizers. The key is the prefix of their file names; the policy has none.
Trained = Mapping[str, tuple[nn.Module, torch.optim.Optimizer]]


def save_checkpoint(run: RunFolder, save: Callable[[Path], None], state: State, files: Sequence[Path] = ()) -> Path:
    """Write checkpoints/step-NNNNNN and delete old checkpoints (see `drop_old`).

    `save`: writes the models (see `save_tensors`) and the steps that were sampled ahead to the folder. `files`: further
    files of the checkpoint, which are linked and must not be written to any more.
    """
    state.lengths = run.lengths()
    folder = run.path / "checkpoints" / f"step-{state.step:06d}"
    building = folder.with_name(f".writing-{folder.name}")
    with writing(folder, building):
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        save(building)
        for file in files:
            link_file(file, building / file.name)
        write_whole(building / "state.json", json.dumps(asdict(state), indent=2).encode())
        manifest = {path.name: file_sha256(path) for path in sorted(building.iterdir())}
        write_whole(building / "manifest.json", json.dumps(manifest, indent=2).encode())
        publish(building, folder)
    drop_old(run, state)
    return folder


def save_models(folder: Path, models: Trained) -> None:
    """Write this process's shards of weights and optimizer states."""
    for name, (module, optimizer) in models.items():
        with waiting_for(f"the file system, to write {folder}"):
            save_tensors(folder, _file(name, "weights"), trained_weights(module))
            save_tensors(folder, _file(name, "optimizer"), _optimizer_tensors(module, optimizer))


def newest_checkpoint(run: RunFolder) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint, and a description of the problem of each newer one.

    Raises RunError if there are checkpoints but none is intact: starting again would discard the folder's contents.
    """
    recover(run.path)
    recover(run.path / "checkpoints")
    problems: list[str] = []
    for folder in reversed(checkpoint_folders(run.path).values()):
        with waiting_for(f"the file system, to read {folder}"):
            problem = problem_of(folder)
        if problem is None:
            return folder, problems
        problems.append(f"{folder.name}: {problem}")
    if problems:
        raise RunError(
            f"{run.path}: no checkpoint is intact ({'; '.join(problems)}), so the run cannot continue; restore the "
            "files from a copy, or start again with another --out; metrics and tables are unchanged"
        )
    return None, problems


def load_state(folder: Path) -> State:
    """The state in a checkpoint. Raises UsageError if it is not valid, even if its hash matches."""
    path = folder / "state.json"
    try:
        content = read_object(path)
        state = TypeAdapter(State).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise UsageError(f"{path}: is damaged: not the state of a run ({error.errors()[0]['msg']})") from None
    with reading(path, "use the previous checkpoint"):
        if unknown := content.keys() - asdict(state).keys():
            raise ValueError(f"{min(unknown)!r} is not a field")
        if min(state.step, state.cursor, state.iteration, *state.lengths.values()) < 0:
            raise ValueError("a count is negative")
        benchmarks = [figures for by_name in state.benchmarks.values() for figures in by_name.values()]
        for figures in [*state.evaluations.values(), *benchmarks]:
            float(figures["accuracy"]), tuple(map(float, figures["interval"])), int(figures["questions"])
    return state


def load_models(folder: Path, models: Trained) -> None:
    """Load this process's shards of a checkpoint's weights and optimizer states into the models and optimizers."""
    for name, (module, optimizer) in models.items():
        with waiting_for(f"the file system, to read {folder}"):
            load_weights_file(folder, module, _file(name, "weights"))
            with reading(folder / f"{_file(name, 'optimizer')}.safetensors", _ANOTHER):
                _put_optimizer_tensors(folder, _file(name, "optimizer"), module, optimizer)


_LIKE_PARAMETERS = {"exp_avg", "exp_avg_sq", "state1", "state2"}  # moments of AdamW, and of 8-bit AdamW
_ANOTHER = "use another checkpoint; without the folder of this one, --resume continues from the one before"


def _file(name: str, what: str) -> str:
    return f"{name}.{what}" if name else what


def load_weights_file(folder: Path, model: nn.Module, name: str = "weights") -> None:
    """Load a checkpoint's weights into the model."""
    with reading(folder / f"{name}.safetensors", _ANOTHER), TensorFiles(folder, name) as files:
        put_weights(files, trained_weights(model))


def read_tensors(folder: Path, name: str = "weights") -> dict[str, Tensor]:
    """The whole tensors of a checkpoint. Raises ValueError if a value is not finite: nothing can be learned then."""
    with TensorFiles(folder, name) as files:
        return _finite({key: files.rows(key) for key in files.names})


def _finite(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if problem := not_finite_in(tensors):
        raise ValueError(problem)
    return tensors


@torch.no_grad()
def put_weights(files: TensorFiles, targets: Mapping[str, Tensor]) -> None:
    """Copy tensors by name into `targets`, of which this process may hold shards."""
    assert files.names == targets.keys(), "the checkpoint belongs to another model"
    tensors = _finite({name: files.like(name, target) for name, target in targets.items()})
    for name, target in targets.items():
        local_tensor(target).copy_(tensors[name])


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{kind}:{name}": value if isinstance(value, DTensor) else _stored(kind, value)
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def _stored(kind: str, value: Tensor | int) -> Tensor:
    """A part of an optimizer's state as a tensor of its own. Tables of 8-bit moments are shared by all parameters."""
    tensor = torch.as_tensor(value).cpu().contiguous()
    return tensor.clone() if kind in {"qmap1", "qmap2"} else tensor


def _put_optimizer_tensors(folder: Path, name: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Set an optimizer's state. torch knows where each tensor belongs: a fused AdamW counts its steps on the device."""
    parameters = dict(model.named_parameters())
    lists = (group["params"] for group in optimizer.param_groups)
    numbers = {parameter: number for number, parameter in enumerate(chain.from_iterable(lists))}
    state: dict[int, dict[str, Tensor | int]] = defaultdict(dict)
    with TensorFiles(folder, name) as files:
        for key in sorted(files.names):
            kind, _, owner = key.partition(":")
            like = parameters[owner] if kind in _LIKE_PARAMETERS else None
            rows = files.rows(key) if like is None else files.like(key, like)
            tensor = _finite({key: rows})[key]
            counted = kind == "step" and not tensor.is_floating_point()  # a number of 8-bit AdamW, a tensor of AdamW
            part = int(tensor) if counted else tensor if like is None else as_rows_of(tensor, like)
            state[numbers[parameters[owner]]][kind] = part
    optimizer.load_state_dict({"state": dict(state), "param_groups": optimizer.state_dict()["param_groups"]})


def problem_of(folder: Path) -> str | None:
    """Why a checkpoint cannot be used; None if it matches its manifest."""
    try:
        manifest = read_object(folder / "manifest.json")
        for name, digest in manifest.items():
            if name != Path(name).name or name in {"", ".", ".."} or "\0" in name:
                return f"its manifest names {name!r}, which is not one of its files"
            if file_sha256(folder / name) != digest:
                return f"{name} does not match its hash"
        if unknown := sorted({path.name for path in folder.glob("*.safetensors")} - set(manifest)):
            return f"truncated manifest: {unknown[0]} is not in it"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"cannot be read ({error})"
    whole = "state.json" in manifest and all(shard_names(manifest, name) for name in ("weights", "optimizer"))
    return None if whole else "truncated manifest"


def drop_old(run: RunFolder, state: State) -> None:
    """Keep the checkpoints of the last two steps and of the best evaluated step, and delete the others.

    Checkpoints of later steps than the state's are deleted too: they were unusable, or the run would not be back here.
    """
    folders = checkpoint_folders(run.path)
    steps = [step for step in folders if step <= state.step]
    evaluations = state.comparable
    scored = [step for step in steps if str(step) in evaluations]
    best = max(scored, key=lambda step: (evaluations[str(step)]["accuracy"], step), default=None)
    for step, folder in folders.items():
        if step not in {*steps[-2:], best}:
            shutil.rmtree(folder)
