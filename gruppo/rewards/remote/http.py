"""POST requests to a reward server or a judge: limits, retries with backoff, and errors that never show the key.

A request is repeated after a failure that may pass: no connection, a cut connection, no answer in time, the status
408, 409, 425, 429 or 5xx, and an answer that cannot be read. Any other status fails at once. Redirects are not
followed: they would carry completions to an address that the recipe does not name.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import ssl
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import httpx2 as httpx

from gruppo.errors import UsageError

Content = TypeVar("Content")

MOST_BYTES = 4 * 2**20  # of an answer
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before the second try; the longest pause without a Retry-After
_PASSING = {408, 409, 425, 429}  # besides 5xx: states that another try may not meet
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class RequestError(Exception):
    """A request that got no usable answer. Its text names the address and the reason, and never the key."""


class _PassingError(Exception):
    """A failure that another try may not meet. `wait`: seconds that the server asked for."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


@dataclass(frozen=True)
class Server:
    """Where requests go, and their limits.

    `secret`: value of the Bearer token, "" for none. `timeout`: seconds of one try. `tries`: of one request.
    `concurrency`: requests at a time.
    """

    url: str
    secret: str = field(repr=False)
    timeout: float
    tries: int
    concurrency: int
    tls: ssl.SSLContext = field(repr=False, default_factory=httpx.create_ssl_context)

    def hidden(self, text: str) -> str:
        """The text without the key."""
        return text.replace(self.secret, "***") if self.secret else text

    @property
    def shown(self) -> str:
        """The address without its query, which may hold a password."""
        return self.url.partition("?")[0]


def checked_server(url: str, key: str, timeout: float, tries: int, concurrency: int) -> Server:
    """The server of these options of a reward.

    `key`: name of the environment variable that holds the Bearer token, "" for none. Raises UsageError that begins
    with the option at fault; a key in place of its name is not repeated.
    """
    if not isinstance(url, str) or urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise UsageError(f'url = {url!r}: must be an address; write e.g. "http://127.0.0.1:8000/v1"')
    try:
        httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UsageError(f"url = {url!r}: is no valid address ({error})") from None
    if "@" in urlsplit(url).netloc:
        raise UsageError("url: contains a user name or a password, and recipes are written into run folders; use key")
    if not isinstance(key, str) or (key and not _NAME.fullmatch(key)):
        raise UsageError(
            "key: must be the name of an environment variable, not the key itself, since recipes are written into run "
            'folders; write e.g. key = "OPENAI_API_KEY" and reward.environment = ["OPENAI_API_KEY"]'
        )
    if key and not os.environ.get(key):
        raise UsageError(
            f'key = "{key}": there is no such environment variable in this process; export it before the run, and name '
            "it in reward.environment"
        )
    if key and not re.fullmatch(r"[!-~]+", os.environ[key]):
        raise UsageError(
            f'key = "{key}": its value has spaces, line breaks or other characters that no header can carry'
        )
    if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not 0 < timeout < float("inf"):
        raise UsageError(f"timeout = {timeout!r}: must be a number of seconds above 0; write e.g. 30")
    for name, value in (("tries", tries), ("concurrency", concurrency)):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1000:
            raise UsageError(f"{name} = {value!r}: must be a whole number from 1 to 1000")
    return Server(url, os.environ[key] if key else "", timeout, tries, concurrency)


class Requests:
    """The requests of one call of a reward: an asynchronous context manager.

    They end `seconds` after the block was entered: what has no answer by then fails. If the server asks to wait, no
    request of the block is sent before.
    """

    def __init__(self, server: Server, seconds: float) -> None:
        self._server, self._seconds = server, seconds
        self._stack = AsyncExitStack()
        self._turns = asyncio.Semaphore(server.concurrency)
        self._deadline = self._not_before = 0.0  # in the loop's time
        self._random = random.SystemRandom()  # the seeded generator would give all processes the same pauses

    async def __aenter__(self) -> Self:
        client = httpx.AsyncClient(verify=self._server.tls, timeout=self._server.timeout, follow_redirects=False)
        self._client = await self._stack.enter_async_context(client)
        self._deadline = _now() + self._seconds
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.aclose()

    async def post(self, body: Mapping[str, Any], read: Callable[[Any], Content]) -> tuple[Content, int]:
        """What `read` makes of the JSON that answers `body`, and the number of tries that it took.

        `read` raises ValueError for an answer of another form, which is asked for again. Raises RequestError.
        """
        content = json.dumps(body, allow_nan=False, default=str).encode()
        async with self._turns:
            for number in range(1, self._server.tries + 1):
                await self._pause(self._not_before - _now(), "the server asks to wait")
                try:
                    return read(await self._try(content)), number
                except _PassingError as error:
                    why, wait = str(error), error.wait
                except ValueError as error:
                    why, wait = str(error), None
                if wait is not None:
                    self._not_before = max(self._not_before, _now() + wait)
                elif number < self._server.tries:
                    pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (number - 1))
                    await self._pause(pause * self._random.uniform(0.5, 1.0), why)
        raise self._error(f"{why}, in {self._server.tries} tries")

    async def _pause(self, seconds: float, why: str) -> None:
        if seconds > 0:
            if _now() + seconds >= self._deadline:
                raise self._error(f"{why}, and reward.timeout leaves no time for another try")
            await asyncio.sleep(seconds)

    async def _try(self, content: bytes) -> Any:
        left = self._deadline - _now()
        seconds = min(self._server.timeout, left)
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                return await self._send(content)
        except TimeoutError:
            if seconds == left:
                raise self._error("no answer before reward.timeout") from None
            raise _PassingError(f"no answer within {seconds:g} s") from None
        except httpx.HTTPError as error:
            raise _PassingError(f"no answer ({type(error).__name__}: {self._beginning(str(error))})") from None

    async def _send(self, content: bytes) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._server.secret:
            headers["Authorization"] = f"Bearer {self._server.secret}"
        async with self._client.stream("POST", self._server.url, content=content, headers=headers) as response:
            answer = b""
            async for chunk in response.aiter_bytes():
                answer += chunk
                if len(answer) > MOST_BYTES:
                    raise self._error(f"the answer has more than {MOST_BYTES} bytes")
        status, text = response.status_code, answer[:2000].decode("utf-8", "replace")
        if status in _PASSING or status >= 500:
            raise _PassingError(f"status {status} ({self._beginning(text)})", _asked_wait(response.headers))
        if not 200 <= status < 300:
            to = response.headers.get("location")
            raise self._error(f"status {status} ({f'a redirect to {to}' if to else self._beginning(text)})")
        try:
            return json.loads(answer, parse_constant=_refuse)
        except (ValueError, RecursionError):
            raise _PassingError(f"an answer that is not JSON ({self._beginning(text)})") from None

    def _error(self, why: str) -> RequestError:
        return RequestError(self._server.hidden(f"{self._server.shown}: {why}"))

    def _beginning(self, text: str) -> str:
        return self._server.hidden(" ".join(text.split()))[:200] or "nothing"


def _now() -> float:
    return asyncio.get_running_loop().time()


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that Retry-After asks for, given in seconds or as a date; None if it is missing or unreadable."""
    text = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text):
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
