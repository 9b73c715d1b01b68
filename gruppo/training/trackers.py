"""The trackers of a run: their processes, which the run starts, looks at after every step, and ends.

A tracker gets nothing from the run: it follows the run folder (`gruppo.runs.tracker_main`). So whatever it does, raise,
hang or die, the run computes the same and waits for nothing until its end.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from pathlib import Path

from gruppo.errors import UsageError
from gruppo.rollout.workers.log import LogFile, Output
from gruppo.rollout.workers.process import how_it_ended, python_command
from gruppo.rollout.workers.supervised import Supervised
from gruppo.runs.trackers import FOLDER
from gruppo.training.context import RunContext
from gruppo.utils.last_lines import last_lines_of
from gruppo.utils.waiting import waiting_for

FINISH_SECONDS = 30.0  # for all trackers of a run that has ended, to log and upload the rest
_LAST_LINES = 8  # of a tracker's log, in the event that it has ended

# Variables of launchers, with which accelerate would look for other processes of the run.
_LAUNCHER = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|(ACCELERATE|PMI|OMPI|MV2|TORCHELASTIC)_.*"
)


class Trackers:
    """The trackers of a run, which records the event `tracker` for each that does not end with it."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._alive: dict[str, _Process] = {}

    def start(self) -> None:
        """Start the processes, once the run is restored and its files are cut back."""
        folder, step = self._context.folder.path, self._context.state.step
        for name in self._context.recipe.run.trackers:
            try:
                (folder / FOLDER).mkdir(exist_ok=True)
                self._alive[name] = _Process(folder, name, step)
            except (OSError, UsageError) as error:
                self._record(name, f"could not be started ({error})", [])

    def check(self) -> None:
        """Record the trackers that have ended by themselves since the last call."""
        for name, process in list(self._alive.items()):
            if process.supervised.gone:
                del self._alive[name]
                self._record(name, f"has ended ({how_it_ended(process.supervised.exit_code())})", process.close())

    def finish(self) -> None:
        """Let the trackers log what is left, and end those that take too long."""
        self.check()
        if not self._alive:
            return
        for process in self._alive.values():
            process.let_end()
        try:
            with self._context.recorder.bar("Waiting for trackers", None, ""):
                self._wait(time.monotonic() + FINISH_SECONDS)
        finally:
            for process in self._alive.values():
                process.close()
            self._alive = {}

    def _wait(self, deadline: float) -> None:
        for name, process in self._alive.items():
            with waiting_for(f"tracker {name}"):
                code = process.wait(max(0.0, deadline - time.monotonic()))
            lines = process.close()
            if code is None:
                self._record(name, f"was ended, as it took longer than {FINISH_SECONDS:.0f} s after the run", lines)
            elif code:
                self._record(name, f"has ended ({how_it_ended(code)})", lines)

    def _record(self, name: str, why: str, lines: list[str]) -> None:
        """`why`: in words; `lines`: the last ones of its log."""
        recorder, step = self._context.recorder, self._context.state.step
        last = f": {lines[-1][:300]}" if lines else ""
        message = f"{name} {why}{last}; see {FOLDER}/{name}.log"
        recorder.event("tracker", message, step, tracker=name, output=lines)
        recorder.note(f"Step {step}: tracker {message}")


class _Process:
    """The process of one tracker, its log, and the pipe that tells it that the run has ended."""

    def __init__(self, folder: Path, name: str, step: int) -> None:
        self._log = LogFile(folder / FOLDER / f"{name}.log")
        self._output = Output(self._log.append)
        read, self._write = os.pipe()
        command = python_command("gruppo.runs.tracker_main", name, str(folder.absolute()), str(step), str(read))
        kept = {name: value for name, value in os.environ.items() if not _LAUNCHER.fullmatch(name)}
        environment = {**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._closed = False
        try:
            with self._output.open() as printer:
                self.supervised = Supervised(command, (read,), printer.descriptor, environment)
        except BaseException:
            os.close(self._write)
            self._output.close()
            raise
        finally:
            os.close(read)

    def let_end(self) -> None:
        """Tell the process that the run has ended."""
        with contextlib.suppress(OSError):  # it is dead
            os.write(self._write, b"\n")

    def wait(self, seconds: float) -> int | None:
        """The exit code, or minus the signal that ended the process; None if it does not end within some seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.supervised.process.wait(seconds)
        return self.supervised.process.returncode

    def close(self) -> list[str]:
        """End the process and everything that it has started. Returns the last lines of its log."""
        if self._closed:
            return []
        self._closed = True
        self.supervised.end()
        os.close(self._write)
        self._output.close()
        return last_lines_of(self._log.path)[-_LAST_LINES:]
