"""Deterministic kernels are asked for on cuda, where sums over an index depend on the order of threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import gruppo  # noqa: F401  # sets the environment variables
from gruppo.utils.determinism import deterministic
from tests.conftest import make_policy

CUDA, CPU, MPS = map(torch.device, ("cuda", "cpu", "mps"))


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    def settings() -> tuple[bool, bool, bool]:
        strict, warns = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        return strict, warns, torch.utils.deterministic.fill_uninitialized_memory

    before = settings()
    yield
    assert settings() == before


def test_kernels_are_deterministic_on_cuda_alone() -> None:
    for device, expected in ((CUDA, True), (CPU, False), (MPS, False)):
        with deterministic(device):
            assert torch.are_deterministic_algorithms_enabled() == expected
            assert torch.utils.deterministic.fill_uninitialized_memory != expected
            with deterministic(device):
                assert torch.is_deterministic_algorithms_warn_only_enabled() == expected
            assert torch.are_deterministic_algorithms_enabled() == expected


def test_the_setting_ends_with_an_error() -> None:
    with pytest.raises(MemoryError), deterministic(CUDA):
        raise MemoryError


def test_blocks_of_two_threads_may_overlap() -> None:
    """One that ends first must not end the setting of the other."""
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with deterministic(CUDA):
            entered.set()
            left.wait(30)

    thread = threading.Thread(target=other)
    with deterministic(CUDA):
        thread.start()
        assert entered.wait(30)
    assert torch.are_deterministic_algorithms_enabled()
    left.set()
    thread.join()


def test_a_stricter_setting_of_the_caller_stays() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with deterministic(CUDA):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_on_cuda_computes_with_them(dtype: torch.dtype) -> None:
    policy = make_policy(dtype)
    with policy.precision():
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.is_autocast_enabled("cpu") == (dtype == torch.bfloat16)
    with replace(policy, device=CUDA, dtype=torch.float32).precision():
        assert torch.are_deterministic_algorithms_enabled()


def test_matmuls_of_cuda_have_workspaces_of_fixed_sizes() -> None:
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in {":4096:8", ":16:8"}, "what torch accepts as deterministic"
