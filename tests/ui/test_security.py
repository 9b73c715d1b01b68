"""Who may ask the dashboard, for what, and what its answers may contain. Attacks are tried."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import uvicorn
from fastapi.testclient import TestClient
from starlette.types import ASGIApp

from gruppo.errors import UsageError
from gruppo.ui import server
from gruppo.ui.security import POLICY, host_of, is_loopback
from tests.ui.attacks import harmless, write_run
from tests.ui.conftest import SECRET, Runs
from tests.ui.visits import HOST, Page, Visitor, addresses

TOKEN = "a-token-for-this-test"
Connect = Callable[..., TestClient]
PAGES = ("/", "/compare", "/r/none", "/static/style.css", "/static/none", "/api/runs", "/api/openapi.json", "/none",
         "//x", "/api/r/none/series", "/compare?band=7", "/api/compare?axis=7")  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one run."""
    write_run(tmp_path / "runs/one", harmless(8), "words")
    return tmp_path / "runs"


# ---------------------------------------------------------------- hosts


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:8642", "localhost:1", "LOCALHOST.", "[::1]:8642", "127.3.4.5"]
)
def test_loopback_names_are_answered(host: str, folder: Path, connect: Connect) -> None:
    assert connect(folder).get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8642", "127.0.0.1.evil.example", "localhost.evil.example", "evil.example.localhost",
     "192.168.1.5", "[2001:db8::1]", "", " ", "127.0.0.1@evil.example", "evil.example#127.0.0.1", "localhost\x00",
     "0x7f.1", "2130706433"],
)  # fmt: skip
def test_other_names_are_not(host: str, folder: Path, connect: Connect) -> None:
    """A page of another site whose name is rebound to this machine comes with that name."""
    for token in (None, TOKEN):
        answer = connect(folder, token).get(f"/?token={TOKEN}", headers={"host": host})
        assert answer.status_code == 421
        assert "set-cookie" not in answer.headers


def test_a_host_named_twice_is_refused(folder: Path, connect: Connect) -> None:
    client = connect(folder)
    for first, second in ((HOST, "evil.example"), ("evil.example", HOST), (HOST, HOST)):
        assert client.get("/", headers=[("host", first), ("host", second)]).status_code == 421


def test_on_another_address_its_name_and_literal_addresses_are_answered(folder: Path, connect: Connect) -> None:
    client = connect(folder, None, "dashboard.lan")
    for host, status in {
        "dashboard.lan:80": 200,
        "192.168.1.5:8642": 200,
        "[2001:db8::1]": 200,
        "other.lan": 421,
    }.items():
        assert client.get("/", headers={"host": host}).status_code == status, host


def test_names_of_addresses() -> None:
    assert [host_of(text) for text in ("A.B:1", "[::1]:2", "a.", "::1")] == ["a.b", "::1", "a", ""]
    loopback = {"127.0.0.1": True, "::1": True, "[::1]": True, "localhost": True, "0.0.0.0": False, "::": False,
                "192.168.0.1": False, "localhost.evil.example": False, "": False}  # fmt: skip
    assert {host: is_loopback(host) for host in loopback} == loopback


# ---------------------------------------------------------------- tokens


def test_the_token_of_the_link_becomes_a_cookie(folder: Path, connect: Connect) -> None:
    client = connect(folder, TOKEN)
    answer = client.get(f"/compare?run=a%26b&token={TOKEN}&band=0")
    assert answer.status_code == 303
    assert answer.headers["location"] == "/compare?run=a%26b&band=0"
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"gruppo_8642={TOKEN}; ")
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    assert client.get("/").status_code == 200, "the client sends the cookie from now on"
    assert TOKEN not in client.get("/").text


@pytest.mark.parametrize(
    "path", ["//evil.example/", "/\\evil.example", "/%09/evil.example", "///evil.example/%2f..", "/%0d%0aX:%20y"]
)
def test_the_redirect_stays_on_the_dashboard(path: str, folder: Path, connect: Connect) -> None:
    client = connect(folder, TOKEN)
    answer = client.get(f"http://{HOST}{path}?token={TOKEN}")
    assert answer.status_code == 303
    assert re.match(r"/[^/\\]|/$", answer.headers["location"]), answer.headers["location"]
    assert "x" not in answer.headers


def test_without_the_token_nothing_is_answered(folder: Path, connect: Connect) -> None:
    """Wrong tokens and cookies, for what is there and what is not: always the same answer."""
    client = connect(folder, TOKEN)
    answers = set()
    for path in PAGES:
        for query in ("", "?token=", f"?token={TOKEN}x", f"?token={TOKEN[:-1]}", "?token=%ff%00", f"?Token={TOKEN}"):
            answer = client.get(f"http://{HOST}{path}{query}" if "?" not in path else path)
            answers.add((answer.status_code, answer.content, tuple(sorted(answer.headers.items()))))
    for cookie in (f"gruppo_8642={TOKEN}x", f"gruppo_80={TOKEN}", "gruppo_8642=", f"gruppo_8642=\xe9{TOKEN}", '"; ='):
        answer = client.get("/", headers={"cookie": cookie.encode("latin-1")})  # type: ignore[dict-item]
        answers.add((answer.status_code, answer.content, tuple(sorted(answer.headers.items()))))
    assert len(answers) == 1
    assert next(iter(answers))[0] == 401


def test_the_token_is_nowhere_in_pages_and_logs(
    folder: Path, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    client = connect(folder, TOKEN)
    with caplog.at_level(logging.DEBUG):
        client.get(f"/?token={TOKEN}")
        (run,) = client.get("/api/runs").json()
        for address in (*PAGES, *addresses(run["key"], (1,), 1, ["text 0"], ["text 1"], 2)):
            answer = client.get(f"http://{HOST}{address}")
            assert TOKEN not in answer.text
            assert answer.headers["referrer-policy"] == "no-referrer"
    assert TOKEN not in "".join(record.getMessage() for record in caplog.records if record.name != "httpx2")


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"])
def test_other_methods_are_refused(method: str, folder: Path, connect: Connect) -> None:
    answer = connect(folder).request(method, "/api/runs")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


def require_headers(answer: Any) -> None:
    """Every answer has the policy, whatever it is."""
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert "access-control-allow-origin" not in answer.headers
    assert "server" not in answer.headers


def test_the_policy_is_on_every_answer(folder: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect(folder)
    (run,) = client.get("/api/runs").json()
    statuses = set()
    for address in (
        *PAGES,
        *addresses(run["key"], (1,), 1, ["text 0"], ["text 1"], 2),
        f"/r/{run['key']}/files/recipe.toml",
    ):
        answer = client.get(f"http://{HOST}{address}")
        require_headers(answer)
        statuses.add(answer.status_code)
        if not address.startswith("/static/"):
            assert answer.headers["cache-control"] == "no-store"
    assert {200, 404, 422} <= statuses
    require_headers(client.get("/", headers={"host": "evil.example"}))
    require_headers(client.post("/"))
    require_headers(connect(folder, TOKEN).get("/"))
    monkeypatch.setattr("gruppo.ui.catalog.Catalog.cards", lambda self: 1 / 0)
    for address in ("/", "/api/runs"):
        answer = client.get(address)
        assert answer.status_code == 500
        require_headers(answer)
        assert "ZeroDivisionError" not in answer.text


def test_the_policy_allows_only_scripts_of_the_server() -> None:
    rules = dict(rule.split(" ", 1) for rule in POLICY.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == "'self'"
    assert rules["base-uri"] == rules["frame-ancestors"] == "'none'"
    assert rules["connect-src"] == rules["form-action"] == "'self'"
    assert not re.search(r"https?:|\*|unsafe-eval", POLICY)
    assert [name for name, sources in rules.items() if "unsafe-inline" in sources] == ["style-src"], (
        "plotly sets styles"
    )


def test_downloads_are_never_shown_as_pages(folder: Path, connect: Connect) -> None:
    client = connect(folder)
    (run,) = client.get("/api/runs").json()
    for name in ("recipe.toml", "rewards.log", "rollouts/step-000001.parquet"):
        answer = client.get(f"/r/{run['key']}/files/{name}")
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["content-disposition"].startswith("attachment")
        assert answer.content == (folder / "one" / name).read_bytes()


# ---------------------------------------------------------------- paths

OUTSIDE = (
    "../secret", "..%2fsecret", "%2e%2e/secret", "%2e%2e%2fsecret", "..\\secret", "%5c..%5csecret", "../../etc/passwd",
    "/etc/passwd", "%2fetc%2fpasswd", "//etc/passwd", "rollouts/../../secret", "rollouts%2f..%2f..%2fsecret", "secret",
    "recipe.toml/", "recipe.toml%00", "%00", "recipe.toml%00.txt", "./recipe.toml", "checkpoints/state.json", ".", "",
    "rollouts", "rollouts/", "rollouts/step-000001.parquet/../../recipe.toml", "....//secret", "%252e%252e%252fsecret",
    "status.json", "%c0%ae%c0%ae/secret", "file:///etc/passwd", "~/secret", "RECIPE.TOML", "rollouts//step-1.parquet",
)  # fmt: skip


def raw(app: ASGIApp, path: str) -> tuple[int, str]:
    """Status and text of the answer to a path as it is; a client would shorten it."""
    messages: list[dict[str, Any]] = []
    scope = {
        "type": "http", "method": "GET", "path": unquote(path), "raw_path": path.encode(), "query_string": b"",
        "headers": [(b"host", HOST.encode())], "http_version": "1.1", "scheme": "http", "server": ("127.0.0.1", 8642),
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        messages.append(message)

    asyncio.run(app(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in messages)
    return messages[0]["status"], body.decode("utf-8", "replace")


@pytest.mark.parametrize("name", OUTSIDE)
def test_paths_cannot_leave_the_folder(name: str, folder: Path, connect: Connect) -> None:
    for place in (folder, folder / "one", folder.parent):
        (place / "secret").write_text(SECRET)
    client = connect(folder)
    (run,) = client.get("/api/runs").json()
    for start in ("files", "steps", "evaluations", "questions"):
        status, text = raw(client.app, f"/r/{run['key']}/{start}/{name}")
        assert SECRET not in text
        assert status in (404, 422) or (
            start != "files" and name in ("", "recipe.toml/", "rollouts/") and status == 307
        )
    for start in ("/static/", "/r/", "/api/r/", "/"):
        status, text = raw(client.app, start + name)
        assert SECRET not in text
        assert status in (307, 404, 422) or (start == "/" and name == "")


def test_links_and_pipes_in_a_run_are_not_followed(runs: Runs, visitor: Visitor) -> None:
    """Whole files, single tables, folders of tables, the run itself, its recipe and what its recipe extends."""
    listed = visitor.get("/api/runs").text
    assert '"folder":"linked/run"' not in listed
    assert '"folder":"linked/recipe"' not in listed
    shown = 0
    for name in ("linked-files", "linked-folders", "pipes", "extends"):
        key = runs.key(name)
        files = [f"/r/{key}/files/{file}" for file in ("metrics.jsonl", "summary.json", "rewards.log", "results.json")]
        files += [f"/r/{key}/files/{kind}/step-000002.parquet" for kind in ("rollouts", "evaluations")]
        for address in (*files, *addresses(key, (1, 2, 3), 2, [f"{SECRET} 0", "text 0"], [f"{SECRET} 1", "text 1"], 2)):
            answer = visitor.get(address)
            assert answer.status_code in (200, 404)
            content = (
                answer.text.replace(f"{SECRET} 0", "").replace(f"{SECRET} 1", "")
                if answer.status_code == 404
                else answer.text
            )
            assert SECRET not in content, address
            assert answer.status_code == 404 or address not in files or name in ("extends", "linked-folders"), address
            shown += "is a link" in answer.text
    assert shown > 4, "the pages say why"
    assert "extends another file" in visitor.get(f"/r/{runs.key('extends')}/recipe").text


# ---------------------------------------------------------------- nothing changes


def content_of(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Time of change, size and digest of everything in a folder."""
    found = {}
    for place, folders, files in os.walk(os.fsencode(folder)):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            status = os.lstat(path)
            regular = os.path.isfile(path) and not os.path.islink(path)
            digest = hashlib.sha256(Path(os.fsdecode(path)).read_bytes()).hexdigest() if regular else ""
            found[os.fsdecode(path)] = (status.st_mtime_ns, status.st_size, digest)
    return found


def test_no_request_changes_anything(real_runs: Runs, tmp_path: Path, connect: Connect) -> None:
    """Every kind of page, with the folder of runs as the home and the working directory would be."""
    before = content_of(real_runs.root)
    visitor = Visitor(connect(real_runs.root))
    for name in real_runs.paths:
        key = real_runs.key(name)
        for address in addresses(key, (1, 2, 3, 4), 2, [""], ["a", "b"], 4):
            visitor.get(address)
    visitor.page(f"/compare?run={real_runs.key('seed-0')}&run={real_runs.key('seed-1')}")
    visitor.page("/")
    assert content_of(real_runs.root) == before
    indexes = [path.suffix for path in (tmp_path / "cache").iterdir()]
    assert indexes.count(".duckdb") == 2, "the index is in the cache"
    assert oct((tmp_path / "cache").stat().st_mode & 0o777) == "0o700"


# ---------------------------------------------------------------- the server


def serve(folder: Path, host: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str, uvicorn.Config, tuple[str, int]]:
    """What `server.serve` tells, how it would serve, and the address that it listens on."""
    found: list[Any] = []

    def run(self: uvicorn.Server, sockets: list[Any]) -> None:
        found.extend((self.config, sockets[0].getsockname()[:2]))

    monkeypatch.setattr(uvicorn.Server, "run", run)
    server.serve(folder, host, None, lambda link, warning: found.extend((link, warning)))
    link, warning, config, address = found
    return link, warning, config, address


def test_the_server_listens_on_loopback_with_a_new_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(server.TOKEN, raising=False)
    links = []
    for _ in range(2):
        link, warning, config, (address, port) = serve(folder, "127.0.0.1", monkeypatch)
        assert (address, warning, config.access_log) == ("127.0.0.1", "", False)
        assert re.fullmatch(rf"http://127\.0\.0\.1:{port}/\?token=[\w-]{{20,}}", link)
        links.append(link.partition("=")[2])
    assert links[0] != links[1]


def test_other_addresses_come_with_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, warning, _, (address, _) = serve(folder, "0.0.0.0", monkeypatch)
    assert address == "0.0.0.0"
    assert "Other machines can reach this address" in warning


@pytest.mark.parametrize(("host", "port"), [("no such host", None), ("192.0.2.1", None), ("127.0.0.1", 70_000)])
def test_an_address_that_cannot_be_used(host: str, port: int | None) -> None:
    with pytest.raises(UsageError, match="host = "):
        server.bound_socket(host, port)


def test_a_port_that_is_in_use(folder: Path) -> None:
    with server.bound_socket("127.0.0.1", 0) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port = {number}: in use"):
            server.bound_socket("127.0.0.1", number)


def test_the_command(folder: Path, tmp_path: Path) -> None:
    """`gruppo ui` prints a link on loopback. The link opens the dashboard; logs and errors do not contain its token."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    environment.pop(server.TOKEN, None)
    command = [sys.executable, "-m", "gruppo.cli.main", "ui", str(folder)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            link = process.stdout.readline().rpartition(": ")[2].strip()
            assert link.startswith("http://127.0.0.1:"), link
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPCookieProcessor())
            with opener.open(link, timeout=60) as answer:
                assert "?" not in answer.url
                page = Page(answer.read().decode())
            assert "one" in "".join(element.text for element in page.all("table"))
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(link.partition("?")[0], timeout=60)
        finally:
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
        token = link.partition("=")[2]
        assert token not in output + errors
        assert "Traceback" not in errors


def test_live_streams_need_the_token_too(folder: Path, connect: Connect) -> None:
    assert connect(folder, TOKEN).get("/live").status_code == 401


def test_data_in_pages_is_what_the_api_says(runs: Runs, visitor: Visitor) -> None:
    """A text that would end a block of data comes out of it as it was."""
    key = runs.key("hostile")
    for group in (0, 1, 2):
        (block,) = visitor.page(f"/r/{key}/steps/1/groups/{group}").data()
        assert block == visitor.get(f"/api/r/{key}/steps/1/groups/{group}").json()


def test_small_answers_do_not_wait() -> None:
    """asyncio switches the delay of small packets off if the socket names its protocol."""
    with server.bound_socket("127.0.0.1", 0) as listening:
        assert listening.proto == socket.IPPROTO_TCP
