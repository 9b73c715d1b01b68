"""Completion lengths, devices, and assumptions."""

from __future__ import annotations

from dataclasses import fields

import pytest

from gruppo.errors import UsageError
from gruppo.planning.assumptions import Assumptions
from gruppo.planning.devices import known_devices, read_cluster
from gruppo.planning.lengths import Lengths, lengths_with_mean


@pytest.mark.parametrize(("mean", "longest"), [(1000, 4096), (3900, 4096), (12, 28672), (1, 2)])
def test_lengths_have_the_given_mean_and_limit(mean: float, longest: float) -> None:
    lengths = lengths_with_mean(mean, longest, 0.7)
    assert lengths.mean == pytest.approx(mean, rel=1e-9)
    assert max(lengths.values) <= longest
    assert list(lengths.values) == sorted(lengths.values)


def test_without_a_limit_lengths_are_log_normal() -> None:
    """The mean of a log-normal distribution is exp(µ + σ²/2), its median exp(µ)."""
    lengths = lengths_with_mean(100, 1e9, 0.5)
    median = lengths.values[len(lengths.values) // 2]
    assert median == pytest.approx(100 / 2.718281828 ** (0.5**2 / 2), rel=0.01)


def test_lengths_at_the_limit_are_all_equal() -> None:
    assert set(lengths_with_mean(512, 512, 0.7).values) == {512.0}


def test_contexts_are_averages_over_all_tokens() -> None:
    """Against enumeration. Lengths are real numbers, so a token is at the middle of its step: half a token later."""
    lengths, prompt = Lengths((2.0, 5.0, 11.0)), 3
    sampled = [prompt + age for length in (2, 5, 11) for age in range(length)]
    assert lengths.mean_context(prompt) == pytest.approx(sum(sampled) / len(sampled) + 0.5)
    trained = [age for length in (2, 5, 11) for age in range(prompt + length)]
    assert lengths.training_context(prompt) == pytest.approx(sum(trained) / len(trained) + 0.5)


@pytest.mark.parametrize(
    ("text", "machines", "per_machine", "name"),
    [("8xH100", 1, 8, "H100"), ("1xh200", 1, 1, "H200"), ("32xH20", 4, 8, "H20"), ("3x6xL40S", 3, 6, "L40S"),
     (" 2 x 4 x 4090", 2, 4, "RTX4090"), ("4xa100", 1, 4, "A100-80GB"), ("4xA100_40GB", 1, 4, "A100-40GB"),
     ("8xMI300X", 1, 8, "MI300X")],
)  # fmt: skip
def test_devices_are_read(text: str, machines: int, per_machine: int, name: str) -> None:
    cluster = read_cluster(text)
    assert (cluster.machines, cluster.per_machine, cluster.device.name) == (machines, per_machine, name)
    assert cluster.devices == machines * per_machine


@pytest.mark.parametrize(
    ("text", "message"),
    [("H100", "must be NUMBERxDEVICE"), ("0xH100", "must be NUMBERxDEVICE"), ("0x8xH100", "must be NUMBERxDEVICE"),
     ("8xH10", 'unknown device H10; did you mean "H100"'), ("8xTPU", "unknown device TPU; known: A100-40GB"),
     ("12xH100", "do not fill machines of 8"), ("1x2x3xH100", "must be NUMBERxDEVICE"), ("", "must be NUMBERxDEVICE")],
)  # fmt: skip
def test_other_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_cluster(text)


def test_every_device_has_plausible_figures_and_a_source() -> None:
    """Units are easily mistaken by a power of ten: operations per byte, and seconds to read all memory once."""
    for device in known_devices().values():
        assert 30 < device.flops / device.bandwidth < 600, device
        assert 0.01 < device.memory / device.bandwidth < 0.1, device
        assert device.link < device.bandwidth
        assert "data sheet" in device.source or "specification" in device.source or "white paper" in device.source
        assert device.read_in.startswith("https://")


def test_every_assumption_has_a_meaning_and_a_source() -> None:
    for name, number in Assumptions().named().items():
        assert number["meaning"], name
        assert number["source"], name
    assert len(fields(Assumptions)) == len(Assumptions().named())


@pytest.mark.parametrize(
    ("values", "message"),
    [({"mfu": 1.5}, "mfu = 1.5: must be more than 0 and at most 1 "), ({"slots": 0}, "slots = 0: must be more than 0"),
     ({"mean_tokens": -3}, "mean_tokens = -3: must be more than 0"), ({"mfu": float("nan")}, "mfu = nan: must be")],
)  # fmt: skip
def test_impossible_assumptions_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Assumptions(**values)
