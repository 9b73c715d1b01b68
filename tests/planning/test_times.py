"""Times and memory of sampling and training, against numbers worked out by hand and against brute force."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gruppo.planning.assumptions import Assumptions
from gruppo.planning.devices import Cluster, Device
from gruppo.planning.lengths import Lengths, lengths_with_mean
from gruppo.planning.sampling import Engine, Samples, sampling_time
from gruppo.planning.shape import ModelShape
from gruppo.planning.trainer import Passes, rank_bytes, training_state, training_time

# 1e9 weights, all used: a pass reads 2e9 bytes; the cache of a token has 2 · 2 · 10 · 2 · 50 = 4,000 bytes.
SHAPE = ModelShape("m", 1e9, 1e9, layers=10, hidden=200, heads=4, kv_heads=2, head_dim=50, feed_forward=800)
DEVICE = Device("d", flops=1e14, memory=1e10, bandwidth=1e12, link=1e11, source="", read_in="")
PLAIN = Assumptions(mfu=0.5, bandwidth_share=0.5, iteration_ms=1.0, reduce_us=10.0, network_gb_s=10.0)


def engine(devices: int = 1, assumed: Assumptions = PLAIN, memory: float = 9e9) -> Engine:
    return Engine(SHAPE, DEVICE, devices, memory, assumed)


def test_a_token_of_one_completion_takes_reading_the_weights() -> None:
    """2e9 bytes at 0.5e12 a second are 4 ms; 1,000 cached tokens 4e6 bytes, 8 µs; and 1 ms of overhead."""
    assert engine().token_seconds(1, 1000) == pytest.approx(4e-3 + 8e-6 + 1e-3)


def test_a_token_of_many_completions_takes_computing() -> None:
    """2e9 operations each at 0.5e14 a second: 1,000 completions take 40 ms, more than the 4 ms of reading."""
    assert engine().token_seconds(1000, 1000) == pytest.approx(40e-3 + 8e-3 + 1e-3)


def test_two_devices_halve_the_work_and_add_sums() -> None:
    """20 sums of 10 µs, each moving 2 · 1/2 · 2 · 200 = 400 bytes at 0.5e11 a second."""
    sums = 20 * (10e-6 + 400 / 0.5e11)
    assert engine(2).token_seconds(1, 1000) == pytest.approx(2e-3 + 4e-6 + sums + 1e-3)


def test_the_cache_limits_the_slots() -> None:
    """9e9 bytes less 2e9 of weights: 7e9 bytes are 1,750 completions of 1,000 tokens, of which 256 may run."""
    assert engine().slots(1000) == 256
    assert engine().slots(10_000) == 175
    assert engine(memory=1e9).slots(1000) == 0
    assert engine(assumed=replace(PLAIN, slots=2000)).slots(1000) == 1750


def by_single_tokens(engine: Engine, values: list[int], slots: int, prompt: float) -> float:
    """Seconds to sample completions of these lengths, token by token, in the order given."""
    waiting, running, seconds = list(values), [], 0.0
    while waiting or running:
        while waiting and len(running) < slots:
            running.append([waiting.pop(0), 0])
        context = sum(prompt + age + 0.5 for _, age in running) / len(running)
        seconds += engine.token_seconds(len(running), context)
        running = [[length, age + 1] for length, age in running if age + 1 < length]
    return seconds


@pytest.mark.parametrize("slots", [1, 3, 7, 40])
def test_sampling_takes_as_long_as_single_tokens(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[list[float]] = []
    monkeypatch.setattr("random.Random.shuffle", lambda self, values: shown.append(list(values)))
    limited = engine(assumed=replace(PLAIN, slots=slots))
    lengths = Lengths(tuple(float(value) for value in range(1, 41)))
    found = sampling_time(limited, 1, Samples(40, 8, 5.0, lengths, 60.0))
    order = [round(value) for value in shown[0]]
    assert order == [*range(1, 40), 60]
    prefill = limited.prefill_seconds(40.0, 2.5)
    assert found.seconds == pytest.approx(prefill + by_single_tokens(limited, order, slots, 5.0), rel=1e-12)
    assert found.running == slots
    assert found.limit == ("completions" if slots == 40 else "slots")


def test_the_tail_is_what_follows_nine_tenths_of_the_completions() -> None:
    """Ten completions at once: nine of 10 tokens, then 90 more tokens of the last one alone."""
    found = sampling_time(engine(), 1, Samples(10, 10, 1.0, Lengths((10.0,) * 10), 100.0))
    alone = 90 * engine().token_seconds(1, 1 + 55)
    assert found.tail == pytest.approx(alone)


def test_more_completions_than_are_simulated_take_as_long_as_their_work() -> None:
    """Equal lengths in full rounds: each simulated completion stands for several."""
    lengths = Lengths((50.0,) * 400)
    few = sampling_time(engine(), 1, Samples(256, 1, 1.0, lengths, 50.0))
    many = sampling_time(engine(), 1, Samples(256 * 12, 1, 1.0, lengths, 50.0))
    assert many.seconds == pytest.approx(12 * few.seconds, rel=1e-3)


def test_engines_share_the_completions() -> None:
    lengths = lengths_with_mean(200, 1000, 0.7)
    whole = sampling_time(engine(), 1, Samples(200, 8, 10.0, lengths, 1000.0))
    half = sampling_time(engine(), 2, Samples(400, 16, 10.0, lengths, 1000.0))
    assert half.seconds == pytest.approx(whole.seconds)


def test_training_takes_its_operations() -> None:
    """One device, 1e6 tokens without context: 2e15 operations a forward pass, 40 s at 0.5e14 a second.

    One scoring pass, and an update of 3 and 1 for recomputation, with 28e9 bytes of the optimizer at 0.5e12 a second.
    """
    cluster = Cluster(DEVICE, 1, 1)
    found = training_time(SHAPE, cluster, 1, Passes(1, 1), 1e6, 0.0, PLAIN)
    assert found.scores == pytest.approx(40)
    assert found.updates == pytest.approx(160 + 0.056)
    assert not found.gathering
    without = training_time(SHAPE, cluster, 1, Passes(0, 2, recompute=False), 1e6, 0.0, PLAIN)
    assert without.seconds == pytest.approx(2 * (120 + 0.056))
    adapters = training_time(SHAPE, cluster, 1, Passes(0, 1, frozen=True), 1e6, 0.0, PLAIN)
    assert adapters.seconds == pytest.approx(120)


def test_attention_adds_to_training() -> None:
    """4 · 10 layers · 4 heads · 50 = 8,000 operations for each token attended to: 1,000 of them add 0.4%."""
    cluster = Cluster(DEVICE, 1, 1)
    found = training_time(SHAPE, cluster, 1, Passes(1, 0), 1e6, 1000.0, PLAIN)
    assert found.scores == pytest.approx(40 * (1 + 8e6 / 2e9))


def test_gathering_weights_over_a_slow_network_takes_longer_than_computing() -> None:
    """Two machines: 10 micro-batches a rank, half of 1e9 weights each, 8 bytes, at 0.5 · 1e9 bytes a second."""
    cluster = Cluster(DEVICE, 2, 1)
    slow = replace(PLAIN, network_gb_s=1.0, micro_batch_tokens=100.0)
    found = training_time(SHAPE, cluster, 2, Passes(1, 1), 2000.0, 0.0, slow)
    assert found.gathering
    assert found.updates == pytest.approx(10 * 8 * 0.5e9 / 0.5e9 + 28e9 / 2 / 0.5e12)
    assert found.scores == pytest.approx(10 * 2 * 0.5e9 / 0.5e9)


def test_state_and_activations_of_a_rank() -> None:
    whole = training_state(SHAPE, copies=1, reference=True, lora_rank=None)
    assert (whole.trained, whole.frozen) == (16e9, 4e9)
    parts = rank_bytes(SHAPE, whole, 4, recompute=True, tokens=1000)
    assert parts["state"] == 5e9
    assert parts["gathered weights"] == pytest.approx(2 * 2 * 1e9 / 10)  # two of ten layers
    assert parts["activations"] == 1000 * 200 * (2 * 10 + 34)
    assert rank_bytes(SHAPE, whole, 4, recompute=False, tokens=1000)["activations"] == 1000 * 200 * 34 * 10
    adapters = training_state(SHAPE, copies=1, reference=True, lora_rank=8)
    assert adapters.frozen == 2e9
    assert adapters.trained == 16 * SHAPE.lora_parameters(8)
