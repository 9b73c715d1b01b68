"""Named tensors in safetensors files: one file of a single process, or one file for each shard of the weights.

    weights.safetensors                      whole tensors
    weights-00001-of-00002.safetensors       the first part of the rows of every tensor, and so on

A shard's metadata has the first row of each tensor, as JSON. So every rank writes its own shards and reads the rows
that it needs, whatever the number of ranks that wrote them.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


def save_tensors(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write this process's rows of named tensors. Of ranks with the same rows, only the first writes them."""
    meshes = [tensor.device_mesh for tensor in tensors.values() if isinstance(tensor, DTensor)]
    if not meshes:
        _save(folder / f"{name}.safetensors", tensors, {})
        return
    *copy, place = meshes[0].get_coordinate() or ()
    if any(copy):
        return
    kept = {key: tensor for key, tensor in tensors.items() if isinstance(tensor, DTensor) or not place}
    rows = {key: own_rows(tensor)[0] for key, tensor in kept.items()}
    file = folder / f"{name}-{place + 1:05d}-of-{meshes[0].shape[-1]:05d}.safetensors"
    _save(file, {key: local_tensor(tensor) for key, tensor in kept.items()}, {"rows": json.dumps(rows, sort_keys=True)})


def _save(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, file, metadata or None)


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: Tensor) -> tuple[int, int]:
    """The first row of a tensor that this process holds, and how many it holds. A number is a single row."""
    count = len(tensor) if tensor.ndim else 1
    if not isinstance(tensor, DTensor):
        return 0, count
    place, parts = (tensor.device_mesh.get_coordinate() or [0])[-1], tensor.device_mesh.shape[-1]
    size = -(-count // parts)  # as in torch.chunk
    first = min(place * size, count)
    return first, min(size, count - first)


def as_rows_of(rows: Tensor, like: Tensor) -> Tensor:
    """This process's rows as a tensor that is sharded like another of the same shape."""
    if not isinstance(like, DTensor):
        return rows
    rows = rows.to(like.device)
    return DTensor.from_local(rows, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def shard_names(files: Iterable[str], name: str) -> list[str] | None:
    """The files, of these, that hold the tensors of this name; None if one is missing."""
    found = set(files)
    if f"{name}.safetensors" in found:
        return [f"{name}.safetensors"]
    counts = {int(match[3]) for file in found if (match := _SHARD.fullmatch(file)) and match[1] == name}
    for count in counts:
        names = [f"{name}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        if found >= set(names):
            return names
    return None


class TensorFiles:
    """The named tensors in the files of a folder, open for reading. `names`: of the tensors."""

    def __init__(self, folder: Path, name: str) -> None:
        names = shard_names((path.name for path in folder.iterdir()), name)
        if names is None:
            raise FileNotFoundError(2, "No such file", str(folder / f"{name}.safetensors"))
        self._stack = ExitStack()
        self._pieces: dict[str, list[tuple[int, Any, Any]]] = defaultdict(list)
        for file in names:
            opened: Any = self._stack.enter_context(safe_open(folder / file, "pt"))
            first = json.loads((opened.metadata() or {}).get("rows", "{}"))
            for key in opened.keys():  # noqa: SIM118  not a mapping
                self._pieces[key].append((int(first.get(key, 0)), opened, opened.get_slice(key)))

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def names(self) -> set[str]:
        """Names of the tensors."""
        return set(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        first, _, last = max(self._pieces[name], key=lambda piece: piece[0])
        rows, *rest = last.get_shape() or [None]
        return () if rows is None else (first + rows, *rest)

    def rows(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Rows of a tensor, by default all of them."""
        if not self.shape(name):
            return self._pieces[name][0][1].get_tensor(name)  # type: ignore[no-any-return]
        end = self.shape(name)[0] if count is None else first + count
        parts = []
        for start, _, piece in sorted(self._pieces[name], key=lambda piece: piece[0]):
            low, high = max(first, start), min(end, start + piece.get_shape()[0])
            if low < high:
                parts.append(piece[low - start : high - start])
        if sum(len(part) for part in parts) != end - first:
            raise ValueError(f"{name}: rows {first} to {end} are not all in the files")
        return torch.cat(parts) if parts else self._pieces[name][0][2][:0]

    def like(self, name: str, tensor: Tensor) -> Tensor:
        """This process's rows of a tensor that is sharded as another is. Raises ValueError for another shape."""
        if self.shape(name) != tuple(tensor.shape):
            raise ValueError(f"{name} has the shape {self.shape(name)}")
        return self.rows(name, *own_rows(tensor))
