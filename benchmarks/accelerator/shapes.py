"""Models with random weights, in the shapes of models that people train, and a tokenizer for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, and the work of a training step on it; lengths in tokens."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    prompts: int
    group: int
    prompt_tokens: int
    max_tokens: int

    @property
    def completions(self) -> int:
        """Completions of a step."""
        return self.prompts * self.group


SHAPES = {
    "tiny": Shape(128, 256, 2, 4, 2, 512, 2, 4, 12, 12),  # heads of 32, which every engine has kernels for
    "0.5b": Shape(896, 4864, 24, 14, 2, 151_936, 16, 8, 256, 256),
    "1.5b": Shape(1536, 8960, 28, 12, 2, 151_936, 16, 8, 256, 256),
}


def save_random_model(shape: Shape, folder: Path) -> None:
    """Save a model of this shape as transformers does, with a tokenizer that has one word for each token.

    Token 0 ends a text. With random weights it is sampled about once in `vocabulary` tokens, so completions have
    `max_tokens` tokens.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=32_768, tie_word_embeddings=True, eos_token_id=0, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    vocabulary = {"<eos>": 0} | {f"w{token}": token for token in range(1, shape.vocabulary)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)


def prompts_of(shape: Shape, count: int) -> list[dict[str, str]]:
    """Rows with prompts of `prompt_tokens` words."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, shape.vocabulary, (count, shape.prompt_tokens), generator=generator)
    return [{"prompt": " ".join(f"w{token}" for token in row)} for row in tokens.tolist()]
