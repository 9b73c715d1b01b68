"""Whether the Hugging Face hub can be reached, found out at once instead of after half a minute of retries."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, is_offline_mode


def hub_reachable() -> bool:
    """False where the hub's name leads nowhere. True where that cannot be told: behind a proxy, or in offline mode,
    where huggingface_hub has an error of its own."""
    if is_offline_mode() or getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True
