"""Weights on their way to engines in other processes: by Ray's object store, or by files in a shared folder.

A parcel is a list of named arrays of at most a gigabyte, unless one weight alone is larger. Arrays are numpy's, because
Ray stores those without a copy for the reader; torch tensors would be pickled, which takes a hundred times as long.
numpy has no bfloat16, so such weights travel as int16.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gruppo.models.weights import WeightSource
from gruppo.runs.atomic import writing

PARCEL_BYTES = 10**9

Named = tuple[str, str, np.ndarray]  # name, dtype and values of a weight


@dataclass(frozen=True)
class Published:
    """Weights that engines can fetch. `parcels`: references of Ray, or files, in order."""

    parcels: Sequence[Any]
    size: int


class Way(Protocol):
    """How weights get to the engines."""

    def publish(self, source: WeightSource, dtypes: Mapping[str, torch.dtype]) -> Published:
        """Make weights available to all engines, in these dtypes. The weights published before may be gone."""

    def close(self) -> None:
        """Remove what is left."""


class Objects:
    """By Ray's object store. The weights are there as long as the caller keeps what `publish` returned."""

    def publish(self, source: WeightSource, dtypes: Mapping[str, torch.dtype]) -> Published:
        """See `Way`."""
        parcels, size = [], 0
        for parcel in _parcels(source, dtypes):
            size += sum(tensor.nbytes for _, tensor in parcel)
            parcels.append(ray.put([_as_array(name, tensor) for name, tensor in parcel]))
        return Published(parcels, size)

    def close(self) -> None:
        """See `Way`."""


class Files:
    """By safetensors files in a folder that all machines see. Holds the last two published versions for a moment."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder.absolute(), 0
        self.close()  # what a killed run has left

    def publish(self, source: WeightSource, dtypes: Mapping[str, torch.dtype]) -> Published:
        """See `Way`. Raises WriteError if the disk is full."""
        self.number += 1
        folder = self.folder / f"{self.number}"
        files: list[Path] = []
        size = 0
        with writing(folder, folder):
            folder.mkdir(parents=True)
            for parcel in _parcels(source, dtypes):
                files.append(folder / f"{len(files) + 1:05d}.safetensors")
                save_file(dict(parcel), files[-1])
                size += sum(tensor.nbytes for _, tensor in parcel)
        shutil.rmtree(self.folder / f"{self.number - 1}", ignore_errors=True)
        return Published(files, size)

    def close(self) -> None:
        """See `Way`."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _parcels(source: WeightSource, dtypes: Mapping[str, torch.dtype]) -> Iterator[list[tuple[str, Tensor]]]:
    parcel: list[tuple[str, Tensor]] = []
    size = 0
    for name, weight in source:
        tensor = weight.detach().to("cpu", dtypes.get(name, weight.dtype)).contiguous()
        if parcel and size + tensor.nbytes > PARCEL_BYTES:
            yield parcel
            parcel, size = [], 0
        parcel.append((name, tensor))
        size += tensor.nbytes
    if parcel:
        yield parcel


def _as_array(name: str, tensor: Tensor) -> Named:
    array = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return name, str(tensor.dtype).removeprefix("torch."), array.numpy()


def received(parcels: Sequence[Any], device: torch.device) -> WeightSource:
    """Published weights, in the process of an engine. Fetches one parcel at a time."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for parcel in parcels:
            if isinstance(parcel, Path):
                yield from load_file(parcel, device=str(device)).items()
                continue
            for name, dtype, array in ray.get(parcel):
                with warnings.catch_warnings():  # the array is read-only, and the engine only reads it
                    warnings.simplefilter("ignore", UserWarning)
                    tensor = torch.from_numpy(array)
                yield name, tensor.view(getattr(torch, dtype)).to(device)

    return WeightSource(nn.Module(), tensors)
