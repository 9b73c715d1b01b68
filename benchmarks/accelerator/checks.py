"""The checks, one function each. A function returns figures, or raises one of the two errors below."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES, Shape, prompts_of, save_random_model
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TESTS = (
    "tests/engines/test_contract.py",
    "tests/models/attention",
    "tests/models/test_logprobs.py",
    "tests/training/test_optimizer.py",
)
Figures = dict[str, Any]


class CheckFailedError(Exception):
    """What was promised does not hold. `figures`: what was measured."""

    def __init__(self, why: str, figures: Figures) -> None:
        super().__init__(why)
        self.figures = figures


class CheckSkippedError(Exception):
    """The check cannot run here, and why."""


@dataclass(frozen=True)
class Place:
    """Where a check runs: the device, whether sizes are small, and a folder for its files."""

    device: str
    small: bool
    folder: Path

    @property
    def backends(self) -> tuple[str, ...]:
        """The attention backends that train on the device."""
        return {"cuda": ("sdpa", "flex", "varlen"), "mps": ("sdpa",), "cpu": ("cpu", "sdpa")}[self.device]

    def model(self, name: str) -> Path:
        """The folder of a model with random weights, saved once."""
        folder = self.folder / "models" / name
        if not (folder / "tokenizer.json").exists():
            save_random_model(SHAPES[name], folder)
        return folder


@dataclass(frozen=True)
class Check:
    """A check with the question that it answers, and the most seconds it may take."""

    question: str
    seconds: int
    run: Callable[[Place], Figures]


def tests(place: Place) -> Figures:
    """Run the tests that do not depend on the device, on the device."""
    if importlib.util.find_spec("pytest") is None:
        raise CheckSkippedError("pytest is not installed")
    import pytest

    counts: dict[str, int] = {}
    failures: dict[str, str] = {}

    class Results:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.outcome != "passed":
                counts[report.outcome] = counts.get(report.outcome, 0) + 1
            if report.outcome == "failed":
                failures[report.nodeid] = report.longreprtext[-2000:]

        def pytest_collectreport(self, report: pytest.CollectReport) -> None:
            if report.outcome == "failed":
                failures[report.nodeid] = report.longreprtext[-2000:]

    paths = [str(ROOT / path) for path in TESTS[: 1 if place.small else None]]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--device={place.device}", f"--rootdir={ROOT}"]
    if place.small:
        options += ["-k", "qwen2 or stop"]
    code = pytest.main([*options, *paths], plugins=[Results()])
    if failures or code != 0:
        why = f"{len(failures)} tests failed; pytest ended with {int(code)}"
        raise CheckFailedError(why, {**counts, "failures": failures})
    return dict(counts)


def gradient(place: Place) -> Figures:
    """Compare the gradient of GRPO's loss on the device to the one of the CPU's own path in float32.

    The measure is |g - g_cpu| / |g_cpu| over all parameters. In float32 it must be at most 1e-3 (matmuls without
    TensorFloat-32). In bfloat16 it may be at most twice that of the CPU's path in bfloat16.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    name = "tiny"
    expected = gradient_of(place.model(name), "cpu", "float32", "cpu")
    figures: Figures = {"cpu bfloat16": distance(gradient_of(place.model(name), "cpu", "bfloat16", "cpu"), expected)}
    limits = {"float32": 1e-3, "bfloat16": 2 * figures["cpu bfloat16"]}
    wrong = []
    for backend in place.backends:
        for dtype, limit in limits.items():
            label = f"{backend} {dtype}"
            try:
                found = gradient_of(place.model(name), place.device, dtype, backend)
            except Exception as error:  # noqa: BLE001 one backend's error must not hide the figures of the others
                figures[label] = f"{type(error).__name__}: {error}"
                wrong.append(label)
                continue
            figures[label] = distance(found, expected)
            if not figures[label] <= limit:
                wrong.append(label)
    if wrong:
        raise CheckFailedError(f"gradient: {', '.join(wrong)}", figures)
    return figures


def gradient_of(model: Path, device: str, dtype: str, attention: str) -> dict[str, torch.Tensor]:
    """The gradient of a GRPO loss with a KL term on fixed groups, in float32 on the CPU, by parameter."""
    from gruppo.config.method_section import Method
    from gruppo.models.loading import find_model, load_model
    from gruppo.models.packing import pack
    from gruppo.training.policy_loss import batch_loss, token_weights
    from gruppo.utils.metrics import Metrics

    policy = load_model(find_model(str(model)), device, dtype, attention=attention)
    reference = policy.frozen_copy()
    method = Method(kl_coef=0.04)
    groups = fixed_groups(SHAPES["tiny"])
    weights = token_weights(method, SHAPES["tiny"].max_tokens)
    metrics = Metrics()
    for batch in pack(groups, weights, 10**6, with_kl=True, device=policy.device):
        with policy.precision():
            loss = batch_loss(policy, reference, batch, method, 1.0, metrics)
            with torch.autocast(policy.device.type, enabled=False):
                loss.backward()
    return {
        name: parameter.grad.detach().cpu().float()
        for name, parameter in policy.model.named_parameters()
        if parameter.grad is not None
    }


def fixed_groups(shape: Shape) -> list[Any]:
    """Groups with prompts and completions of several lengths, and one advantage for each completion."""
    from gruppo.types import Completion, Group, Prompt, Reward

    generator = torch.Generator().manual_seed(2)
    groups = []
    for number in range(shape.prompts):
        prompt = torch.randint(1, shape.vocabulary, (shape.prompt_tokens + number,), generator=generator).tolist()
        completions = []
        for member in range(shape.group):
            length = 1 + (7 * member + 3 * number) % shape.max_tokens
            ids = torch.randint(1, shape.vocabulary, (length,), generator=generator).tolist()
            completions.append(Completion(tuple(ids), (-1.0,) * length, (True,) * length, "length", 0, ""))
        group = Group(Prompt(str(number), "", tuple(prompt), "t", {}), completions, [Reward(0.0, {})] * shape.group)
        group.trained = [True] * shape.group
        group.advantages = [
            [math.sin(1.0 + member)] * len(completion.token_ids) for member, completion in enumerate(completions)
        ]
        groups.append(group)
    return groups


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """|found - expected| / |expected| over all parameters, in float64."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    squares = sum(float((found[name] - tensor).double().square().sum()) for name, tensor in expected.items())
    return math.sqrt(squares / sum(float(tensor.double().square().sum()) for tensor in expected.values()))


def recipe(place: Place, name: str, shape: Shape, steps: int, **changes: Any) -> dict[str, Any]:
    """A recipe for a model with random weights. `changes`: fields as section__field."""
    data: dict[str, Any] = {
        "run": {"steps": steps, "checkpoint_every": 2, "memory": 0.8},
        "model": {"name": str(place.model(name)), "device": place.device, "dtype": "bfloat16"},
        "reward": {"functions": [f"{HERE / 'reward.py'}:varied"], "workers": 1},
        "method": {"kl_coef": 0.0},
        "sampling": {
            "prompts_per_step": shape.prompts, "group_size": shape.group, "max_tokens": shape.max_tokens,
        },
        "optimizer": {"learning_rate": 1e-5},
    }  # fmt: skip
    for key, value in changes.items():
        section, _, field = key.partition("__")
        data.setdefault(section, {})[field] = value
    return data


def resume(place: Place) -> Figures:
    """Train four steps in one go, and in two with a resume between them: the same weights and rollouts."""
    import gruppo

    shape = SHAPES["tiny"]
    rows = prompts_of(shape, 4 * shape.prompts)
    figures: Figures = {}
    for backend in place.backends:
        train = partial(gruppo.train, prompts=rows, progress=False)
        settings = partial(recipe, place, "tiny", shape, model__attention=backend)
        whole = train(settings(4), out=place.folder / f"resume-{backend}-whole")
        parts = place.folder / f"resume-{backend}-parts"
        train(settings(4), out=parts, callbacks=[stop_after_two])
        resumed = train(settings(4), out=parts, resume=True)
        hashes = [result.summary["weights_sha256"] for result in (whole, resumed)]
        figures[backend] = "the same weights" if hashes[0] == hashes[1] else "other weights"
    if "other weights" in figures.values():
        raise CheckFailedError("a resumed run ended with other weights", figures)
    return figures


def stop_after_two(step: int, *_: Any) -> Any:
    """Callback: end the run after two steps."""
    import gruppo

    return gruppo.STOP if step == 2 else None


def train_shape(name: str, engine: str, every_backend: bool, place: Place) -> Figures:
    """Train three steps, with each attention backend or with the default. Figures are of the third step."""
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise CheckSkippedError("vllm is not installed")
    name = "tiny" if place.small else name
    figures: Figures = {}
    for backend in place.backends if every_backend else ("auto",):
        figures[backend] = train_once(place, name, engine, backend)
    wrong = [f"{backend}: {problem}" for backend, found in figures.items() for problem in problems(found)]
    if wrong:
        raise CheckFailedError("; ".join(wrong), figures)
    return figures


def train_once(place: Place, name: str, engine: str, backend: str) -> Figures:
    """Three steps of training; see `train_shape`."""
    import gruppo

    shape, steps = SHAPES[name], 3
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    out = place.folder / f"{name}-{engine}-{backend}"
    settings = recipe(place, name, shape, steps, model__attention=backend, engine__name=engine)
    result = gruppo.train(settings, prompts=prompts_of(shape, steps * shape.prompts), out=out, progress=False)
    last = json.loads((result.path / "metrics.jsonl").read_text().splitlines()[-1])
    environment = json.loads((result.path / "environment.json").read_text())
    forecast, peak = environment["memory_forecast"]["peak"], last["memory/peak_bytes"]
    return {
        "seconds": {key.removeprefix("time/"): value for key, value in last.items() if key.startswith("time/")},
        "tokens": shape.completions * last["completion/length"],
        "tokens_per_second": last["time/tokens_per_second"],
        "engine_trainer_nats": last["engine/logprob_difference_mean"],
        "peak_bytes": peak,
        "forecast_bytes": forecast,
        "forecast_over_peak": forecast / peak,
        "micro_batch_tokens": last["memory/micro_batch_tokens"],
    }


def problems(found: Figures) -> Iterator[str]:
    """What is wrong with the figures of a training run."""
    if not found["engine_trainer_nats"] <= 0.05:
        yield f"engine and trainer differ by {found['engine_trainer_nats']:.3f} nats; at most 0.05 is expected"
    if not 0.9 <= found["forecast_over_peak"] <= 1.25:
        yield f"the memory forecast is {found['forecast_over_peak']:.2f} of the peak; 0.9 to 1.25 is expected"


def trl(place: Place) -> Figures:
    """Train three steps with TRL's GRPOTrainer on the same work, for comparison. Figures are of the third step."""
    if importlib.util.find_spec("trl") is None:
        raise CheckSkippedError("trl is not installed")
    from datasets import Dataset
    from reward import varied
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    name = "tiny" if place.small else "0.5b"
    shape, seconds = SHAPES[name], []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronize()
            seconds.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            seconds[-1] += time.perf_counter()

    with redirect_stdout(io.StringIO()):
        arguments = GRPOConfig(
            str(place.folder / "trl"), max_steps=3, per_device_train_batch_size=shape.completions,
            num_generations=shape.group, max_completion_length=shape.max_tokens, bf16=True, learning_rate=1e-5,
            beta=0.0, gradient_checkpointing=False, report_to="none", save_strategy="no", use_cpu=place.device == "cpu",
        )  # fmt: skip
        trainer = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(place.model(name), dtype=torch.float32),
            varied,
            args=arguments,
            train_dataset=Dataset.from_list(prompts_of(shape, 3 * shape.prompts)),
            processing_class=AutoTokenizer.from_pretrained(place.model(name)),
            callbacks=[Clock()],
        )
        trainer.train()
    peak = torch.cuda.max_memory_allocated() if place.device == "cuda" else None
    return {"seconds a step": seconds, "median": statistics.median(seconds), "peak_bytes": peak}


def synchronize() -> None:
    """Wait until the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


CHECKS = {
    "gradient": Check("Is the gradient that of the CPU, with every attention backend?", 100, gradient),
    "resume": Check("Does a resumed run end with the same weights?", 100, resume),
    "tests": Check("Do the tests of engines, attention, log-probabilities and optimizer pass?", 150, tests),
    "0.5b": Check(
        "0.5B shape: how fast, how much memory, engine against trainer?", 150,
        partial(train_shape, "0.5b", "native", True),
    ),
    "1.5b": Check(
        "1.5B shape: the same with the default backend", 100, partial(train_shape, "1.5b", "native", False)
    ),
    "vllm": Check("0.5B shape, sampled by vLLM", 150, partial(train_shape, "0.5b", "vllm", False)),
    "trl": Check("0.5B shape, TRL's GRPOTrainer", 120, trl),
}  # fmt: skip
