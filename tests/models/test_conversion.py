"""Starting from an adapter in peft's format: it is merged into its base model, once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gruppo.errors import UsageError
from gruppo.models.loading import find_model, load_model
from gruppo.models.weights import weights_sha256
from tests.small_runs import small_run

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("GRUPPO_CACHE", str(folder))
    return folder


@pytest.fixture
def adapter(tiny_folder: str, tmp_path: Path) -> Path:
    """An adapter with random values, saved by peft itself."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, settings)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_a_run_starts_from_an_adapter_that_peft_saved(adapter: Path, tiny_folder: str, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    plain = logits(base)
    wanted = logits(peft.PeftModel.from_pretrained(base, str(adapter)))
    policy = load_model(find_model(str(adapter)), "cpu", "float32")
    torch.testing.assert_close(logits(policy.model), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(wanted, plain, atol=1e-3)
    whole = small_run(str(adapter), tmp_path / "whole", run__steps=4)
    # A reference that is not the start model would show in the KL of the first step.
    assert whole.metrics[0]["policy/kl"] == pytest.approx(0, abs=1e-7)
    small_run(str(adapter), tmp_path / "again", run__steps=4)
    assert (
        whole.summary["weights_sha256"]
        == small_run(str(adapter), tmp_path / "again", resume=True, run__steps=4).summary["weights_sha256"]
    )


def test_new_adapters_are_trained_on_top_of_the_merged_one(adapter: Path, tmp_path: Path) -> None:
    start = load_model(find_model(str(adapter)), "cpu", "float32")
    result = small_run(
        str(adapter), tmp_path / "run", run__steps=1, model__lora={"rank": 2}, optimizer__learning_rate=0
    )
    trained = AutoModelForCausalLM.from_pretrained(result.path / "model", dtype=torch.float32)
    torch.testing.assert_close(logits(trained), logits(start.model), rtol=1e-4, atol=1e-4)


def saved(tiny_folder: str, out: Path, settings: peft.PeftConfig, rows: int = 0) -> torch.Tensor:
    """Save an adapter with random values. Returns its logits."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    assert model.config.tie_word_embeddings
    if rows:
        model.resize_token_embeddings(rows)
    adapted = peft.get_peft_model(model, settings)
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    adapted.save_pretrained(str(out))
    return logits(adapted.eval())


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_of_tied_weights_unties_them(target: str, tiny_folder: str, tmp_path: Path) -> None:
    """Merged into the tensor that both share, it would change both."""
    settings = peft.LoraConfig(r=3, target_modules=[target], init_lora_weights=False, task_type="CAUSAL_LM")
    wanted = saved(tiny_folder, tmp_path / "adapter", settings)
    policy = load_model(find_model(str(tmp_path / "adapter")), "cpu", "float32")
    assert not policy.model.config.tie_word_embeddings
    torch.testing.assert_close(logits(policy.model), wanted, rtol=1e-4, atol=1e-4)
    result = small_run(str(tmp_path / "adapter"), tmp_path / "run", run__steps=1, optimizer__learning_rate=0)
    trained = AutoModelForCausalLM.from_pretrained(result.path / "model", dtype=torch.float32)
    torch.testing.assert_close(logits(trained), wanted, rtol=1e-4, atol=1e-4)


def test_an_adapter_with_a_larger_vocabulary(tiny_folder: str, tmp_path: Path) -> None:
    settings = peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    wanted = saved(tiny_folder, tmp_path / "adapter", settings, rows=51)
    policy = load_model(find_model(str(tmp_path / "adapter")), "cpu", "float32")
    torch.testing.assert_close(logits(policy.model), wanted, rtol=1e-4, atol=1e-4)


def test_trained_prompts_are_no_adapter_of_weights(tiny_folder: str, tmp_path: Path) -> None:
    saved(tiny_folder, tmp_path / "adapter", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(UsageError, match="of the type PROMPT_TUNING, which cannot be merged into the weights"):
        find_model(str(tmp_path / "adapter"))


def test_a_changed_adapter_is_merged_again(adapter: Path) -> None:
    first = weights_sha256(load_model(find_model(str(adapter)), "cpu", "float32").model)
    file = adapter / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    assert weights_sha256(load_model(find_model(str(adapter)), "cpu", "float32").model) != first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": "no/such/model/here"}, "names the base model 'no/such/model/here', which cannot"),
        ({"task_type": "SEQ_CLS"}, "is an adapter for SEQ_CLS"),
        ({"target_modules": ["c_attn"]}, "cannot be converted"),
        ("weights", r"has no adapter_model.safetensors; adapters in pickles"),
        ("itself", "is an adapter too"),
        ("text", "adapter_config.json cannot be read"),
        ("damaged", "cannot be converted"),
    ],
)
def test_unusable_adapters_are_refused_in_words(adapter: Path, change: Any, message: str) -> None:
    config = adapter / "adapter_config.json"
    if change == "weights":
        shutil.move(adapter / "adapter_model.safetensors", adapter / "adapter_model.bin")
    elif change == "text":
        config.write_text("[1]")
    elif change == "damaged":
        (adapter / "adapter_model.safetensors").write_bytes(b"1234")
    else:
        changes = {"base_model_name_or_path": str(adapter)} if change == "itself" else change
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    with pytest.raises(UsageError, match=message):
        find_model(str(adapter))
