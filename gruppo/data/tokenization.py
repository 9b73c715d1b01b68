"""Turn rows into prompts: chat templates, token ids, and the length limit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from gruppo.data.chat_template import TemplateError, chat_tokens
from gruppo.data.loading import Dataset
from gruppo.errors import UsageError
from gruppo.types import Message, Prompt, Row
from gruppo.utils.progress import Advance
from gruppo.utils.text import as_json
from gruppo.utils.token_text import text_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ENDING = 16  # tokens of `Prompt.ending`: enough for a tag in a vocabulary of characters


@dataclass(frozen=True)
class ToolTexts:
    """Description of the tools in prompts.

    `schemas`: passed to the chat template, if it supports tools. `text`: otherwise added to the system message.
    """

    schemas: Sequence[Mapping[str, Any]] = ()
    text: str = ""

    def add_to(self, content: str | list[Message]) -> str | list[Message]:
        """Return a prompt with the text added. Raises UsageError if the prompt is not a conversation."""
        if isinstance(content, str):
            raise UsageError(
                "the environment has tools, which need conversations, but the prompt is plain text; write "
                'task.system = "" (for rows of text), or use rows with messages'
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
    """Turn rows into prompts, at most `most`; return them and the number of overlong prompts that were left out.

    Messages are rendered with the chat template, once; text is tokenized unchanged. A prompt may have at most
    `context` - `max_tokens` tokens, and at most the task's max_prompt_tokens. Longer prompts are left out if the task
    filters them, else refused. Nothing is ever truncated, and token ids are never reproduced from text. `vocabulary`:
    number of tokens that the model knows. `tools`: description of the tools, added to every prompt.

    Raises UsageError if a prompt is refused or cannot be tokenized, if none is left, or if the tokenizer gives a token
    outside the vocabulary.
    """
    limit = min(context - max_tokens, part.max_prompt_tokens or context)
    prompts: list[Prompt] = []
    overlong = 0
    for number, row in zip(part.numbers, part.rows, strict=True):
        if len(prompts) == most:
            break
        where = f"{part.name}, row {number + 1}"
        if tools is not None:
            row = {**row, "prompt": tools.add_to(row["prompt"])}  # noqa: PLW2901
        options = part.chat.of_row(row, where, part.field)
        token_ids = _tokens(row, tokenizer, where, tools, options)
        advance(1)
        if len(token_ids) > limit and part.filter_overlong:
            overlong += 1
            continue
        if len(token_ids) > limit:
            raise UsageError(f"{where}: {_too_long(len(token_ids), context, max_tokens, part)}")
        if vocabulary is not None and max(token_ids) >= vocabulary:
            raise UsageError(
                f"{where}: the tokenizer gives token {max(token_ids)}, but the model knows only "
                f"{vocabulary}; use the tokenizer that belongs to the model"
            )
        columns = {key: value for key, value in row.items() if key != "prompt"}
        ending = str(tokenizer.decode(token_ids[-ENDING:], skip_special_tokens=False))
        prompts.append(
            Prompt(f"{part.name}/{number}", row["prompt"], tuple(token_ids), part.name, columns, options, ending)
        )
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
    """Prompts of rows without a task. Raises UsageError as `tokenize_part` does, and for any overlong prompt."""
    return tokenize_part(Dataset(task, rows, range(len(rows))), tokenizer, context, max_tokens, vocabulary)[0]


def _tokens(
    row: Row, tokenizer: PreTrainedTokenizerBase, where: str, tools: ToolTexts | None, options: Mapping[str, Any]
) -> list[int]:
    try:
        token_ids = prompt_tokens(row["prompt"], tokenizer, tools, options)
    except TemplateError as error:
        raise UsageError(f"{where}: {error}") from error
    except UsageError:
        raise
    except Exception as error:  # a row's text can be what no tokenizer reads
        raise UsageError(
            f"{where}: the prompt cannot be turned into tokens ({type(error).__name__}: {error}); write text"
        ) from error
    if not token_ids:
        raise UsageError(f"{where}: prompt = {row['prompt']!r} has no tokens; write some text")
    return token_ids


def prompt_tokens(
    content: str | list[Message],
    tokenizer: PreTrainedTokenizerBase,
    tools: ToolTexts | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a prompt: messages are rendered with the chat template, text is tokenized unchanged.

    A text gets the special tokens that the tokenizer puts before a text, unless it already starts with the BOS token.
    `options`: see `Prompt.template_options`. Raises UsageError for messages if the tokenizer has no chat template, or
    if an environment and the options both give tools.
    """
    if not isinstance(content, str):
        if not tokenizer.chat_template:
            raise UsageError(
                "the rows contain messages but the model's tokenizer has no chat template; write prompt as plain text "
                '(for a column of text: template = "{question}"), or use an instruction-tuned model'
            )
        continues = content[-1]["role"] == "assistant"  # the model continues the start of its answer
        return chat_tokens(
            tokenizer, content, with_schemas(options or {}, tools), ask=not continues, continue_last=continues
        )
    return text_tokens(tokenizer, content)


def with_schemas(options: Mapping[str, Any], tools: ToolTexts | None) -> dict[str, Any]:
    """The options of a chat template with the tools of an environment. Raises UsageError if both give tools."""
    if tools is None:
        return dict(options)
    if "tools" in options:
        raise UsageError(
            "the prompt describes tools (task.tools, or the column `tools`), but those that the model can call are the "
            'environment\'s; remove task.tools, or rename the column: task.columns = {other = "tools"}'
        )
    return {**options, "tools": tools.schemas} if tools.schemas else dict(options)


def _too_long(tokens: int, context: int, max_tokens: int, part: Dataset) -> str:
    advice = f'write {part.field}.overlong = "filter" to leave such rows out'
    if part.max_prompt_tokens is not None and tokens > part.max_prompt_tokens:
        return (
            f"the prompt has {tokens} tokens, more than {part.field}.max_prompt_tokens = {part.max_prompt_tokens}; "
            f"raise that, or {advice}"
        )
    fix = "shorten the prompt, or lower --max-tokens"
    if not part.name.startswith("--"):  # the prompt of `gruppo sample` is no row of a task
        fix = f"shorten the prompt, lower max_tokens, or {advice}"
    return (
        f"the prompt has {tokens} tokens; with {max_tokens} more to sample that is over the model's context of "
        f"{context}; {fix}"
    )


def data_sha256(prompts: Iterable[Prompt], questions: Sequence[Prompt]) -> str:
    """SHA-256 over ids, token ids, columns and chat-template options of all prompts and questions, in order; the hex
    digest."""
    digest = hashlib.sha256()
    for prompt in [*prompts, *questions]:
        options = [dict(prompt.template_options)] if prompt.template_options else []
        digest.update(as_json([prompt.id, prompt.token_ids, dict(prompt.columns), *options]).encode())
    return digest.hexdigest()
