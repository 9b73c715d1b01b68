"""The reward "llm_judge": a language model behind an OpenAI-compatible address grades completions.

mode = "rubric": every completion gets a score. mode = "pairwise": every two completions of a group are compared, in
both orders, and the value is the share of comparisons that a completion wins. A completion without a verdict is
excluded; it never gets a substitute value.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gruppo.errors import UsageError
from gruppo.rewards import conversation, text_of
from gruppo.rewards.remote.base import RemoteReward, Spent
from gruppo.rewards.remote.cache import request_hash
from gruppo.rewards.remote.http import RequestError, Requests
from gruppo.rewards.remote.verdicts import (
    AGAIN,
    CRITERIA,
    PAIRWISE,
    RUBRIC,
    SYSTEM,
    check_template,
    fill,
    read_score,
    read_winner,
)
from gruppo.utils.text import as_text, text_of_content

_PARAMETERS = {"temperature": 0, "max_tokens": 512}
_OWN = ("model", "messages", "n", "stream")  # parameters of a request that the judge sets
_SHOWN = 600  # characters of an answer that are recorded with the rollouts


class JudgeError(Exception):
    """A judge gave no verdict on a completion."""


@dataclass(frozen=True)
class _Verdict:
    """A judge's value for one request, or why there is none, and its text."""

    value: float | None
    text: str
    why: str = ""


class LLMJudge(RemoteReward):
    """A score or a share of wins from 0 to 1 for every completion, by a language model."""

    def __init__(
        self,
        url: str,
        model: str,
        key: str = "",
        mode: Literal["rubric", "pairwise"] = "rubric",
        rubric: str = CRITERIA,
        reference: str = "",
        minimum: float = 0.0,
        maximum: float = 10.0,
        opponents: int = 0,
        prompt: str = "",
        system: str = SYSTEM,
        parameters: Mapping[str, Any] | None = None,
        timeout: float = 30.0,
        tries: int = 4,
        concurrency: int = 8,
        cache: bool = True,
    ) -> None:
        """`url`: the address before /chat/completions. `key`: name of the environment variable with the API key.

        `rubric`: the criteria, as text. `reference`: the column with a correct answer, "" for none. `minimum`,
        `maximum`: range of scores. `opponents`: how many following completions of the group each one is compared with,
        0 for all. `prompt`, `system`: templates of the messages (gruppo.rewards.remote.verdicts). `parameters`: other
        fields of a request, in place of temperature 0 and 512 tokens. `timeout`: seconds of one try; `tries`: of one
        request; `concurrency`: requests at a time in one process. `cache`: keep answers in the run folder.

        Raises UsageError that begins with the option at fault.
        """
        if not isinstance(model, str) or not model:
            raise UsageError(f"model = {model!r}: must be text; write the name that the server gives the model")
        if mode not in ("rubric", "pairwise"):
            raise UsageError(f'mode = {mode!r}: must be "rubric" or "pairwise"')
        for name, value in (("rubric", rubric), ("reference", reference)):
            if not isinstance(value, str):
                raise UsageError(f"{name} = {value!r}: must be text")
        for name, bound in (("minimum", minimum), ("maximum", maximum)):
            if not isinstance(bound, int | float) or isinstance(bound, bool) or not abs(bound) < float("inf"):
                raise UsageError(f"{name} = {bound!r}: must be a finite number")
        if minimum >= maximum:
            raise UsageError(f"minimum = {minimum:g}: must be less than maximum = {maximum:g}")
        if not isinstance(opponents, int) or isinstance(opponents, bool) or opponents < 0:
            raise UsageError(f"opponents = {opponents!r}: must be a whole number; write 0 for all")
        if opponents and mode == "rubric":
            raise UsageError(f'opponents = {opponents}: has no effect with mode = "rubric"; remove it')
        self.parameters = dict(_PARAMETERS if parameters is None else parameters)
        if own := next((name for name in _OWN if name in self.parameters), None):
            raise UsageError(f"parameters.{own} = {self.parameters[own]!r}: is set by the judge itself; remove it")
        responses = {"response"} if mode == "rubric" else {"response_a", "response_b"}
        known = {*responses, "question", "reference", "rubric", "minimum", "maximum", "code"}
        default = RUBRIC if mode == "rubric" else PAIRWISE
        self.templates = {
            "system": check_template("system", system, set(), {"code"}),
            "user": check_template("prompt", prompt or default, responses, known),
        }
        address = url if not isinstance(url, str) else f"{url.rstrip('/').removesuffix('/chat/completions')}"
        super().__init__(f"{address}/chat/completions", key, timeout, tries, concurrency, cache)
        self.model, self.pairwise, self.opponents = model, mode == "pairwise", opponents
        self.range = float(minimum), float(maximum)
        self.plain = {"rubric": rubric, "minimum": f"{minimum:g}", "maximum": f"{maximum:g}"}
        self.reference = reference
        self.any_of = (reference,) if reference else ()  # see gruppo.rewards.loading.check_signature

    async def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        trainer_state: Any = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | JudgeError]:
        """Values of a group: G numbers from 0 to 1, a JudgeError for each completion without a verdict.

        What the judge says is printed, and so recorded with the rollouts.
        """
        texts = [_response(prompts[0], completion) for completion in completions]
        references = columns.get(self.reference) if self.reference else None
        quoted = {
            "question": _question(prompts[0]),
            "reference": as_text(references[0]) if references and references[0] is not None else "",
        }
        spent, step = Spent(), getattr(trainer_state, "global_step", None)
        async with self.requests() as requests:

            async def verdict(responses: tuple[str, ...]) -> _Verdict:
                return await self._verdict(requests, quoted, responses, spent, step)

            judge = self._compare if self.pairwise else self._grade
            values = await judge(texts, verdict)
        self.log(spent, sum(isinstance(value, JudgeError) for value in values), log_metric)
        return values

    async def _grade(self, texts: Sequence[str], verdict: Callable[..., Any]) -> list[float | JudgeError]:
        found = await _each({(text,) for text in texts}, verdict)
        for number, text in enumerate(texts):
            _show(f"completion {number}", found[text,])
        return [_value_of(found[text,]) for text in texts]

    async def _compare(self, texts: Sequence[str], verdict: Callable[..., Any]) -> list[float | JudgeError]:
        """The share of comparisons that each completion wins, a tie counting one half.

        Both orders are asked for, since judges prefer a place. Equal texts tie without being asked. A completion with
        verdicts on fewer than half of its comparisons has no value.
        """
        size = len(texts)
        span = self.opponents or size
        pairs = {frozenset((i, (i + step) % size)) for i in range(size) for step in range(1, span + 1)}
        ordered = [(i, j) for pair in sorted(map(sorted, pairs)) if len(pair) == 2 for i, j in (pair, pair[::-1])]
        asked: set[tuple[str, ...]] = {(texts[i], texts[j]) for i, j in ordered if texts[i] != texts[j]}
        found = await _each(asked, verdict)
        wins: list[list[float]] = [[] for _ in texts]
        failures: list[list[str]] = [[] for _ in texts]
        for i, j in ordered:
            outcome = _Verdict(0.5, "") if texts[i] == texts[j] else found[texts[i], texts[j]]
            _show(f"A = completion {i}, B = completion {j}", outcome)
            for place in (i, j):
                if outcome.value is None:
                    failures[place].append(outcome.why)
                else:
                    wins[place].append(outcome.value if place == i else 1 - outcome.value)
        return [
            sum(won) / len(won)
            if won and len(won) >= len(failed)
            else JudgeError(failed[0] if failed else "a group of one completion has no other to compare it with")
            for won, failed in zip(wins, failures, strict=True)
        ]

    async def _verdict(
        self, requests: Requests, quoted: Mapping[str, str], responses: tuple[str, ...], spent: Spent, step: int | None
    ) -> _Verdict:
        """Ask about one response, or about two in this order. An answer that cannot be read is asked for once more."""
        names = ("response_a", "response_b") if self.pairwise else ("response",)
        texts = fill(self.templates, self.plain, {**quoted, **dict(zip(names, responses, strict=True))})
        messages = [{"role": role, "content": text} for role, text in texts.items() if text]
        body = {"model": self.model, **self.parameters, "messages": messages}
        key = request_hash({"url": self.server.url, "body": body, "range": self.range})
        answer = self.cache.get(key)
        if answer is None:
            try:
                answer = await self._ask(requests, body, step)
            except RequestError as error:
                return _Verdict(None, "", str(error))
            if not answer["why"]:
                answer = self.cache.put(key, answer)
        spent.add(answer, step)
        value = None if answer["why"] else self._read(answer["text"])
        return _Verdict(value, answer["text"], answer["why"])

    async def _ask(self, requests: Requests, body: Mapping[str, Any], step: int | None) -> dict[str, Any]:
        """The judge's answer, with what it took and why it cannot be read ("" if it can). Raises RequestError."""
        total = {"calls": 0, "retries": 0, "prompt_tokens": 0, "completion_tokens": 0}
        messages = list(body["messages"])
        for _ in range(2):
            (text, used), tries = await requests.post({**body, "messages": messages}, _content)
            text = self.server.hidden(text)
            taken = {"calls": 1, "retries": tries - 1, **used}
            total = {name: value + taken[name] for name, value in total.items()}
            why = ""
            try:
                self._read(text)
                break
            except ValueError as error:
                why = f"the judge's answer cannot be read: {error}"
                again = {"role": "user", "content": AGAIN.format(why=error)}
                messages = [*messages, {"role": "assistant", "content": text}, again]
        return {**total, "step": step, "text": text, "why": why}

    def _read(self, text: str) -> float:
        return read_winner(text) if self.pairwise else read_score(text, *self.range)


def _content(answer: Any) -> tuple[str, dict[str, int]]:
    """The text of a chat completion, and its numbers of tokens, 0 if the server does not count them.

    Raises ValueError for an answer of another form.
    """
    try:
        message, usage = answer["choices"][0]["message"], answer.get("usage") or {}
        text = text_of_content(message["content"])
        refusal = message.get("refusal")
        counts = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError("an answer that is no chat completion") from None
    used = {name: count if type(count) is int and 0 <= count < 2**31 else 0 for name, count in counts.items()}
    return text or (str(refusal) if refusal else ""), used


async def _each(asked: set[tuple[str, ...]], verdict: Callable[..., Any]) -> dict[tuple[str, ...], _Verdict]:
    """The verdict on each of these, asked at the same time."""
    places = sorted(asked)
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(verdict(responses)) for responses in places]
    return {responses: task.result() for responses, task in zip(places, running, strict=True)}


def _value_of(verdict: _Verdict) -> float | JudgeError:
    return JudgeError(verdict.why) if verdict.value is None else verdict.value


def _show(what: str, verdict: _Verdict) -> None:
    outcome = verdict.why if verdict.value is None else f"{verdict.value:g}"
    text = verdict.text if len(verdict.text) <= _SHOWN else verdict.text[:_SHOWN] + " …"
    print(f"{what}: {outcome}" + (f"\n{text}" if text else ""))  # noqa: T201  recorded with the rollouts


def _question(prompt: Any) -> str:
    """The prompt as text: of a conversation, the contents with their roles, or only that of its single message."""
    if isinstance(prompt, str):
        return prompt
    asked = prompt[:-1] if prompt[-1].get("role") == "assistant" else prompt
    if len(asked) == 1:
        return text_of_content(asked[0].get("content"))
    return "\n\n".join(f"[{message.get('role')}]\n{text_of_content(message.get('content'))}" for message in asked)


def _response(prompt: Any, completion: Any) -> str:
    """The completion as text, after the start of an answer that the prompt ends with."""
    return text_of(completion) if isinstance(prompt, str) else text_of(conversation(prompt, completion))
