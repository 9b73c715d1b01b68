"""Tiny tokenizers of every kind that treats a piece of a text differently than the same text within another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ("<s>", "</s>", "<pad>")
MARKS = ("<think>", "</think>", "<tool_call>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _fast(tokenizer: Tokenizer, template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (*SPECIAL, *MARKS)])
    names = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
    fast.chat_template = template
    return fast


def _pieces(texts: Sequence[str], merges: Sequence[tuple[str, str]], **options: object) -> Tokenizer:
    vocabulary: dict[str, int] = {}
    for text in (*texts, *("".join(pair) for pair in merges)):
        vocabulary.setdefault(text, len(vocabulary))
    return Tokenizer(models.BPE(vocabulary, list(merges), **options))


_FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]
_LETTERS = [*"▁abcdefghijklmnopqrstuvwxyzQA0123456789+=.,:?{}\"'<>/"]
_MERGES = [("▁", "a"), ("▁", "b"), ("▁", "4"), ("a", "b")]


def metaspace(scheme: str = "always", template: str | None = None) -> PreTrainedTokenizerFast:
    """As SentencePiece: a space before each text, bytes for what it does not know."""
    tokenizer = _pieces([*_FALLBACK, *_LETTERS], _MERGES, byte_fallback=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)]
    )
    return _fast(tokenizer, template)


def prepending(template: str | None = None) -> PreTrainedTokenizerFast:
    """As Llama 2 in its older files: the normalizer puts a space before each text."""
    tokenizer = _pieces([*_FALLBACK, *_LETTERS], _MERGES, byte_fallback=True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _fast(tokenizer, template)


def byte_level(prefix_space: bool = False, template: str | None = None) -> PreTrainedTokenizerFast:
    """As GPT-2: every character outside ASCII is several tokens."""
    tokenizer = _pieces(BYTES, [("Ġ", "a"), ("Ġ", "4"), ("a", "b"), ("Ċ", "Ċ")])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer, template)


def closing(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with BOS before and EOS after each text."""
    ids = [(text, tokenizer.convert_tokens_to_ids(text)) for text in SPECIAL[:2]]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B", ids)
    return tokenizer


def ids_of(tokenizer: PreTrainedTokenizerFast, *texts: str) -> list[int]:
    """The ids of tokens by their texts in the vocabulary."""
    return [int(tokenizer.convert_tokens_to_ids(text)) for text in texts]


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "metaspace": metaspace,
    "metaspace first": lambda: metaspace("first"),
    "metaspace never": lambda: metaspace("never"),
    "prepending": prepending,
    "byte level": byte_level,
    "byte level with a space": lambda: byte_level(prefix_space=True),
}
