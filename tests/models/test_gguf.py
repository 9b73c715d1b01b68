"""GGUF files compute what the model computes; what they cannot hold is refused. tests/gguf has llama.cpp's opinion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from gruppo.errors import UsageError
from gruppo.models.gguf_file import DTYPES, require_gguf, unread_gguf, write_gguf
from gruppo.models.gguf_vocabulary import gguf_vocabulary
from gruppo.models.loading import find_model, load_model
from gruppo.models.pretrained import load_weights
from tests.conftest import make_tokenizer
from tests.gguf.models import MODELS, make_config, make_model
from tests.odd_tokenizers import CHATML, byte_level, closing, metaspace


def logprobs(model: Any) -> torch.Tensor:
    ids = torch.randint(0, 256, (4, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=ids).logits.log_softmax(-1)
    return result


def written(model: PreTrainedModel, folder: Path, dtype: str = "float32") -> Path:
    tokenizer = byte_level(template=CHATML)
    require_gguf(model.config, tokenizer, (257, 258), dtype)
    write_gguf(model, tokenizer, (tokenizer.eos_token_id,), folder / "tiny.gguf", dtype, "tiny")
    return folder / "tiny.gguf"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in MODELS if unread_gguf(make_config(name)) is None])
def test_what_is_read_from_a_file_gives_the_logprobs_of_the_rounded_model(
    name: str, dtype: str, tmp_path: Path
) -> None:
    model = make_model(name)
    before = logprobs(model)
    loaded = load_weights(str(written(model, tmp_path, dtype).parent), torch.float32, gguf_file="tiny.gguf")
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if tensor.ndim > 1:
                tensor.copy_(rounded(tensor, dtype))
            assert torch.equal(loaded.get_parameter(key), tensor), key
    assert torch.equal(logprobs(loaded), logprobs(model))
    assert torch.equal(logprobs(loaded), before) == (dtype == "float32")


def rounded(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """The numbers of a file, by torch's rounding, or for q8_0 by its definition: 32 integers share a float16 scale."""
    if dtype != "q8_0":
        return tensor.to(getattr(torch, dtype)).float()
    blocks = tensor.reshape(-1, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    integers = (blocks * torch.where(scale > 0, 1 / scale, 0)).double()
    integers = torch.sign(integers) * (integers.abs() + 0.5).floor()  # halves away from zero
    return (integers.float() * scale.half().float()).reshape(tensor.shape)


def test_gruppo_loads_the_file_with_its_tokens_and_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRUPPO_CACHE", str(tmp_path / "cache"))
    file = written(make_model("llama"), tmp_path)
    policy = load_model(find_model(str(file)), "cpu", "float32")
    tokenizer = byte_level(template=CHATML)
    text = "<|im_start|>user\nWhat is 4 + 4?<think> é 漢</think><|im_end|>\n"
    assert policy.tokenizer.encode(text) == tokenizer.encode(text)
    assert policy.tokenizer.chat_template == CHATML
    assert policy.eos_ids == (tokenizer.eos_token_id,)


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def test_fields_of_the_file(tmp_path: Path) -> None:
    tokenizer = byte_level(template=CHATML)
    ends = tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<|im_end|>"])
    model = make_model("llama")
    write_gguf(model, tokenizer, ends, tmp_path / "tiny.gguf", "bfloat16", "my model")
    found = fields(tmp_path / "tiny.gguf")
    rows = model.config.vocab_size
    assert found["general.name"] == "my model"
    assert found["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id, "the tokenizer's own EOS comes first"
    assert {found["tokenizer.ggml.eot_token_id"], found["tokenizer.ggml.eom_token_id"]} == {ends[0], ends[2]}
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (False, False)
    assert len(found["tokenizer.ggml.tokens"]) == len(found["tokenizer.ggml.token_type"]) == rows > len(tokenizer)
    assert found["tokenizer.ggml.tokens"][-1] == f"[PAD{rows - 1}]"
    assert found["tokenizer.ggml.token_type"][-1] == gguf.TokenType.UNUSED
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    assert types["token_embd.weight"] == "BF16"
    assert types["output_norm.weight"] == "F32"
    assert "output.weight" not in types, "the tied head is left out"


def with_splits(*parts: pre_tokenizers.PreTokenizer, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(parts))
    tokenizer.backend_tokenizer.model.ignore_merges = ignore_merges
    return tokenizer


def split(pattern: str) -> list[pre_tokenizers.PreTokenizer]:
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
DIGITS = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]


@pytest.mark.parametrize(
    ("tokenizer", "name"),
    [
        (byte_level(), "gpt-2"),
        (with_splits(*DIGITS), "smollm"),
        (with_splits(*split(QWEN2)), "qwen2"),
        (with_splits(*split(LLAMA3), ignore_merges=True), "llama-bpe"),
    ],
    ids=["gpt-2", "smollm", "qwen2", "llama-bpe"],
)
def test_the_way_of_splitting_is_found_in_the_tokenizer(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    assert gguf_vocabulary(tokenizer, (257,), 300).split == name


def test_tokens_around_a_text_are_found(tmp_path: Path) -> None:
    tokenizer = closing(byte_level())
    vocabulary = gguf_vocabulary(tokenizer, (tokenizer.eos_token_id,), 300)
    assert (vocabulary.bos, vocabulary.adds_bos, vocabulary.adds_eos) == (tokenizer.bos_token_id, True, True)


def lower() -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (make_tokenizer(), r"is not byte-level BPE \(as those of Llama 3, Qwen and SmolLM are\), but WordLevel"),
        (metaspace(), "is not byte-level BPE .*, but SentencePiece"),
        (lower(), "changes text with Lowercase"),
        (byte_level(prefix_space=True), "puts a space before each text"),
        (with_splits(*split(r"\d+")), r"splits text by '\\\\d\+'"),
        (with_splits(*split(LLAMA3)), "splits text by"),
    ],
)
def test_other_tokenizers_are_refused(tokenizer: PreTrainedTokenizerFast, words: str) -> None:
    with pytest.raises(UsageError, match=rf"^gguf=True: the tokenizer {words}.*export without gguf=True, and convert"):
        gguf_vocabulary(tokenizer, (257,), 300)


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        ("GPT2Config", {}, r"architecture 'gpt2' cannot be written \(those that can: llama, mistral, qwen2, qwen3\)"),
        ("LlamaConfig", {"attention_bias": True}, "'llama' with attention_bias or mlp_bias cannot be written"),
        ("LlamaConfig", {"hidden_act": "gelu"}, "'llama' with hidden_act = 'gelu' cannot be written, only with 'silu'"),
        ("MistralConfig", {"sliding_window": 8}, "'mistral' with a sliding window of 8 tokens cannot be written"),
        ("Qwen2Config", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
         "'qwen2' with positions scaled by 'yarn' cannot be written, only with default"),
    ],
)  # fmt: skip
def test_other_models_are_refused(config: str, changes: dict[str, Any], words: str) -> None:
    made: PreTrainedConfig = getattr(transformers, config)(**changes)
    with pytest.raises(UsageError, match=rf"^gguf=True: {words}; export without gguf=True"):
        require_gguf(made, byte_level(), (257,), "float32")


@pytest.mark.parametrize("ends", [(), (1, 2, 3, 4)])
def test_ends_that_a_file_cannot_name_are_refused(ends: Sequence[int]) -> None:
    with pytest.raises(UsageError, match=f"the model has {len(ends)} tokens that end a turn"):
        gguf_vocabulary(byte_level(), ends, 300)


def test_rows_that_cannot_be_quantized_are_refused() -> None:
    config = make_config("llama", intermediate_size=48)
    with pytest.raises(UsageError, match=r"^dtype = q8_0: needs matrices with rows of a multiple of 32 .* rows of 48"):
        require_gguf(config, byte_level(), (257,), "q8_0")


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] = 1e5
    with pytest.raises(UsageError, match=r"^dtype = float16: token_embd\.weight has values beyond 65,504; write"):
        written(model, tmp_path, "float16")


def test_a_file_that_transformers_would_read_wrongly_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers ignores the factors of Llama 3's frequencies: the model would compute something else."""
    monkeypatch.setenv("GRUPPO_CACHE", str(tmp_path / "cache"))
    file = written(make_model("llama3"), tmp_path)
    with pytest.raises(UsageError, match=r"tiny\.gguf': its positions are scaled, .* use the model's safetensors"):
        find_model(str(file))
