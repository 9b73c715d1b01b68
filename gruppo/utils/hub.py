"""The Hugging Face hub: a quick check whether it is reachable, its errors in words, and its bars hidden."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

import httpx2
from huggingface_hub import constants, is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from gruppo.utils.paths import user_path

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"

_BY_STATUS = {
    401: f"there is no such repository, or it is private and the token is not valid; correct the name, or {LOG_IN}",
    403: f"the token does not allow this; {LOG_IN} to a token that may write to this repository",
    404: f"there is no such repository, or it is private; correct the name, or {LOG_IN}",
    409: "it was changed at the same time; try again",
    413: "a file is too large for it; write smaller ones with --max-shard-size",
    429: "it has had too many requests from this account or address; wait a few minutes and try again",
}


def split_revision(name: str) -> tuple[str, str | None]:
    """The repository and the revision of "owner/name@revision"; any other name, such as a path, without a revision."""
    found = re.fullmatch(r"(\w[\w.-]*(?:/\w[\w.-]*)?)@([\w][\w./-]*)", name)
    return (found[1], found[2]) if found and not user_path(name).exists() else (name, None)


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


def hub_problem(error: BaseException | None) -> str | None:
    """What is wrong and how to fix it, if an error or one of its causes comes from the hub; otherwise None."""
    while error is not None:
        if problem := _problem(error):
            return problem
        error = error.__cause__ or error.__context__
    return None


def _problem(error: BaseException) -> str | None:
    if isinstance(error, LocalTokenNotFoundError):
        return f"there is no token; {LOG_IN}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the hub is not asked; unset it, or use a local folder"
    if isinstance(error, HFValidationError):
        return "is no name of a repository; write OWNER/NAME"
    if isinstance(error, GatedRepoError):
        return f"its owner must grant access first; ask for it on the repository's page, and {LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision; write one of its branches, tags or commits"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status >= 500:
            return f"the hub has a problem of its own (HTTP {status}); try again later"
        return _BY_STATUS.get(
            status, f"the hub refuses it (HTTP {status}: {error.server_message}); correct the command"
        )
    absent = isinstance(error, LocalEntryNotFoundError) and error.__cause__ is None
    return unreachable() if absent or isinstance(error, httpx2.TransportError) else None


def unreachable() -> str:
    """The words for a hub that does not answer."""
    return f"the Hugging Face hub ({constants.ENDPOINT}) cannot be reached; go online, or use a local folder"


@contextmanager
def hidden_bars() -> Iterator[None]:
    """Hide huggingface_hub's progress bars in the block: progress is shown by our reporter."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
