"""Hostile programs in the sandbox: each one fails, and a harmless block runs afterwards as if nothing had happened."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from gruppo.errors import UsageError
from gruppo.rollout.sandbox import Limits, PythonPool, Ran
from gruppo.rollout.sandbox.interpreter import MOST_FILES
from gruppo.rollout.sandbox.reaper import marked
from tests.rollout.workers.test_supervisor import eventually

MIB = 2**20
SECRET = "c4n4ry-of-the-environment"
LIMITS = Limits(seconds=10, processor_seconds=10, memory=120 * MIB, output=2000, file_size=MIB, temporary=4 * MIB)


def started(limits: Limits) -> PythonPool:
    try:
        return PythonPool(limits, ready=1)
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def pool() -> Iterator[PythonPool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET_TOKEN", SECRET)
        with started(LIMITS) as opened:
            yield opened


@pytest.fixture(scope="module")
def hasty() -> Iterator[PythonPool]:
    with started(Limits(seconds=1, processor_seconds=20, memory=120 * MIB, output=500)) as opened:
        yield opened


def attack(pool: PythonPool, code: str) -> Ran:
    """Run a block and return its result; check that its session and another one still run a harmless block."""
    with pool.session() as session, pool.session() as other:
        ran = session.run(textwrap.dedent(code))
        again = session.run("40 + 2")
        assert again.status == "ok"
        assert again.output.splitlines()[-1] == "42"
        assert ("is lost" in again.output) == (ran.status in ("time", "memory", "killed"))
        assert other.run("6 * 7") == Ran("42\n", "ok", pytest.approx(0, abs=20))
    assert len(ran.output) <= pool.limits.output
    return ran


def refused(pool: PythonPool, *attempts: str, preamble: str = "", errors: str = "OSError") -> None:
    """Check that every attempt raises, all in one block."""
    lines = ["import ctypes, os, sys", *textwrap.dedent(preamble).splitlines()]
    for attempt in attempts:
        lines += ["try:", f"    print('DONE', {attempt!r}, {attempt})", f"except {errors} as error:", "    print('no')"]
    ran = attack(pool, "\n".join(lines))
    assert (ran.output, ran.status) == ("no\n" * len(attempts), "ok")


CALL = textwrap.dedent("""
    libc = ctypes.CDLL(None, use_errno=True)
    def call(*arguments):
        ctypes.set_errno(0)
        done = libc.syscall(*arguments)
        if done == -1:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return done
    def number(x86_64, aarch64):
        return x86_64 if os.uname().machine == "x86_64" else aarch64
""")


def test_fork_bomb(pool: PythonPool) -> None:
    ran = attack(pool, "import os\nwhile True:\n    os.fork()")
    assert ran.status == "error"
    assert "PermissionError: [Errno 1]" in ran.output


def test_no_new_process_or_program_of_any_kind(pool: PythonPool) -> None:
    refused(
        pool,
        "os.fork()",
        "os.forkpty()",
        "subprocess.run(['/python/bin/python3', '-c', ''])",
        "multiprocessing.Process(target=print).start()",
        "os.posix_spawn(sys.executable, ['python'], {})",
        "os.execv(sys.executable, ['python'])",
        "threading.Thread(target=print).start()",
        "call(number(56, 220), 17, 0, 0, 0, 0)",  # clone, as fork calls it
        "call(435, ctypes.byref((ctypes.c_uint64 * 11)(0, 0, 0, 0, 17)), 88)",  # clone3
        "call(number(322, 281), -100, sys.executable.encode(), 0, 0, 0)",  # execveat
        "os.memfd_create('program')",
        preamble=f"import multiprocessing, subprocess, threading{CALL}",
        errors="(OSError, RuntimeError)",
    )
    assert attack(pool, "import os\nos.system('true') != 0").output == "True\n"


@pytest.mark.parametrize(
    "code",
    [
        "held = []\nwhile True:\n    held.append(bytearray(2**20))",
        "held = bytearray(10**12)",
        "held = 'x'\nwhile True:\n    held += held",
        "import mmap\nheld = [mmap.mmap(-1, 2**24) for _ in range(1000)]",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    ],
)
def test_memory_bomb(pool: PythonPool, code: str) -> None:
    ran = attack(pool, code)
    if "mmap" in code or "setrlimit" in code:
        assert ran.status == "error"
        assert "Cannot allocate memory" in ran.output or "not allowed to raise maximum limit" in ran.output
    else:
        assert ran.status == "memory"
        assert "MemoryError (line" in ran.output
        assert "120 MiB" in ran.output


def test_memory_outside_the_address_space_limit(pool: PythonPool) -> None:
    refused(
        pool,
        "os.memfd_create('x')",
        "call(number(29, 194), 0, 2**24, 0o1600)",  # shmget
        "call(number(240, 180), b'/x', 0o102, 0o600, 0)",  # mq_open
        "call(number(425, 425), 8, 0)",  # io_uring_setup
        "call(number(149, 228), 0, 4096)",  # mlock
        preamble=CALL,
    )


ENDLESS = [
    "while True:\n    pass",
    "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass",
    "import itertools\nsum(itertools.repeat(1))",
    "9 ** 9 ** 9 ** 9",
    "import time\ntime.sleep(1000)",
    "import signal\nsignal.pause()",
    "held = []\nwhile True:\n    try: held.append(bytearray(2**20))\n    except MemoryError: pass",
]


def test_endless_blocks_are_stopped(hasty: PythonPool) -> None:
    def stopped(code: str) -> Ran:
        with hasty.session() as session:
            return session.run(code)

    with ThreadPoolExecutor(len(ENDLESS)) as threads:
        for ran in threads.map(stopped, ENDLESS):
            assert (ran.status, ran.output) == ("time", "[stopped: a block may take 1 s]\n")
            assert ran.seconds >= 1


def test_output_before_a_timeout_is_shown(hasty: PythonPool) -> None:
    ran = attack(hasty, "print('begun')\nprint('half', end='')\nwhile True: pass")
    assert ran.output.startswith("begun\n")
    assert ran.status == "time"


def test_processor_time_is_counted_per_block() -> None:
    loop = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    with started(Limits(seconds=600, processor_seconds=0.5)) as pool, pool.session() as session:
        assert [session.run(loop).status for _ in range(3)] == ["ok"] * 3  # 0.9 s in all
        ran = session.run("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (-1, -1))\nwhile True: pass")
        assert (ran.status, ran.output) == ("time", "[stopped: a block may take 0.5 s of processor time]\n")


def test_endless_output_does_not_grow_the_pool(hasty: PythonPool) -> None:
    before = psutil.Process().memory_info().rss
    ran = attack(hasty, "while True:\n    print('x' * 1000)")
    assert ran.status == "time"
    assert ran.output.startswith("xxx")
    assert "[output cut here]" in ran.output
    written = attack(hasty, "import os\nwhile True:\n    os.write(1, b'y' * 2**20)")
    assert written.status in ("killed", "time")
    assert written.output.startswith("yyy")
    endless = attack(hasty, "import sys\nwhile True:\n    sys.stderr.write('z' * 1000)")  # without a line break
    assert endless.status == "time"
    assert psutil.Process().memory_info().rss - before < 64 * MIB


def test_long_output_is_truncated(pool: PythonPool) -> None:
    ran = attack(pool, "for i in range(30000):\n    print('ä' * 100)\nprint(1 / 0)")
    assert ran.status == "error"
    assert len(ran.output) == LIMITS.output
    assert "[output cut here]\nTraceback" in ran.output
    assert ran.output.endswith("ZeroDivisionError: division by zero\n")


def test_huge_files(pool: PythonPool) -> None:
    refused(
        pool,
        "open('/tmp/a', 'wb').write(bytes(2 * 2**20))",
        "os.truncate('/tmp/a', 2**40)",
        "[open(f'/tmp/{i}', 'wb').write(bytes(2**20)) for i in range(8)]",
        "os.ftruncate(os.open('/tmp/b', os.O_CREAT | os.O_RDWR), 2**30)",
    )
    refused(pool, "[open(f'/tmp/{i}', 'w') for i in range(1000)]")


def test_very_many_files(pool: PythonPool) -> None:
    ran = attack(pool, "import itertools\nfor i in itertools.count():\n    open(f'/tmp/{i}', 'w').close()")
    assert ran.status == "killed"
    assert str(MOST_FILES) in ran.output


def test_nothing_of_the_user_is_visible(pool: PythonPool, tmp_path: Path) -> None:
    (tmp_path / "canary").write_text(SECRET)
    places = [str(tmp_path / "canary"), str(Path.home()), str(Path.cwd()), __file__, "/proc/1/environ",
              "/proc/self/environ", "/etc/passwd", "/etc/hostname", "/var", "/run", "/sys", "/dev/shm", "/dev/tty",
              "/dev/sda", "/usr/local", "/usr/bin/env", "/home", "/root"]  # fmt: skip
    refused(pool, *(f"os.stat({place!r})" for place in places))
    ran = attack(pool, "import os\nprint(os.environ, os.environb)\nprint(sorted(os.listdir('/')))\nos.listdir('/tmp')")
    assert SECRET not in ran.output
    assert "PYTHONHASHSEED" not in ran.output
    names = {"dev", "etc", "lib", "lib64", "packages", "python", "tmp", "usr", "worker.py"}
    assert set(ran.output.splitlines()[-2].strip("[]").replace("'", "").split(", ")) <= names
    assert ran.output.splitlines()[-1] == "[]"
    ran = attack(pool, "import os, platform\nplatform.node(), os.getuid(), os.getpid() == 1, os.getcwd()")
    assert ran.output == "('sandbox', 65534, True, '/tmp')\n"


def test_no_descriptor_is_left_open(pool: PythonPool) -> None:
    kinds = """
        import os, stat
        found = []
        for number in range(4096):
            try:
                found.append(stat.S_IFMT(os.fstat(number).st_mode))
            except OSError:
                pass
        found == [stat.S_IFCHR] + [stat.S_IFIFO] * 4  # /dev/null, output twice, calls, answers
    """
    assert attack(pool, kinds).output == "True\n"


def test_nothing_outside_can_be_written(pool: PythonPool) -> None:
    before = os.stat("/dev/null")
    folders = ["/", "/usr/lib", "/etc", "/dev", "/packages", "/lib"]
    refused(
        pool,
        *(f"open({folder + '/made'!r}, 'w')" for folder in folders),
        *(f"os.mkdir({folder + '/made'!r})" for folder in folders),
        "open('/worker.py', 'a')",
        "open(os.__file__, 'a')",
        "os.remove('/worker.py')",
        "os.rename('/worker.py', '/tmp/x')",
        "os.link('/worker.py', '/tmp/x')",
        "os.chmod('/worker.py', 0o777)",
        "os.chmod('/dev/null', 0o600)",
        "os.chown('/dev/null', 65534, 65534)",
        "os.utime('/dev/null')",
        "os.truncate('/worker.py', 0)",
        "os.remove('/dev/null')",
        "os.mknod('/tmp/disk', 0o60666, os.makedev(8, 0))",
        "os.chroot('/tmp')",
        "call(number(165, 40), b'none', b'/tmp', b'tmpfs', 0, 0)",  # mount
        "call(number(166, 39), b'/tmp', 2)",  # umount2
        "call(number(272, 97), 0x10000000)",  # unshare
        "call(number(155, 41), b'/tmp', b'/tmp')",  # pivot_root
        "call(number(170, 161), b'x', 1)",  # sethostname
        "os.setuid(0)",
        "os.setgroups([0])",
        preamble=CALL,
    )
    after = os.stat("/dev/null")
    assert (after.st_mode, after.st_uid) == (before.st_mode, before.st_uid)
    assert stat.S_ISCHR(after.st_mode)


def test_shared_files_allow_no_locks_leases_or_watches(pool: PythonPool) -> None:
    """With them a block could stop a host process that opens the file, watch it, or talk to another session."""
    refused(
        pool,
        "fcntl.fcntl(file, 1024, 0)",  # F_SETLEASE, F_RDLCK
        "fcntl.fcntl(file, 1025)",  # F_GETLEASE
        "fcntl.fcntl(os.open('/', os.O_RDONLY), 1026, 0x80000001)",  # F_NOTIFY, DN_ACCESS and DN_MULTISHOT
        "fcntl.flock(file, fcntl.LOCK_SH)",
        "fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        *(f"fcntl.fcntl(file, {command}, bytes([0] * 32))" for command in (5, 6, 7, 36, 37, 38)),
        "fcntl.fcntl(file, fcntl.F_SETOWN, os.getpid())",
        "fcntl.fcntl(file, 1031, 2**20)",  # F_SETPIPE_SZ
        "call(number(72, 25), file.fileno(), ctypes.c_ulong(2**32 + 1024), 0)",  # the kernel takes the lower half
        preamble=f"import fcntl\nfile = open('/worker.py')\n{CALL}",
    )
    assert attack(pool, "import os\nos.get_blocking(os.dup(0)), os.get_inheritable(0)").status == "ok"


FUTEX = f"""
import ctypes, mmap, os
{CALL}
library = open(os.__file__, "rb")  # a file that all sessions see
page = mmap.mmap(library.fileno(), 4096, mmap.MAP_SHARED, mmap.PROT_READ)
address = int.from_bytes(ctypes.string_at(id(page) + 16, 8), "little")
value = int.from_bytes(page[:4], "little")
class Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))
def futex(operation, *rest):
    return call(number(202, 98), ctypes.c_void_p(address), operation, *rest)
"""


def test_sessions_cannot_signal_through_memory_that_they_share(pool: PythonPool) -> None:
    """A page of a file is the same futex for every process that maps it."""
    attempts = [
        "futex(0, ctypes.c_uint(value), ctypes.byref(Timespec(0, 1)))",  # FUTEX_WAIT
        "futex(1, 1)",  # FUTEX_WAKE
        "futex(9 | 256, ctypes.c_uint(value), ctypes.byref(Timespec(0, 1)), 0, -1)",  # FUTEX_WAIT_BITSET, realtime
        "futex(10, 1, 0, 0, -1)",  # FUTEX_WAKE_BITSET
        "futex(3, 1, 1, ctypes.c_void_p(address))",  # FUTEX_REQUEUE
        "call(449, 0, 0, 0, 0, 0)",  # futex_waitv
        "call(454, ctypes.c_void_p(address), 1, 1, 2)",  # futex_wake
    ]
    refused(pool, *attempts, preamble=FUTEX)
    private = "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire(timeout=0.01), futex(1 | 128, 1)"
    assert attack(pool, f"{FUTEX}\n{private}").output == "(False, 0)\n"


def test_sessions_share_no_other_kernel_objects(pool: PythonPool) -> None:
    refused(
        pool,
        "call(number(64, 190), 77, 1, 0o1666)",  # semget
        "call(number(68, 186), 77, 0o1666)",  # msgget
        "call(number(29, 194), 77, 4096, 0o1666)",  # shmget
        "call(number(240, 180), b'/x', 0o102, 0o600, 0)",  # mq_open
        "call(number(248, 217), b'user', b'x', b'y', 1, -4)",  # add_key
        "call(number(249, 218), b'user', b'x', 0, -4)",  # request_key
        "socket.socket(socket.AF_UNIX).bind(b'\\0gruppo')",
        "call(number(254, 27), 0, b'/', 1)",  # inotify_add_watch without inotify_init, which is refused
        "call(number(294, 26), 0)",  # inotify_init1
        "call(number(300, 262), 0, 0)",  # fanotify_init
        "call(number(27, 232), ctypes.c_void_p(address), 4096, ctypes.byref(ctypes.c_ubyte()))",  # mincore
        "call(number(221, 223), library.fileno(), 0, 0, 4)",  # fadvise64, POSIX_FADV_DONTNEED
        "os.preadv(library.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)",  # is it in the cache?
        preamble=f"import socket\n{FUTEX}",
    )


def test_timers_do_not_fill_the_users_signal_queue(pool: PythonPool) -> None:
    refused(pool, "call(number(222, 107), 0, 0, ctypes.byref(ctypes.c_int()))", preamble=CALL)
    assert attack(pool, "import resource\nresource.getrlimit(resource.RLIMIT_SIGPENDING)").output == "(16, 16)\n"


def test_databases_need_no_locks(pool: PythonPool) -> None:
    code = """
        import sqlite3
        for name in (":memory:", "file:/tmp/data?nolock=1"):
            with sqlite3.connect(name, uri=True) as base:
                base.execute("create table t as select 7 as n")
                print(base.execute("select n from t").fetchall())
    """
    ran = attack(pool, code)
    if "No module named" in ran.output or "ImportError" in ran.output:
        pytest.skip("there is no sqlite3 in the sandbox")
    assert ran.output == "[(7,)]\n[(7,)]\n"


def test_sockets(pool: PythonPool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        refused(
            pool,
            f"socket.create_connection(('127.0.0.1', {port}), 1)",
            "socket.socket(socket.AF_INET, socket.SOCK_STREAM)",
            "socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)",
            "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
            "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
            "socket.socketpair()",
            f"urllib.request.urlopen('http://127.0.0.1:{port}', timeout=1)",
            preamble="import socket, urllib.request",
        )
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_signals_to_others(pool: PythonPool) -> None:
    trainer = os.getpid()
    refused(
        pool,
        *(f"os.kill({number}, 9)" for number in (1, -1, 0, trainer, trainer + 1)),
        "os.kill(os.getppid(), 15)",
        "os.killpg(1, 9)",
        "signal.pthread_kill(threading.main_thread().ident, 9)",
        "signal.raise_signal(15)",
        "os.pidfd_open(1)",
        "call(number(157, 167), 1, 0, 0, 0, 0)",  # prctl, PR_SET_PDEATHSIG: to live on when bubblewrap ends
        "call(number(129, 138), 1, 9, 0)",  # rt_sigqueueinfo
        "call(number(234, 131), 1, 1, 9)",  # tgkill
        "call(number(200, 130), 1, 9)",  # tkill
        preamble=f"import signal, threading{CALL}",
    )


def test_tracing_and_reading_others(pool: PythonPool) -> None:
    refused(
        pool,
        "call(number(101, 117), 0, 0, 0, 0)",  # ptrace, PTRACE_TRACEME
        "call(number(101, 117), 16, 1, 0, 0)",  # PTRACE_ATTACH
        "call(number(310, 270), 1, 0, 0, 0, 0, 0)",  # process_vm_readv
        "call(number(311, 271), 1, 0, 0, 0, 0, 0)",  # process_vm_writev
        "call(number(321, 280), 0, 0, 0)",  # bpf
        "call(number(298, 241), 0, 0, -1, -1, 0)",  # perf_event_open
        "call(number(323, 282), 0)",  # userfaultfd
        "call(number(250, 219), 0, -3, 1)",  # keyctl
        "call(number(317, 277), 1, 0, 0)",  # seccomp
        "call(4000)",  # a call of the future
        "open('/proc/1/mem')",
        preamble=CALL,
    )


def test_call_from_another_architecture_ends_the_interpreter(pool: PythonPool) -> None:
    ran = attack(pool, "import ctypes\nctypes.CDLL(None).syscall(0x40000000 + 39)")  # getpid, as x32 calls it
    assert ran.status == "killed"
    assert "SIGSYS" in ran.output


def test_symlink_games(pool: PythonPool, tmp_path: Path) -> None:
    (tmp_path / "canary").write_text(SECRET)
    host = str(tmp_path)
    refused(
        pool,
        f"os.symlink({host!r} + '/canary', '/tmp/a'), open('/tmp/a').read()",
        f"os.symlink({host!r} + '/made', '/tmp/b'), open('/tmp/b', 'w')",
        f"os.symlink({host!r}, '/tmp/c'), os.listdir('/tmp/c')",
        "os.symlink('/tmp/d', '/tmp/d'), open('/tmp/d', 'w')",
        "os.symlink('/worker.py', '/tmp/e'), open('/tmp/e', 'a')",
        "os.symlink('/', '/tmp/f'), open('/tmp/f/made', 'w')",
        "os.symlink('../../../../../../root', '/tmp/g'), os.listdir('/tmp/g/')",
        "os.rename('/tmp', '/tmp2')",
        "os.rmdir('/tmp')",
        "os.symlink('/etc', '/tmp2')",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["canary"]


def test_sessions_have_separate_file_systems(pool: PythonPool) -> None:
    with pool.session() as one, pool.session() as other:
        one.run("open('/tmp/note', 'w').write('mine'); x = 1")
        assert one.run("open('/tmp/note').read(), x").output == "('mine', 1)\n"
        assert other.run("import os\nos.listdir('/tmp'), 'x' in globals()").output == "([], False)\n"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(): f()\nf()", "RecursionError"),
        ("import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()", ""),
        ("import sys\nsys.setrecursionlimit(10**9)\nclass A:\n    __repr__ = lambda s: repr(s)\nrepr(A())", ""),
        ("(" * 5000 + ")" * 5000, "SyntaxError"),
        ("-" * 100000 + "1", ""),
        ("x = []\nfor _ in range(10**5): x = [x]\nx", "RecursionError"),
    ],
)
def test_deep_recursion(pool: PythonPool, code: str, message: str) -> None:
    ran = attack(pool, code)
    assert ran.status != "ok"
    assert message in ran.output
    assert len(ran.output) <= LIMITS.output


def test_terminal_escapes_and_null_bytes(pool: PythonPool) -> None:
    ran = attack(pool, r"print('\x1b[31mred\x00\x07\u202e\x9b\r', 'kept: ä→√\t', '\ud800')")
    assert ran.output == "\\x1b[31mred\\x00\\x07\\u202e\\x9b\\r kept: ä→√\t \\ud800\n"
    ran = attack(pool, "import os\nos.write(1, b'\\xff\\xfe\\x1b]0;title\\x07') and None")
    assert ran.output == "\ufffd\ufffd\\x1b]0;title\\x07"
    ran = attack(pool, "raise ValueError('\\x1b[2J\\x00')")
    assert "ValueError: \\x1b[2J\\x00\n" in ran.output
    ran.output.encode()


@pytest.mark.parametrize("code", ["x = '\x00'", "'\ud800'", "print('a'\x00)", "\x1b[0m", "x = (", "\xff\xfe"])
def test_invalid_code(pool: PythonPool, code: str) -> None:
    ran = attack(pool, code)
    assert ran.status == "error"
    assert "Error" in ran.output
    assert not set(ran.output) & {"\x00", "\x1b", "\ud800"}


def test_block_that_ends_its_interpreter(pool: PythonPool) -> None:
    ran = attack(pool, "import os\nprint('so far')\nos._exit(3)")
    assert (ran.status, ran.output) == ("killed", "so far\n[the interpreter ended: exit code 3]\n")
    ran = attack(pool, "import ctypes\nctypes.string_at(0)")
    assert (ran.status, ran.output) == ("killed", "[the interpreter was killed: SIGSEGV]\n")
    ran = attack(pool, "import os\nos.abort()")
    assert ran.status == "killed"
    ran = attack(pool, "import os\nos.closerange(0, 4096)")
    assert ran.status == "killed"


def test_block_that_forges_answers(pool: PythonPool) -> None:
    """It can damage only its own session."""
    everywhere = "import os\nfor i in range(3, 4096):\n    try: os.write(i, b'x' * 1000)\n    except OSError: pass"
    assert attack(pool, everywhere).status == "killed"
    exact = """
        import os, struct, sys
        frame = sys._getframe()
        while "answers" not in frame.f_locals or "mark" not in frame.f_locals:
            frame = frame.f_back
        held = frame.f_locals
        os.write(held["answers"], struct.pack("=16sBH", held["mark"], 0, 0){more})
        {then}
    """
    with pool.session() as session:
        ran = session.run(textwrap.dedent(exact.format(more=" * 2", then="")))
        assert ran.status == "killed"
    with pool.session() as session:
        assert session.run(textwrap.dedent(exact.format(more="", then="while True: pass"))).status == "ok"
        process = session._process
        assert process is not None
        used = process._processor()
        threading.Event().wait(0.3)
        assert process._processor() - used < 0.1  # code that runs on after a forged answer is stopped
        assert pool.session().run("1 + 1").output == "2\n"


LIVES_WITH_THE_TRAINER = """
import sys, threading
from gruppo.rollout.sandbox import Limits, PythonPool
pool = PythonPool(Limits(seconds=600, processor_seconds=600), ready=3)
session, other = pool.session(), pool.session()
other.run("x = 1")
threading.Thread(target=session.run, args=("while True: pass",)).start()
print(pool._mark, flush=True)
sys.stdin.read()
"""


def test_killed_trainer_leaves_no_process(pool: PythonPool) -> None:
    """Not even processes that are still starting."""
    for _ in range(2):
        trainer = subprocess.Popen(
            [sys.executable, "-c", LIVES_WITH_THE_TRAINER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert trainer.stdout is not None
        mark = trainer.stdout.readline().strip()
        assert len(mark) == 32
        try:
            assert eventually(lambda mark=mark: len(marked(mark)) > 4)
            left = [psutil.Process(number) for number in marked(mark)]
        finally:
            trainer.kill()
            trainer.communicate()
        assert psutil.wait_procs(left, timeout=20)[1] == []
        assert marked(mark) == []
