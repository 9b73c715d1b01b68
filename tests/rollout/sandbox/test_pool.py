"""Sessions keep state, die and restart; pools serve threads, close, and refuse to start without a sandbox."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import psutil
import pytest

from gruppo.errors import UsageError
from gruppo.rollout.sandbox import Limits, PythonPool, Session
from gruppo.rollout.sandbox.interpreter import Exchange, Process
from gruppo.rollout.sandbox.pool import LOST, MOST_CODE

FAST = Limits(seconds=20, processor_seconds=20, memory=300 * 2**20)


@pytest.fixture(scope="module")
def pool() -> Iterator[PythonPool]:
    try:
        opened = PythonPool(FAST, ready=2)
    except UsageError as error:
        pytest.skip(str(error))
    with opened:
        yield opened


@pytest.fixture
def session(pool: PythonPool) -> Iterator[Session]:
    with pool.session() as opened:
        yield opened


def outputs(session: Session, *blocks: str) -> list[str]:
    return [session.run(block).output for block in blocks]


def test_state_is_kept_between_blocks(session: Session) -> None:
    blocks = ["import math\nx = 3\ndef f(y): return x + y", "f(4)", "_ * 2", "math.floor(x / 2)", "del x", "f(1)"]
    assert outputs(session, *blocks[:5]) == ["", "7\n", "14\n", "1\n", ""]
    assert "NameError: name 'x' is not defined" in session.run(blocks[5]).output


@pytest.mark.parametrize(
    ("block", "output"),
    [
        ("", ""),
        ("# nothing", ""),
        ("None", ""),
        ("'text'", "'text'\n"),
        ("print('a'); 'b'", "a\n'b'\n"),
        ("1\n2", "2\n"),
        ("x = 5", ""),
        ("import sys\nprint('out')\nprint('err', file=sys.stderr)\nprint('end')", "out\nerr\nend\n"),
        ("if __name__ == '__main__':\n    print(__name__)", "__main__\n"),
        ("import pickle\nclass A: pass\ntype(pickle.loads(pickle.dumps(A()))) is A", "True\n"),
        ("'ä'.encode(), open('/tmp/ä', 'w').write('ö')", "(b'\\xc3\\xa4', 1)\n"),
        ("open('/tmp/mine.py', 'w').write('y = 8')\nimport mine\nmine.y", "8\n"),
        ("[*{'a', 'b', 'c', 'd', 'e'}] == [*dict.fromkeys({'a', 'b', 'c', 'd', 'e'})]", "True\n"),
        ("print('half', end='')", "half"),
        ("import sys\nsys.argv", "['']\n"),
    ],
)
def test_output_of_a_block(session: Session, block: str, output: str) -> None:
    assert (session.run(block).output, session.run("1").status) == (output, "ok")


def test_order_of_sets_is_the_same_in_every_interpreter(pool: PythonPool) -> None:
    block = "''.join({chr(97 + i) for i in range(26)})"
    with pool.session() as one, pool.session() as other:
        assert one.run(block).output == other.run(block).output


def test_math_packages_are_available_if_installed(session: Session) -> None:
    pytest.importorskip("sympy")
    assert outputs(session, "from sympy import *", "x = symbols('x'); integrate(x * exp(x), x)") == [
        "",
        "(x - 1)*exp(x)\n",
    ]
    assert outputs(session, "import numpy as np\nnp.linalg.det(np.eye(3) * 2).round()") == ["np.float64(8.0)\n"]
    assert "No module named 'torch'" in session.run("import torch").output


def test_traceback_is_short_and_shows_only_the_block(session: Session) -> None:
    ran = session.run("def f(x):\n    return 1 / x\n\nf(0)")
    assert ran.status == "error"
    assert ran.output == (
        "Traceback (most recent call last):\n"
        '  File "<block 1>", line 4, in <module>\n    f(0)\n'
        '  File "<block 1>", line 2, in f\n    return 1 / x\n           ~~^~~\n'
        "ZeroDivisionError: division by zero\n"
    )
    ran = session.run("x = (1 +\n")
    assert ran.output == "  File \"<block 2>\", line 1\n    x = (1 +\n        ^\nSyntaxError: '(' was never closed\n"
    ran = session.run("def g(n): return g(n)\ng(1)")
    assert "[Previous line repeated 5 more times]\nRecursionError" in ran.output


@pytest.mark.parametrize("letter", ["x", "\\x1b", "\\0", "\\n", "\\ud800", "🙂"])
@pytest.mark.parametrize("times", [2200, 10**6])
def test_long_message_does_not_hide_the_error(session: Session, letter: str, times: int) -> None:
    output = session.run(f"def f():\n    raise ValueError('wrong ' + '{letter}' * {times})\nf()").output
    assert output.startswith('Traceback (most recent call last):\n  File "<block 1>", line 3, in <module>\n    f()\n')
    assert '  File "<block 1>", line 2, in f\n' in output
    assert "\nValueError: wrong" in output
    assert output.endswith("\n[output cut here]\n")
    assert output.count("[output cut here]") == 1
    assert len(output) <= FAST.output // 2 + 1


def test_long_line_does_not_hide_the_error(session: Session) -> None:
    for block, message in (
        (f"1 / 0, '{'x' * 5000}'", "\nZeroDivisionError: division by zero\n"),
        (f"'{'x' * 5000}' = 1", "\nSyntaxError: cannot assign to literal"),
        ("raise ExceptionGroup('many', [ValueError('y' * 5000)])", "ExceptionGroup: many (1 sub-exception)\n"),
        ("try: 1 / 0\nexcept Exception as error: raise KeyError('z' * 5000) from error", "\nKeyError: 'zzz"),
    ):
        output = session.run(block).output
        assert message in output
        assert '  File "<block ' in output


@pytest.mark.parametrize(
    ("block", "status", "message"),
    [
        ("import sys; sys.exit()", "ok", ""),
        ("exit(0)", "ok", ""),
        ("quit(2)", "error", "SystemExit: 2"),
        ("raise SystemExit('why')", "error", "SystemExit: why"),
        ("raise KeyboardInterrupt", "error", "KeyboardInterrupt"),
        ("input('name? ')", "error", "EOFError"),
        ("class Odd(Exception):\n    def __str__(self): raise SystemExit\nraise Odd", "error", "Odd"),
        ("class Odd:\n    def __repr__(self): raise GeneratorExit\nOdd()", "error", "GeneratorExit"),
        ("import sys\nsys.stdout.close()", "ok", ""),
        ("import sys\nsys.stdout = sys.stderr = None", "ok", ""),
        ("import builtins\nbuiltins.print = builtins.repr = None", "ok", ""),
        ("import sys\nsys.modules.clear()", "ok", ""),
        ("globals().clear()", "ok", ""),
        ("import signal\nsignal.signal(signal.SIGALRM, lambda *_: 1 / 0)\nsignal.alarm(1) and None", "ok", ""),
        ("import os\nos.write = os.read = None", "ok", ""),
    ],
)
def test_session_survives_an_unusual_block(session: Session, block: str, status: str, message: str) -> None:
    ran = session.run(block)
    assert ran.status == status
    assert message in ran.output
    assert session.run("x = 1").status == "ok"


def test_dead_session_restarts_and_says_so(session: Session) -> None:
    session.run("x = 1")
    assert session.run("import os; os._exit(0)").status == "killed"
    assert session.run("x").output.startswith(f"{LOST}\nTraceback")
    assert session.run("y = 2\ny").output == "2\n"


@pytest.mark.parametrize("how", ["os.close(1); os.close(2)", "os.dup2(0, 1)"])
def test_session_that_can_no_longer_print_restarts(session: Session, how: str) -> None:
    assert session.run(f"import os; {how}").status == "killed"
    assert session.run("print('here')").output == f"{LOST}\nhere\n"


def test_output_that_a_block_redirected_and_restored(session: Session) -> None:
    session.run("import os; kept = os.dup(1); os.dup2(0, 1); os.dup2(kept, 1); os.close(kept)")
    assert session.run("print('here')").output == "here\n"


def test_interpreter_that_ended_between_blocks(session: Session) -> None:
    session.run("x = 1")
    assert session._process is not None
    session._process.stop()
    assert session.run("x").status == "killed"
    assert session.run("1").output == f"{LOST}\n1\n"


def test_interpreter_that_ended_while_idle_is_skipped(pool: PythonPool) -> None:
    for process in list(pool._idle)[:2]:
        assert isinstance(process, Process)
        process._process.kill()
        process._process.wait(20)
    with pool.session() as session:
        assert session.run("1").output == "1\n"


def test_too_long_a_block_is_not_run(session: Session) -> None:
    session.run("x = 1")
    ran = session.run("#" * (MOST_CODE + 1))
    assert (ran.status, ran.output) == ("error", f"[not run: more than {MOST_CODE} bytes of code]\n")
    assert session.run("#" * MOST_CODE).status == "ok"
    assert session.run("x").output == "1\n"


def test_many_threads_at_once(pool: PythonPool) -> None:
    def work(number: int) -> str:
        with pool.session() as session:
            session.run(f"x = {number}")
            return session.run("x ** 2").output

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(work, range(16))) == [f"{number**2}\n" for number in range(16)]


def test_too_many_open_files_of_the_trainer(pool: PythonPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reported as such, and everything opened before the error is closed."""
    while len(pool._idle) < 2:  # then the shared pool no longer starts interpreters
        time.sleep(0.01)
    before, pipe, calls = psutil.Process().num_fds(), os.pipe, count()

    def few() -> tuple[int, int]:
        if next(calls) % 4 == 3:
            raise OSError(errno.EMFILE, "Too many open files")
        return pipe()

    with monkeypatch.context() as patch:
        patch.setattr("gruppo.rollout.sandbox.interpreter.os.pipe", few)
        with pytest.raises(OSError, match="Too many open files"):
            Process(FAST, pool._bubblewrap, "mark")
    assert psutil.Process().num_fds() == before

    def full(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("gruppo.rollout.sandbox.interpreter.os.write", full)
        with pytest.raises(OSError, match="Too many open files"):
            Process(FAST, pool._bubblewrap, "mark")
    assert psutil.Process().num_fds() == before
    monkeypatch.setattr("gruppo.rollout.sandbox.pool.Process", type("Full", (Process,), {"__init__": full}))
    with pytest.raises(UsageError, match=r"too many files are open .*ulimit -n") as raised:
        PythonPool(FAST)
    assert "namespaces" not in str(raised.value)


def test_sandbox_outlives_the_thread_that_started_it(pool: PythonPool) -> None:
    sessions: list[Session] = []

    def begin() -> None:
        sessions.append(pool.session())
        sessions[0].run("x = 1")

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    with sessions[0] as session:
        assert session.run("x").output == "1\n"


def descendants(pool: PythonPool) -> list[psutil.Process]:
    processes = []
    for process in list(pool._living):
        outer = psutil.Process(process._process.pid)
        processes += [outer, *outer.children(recursive=True)]
    return processes


def test_closing_kills_running_blocks(pool: PythonPool) -> None:
    with PythonPool(FAST, ready=1) as inner:
        session, ended = inner.session(), []
        session.run("1")
        thread = threading.Thread(target=lambda: ended.append(session.run("while True: pass").status))
        thread.start()
        deadline = time.monotonic() + 20
        while len(left := descendants(inner)) < 3 and time.monotonic() < deadline:  # the next interpreter is starting
            time.sleep(0.01)
        assert len(left) >= 3
    thread.join(20)
    assert ended == ["killed"]
    assert psutil.wait_procs(left, timeout=20)[1] == []
    with pytest.raises(ValueError, match="the pool is closed"):
        inner.session().run("1")
    session.close()
    with pytest.raises(ValueError, match="the session is closed"):
        session.run("1")


def test_closed_session_leaves_no_process(pool: PythonPool) -> None:
    with pool.session() as session:
        session.run("1")
        assert session._process is not None
        outer = psutil.Process(session._process._process.pid)
        left = [outer, *outer.children(recursive=True)]
    assert not [process for process in left if process.is_running()]  # nor a zombie


def test_pool_leaves_no_descriptor_open(pool: PythonPool) -> None:
    while len(pool._idle) < 2:  # then the shared pool no longer starts interpreters
        time.sleep(0.01)
    before = psutil.Process().num_fds()
    with PythonPool(FAST, ready=1) as inner:
        for _ in range(3):
            with inner.session() as session:
                session.run("1")
    assert psutil.Process().num_fds() == before


def program(folder: Path, text: str) -> None:
    (folder / "bwrap").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "bwrap").chmod(0o755)


def test_refused_if_bubblewrap_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"needs bubblewrap.*apt install bubblewrap.*dnf install bubblewrap"):
        PythonPool()


def test_refused_if_bubblewrap_does_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program(
        tmp_path, '[ "$1" = --version ] && echo bubblewrap 0.8.0 && exit\necho "setting up uid map: no" >&2; exit 1'
    )
    with pytest.raises(UsageError, match=r'does not start: "setting up uid map: no".*sysctl -w'):
        PythonPool()
    program(tmp_path, "echo bubblewrap 0.6.1")
    with pytest.raises(UsageError, match=r"is bubblewrap 0.6.1: the sandbox needs bubblewrap 0.7 or later"):
        PythonPool()
    program(tmp_path, "exit 127")
    with pytest.raises(UsageError, match=r"does not run.*apt install bubblewrap"):
        PythonPool()


def test_refused_on_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(UsageError, match="needs Linux and bubblewrap; this is darwin"):
        PythonPool()


def test_refused_on_other_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(UsageError, match=r"x86_64 and aarch64; this one is riscv64"):
        PythonPool()


@pytest.mark.parametrize(
    "wrong",
    [
        {"seconds": 0}, {"seconds": float("nan")}, {"processor_seconds": float("inf")}, {"memory": 1000},
        {"memory": 1e9}, {"memory": 10**30}, {"file_size": 10**30}, {"temporary": 10**30}, {"open_files": 10**9},
        {"output": 10**30}, {"seconds": 10**30},
        {"output": 0}, {"open_files": 3}, {"temporary": -1}, {"seconds": True}, {"seconds": "5"},
    ],
)  # fmt: skip
def test_impossible_limits_are_refused(wrong: dict) -> None:
    with pytest.raises(UsageError, match=f"limits.{next(iter(wrong))} = "):
        Limits(**wrong)


@pytest.mark.parametrize("ready", [0, -1, 1.5, True])
def test_pool_without_ready_interpreters_is_refused(ready: object) -> None:
    with pytest.raises(UsageError, match="ready = "):
        PythonPool(ready=ready)  # type: ignore[arg-type]


def test_without_a_sandbox_only_with_the_explicit_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    limits = Limits(seconds=1, memory=300 * 2**20, output=500)
    with PythonPool(limits, 1, run_model_code_WITHOUT_A_SANDBOX=True) as pool, pool.session() as session:
        assert outputs(session, "x = 1", "x + 1") == ["", "2\n"]
        assert "secret" not in session.run("import os\nos.environ").output
        child = session.run("import os, time\nif not (child := os.fork()): time.sleep(1000)\nchild").output
        folder = session.run("os.getcwd()").output.strip("'\n")
        assert "gruppo-" in folder
        assert session.run("bytearray(10**10)").status == "memory"
        assert session.run("while True: pass").status == "time"
        assert session.run("1").output == f"{LOST}\n1\n"
    assert not psutil.pid_exists(int(child)) or psutil.Process(int(child)).status() == psutil.STATUS_ZOMBIE
    assert not os.path.exists(folder)


def test_interrupted_wait_ends_the_interpreter(pool: PythonPool, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(exchange: Exchange, patience: float) -> None:
        raise KeyboardInterrupt

    with pool.session() as session:
        session.run("x = 1")
        with monkeypatch.context() as patch:
            patch.setattr(Exchange, "step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                session.run("while True: pass")
        assert session.run("1").output == f"{LOST}\n1\n"
