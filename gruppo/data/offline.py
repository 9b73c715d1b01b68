"""Rows that include completions: demonstrations (SFT) and preferences (DPO), in the common formats.

    {"prompt": …, "completion": …}      {"messages": [… the last by the assistant]}
    {"prompt": …, "chosen": …, "rejected": …}, or chosen and rejected as whole conversations with the same beginning

Prompts and completions are texts or messages. A completion may be a whole conversation that begins with the messages of
the prompt, or with its text as a user message. The loss covers exactly the tokens that the assistant wrote, up to the
token that ends its turn; assistant messages with the weight 0 that precede all others belong to the prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gruppo.data.chat_template import TemplateError, render_chat
from gruppo.data.reasoning_blocks import written_answer
from gruppo.errors import UsageError
from gruppo.types import Completion, Message, Prompt, Row
from gruppo.utils.token_text import text_of, text_tokens, tokens_after, visible_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OfflineCompletions = Sequence[tuple[Completion, float]]  # completions with rewards: 1, or 0 if rejected

COMPLETIONS = ("completion", "chosen", "rejected")

_SHAPES = '{"prompt": "…", "completion": "…"}, {"messages": […]} or {"prompt": "…", "chosen": "…", "rejected": "…"}'


def with_prompt(row: Row, where: str) -> Row:
    """Return the row with `prompt` and either `completion` or `chosen` and `rejected`.

    `where`: name of the row in errors. Raises UsageError if the row has no completion, is in none of the formats above,
    or if an assistant message of a completion has a weight other than 1.
    """
    if "prompt" not in row and isinstance(row.get("messages"), list | tuple):
        prompt, answer = _divided(row["messages"], f"{where}: messages")
        row = {**{key: value for key, value in row.items() if key != "messages"}, "prompt": prompt}
        row["completion"] = answer
    elif "prompt" not in row and {"chosen", "rejected"} <= row.keys():
        row = {**row, **_common(row["chosen"], row["rejected"], where)}
    elif isinstance(row.get("prompt"), str | list | tuple):
        row = {**row, **_without_prompt(row)}
    if "completion" not in row and not {"chosen", "rejected"} <= row.keys():
        raise UsageError(f"{where}: it has no completion (columns: {', '.join(row) or 'none'}); write {_SHAPES}")
    for name in COMPLETIONS:
        _require_weights(row.get(name), f"{where}: {name}")
    return row


def _divided(messages: Any, where: str) -> tuple[list[Message], list[Message]]:
    """Split messages before the assistant's first answer to another message whose weight is not 0."""
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in messages]
    if "assistant" not in roles[1:] or roles[0] == "assistant":
        raise UsageError(f"{where}: has no assistant message that follows another message; write {_SHAPES}")
    trained = (
        place
        for place, (before, role) in enumerate(itertools.pairwise(roles), start=1)
        if role == "assistant" != before and messages[place].get("weight") != 0
    )
    first = next(trained, roles.index("assistant"))
    _require_weights(messages[first:], where, first)
    return list(messages[:first]), list(messages[first:])


def _require_weights(completion: Any, where: str, start: int = 0) -> None:
    """Raise UsageError for an assistant message with a weight other than 1, since all of them are trained on.

    `start`: the index that the first message has in the row.
    """
    for place, message in enumerate(completion if isinstance(completion, list | tuple) else (), start):
        if not isinstance(message, Mapping) or message.get("role") != "assistant":
            continue
        if (weight := message.get("weight")) not in (None, 1):
            raise UsageError(
                f"{where}[{place}].weight = {weight!r}: must be 1, as every assistant message of a completion is "
                "trained on; move it and all before it to prompt, remove it and all after it, or leave the row out"
            )


def _without_prompt(row: Row) -> Row:
    """The completions that are conversations which begin with the prompt, without that beginning, and the prompt.

    {} if there are none. Text as a prompt is that of a user message.
    """
    prompt = row["prompt"]
    begins = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answers = {
        name: list(row[name][len(begins) :])
        for name in COMPLETIONS
        if isinstance(row.get(name), list | tuple) and len(row[name]) > len(begins) > 0
        if list(row[name][: len(begins)]) == list(begins)
    }
    return {"prompt": begins, **answers} if answers else {}


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
        ended = tokenizer.added_tokens_decoder.get(ids[-1])  # the token that ends a turn is not text
        text = text_of(tokenizer, ids[:-1] if ended is not None and ended.special else ids, prompt.token_ids)
        completions.append((Completion(ids, (float("nan"),) * len(ids), mask, "stop", 0, text), reward))
    return completions


def _tokens(
    prompt: Prompt, answer: Any, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Token ids of an answer, and a mask of the tokens that the assistant wrote.

    They are the tokens of prompt and answer as a whole, after those of the prompt. Where a token of the whole would
    begin in the prompt, they are the tokens of the answer alone.
    """
    if isinstance(prompt.content, str):
        if not isinstance(answer, str) or not answer:
            raise UsageError(f"{answer!r:.60} is not non-empty text, which a plain-text prompt requires; write some")
        ids = _continued(tokenizer, prompt.token_ids, text_tokens(tokenizer, prompt.content + answer), answer)
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        return tuple(ids), (True,) * len(ids)
    messages = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    if not isinstance(messages, list | tuple) or not messages:
        raise UsageError(f"{answer!r:.60} is neither text nor a list of messages; write {_SHAPES}")
    if any(not isinstance(message, Mapping) or not {"role", "content"} <= set(message) for message in messages):
        raise UsageError("it has a message without role and content; write both")
    if messages[0]["role"] != "assistant":
        raise UsageError("it does not begin with an assistant message; move earlier messages to prompt")
    return _tokens_of_messages(prompt, messages, tokenizer)


def _tokens_of_messages(
    prompt: Prompt, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    assert not isinstance(prompt.content, str)
    content, options = prompt.content, prompt.template_options
    known, token_ids = _prompt_text(tokenizer, content, options), list(prompt.token_ids)
    mask = [False] * len(token_ids)

    def extend(text: str, by_assistant: bool) -> None:
        nonlocal known
        known += text
        whole = list(tokenizer(known, add_special_tokens=False)["input_ids"])
        added = _continued(tokenizer, token_ids, whole, text)
        token_ids.extend(added)
        mask.extend([by_assistant] * len(added))

    if content[-1]["role"] == "assistant":  # the answer continues the last message of the prompt
        begun = content[-1]
        joined = {**begun, **messages[0], "content": f"{begun['content']}{messages[0]['content']}"}
        content, messages = content[:-1], [joined, *messages[1:]]
    for place, message in enumerate(messages):
        before, by_assistant = [*content, *messages[:place]], message["role"] == "assistant"
        whole = _rendered(tokenizer, [*before, message], options)
        if by_assistant:
            _require_rendered(tokenizer, whole, before, message, options)
        if by_assistant and place:
            start = _rendered(tokenizer, before, options, ask=True)
            extend(_rest(tokenizer, known, start, before, options), False)
        if by_assistant and (written := written_answer(known, whole, str(message["content"]))) is not None:
            extend(written, True)
        else:
            extend(_rest(tokenizer, known, whole, before, options), by_assistant)
        end = len(mask)
        while by_assistant and end and mask[end - 1] and not visible_text(tokenizer, token_ids[end - 1 : end]).strip():
            end -= 1
            mask[end] = False  # white space that a template adds after the end of a turn
    if True not in mask:
        raise UsageError("it has no assistant tokens; write some text")
    first, last = len(prompt.token_ids), len(mask) - mask[::-1].index(True)
    return tuple(token_ids[first:last]), tuple(mask[first:last])


def _require_rendered(
    tokenizer: PreTrainedTokenizerBase,
    whole: str,
    before: Sequence[Message],
    message: Message,
    options: Mapping[str, Any],
) -> None:
    """Raise UsageError if the template leaves out a part of an answer: `whole` is the same without it."""
    for key, fix in _PARTS.items():
        value = message.get(key)
        if not value or (isinstance(value, str) and (not value.strip() or value.strip() in whole)):
            continue
        rest = {name: other for name, other in message.items() if name != key}
        try:
            left_out = _rendered(tokenizer, [*before, {**rest, "content": rest.get("content") or ""}], options) == whole
        except UsageError:  # the template needs it
            continue
        if left_out:
            raise UsageError(
                f"the model's chat template leaves out the {key} of this answer, so it would not be trained on; "
                f"{fix}, or use a chat template that shows it"
            )


# What an answer consists of, and what to do if a template leaves it out.
_PARTS = {
    "tool_calls": "write the calls into the content, in the form that the model is to write",
    "reasoning_content": "write the reasoning into the content, e.g. <think>…</think> before the answer",
    "reasoning": "write the reasoning into the content, e.g. <think>…</think> before the answer",
    "thinking": "write the reasoning into the content, e.g. <think>…</think> before the answer",
    "content": "write the answer as this template expects it",
}


def _continued(tokenizer: PreTrainedTokenizerBase, known: Sequence[int], whole: Sequence[int], text: str) -> list[int]:
    """The tokens of `whole` after `known`, or if it does not begin with them, those of the `text` that follows them."""
    if list(whole[: len(known)]) == list(known):
        return list(whole[len(known) :])
    return tokens_after(tokenizer, text, known)


def _rest(
    tokenizer: PreTrainedTokenizerBase, known: str, whole: str, before: Sequence[Message], options: Mapping[str, Any]
) -> str:
    """The text of `whole` after `known`. Raises UsageError if it begins differently."""
    if whole.startswith(known):
        return whole[len(known) :]
    bare = _rendered(tokenizer, before, options).rstrip()
    if known.startswith(bare) and whole.startswith(bare):
        raise UsageError(
            f"prompts end with {known[len(bare) :][-40:]!r}, but the model's chat template begins this answer with "
            f"{whole[len(bare) :][:40]!r}; use a chat template whose generation prompt is the start of its answers"
        )
    raise UsageError(
        "the model's chat template changes earlier messages as a conversation continues; write one row per "
        "answer, with the answer as its last message"
    )


def _prompt_text(tokenizer: PreTrainedTokenizerBase, content: Sequence[Message], options: Mapping[str, Any]) -> str:
    """The text that `gruppo.data.tokenization.prompt_tokens` tokenizes."""
    continues = content[-1]["role"] == "assistant"
    return _rendered(tokenizer, content, options, ask=not continues, continue_last=continues)


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Mapping[str, Any], **how: bool
) -> str:
    try:
        return render_chat(tokenizer, messages, options, **how)
    except TemplateError:
        raise
    except Exception as error:  # a row's text can be what no template renders
        raise UsageError(f"it cannot be rendered ({type(error).__name__}: {error}); write text") from error
