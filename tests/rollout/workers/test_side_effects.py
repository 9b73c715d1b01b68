"""What a reward changes in its process does not reach the next one: it is restored, or the process is replaced."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gruppo.rollout.workers.rewards import RewardPool
from tests.rollout.workers.test_rewards import group

TWO = """
import ctypes, decimal, gc, json, locale, logging, math, os, random, resource, signal, socket, statistics, sys
import threading, time, warnings

kept = []  # what this file keeps between calls

def asyncio_runs():
    import asyncio
    return asyncio.get_event_loop().run_until_complete(asyncio.sleep(0, "slept"))

def changes(completions, code, log_extra, **_):
    exec(code[0], globals())
    log_extra("first", [os.getpid()] * len(completions))
    log_extra("kept", [len(kept)] * len(completions))
    return [1.0] * len(completions)

def sees(completions, probe, log_extra, **_):
    log_extra("second", [os.getpid()] * len(completions))
    log_extra("seen", [repr(eval(probe[0], globals()))] * len(completions))
    return [1.0] * len(completions)
"""
C_VARIABLE = "ctypes.CDLL(None).getenv(b'PLANTED')"
RESTORED = {
    "variable": ("os.environ['PLANTED'] = 'x'", "os.environ.get('PLANTED')"),
    "variable of programs": ("os.environ['PLANTED'] = 'x'", "os.popen('echo $PLANTED').read()"),
    "variable of the C library": ("os.putenv('PLANTED', 'x')", C_VARIABLE),
    "variable set in C": ("ctypes.CDLL(None).setenv(b'PLANTED', b'x', 1)", C_VARIABLE),
    "no variables": ("os.environ.clear()", "os.environ.get('PATH')"),
    "no variables in C": ("ctypes.CDLL(None).clearenv()", "os.popen('echo $HOME').read()"),
    "other mapping": ("os.environ = {}", "os.environ.get('PATH')"),
    "time zone": ("os.environ['TZ'] = 'Asia/Tokyo'; time.tzset()", "time.tzname, time.localtime(0)"),
    "folder": ("os.chdir('/')", "os.getcwd()"),
    "umask": ("os.umask(0o777)", "(os.umask(0), os.umask(18))[0]"),
    "locale": ("locale.setlocale(locale.LC_ALL, 'C.UTF-8')", "locale.setlocale(locale.LC_ALL)"),
    "handler": ("signal.signal(signal.SIGALRM, lambda *_: os._exit(1))", "signal.getsignal(signal.SIGALRM)"),
    "ignored signal": ("signal.signal(signal.SIGTERM, signal.SIG_IGN)", "signal.getsignal(signal.SIGTERM)"),
    "mask": ("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])", "signal.pthread_sigmask(0, [])"),
    "pending signal": (
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1]); os.kill(os.getpid(), signal.SIGUSR1)",
        "signal.sigpending(), signal.pthread_sigmask(0, [])",
    ),
    "alarm": ("signal.alarm(1)", "signal.getitimer(signal.ITIMER_REAL)"),
    "timer": ("signal.setitimer(signal.ITIMER_PROF, 1)", "signal.getitimer(signal.ITIMER_PROF)"),
    "path": ("sys.path.insert(0, '/planted')", "'/planted' in sys.path"),
    "other path": ("sys.path = ['/planted']", "'/planted' in sys.path"),
    "arguments": ("sys.argv[:] = ['planted']", "sys.argv"),
    "output": ("sys.stdout = open(os.devnull, 'w')", "sys.stdout.name"),
    "closed output": ("sys.stdout.close()", "sys.stdout.closed, print('printed')"),
    "descriptor": ("os.dup2(os.open(os.devnull, os.O_WRONLY), 1)", "os.fstat(1).st_ino == os.fstat(2).st_ino"),
    "hook": ("sys.excepthook = print", "sys.excepthook"),
    "built-in": ("import builtins; builtins.round = lambda x: 3", "round(1.2)"),
    "new built-in": ("import builtins; builtins.planted = 3", "'planted' in dir(__import__('builtins'))"),
    "deleted built-in": ("import builtins; del builtins.sorted", "sorted('ba')"),
    "trace function": ("sys.settrace(lambda *_: None)", "sys.gettrace()"),
    "profile function": ("sys.setprofile(lambda *_: None)", "sys.getprofile()"),
    "trace function of threads": ("threading.settrace(print)", "threading.gettrace()"),
    "recursion": ("sys.setrecursionlimit(150)", "sys.getrecursionlimit()"),
    "digits": ("sys.set_int_max_str_digits(700)", "sys.get_int_max_str_digits()"),
    "switch interval": ("sys.setswitchinterval(1)", "sys.getswitchinterval()"),
    "collection": ("gc.disable(); gc.set_threshold(1)", "gc.isenabled(), gc.get_threshold()"),
    "collection callbacks": ("gc.callbacks.append(print)", "gc.callbacks"),
    "warnings": ("warnings.simplefilter('error')", "warnings.filters[:2], warnings.warn('x')"),
    "other filters": ("warnings.filters = []; warnings.simplefilter('error')", "warnings.filters, warnings.warn('y')"),
    "captured warnings": ("logging.captureWarnings(True)", "warnings.showwarning"),
    "logging": (
        "logging.basicConfig(level=1); logging.disable()",
        "logging.root.handlers, logging.root.level, logging.root.manager.disable",
    ),
    "soft limit": ("resource.setrlimit(resource.RLIMIT_FSIZE, (9, -1))", "resource.getrlimit(resource.RLIMIT_FSIZE)"),
    "processors": ("os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])", "os.sched_getaffinity(0)"),
    "sockets": ("socket.setdefaulttimeout(0.001)", "socket.getdefaulttimeout()"),
    "stack size": ("threading.stack_size(2**16)", "threading.stack_size()"),
    "decimal": ("decimal.getcontext().prec = 3", "decimal.Decimal(1) / 7"),
    "other decimal": ("decimal.setcontext(decimal.Context(prec=3))", "decimal.Decimal(1) / 7"),
    "numpy": ("import numpy; numpy.seterr(all='raise')", "__import__('numpy').geterr()"),
    "random": ("random.seed(3)", "random.random()"),
    "numpy's random": ("import numpy; numpy.random.seed(3)", "__import__('numpy').random.random()"),
    "fault handler": ("import faulthandler; faulthandler.disable()", "__import__('faulthandler').is_enabled()"),
    "closed event loop": ("import asyncio; asyncio.get_event_loop().close()", "asyncio_runs()"),
    "no event loop": ("import asyncio; asyncio.run(asyncio.sleep(0))", "asyncio_runs()"),
    "own event loop": ("import asyncio; asyncio.set_event_loop(asyncio.new_event_loop())", "asyncio_runs()"),
    "event loop policy": (
        "import asyncio\nclass Mine(asyncio.DefaultEventLoopPolicy): pass\nasyncio.set_event_loop_policy(Mine())",
        "type(__import__('asyncio').get_event_loop_policy()).__name__",
    ),
    "importers": ("sys.meta_path.clear(); sys.path_hooks.clear()", "len(sys.meta_path) > 2, len(sys.path_hooks)"),
    "wakeup descriptor": ("signal.set_wakeup_fd(os.pipe2(os.O_NONBLOCK)[1])", "signal.set_wakeup_fd(-1)"),
    "temporary files": ("__import__('tempfile').tempdir = '/planted'", "__import__('tempfile').gettempdir()"),
    "mpmath": ("import mpmath; mpmath.mp.dps = 3", "str(__import__('mpmath').mp.pi)"),
    "blocking output": ("os.set_blocking(1, False)", "os.get_blocking(1)"),
    "dump": ("import faulthandler; faulthandler.dump_traceback_later(0.5, exit=True)", "time.sleep(1)"),
}  # fmt: skip
REPLACED = {
    "function": ("math.sqrt = lambda x: 3", "math.sqrt(4)"),
    "constant": ("math.pi = 3", "math.pi"),
    "other function of the same module": ("random.random = random.uniform", "random.random.__name__"),
    "deleted function": ("del json.dumps", "hasattr(json, 'dumps')"),
    "method": ("json.JSONEncoder.default = None", "json.JSONEncoder.default is None"),
    "added method": ("random.Random.random = lambda self: 0.5", "random.Random(1).random()"),
    "property": ("statistics.Fraction.numerator = 3", "statistics.Fraction(1, 2).numerator"),
    "hidden built-in": ("statistics.sum = lambda *_: 3", "'sum' in vars(statistics)"),
    "module": ("sys.modules['math'] = json", "__import__('math').__name__"),
    "fake module": (
        "import types; sys.modules['calendar'] = types.ModuleType('calendar')",
        "callable(__import__('calendar').month)",
    ),
    "module imported in the call": (
        "import colorsys; colorsys.rgb_to_hsv = lambda *_: 3",
        "__import__('colorsys').rgb_to_hsv(1, 1, 1)",
    ),
    "package": ("import sympy; sympy.sqrt = lambda x: 3", "__import__('sympy').sqrt(4)"),
    "wrapped function": (
        "import sympy, functools\n@functools.wraps(sympy.sqrt)\ndef w(*a): return 42\nsympy.sqrt = w",
        "__import__('sympy').sqrt(4)",
    ),
    "sys": ("sys.getsizeof = len", "sys.getsizeof is len"),
    "number of sys": ("sys.maxsize = 3", "sys.maxsize"),
    "gruppo": (
        "import gruppo.rewards.answers as a; a.exact_match = None",
        "__import__('gruppo.rewards.answers', fromlist=['x']).exact_match.__name__",
    ),
    "reload": ("import importlib; importlib.reload(json)", "json.JSONEncoder is json.encoder.JSONEncoder"),
    "thread": ("threading.Thread(target=time.sleep, args=(1000,)).start()", "threading.active_count()"),
    "daemon": ("threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()", "threading.active_count()"),
    "timer": ("threading.Timer(1000, print).start()", "threading.active_count()"),
    "raw thread": (
        "__import__('_thread').start_new_thread(lambda: time.sleep(1000), ()); time.sleep(0.2)",
        "len(sys._current_frames())",
    ),
    "hard limit": ("resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); os.setuid(65534)", "os.getuid()"),
}  # fmt: skip
KEPT = {
    "own module": "kept.append(1)",
    "new module": "import colorsys",
    "encoding": "open(__file__, encoding='ascii').read(1)",
    "library that patches others": "import typing_extensions, pydantic",
    "cache": "import re; re.compile('a' * 9)",
    "own thread pool": (
        "import concurrent.futures as f\nif not kept: kept.append(f.ThreadPoolExecutor(2))\n"
        "kept[0].submit(int).result()"
    ),
    "event loop in a thread": (
        "import asyncio\nif not kept:\n    kept.append(asyncio.new_event_loop())\n"
        "    threading.Thread(target=kept[0].run_forever, daemon=True).start()\n"
        "asyncio.run_coroutine_threadsafe(asyncio.sleep(0), kept[0]).result()"
    ),
    "package with lazy parts": "import numpy.testing, sympy; sympy.simplify('x + x')",
    "patch that is undone": "from unittest import mock\nwith mock.patch('math.sqrt'): math.sqrt(3)",
    "numbers": "import math_verify; math_verify.parse('$1/2$')",
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("two") / "two.py"
    path.write_text(TWO)
    return str(path)


def opened(file: str, log: Path | None = None) -> RewardPool:
    functions = [f"{file}:changes", f"{file}:sees"]
    return RewardPool(functions, [], ["code", "probe"], timeout=120, workers=1, log=log)


@pytest.fixture(scope="module")
def shared(file: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardPool]:
    with opened(file, tmp_path_factory.mktemp("log") / "rewards.log") as pool:
        yield pool


def seen(pool: RewardPool, code: str, probe: str) -> tuple[str, bool]:
    """What the second function sees after the first one, and whether it ran in the same process."""
    (reward,) = pool.score([group("a", code=code, probe=probe)], {})[0][0]
    assert reward.failure is None, reward.failure
    return str(reward.extra["seen"]), reward.extra["first"] == reward.extra["second"]


@pytest.mark.skipif(sys.platform != "linux", reason="some calls exist only there")
@pytest.mark.parametrize("case", RESTORED)
def test_change_is_restored(shared: RewardPool, case: str) -> None:
    code, probe = RESTORED[case]
    before = seen(shared, "import numpy" if "numpy" in case else "pass", probe)
    assert seen(shared, code, probe) == before
    assert before[1]


@pytest.mark.parametrize("case", REPLACED)
def test_process_is_replaced(shared: RewardPool, case: str) -> None:
    if case == "hard limit" and os.getuid():
        pytest.skip("needs root")
    code, probe = REPLACED[case]
    before = "True" if "fake" in case else seen(shared, "pass", probe)[0]
    reasons: list[str] = []
    shared.notify_of_restarts(reasons.append)
    shared._reported.clear()
    after = seen(shared, code, probe)
    assert after[1] is False
    assert after[0] == before
    assert reasons[-1].startswith("changes leaves something changed in its process (")


@pytest.mark.parametrize("case", KEPT)
def test_state_of_ones_own_is_kept(file: str, case: str) -> None:
    """Two rounds in the same process, and the second sees what the first has kept."""
    with opened(file) as pool:
        processes = set()
        for _ in range(3):
            (reward,) = pool.score([group("a", code=KEPT[case], probe="0")], {})[0][0]
            assert reward.failure is None, reward.failure
            processes |= {reward.extra["first"], reward.extra["second"]}
    assert len(processes) == 1
    assert reward.extra["kept"] == ("3" if case == "own module" else "1" if "if not kept" in KEPT[case] else "0")


GUARD = """
import os, subprocess
def guarded(completions, **_):
    os.environ["PLANTED"] = "1"
    os.putenv = os.unsetenv = os.getpid = os.kill = subprocess.Popen = None
    return [1.0] * len(completions)
def other(completions, **_):
    return [float("PLANTED" in os.environ) for _ in completions]
"""


def test_functions_that_are_taken_away(tmp_path: Path) -> None:
    """As in HumanEval's reliability_guard. The call counts, and another process runs the next function."""
    (tmp_path / "guard.py").write_text(GUARD)
    with RewardPool([f"{tmp_path}/guard.py:{name}" for name in ("guarded", "other")], [], [], workers=1) as pool:
        for _ in range(2):
            (reward,) = pool.score([group("a")], {})[0][0]
            assert reward.failure is None, reward.failure
            assert dict(reward.parts) == {"guarded": 1.0, "other": 0.0}


LOOPS = """
import asyncio
def closes(completions, **_):
    loop = asyncio.get_event_loop()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    return [1.0] * len(completions)
async def waits(completions, **_):
    await asyncio.sleep(0)
    kept.append(asyncio.get_running_loop())
    return [float(all(one is kept[0] for one in kept))] * len(completions)
kept = []
"""


def test_asynchronous_functions_keep_their_event_loop(tmp_path: Path) -> None:
    (tmp_path / "loops.py").write_text(LOOPS)
    with RewardPool([f"{tmp_path}/loops.py:{name}" for name in ("closes", "waits")], [], [], workers=1) as pool:
        for _ in range(3):
            (reward,) = pool.score([group("a")], {})[0][0]
            assert reward.failure is None, reward.failure
            assert dict(reward.parts) == {"closes": 1.0, "waits": 1.0}


def test_reason_is_reported_once(file: str) -> None:
    reasons: list[str] = []
    with opened(file) as pool:
        pool.notify_of_restarts(reasons.append)
        for _ in range(3):
            seen(pool, "math.sqrt = print", "0")
    assert len(reasons) == 1
    assert "math.sqrt" in reasons[0]


def test_random_numbers_depend_on_the_call_only() -> None:
    def draws(completions, **_):
        return [random.random() + float(np.random.random()) for _ in completions]

    def scores(workers: int, numbers: list[int]) -> dict[int, float | None]:
        groups = []
        for number in numbers:
            prompt, completions = group("a")
            object.__setattr__(prompt, "id", f"t/{number}")
            groups.append((prompt, completions))
        with RewardPool([draws], [], [], workers=workers, timeout=120) as pool:
            rewards, _ = pool.score(groups, {"global_step": 1})
        return {number: rows[0].total for number, rows in zip(numbers, rewards, strict=True)}

    one, other = scores(1, [1, 2, 3]), scores(2, [3, 1, 2])
    assert one == other
    assert len(set(one.values())) == 3
