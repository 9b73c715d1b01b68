"""Token ids as text and text as token ids, in the context of what comes before.

A tokenizer's answer for a piece is not a part of its answer for the whole: it may put a space before each text, remove
the space at the start of one, spread a character over several tokens, or have no text at all for an id. All text that a
model reads or writes goes through this module, so that the pieces of a sequence, joined, are the text of the sequence.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNDECODABLE = "\ufffd"  # in place of bytes that are not a character (yet), and of ids without text
_TAILS = 4, 16, 64  # tokens before a piece that are decoded with it: the fewest that are whole characters
CONTEXT_TOKENS = _TAILS[-1]  # no more tokens before a piece matter to its text
_CHARACTER = 4  # the most bytes, and so tokens, of a character
_BARRIERS = "\n", "1", ".", "a", " "  # texts to put before a piece, so that it is not the start of a text


def text_of(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], before: Sequence[int] = ()) -> str:
    """The text that tokens add to those `before` them.

    Special tokens are part of the text, except BOS and padding; see `silent_ids`. The caller leaves out the EOS token
    that ends a completion. An incomplete character at the end is U+FFFD (once, or once per byte), and so is every id
    for which the tokenizer has no text.
    """
    return _text(tokenizer, token_ids, before, silent_ids(tokenizer))


def visible_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of a sequence with all of its special tokens."""
    return _text(tokenizer, token_ids, (), frozenset())


def silent_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids of BOS and padding, which are never part of a text, unless the chat template writes them.

    Some tokenizers declare the marks around a message as BOS and padding.
    """
    template = str(tokenizer.chat_template or "")
    named = (tokenizer.bos_token_id, tokenizer.bos_token), (tokenizer.pad_token_id, tokenizer.pad_token)
    return frozenset(int(token) for token, text in named if token is not None and str(text) not in template)


def ids_without_text(tokenizer: PreTrainedTokenizerBase, token_ids: Collection[int]) -> frozenset[int]:
    """Those of the ids for which the tokenizer has no token. The head of a model can have more rows than its tokenizer
    has tokens."""
    ids = list(token_ids)
    try:
        tokens: Any = tokenizer.convert_ids_to_tokens(ids)
    except Exception:  # noqa: BLE001  a tokenizer in Python may fail in any way
        known = set(tokenizer.get_vocab().values())
        return frozenset(token for token in ids if token not in known)
    return frozenset(token for token, text in zip(ids, tokens, strict=True) if text is None)


def _text(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], before: Sequence[int], silent: Collection[int]
) -> str:
    kept = [token for token in token_ids if token not in silent]
    if not kept:
        return ""
    recent = [token for token in before[-_TAILS[-1] :] if token not in silent]
    unknown = ids_without_text(tokenizer, {*kept, *recent})
    if not unknown:
        return _added(tokenizer, recent, kept)
    last = max((place for place, token in enumerate(recent) if token in unknown), default=-1)
    context = recent[last + 1 :] if last + 1 < len(recent) or last < 0 else _other(tokenizer)
    texts: list[str] = []
    start = 0
    for place, token in enumerate(kept):
        if token in unknown:
            texts += [_added(tokenizer, context, kept[start:place]), UNDECODABLE]
            context, start = _other(tokenizer), place + 1
    return "".join([*texts, _added(tokenizer, context, kept[start:])])


def _other(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of another text, for a piece that is not the start of one."""
    return list(tokenizer("a", add_special_tokens=False)["input_ids"])


def _added(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], token_ids: Sequence[int]) -> str:
    if not token_ids:
        return ""
    context: Sequence[int] = ()
    known = ""
    for size in _TAILS if before else ():
        context = before[-size:]
        known = _whole(tokenizer, context)
        if known.strip() and UNDECODABLE not in known:
            break
    whole = _whole(tokenizer, [*context, *token_ids])
    for start in (known, known.rstrip(UNDECODABLE)):  # the tokens may complete a character
        if whole.startswith(start):
            return whole[len(start) :]
    return _whole(tokenizer, token_ids)


def _whole(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Decoded tokens. Some decoders lose the characters before an incomplete one; they are kept here."""
    text = _decoded(tokenizer, token_ids)
    if not text.endswith(UNDECODABLE):
        return text
    for cut in range(1, min(_CHARACTER, len(token_ids) + 1)):
        complete = _decoded(tokenizer, token_ids[:-cut])
        if not complete.endswith(UNDECODABLE):
            return text if text.startswith(complete) else complete + cut * UNDECODABLE
    return text


def _decoded(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    if not token_ids:
        return ""
    exact: dict[str, Any] = {"clean_up_tokenization_spaces": False, "spaces_between_special_tokens": False}
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=False, **exact))


def shared_length(one: str, other: str) -> int:
    """The number of characters at the start of two texts that are the same."""
    if other.startswith(one):
        return len(one)
    return next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(other))


class TokenTexts:
    """Divides the text of sequences among their tokens. Keeps the texts of the tokens that it has seen.

    `special`: whether BOS and padding have text, too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special: bool = False) -> None:
        self.tokenizer, self.silent = tokenizer, frozenset() if special else silent_ids(tokenizer)
        self._other = _other(tokenizer)
        self._texts: dict[int, str] = {}

    def of(self, token_ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
        """The text that each token completes; joined, it is the text that the tokens add to those `before` them.

        The last token of a character has the character, the others of it have no text.
        """
        whole = _text(self.tokenizer, token_ids, before, self.silent)
        texts = self._token_by_token(token_ids, before)
        return texts if "".join(texts) == whole else self._prefix_by_prefix(token_ids, before, whole)

    def _token_by_token(self, token_ids: Sequence[int], before: Sequence[int]) -> list[str]:
        texts: list[str] = []
        run: list[int] = []  # tokens that are no characters by themselves

        def end_run() -> None:
            if run:
                texts[-1] = _text(self.tokenizer, run, self._other, self.silent)
                run.clear()

        for token in token_ids:
            text = self._text_of_token(token) if texts else _text(self.tokenizer, [token], before, self.silent)
            if UNDECODABLE not in text:
                end_run()
                texts.append(text)
                continue
            run.append(token)
            texts.append("")
            if UNDECODABLE not in _text(self.tokenizer, run, self._other, self.silent):
                end_run()
        end_run()
        return texts

    def _text_of_token(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = _text(self.tokenizer, [token], self._other, self.silent)
        return self._texts[token]

    def _prefix_by_prefix(self, token_ids: Sequence[int], before: Sequence[int], whole: str) -> list[str]:
        """What each prefix shares with the whole. Quadratic, and exact also where characters are broken."""
        ends = [0]
        for count in range(1, len(token_ids)):
            text = _text(self.tokenizer, token_ids[:count], before, self.silent)
            ends.append(max(ends[-1], shared_length(text, whole)))
        return [whole[start:end] for start, end in zip(ends, [*ends[1:], len(whole)], strict=True)]


def tokens_after(
    tokenizer: PreTrainedTokenizerBase, text: str, before: Sequence[int], special: bool = True
) -> list[int]:
    """The tokens of a text that follows the tokens `before` it: no BOS, no EOS, and no space that is not in the text.

    `special`: whether the text of a special token becomes that token. Where a tokenizer treats the start of a text like
    any other place, these are the tokens of the text alone.
    """
    options: dict[str, Any] = {} if special else {"split_special_tokens": True}

    def tokenized(piece: str) -> list[int]:
        return list(tokenizer(piece, add_special_tokens=False, **options)["input_ids"]) if piece else []

    context, alone = before or _other(tokenizer), tokenized(text)
    text_alone = text_of(tokenizer, alone, context)
    if _alike(text_alone, text):
        return alone
    last = tokenizer.added_tokens_decoder.get(int(context[-1])) if special else None
    for barrier in ([str(last)] if last else []) + list(_BARRIERS):
        start, together = tokenized(barrier), tokenized(barrier + text)
        rest = together[len(start) :]
        if not start or together[: len(start)] != start:
            continue
        read = text_of(tokenizer, rest, context)
        spaced = last is not None and barrier == str(last) and read == text_alone  # so in the whole, too
        if spaced or text_alone == f" {read}" or _alike(read, text):
            return rest
    return alone


def _alike(one: str, other: str) -> bool:
    """Whether two texts differ at most in what the normalizers of tokenizers change."""
    return one == other or _normalized(one) == _normalized(other)


def _normalized(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that something follows: with the special tokens that the tokenizer puts before a text, but
    without those that it puts after one. A text that begins with the BOS token gets no second one."""
    if tokenizer.bos_token and text.startswith(str(tokenizer.bos_token)):
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    token_ids = list(tokenizer(text)["input_ids"])
    return token_ids[: len(token_ids) - closing_tokens(tokenizer)]


def closing_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of special tokens that the tokenizer puts after each text."""
    plain, marked = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    for start in range(len(marked) - len(plain) + 1 if plain else 0):
        if marked[start : start + len(plain)] == plain:
            return len(marked) - start - len(plain)
    return int(marked[-1:] == [tokenizer.eos_token_id])
