"""Tokenization of an environment's observations. Sampled token ids are never reconstructed from text.

An observation within a turn is tokenized on its own, as a text that follows the tokens before it. An observation after
a turn that the model has ended is a message of the conversation: the chat template renders a conversation with
placeholders, and the text that it puts around the observations is tokenized piece by piece, in the same way. The text
of an observation never becomes a special token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gruppo.data.chat_template import TemplateError, render_chat
from gruppo.data.tokenization import ToolTexts, prompt_tokens, with_schemas
from gruppo.errors import UsageError
from gruppo.rollout.environments.trl_tools import CALL, CALL_END
from gruppo.types import Message
from gruppo.utils.text import as_json
from gruppo.utils.token_text import text_of, tokens_after

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RESPONSE, _RESPONSE_END = "<tool_response>\n", "\n</tool_response>"
_QUESTION, _ANSWER, _SAID = "[[THE QUESTION]]", "[[THE ANSWER]]", "[[SAID {}]]"


def tool_texts(tokenizer: PreTrainedTokenizerBase, schemas: Sequence[dict[str, Any]]) -> ToolTexts | None:
    """The tools' description in prompts: through the chat template if it supports tools, else as a system message."""
    if not schemas:
        return None
    if _writes_tools(tokenizer, schemas):
        return ToolTexts(schemas=schemas)
    listed = "\n".join(json.dumps(schema["function"], ensure_ascii=False) for schema in schemas)
    return ToolTexts(
        text=f"You can call these tools:\n{listed}\nTo call one, write\n{CALL}\n"
        f'{{"name": "the tool\'s name", "arguments": {{"an argument\'s name": "its value"}}}}\n{CALL_END}\n'
        f"and end your turn. What it returns is then given to you within {_RESPONSE.strip()} and "
        f"{_RESPONSE_END.strip()}."
    )


def _writes_tools(tokenizer: PreTrainedTokenizerBase, schemas: Sequence[dict[str, Any]]) -> bool:
    messages = [{"role": "user", "content": _QUESTION}]
    try:
        without = render_chat(tokenizer, messages)
        with_tools = render_chat(tokenizer, messages, {"tools": schemas})
    except TemplateError:
        return False
    return without != with_tools


class ChatRenderer:
    """Renders turns of a model and an environment as token ids. `tools`: description of the tools, None without any."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], tools: ToolTexts | None = None
    ) -> None:
        self.tokenizer, self.eos_ids, self.tools = tokenizer, frozenset(eos_ids), tools
        self._frames: dict[tuple[int, str], list[str]] = {}  # by number of observations and options

    def prompt(
        self, content: str | list[Message], observation: str, options: Mapping[str, Any] | None = None
    ) -> tuple[str | list[Message], tuple[int, ...]]:
        """Append an observation to the last message of a prompt. Returns the new prompt and its token ids.

        `options`: see `Prompt.template_options`.
        """
        extended: str | list[Message]
        if isinstance(content, str):
            extended = content + observation
        else:
            extended = [*content[:-1], {**content[-1], "content": f"{content[-1]['content']}{observation}"}]
        return extended, tuple(prompt_tokens(extended, self.tokenizer, self.tools, options))

    def text(self, token_ids: Sequence[int], before: Sequence[int]) -> str:
        """The text that sampled tokens add to those before them."""
        return text_of(self.tokenizer, token_ids, before)

    def within(self, observations: Sequence[str], before: Sequence[int]) -> list[int]:
        """Token ids of observations within the model's turn, or in a prompt of plain text."""
        ids: list[int] = []
        for text in observations:
            self._append(ids, text, before, special=False)
        return ids

    def after(
        self, observations: Sequence[str], before: Sequence[int], options: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Token ids of observations as messages after a turn that the model has ended, with the next turn's generation
        prompt. `options`: see `Prompt.template_options`. Raises UsageError if the chat template cannot render them."""
        key = len(observations), as_json(options or {})
        if key not in self._frames:
            self._frames[key] = self._frame(len(observations), options)
        first, *following = self._frames[key]
        ids: list[int] = []
        self._append(ids, first, before)
        for text, piece in zip(observations, following, strict=True):
            self._append(ids, text, before, special=False)
            self._append(ids, piece, before)
        return ids

    def check(self, options: Mapping[str, Any] | None = None) -> None:
        """Raise UsageError if the chat template cannot continue a conversation."""
        self._frame(1, options)

    def _frame(self, count: int, options: Mapping[str, Any] | None = None) -> list[str]:
        """The text that the template writes before, between and after `count` messages that follow an ended turn."""
        tagged = "user", _RESPONSE, _RESPONSE_END
        roles = [("user", "", "")] if self.tools is None else [tagged]
        if self.tools is not None and self.tools.schemas:
            roles.insert(0, ("tool", "", ""))
        why = "it has none"
        for role, begins, ends in roles if self.tokenizer.chat_template else []:
            marks = [_SAID.format(place) for place in range(count)]
            if role == "tool":
                messages = [{"role": role, "name": "tool", "content": mark} for mark in marks]
            else:  # one message, because templates expect alternating roles
                messages = [{"role": role, "content": "\n".join(f"{begins}{mark}{ends}" for mark in marks)}]
            try:
                return self._split_around(messages, marks, options or {})
            except ValueError as error:
                why = str(error)
        raise UsageError(
            "[environment]: the model's chat template cannot continue a conversation after an answer "
            f"({' '.join(why.split())}); use a model whose template can, or plain-text prompts"
        )

    def _split_around(
        self, messages: Sequence[Message], observation_marks: Sequence[str], options: Mapping[str, Any]
    ) -> list[str]:
        """Render the messages and split the text after the answer at the observation marks."""
        conversation = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
        whole = with_schemas(options, self.tools)
        text = render_chat(self.tokenizer, [*conversation, *messages], whole, ask=True)
        marks = [_ANSWER, *observation_marks]
        if [text.count(mark) for mark in marks] != [1] * len(marks):
            raise ValueError("it omits messages or writes them twice")
        rest, pieces = self._without_end_token(text.partition(_ANSWER)[2]), []
        for mark in observation_marks:
            before, found, rest = rest.partition(mark)
            if not found:
                raise ValueError("it changes the order of the messages")
            pieces.append(before)
        return [*pieces, rest]

    def _without_end_token(self, text: str) -> str:
        """The text without the EOS token at its start, which the model has already sampled."""
        bare = text.lstrip()
        ends = sorted((str(self.tokenizer.decode([token])) for token in self.eos_ids), key=len, reverse=True)
        return next((bare.removeprefix(end) for end in ends if end and bare.startswith(end)), text)

    def _append(self, ids: list[int], text: str, before: Sequence[int], special: bool = True) -> None:
        """Append the tokens of a text. `before`: the tokens before `ids`."""
        ids += tokens_after(self.tokenizer, text, [*before, *ids], special)
