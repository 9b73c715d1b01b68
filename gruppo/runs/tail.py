"""The lines of a growing file of a run folder, read as they are written."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gruppo.runs.reading import object_of, open_file

CHUNK = 8 * 2**20  # bytes that are read at once
LONGEST_LINE = 4 * 2**20  # bytes; a longer line is skipped
MARK = 256  # bytes before the end of what was read, which tell whether the file was cut back and written anew


@dataclass
class Tail:
    """The complete lines of a growing file, from where the last call ended.

    A file that was replaced, or cut back and written anew, is read from its beginning.
    """

    path: Path
    offset: int = 0
    inode: int = 0
    mark: bytes = b""
    seen: tuple[int, int] = (0, 0)  # size and time of change
    damaged: int = 0

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
        """Whether everything that was read before is void, and the objects of the lines that are new.

        A line that is no object is counted in `damaged` and skipped. A missing file has no lines, nor has a link or a
        pipe.
        """
        try:
            with open_file(self.path, links=False) as stream:
                found = os.fstat(stream.fileno())
                if (found.st_size, found.st_mtime_ns) == self.seen and found.st_ino == self.inode:
                    return False, []
                void = self._void(stream, found)
                if void:
                    self.offset, self.damaged, self.mark = 0, 0, b""
                self.inode, self.seen = found.st_ino, (found.st_size, found.st_mtime_ns)
                return void, self._lines(stream)
        except OSError:
            void = self.offset > 0
            self.offset, self.inode, self.mark, self.seen, self.damaged = 0, 0, b"", (0, 0), 0
            return void, []

    def _void(self, stream: Any, found: os.stat_result) -> bool:
        if self.offset == 0:
            return False
        if found.st_ino != self.inode or found.st_size < self.offset:
            return True
        stream.seek(self.offset - len(self.mark))
        return bool(stream.read(len(self.mark)) != self.mark)

    def _lines(self, stream: Any) -> list[dict[str, Any]]:
        objects, rest = [], b""
        stream.seek(self.offset)
        while chunk := stream.read(CHUNK):
            whole, newline, rest_after = (rest + chunk).rpartition(b"\n")
            rest = rest_after
            if newline:
                self.offset += len(whole) + 1
                self.mark = (whole + newline)[-MARK:]
                for line in whole.split(b"\n"):
                    content = object_of(line) if len(line) <= LONGEST_LINE else None
                    if content is not None:
                        objects.append(content)
                    elif line.strip():
                        self.damaged += 1
            if len(rest) > LONGEST_LINE:  # not the line of a run; skip to its end
                self.offset += len(rest)
                self.mark, rest = rest[-MARK:], b""
        return objects
