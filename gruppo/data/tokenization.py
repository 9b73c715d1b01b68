"""Rows become prompts: chat templates, token ids, and the length limit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from gruppo.data.loading import Dataset
from gruppo.errors import UsageError
from gruppo.types import Message, Prompt, Row
from gruppo.utils.progress import Advance
from gruppo.utils.text import as_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ToolTexts:
    """What prompts tell the model of its tools: `schemas`, where its chat template has a place for them, else `text`,
    in the system message."""

    schemas: Sequence[Mapping[str, Any]] = ()
    text: str = ""

    def told(self, content: str | list[Message]) -> str | list[Message]:
        """A prompt with the text. Raises UsageError where it is no conversation."""
        if isinstance(content, str):
            raise UsageError(
                "the environment has tools, which need conversations, and the prompt is plain text; write "
                'task.system = "" (for rows of text), or take rows with messages'
            )
        if not self.text:
            return content
        if content[0]["role"] == "system":
            return [{**content[0], "content": f"{content[0]['content']}\n\n{self.text}"}, *content[1:]]
        return [{"role": "system", "content": self.text}, *content]


def tokenize_part(
    part: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    max_tokens: int,
    vocabulary: int | None = None,
    most: int | None = None,
    advance: Advance = lambda _: None,
    tools: ToolTexts | None = None,
) -> tuple[list[Prompt], int]:
    """Turn rows into prompts, `most` at the most: messages through the chat template, once; text as it stands. `tools`:
    what prompts say of them, in front.

    A prompt may have as many tokens as `context` leaves beside `max_tokens`, and no more than the task allows; the
    second value is how many longer ones were left out, where the task says so. Nothing is ever cut, and the ids are
    never made again from text. Raises UsageError for a longer prompt that is to be refused, if none is left, and where
    the model does not know an id of its tokenizer's.
    """
    limit = min(context - max_tokens, part.max_prompt_tokens or context)
    prompts: list[Prompt] = []
    overlong = 0
    for number, row in zip(part.numbers, part.rows, strict=True):
        if len(prompts) == most:
            break
        where = f"{part.name}, row {number + 1}"
        if tools is not None:
            row = {**row, "prompt": tools.told(row["prompt"])}  # noqa: PLW2901
        token_ids = _tokens(row, tokenizer, where, tools)
        advance(1)
        if len(token_ids) > limit and part.filter_overlong:
            overlong += 1
            continue
        if len(token_ids) > limit:
            raise UsageError(f"{where}: {_too_long(len(token_ids), context, max_tokens, part)}")
        if vocabulary is not None and max(token_ids) >= vocabulary:
            raise UsageError(
                f"{where}: the tokenizer gives token {max(token_ids)}, but the model knows only "
                f"{vocabulary}; take the tokenizer that belongs to the model"
            )
        columns = {key: value for key, value in row.items() if key != "prompt"}
        prompts.append(Prompt(f"{part.name}/{number}", row["prompt"], tuple(token_ids), part.name, columns))
    if not prompts:
        raise UsageError(
            f'{part.field}.overlong = "filter": all {overlong} prompts of {part.name} are longer than {limit} tokens; '
            "raise max_prompt_tokens, or lower max_tokens"
        )
    return prompts, overlong


def tokenize_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    max_tokens: int,
    task: str,
    vocabulary: int | None = None,
) -> list[Prompt]:
    """Prompts of rows that belong to no task; see `tokenize_part`. A prompt that is too long is refused."""
    return tokenize_part(Dataset(task, rows, range(len(rows))), tokenizer, context, max_tokens, vocabulary)[0]


def _tokens(row: Row, tokenizer: PreTrainedTokenizerBase, where: str, tools: ToolTexts | None = None) -> list[int]:
    try:
        token_ids = prompt_tokens(row["prompt"], tokenizer, tools)
    except UsageError:
        raise
    except Exception as error:  # a chat template is a program of the model's
        raise UsageError(
            f"{where}: the prompt cannot be turned into tokens ({type(error).__name__}: {error}); "
            "write it as this model's chat template wants it"
        ) from error
    if not token_ids:
        raise UsageError(f"{where}: prompt = {row['prompt']!r} has no tokens; write some text")
    return token_ids


def prompt_tokens(
    content: str | list[Message], tokenizer: PreTrainedTokenizerBase, tools: ToolTexts | None = None
) -> list[int]:
    """The token ids of a prompt: messages through the chat template, text as it stands."""
    if not isinstance(content, str):
        if not tokenizer.chat_template:
            raise UsageError(
                "the rows hold messages but the model's tokenizer has no chat template; write prompt as plain text "
                '(for a column of text: template = "{question}"), or take an instruction-tuned model'
            )
        begun = content[-1]["role"] == "assistant"  # the model goes on with what it is given of its answer
        schemas: dict[str, Any] = {"tools": list(tools.schemas)} if tools is not None and tools.schemas else {}
        return list(
            tokenizer.apply_chat_template(
                content, add_generation_prompt=not begun, continue_final_message=begun, return_dict=False, **schemas
            )
        )
    begins = bool(tokenizer.bos_token) and content.startswith(str(tokenizer.bos_token))
    return list(tokenizer(content, add_special_tokens=not begins)["input_ids"])


def _too_long(tokens: int, context: int, max_tokens: int, part: Dataset) -> str:
    filtered = f'write {part.field}.overlong = "filter" to leave such rows out'
    if part.max_prompt_tokens is not None and tokens > part.max_prompt_tokens:
        return (
            f"the prompt has {tokens} tokens, more than {part.field}.max_prompt_tokens = {part.max_prompt_tokens}; "
            f"raise that, or {filtered}"
        )
    return (
        f"the prompt has {tokens} tokens; with {max_tokens} more to sample that is over the model's context of "
        f"{context}; shorten the prompt, lower max_tokens, or {filtered}"
    )


def data_sha256(prompts: Iterable[Prompt], questions: Sequence[Prompt]) -> str:
    """A hash over the token ids and columns of all questions, in order."""
    digest = hashlib.sha256()
    for prompt in [*prompts, *questions]:
        digest.update(as_json([prompt.id, prompt.token_ids, dict(prompt.columns)]).encode())
    return digest.hexdigest()
