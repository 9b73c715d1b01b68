"""What a program printed as text that is safe to show: to a reader, to a terminal, to a tokenizer."""

from __future__ import annotations

from gruppo.rollout.sandbox.worker_main import CUT


class Kept:
    """The first bytes of what was written, enough for so many characters; the rest is counted alone."""

    def __init__(self, characters: int) -> None:
        self.most = 4 * characters + 4
        self.data = bytearray()
        self.written = 0

    def add(self, chunk: bytes) -> None:
        """Take a chunk, or as much of it as there is room for."""
        self.written += len(chunk)
        self.data += chunk[: self.most - len(self.data)]


def printable(data: bytes | bytearray) -> str:
    r"""Lines of valid text: what is no UTF-8 as U+FFFD, and control characters, such as those that a terminal obeys,
    as Python writes them (\x1b, \x00, \u202e)."""
    text = data.decode("utf-8", "replace").replace("\r\n", "\n")
    if text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(each if each.isprintable() or each in "\n\t" else repr(each)[1:-1] for each in text)


def shortened(report: str, most: int) -> str:
    """At most so many characters of an error's report, whose parts a null character divides: of its frames the last,
    and the beginning of what it says, of which there is at least half."""
    frames, _, said = report.rpartition("\0")
    if len(frames) + len(said) <= most:
        return frames + said
    room = max(most // 2, most - len(frames))
    if len(said) > room:
        said = said[: max(0, room - len(CUT))] + CUT
    if len(frames) > most - len(said):
        frames = frames[len(frames) - max(0, most - len(said)) :]
        begin = frames.find('  File "')
        frames = frames[begin:] if begin >= 0 else ""
    return frames + said


def composed(head: str, text: str, report: str, note: str, most: int) -> str:
    """At most so many characters: `head`, as much of the text as there is room for, the report of an error, which may
    take half of them (`shortened`), and the note, which says how the block ended. Each begins on a line of its own."""
    report = shortened(report, most // 2)
    tail = "".join(f"{each.rstrip(chr(10))}\n" for each in (report, note) if each)
    if head:
        head += "\n"
    room = most - len(head) - len(tail)
    if text and tail and not text.endswith("\n"):
        text += "\n"
    if len(text) > room:
        text = text[: max(0, room - len(CUT))] + CUT
    return (head + text + tail)[:most]
