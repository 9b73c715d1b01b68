"""A tokenizer as llama.cpp describes it in a GGUF file: tokens, merges, special tokens and chat template.

llama.cpp knows the ways of splitting text before merging by name only. The name is found from the tokenizer's own
pipeline, so that llama.cpp gives the token ids that the model was trained on. A tokenizer that llama.cpp cannot
reproduce is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from gruppo.errors import UsageError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

# (how text is split before merging, whether a whole word that is a token is taken without merging) -> llama.cpp's name
_PRE_TOKENIZERS = {
    ("words", False): "gpt-2",
    ("digits, words", False): "smollm",
    (_QWEN2, False): "qwen2",
    (_LLAMA3, True): "llama-bpe",
}
_ENDS = ("eos", "eot", "eom")  # llama.cpp's names of the tokens that end a turn


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer's part of a GGUF file.

    `tokens`, `types`: one for each row of the embedding. `split`: llama.cpp's name of the way text is split. `ends`:
    ids that end a turn, the tokenizer's own EOS first. `adds_bos`, `adds_eos`: whether text gets these tokens.
    """

    tokens: Sequence[str]
    types: Sequence[gguf.TokenType]
    merges: Sequence[str]
    split: str
    ends: Sequence[int]
    bos: int | None
    pad: int | None
    unknown: int | None
    adds_bos: bool
    adds_eos: bool
    template: str | None

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add the fields to a file."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        named = {"bos": self.bos, "pad": self.pad, "unk": self.unknown, **dict(zip(_ENDS, self.ends))}
        for name, token in named.items():
            if token is not None:
                getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.adds_bos)  # its default depends on the way text is split
        writer.add_add_eos_token(self.adds_eos)
        if self.template is not None:
            writer.add_chat_template(self.template)


def gguf_vocabulary(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], rows: int) -> Vocabulary:
    """The vocabulary of a tokenizer for llama.cpp.

    `ends`: all ids that end a turn. `rows`: of the embedding; those without a token are unused. Raises UsageError if
    llama.cpp cannot reproduce the tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal("is written in Python")
    pipeline = json.loads(backend.to_str())
    split = _split_of(pipeline)
    for token in pipeline["added_tokens"]:
        if odd := [name for name in ("lstrip", "rstrip", "single_word") if token[name]]:
            raise _refusal(f"has the token {token['content']!r} with {odd[0]}=True")
    ids = backend.get_vocab(with_added_tokens=True)
    if not ids or max(ids.values()) >= rows:
        raise _refusal(f"has the id {max(ids.values(), default=0)}, and the model has {rows} embeddings")
    added = {token["id"]: token["special"] for token in pipeline["added_tokens"]}
    texts = {token: text for text, token in ids.items()}
    bos, adds_bos, adds_eos = _around(tokenizer, ends)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return Vocabulary(
        tokens=[texts.get(row, f"[PAD{row}]") for row in range(rows)],
        types=[_type_of(row, texts, added) for row in range(rows)],
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in pipeline["model"]["merges"]],
        split=split,
        ends=_ordered(tokenizer, ends),
        bos=bos,
        pad=tokenizer.pad_token_id,
        unknown=tokenizer.unk_token_id,
        adds_bos=adds_bos,
        adds_eos=adds_eos,
        template=template,
    )


def _refusal(what: str) -> UsageError:
    return UsageError(
        f"--gguf: the tokenizer {what}, which cannot be described in a GGUF file; export without --gguf, "
        "and convert the folder with llama.cpp's convert_hf_to_gguf.py"
    )


def _split_of(pipeline: Mapping[str, Any]) -> str:
    """llama.cpp's name of the way a tokenizer splits text. Raises UsageError if there is none."""
    model = pipeline["model"]
    parts = _parts(pipeline["pre_tokenizer"], "pretokenizers")
    if model["type"] != "BPE" or model.get("byte_fallback") or not parts or parts[-1]["type"] != "ByteLevel":
        raise _refusal(f"is not byte-level BPE (as those of Llama 3, Qwen and SmolLM are), but {_kind(model)}")
    normalizers = [part["type"] for part in _parts(pipeline["normalizer"], "normalizers")]
    if unknown := sorted(set(normalizers) - {"NFC"}):
        raise _refusal(f"changes text with {unknown[0]}")
    if parts[-1]["add_prefix_space"]:
        raise _refusal("puts a space before each text")
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _refusal("has dropout, or marks the parts of words")
    described = ", ".join([*map(_described, parts[:-1]), *(["words"] if parts[-1]["use_regex"] else [])])
    name = _PRE_TOKENIZERS.get((described, bool(model.get("ignore_merges"))))
    if name is None:
        raise _refusal(f"splits text by {described!r}")
    return name


def _parts(step: Mapping[str, Any] | None, of: str) -> Sequence[Mapping[str, Any]]:
    """The parts of a step of a tokenizer's pipeline."""
    if step is None:
        return []
    parts: Sequence[Mapping[str, Any]] = step[of] if step["type"] == "Sequence" else [step]
    return parts


def _kind(model: Mapping[str, Any]) -> str:
    return "SentencePiece" if model.get("byte_fallback") else str(model["type"])


def _described(part: Mapping[str, Any]) -> str:
    if part["type"] == "Digits" and part["individual_digits"]:
        return "digits"
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"] and "Regex" in part["pattern"]:
        return str(part["pattern"]["Regex"])
    return json.dumps(part)


def _type_of(row: int, texts: Mapping[int, str], special: Mapping[int, bool]) -> gguf.TokenType:
    if row not in texts:
        return gguf.TokenType.UNUSED
    if row not in special:
        return gguf.TokenType.NORMAL
    return gguf.TokenType.CONTROL if special[row] else gguf.TokenType.USER_DEFINED


def _ordered(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> Sequence[int]:
    """The ids that end a turn, the tokenizer's EOS first. Raises UsageError if a file cannot name them all."""
    if not 1 <= len(ends) <= len(_ENDS):
        raise UsageError(
            f"--gguf: the model has {len(ends)} tokens that end a turn ({list(ends)}), and a GGUF file names one to "
            f"{len(_ENDS)}; export without --gguf"
        )
    return sorted(ends, key=lambda token: (token != tokenizer.eos_token_id, token))


def _around(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> tuple[int | None, bool, bool]:
    """The id of BOS, and whether BOS and EOS are put around a text."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    start = next((place for place in range(len(whole)) if whole[place : place + len(plain)] == plain), 0)
    before, after = whole[:start], whole[start + len(plain) :]
    if len(before) > 1 or (after and (len(after) > 1 or after[0] != _ordered(tokenizer, ends)[0])):
        raise _refusal(f"puts the tokens {before} before and {after} after a text")
    return (before[0] if before else tokenizer.bos_token_id), bool(before), bool(after)
