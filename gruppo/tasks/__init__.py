"""Tasks: where rows come from, and how a row becomes the exact token ids that the model reads.

A task is a function `load(split, **options) -> list of rows`; a row has a `prompt` (text or messages) and any more
columns. `split` is "train" or "test"; a task without a held-out part raises UsageError for "test".
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gruppo.errors import UsageError, nearest
from gruppo.imports import import_attribute
from gruppo.types import Prompt, Row

if TYPE_CHECKING:  # reward processes import this package and need no transformers
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "test"]

TASKS = {"arithmetic": "gruppo.tasks.arithmetic:load"}


def load_rows(
    name: str, split: Split, options: Mapping[str, Any], field: str = "task.name", options_field: str = "task.options"
) -> list[Row]:
    """The rows of a task by name, "package.module:function" or .jsonl file; the fields are for errors.

    Raises UsageError: unknown task, wrong options, no rows, a row without a usable `prompt`.
    """
    if name.endswith(".jsonl"):
        if options:
            raise UsageError(f"{options_field} = {dict(options)}: a .jsonl file has no options; remove them")
        load = import_attribute("gruppo.tasks.jsonl:load", field)
        options = {"path": name}
    elif ":" in name or name in TASKS:
        load = import_attribute(TASKS.get(name, name), field)
    else:
        raise UsageError(
            f'{field} = "{name}": unknown task{nearest(name, TASKS)}; or write a .jsonl file, or '
            '"package.module:function"'
        )
    try:
        inspect.signature(load).bind(split, **options)
    except TypeError as error:
        raise UsageError(f"{options_field} = {dict(options)}: {error}; {_options(load)}") from None
    try:
        return checked_rows(load(split, **options), name)
    except UsageError as error:
        raise UsageError(f'{field} = "{name}": {error}') from None
    except (Exception, SystemExit) as error:
        raise UsageError(f'{field} = "{name}": it fails ({type(error).__name__}: {error}); mend it') from error


def checked_rows(rows: Iterable[Row], source: str) -> list[Row]:
    """The rows as a list, each with a prompt that is text or messages; `source` names them in errors."""
    if isinstance(rows, str | bytes | Mapping) or not hasattr(rows, "__iter__"):
        raise UsageError(f'{source} gives {str(rows)[:40]!r}, not a list of rows; write [{{"prompt": "text"}}, …]')
    rows = list(rows)
    if not rows:
        raise UsageError(f"{source} has no rows; give at least one row with a prompt")
    for number, row in enumerate(rows, start=1):
        problem = _prompt_problem(row)
        if problem:
            raise UsageError(
                f'{source}, row {number}: {problem}; write {{"prompt": "text"}} or '
                '{"prompt": [{"role": "user", "content": "text"}]}'
            )
    return rows


def tokenize_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    max_tokens: int,
    task: str,
    vocabulary: int | None = None,
) -> list[Prompt]:
    """Turn rows into prompts: messages through the chat template, once; text as it stands.

    The ids are kept and never made again from text. Raises UsageError where a prompt and `max_tokens` more do not
    fit into the model's `context` (nothing is cut), or where the model does not know an id of its tokenizer's.
    """
    prompts = []
    for number, row in enumerate(rows):
        try:
            token_ids = _token_ids(row["prompt"], tokenizer)
        except UsageError:
            raise
        except Exception as error:  # a chat template is a program of the model's
            raise UsageError(
                f"{task}, row {number + 1}: the prompt cannot be turned into tokens ({type(error).__name__}: {error}); "
                "write it as this model's chat template wants it"
            ) from error
        if not token_ids:
            raise UsageError(f"{task}, row {number + 1}: prompt = {row['prompt']!r} has no tokens; write some text")
        if len(token_ids) + max_tokens > context:
            raise UsageError(
                f"{task}, row {number + 1}: the prompt has {len(token_ids)} tokens; with {max_tokens} more to sample "
                f"that is over the model's context of {context}; shorten the prompt or lower sampling.max_tokens"
            )
        if vocabulary is not None and max(token_ids) >= vocabulary:
            raise UsageError(
                f"{task}, row {number + 1}: the tokenizer gives token {max(token_ids)}, but the model knows only "
                f"{vocabulary}; take the tokenizer that belongs to the model"
            )
        columns = {key: value for key, value in row.items() if key != "prompt"}
        prompts.append(Prompt(f"{task}/{number}", row["prompt"], tuple(token_ids), task, columns))
    return prompts


def draw_prompts(prompts: Sequence[Prompt], seed: int, cursor: int, count: int) -> list[Prompt]:
    """The `count` prompts after the first `cursor` draws: epoch after epoch, each in an order of its own.

    A pure function of its arguments, so that a resumed run draws what the uninterrupted one would have.
    """
    drawn: list[Prompt] = []
    while len(drawn) < count:
        epoch, place = divmod(cursor + len(drawn), len(prompts))
        order = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, 1, epoch)))).permutation(
            len(prompts)
        )
        drawn += [prompts[index] for index in order[place : place + count - len(drawn)]]
    return drawn


def _token_ids(content: str | list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not isinstance(content, str):
        if not tokenizer.chat_template:
            raise UsageError(
                "the rows hold messages but the model's tokenizer has no chat template; write prompt as plain text, "
                "or take an instruction-tuned model"
            )
        begun = content[-1]["role"] == "assistant"  # the model goes on with what it is given of its answer
        return list(
            tokenizer.apply_chat_template(
                content, add_generation_prompt=not begun, continue_final_message=begun, return_dict=False
            )
        )
    begins = bool(tokenizer.bos_token) and content.startswith(str(tokenizer.bos_token))
    return list(tokenizer(content, add_special_tokens=not begins)["input_ids"])


def _prompt_problem(row: object) -> str | None:
    if not isinstance(row, Mapping):
        return f"{row!r} is not a mapping"
    if "prompt" not in row:
        return f"it has no prompt (columns: {', '.join(map(str, row)) or 'none'})"
    if odd := [column for column in row if not isinstance(column, str)]:
        return f"the column name {odd[0]!r} is not text"
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return None if prompt else "the prompt is empty"
    if not isinstance(prompt, list) or not prompt:
        return f"prompt = {prompt!r} is neither text nor a list of messages"
    for message in prompt:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            return f"prompt has the message {message!r} without role and content"
    return None


def _options(load: Any) -> str:
    names = [name for name in inspect.signature(load).parameters if name not in {"split", "path"}]
    return f"its options are: {', '.join(names)}" if names else "it has no options"


def data_file(path: str) -> Path:
    """A data file that exists; raises UsageError where it does not."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"there is no such file (looked in {Path.cwd()}); give the path of a file")
    return file
