"""TRL's batch arithmetic, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from gruppo.errors import UsageError
from gruppo.trl import DPOConfig, GRPOConfig, RLOOConfig
from gruppo.trl.batches import batches_of
from gruppo.trl.configs import TrainingArguments
from gruppo.trl.recipes import length_of


def grpo(device: int, accumulation: int, group: int, **changes: Any) -> GRPOConfig:
    return GRPOConfig(
        per_device_train_batch_size=device,
        gradient_accumulation_steps=accumulation,
        num_generations=group,
        **changes,
    )


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (GRPOConfig(), (1, 8, 1, 1)),  # TRL's defaults: 8 completions of one prompt
        (grpo(8, 2, 4), (4, 4, 1, 1)),
        (grpo(8, 2, 8, steps_per_generation=8), (8, 8, 4, 1)),
        (grpo(4, 1, 8, generation_batch_size=32), (4, 8, 8, 1)),
        (grpo(4, 4, 4, steps_per_generation=1), (4, 4, 1, 1)),  # four generation batches make one update
        (grpo(8, 1, 8, num_iterations=3), (1, 8, 1, 3)),
        (RLOOConfig(), (4, 2, 1, 1)),
        (DPOConfig(per_device_train_batch_size=3, gradient_accumulation_steps=5), (15, 1, 1, 1)),
    ],
)
def test_prompts_group_minibatches_and_iterations(args: TrainingArguments, expected: tuple[int, int, int, int]) -> None:
    found = batches_of(args)
    assert (found.prompts, found.group, found.minibatches, found.iterations) == expected
    assert found.updates == found.minibatches * found.iterations


def test_the_line_says_how() -> None:
    sentence = batches_of(grpo(8, 2, 8, steps_per_generation=8, num_iterations=2)).sentence
    assert sentence == (
        "per_device_train_batch_size 8 × steps_per_generation 8 = 64 completions per step = 8 prompts × 8 generations, "
        "in 4 minibatches, used 2 times"
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (grpo(3, 1, 2), ["num_generations = 2", "3 completions", "multiple"]),
        (grpo(8, 1, 1), ["num_generations = 1", "at least 2"]),
        (
            grpo(8, 4, 8, steps_per_generation=6),
            ["steps_per_generation = 6", "multiple of gradient_accumulation_steps"],
        ),
        (grpo(8, 4, 8, steps_per_generation=2, num_iterations=2), ["num_iterations = 2"]),
        (grpo(8, 1, 8, steps_per_generation=2, generation_batch_size=16), ["only one"]),
        (grpo(8, 1, 8, generation_batch_size=12), ["generation_batch_size = 12", "multiple of"]),
        (grpo(0, 1, 8), ["per_device_train_batch_size = 0"]),
    ],
)
def test_batches_that_do_not_fit_are_refused(args: GRPOConfig, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        batches_of(args)
    assert all(word in str(caught.value) for word in words)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="multiply gradient_accumulation_steps by 4"):
        batches_of(GRPOConfig())


@pytest.mark.parametrize(
    ("args", "rows", "steps"),
    [
        (grpo(8, 1, 4, num_train_epochs=3), 10, 15),  # 5 steps of 2 prompts a pass
        (grpo(8, 1, 4, num_train_epochs=1), 11, 5),  # the last prompt of a pass does not fill a step
        (grpo(8, 1, 4, num_train_epochs=0.5), 10, 3),
        (grpo(8, 1, 4, max_steps=7), 10, 7),
        (grpo(8, 1, 4, max_steps=7, num_iterations=2), 10, 4),  # 8 optimizer steps, at least the 7
        (grpo(8, 1, 4, max_steps=7), None, 7),
        (grpo(64, 1, 4, num_train_epochs=2), 10, 2),  # fewer rows than a step has prompts
    ],
)
def test_length(args: GRPOConfig, rows: int | None, steps: int) -> None:
    assert length_of(args, batches_of(args), rows).steps == steps


def test_a_stream_needs_max_steps() -> None:
    with pytest.raises(UsageError, match="max_steps = -1"):
        length_of(GRPOConfig(), batches_of(GRPOConfig()), None)


def test_intervals_count_steps_of_gruppo() -> None:
    args = grpo(8, 1, 4, max_steps=40, num_iterations=2)
    batches = batches_of(args)
    length = length_of(args, batches, 10)
    assert length.steps == 20
    assert length.every(batches, "steps", 4, "save_strategy") == 2
    assert length.every(batches, "steps", 0.1, "save_strategy") == 2  # a tenth of 40 optimizer steps
    assert length.every(batches, "epoch", None, "save_strategy") == 5
    assert length.every(batches, "no", 4, "save_strategy") == 0
    with pytest.raises(UsageError, match='save_strategy = "best"'):
        length.every(batches, "best", 4, "save_strategy")
