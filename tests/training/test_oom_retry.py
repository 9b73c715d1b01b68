"""Out of memory: the failed operation is retried with a smaller size, and the failed attempt leaves nothing behind."""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

import gruppo.training.optimizer
from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.native.engine import NativeEngine
from gruppo.engines.resizing import ResizingEngine
from gruppo.errors import RunError, out_of_memory
from gruppo.runs.reading import read_lines
from gruppo.runs.results import Result
from gruppo.training import policy_trainer
from gruppo.training.api import train
from gruppo.utils.metrics import Metrics
from gruppo.utils.oom_retry import BatchSizes
from tests.conftest import make_policy
from tests.small_runs import ROWS, at_call, killed, recipe, small_run

ALLOCATOR = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
CHANGES = {"run__steps": 3, "run__checkpoint_every": 1, "method__inner_updates": 2}
PPO = {"method__name": "ppo", "critic__learning_rate": 1e-3}


def fails(kind: type[BaseException] = RuntimeError) -> Callable[[], None]:
    def raises() -> None:
        raise kind(ALLOCATOR)

    return raises


def close(first: Result, second: Result) -> None:
    """Check that metrics and weights of two runs are equal up to rounding."""
    for before, after in zip(first.metrics, second.metrics, strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            if not name.startswith(("time/", "memory/")):
                assert after[name] == (None if value is None else pytest.approx(value, rel=2e-3, abs=2e-6)), name
    files = [sorted((each.path / "checkpoints").iterdir())[-1] for each in (first, second)]
    for name in ("weights.safetensors", "critic.weights.safetensors"):
        if (files[0] / name).is_file():
            expected, actual = load_file(files[0] / name), load_file(files[1] / name)
            for key, tensor in expected.items():
                torch.testing.assert_close(actual[key], tensor, rtol=1e-3, atol=2e-5)


@pytest.fixture(scope="module")
def whole(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    out = tmp_path_factory.mktemp("whole")
    return {
        "grpo": small_run(tiny_folder, out / "grpo", **CHANGES),
        "ppo": small_run(tiny_folder, out / "ppo", **CHANGES, **PPO),
    }


# What fails at which call, with which error, and in which method's run; then which size is reduced. A GRPO step has two
# micro-batches here (one in the run that it is compared with), and four after halving.
PLACES = {
    "sampling": ("gruppo.engines.native.engine._Decoder.decode", 12, MemoryError, "grpo", "slots"),
    "forward": ("gruppo.training.policy_trainer.batch_loss", 2, RuntimeError, "grpo", "micro_batch_tokens"),
    "forward of the second inner update": (
        "gruppo.training.policy_trainer.batch_loss",
        4,
        RuntimeError,
        "grpo",
        "micro_batch_tokens",
    ),
    "backward": ("torch.Tensor.backward", 6, torch.OutOfMemoryError, "grpo", "micro_batch_tokens"),
    "norm of the gradient": ("torch.nn.utils.clip_grad_norm_", 2, RuntimeError, "grpo", "micro_batch_tokens"),
    "scoring": ("gruppo.training.policy_loss.score", 2, RuntimeError, "ppo", "micro_batch_tokens"),
    "values": ("gruppo.models.value_head.ScalarModel.numbers", 1, RuntimeError, "ppo", "micro_batch_tokens"),
    "value model": ("gruppo.training.value_model.critic_loss", 2, RuntimeError, "ppo", "micro_batch_tokens"),
    "value model's backward": ("torch.Tensor.backward", 4, MemoryError, "ppo", "micro_batch_tokens"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_failed_allocation_changes_only_sizes(
    place: str, tiny_folder: str, whole: dict[str, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, count, kind, method, size = PLACES[place]
    sizes: list[int] = []
    original = policy_trainer.score_batches if method == "ppo" else policy_trainer.batch_loss

    def sized(*args, **options):
        batches = args[2] if method == "ppo" else [args[2]]
        sizes.append(max(len(batch.token_ids) for batch in batches))
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("gruppo.models.packing.MAX_TOKENS", 60)
        patch.setattr(policy_trainer, original.__name__, sized)
        at_call(patch, target, count, fails(kind))
        result = small_run(tiny_folder, tmp_path / "run", **CHANGES, **(PPO if method == "ppo" else {}))
    close(whole[method], result)
    (event,) = read_lines(tmp_path / "run" / "events.jsonl")
    assert (event["kind"], event["size"]) == ("memory", size)
    assert event["after"] == event["before"] // 2
    assert "retried from its start" in event["message"]
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["chosen"][size] == event["after"]
    assert [each["step"] for each in environment["halvings"]] == [event["step"]]
    if size == "micro_batch_tokens":
        assert max(sizes) > 30
        assert max(sizes[-2:]) <= 30, "the retry is smaller"
        assert result.metrics[-1]["memory/micro_batch_tokens"] == event["after"]


def test_the_gradient_after_a_retry_equals_the_gradient_without_failure() -> None:
    """The third of three micro-batches fails: the retry starts without gradients, so nothing counts twice."""
    ids = torch.arange(1, 13).view(3, 4)
    seen: dict[bool, dict[str, torch.Tensor]] = {}
    tries = []
    for broken in (False, True):
        policy = make_policy()

        def loss(row, policy=policy, broken=broken):
            tries.append(int(row[0]))
            if broken and tries == [1, 5, 9]:
                raise RuntimeError(ALLOCATOR)
            return policy.model(row[None]).logits.square().mean()

        optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)

        def take(_norm, what, _batches, policy=policy, broken=broken):
            if what == "gradient norm":
                seen[broken] = {name: each.grad.clone() for name, each in policy.model.named_parameters()}

        def attempt(_tokens, policy=policy, loss=loss, optimizer=optimizer, take=take):
            assert all(each.grad is None for each in policy.model.parameters())
            return gruppo.training.optimizer.update(
                list(ids), loss, policy, policy.model, optimizer, 0.0, 1e9, take, lambda _: None
            )  # type: ignore[arg-type]

        tries.clear()
        BatchSizes(64, 1).run_with_retry("micro_batch_tokens", "updating", attempt)
        assert all(each.grad is None for each in policy.model.parameters())
    assert tries == [1, 5, 9, 1, 5, 9]
    for name, gradient in seen[False].items():
        torch.testing.assert_close(seen[True][name], gradient, rtol=0, atol=0)


def test_an_error_of_another_kind_leaves_no_gradient(policy) -> None:
    def loss(row):
        if int(row[0]) == 5:
            raise ValueError("broken on purpose")
        return policy.model(row[None]).logits.mean()

    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    rows = list(torch.arange(1, 9).view(2, 4))
    with pytest.raises(ValueError, match="on purpose"):
        gruppo.training.optimizer.update(
            rows, loss, policy, policy.model, optimizer, 0.0, 1.0, lambda *_: None, lambda _: None
        )  # type: ignore[arg-type]
    assert all(each.grad is None for each in policy.model.parameters())


def test_the_optimizer_step_is_not_retried(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_call(monkeypatch, "torch.optim.AdamW.step", 2, fails())
    with pytest.raises(RunError, match=r"optimizer's step .* may be half done"):
        small_run(tiny_folder, tmp_path / "run", **CHANGES)


def test_at_the_minimum_size_the_error_says_what_to_lower(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gruppo.training.policy_trainer.batch_loss", lambda *_, **__: fails()())
    with pytest.raises(
        RunError, match=r"micro-batch tokens already at the minimum \(9\).*smaller sampling\.max_tokens"
    ):
        small_run(tiny_folder, tmp_path / "run", **CHANGES)
    sizes = [each["after"] for each in read_lines(tmp_path / "run" / "events.jsonl") if each["kind"] == "memory"]
    assert sizes == [512, 256, 128, 64, 32, 16, 9], "two tokens of a prompt, and seven of eight are read"


def test_out_of_memory_elsewhere_ends_with_a_one_line_error(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gruppo.training.run.rollout_rows", lambda *_: fails(MemoryError)())
    with pytest.raises(RunError, match=r"out of memory .* resume from the last checkpoint"):
        small_run(tiny_folder, tmp_path / "run", **CHANGES)


def test_a_halved_size_survives_a_kill_and_is_reported_again(
    tiny_folder: str, whole: dict[str, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the step whose event the resume removes: the size is kept, and a new event reports it."""
    with monkeypatch.context() as patch:
        at_call(patch, "gruppo.training.policy_trainer.batch_loss", 4, fails())
        with killed(patch, "gruppo.training.run.TrainingRun._describe", 2):
            small_run(tiny_folder, tmp_path / "run", **CHANGES)
    seen: list[float] = []
    result = train(recipe(tiny_folder, **CHANGES), prompts=ROWS, out=tmp_path / "run", resume=True,
                   callbacks=[lambda _, line, __: seen.append(line["memory/micro_batch_tokens"])])  # fmt: skip
    assert seen == [512, 512]
    close(whole["grpo"], result)
    kinds = [(each["kind"], each.get("after")) for each in read_lines(tmp_path / "run" / "events.jsonl")]
    assert kinds == [("memory", 512), ("resume", None)]


def test_a_reward_model_learns_the_same(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"run__steps": 2, "run__checkpoint_every": 2, "reward_model__prompts": 6, "reward_model__batch_size": 8,
               "reward_model__learning_rate": 1e-3}  # fmt: skip
    first = small_run(tiny_folder, tmp_path / "whole", **changes)
    with monkeypatch.context() as patch:
        at_call(patch, "torch.Tensor.backward", 2, fails())
        at_call(patch, "gruppo.rollout.reward_model.probabilities", 3, fails())
        second = small_run(tiny_folder, tmp_path / "run", **changes)
    close(first, second)
    events = read_lines(tmp_path / "run" / "events.jsonl")
    phases = [event["during"] for event in events if event["kind"] == "memory"]
    assert phases == ["training the reward model", "scoring with the reward model"]


def test_fewer_slots_sample_the_same_completions(policy, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request((1, 2, 3), [(0, place, draw) for draw in range(4)]) for place in range(3)]
    options = SamplingParams(1.0, 6)
    wanted = NativeEngine(policy, 12).generate(requests, options)
    messages: list[str] = []
    sizes = BatchSizes(1024, 12, on_reduced=lambda reduced: messages.append(str(reduced)))
    at_call(monkeypatch, "gruppo.engines.native.engine._Decoder.decode", 3, fails())
    made = ResizingEngine(NativeEngine(policy, 12), sizes).generate(requests, options)
    ids = [[[completion.token_ids for completion in group] for group in each] for each in (wanted, made)]
    assert ids[0] == ids[1]
    assert sizes.slots == 6
    assert "retried from its start with 6 slots (was 12)" in messages[0]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError(ALLOCATOR), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RunError("memory ran out: out of memory"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_count_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert out_of_memory(error) is expected


def test_metrics_of_a_failed_block_are_discarded() -> None:
    metrics = Metrics()
    metrics.mean("a", 1.0)
    metrics.maximum("b", 1.0)

    def breaks() -> None:
        with metrics.all_or_nothing():
            metrics.mean("a", 5.0)
            metrics.maximum("b", 5.0)
            metrics.minimum("c", 5.0)
            raise KeyError

    with pytest.raises(KeyError):
        breaks()
    assert metrics.reduce() == {"a": 1.0, "b": 1.0}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of the address space are kept by Linux")
def test_the_budget_is_kept_under_a_limit_of_the_address_space(tmp_path: Path) -> None:
    """If memory beyond the budget is refused, the micro-batch chosen for the budget works.

    The largest micro-batch fails, or with halving also finishes.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-m", "tests.limited", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["budget"]["error"] is None
    assert found["budget"]["halvings"] == []
    assert found["budget"]["chosen"] < 512, "the budget forces a smaller one"
    assert "out of memory" in found["largest"]["error"]
    assert found["largest"]["steps"] == 0
    assert found["halved"]["error"] is None
    halvings = found["halved"]["halvings"]
    assert halvings
    assert halvings == [512, 256, 128][: len(halvings)]
    assert found["halved"]["steps"] == 1
    assert found["halved"]["chosen"] == found["halved"]["last"] == found["halved"]["halvings"][-1]


def counts() -> dict[str, int]:
    """Counts of what a step could leave behind: live tensors, open files, threads, child processes, tracked objects."""
    gc.collect()
    process = psutil.Process()
    return {
        "tensors": sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()),
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "children": len(process.children(recursive=True)),
        "objects": len(gc.get_objects()),
    }


def test_two_hundred_steps_leave_nothing_behind(tiny_folder: str, tmp_path: Path) -> None:
    """With a reference, a value model, evaluations and checkpoints.

    The counts of tensors, files, threads and processes are exact. The history of metrics covers 60 steps, so the number
    of objects may grow until then, and by a few after. For resident memory, a growth of 4 MB in 100 steps would be
    detected; without a leak it is half a megabyte.
    """
    seen: dict[int, dict[str, int]] = {}
    resident: dict[int, int] = {}

    def look(step: int, *_: object) -> None:
        if step in {80, 140, 199}:
            seen[step] = counts()
        if step % 10 == 9:
            resident[step] = psutil.Process().memory_info().rss

    (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": "a", "answer": "a"}) + "\n")
    settings = recipe(
        tiny_folder, run__steps=200, run__checkpoint_every=50, sampling__prompts_per_step=2, sampling__group_size=2,
        sampling__max_tokens=4, method__name="ppo", evaluation__task=str(tmp_path / "test.jsonl"),
        evaluation__grader="exact_match", evaluation__every=50,
    )  # fmt: skip
    train(settings, prompts=ROWS, out=tmp_path / "run", callbacks=[look])
    first, middle, last = (seen[step] for step in (80, 140, 199))
    for name in ("tensors", "files", "threads", "children"):
        assert first[name] == middle[name] == last[name], (name, seen)
    assert last["objects"] - first["objects"] < 100, seen
    early, late = (
        statistics.median(resident[step] for step in span) for span in (range(59, 100, 10), range(159, 200, 10))
    )
    assert late - early < 4_000_000, resident
