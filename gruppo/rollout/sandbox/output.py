"""Program output as text that is safe to show to a reader, a terminal or a tokenizer."""

from __future__ import annotations

from gruppo.errors import escaped
from gruppo.rollout.sandbox.worker_main import CUT


class Kept:
    """Keeps the first bytes of an output, enough for `characters` characters. The rest is only counted."""

    def __init__(self, characters: int) -> None:
        self.most = 4 * characters + 4
        self.data = bytearray()
        self.written = 0

    def add(self, chunk: bytes) -> None:
        """Add a chunk, or as much of it as fits."""
        self.written += len(chunk)
        self.data += chunk[: self.most - len(self.data)]


def printable(data: bytes | bytearray) -> str:
    r"""The data as valid text. Invalid UTF-8 becomes U+FFFD; control characters, which a terminal would interpret, and
    other invisible characters are escaped as in Python (\x1b, \x00, \u202e, \u3164)."""
    return escaped(data.decode("utf-8", "replace").replace("\r\n", "\n"), keep="\n\t")


def shortened(report: str, most: int) -> str:
    """Shorten the report of an error to at most `most` characters.

    A null character separates the traceback frames from the message. The last frames and the beginning of the message
    are kept; the message gets at least half of the characters if it needs them.
    """
    frames, _, message = report.rpartition("\0")
    if len(frames) + len(message) <= most:
        return frames + message
    room = max(most // 2, most - len(frames))
    if len(message) > room:
        message = message[: max(0, room - len(CUT))] + CUT
    if len(frames) > most - len(message):
        frames = frames[len(frames) - max(0, most - len(message)) :]
        begin = frames.find('  File "')
        frames = frames[begin:] if begin >= 0 else ""
    return frames + message


def composed(head: str, text: str, report: str, note: str, most: int) -> str:
    """Compose the output of a block, at most `most` characters.

    It consists of `head`, as much of the text as fits, the report of an error (`shortened` to at most half of the
    characters), and the note, which says how the block ended. Each part starts on its own line.
    """
    report = shortened(report, most // 2)
    tail = "".join(f"{part.rstrip(chr(10))}\n" for part in (report, note) if part)
    if head:
        head += "\n"
    room = most - len(head) - len(tail)
    if text and tail and not text.endswith("\n"):
        text += "\n"
    if len(text) > room:
        text = text[: max(0, room - len(CUT))] + CUT
    return (head + text + tail)[:most]
