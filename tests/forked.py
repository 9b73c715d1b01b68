"""The command line in processes that are forked from one that has imported gruppo, so that a start takes a fraction of
a second. Nothing in the parent may run torch."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import psutil

import gruppo.cli.main
import gruppo.training.loop
import gruppo.training.setup
from tests.conftest import make_policy

MARK = "GRUPPO_TORTURE"  # environment variable of a run, inherited by every process that it starts


def around(target: str, before: Callable[[], None], after: Callable[[], None]) -> None:
    """From now on, do something before and after every call of a function of gruppo."""
    place, _, attribute = target.rpartition(".")
    original = resolve_name(target)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before()
        result = original(*args, **kwargs)
        after()
        return result

    setattr(resolve_name(place), attribute, wrapped)


def save_tiny_model(folder: Path) -> None:
    """Save the model of the runs, in a process of its own: no torch thread may ever run in the one that forks."""
    if os.fork() == 0:
        from gruppo.models.weights import save_model

        save_model(make_policy(initializer_range=0.02), folder)
        os._exit(0)
    os.wait()


def fork_command(command: Sequence[str], log: Path, mark: str, prepare: Callable[[], Callable[[], None]]) -> int:
    """Run the command line's main in a forked process with a session of its own. Returns its process id.

    `log`: gets its output, and the stack of every thread at SIGUSR1. `prepare`: is called first, and what it returns
    last, both in the process.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        os.environ[MARK] = mark
        at_the_end = prepare()
        sys.argv = list(command)
        try:
            gruppo.cli.main.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stdout.flush()
        at_the_end()
    except BaseException:  # noqa: BLE001  this process must never return into the parent's code
        traceback.print_exc()
    finally:
        os._exit(code)


def survivors(mark: str) -> list[psutil.Process]:
    """Live processes that a run has started."""
    alive = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


def end_survivors(mark: str, everything: bool, patience: float) -> list[str]:
    """Kill the processes of a dead run (`everything`) or wait for them; returns the commands of those still alive."""
    if everything:
        for process in survivors(mark):
            with contextlib.suppress(psutil.Error):
                process.kill()
    _, alive = psutil.wait_procs(survivors(mark), patience)
    commands = [" ".join(process.cmdline()) for process in alive]
    for process in alive:
        process.kill()
    return commands
