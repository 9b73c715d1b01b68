"""Nothing that a worker process starts outlives it, however it tries, and whoever is killed."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from gruppo.rollout.sandbox.reaper import marked
from gruppo.rollout.workers import supervisor
from gruppo.rollout.workers.supervised import Supervised

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Programs that try to outlive their parent. Each has a mark on its command line, which forked processes keep.
CHILD = "import time; time.sleep(1000)"
DAEMON = "import os, time\nif not os.fork():\n    os.setsid()\n    if not os.fork(): time.sleep(1000)\nos._exit(0)"
DEAF = "import signal, time\nfor n in range(1, 32):\n    if n not in (9, 19): signal.signal(n, signal.SIG_IGN)\n"
DEAF += "time.sleep(1000)"
STOPPED = "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)"
MANY = "import os, time\nfor _ in range(5): os.fork(); time.sleep(0.01)\ntime.sleep(1000)"
FLEES = "import os\nwhile True:\n    if os.fork(): os._exit(0)\n    {}"  # every process lives only for an instant
LEAVES = {
    "a child": f"subprocess.Popen([sys.executable, '-c', {CHILD!r}, mark])",
    "in its own session": f"subprocess.Popen([sys.executable, '-c', {CHILD!r}, mark], start_new_session=True)",
    "in its own process group": f"subprocess.Popen([sys.executable, '-c', {CHILD!r}, mark], process_group=0)",
    "with its own environment": f"subprocess.Popen([sys.executable, '-c', {CHILD!r}, mark], env={{}})",
    "a daemon": f"subprocess.run([sys.executable, '-c', {DAEMON!r}, mark], env={{}})",
    "deaf": f"subprocess.Popen([sys.executable, '-c', {DEAF!r}, mark], start_new_session=True, env={{}})",
    "stopped": f"subprocess.Popen([sys.executable, '-c', {STOPPED!r}, mark], start_new_session=True, env={{}})",
    "many": f"subprocess.Popen([sys.executable, '-c', {MANY!r}, mark], start_new_session=True, env={{}})",
    "through a shell": f"os.system(f'setsid {{sys.executable}} -c \"{CHILD}\" {{mark}} &')",
    "forked": "os.fork() or os.setsid() or time.sleep(1000)",
    "fleeing": f"subprocess.Popen([sys.executable, '-c', {FLEES.format('')!r}, mark], env={{}})",
    "fleeing into new sessions": f"subprocess.Popen([sys.executable, '-c', {FLEES.format('os.setsid()')!r}, mark])",
}
ALL = "\n".join(["import os, subprocess, sys, time", "mark = sys.argv[1]", *LEAVES.values(), "os.write(1, b'ready')"])
WAITS = f"{ALL}\nwhile True: time.sleep(1000)"
ENDS = f"{ALL}\nos._exit(3)"
TRAINER = """
import os, subprocess, sys, time
from gruppo.rollout.workers.supervised import Supervised
read, write = os.pipe()
run = Supervised([sys.executable, "-c", sys.argv[2], sys.argv[1]], (), write, dict(os.environ))
os.read(read, 5)
print(run.process.pid, flush=True)
{}
time.sleep(1000)
"""


@pytest.fixture
def mark() -> Iterator[str]:
    """A mark; at the end of the test, the processes with it are killed."""
    text = secrets.token_hex(16)
    yield text
    while not nothing_left(text):
        for number in marked(text.encode()):
            with contextlib.suppress(OSError):
                if (group := os.getpgid(number)) != os.getpgrp():
                    os.killpg(group, signal.SIGKILL)
                os.kill(number, signal.SIGKILL)


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether it holds once within a minute. Between two forks, a process may be missing from the next look."""
    deadline = time.monotonic() + 60
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return held


def nothing_left(mark: str) -> bool:
    """Whether no process with the mark lives, looked at often enough to see those that flee."""
    return not any(marked(mark.encode()) for _ in range(10))


def supervised(mark: str, code: str = WAITS) -> Supervised:
    read, write = os.pipe()
    process = Supervised([sys.executable, "-c", code, mark], (), write, dict(os.environ))
    os.close(write)
    assert os.read(read, 5) == b"ready"
    os.close(read)
    return process


def trainer(mark: str, more: str = "") -> tuple[subprocess.Popen[str], int]:
    """A process that runs WAITS under a supervisor. Returns it and the supervisor's id."""
    command = [sys.executable, "-c", TRAINER.format(more), mark, WAITS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_end_leaves_nothing(mark: str) -> None:
    process = supervised(mark)
    assert len(marked(mark.encode())) > len(LEAVES)
    process.end()
    assert nothing_left(mark)
    assert process.process.returncode == -signal.SIGKILL


def test_end_of_the_program_itself_leaves_nothing(mark: str) -> None:
    process = supervised(mark, ENDS)
    assert process.process.wait(60) == 3
    assert nothing_left(mark)
    process.end()


def test_killed_trainer_leaves_nothing(mark: str) -> None:
    process, _ = trainer(mark)
    process.kill()
    process.wait()
    assert eventually(lambda: nothing_left(mark))


def test_killed_trainer_leaves_nothing_even_if_a_fork_of_it_lives_on(mark: str) -> None:
    """The fork has its end of the socket."""
    process, _ = trainer(mark, "if not os.fork(): sys.argv[1:] = []; os.execv('/bin/sleep', ['sleep', '1000'])")
    process.kill()
    process.wait()
    assert eventually(lambda: nothing_left(mark))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def test_signals_that_a_terminal_sends_do_not_stop_the_supervisor(mark: str) -> None:
    process = supervised(mark)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        process.process.send_signal(number)
    time.sleep(0.1)
    assert not process.gone
    process.process.send_signal(signal.SIGSTOP)
    process.end()
    assert nothing_left(mark)


def test_killed_supervisor_takes_the_program_along(mark: str) -> None:
    """What the program has started is then found by its environment, by the trainer."""
    code = (
        f"import os, subprocess, sys, time\nmark = sys.argv[1]\n{LEAVES['in its own session']}\nos.write(1, b'ready')"
    )
    process = supervised(mark, f"{code}\ntime.sleep(1000)")
    process.process.kill()
    assert eventually(lambda: len(marked(mark.encode())) == 1)
    process.end()
    assert eventually(lambda: nothing_left(mark))


@pytest.mark.parametrize(
    ("code", "expected"),
    [("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", -9), ("os.kill(os.getpid(), 40)", -40), ("os.abort()", -6)],
)
def test_supervisor_ends_as_the_program_does(mark: str, code: str, expected: int) -> None:
    process = supervised(mark, f"import os, sys\nos.write(1, b'ready')\n{code}")
    assert process.process.wait(60) == expected
    process.end()


def test_program_gets_default_signals_and_a_session_of_its_own(mark: str) -> None:
    code = """
        import os, signal
        ignored = int(dict(line.split(":\\t") for line in open("/proc/self/status"))["SigIgn"], 16)
        ignored &= ~(3 << 31)  # 32 and 33 belong to the C library; make starts programs that ignore them
        assert ignored == 1 << 12 | 1 << 24, ignored  # those that Python itself ignores
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
        assert os.getsid(0) == os.getpid()
        assert sorted(map(int, os.listdir("/proc/self/fd")))[:3] == [0, 1, 2]
        assert len(os.listdir("/proc/self/fd")) == 4  # and the folder itself
        os.write(1, b"ready")
    """
    process = supervised(mark, textwrap.dedent(code))
    assert process.process.wait(60) == 0
    assert process.number(1) != process.process.pid
    process.end()


def test_program_that_waits_for_its_start_can_be_ended(mark: str) -> None:
    read, write = os.pipe()
    process = Supervised([sys.executable, "-c", "print('ready')"], (), write, {}, delay=1000)
    with pytest.raises(ProcessLookupError):
        process.number(0.2)
    process.end()
    assert process.process.returncode == 1
    os.close(write)
    assert os.read(read, 5) == b""


def test_program_that_does_not_exist(mark: str) -> None:
    process = Supervised(["/no/such/program"], (), 2, {})
    assert process.process.wait(60) == 127
    process.end()


PORTABLE = """
import sys
sys.argv[0:1] = []
from gruppo.rollout.workers import supervisor
supervisor._LINUX = False
supervisor.main()
"""


def test_system_without_adoption_finds_descendants_by_their_environment(mark: str, tmp_path: Path) -> None:
    import socket

    kinds = [LEAVES[kind] for kind in ("a child", "in its own session", "stopped")]
    daemon = f"subprocess.run([sys.executable, '-c', {DAEMON!r}, mark])"
    code = "\n".join(
        ["import os, subprocess, sys, time", "mark = sys.argv[1]", *kinds, daemon, "os.write(1, b'ready')"]
    )
    ours, theirs = socket.socketpair()
    arguments = [str(theirs.fileno()), str(os.getpid()), mark, "0", "", sys.executable, "-uc"]
    process = subprocess.Popen(
        [sys.executable, "-c", PORTABLE, "supervisor", *arguments, f"{code}\ntime.sleep(1000)", mark],
        pass_fds=(theirs.fileno(),),
        stdout=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, supervisor.MARK: mark},
    )
    theirs.close()
    assert process.stdout is not None
    assert process.stdout.read(5) == b"ready"
    assert eventually(lambda: len(marked(mark.encode())) >= 6)  # the daemon may be between two forks
    ours.close()
    process.wait(60)
    assert eventually(lambda: nothing_left(mark))


def test_processes_of_another_user_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They cannot be killed, and the supervisor does not wait for them forever."""

    def refused(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refused)
    monkeypatch.setattr(os, "killpg", refused)
    assert not supervisor._kill(psutil.Process().pid, 12345)
