"""A stand-in for the Hugging Face hub: the part of its API that plain uploads and downloads use, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

WRITER, READER = "hf_writer", "hf_reader"  # tokens; the first owns "me", the second may only read

Files = dict[str, bytes]


@dataclass
class Repository:
    """Its files by commit, and its branches. `log`: the messages of its commits."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: Files, message: str = "") -> str:
        """Add a commit to a branch. Returns its hash."""
        sha = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.log.append(message)
        return sha

    def files(self, revision: str = "main") -> Files:
        """The files of a branch or commit."""
        return self.commits[self.branches.get(revision, revision)]


class RefusalError(Exception):
    """An answer that is no success: status, and the hub's error code if it has one. `url`: of what is there already."""

    def __init__(self, status: int, code: str = "", url: str = "") -> None:
        self.status, self.code, self.url = status, code, url


class Hub:
    """The state of the stand-in.

    `address`: while it is served. `fail`: a path pattern -> the status with which requests to it are refused.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.address = ""
        self.fail: dict[str, int] = {}
        self.requests: list[tuple[str, str]] = []

    def add(self, name: str, files: Files, kind: str = "models", **options: Any) -> Repository:
        """A repository with one commit on its branch main."""
        repository = Repository(**options)
        repository.commit("main", files)
        self.repositories[kind, name] = repository
        return repository

    def repository(self, kind: str, name: str, token: str) -> Repository:
        """The repository, if the token may read it."""
        found = self.repositories.get((kind, name))
        if found is None or (found.private and not token):
            raise RefusalError(404 if token else 401, "RepoNotFound")
        if found.gated:
            raise RefusalError(403, "GatedRepo")
        return found

    def answer(self, method: str, path: str, token: str, body: bytes) -> Any:
        """The answer to a request: JSON, or (commit, bytes) for a file. Raises RefusalError."""
        self.requests.append((method, path))
        for pattern, status in self.fail.items():
            if re.search(pattern, path):
                raise RefusalError(status)
        if token not in ("", WRITER, READER):
            raise RefusalError(401)
        if path == "/api/repos/create":
            return self._create(json.loads(body), token)
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(.*))?", path):
            return self._api(found[1], found[2], found[3] or "", method, token, body)
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repository = self.repository("datasets" if found[1] else "models", found[2], token)
            sha = self._sha(repository, unquote(found[3]))
            if found[4] not in repository.commits[sha]:
                raise RefusalError(404, "EntryNotFound")
            return sha, repository.commits[sha][found[4]]
        raise RefusalError(404)

    def _create(self, given: dict[str, Any], token: str) -> Any:
        owner = given["organization"] or "me"  # that of the token, if the name has none
        if token != WRITER or owner != "me":
            raise RefusalError(403 if token else 401)
        name = f"{owner}/{given['name']}"
        if ("models", name) in self.repositories:
            raise RefusalError(409, url=f"{self.address}/{name}")
        self.add(name, {".gitattributes": b""}, private=given.get("visibility") == "private")
        return {"url": f"{self.address}/{name}"}

    def _api(self, kind: str, name: str, rest: str, method: str, token: str, body: bytes) -> Any:
        repository = self.repository(kind, name, token)
        action, _, revision = rest.partition("/")
        writes = action in ("preupload", "commit", "branch") or rest == "auth-check/write"
        if writes and (token != WRITER or not name.startswith("me/")):
            raise RefusalError(403)
        if action == "auth-check":
            return {}
        if action == "branch":
            if unquote(revision) in repository.branches:
                raise RefusalError(409)
            repository.branches[unquote(revision)] = repository.branches["main"]
            return {}
        if action == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        if action == "commit":
            return self._commit(repository, name, unquote(revision), body)
        if action == "tree":
            revision = revision.partition("/")[0]  # a folder may follow
        sha = self._sha(repository, unquote(revision) or "main")
        files = repository.commits[sha]
        if action == "tree":
            return [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]
        siblings = [{"rfilename": path} for path in files]
        return {"id": name, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []}

    def _commit(self, repository: Repository, name: str, branch: str, body: bytes) -> Any:
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(repository.files(branch))
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            if line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        message = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        sha = repository.commit(branch, files, message)
        return {"commitUrl": f"{self.address}/{name}/commit/{sha}", "commitOid": sha}

    def _sha(self, repository: Repository, revision: str) -> str:
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise RefusalError(404, "RevisionNotFound")
        return sha


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """Serve the stand-in on a free port of this machine. Yields its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            headers = {}
            try:
                answer = hub.answer(self.command, urlsplit(self.path).path, token, body)
                status, data = 200, answer[1] if isinstance(answer, tuple) else json.dumps(answer).encode()
                if isinstance(answer, tuple):
                    headers = {"X-Repo-Commit": answer[0], "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
                else:
                    headers = {"Content-Type": "application/json"}
            except RefusalError as refused:
                status, data = refused.status, json.dumps({"error": "refused", "url": refused.url}).encode()
                headers = {"X-Error-Code": refused.code} if refused.code else {}
                if refused.status == 401 and not refused.code:
                    headers["X-Error-Message"] = "Invalid credentials in Authorization header"
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Nothing: the requests are in `Hub.requests`."""

    for method in ("HEAD", "POST"):
        setattr(Handler, f"do_{method}", Handler.do_GET)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub.address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use(address: str, token: str | None, cache: str, patch: pytest.MonkeyPatch) -> None:
    """Make huggingface_hub in this process use the stand-in, with this login, and an own cache."""
    constants = "huggingface_hub.constants."
    patch.setattr(f"{constants}ENDPOINT", address)
    patch.setattr(f"{constants}HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(f"{constants}HF_HUB_OFFLINE", False)
    patch.setattr(f"{constants}HF_HUB_DISABLE_XET", True)
    patch.setattr(f"{constants}HF_HUB_CACHE", cache)
    patch.setattr(f"{constants}HF_TOKEN_PATH", f"{cache}/token")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
    if token is not None:
        patch.setenv("HF_TOKEN", token)
    patch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
