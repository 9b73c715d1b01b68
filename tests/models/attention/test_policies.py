"""Training's forward and backward pass on every attention backend, for every architecture."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gruppo.algorithms.aggregation import sequence_mean_weights
from gruppo.config.sections import Lora
from gruppo.engines import build_engine
from gruppo.engines.base import Request, SamplingParams
from gruppo.models.attention.backends import Backend
from gruppo.models.attention.interface import Layer
from gruppo.models.attention.sdpa import SdpaAttention
from gruppo.models.attention.varlen import Lengths, VarlenAttention
from gruppo.models.footprint import Layout, measure_footprint, saved_bytes
from gruppo.models.lora import adapted_layers, add_adapters
from gruppo.models.packing import pack, score
from gruppo.models.policy import LanguageModel
from gruppo.types import Group, Prompt
from gruppo.utils.progress import NullProgress
from tests.architectures import ARCHITECTURES, make_architecture
from tests.conftest import make_policy, random_groups
from tests.models.attention.references import ON_CPU, varlen_kernel
from tests.small_runs import fingerprint, killed, small_run
from tests.training.test_invariance import FLOAT32_PARTS, assert_equal, distance, naive, packed, prepared

ACCELERATED = [name for name in ON_CPU if name != "cpu"]


def on(backend: str, policy: LanguageModel) -> LanguageModel:
    """The policy as it is on an accelerator: transformers' modules with this attention."""
    return replace(policy, attention=ON_CPU[backend], body=None)


def bound_of(name: str) -> float:
    return 1e-6 if name in FLOAT32_PARTS else 1e-9


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_backend_gives_equation_3_and_its_gradient(name: str) -> None:
    """Also with recomputed activations, and however the step is split into micro-batches."""
    policy, reference = make_architecture(name, torch.float64), make_architecture(name, torch.float64, seed=1)
    groups, bound = prepared(random_groups()), bound_of(name)
    expected = naive(policy, reference, groups)
    for backend in ACCELERATED:
        trained, fixed = on(backend, policy), on(backend, reference)
        whole = packed(trained, fixed, groups)
        assert_equal(whole, expected, bound)
        assert_equal(packed(trained, fixed, groups, budget=17), expected, bound)
        recomputed = packed(replace(trained, recompute=True), fixed, groups)
        assert_equal(recomputed, whole, 1e-15)


@pytest.mark.parametrize("backend", ACCELERATED)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt-oss"])
def test_adapters_get_the_same_gradients(name: str, backend: str) -> None:
    reference = make_architecture(name, torch.float64, seed=1)
    policy = add_adapters(make_architecture(name, torch.float64), Lora(rank=3, alpha=5.0), 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in adapted_layers(policy.model).values():
            layer.lora_B["default"].weight.normal_(std=0.3)
    groups = prepared(random_groups())
    expected = packed(policy, reference, groups)
    assert expected[1]
    assert_equal(packed(on(backend, policy), on(backend, reference), groups), expected, bound_of(name))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_kernels_get_bfloat16_heads_that_are_not_repeated(name: str) -> None:
    """Rotary embeddings and norms promote queries and keys to float32, which no flash kernel takes."""
    seen = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, layer: Layer) -> Tensor:
        seen.append((query.dtype, key.dtype, value.dtype, key.shape[1], value.shape[1]))
        return varlen_kernel(query, key, value, lengths, layer)

    spied = Backend("varlen", lambda groups, device: VarlenAttention(groups, device, kernel))
    policy = replace(make_architecture(name, torch.bfloat16), body=None, attention=spied)
    (batch,) = pack(prepared(random_groups()), sequence_mean_weights, 10**9, with_kl=True)
    with policy.precision():
        score(policy, batch, 1.0)[0].sum().backward()
    assert set(seen) == {(torch.bfloat16,) * 3 + (policy.model.config.num_key_value_heads,) * 2}
    assert len(seen) == 2
    gradients = [weight.grad for weight in policy.model.parameters()]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)


@pytest.mark.parametrize("backend", ACCELERATED)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt-oss"])
def test_bfloat16_is_near_float32(name: str, backend: str) -> None:
    """Compared with the distance of torch's autocast without packing, which rounds at the same places."""
    groups = prepared(random_groups())
    plain = make_architecture(name, torch.float32), make_architecture(name, torch.float32, seed=1)
    rounded = make_architecture(name, torch.bfloat16), make_architecture(name, torch.bfloat16, seed=1)
    exact = naive(*plain, groups)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        unpacked = naive(*rounded, groups)[1]
        found = packed(on(backend, rounded[0]), on(backend, rounded[1]), groups)[1]
    assert distance(found, exact) < 1.5 * distance(unpacked, exact)


@pytest.mark.parametrize("backend", ACCELERATED)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss", "deepseek-v3"])
def test_the_engine_samples_from_the_distribution_of_the_trainer(name: str, backend: str) -> None:
    policy = on(backend, make_architecture(name))
    prompts = [(5, 6, 7), (8,), (9, 10, 11, 12, 13)]
    requests = [Request(prompt, [(0, row, index) for index in range(3)]) for row, prompt in enumerate(prompts)]
    sampled = build_engine(policy, 4).generate(requests, SamplingParams(0.9, 12))
    groups = []
    for prompt, completions in zip(prompts, sampled, strict=True):
        group = Group(Prompt("p", "", prompt, "t", {}), list(completions), [])
        group.trained = [True] * 3
        group.advantages = [[1.0] * len(completion.token_ids) for completion in completions]
        groups.append(group)
    (batch,) = pack(groups, sequence_mean_weights, 10**9, with_kl=True)
    with torch.no_grad():
        logprobs = score(policy, batch, 0.9)[0]
    recorded = [number for group in sampled for completion in group for number in completion.sampling_logprobs]
    torch.testing.assert_close(torch.tensor(recorded), logprobs, rtol=0, atol=1e-4)


def test_copies_of_the_policy_keep_or_leave_the_backend() -> None:
    """The reference computes as the policy does; numerical checks in float64 need no kernel of an accelerator."""
    policy = on("varlen", make_policy())
    assert policy.frozen_copy().attention is policy.attention
    copy = policy.float64_copy()
    assert isinstance(copy.attention([(2, (1,))], copy.device), SdpaAttention)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_bytes_are_predicted(name: str, dtype: torch.dtype) -> None:
    """For rows of one length. FlexAttention keeps no more than these, apart from its padding."""
    policy = on("sdpa", make_architecture(name, dtype))
    footprint = measure_footprint(policy, 0, NullProgress())
    assert measure_footprint(replace(policy, attention=ON_CPU["flex"]), 0, NullProgress()) == footprint
    for layout in ([(20, [10] * 6)], [(20, [10] * 6), (31, [7] * 3)]):
        with policy.precision():
            exact = saved_bytes(policy, layout)
        known = footprint.prepared + footprint.activations(layout, recompute=False)
        assert known == pytest.approx(exact, rel=2e-3)


def test_a_run_records_the_backend_and_a_resume_keeps_it(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run equals one that was not interrupted."""
    changes = {"model__attention": "sdpa", "run__steps": 3, "run__checkpoint_every": 1}
    small_run(tiny_folder, tmp_path / "whole", **changes)
    with killed(monkeypatch, "gruppo.training.run.describe_groups", 3):
        small_run(tiny_folder, tmp_path / "cut", **changes)
    small_run(tiny_folder, tmp_path / "cut", resume=True, **changes)
    assert fingerprint(tmp_path / "cut") == fingerprint(tmp_path / "whole")
    for name in ("cut", "whole"):
        assert json.loads((tmp_path / name / "environment.json").read_text())["chosen"]["attention"] == "sdpa"


def test_copies_of_a_model_compute_at_the_same_time() -> None:
    """One thread samples while another trains. Each model has the plan that was made for it, for any interleaving."""
    policy = replace(make_policy(), body=None)
    copied = replace(policy.sampling_copy(), body=None)
    layouts: list[tuple[LanguageModel, Layout]] = [(policy, [(5, (4, 3))]), (copied, [(9, (2,)), (3, (6,))])]

    def hidden(model: LanguageModel, layout: Layout) -> torch.Tensor:
        length = sum(prompt + sum(completions) for prompt, completions in layout)
        ids = torch.arange(1, length + 1)[None] % 40
        with torch.no_grad(), model.precision():
            return model.hidden_states(ids, ids, model.attention(layout, model.device))

    expected, wrong = [hidden(*pair) for pair in layouts], list[str]()

    def compute(place: int) -> None:
        try:
            if any(not torch.equal(hidden(*layouts[place]), expected[place]) for _ in range(60)):
                wrong.append("other numbers")
        except AssertionError as error:
            wrong.append(str(error))

    threads = [threading.Thread(target=compute, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
