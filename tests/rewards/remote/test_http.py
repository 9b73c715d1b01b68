"""Requests to a server that is slow, wrong, rate-limiting or down."""

from __future__ import annotations

import asyncio
import gzip
import re
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from gruppo.errors import UsageError
from gruppo.rewards.remote import http
from gruppo.rewards.remote.http import RequestError, Requests, Server, checked_server
from tests.rewards.remote.stand_in import CUTS, HANGS, Reply, in_turn, stand_in

FINE = Reply({"fine": 1})


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that requests wait between tries; nobody really waits."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    waited: list[float] = []
    sleep = asyncio.sleep

    async def short(seconds: float) -> None:
        waited.append(seconds)
        await sleep(0)

    monkeypatch.setattr(http.asyncio, "sleep", short)
    return waited


def server(url: str, **changes: Any) -> Server:
    return Server(**{"url": url, "secret": "", "timeout": 5.0, "tries": 4, "concurrency": 4, **changes})


def post(place: Server, bodies: int = 1, seconds: float = 60.0, read: Any = lambda content: content["fine"]) -> list:
    """The outcome of each of some requests that are made at the same time."""

    async def run() -> list:
        async with Requests(place, seconds) as requests:
            asked = (requests.post({"number": number}, read) for number in range(bodies))
            return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(run())


def why(outcome: Any) -> str:
    assert isinstance(outcome, RequestError), outcome
    return str(outcome)


def test_an_answer_is_read(pauses: list[float]) -> None:
    with stand_in(in_turn(FINE)) as one:
        assert post(server(one.url)) == [(1, 1)]
    assert one.requests == [{"number": 0}]
    assert not pauses


@pytest.mark.parametrize(
    "reply",
    [
        Reply({}, status=500),
        Reply({}, status=503),
        Reply({}, status=429),
        Reply({}, status=408),
        Reply(b"<html>Bad gateway</html>"),
        Reply(b'{"fine": '),
        Reply(b'{"fine": NaN}'),
        Reply(b"[" * 100_000),
        Reply(b"\xff\xfe"),
        Reply({"other": 1}),
        CUTS,
    ],
)
def test_a_failure_that_may_pass_is_tried_again(reply: Any, pauses: list[float]) -> None:
    def read(content: Any) -> Any:
        if "fine" not in content:
            raise ValueError("an answer of another form")
        return content["fine"]

    with stand_in(in_turn(reply, reply, FINE)) as one:
        assert post(server(one.url), read=read) == [(1, 3)]
    assert len(pauses) == 2
    assert 0.25 <= pauses[0] <= 0.5
    assert 0.5 <= pauses[1] <= 1.0


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 422])
def test_a_refusal_is_final(status: int) -> None:
    with stand_in(in_turn(Reply({"error": "no such model"}, status=status))) as one:
        (outcome,) = post(server(one.url))
    assert why(outcome) == f'{one.url}: status {status} ({{"error": "no such model"}})'
    assert len(one.requests) == 1


def test_a_redirect_is_not_followed() -> None:
    with stand_in(in_turn(Reply({}, status=302, headers={"Location": "http://elsewhere.invalid/"}))) as one:
        (outcome,) = post(server(one.url))
    assert "status 302 (a redirect to http://elsewhere.invalid/)" in why(outcome)


def test_the_number_of_tries_is_limited() -> None:
    with stand_in(in_turn(Reply(b"<html>busy</html>", status=502))) as one:
        (outcome,) = post(server(one.url, tries=3))
    assert why(outcome).endswith("status 502 (<html>busy</html>), in 3 tries")
    assert len(one.requests) == 3


def test_a_server_that_is_down() -> None:
    with stand_in(in_turn(FINE)) as one:
        pass
    (outcome,) = post(server(one.url, tries=2))
    assert re.search(r"no answer \(ConnectError: .+\), in 2 tries", why(outcome))


def test_a_server_that_hangs_has_a_time_limit_per_try() -> None:
    with stand_in(in_turn(HANGS, FINE)) as one:
        assert post(server(one.url, timeout=0.3)) == [(1, 2)]
        one.answer = in_turn(HANGS)
        (outcome,) = post(server(one.url, timeout=0.2, tries=2))
        assert why(outcome).endswith("no answer within 0.2 s, in 2 tries")


def test_nothing_outlives_the_call() -> None:
    with stand_in(in_turn(HANGS)) as one:
        (outcome,) = post(server(one.url, timeout=30.0), seconds=0.3)
        assert why(outcome).endswith("no answer before reward.timeout")
        assert len(one.requests) == 1


@pytest.mark.parametrize("header", ["7", "7.0", "date"])
def test_retry_after_is_obeyed(header: str, pauses: list[float]) -> None:
    def slow_down(body: Any) -> Reply:
        text = format_datetime(datetime.now(UTC) + timedelta(seconds=8)) if header == "date" else header
        return Reply({}, status=429, headers={"Retry-After": text})

    with stand_in(in_turn(slow_down, FINE)) as one:
        assert post(server(one.url)) == [(1, 2)]
    assert 6 < pauses[0] <= 8


def test_all_requests_wait_if_one_is_told_to(pauses: list[float]) -> None:
    """With one request at a time, the second meets the pause of the first before it is sent."""
    with stand_in(in_turn(Reply({}, status=429, headers={"Retry-After": "5"}))) as one:
        outcomes = post(server(one.url, tries=1, concurrency=1), bodies=2)
    assert all(why(outcome).endswith("status 429 ({}), in 1 tries") for outcome in outcomes)
    assert [4 < pause <= 5 for pause in pauses] == [True]


def test_a_pause_beyond_the_call_fails_at_once(pauses: list[float]) -> None:
    with stand_in(in_turn(Reply({}, status=429, headers={"Retry-After": "3600"}))) as one:
        (outcome,) = post(server(one.url), seconds=20)
    assert why(outcome).endswith("the server asks to wait, and reward.timeout leaves no time for another try")
    assert len(one.requests) == 1
    assert not pauses


@pytest.mark.parametrize("header", ["soon", "-5", "", "1e9", "Wed, 99 Xxx 2099", "9" * 50])
def test_a_wrong_retry_after_counts_as_none(header: str, pauses: list[float]) -> None:
    with stand_in(in_turn(Reply({}, status=429, headers={"Retry-After": header}), FINE)) as one:
        assert post(server(one.url)) == [(1, 2)]
    assert pauses[0] <= 0.5


def test_requests_at_a_time_are_limited() -> None:
    def slow(body: Any) -> Reply:
        one.released.wait(0.02)
        return FINE

    with stand_in(slow) as one:
        assert post(server(one.url, concurrency=2), bodies=8) == [(1, 1)] * 8
    assert one.most == 2


@pytest.mark.parametrize("packed", [False, True])
def test_an_answer_has_a_size_limit(packed: bool) -> None:
    content = b" " * (http.MOST_BYTES + 1)
    headers = {"Content-Encoding": "gzip"} if packed else {}
    with stand_in(in_turn(Reply(gzip.compress(content) if packed else content, headers=headers))) as one:
        (outcome,) = post(server(one.url))
    assert f"more than {http.MOST_BYTES} bytes" in why(outcome)


def test_the_key_is_sent_and_never_shown() -> None:
    secret = "sk-very-secret-1234"

    def echo(body: Any) -> Reply:
        return Reply({"error": f"wrong key {secret}"}, status=401)

    with stand_in(echo) as one:
        place = server(one.url + "?token=abc", secret=secret)
        (outcome,) = post(place)
    assert one.keys == [f"Bearer {secret}"]
    assert secret not in why(outcome) + repr(place)
    assert "wrong key ***" in why(outcome)
    assert "abc" not in why(outcome)


def test_options_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = {"url": "http://127.0.0.1:1/v1", "key": "", "timeout": 30.0, "tries": 4, "concurrency": 8}
    checked_server(**fine)  # type: ignore[arg-type]
    monkeypatch.setenv("GOOD_KEY", "sk-1")
    monkeypatch.setenv("BAD_KEY", "sk-1\n")
    assert checked_server(**{**fine, "key": "GOOD_KEY"}).secret == "sk-1"  # type: ignore[arg-type]
    for changes, message in [
        ({"url": "127.0.0.1:8000"}, "url = '127.0.0.1:8000': must be an address"),
        ({"url": "ftp://x"}, "url = 'ftp://x': must be an address"),
        ({"url": 3}, "url = 3: must be an address"),
        ({"url": "http://me:secret@host/"}, "url: contains a user name or a password"),
        ({"key": "sk-very-secret"}, "key: must be the name of an environment variable, not the key itself"),
        ({"key": "NO_SUCH_KEY"}, 'key = "NO_SUCH_KEY": there is no such environment variable'),
        ({"key": "BAD_KEY"}, 'key = "BAD_KEY": its value has'),
        ({"timeout": 0}, "timeout = 0: must be a number of seconds above 0"),
        ({"timeout": True}, "timeout = True: must be"),
        ({"tries": 0}, "tries = 0: must be a whole number from 1 to 1000"),
        ({"concurrency": 1.5}, "concurrency = 1.5: must be a whole number"),
    ]:
        with pytest.raises(UsageError, match=re.escape(message)) as raised:
            checked_server(**{**fine, **changes})  # type: ignore[arg-type]
        assert "secret" not in str(raised.value)
