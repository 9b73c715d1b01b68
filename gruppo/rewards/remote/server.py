"""The reward "remote": a reward server that was written for OpenRLHF or verl scores completions.

    openrlhf  one request per group   {"query": […], "prompts": […], "labels": […]} -> {"rewards": […]}
    verl      one per completion      {"data_source": …, "solution_str": …, "ground_truth": …, "extra_info": …}
                                      -> a number, or an object with score, reward or reward_score
    vllm      one per completion      {"model": …, "input": text} -> {"data": [{"probs": […]}]}
    sglang    one per completion      {"model": …, "input": text} -> {"data": [{"embedding": […]}]}

"vllm" and "sglang" are the servers that verl starts for a reward model: /classify and /v1/embeddings.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from gruppo.data.chat_template import render_chat
from gruppo.errors import UsageError, error_line, nearest
from gruppo.rewards import conversation, plain_text, text_of
from gruppo.rewards.interop import log_entries, verl_arguments
from gruppo.rewards.remote.base import RemoteReward, Spent
from gruppo.rewards.remote.cache import request_hash
from gruppo.rewards.remote.http import RequestError, Requests
from gruppo.utils.hub import split_revision
from gruppo.utils.paths import user_path
from gruppo.utils.text import as_text

FORMATS = ("openrlhf", "verl", "vllm", "sglang")
_SCORES = ("score", "reward", "reward_score")


class Remote(RemoteReward):
    """The numbers that a reward server gives completions, unchanged."""

    def __init__(
        self,
        url: str,
        format: Literal["openrlhf", "verl", "vllm", "sglang"],  # noqa: A002  the option's name
        key: str = "",
        label: str = "answer",
        model: str = "",
        tokenizer: str = "",
        minimum: float | None = None,
        maximum: float | None = None,
        timeout: float = 60.0,
        tries: int = 4,
        concurrency: int = 8,
        cache: bool = True,
    ) -> None:
        """`url`: the whole address. `format`: of requests and answers. `key`: name of the environment variable with a
        Bearer token.

        `label`: the column that "openrlhf" sends as labels. `model`: the name that "vllm" and "sglang" send.
        `tokenizer`: folder or hub name ("owner/name@revision" too) of the tokenizer whose chat template makes text of
        conversations; without one, contents are joined by line breaks. `minimum`, `maximum`: the range of values;
        others are failures. `timeout`, `tries`, `concurrency`, `cache`: see `LLMJudge`.

        Raises UsageError that begins with the option at fault.
        """
        if format not in FORMATS:
            raise UsageError(f"format = {format!r}: unknown format{nearest(str(format), FORMATS)}")
        for name, text in (("label", label), ("model", model), ("tokenizer", tokenizer)):
            if not isinstance(text, str):
                raise UsageError(f"{name} = {text!r}: must be text")
        if (format in ("vllm", "sglang")) != bool(model):
            fix = "write the name that the server gives its model" if not model else "remove it"
            raise UsageError(f'model = {model!r}: format = "{format}" sends {"a" if not model else "no"} model; {fix}')
        if tokenizer and format == "verl":
            raise UsageError(f'tokenizer = {tokenizer!r}: format = "verl" sends no conversation; remove it')
        for name, value in (("minimum", minimum), ("maximum", maximum)):
            if value is not None and (not isinstance(value, int | float) or not math.isfinite(value)):
                raise UsageError(f"{name} = {value!r}: must be a finite number")
        self.minimum = -math.inf if minimum is None else minimum
        self.maximum = math.inf if maximum is None else maximum
        if self.minimum >= self.maximum:
            raise UsageError(f"minimum = {minimum}: must be less than maximum = {maximum}")
        super().__init__(url, key, timeout, tries, concurrency, cache)
        self.format, self.label, self.model = format, label, model
        self.tokenizer = _tokenizer(tokenizer) if tokenizer else None

    async def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        trainer_state: Any = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, Sequence[Any]], None] | None = None,
        **columns: Any,
    ) -> list[float | Exception]:
        """Values of a group: G numbers, a RequestError for each completion without one."""
        row = {name: values[0] for name, values in columns.items() if isinstance(values, list) and values}
        bodies = self._bodies(prompts[0], completions, row)
        spent, step = Spent(), getattr(trainer_state, "global_step", None)
        sizes = len(completions) // len(bodies)  # values that answer one request
        unique = {request_hash(body): body for body in bodies}
        async with self.requests() as requests, asyncio.TaskGroup() as tasks:
            running = {
                key: tasks.create_task(self._answer(requests, key, body, sizes, spent, step))
                for key, body in unique.items()
            }
        answers = [running[request_hash(body)].result() for body in bodies]
        values: list[float | Exception] = []
        entries: list[Mapping[str, Any]] = []
        for answer in answers:
            if isinstance(answer, RequestError):
                values += [answer] * sizes
                entries += [{}] * sizes
            else:
                values += answer["values"]
                entries += answer["entries"]
        log_entries(entries, log_extra, log_metric)
        self.log(spent, sum(isinstance(value, RequestError) for value in values), log_metric)
        return values

    async def _answer(
        self, requests: Requests, key: str, body: Mapping[str, Any], size: int, spent: Spent, step: int | None
    ) -> dict[str, Any] | RequestError:
        """The values that answer a request, and the other entries of the answer, by completion."""
        place = request_hash({"url": self.server.url, "body": key, "range": [str(self.minimum), str(self.maximum)]})
        answer = self.cache.get(place)
        if answer is None:
            try:
                (values, entries), tries = await requests.post(body, lambda content: self._values(content, size))
            except RequestError as error:
                return error
            took = {"calls": 1, "retries": tries - 1, "prompt_tokens": 0, "completion_tokens": 0}
            answer = self.cache.put(place, {"step": step, **took, "values": values, "entries": entries})
        spent.add(answer, step)
        return answer

    def _bodies(self, prompt: Any, completions: Sequence[Any], row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What is sent: one body for the group, or one per completion."""
        if self.format == "verl":
            arguments = [{"ground_truth": None, **verl_arguments(prompt, one, row)} for one in completions]
            return [_plain(one) for one in arguments]
        if self.format == "openrlhf":
            start, size = self._text(prompt, ask=True), len(completions)
            queries = [start + text_of(completion) for completion in completions]
            return [{"query": queries, "prompts": [start] * size, "labels": [_plain(row.get(self.label))] * size}]
        texts = [
            prompt + text_of(one) if isinstance(prompt, str) else self._text(conversation(prompt, one))
            for one in completions
        ]
        extra = {"use_activation": False} if self.format == "vllm" else {}
        return [{"model": self.model, "input": text, **extra} for text in texts]

    def _text(self, prompt: Any, ask: bool = False) -> str:
        """A prompt or a conversation as text, without the BOS token that servers add. `ask`: an answer follows."""
        if isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            return plain_text(prompt) + ("\n" if ask and prompt[-1]["role"] != "assistant" else "")
        begun = ask and prompt[-1]["role"] == "assistant"
        text = render_chat(self.tokenizer, prompt, ask=ask and not begun, continue_last=begun)
        return text.removeprefix(self.tokenizer.bos_token or "")

    def _values(self, content: Any, size: int) -> tuple[list[float], list[dict[str, Any]]]:
        """The values in an answer, and its other entries by completion.

        Raises ValueError if the answer has another form or another number of values, or a value is no finite number in
        the range.
        """
        entries: list[dict[str, Any]] = [{} for _ in range(size)]
        if self.format == "openrlhf":
            found = content.get("rewards") if isinstance(content, dict) else None
            if not isinstance(found, list):
                raise ValueError('an answer without a list "rewards"')
            if len(found) != size:
                raise ValueError(f"an answer with {len(found)} rewards for {size} completions")
            logs = content.get("extra_logs")
            for name, column in logs.items() if isinstance(logs, dict) else ():
                if isinstance(column, list) and len(column) == size:
                    for entry, value in zip(entries, column, strict=True):
                        entry[str(name)] = value
            return [self._number(value) for value in found], entries
        if self.format == "verl":
            if isinstance(content, dict):
                entries = [{name: value for name, value in content.items() if name not in _SCORES}]
                content = next((content[name] for name in _SCORES if name in content), None)
            return [self._number(content)], entries
        part = "probs" if self.format == "vllm" else "embedding"
        try:
            return [self._number(content["data"][-1][part][-1])], entries
        except (KeyError, IndexError, TypeError):
            raise ValueError(f'an answer without data[-1]["{part}"][-1]') from None

    def _number(self, value: Any) -> float:
        if type(value) not in (int, float) or not abs(value) < math.inf:
            raise ValueError(f"an answer with {as_text(value)[:40]} in place of a finite number")
        if not self.minimum <= value <= self.maximum:
            raise ValueError(f"an answer with {value:g}, which is not from {self.minimum:g} to {self.maximum:g}")
        return float(value)


def _tokenizer(name: str) -> Any:
    """The tokenizer with this folder or hub name. Raises UsageError if it cannot be loaded, or has no template."""
    from transformers import AutoTokenizer

    try:
        place, revision = split_revision(name)
        found: Any = AutoTokenizer.from_pretrained(
            str(user_path(place)), revision=revision or "main", trust_remote_code=False
        )
    except Exception as error:  # third-party files: anything can be wrong with them
        raise UsageError(
            f"tokenizer = {name!r}: cannot be loaded ({error_line(error)}); give a folder or a hub name"
        ) from error
    if not found.chat_template:
        raise UsageError(f"tokenizer = {name!r}: has no chat template; remove it")
    return found


def _plain(value: Any) -> Any:
    """The value as JSON has it; other values of a row become text."""
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return value if value is None or isinstance(value, str | bool) or number else as_text(value)
