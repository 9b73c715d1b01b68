"""Rows that include completions: demonstrations (SFT) and preferences (DPO), in the common formats.

    {"prompt": …, "completion": …}      {"messages": [… the last by the assistant]}
    {"prompt": …, "chosen": …, "rejected": …}, or chosen and rejected as whole conversations with the same beginning

Prompts and completions are texts or messages. The loss covers exactly the tokens that the assistant wrote, up to the
token that ends its turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gruppo.data.chat_template import TemplateError, chat_tokens
from gruppo.errors import UsageError
from gruppo.types import Completion, Message, Prompt, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OfflineCompletions = Sequence[tuple[Completion, float]]  # completions with rewards: 1, or 0 if rejected

COMPLETIONS = ("completion", "chosen", "rejected")

_SHAPES = '{"prompt": "…", "completion": "…"}, {"messages": […]} or {"prompt": "…", "chosen": "…", "rejected": "…"}'


def with_prompt(row: Row, where: str) -> Row:
    """Return the row with `prompt` and either `completion` or `chosen` and `rejected`.

    `where`: name of the row in errors. Raises UsageError if the row has no completion or is in none of the formats
    above.
    """
    if "prompt" not in row and isinstance(row.get("messages"), list | tuple):
        prompt, answer = _divided(row["messages"], f"{where}: messages")
        row = {**{key: value for key, value in row.items() if key != "messages"}, "prompt": prompt}
        row["completion"] = answer
    elif "prompt" not in row and {"chosen", "rejected"} <= row.keys():
        row = {**row, **_common(row["chosen"], row["rejected"], where)}
    if "completion" not in row and not {"chosen", "rejected"} <= row.keys():
        raise UsageError(f"{where}: it has no completion (columns: {', '.join(row) or 'none'}); write {_SHAPES}")
    return row


def _divided(messages: Any, where: str) -> tuple[list[Message], list[Message]]:
    """Split messages before the assistant's first message."""
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in messages]
    if "assistant" not in roles[1:] or roles[0] == "assistant":
        raise UsageError(f"{where}: has no assistant message that follows another message; write {_SHAPES}")
    first = roles.index("assistant")
    return list(messages[:first]), list(messages[first:])


def _common(chosen: Any, rejected: Any, where: str) -> Row:
    """Prompt, chosen and rejected from two conversations with the same beginning."""
    if not isinstance(chosen, list | tuple) or not isinstance(rejected, list | tuple):
        raise UsageError(f"{where}: chosen and rejected without a prompt must be whole conversations; write {_SHAPES}")
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    begins = list(chosen[:common])
    while begins and isinstance(begins[-1], Mapping) and begins[-1].get("role") == "assistant":
        begins.pop()
    if not begins or len(begins) == min(len(chosen), len(rejected)):
        raise UsageError(
            f"{where}: chosen and rejected have no common beginning that is followed by answers; write {_SHAPES}"
        )
    return {"prompt": begins, "chosen": list(chosen[len(begins) :]), "rejected": list(rejected[len(begins) :])}


def offline_completions(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, pairs: bool) -> OfflineCompletions:
    """Tokenize a row's completions and pair them with rewards.

    Returns the completion with reward 1 or, if `pairs`, the chosen completion with reward 1 and the rejected one with
    reward 0. Their `sampling_logprobs` are NaN, because they were not sampled. Raises UsageError if a completion is
    missing or unusable, or if the chat template fails or does not continue the prompt.
    """
    wanted = ("chosen", "rejected") if pairs else ("completion",)
    if missing := [name for name in wanted if name not in prompt.columns]:
        raise UsageError(f"{prompt.id}: it has no {missing[0]}; write {_SHAPES}")
    completions = []
    for name, reward in zip(wanted, (1.0, 0.0), strict=False):
        try:
            ids, mask = _tokens(prompt, prompt.columns[name], tokenizer)
        except UsageError as error:
            raise UsageError(f"{prompt.id}: {name}: {error}") from None
        text = tokenizer.decode(list(ids), skip_special_tokens=True)
        completions.append((Completion(ids, (float("nan"),) * len(ids), mask, "stop", 0, str(text)), reward))
    return completions


def _tokens(
    prompt: Prompt, answer: Any, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Token ids of an answer, and a mask of the tokens that the assistant wrote."""
    content = prompt.content
    if isinstance(content, str):
        if not isinstance(answer, str) or not answer:
            raise UsageError(f"{answer!r:.60} is not non-empty text, which a plain-text prompt requires; write some")
        ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
        ids += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return tuple(ids), (True,) * len(ids)
    messages = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    if not isinstance(messages, list | tuple) or not messages:
        raise UsageError(f"{answer!r:.60} is neither text nor a list of messages; write {_SHAPES}")
    if any(not isinstance(message, Mapping) or not {"role", "content"} <= set(message) for message in messages):
        raise UsageError("it has a message without role and content; write both")
    if messages[0]["role"] != "assistant":
        raise UsageError("it does not begin with an assistant message; move earlier messages to prompt")
    options = prompt.template_options
    token_ids: list[int] = []
    mask: list[bool] = []
    for place, message in enumerate(messages):
        before, whole = [*content, *messages[:place]], [*content, *messages[: place + 1]]
        by_assistant = message["role"] == "assistant"
        start = _rendered(tokenizer, before, by_assistant, options) if by_assistant else [*prompt.token_ids, *token_ids]
        rendered = _rendered(tokenizer, whole, False, options)
        known = [*prompt.token_ids, *token_ids]
        if start[: len(known)] != known or rendered[: len(start)] != start:
            raise UsageError(
                "the model's chat template changes earlier messages as a conversation continues; write one row per "
                "answer, with the answer as its last message"
            )
        token_ids += rendered[len(known) :]
        mask += [False] * (len(start) - len(known)) + [by_assistant] * (len(rendered) - len(start))
        end = len(mask)
        while by_assistant and end and mask[end - 1] and not str(tokenizer.decode([token_ids[end - 1]])).strip():
            end -= 1
            mask[end] = False  # white space that a template adds after the end of a turn
    last = len(mask) - mask[::-1].index(True) if True in mask else 0
    if not last:
        raise UsageError("it has no assistant tokens; write some text")
    return tuple(token_ids[:last]), tuple(mask[:last])


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], ask: bool, options: Mapping[str, Any]
) -> list[int]:
    try:
        return chat_tokens(tokenizer, messages, options, ask=ask)
    except TemplateError:
        raise
    except Exception as error:  # a row's text can be what no tokenizer reads
        raise UsageError(f"it cannot be turned into tokens ({type(error).__name__}: {error}); write text") from error
