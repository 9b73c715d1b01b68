"""Serves the dashboard: a socket, a token, and the link that opens it."""

from __future__ import annotations

import errno
import os
import secrets
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from gruppo.errors import UsageError
from gruppo.ui.app import POLL_SECONDS, create_app
from gruppo.ui.security import is_loopback

PORT, TRIED = 8642, 20  # the first port, and how many are tried if none was named
TOKEN = "GRUPPO_UI_TOKEN"  # an environment variable: the same token at every start, for a bookmark


def bound_socket(host: str, port: int | None) -> socket.socket:
    """A listening socket. Without a `port`, the first free one of `TRIED` from `PORT`.

    Raises UsageError if there is none, or the address is not one of this machine's.
    """
    try:
        family, _, _, _, _ = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise UsageError(f"--host {host}: is not an address ({error.strerror}); use 127.0.0.1") from None
    for number in [port] if port is not None else range(PORT, PORT + TRIED):
        # With the protocol named, asyncio sends small answers at once; otherwise they wait 40 ms for a confirmation.
        found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host, number))
            found.listen(128)
            return found
        except (OSError, OverflowError) as error:
            found.close()
            if getattr(error, "errno", None) == errno.EADDRINUSE:
                continue
            raise UsageError(f"--host {host} --port {number}: cannot be used ({error}); choose others") from None
    which = f"--port {port}" if port is not None else f"--port: {PORT} to {PORT + TRIED - 1}"
    raise UsageError(f"{which}: in use by another program; name a free port")


def serve(folder: Path, host: str, port: int | None, tell: Callable[[str, str], None]) -> None:
    """Serve the dashboard over the runs below `folder` until the process is interrupted.

    `tell(link, warning)` is called as soon as the server answers; `warning` is "" on a loopback address.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: is not a folder; give the folder that holds your runs, e.g. runs")
    token = os.environ.get(TOKEN) or secrets.token_urlsafe(16)
    with bound_socket(host, port) as listening:
        number = listening.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        link = f"http://{shown}:{number}/?token={token}"
        warning = "" if is_loopback(host) else (
            "Other machines can reach this address, and the link travels unencrypted. Whoever has it can read all runs."
        )  # fmt: skip
        app = create_app(folder.resolve(), token, host)
        server = uvicorn.Server(uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False,
            timeout_graceful_shutdown=int(2 * POLL_SECONDS), ws="none",
        ))  # fmt: skip
        app.state.is_stopping = lambda: server.should_exit
        tell(link, warning)
        server.run(sockets=[listening])
