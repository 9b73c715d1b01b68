"""Rows that bring their completions: demonstrations (SFT) and preferences (DPO), in the shapes that people have.

    {"prompt": …, "completion": …}      {"messages": [… the last by the assistant]}
    {"prompt": …, "chosen": …, "rejected": …}, or chosen and rejected as whole conversations that begin alike

Texts or messages. A loss sees what the assistant wrote, to the token that ends its turn, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gruppo.errors import UsageError
from gruppo.types import Completion, Message, Prompt, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OfflineCompletions = Sequence[
    tuple[Completion, float]
]  # completions with their rewards: 1, and 0 for what was rejected

_SHAPES = '{"prompt": "…", "completion": "…"}, {"messages": […]} or {"prompt": "…", "chosen": "…", "rejected": "…"}'


def with_prompt(row: Row, where: str) -> Row:
    """The row with `prompt` and either `completion` or `chosen` and `rejected`. Raises UsageError."""
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
    """What stands before the assistant's first message, and from there on."""
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in messages]
    if "assistant" not in roles[1:] or roles[0] == "assistant":
        raise UsageError(f"{where}: holds no message of the assistant that follows another; write {_SHAPES}")
    first = roles.index("assistant")
    return list(messages[:first]), list(messages[first:])


def _common(chosen: Any, rejected: Any, where: str) -> Row:
    """Prompt, chosen and rejected of two conversations that begin alike."""
    if not isinstance(chosen, list | tuple) or not isinstance(rejected, list | tuple):
        raise UsageError(f"{where}: chosen and rejected without a prompt must be whole conversations; write {_SHAPES}")
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    begins = list(chosen[:same])
    while begins and isinstance(begins[-1], Mapping) and begins[-1].get("role") == "assistant":
        begins.pop()
    if not begins or len(begins) == min(len(chosen), len(rejected)):
        raise UsageError(
            f"{where}: chosen and rejected have no beginning in common that answers follow; write {_SHAPES}"
        )
    return {"prompt": begins, "chosen": list(chosen[len(begins) :]), "rejected": list(rejected[len(begins) :])}


def offline_completions(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, pairs: bool) -> OfflineCompletions:
    """A row's completions as tokens, with rewards; `pairs`: the chosen one and the rejected one.

    Their `sampling_logprobs` are NaN, as nobody drew them. Raises UsageError where the row has none, or where the chat
    template does not continue the prompt.
    """
    wanted = ("chosen", "rejected") if pairs else ("completion",)
    if missing := [name for name in wanted if name not in prompt.columns]:
        raise UsageError(f"{prompt.id}: it has no {missing[0]}; write {_SHAPES}")
    made = []
    for name, reward in zip(wanted, (1.0, 0.0), strict=False):
        try:
            ids, mask = _tokens(prompt, prompt.columns[name], tokenizer)
        except UsageError as error:
            raise UsageError(f"{prompt.id}: {name}: {error}") from None
        text = tokenizer.decode(list(ids), skip_special_tokens=True)
        made.append((Completion(ids, (float("nan"),) * len(ids), mask, "stop", 0, str(text)), reward))
    return made


def _tokens(
    prompt: Prompt, answer: Any, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Token ids, and which of them the assistant wrote."""
    content = prompt.content
    if isinstance(content, str):
        if not isinstance(answer, str) or not answer:
            raise UsageError(f"{answer!r:.60} is not the text that a prompt of plain text needs; write some")
        ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
        ids += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return tuple(ids), (True,) * len(ids)
    messages = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    if not isinstance(messages, list | tuple) or not messages:
        raise UsageError(f"{answer!r:.60} is neither text nor a list of messages; write {_SHAPES}")
    if any(not isinstance(each, Mapping) or not {"role", "content"} <= set(each) for each in messages):
        raise UsageError("it has a message without role and content; write both")
    if messages[0]["role"] != "assistant":
        raise UsageError("it does not begin with a message of the assistant; put what comes before into prompt")
    made: list[int] = []
    mask: list[bool] = []
    for place, message in enumerate(messages):
        before, whole = [*content, *messages[:place]], [*content, *messages[: place + 1]]
        asked = message["role"] == "assistant"
        start = _rendered(tokenizer, before, asked) if asked else [*prompt.token_ids, *made]
        ended = _rendered(tokenizer, whole, False)
        known = [*prompt.token_ids, *made]
        if start[: len(known)] != known or ended[: len(start)] != start:
            raise UsageError(
                "the model's chat template writes earlier messages anew as a conversation goes on; give one row for "
                "each answer, the last message its own"
            )
        made += ended[len(known) :]
        mask += [False] * (len(start) - len(known)) + [asked] * (len(ended) - len(start))
        end = len(mask)
        while asked and end and mask[end - 1] and not str(tokenizer.decode([made[end - 1]])).strip():
            end -= 1
            mask[end] = False  # what a template puts behind the end of a turn
    last = len(mask) - mask[::-1].index(True) if True in mask else 0
    if not last:
        raise UsageError("it has no tokens of the assistant; write some text")
    return tuple(made[:last]), tuple(mask[:last])


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], ask: bool) -> list[int]:
    try:
        return list(tokenizer.apply_chat_template(list(messages), add_generation_prompt=ask, return_dict=False))
    except Exception as error:  # a chat template is a program of the model's
        raise UsageError(f"the chat template fails on it ({type(error).__name__}: {error})") from error
