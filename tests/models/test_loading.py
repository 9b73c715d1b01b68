"""Finding, loading, converting and saving models; models that are refused before any work."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from gruppo.errors import UsageError
from gruppo.models import loading as models
from gruppo.models.attention.shared_prefix import SharedPrefixAttention
from gruppo.models.compatibility import eos_ids, wrap_model
from gruppo.models.loading import ModelSource, find_model, load_model
from gruppo.models.policy import LanguageModel
from gruppo.models.precision import choose_device, choose_dtype
from gruppo.models.weights import save_model, weights_sha256
from tests.architectures import ARCHITECTURES, make_architecture
from tests.conftest import make_policy, make_tokenizer


def test_saved_folder_loads_unchanged(tiny_folder: str) -> None:
    source = find_model(tiny_folder)
    assert source.context == 128
    policy = load_model(source, "cpu", "float32")
    assert policy.dtype == torch.float32
    assert not policy.model.training
    assert policy.eos_ids == (0,)
    other = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert weights_sha256(policy.model) == weights_sha256(other)


def test_weights_hash_covers_the_saved_tensors_in_name_order(tiny_folder: str) -> None:
    tensors = load_file(f"{tiny_folder}/model.safetensors")
    digest = hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors)))
    assert weights_sha256(load_model(find_model(tiny_folder), "cpu", "float32").model) == digest.hexdigest()


def test_dtypes_keep_wide_weights(tiny_folder: str) -> None:
    """AReaL#1634: small updates vanish in bf16 master weights."""
    for name, storage in (("float32", torch.float32), ("bfloat16", torch.float32), ("float64", torch.float64)):
        policy = load_model(find_model(tiny_folder), "cpu", name)
        assert {parameter.dtype for parameter in policy.model.parameters()} == {storage}


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_frozen_copy_gives_the_same_logits_and_is_not_updated(name: str) -> None:
    policy = replace(make_architecture(name), dtype=torch.bfloat16)
    copy = policy.frozen_copy()
    ids = torch.tensor([[1, 2, 3, 4]])

    def logits(model: LanguageModel) -> torch.Tensor:
        plan = SharedPrefixAttention([(4, ())])
        return model.head.logits(model.hidden_states(ids, torch.arange(4)[None], plan)[0])

    with torch.no_grad(), policy.precision():
        assert torch.equal(logits(policy), logits(copy))
        before = logits(copy)
        for parameter in policy.model.parameters():
            parameter.add_(1.0)
        assert torch.equal(logits(copy), before)
        assert not torch.equal(logits(policy), before)
    assert not any(parameter.requires_grad for parameter in copy.model.parameters())


def test_end_tokens_of_model_and_tokenizer_are_merged() -> None:
    policy = make_policy()
    policy.model.generation_config.eos_token_id = [3, 5]
    assert eos_ids(policy.model.generation_config, policy.model.config, policy.tokenizer) == (0, 3, 5)


@pytest.mark.parametrize("name", ["no/such-model", "./nowhere", "nowhere.gguf", "smollm2-135m"])
def test_unknown_model_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"model\.name") as caught:
        find_model(name)
    assert name in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json"):
        find_model(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (transformers.MambaConfig(vocab_size=48, hidden_size=8, num_hidden_layers=1), ["mamba", "attention interface"]),
        (transformers.BloomConfig(vocab_size=48, hidden_size=8, n_layer=1, n_head=2), ["bloom", "attention interface"]),
        (transformers.T5Config(vocab_size=48, d_model=8, num_layers=1, num_heads=2), ["t5", "not a causal language"]),
        (transformers.Lfm2Config(vocab_size=48, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
                                 num_key_value_heads=2, layer_types=["conv", "full_attention"]), ["lfm2", "conv"]),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)  # fmt: skip
def test_unsupported_architecture_is_refused_by_name(
    config: transformers.PreTrainedConfig, words: list[str], tmp_path: Path
) -> None:
    """Before weights are loaded: the folder has none."""
    config.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UsageError) as caught:
        find_model(str(tmp_path))
    assert all(word in str(caught.value) for word in words)


def test_model_that_attends_to_later_tokens_is_detected_by_a_trial() -> None:
    """BERT has a causal class, but attends in both directions unless configured otherwise."""
    settings = {"vocab_size": 48, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    bidirectional = transformers.BertLMHeadModel(transformers.BertConfig(**settings, intermediate_size=8))
    with pytest.raises(UsageError, match=r"bert \(BertLMHeadModel\)"):
        wrap_model(bidirectional, make_tokenizer())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saved_and_loaded_models_give_the_same_logits(name: str, tmp_path: Path) -> None:
    """Including buffers, such as the bias of DeepSeek's router; transformers loads them too."""
    policy = make_architecture(name)
    save_model(policy, tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    expected = policy.model(input_ids=ids).logits
    kernel = policy.model.config._attn_implementation
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation=kernel)
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    again = load_model(find_model(str(tmp_path / "saved")), "cpu", "float32")
    assert weights_sha256(again.model) == weights_sha256(policy.model)


def test_layers_that_attend_twice_are_refused() -> None:
    """The keys of the second call would overwrite the first: packing would be correct, sampling wrong."""
    config = transformers.DiffLlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"diffllama .* more than once"):
        wrap_model(transformers.DiffLlamaForCausalLM(config), make_tokenizer())


def test_windows_that_exist_only_in_the_mask_are_refused() -> None:
    """PhiMoE applies its window only through the mask: the trial with nine tokens cannot detect it."""
    config = transformers.PhimoeConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, sliding_window=10, pad_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"phimoe .* sliding window of 10"):
        wrap_model(transformers.AutoModelForCausalLM.from_config(config), make_tokenizer())


def test_long_rope_is_limited_to_its_original_length() -> None:
    """Beyond that length, all positions of a sequence change, including earlier ones."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
            "factor": 2.0}  # fmt: skip
    config = transformers.Phi3Config(
        vocab_size=48, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1,
        intermediate_size=48, max_position_embeddings=128, original_max_position_embeddings=64,
        rope_parameters=rope, pad_token_id=0, eos_token_id=0,
    )  # fmt: skip
    assert ModelSource("", config, make_tokenizer()).context == 64
    assert wrap_model(transformers.Phi3ForCausalLM(config), make_tokenizer()).context == 64


def test_models_page_lists_the_tested_architectures() -> None:
    listed = re.findall(r"^\| `([\w.-]+)` \|", Path("docs/models.md").read_text(), re.MULTILINE)
    assert listed == list(ARCHITECTURES)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
     ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "quantized")],
)  # fmt: skip
def test_unsupported_llama_is_refused_with_the_reason(tmp_path: Path, change: dict, word: str) -> None:
    LlamaConfig(**change).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=word):
        find_model(str(tmp_path))


def damaged(tiny_folder: str, folder: Path, **changes: object) -> str:
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return str(folder)


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"attention_bias": True}, {"tie_word_embeddings": False},
     {"intermediate_size": 47}],
)  # fmt: skip
def test_weights_that_do_not_fit_their_config_are_refused(tiny_folder: str, tmp_path: Path, changes: dict) -> None:
    """transformers would continue with random numbers in place of missing tensors."""
    source = find_model(damaged(tiny_folder, tmp_path / "m", **changes))
    with pytest.raises(UsageError, match=r"model\.name"):
        load_model(source, "cpu", "float32")


@pytest.mark.parametrize("changes", [{"hidden_size": "abc"}, {"max_position_embeddings": "x"}, {"hidden_act": "none"}])
def test_damaged_config_is_refused(tiny_folder: str, tmp_path: Path, changes: dict) -> None:
    with pytest.raises(UsageError, match=r"model\.name"):
        load_model(find_model(damaged(tiny_folder, tmp_path / "m", **changes)), "cpu", "float32")


def test_truncated_or_missing_weights_are_refused(tiny_folder: str, tmp_path: Path) -> None:
    source = find_model(damaged(tiny_folder, tmp_path / "m"))
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_model(source, "cpu", "float32")
    weights.unlink()
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_model(source, "cpu", "float32")


def test_device_and_dtype_that_are_not_available() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match=r"model\.device"):
            choose_device("cuda")
    assert choose_device("cpu").type == "cpu"
    assert choose_dtype("float32", torch.device("cpu")) == torch.float32


def write_gguf(path: Path) -> dict[str, torch.Tensor]:
    """Write a one-layer Llama as a float32 GGUF file; return two of its tensors by their transformers names."""
    generator = torch.Generator().manual_seed(0)
    words = ["<unk>", "<s>", "</s>", *"abcdefgh", "▁"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([2, 3, 3] + [1] * (len(words) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    shapes = {"token_embd.weight": (len(words), 32), "output.weight": (len(words), 32), "output_norm.weight": (32,)}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        shapes[f"blk.0.{name}.weight"] = (32, 32)
    for name in ("attn_norm", "ffn_norm"):
        shapes[f"blk.0.{name}.weight"] = (32,)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "model.layers.0.mlp.up_proj.weight": tensors["blk.0.ffn_up.weight"],
    }


def test_gguf_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRUPPO_CACHE", str(tmp_path / "cache"))
    expected = write_gguf(tmp_path / "tiny.gguf")
    source = find_model(str(tmp_path / "tiny.gguf"))
    weights = dict(load_model(source, "cpu", "float32").model.named_parameters())
    for name, tensor in expected.items():
        assert torch.equal(weights[name].detach(), tensor)
    monkeypatch.setattr(models, "loading_progress", None)
    assert find_model(str(tmp_path / "tiny.gguf")).location == source.location, "the second use does not convert again"
    monkeypatch.undo()
    monkeypatch.setenv("GRUPPO_CACHE", str(tmp_path / "cache"))
    (Path(source.location) / "model.safetensors").unlink()
    load_model(find_model(str(tmp_path / "tiny.gguf")), "cpu", "float32")
    assert [path.name[:4] for path in (tmp_path / "cache" / "models").iterdir()] == ["tiny"], "no half-built folder"


def test_broken_gguf_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRUPPO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    with pytest.raises(UsageError, match=r"broken\.gguf"):
        find_model(str(tmp_path / "broken.gguf"))
