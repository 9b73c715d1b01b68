"""Adapters on weights of 4 bits: the policy is exactly that of the weights that the 4 bits stand for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gruppo.config.loading import RecipeError, load_recipe
from gruppo.config.sections import Lora
from gruppo.errors import UsageError
from gruppo.models.footprint import measure_footprint
from gruppo.models.four_bit import BLOCK, full_count, full_weight, is_four_bit, scale_bytes
from gruppo.models.loading import find_model, load_model
from gruppo.models.lora import adapted_layers, add_adapters, check_adapters
from gruppo.models.packing import Batch, pack, score
from gruppo.models.policy import LanguageModel
from gruppo.models.weights import save_model
from gruppo.utils.imports import installed
from gruppo.utils.progress import NullProgress
from tests.conftest import make_policy, random_groups
from tests.small_runs import fingerprint, killed, small_run
from tests.training.test_invariance import prepared

needs_package = pytest.mark.skipif(not installed("bitsandbytes"), reason="needs gruppo[lean]")
SETTINGS = Lora(rank=4, base="4bit")


def wide_policy(**changes: Any) -> LanguageModel:
    """A policy whose layers have whole blocks of inputs."""
    return make_policy(hidden_size=64, intermediate_size=128, **changes)


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "wide"
    save_model(wide_policy(initializer_range=0.02), folder)
    return str(folder)


def rounded() -> LanguageModel:
    """A policy with adapters on weights of 4 bits. The adapters are not 0."""
    policy = add_adapters(wide_policy(), SETTINGS, seed=0)
    generator = torch.Generator().manual_seed(3)
    for layer in adapted_layers(policy.model).values():
        up = layer.lora_B["default"].weight
        up.data = 0.1 * torch.randn(up.shape, generator=generator)
    policy.generation.advance()
    return policy


def with_full_weights(policy: LanguageModel) -> LanguageModel:
    """The policy with adapters on linear layers that have the numbers for which the 4 bits stand."""
    plain = add_adapters(wide_policy(), Lora(rank=4), seed=0)
    layers = adapted_layers(policy.model)
    for name, layer in adapted_layers(plain.model).items():
        layer.base_layer.weight.data = full_weight(layers[name].base_layer.weight)
        for part in ("lora_A", "lora_B"):
            getattr(layer, part)["default"].weight.data = getattr(layers[name], part)["default"].weight.data.clone()
    plain.generation.advance()
    return plain


def batch() -> Batch:
    (only,) = pack(prepared(random_groups(groups=2)), lambda rows: [[1.0] * len(row) for row in rows], 10**9, True)
    return only


@needs_package
def test_a_weight_is_the_nearest_of_16_values_times_the_scale_of_its_block() -> None:
    original = {name: weight.detach() for name, weight in wide_policy().model.named_parameters()}
    policy = add_adapters(wide_policy(), SETTINGS, seed=0)
    layers = adapted_layers(policy.model)
    assert len(layers) == 14
    for name, layer in layers.items():
        weight, full = original[f"{name}.weight"], full_weight(layer.base_layer.weight)
        assert full.shape == weight.shape
        assert full.dtype == torch.float32
        assert full_count(layer.base_layer.weight) == weight.numel()
        blocks, stored = weight.reshape(-1, BLOCK), full.reshape(-1, BLOCK)
        scales = blocks.abs().amax(dim=1, keepdim=True)
        values = (stored / scales).mul(1e4).round().unique() / 1e4
        assert len(values) <= 16
        assert (values.min(), values.max()) == (-1, 1)
        nearest = (blocks / scales)[..., None].sub(values).abs().amin(dim=-1)
        torch.testing.assert_close((blocks / scales - stored / scales).abs(), nearest, rtol=0, atol=2e-4)
        assert scale_bytes(layer.base_layer.weight) == 4 * len(scales)


@needs_package
def test_log_probabilities_and_gradients_are_those_of_the_numbers_that_the_bits_stand_for() -> None:
    small, packed = rounded(), batch()
    plain = with_full_weights(small)
    results = []
    for policy in (small, plain):
        logprobs, _ = score(policy, packed, 0.9)
        (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
        gradients = {name: weight.grad for name, weight in policy.model.named_parameters() if weight.requires_grad}
        assert len(gradients) == 28
        results.append((logprobs.detach(), gradients))
    (one, gradients), (other, expected) = results
    torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4)
    start = score(wide_policy(), packed, 0.9)[0]
    assert float((one - start).abs().max().detach()) > 1e-3, "4 bits are not the model"


@needs_package
def test_the_reference_and_the_float64_copy_compute_with_the_same_bits() -> None:
    small, packed = rounded(), batch()
    exact = small.float64_copy()
    torch.testing.assert_close(score(exact, packed, 0.9)[0].float(), score(small, packed, 0.9)[0], rtol=0, atol=2e-5)
    assert not any(map(is_four_bit, exact.model.parameters()))
    assert any(map(is_four_bit, small.model.parameters()))
    reference = with_full_weights(small).frozen_copy()
    with torch.no_grad():
        expected = score(reference, packed, 0.9)[0]
        torch.testing.assert_close(score(small.frozen_copy(), packed, 0.9)[0], expected, rtol=0, atol=2e-5)


@needs_package
def test_the_saved_model_is_the_policy(tmp_path: Path) -> None:
    small, packed = rounded(), batch()
    save_model(small, tmp_path / "saved")
    saved = load_model(find_model(str(tmp_path / "saved"), NullProgress()), "cpu", "float32")
    torch.testing.assert_close(score(saved, packed, 0.9)[0], score(small, packed, 0.9)[0], rtol=0, atol=2e-5)


@needs_package
def test_weights_take_four_and_a_half_bits() -> None:
    full, small = (
        measure_footprint(add_adapters(wide_policy(), Lora(rank=4, base=base), 0), 0, NullProgress())  # type: ignore[arg-type]
        for base in ("full", "4bit")
    )
    count = sum(layer.base_layer.weight.numel() for layer in adapted_layers(with_plain().model).values())
    assert full.weights - small.weights == 4 * count - (count // 2 + 4 * count // BLOCK)
    assert small.gradients == full.gradients


def with_plain() -> LanguageModel:
    return add_adapters(wide_policy(), Lora(rank=4), seed=0)


@needs_package
def test_a_run_resumes_exactly(wide_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"model__lora": {"rank": 4, "base": "4bit"}, "run__steps": 3, "run__checkpoint_every": 1}
    small_run(wide_folder, tmp_path / "whole", **changes)
    with killed(monkeypatch, "gruppo.training.policy_trainer.PolicyTrainer.update", 3):
        small_run(wide_folder, tmp_path / "killed", **changes)
    small_run(wide_folder, tmp_path / "killed", resume=True, **changes)
    assert fingerprint(tmp_path / "killed") == fingerprint(tmp_path / "whole")


def test_a_missing_package_is_refused_before_weights_are_loaded(
    tiny_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(UsageError, match=r'model\.lora\.base = "4bit": needs the package bitsandbytes: pip install'):
        check_adapters(find_model(tiny_folder, NullProgress()), SETTINGS)


@pytest.mark.parametrize(
    ("changes", "words"), [({}, "has 32 inputs, which is not a multiple of 64"), ({"hidden_size": 64}, "has 48 inputs")]
)
def test_layers_without_whole_blocks_are_refused(
    changes: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gruppo.models.lora.check_package", lambda field: None)
    save_model(make_policy(**changes), tmp_path / "model")
    with pytest.raises(UsageError, match=rf'model\.lora\.base = "4bit": the layer model\.layers\.\S+ {words}'):
        check_adapters(find_model(str(tmp_path / "model"), NullProgress()), SETTINGS)


def test_float64_is_refused() -> None:
    model = {"name": "m", "dtype": "float64", "lora": {"base": "4bit"}}
    with pytest.raises(RecipeError, match=r'model\.lora\.base = "4bit": does not compute in float64'):
        load_recipe({"model": model})
