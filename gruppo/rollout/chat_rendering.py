"""How what an environment says becomes token ids beside those that were sampled, which are never made again from text.

An answer within a turn is tokenised alone, as it stands. One that follows a turn which the model has ended is a message
of the conversation: the chat template writes a conversation of two marks, and what it puts around the second one is
tokenised alone. What an environment says cannot become a special token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gruppo.data.tokenization import ToolTexts, prompt_tokens
from gruppo.errors import UsageError
from gruppo.rollout.environments.trl_tools import CALL, CALL_END
from gruppo.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RESPONSE, _RESPONSE_END = "<tool_response>\n", "\n</tool_response>"
_QUESTION, _ANSWER, _SAID = "[[THE QUESTION]]", "[[THE ANSWER]]", "[[SAID {}]]"


def tool_texts(tokenizer: PreTrainedTokenizerBase, schemas: Sequence[dict[str, Any]]) -> ToolTexts | None:
    """What prompts say of tools: through the chat template where it has a place for them, else as a system message."""
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
        without = str(tokenizer.apply_chat_template(messages, tokenize=False))
        given = str(tokenizer.apply_chat_template(messages, tokenize=False, tools=list(schemas)))
    except Exception:  # noqa: BLE001  a chat template is a program of the model's
        return False
    return without != given


class ChatRenderer:
    """Turns of a model and an environment as token ids. `tools`: what prompts say of them, None without any."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], tools: ToolTexts | None = None
    ) -> None:
        self.tokenizer, self.eos_ids, self.tools = tokenizer, frozenset(eos_ids), tools
        self._frames: dict[int, list[list[int]]] = {}

    def prompt(self, content: str | list[Message], observation: str) -> tuple[str | list[Message], tuple[int, ...]]:
        """A prompt whose last message goes on with an observation, and its token ids."""
        made: str | list[Message]
        if isinstance(content, str):
            made = content + observation
        else:
            made = [*content[:-1], {**content[-1], "content": f"{content[-1]['content']}{observation}"}]
        return made, tuple(prompt_tokens(made, self.tokenizer, self.tools))

    def text(self, token_ids: Sequence[int]) -> str:
        """What was sampled, as a person reads it."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def heard(self, token_ids: Sequence[int]) -> str:
        """What was sampled, as an environment reads it: tools may be called by special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=self.tools is None))

    def within(self, observations: Sequence[str]) -> list[int]:
        """Token ids of what is said within the model's turn, or to a model without conversations."""
        return [token for text in observations for token in self._plain(text)]

    def after(self, observations: Sequence[str]) -> list[int]:
        """Token ids of messages that follow a turn which the model has ended, and of what asks it for the next one.
        Raises UsageError where the chat template does not write them."""
        count = len(observations)
        if count not in self._frames:
            pieces = self._frame(count)
            self._frames[count] = [self._ids(piece) for piece in pieces]
        first, *following = self._frames[count]
        made = list(first)
        for text, piece in zip(observations, following, strict=True):
            made += [*self._plain(text), *piece]
        return made

    def check(self) -> None:
        """Raise UsageError where the chat template cannot go on with a conversation."""
        self.after([""])

    def _frame(self, count: int) -> list[str]:
        """What the template writes before, between and behind `count` messages that follow the end of an answer."""
        tagged = "user", _RESPONSE, _RESPONSE_END
        roles = [("user", "", "")] if self.tools is None else [tagged]
        if self.tools is not None and self.tools.schemas:
            roles.insert(0, ("tool", "", ""))
        why = "it has none"
        for role, begins, ends in roles if self.tokenizer.chat_template else []:
            said = [_SAID.format(place) for place in range(count)]
            if role == "tool":
                messages = [{"role": role, "name": "tool", "content": mark} for mark in said]
            else:  # one message, as templates want turns that alternate
                messages = [{"role": role, "content": "\n".join(f"{begins}{mark}{ends}" for mark in said)}]
            try:
                return self._around(messages, said)
            except Exception as error:  # noqa: BLE001  a chat template is a program of the model's
                why = f"{type(error).__name__}: {error}"
        raise UsageError(
            "[environment]: the model's chat template cannot go on with a conversation after an answer "
            f"({' '.join(why.split())}); take a model whose template can, or prompts of plain text"
        )

    def _around(self, messages: Sequence[Message], said: Sequence[str]) -> list[str]:
        begun = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
        tools: dict[str, Any] = {"tools": list(self.tools.schemas)} if self.tools and self.tools.schemas else {}
        text = str(
            self.tokenizer.apply_chat_template([*begun, *messages], tokenize=False, add_generation_prompt=True, **tools)
        )
        marks = [_ANSWER, *said]
        if [text.count(mark) for mark in marks] != [1] * len(marks):
            raise ValueError("it leaves messages out, or writes them twice")
        rest, pieces = self._behind_the_end(text.partition(_ANSWER)[2]), []
        for mark in said:
            before, found, rest = rest.partition(mark)
            if not found:
                raise ValueError("it writes messages in another order")
            pieces.append(before)
        return [*pieces, rest]

    def _behind_the_end(self, text: str) -> str:
        """The text without the end token of the turn before it, which the model has sampled."""
        bare = text.lstrip()
        ends = sorted((str(self.tokenizer.decode([each])) for each in self.eos_ids), key=len, reverse=True)
        return next((bare.removeprefix(end) for end in ends if end and bare.startswith(end)), text)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _plain(self, text: str) -> list[int]:
        if not text:
            return []
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
