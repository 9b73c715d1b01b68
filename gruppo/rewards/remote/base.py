"""What rewards over HTTP share: a server, the time that a call may take, and the answers that are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gruppo.errors import UsageError
from gruppo.rewards import RewardRun
from gruppo.rewards.remote.cache import AnswerCache
from gruppo.rewards.remote.http import Requests, checked_server

_COUNTS = ("calls", "retries", "prompt_tokens", "completion_tokens")
_MARGIN = 0.05  # share of reward.timeout that is left for everything but requests


@dataclass
class Spent:
    """What the answers behind a group's values took: answers, repeated tries, tokens, and answers kept since an
    earlier step, which took nothing."""

    calls: int = 0
    retries: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, answer: dict[str, Any], step: int | None) -> None:
        """Count an answer of the cache. One that was given in this step counts as new, also after a resume."""
        if answer["step"] != step:
            self.cached += 1
            return
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + answer[name])


def _counts(answer: dict[str, Any]) -> bool:
    """Whether an answer from the cache says what it took."""
    return "step" in answer and all(type(answer.get(name)) is int for name in _COUNTS)


class RemoteReward:
    """Base class of rewards that ask a server."""

    def __init__(self, url: str, key: str, timeout: float, tries: int, concurrency: int, cache: bool) -> None:
        """See `LLMJudge`. Raises UsageError that begins with the option at fault."""
        if not isinstance(cache, bool):
            raise UsageError(f"cache = {cache!r}: must be true or false")
        self.server = checked_server(url, key, timeout, tries, concurrency)
        self.keeps = cache
        self.use_run(RewardRun(type(self).__name__, 2 * timeout))

    def use_run(self, run: RewardRun) -> None:
        """Take over the limits of a run. Raises UsageError if one request may take longer than a whole call."""
        if run.timeout <= self.server.timeout:
            raise UsageError(
                f"timeout = {self.server.timeout:g}: one request may take as long as reward.timeout = {run.timeout:g} "
                f"allows for a whole group; write e.g. reward.timeout = {4 * self.server.timeout:g}"
            )
        self.name, self.seconds = run.name, run.timeout * (1 - _MARGIN)
        self.cache = AnswerCache(run.cache if self.keeps else None, _counts)

    def requests(self) -> Requests:
        """The requests of one call."""
        return Requests(self.server, self.seconds)

    def log(self, spent: Spent, excluded: int, log_metric: Callable[[str, float], None] | None) -> None:
        """Log metrics of one call: NAME/calls and so on, per group."""
        for name, value in {**vars(spent), "excluded": excluded}.items():
            if log_metric is not None:
                log_metric(f"{self.name}/{name}", value)
