"""Rewards that damage their process in every possible way; most do so only for the completion "x"."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import locale
import os
import re
import signal
import subprocess
import sys
import threading
import time


def _catastrophe():
    re.match(r"(a+)+$", "a" * 40 + "b")  # hours, in C, holding the GIL


def holds_the_lock(completions, **_):
    if completions[0] == "x":
        _catastrophe()
    return [1.0] * len(completions)


def huge_power(completions, **_):
    if completions[0] == "x":
        return [10**10**9]
    return [1.0] * len(completions)


async def awaits_for_ever(completions, **_):
    if completions[0] == "x":
        await asyncio.Event().wait()
    return [1.0] * len(completions)


def stops_itself(completions, **_):
    if completions[0] == "x":
        os.kill(os.getpid(), signal.SIGSTOP)
    return [1.0] * len(completions)


def reads_null(completions, **_):
    if completions[0] == "x":
        ctypes.string_at(0)
    return [1.0] * len(completions)


def fills_the_memory(completions, **_):
    kept = []
    while completions[0] == "x":
        kept.append(b"x" * 2**24)
    return [1.0] * len(completions)


def closes_everything(completions, **_):
    if completions[0] == "x":
        os.closerange(0, 256)
    return [1.0] * len(completions)


def writes_everywhere(completions, **_):
    for descriptor in range(1024) if completions[0] == "x" else ():
        with contextlib.suppress(OSError):
            os.write(descriptor, b"\x00\x00\x00\x10 half a message")
    return [1.0] * len(completions)


def recursion(completions, **_):
    if completions[0] == "x":
        return recursion(completions)
    return [1.0] * len(completions)


def cancels(completions, **_):
    if completions[0] == "x":
        raise asyncio.CancelledError
    return [1.0] * len(completions)


def unprintable_error(completions, **_):
    class OddError(Exception):
        def __str__(self):
            raise SystemExit(3)

    if completions[0] == "x":
        raise OddError
    return [1.0] * len(completions)


def logs_too_much(completions, log_extra, **_):
    if completions[0] == "x":
        log_extra("text", ["x" * 2**27] * len(completions))
    return [1.0] * len(completions)


def never_ends(completions, **_):
    while completions[0] == "x":
        yield 1.0
    yield from (1.0 for _ in completions)


# Harmless misbehavior: this answer is correct, and so is the next one.


def generator(completions, **_):
    yield from (True for _ in completions)


def forks_and_both_return(completions, **_):
    os.fork()
    return [float(len(text)) for text in completions]


def leaves_an_alarm(completions, **_):
    signal.alarm(1)
    return [float(len(text)) for text in completions]


def patches_json(completions, **_):
    json.dumps = lambda *_, **__: "{}"
    json.JSONEncoder.default = None
    return [float(len(text)) for text in completions]


def changes_the_process(completions, **_):
    assert os.path.exists("pyproject.toml"), "the working directory is restored"
    os.chdir("/")
    os.environ.clear()
    locale.setlocale(locale.LC_ALL, "C")
    sys.stdout.write("on standard output\n")
    os.write(1, b"and on its descriptor\n")
    return [len(text) + 0.5 for text in completions]


def mutates(prompts, completions, answer, **_):
    values = [float(len(text)) for text in completions]
    for argument in (prompts, completions, answer):
        argument.clear()
    return values


def leaves_a_thread(completions, **_):
    threading.Thread(target=time.sleep, args=(1000,)).start()
    return [float(len(text)) for text in completions]


def leaves_processes(completions, log_extra, **_):
    """Leave a process in its own session, whose parent exits at once."""
    code = "import os, time\nif not os.fork():\n    os.setsid(); print(os.getpid(), flush=True); os.close(1)\n"
    code += "    time.sleep(1000)\nos._exit(0)"
    printed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True).stdout
    log_extra("process", [int(printed)] * len(completions))
    return [1.0] * len(completions)


def dies_later(completions, **_):
    threading.Timer(0.05, lambda: os._exit(7)).start()
    return [1.0] * len(completions)


def hides_its_thread(completions, **_):
    """The next call is never read, because a thread holds the GIL."""
    threading.Timer(0.05, _catastrophe).start()
    return [1.0] * len(completions)


def environment(completions, log_extra, **_):
    log_extra("environment", [json.dumps(dict(os.environ))] * len(completions))
    return [1.0] * len(completions)


def wants_a_key(completions, **_):
    return [float(len(os.environ["A_CERTAIN_KEY"]))] * len(completions)


def leaks(completions, **_):
    _leaked.append(b"x" * 10**8)
    return [1.0] * len(completions)


_leaked: list[bytes] = []


def says_why_and_dies(completions, **kwargs):
    print("not the last words", flush=True)
    if completions[0] != "x":
        return [1.0]
    held = bytearray(b"x") * (3 * 10**8)
    os.write(2, b"1\n2\n\n3\x1b[0m\n  the disk is full: \xff\n")
    os.kill(os.getpid(), signal.SIGKILL)
    return held
