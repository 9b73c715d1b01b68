"""Checks of token text: what the first rows look like to the model, and where a tokenizer treats a piece of a text
differently than the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from gruppo.data.offline import OfflineCompletions
from gruppo.data.reasoning_blocks import opened_block
from gruppo.models.policy import LanguageModel
from gruppo.preflight.findings import Finding
from gruppo.types import Prompt
from gruppo.utils.token_text import closing_tokens, silent_ids, visible_text

ROWS = 2  # shown
_SHOWN = 240  # characters at the start and at the end of a text
_FEW = 0.01  # share of a head without text that a trained model hardly ever samples


def check_token_text(
    policy: LanguageModel, prompts: Sequence[Prompt], offline: Mapping[str, OfflineCompletions]
) -> list[Finding]:
    """The first rows as token text, and what is special about the text of the model's tokens, in words."""
    tokenizer = policy.tokenizer
    return [
        *show_rows(tokenizer, prompts[:ROWS], offline),
        *_ids_without_text(policy),
        *_start_and_end_of_texts(tokenizer),
        *_special_tokens(policy),
        *_reasoning(tokenizer, prompts),
    ]


def show_rows(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], offline: Mapping[str, OfflineCompletions]
) -> list[Finding]:
    """Prompt and answer of rows, as text with all special tokens: the tokens of the row's completions, or else the
    row's `answer`, which no model reads."""
    found = []
    for prompt in prompts:
        text = visible_text(tokenizer, prompt.token_ids)
        answers = [
            visible_text(tokenizer, [*prompt.token_ids, *completion.token_ids])[len(text) :]
            for completion, _ in offline.get(prompt.id, ())
        ]
        what = f'prompt "{_escaped(text)}"'
        if answers:
            what += "".join(f', completion "{_escaped(answer)}"' for answer in answers)
        elif "answer" in prompt.columns:
            what += f', reference answer "{_escaped(str(prompt.columns["answer"]))}"'
        figures = {"prompt": text, "completions": answers, "answer": prompt.columns.get("answer")}
        found.append(Finding("ok", f"row {prompt.id}", what, figures=figures))
    return found


def _escaped(text: str) -> str:
    """A text on one line, with line ends visible, and without the middle of a long one."""
    if len(text) > 2 * _SHOWN:
        text = f"{text[:_SHOWN]} […] {text[-_SHOWN:]}"
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")


def _ids_without_text(policy: LanguageModel) -> list[Finding]:
    count, size = len(policy.ids_without_text), policy.head_size
    if not count:
        return []
    return [Finding(
        "warning" if count > _FEW * size else "note", "token text",
        f"the tokenizer has no text for {count} of the {size} token ids that the model can sample",
        "such a token is the character U+FFFD in the text of a completion; completion/without_text is their share",
        "use the tokenizer that belongs to the model" if count > _FEW * size
        else "nothing, if the model was trained: the rows are padding, with almost no probability",
        {"without_text": count, "ids": size},
    )]  # fmt: skip


def _start_and_end_of_texts(tokenizer: PreTrainedTokenizerBase) -> list[Finding]:
    found = []
    if closing := closing_tokens(tokenizer):
        end = visible_text(tokenizer, list(tokenizer("a")["input_ids"])[-closing:])
        found.append(Finding(
            "note", "token text", f"the tokenizer puts {end!r} after each text",
            "after a prompt, the model would have nothing to continue",
            "nothing: gruppo leaves it out after prompts, and ends completions once", {"after_text": end},
        ))  # fmt: skip
    if tokenizer.tokenize("a") != tokenizer.tokenize("\na")[-len(tokenizer.tokenize("a")) :]:
        found.append(Finding(
            "note", "token text", "the tokenizer puts a space before each text",
            "an answer that is tokenized by itself would begin with a space that the row does not have",
            "nothing: gruppo tokenizes completions and observations as parts of the whole text",
        ))  # fmt: skip
    return found


def _special_tokens(policy: LanguageModel) -> list[Finding]:
    tokenizer = policy.tokenizer
    named = {tokenizer.unk_token_id, *policy.eos_ids, *silent_ids(tokenizer)}
    special = [str(token) for index, token in tokenizer.added_tokens_decoder.items()
               if token.special and index not in named]  # fmt: skip
    if not special:
        return []
    shown = ", ".join(special[:4]) + (f" and {len(special) - 4} more" if len(special) > 4 else "")
    return [Finding(
        "note", "token text", f"special tokens in completions are part of their text: {shown}",
        "reward functions see them, and may have to remove them", "nothing, if the reward expects them",
        {"special": special},
    )]  # fmt: skip


def _reasoning(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[Finding]:
    chat = next((prompt for prompt in prompts if not isinstance(prompt.content, str)), None)
    block = opened_block(visible_text(tokenizer, chat.token_ids)) if chat is not None else None
    if block is None:
        return []
    opening, closed = block
    what = f"the chat template begins every answer with {opening}" + (", and closes it at once" if closed else "")
    return [Finding(
        "note", "token text", what,
        f"completions do not contain {opening}: a reward that looks for it gives 0 to all of them",
        "write the reward for what follows the prompt", {"opened": opening, "closed": closed},
    )]  # fmt: skip
