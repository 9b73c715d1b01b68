"""Kept answers: the first one counts, and damage is a question that is asked again."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from gruppo.rewards.remote.cache import AnswerCache, request_hash


def opened(path: Path | None) -> AnswerCache:
    return AnswerCache(path, lambda answer: "n" in answer)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.sqlite"


def test_the_first_answer_counts_for_everybody(path: Path) -> None:
    first, second = opened(path), opened(path)
    assert first.get("k") is None
    assert not path.exists()
    assert first.put("k", {"n": 1}) == {"n": 1}
    assert second.put("k", {"n": 2}) == {"n": 1}
    assert first.get("k") == second.get("k") == opened(path).get("k") == {"n": 1}


def test_without_a_file_nothing_is_kept() -> None:
    cache = opened(None)
    assert cache.put("k", {"n": 1}) == {"n": 1}
    assert cache.get("k") is None


def test_the_hash_is_that_of_the_content() -> None:
    assert request_hash({"a": 1, "b": [2]}) == request_hash({"b": [2], "a": 1})
    assert request_hash({"a": 1}) != request_hash({"a": 1.0}) != request_hash({"a": "1"})
    assert len(request_hash({"text": "\ud800"})) == 64


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE answers SET answer = '{\"n\": 9}'",
        "UPDATE answers SET answer = x'00'",
        "UPDATE answers SET answer = NULL",
        f"UPDATE answers SET answer = '[1]', sha256 = '{hashlib.sha256(b'[1]').hexdigest()}'",
    ],
)
def test_a_damaged_entry_is_replaced(path: Path, damage: str) -> None:
    opened(path).put("k", {"n": 1})
    with sqlite3.connect(path) as database:
        assert database.execute(damage).rowcount == 1
    database.close()
    cache = opened(path)
    assert cache.get("k") is None
    assert cache.put("k", {"n": 2}) == {"n": 2}
    assert opened(path).get("k") == {"n": 2}


def test_an_entry_of_another_form_is_damaged(path: Path) -> None:
    AnswerCache(path, lambda _: True).put("k", {"other": 1})
    assert opened(path).get("k") is None
    assert opened(path).put("k", {"n": 1}) == {"n": 1}


@pytest.mark.parametrize("content", [b"not a database" * 100, b"", b"SQLite format 3\0" + bytes(5000)])
def test_a_damaged_file_is_moved_aside(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    cache = opened(path)
    assert cache.get("k") is None
    assert cache.put("k", {"n": 1}) == {"n": 1}
    assert opened(path).get("k") == {"n": 1}
    if content:
        assert path.with_name("cache.sqlite.damaged").read_bytes() == content


def test_a_file_that_is_cut_off(path: Path) -> None:
    cache = opened(path)
    for number in range(40):
        cache.put(f"k{number}", {"n": number, "text": "x" * 1000})
    path.write_bytes(path.read_bytes()[:10_000])
    cache = opened(path)
    for number in range(40):
        assert cache.get(f"k{number}") in (None, {"n": number, "text": "x" * 1000})
        assert cache.put(f"k{number}", {"n": number})["n"] == number


def test_another_program_s_database_is_moved_aside(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE answers (something)")
    database.close()
    assert opened(path).put("k", {"n": 1}) == {"n": 1}
    assert opened(path).get("k") == {"n": 1}


def test_a_link_is_not_followed(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = tmp_path / "elsewhere"
    path.symlink_to(elsewhere)
    assert opened(path).put("k", {"n": 1}) == {"n": 1}
    assert not elsewhere.exists()
    assert "cannot be used (it is a link)" in capsys.readouterr().out


def test_a_file_that_cannot_be_written_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = opened(tmp_path / "no such folder/cache.sqlite")
    assert [cache.put("k", {"n": n}) for n in (1, 2)] == [{"n": 1}, {"n": 2}]
    assert capsys.readouterr().out.count("cannot be used") == 1


def test_processes_agree_even_if_one_is_killed(path: Path) -> None:
    """Four processes race for the same keys; all see the same answers. One that dies in a transaction harms nobody."""
    code = (
        "import os, sys; from pathlib import Path; from gruppo.rewards.remote.cache import AnswerCache\n"
        "cache = AnswerCache(Path(sys.argv[1]), lambda _: True)\n"
        "print([cache.put(f'k{n}', {'by': os.getpid()})['by'] for n in range(20)])"
    )
    dying = (
        "import os, sqlite3, sys; base = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "base.execute('BEGIN IMMEDIATE')\n"
        "base.execute(\"INSERT INTO answers VALUES ('k0', 'half', 'half')\"); os._exit(1)"
    )
    opened(path).put("first", {"n": 1})
    subprocess.run([sys.executable, "-c", dying, path], check=False)
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    running = [
        subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, env=environment) for _ in range(4)
    ]
    outputs = {process.communicate()[0] for process in running}
    assert len(outputs) == 1
    assert outputs.pop().startswith(b"[")
