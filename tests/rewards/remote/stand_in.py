"""A stand-in for a judge or a reward server on this machine, which can be slow, wrong, rate-limiting or down."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HANGS, CUTS = "hangs", "cuts the connection"


@dataclass
class Reply:
    """An answer: its status, its body (JSON unless it is bytes), and its headers."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


Answer = Callable[[dict[str, Any]], Any]


class StandIn:
    """`requests`: the bodies that have arrived; `keys`: their Authorization headers; `most`: how many were answered at
    the same time. `answer`: called with a body; returns a Reply, HANGS or CUTS."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.most = self._now = 0
        self._lock, self.released = threading.Lock(), threading.Event()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stand_in.handle(self, body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def handle(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        with self._lock:
            self.requests.append(body)
            self.keys.append(handler.headers["Authorization"])
            self.paths.append(handler.path)
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            reply = self.answer(body)
        finally:
            with self._lock:
                self._now -= 1
        if reply == HANGS:
            self.released.wait(30)
        if reply in (HANGS, CUTS):
            handler.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\n{")
            return
        content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        handler.send_response(reply.status)
        for name, value in {"Content-Length": str(len(content)), **reply.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    def stop(self) -> None:
        """Refuse connections from now on."""
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def stand_in(answer: Answer) -> Iterator[StandIn]:
    server = StandIn(answer)
    try:
        yield server
    finally:
        server.stop()


def chat(text: str, **usage: int) -> Reply:
    """A chat completion with this text."""
    message = {"role": "assistant", "content": text}
    return Reply({"choices": [{"message": message}], "usage": usage or {"prompt_tokens": 20, "completion_tokens": 5}})


def quoted(body: dict[str, Any], name: str) -> str:
    """What a judge is to judge: the text between the tags of this name in the last message of the first request."""
    found = re.search(rf"<{name}-(\w+)>\n(.*)\n</{name}-\1>", body["messages"][1]["content"], re.DOTALL)
    assert found is not None
    return found[2]


def by_length(body: dict[str, Any]) -> Reply:
    """A judge that counts characters: a score of one per character, or the longer response wins."""
    time.sleep(0.01)
    if "<response-a-" in body["messages"][1]["content"]:
        first, second = (len(quoted(body, f"response-{name}")) for name in "ab")
        return chat(json.dumps({"winner": "A" if first > second else "B" if second > first else "tie"}))
    return chat(json.dumps({"reason": "its length", "score": len(quoted(body, "response"))}))


def in_turn(*replies: Any) -> Answer:
    """Answers with each of these once, then with the last."""
    rest, lock = list(replies), threading.Lock()

    def answer(body: dict[str, Any]) -> Any:
        with lock:
            reply = rest.pop(0) if len(rest) > 1 else rest[0]
        return reply(body) if callable(reply) else reply

    return answer
