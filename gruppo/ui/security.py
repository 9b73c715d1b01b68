"""What every request to the dashboard passes: the method, the host, the token, and the headers of the answer."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlencode

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self' 'unsafe-inline'",  # plotly sets styles
        "img-src 'self' data: blob:",
        "font-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}  # of every answer
_PRIVATE = "no-store"  # pages hold other people's data
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_YEAR = 365 * 86400


def is_loopback(host: str) -> bool:
    """Whether an address that a server binds to can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def host_of(header: str) -> str:
    """The host in a Host header, without its port, in lower case."""
    host = header.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".")


class Guard:
    """ASGI middleware: only GET and HEAD, only known hosts, only requests with the token; safe headers on every answer.

    `host`: the address that the server binds to. On a loopback address only loopback names are answered. On another
    address also that name, this machine's names, and every literal IP address: a page of another site that is rebound
    to this machine (DNS rebinding) always comes with a name of its own.
    `token`: what the link that opened the dashboard carries; afterwards a cookie does. None: no token is needed.
    """

    def __init__(self, app: ASGIApp, host: str, token: str | None, names: Iterable[str] = ()) -> None:
        self.app, self.token = app, token
        self.local = is_loopback(host)
        self.names = {*_LOOPBACK, *(name.lower() for name in names)}
        if not self.local:
            self.names |= {host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no web sockets

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", _PRIVATE)
            await send(message)

        refusal = self._refusal(scope)
        await (self.app if refusal is None else refusal)(scope, receive, with_headers)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        headers = [(name.lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) != 1 or not self._known(host_of(hosts[0])):
            return PlainTextResponse(
                "This address is not one of the dashboard's. Open the link that it printed.\n", 421
            )
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("The dashboard only reads.\n", 405, {"allow": "GET, HEAD"})
        if self.token is None or self._has_cookie(headers, hosts[0]):
            return None
        query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if not any(_equal(given, self.token) for given in query.pop("token", [])):
            text = "Open the link that `gruppo ui` printed: it carries the token that this page needs.\n"
            return PlainTextResponse(text, 401)
        return self._entered(scope["path"], query, hosts[0])

    def _known(self, host: str) -> bool:
        if host in self.names:
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return address.is_loopback or not self.local

    def _entered(self, path: str, query: dict[str, list[str]], host: str) -> ASGIApp:
        rest = urlencode(query, doseq=True)
        response = RedirectResponse("/" + path.lstrip("/\\") + (f"?{rest}" if rest else ""), 303)
        response.set_cookie(
            _cookie_name(host), self.token or "", max_age=_YEAR, httponly=True, samesite="strict", path="/"
        )
        return response

    def _has_cookie(self, headers: list[tuple[bytes, str]], host: str) -> bool:
        for name, value in headers:
            if name == b"cookie":
                try:
                    cookie = SimpleCookie(value).get(_cookie_name(host))
                except CookieError:
                    continue
                if cookie is not None and _equal(cookie.value, self.token or ""):
                    return True
        return False


def _cookie_name(host: str) -> str:
    """Browsers share cookies between ports, so the name contains the port."""
    port = host.rpartition("]")[2].rpartition(":")[2]
    return f"gruppo_{port if port.isdigit() else 'http'}"


def _equal(first: str, second: str) -> bool:
    return hmac.compare_digest(first.encode(), second.encode())
