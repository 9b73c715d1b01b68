"""A quick check whether the Hugging Face hub is reachable, which avoids half a minute of retries."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, is_offline_mode


def hub_reachable() -> bool:
    """Whether the host name of the hub resolves.

    True without a check behind a proxy, and in offline mode, for which huggingface_hub has its own error.
    """
    if is_offline_mode() or getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True
