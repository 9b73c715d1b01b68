"""A pool of confined interpreters that are started in advance, and sessions that run blocks in them."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections import deque
from itertools import count

from gruppo.errors import RunError, UsageError
from gruppo.rollout.sandbox.bubblewrap import Limits, cannot_be_asked_for, find_bubblewrap, watch_for_leftovers
from gruppo.rollout.sandbox.interpreter import Process, Ran
from gruppo.rollout.sandbox.output import composed

MOST_CODE = 2**20  # bytes of a block
TRIES = 3  # to get an interpreter that has started
DEFAULT = Limits()
LOST = "[a fresh interpreter: what earlier blocks defined is lost]"


class PythonPool:
    """Interpreters for model-written code. Close the pool, or use it as a context manager."""

    def __init__(
        self,
        limits: Limits = DEFAULT,
        ready: int = 4,
        *,
        run_model_code_WITHOUT_A_SANDBOX: bool = False,  # noqa: N803  must not be overlooked
    ) -> None:
        """`ready`: how many interpreters are kept started. run_model_code_WITHOUT_A_SANDBOX runs the code without a
        sandbox, with the user's rights. Raises UsageError if this machine has no sandbox or it does not start."""
        if isinstance(ready, bool) or not isinstance(ready, int) or ready < 1:
            raise UsageError(f"ready = {ready!r}: must be the number of interpreters to keep started, at least 1")
        self.limits = limits
        self._bubblewrap = None if run_model_code_WITHOUT_A_SANDBOX else find_bubblewrap()
        self._ready = ready
        self._changed = threading.Condition()
        self._idle: deque[Process | Exception] = deque()
        self._living: set[Process] = set()
        self._waiting = 0
        self._closed = False
        self._mark = secrets.token_hex(16)
        self._watcher, self._alive = watch_for_leftovers(self._mark)
        # A sandbox ends with the thread that started it, so one thread that lives as long as the pool starts them all.
        self._starter = threading.Thread(target=self._start, name="sandbox", daemon=True)
        self._starter.start()
        try:
            first = self._take()
            with self._changed:
                self._idle.appendleft(first)
        except RunError as error:
            self.close()
            raise UsageError(str(error)) from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PythonPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def session(self) -> Session:
        """A session with its own interpreter, which it gets when it runs its first block."""
        return Session(self)

    def close(self) -> None:
        """Kill all interpreters, including those in use."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._starter.join()
        with self._changed:
            living, alive, self._alive = list(self._living), self._alive, -1
        for process in living:
            self._end(process)
        if alive >= 0:
            with contextlib.suppress(BrokenPipeError):
                os.write(alive, b".")
            os.close(alive)
            self._watcher.wait()

    def _start(self) -> None:
        """Start interpreters until the pool is closed."""
        while True:
            with self._changed:
                while len(self._idle) >= self._ready + self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
            try:
                started: Process | Exception = Process(self.limits, self._bubblewrap, self._mark)
            except Exception as error:  # noqa: BLE001  raised when an interpreter is requested
                started = error
            with self._changed:
                if isinstance(started, Process):
                    self._living.add(started)
                self._idle.append(started)
                self._changed.notify_all()

    def _take(self) -> Process:
        """An interpreter that waits for its first block. Raises RunError if none starts, even after retries: the reason
        may be temporary, such as a lack of memory."""
        for attempt in count(1):
            process = self._next()
            try:
                if isinstance(process, Exception):
                    raise RunError(cannot_be_asked_for(process))
                process.await_ready()
            except RunError:
                self._end(process)
                if attempt == TRIES:
                    raise
                continue
            except BaseException:
                self._end(process)
                raise
            if not process.gone:  # the system, for example, may have ended it while it was idle
                break
            self._end(process)
        assert isinstance(process, Process)
        return process

    def _next(self) -> Process | Exception:
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._idle or self._closed)
            finally:
                self._waiting -= 1
            if self._closed:
                raise ValueError("the pool is closed")
            self._changed.notify_all()
            return self._idle.popleft()

    def _end(self, process: Process | Exception) -> None:
        if isinstance(process, Exception):
            return
        process.close()
        with self._changed:
            self._living.discard(process)


class Session:
    """Runs the blocks of one completion. Later blocks see what earlier ones define.

    Use it from one thread at a time; close it, or use it as a context manager.
    """

    def __init__(self, pool: PythonPool) -> None:
        self._pool = pool
        self._process: Process | None = None
        self._lost = self._closed = False
        self._alone = threading.Lock()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, code: str) -> Ran:
        """Run a block and wait for its end.

        After "time", "memory" or "killed", the next block gets a fresh interpreter, and its output starts with a note
        about it. Raises ValueError if the session or the pool is closed, RunError if no interpreter starts.
        """
        with self._alone:
            if self._closed:
                raise ValueError("the session is closed")
            block = code.encode("utf-8", "surrogatepass")
            if len(block) > MOST_CODE:
                most = self._pool.limits.output
                return Ran(composed("", "", "", f"[not run: more than {MOST_CODE} bytes of code]", most), "error", 0.0)
            process = self._process = self._process or self._pool._take()
            try:
                ran = process.run(block, LOST if self._lost else "")
            except BaseException:
                self._end()
                raise
            if ran.status not in ("ok", "error"):
                self._end()
            else:
                self._lost = False
            return ran

    def close(self) -> None:
        """Kill the interpreter."""
        with self._alone:
            self._closed = True
            self._end()

    def _end(self) -> None:
        if self._process is not None:
            self._pool._end(self._process)
            self._process, self._lost = None, True
