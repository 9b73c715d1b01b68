"""Low-rank adapters: equal to the initial model until trained, the same gradient and distribution however they are
computed, and saved in the formats that transformers and peft load."""

from __future__ import annotations

import copy
import gc
import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from gruppo.algorithms.aggregation import sequence_mean_weights
from gruppo.config.loading import RecipeError, load_recipe
from gruppo.config.method_section import Method
from gruppo.config.sections import Lora, Optimizer
from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.native.engine import NativeEngine
from gruppo.errors import UsageError
from gruppo.models.loading import ModelSource, find_model, load_model
from gruppo.models.logprobs import OutputHead, token_logprobs
from gruppo.models.lora import (
    AdaptedModel,
    adapted_layers,
    add_adapters,
    check_adapters,
    merged_weight,
    merged_weights,
    save_adapter,
    without_adapters,
)
from gruppo.models.packing import pack, score
from gruppo.models.policy import LanguageModel
from gruppo.models.weights import named_weights, save_model, tensors_sha256, trained_weights, weights_sha256
from gruppo.training.api import train
from gruppo.training.export import export
from gruppo.training.optimizer import make_optimizer
from gruppo.training.policy_loss import batch_loss
from gruppo.utils.metrics import Metrics
from tests.architectures import ARCHITECTURES, make_architecture
from tests.conftest import make_policy, make_tokenizer, random_groups
from tests.small_runs import ROWS, recipe, small_run
from tests.training.test_invariance import SETTINGS, TEMPERATURE, Gradient, assert_equal, naive, packed, prepared

LORA = Lora(rank=3, alpha=5.0)
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def adapted(
    name: str, dtype: torch.dtype = torch.float32, settings: Lora = LORA, seed: int = 0, trained: bool = True
) -> LanguageModel:
    """A tiny model with adapters; if `trained`, B is no longer 0."""
    policy = add_adapters(make_architecture(name, dtype), settings, seed)
    if trained:
        give_values(policy)
    return policy


def give_values(policy: LanguageModel) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in adapted_layers(policy.model).values():
            layer.lora_B["default"].weight.normal_(std=0.3)
    policy.generation.advance()


def logits(policy: LanguageModel) -> torch.Tensor:
    with torch.no_grad(), policy.precision():
        result: torch.Tensor = policy.model(input_ids=IDS).logits
    return result


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_untrained_adapters_leave_the_model_unchanged_and_trained_ones_do_not(name: str) -> None:
    before = logits(make_architecture(name))
    policy = adapted(name, trained=False)
    assert torch.equal(logits(policy), before)
    give_values(policy)
    assert not torch.allclose(logits(policy), before, atol=1e-2)
    with without_adapters(policy.model):
        assert torch.equal(logits(policy), before)


def test_every_linear_layer_except_the_head_has_an_adapter() -> None:
    model = adapted("llama-untied").model
    plain = make_architecture("llama-untied").model
    linear = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    assert adapted_layers(model).keys() == linear - {"lm_head"}
    plain = make_architecture("gpt2").model
    conv1d = {name for name, module in plain.named_modules() if isinstance(module, Conv1D)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns about, and fixes, a config that does not state the weight layout
        assert adapted_layers(adapted("gpt2").model).keys() == conv1d
    some = adapted("llama", settings=Lora(targets=["q_proj", "1.mlp.up_proj"])).model
    assert sorted(adapted_layers(some)) == [
        "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"
    ]  # fmt: skip


def test_experts_get_no_adapters() -> None:
    for name in ("mixtral", "qwen3-moe", "deepseek-v3", "gpt-oss"):
        layers = adapted_layers(adapted(name).model)
        assert layers
        assert all(".self_attn." in layer for layer in layers)


def test_initial_values_depend_only_on_the_seed() -> None:
    torch.manual_seed(1)
    one = adapted("llama", trained=False)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    policy = make_architecture("llama")
    torch.random.set_rng_state(before)
    two = add_adapters(policy, LORA, 0)
    assert torch.equal(torch.random.get_rng_state(), before), "the global random state was changed"
    other = adapted("llama", trained=False, seed=1)
    first, second, third = (trained_weights(policy.model) for policy in (one, two, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name, tensor in first.items():
        if "lora_B" in name:
            assert not tensor.any()
        else:
            assert not torch.equal(tensor, third[name])
            bound = tensor.shape[1] ** -0.5
            assert 0.9 * bound < float(tensor.abs().max()) <= bound
            assert float(tensor.min()) < 0 < float(tensor.max())
    starts = [tensor.flatten()[0].item() for name, tensor in first.items() if "lora_A" in name]
    assert len(set(starts)) == len(starts)


@pytest.mark.parametrize("name", ["llama", "phi", "gpt2"])
def test_dtypes(name: str) -> None:
    """Adapters have the accumulation dtype; frozen weights used only in matmuls have the compute dtype."""
    for dtype, accumulation in (
        (torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)
    ):  # fmt: skip
        policy = adapted(name, dtype)
        layers = adapted_layers(policy.model)
        assert {weight.dtype for weight in trained_weights(policy.model).values()} == {accumulation}
        assert {layer.base_layer.weight.dtype for layer in layers.values()} == {dtype}
        rest = {
            n: weight
            for n, weight in policy.model.named_parameters()
            if "base_layer" not in n and not weight.requires_grad
        }
        kept = {n for n, weight in rest.items() if weight.dtype == accumulation}
        assert kept == rest.keys() - ({"lm_head.weight"} if dtype == torch.bfloat16 and name == "phi" else set())
        assert all(merged_weight(layer).dtype == accumulation for layer in layers.values())


@pytest.mark.parametrize("name", ["llama", "phi", "gpt2", "mixtral"])
def test_compute_dtype_weights_give_the_same_logprobs(name: str) -> None:
    """Including the output head, whose bias is added to logits in the accumulation dtype."""
    groups = prepared(random_groups())
    (batch,) = pack(groups, sequence_mean_weights, 10**9, with_kl=True)
    start = make_architecture(name, torch.bfloat16)
    modules, adapters = replace(start, body=None), adapted(name, torch.bfloat16, trained=False)  # as with adapters
    for full, reduced in ((start, start.frozen_copy()), (modules, adapters)):
        with torch.no_grad(), full.precision():
            assert torch.equal(score(full, batch, 1.0)[0], score(reduced, batch, 1.0)[0])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merged_weight_equals_the_explicit_sum(name: str) -> None:
    policy = adapted(name, torch.bfloat16)
    for layer in adapted_layers(policy.model).values():
        down, up = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        added = 5.0 / 3 * (up @ down)
        expected = layer.base_layer.weight.double() + (added.T if name == "gpt2" else added)
        with policy.precision(), without_adapters(policy.model):
            merged = merged_weight(layer)
        torch.testing.assert_close(merged.double(), expected, rtol=1e-6, atol=1e-6)
        assert not merged.requires_grad


def merged_model(name: str, policy: LanguageModel) -> LanguageModel:
    """A model without adapters, with the merged weights."""
    plain, weights = make_architecture(name, policy.dtype), merged_weights(policy.model)
    parameters = named_weights(plain.model)
    assert parameters.keys() == weights.keys()
    for key, tensor in parameters.items():
        tensor.copy_(weights[key])
    plain.generation.advance()
    return plain


PROMPTS = [(5, 6, 7), (8,), (9, 10, 11, 12, 13, 14, 15)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_engine_samples_the_same_from_adapters_and_from_merged_weights(name: str, dtype: torch.dtype) -> None:
    policy = adapted(name, dtype)
    requests = [Request(prompt, [(0, place, index) for index in range(4)]) for place, prompt in enumerate(PROMPTS)]
    options = SamplingParams(1.0, 16)
    one = NativeEngine(policy, 8).generate(requests, options)
    two = NativeEngine(merged_model(name, policy), 8).generate(requests, options)
    start = NativeEngine(make_architecture(name, dtype), 8).generate(requests, options)
    tokens = [[[completion.token_ids for completion in group] for group in groups] for groups in (one, two, start)]
    assert tokens[0] == tokens[1]
    assert tokens[0] != tokens[2]
    bound = 2e-5 if dtype == torch.float32 else 1e-12
    got, expected = (
        torch.tensor(
            [logprob for group in groups for c in group for logprob in c.sampling_logprobs], dtype=torch.float64
        )
        for groups in (one, two)
    )
    assert float((got - expected).abs().max()) < bound


class _Merged(nn.Module):
    """transformers' plain forward with explicit W + alpha/rank · B·A, as a function of A and B."""

    def __init__(self, policy: LanguageModel, plain: nn.Module) -> None:
        super().__init__()
        self.plain, self.dtype = [plain], policy.model.dtype
        self.factors = {name: copy.deepcopy(layer) for name, layer in adapted_layers(policy.model).items()}

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        for name, layer in self.factors.items():
            for kind in ("lora_A", "lora_B"):
                yield f"{name}.{kind}.default.weight", getattr(layer, kind)["default"].weight

    def forward(self, *args: Any, **options: Any) -> Any:
        weights = {}
        for name, layer in self.factors.items():
            added = 5.0 / 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            base = layer.base_layer
            weights[f"{name}.weight"] = base.weight + (added.T if isinstance(base, Conv1D) else added)
        return functional_call(self.plain[0], weights, args, options)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gemma3", "phi3"])
def test_adapter_gradient_is_that_of_equation_3_on_the_merged_model(name: str) -> None:
    """Packed, adapters enabled for the policy and disabled for the reference, against plain forwards of both models."""
    policy, start = adapted(name, torch.float64), make_architecture(name, torch.float64)
    groups = prepared(random_groups())
    merged = LanguageModel(_Merged(policy, start.model), None, (), 0, policy.device, policy.dtype)  # type: ignore[arg-type]
    expected = naive(merged, start, groups)
    result = packed(policy, policy.frozen_copy(), groups)
    assert result[1].keys() == trained_weights(policy.model).keys()
    assert all(gradient.any() for gradient in result[1].values())
    assert_equal(result, expected, 1e-9)
    assert_equal(packed(policy, policy.frozen_copy(), groups, 20), expected, 1e-9)


def test_reference_is_the_start_model_without_a_copy() -> None:
    policy, start = adapted("llama"), replace(make_architecture("llama"), body=None)
    reference = policy.frozen_copy()
    assert reference.model is policy.model
    (batch,) = pack(prepared(random_groups()), sequence_mean_weights, 10**9, with_kl=True)
    with torch.no_grad():
        before = score(policy, batch, 1.0)[0]
        assert torch.equal(score(reference, batch, 1.0)[0], score(start, batch, 1.0)[0])
        assert torch.equal(score(policy, batch, 1.0)[0], before), "adapters are enabled again"
    assert not torch.allclose(before, score(start, batch, 1.0)[0], atol=1e-2)


def gradient_after(policy: LanguageModel) -> Gradient:
    return packed(policy, make_policy(seed=3), prepared(random_groups()), settings=Method(kl_coef=0.0))[1]


def test_adapters_are_enabled_again_after_an_exception() -> None:
    policy = adapted("llama")
    before, gradient = logits(policy), gradient_after(policy)
    with pytest.raises(IndexError), torch.no_grad():
        policy.frozen_copy().hidden_states(torch.tensor([[10**6]]), torch.tensor([[0]]), None)  # type: ignore[arg-type]
    assert torch.equal(logits(policy), before)
    with without_adapters(policy.model):
        off = logits(policy)
        with pytest.raises(RuntimeError), without_adapters(policy.model):
            raise RuntimeError
        assert torch.equal(logits(policy), off), "an inner block does not end the outer one"
    assert torch.equal(logits(policy), before)
    after = gradient_after(policy)
    assert gradient.keys() == after.keys()
    assert all(torch.equal(gradient[name], after[name]) for name in gradient)


def test_reference_pass_between_forward_and_backward_keeps_the_gradient() -> None:
    policy = adapted("llama")
    (batch,) = pack(prepared(random_groups()), sequence_mean_weights, 10**9, with_kl=True)
    gradients = []
    for between in (False, True):
        policy.model.zero_grad(set_to_none=True)
        loss = batch_loss(policy, policy.frozen_copy(), copy.copy(batch), SETTINGS, TEMPERATURE, Metrics())
        if between:
            with torch.no_grad():
                score(policy.frozen_copy(), batch, TEMPERATURE)
        loss.backward()
        gradients.append(
            {name: weight.grad for name, weight in policy.model.named_parameters() if weight.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys() == trained_weights(policy.model).keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_file_of_the_weights_does_not_stay_in_memory(tmp_path: Path) -> None:
    """The layers are narrowed, so only the embedding and norms would keep a file of 4 bytes per weight in memory."""

    def is_mapped() -> bool:
        return str(tmp_path / "model.safetensors") in Path("/proc/self/maps").read_text()

    save_model(make_policy(), tmp_path)
    policy = load_model(find_model(str(tmp_path)), "cpu", "bfloat16")
    before = dict(policy.model.named_parameters())
    values = {name: tensor.clone() for name, tensor in before.items() if "norm" in name or "embed" in name}
    assert values
    assert is_mapped()
    with_adapters = add_adapters(policy, LORA, 0)
    del policy, before
    gc.collect()
    assert not is_mapped()
    for name, tensor in with_adapters.model.named_parameters():
        if name in values:
            assert torch.equal(tensor, values[name])


def test_optimizer_updates_only_the_adapters() -> None:
    policy = adapted("llama")
    optimizer = make_optimizer(Optimizer(learning_rate=1e-2), policy.model, policy)
    optimized = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    assert optimized == {id(weight) for name, weight in policy.model.named_parameters() if ".lora_" in name}
    before = {name: weight.clone() for name, weight in policy.model.named_parameters()}
    gradient_after(policy)
    optimizer.step()
    moved = {name for name, weight in policy.model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == trained_weights(policy.model).keys()


def test_frozen_head_computes_no_gradient() -> None:
    """The gradient would be the largest tensor of an update, only to be discarded."""

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                seen.add((tuple(out.shape), str(function)))
            return out

    torch.manual_seed(0)
    gradients = []
    for frozen in (False, True):
        torch.manual_seed(0)
        hidden, weight = torch.randn(9, 7, requires_grad=True), torch.randn(50, 7, requires_grad=not frozen)
        seen: set[tuple[tuple[int, ...], str]] = set()
        total = token_logprobs(hidden, OutputHead(weight), torch.arange(9), 0.7, 4, 20)[0].sum()
        with Shapes():
            total.backward()
        assert any(shape == (50, 7) for shape, _ in seen) is not frozen
        gradients.append(hidden.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("name", "targets", "words"),
    [
        ("llama", ["q_proj", "qproj"], ["model.lora.targets = ['q_proj', 'qproj']", '"qproj"', "gate_proj, k_proj"]),
        ("llama", ["lm_head"], ['"lm_head"', "output head cannot"]),
        ("llama", ["proj"], ['"proj"']),
        ("gpt2", ["q_proj"], ['"q_proj"', "c_attn, c_fc, c_proj"]),
        ("deepseek-v3", ["up_proj"], ['"up_proj"', "kv_a_proj_with_mqa"]),
    ],
)
def test_wrong_targets_error_names_the_available_layers(name: str, targets: list[str], words: list[str]) -> None:
    policy = make_architecture(name)
    source = ModelSource("nowhere", policy.model.config, policy.tokenizer)
    for check in (
        lambda: check_adapters(source, Lora(targets=targets)),
        lambda: adapted(name, settings=Lora(targets=targets)),
    ):
        with pytest.raises(UsageError) as caught:
            check()
        assert all(word in str(caught.value) for word in words)


def test_wrong_targets_are_refused_before_weights_are_loaded(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.delattr("gruppo.training.setup.load_model")
        with pytest.raises(UsageError, match=r"model\.lora\.targets"):
            small_run(tiny_folder, tmp_path / "run", model__lora={"targets": ["query"]})
    assert not (tmp_path / "run" / "recipe.toml").exists()
    small_run(tiny_folder, tmp_path / "run", model__lora={"targets": ["q_proj"]}, run__steps=1)


@pytest.mark.parametrize("targets", ["all", [], [""], ["q_proj", 3], 3])
def test_wrong_targets_in_a_recipe(targets: Any) -> None:
    with pytest.raises(RecipeError, match=r"^recipe: model\.lora\.targets = .*q_proj"):
        load_recipe({"model": {"name": "m", "lora": {"targets": targets}}})


def test_dropout_is_refused_with_the_reason() -> None:
    with pytest.raises(RecipeError, match=r"model\.lora\.dropout = 0\.1: .* the same distribution"):
        load_recipe({"model": {"name": "m", "lora": {"dropout": 0.1}}})


def test_recipe_without_the_table_trains_all_weights_and_its_fields_can_be_set(tiny_folder: str) -> None:
    assert load_recipe({"model": {"name": "m"}}).model.lora is None
    lora = load_recipe({"model": {"name": "m"}}, ["model.lora.rank=4", 'model.lora.targets=["q_proj"]']).model.lora
    assert lora == Lora(rank=4, targets=["q_proj"])
    policy = load_model(find_model(tiny_folder), "cpu", "float32")
    assert add_adapters(policy, None, 0) is policy
    assert trained_weights(policy.model).keys() == named_weights(policy.model).keys()


def test_missing_peft_is_reported(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"gruppo\[lora\]"):
        small_run(tiny_folder, tmp_path / "run", model__lora={})
    assert not (tmp_path / "run" / "recipe.toml").exists()


@pytest.mark.parametrize("name", ["llama", "llama-untied", "gpt2", "qwen2", "mixtral", "qwen3-moe", "deepseek-v3"])
def test_saved_adapter_and_saved_model_give_the_same_logits(name: str, tmp_path: Path) -> None:
    policy = adapted(name)
    expected = logits(policy)
    save_model(policy, tmp_path / "model")
    save_adapter(policy.model, tmp_path / "adapter", "someone/base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == ("someone/base", 3, 5.0)
    assert config["inference_mode"] is True
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=0, atol=2e-5)
    loaded = peft.PeftModel.from_pretrained(make_architecture(name).model, str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, expected)


@pytest.fixture(scope="module")
def finished(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lora") / "run"
    small_run(tiny_folder, out, model__lora={"rank": 2}, run__steps=4)
    return out


def test_run_saves_adapters_in_checkpoints_and_a_merged_model(finished: Path, tiny_folder: str) -> None:
    last = finished / "checkpoints" / "step-000004"
    names = load_file(last / "weights.safetensors").keys()
    assert len(names) == 2 * 14
    assert all(".lora_" in name for name in [*names, *load_file(last / "optimizer.safetensors")])
    assert not (finished / "base" / "model.safetensors").exists()
    merged = AutoModelForCausalLM.from_pretrained(finished / "model")
    summary = json.loads((finished / "summary.json").read_text())
    assert weights_sha256(merged) == summary["weights_sha256"]
    start = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert not torch.allclose(merged(IDS).logits, start(IDS).logits, atol=1e-3)
    assert torch.equal(merged.lm_head.weight, start.lm_head.weight)
    loaded = peft.PeftModel.from_pretrained(start, str(finished / "adapter"))
    torch.testing.assert_close(loaded(IDS).logits, merged(IDS).logits, rtol=0, atol=1e-5)
    assert json.loads((finished / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        tiny_folder
    )


def same_weights(one: Path, other: Path) -> bool:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_merges_a_checkpoint_into_the_start_model(dtype: str, tiny_folder: str, tmp_path: Path) -> None:
    """The last checkpoint gives model/ exactly; also if the run computed in bfloat16."""
    changes = {"model__lora": {"rank": 2}, "model__dtype": dtype}
    small_run(tiny_folder, tmp_path / "run", **changes, run__steps=4)
    export(tmp_path / "run", tmp_path / "last")
    assert same_weights(tmp_path / "last", tmp_path / "run" / "model")
    assert list(tmp_path.glob("last/tmp*")) == []
    export(tmp_path / "run", tmp_path / "before", checkpoint=2)
    assert not same_weights(tmp_path / "before", tmp_path / "last")
    state = load_file(tmp_path / "run" / "checkpoints" / "step-000002" / "weights.safetensors")
    policy = add_adapters(load_model(find_model(tiny_folder), "cpu", dtype), Lora(rank=2), 0)
    policy.model.load_state_dict(state, strict=False)
    assert tensors_sha256(policy.weights()) == weights_sha256(AutoModelForCausalLM.from_pretrained(tmp_path / "before"))
    export(tmp_path / "run", tmp_path / "half", dtype="bfloat16", max_shard_size="20KB")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    full = load_file(tmp_path / "last" / "model.safetensors")
    assert all(torch.equal(weight, full[name].bfloat16()) for name, weight in named_weights(half).items())
    text = (tmp_path / "last" / "README.md").read_text()
    assert "LoRA of rank 2, alpha 32, on all-linear" in text


def test_export_of_only_the_adapter(finished: Path, tiny_folder: str, tmp_path: Path) -> None:
    exported = export(finished, tmp_path / "adapter", adapter=True)
    assert {path.name for path in exported.path.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (exported.path / name).read_bytes() == (finished / "adapter" / name).read_bytes()
    text = (exported.path / "README.md").read_text()
    assert "\nlibrary_name: peft\n" in text
    assert "PeftModel.from_pretrained" in text
    before = export(finished, tmp_path / "before", adapter=True, checkpoint=2).path
    state = load_file(finished / "checkpoints" / "step-000002" / "weights.safetensors")
    adapter = load_file(before / "adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj.lora_B"
    assert torch.equal(adapter[f"base_model.model.{name}.weight"], state[f"{name}.default.weight"])
    half = export(finished, tmp_path / "half", adapter=True, dtype="bfloat16").path
    assert {weight.dtype for weight in load_file(half / "adapter_model.safetensors").values()} == {torch.bfloat16}


def test_export_command_imports_peft_only_when_needed(finished: Path, tmp_path: Path) -> None:
    code = (
        "import sys, gruppo.training.loop, gruppo.training.export; from gruppo.cli.main import app; "
        "assert 'peft' not in sys.modules; app(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "export", str(finished), "--to", str(tmp_path / "out"), "--adapter"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "step 4" in done.stdout
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_adapter_of_a_run_without_one_is_refused(tiny_folder: str, tmp_path: Path) -> None:
    small_run(tiny_folder, tmp_path / "run", run__steps=1)
    assert not (tmp_path / "run" / "adapter").exists()
    with pytest.raises(UsageError, match=r"adapter=True: .* trained all weights"):
        export(tmp_path / "run", tmp_path / "out", adapter=True)
    assert not (tmp_path / "out").exists()


def test_export_refuses_another_start_model(tiny_folder: str, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "start")
    small_run(str(tmp_path / "start"), tmp_path / "run", run__steps=1, model__lora={})
    save_model(make_policy(seed=5), tmp_path / "start")
    with pytest.raises(UsageError, match="not those that the run started with"):
        export(tmp_path / "run", tmp_path / "out")
    export(tmp_path / "run", tmp_path / "adapter", adapter=True)


def test_in_memory_model_gets_adapters_on_a_copy_and_exports(tmp_path: Path) -> None:
    model = make_policy(initializer_range=0.02).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = recipe("x", run__steps=4, model__lora={"rank": 2}, model__dtype="bfloat16")
    arguments: dict[str, Any] = {"tokenizer": make_tokenizer(), "prompts": ROWS, "out": tmp_path / "run"}
    result = train(data, model=model, **arguments)
    assert not adapted_layers(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    base = load_file(tmp_path / "run" / "base" / "model.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.items())
    assert weights_sha256(result.load_model()) == result.summary["weights_sha256"]
    export(tmp_path / "run", tmp_path / "out")
    assert same_weights(tmp_path / "out", tmp_path / "run" / "model")
    export(tmp_path / "run", tmp_path / "two", checkpoint=2)
    assert not same_weights(tmp_path / "two", tmp_path / "out")
    again = train(data, model=model, **arguments, resume=True)
    assert again.summary["weights_sha256"] == result.summary["weights_sha256"]


def test_adapted_model_is_a_language_model_with_the_same_fields() -> None:
    start = make_architecture("granite")
    policy = add_adapters(start, LORA, 0)
    assert isinstance(policy, AdaptedModel)
    assert (policy.head_scale, policy.cache_bytes, policy.eos_ids) == (
        start.head_scale, start.cache_bytes, start.eos_ids
    )  # fmt: skip
    assert policy.model is start.model
    assert not any(module.training for module in policy.model.modules())
