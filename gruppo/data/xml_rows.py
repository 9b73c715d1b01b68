"""Rows of an XML file. No part of the file can name another file, or unpack to more than it contains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.parsers import expat

from gruppo.errors import UsageError
from gruppo.types import Row

DEPTH = 32  # maximum number of elements inside each other


_CHUNK = 2**16  # bytes that are parsed at a time


def read_xml(path: Path) -> Iterator[Row]:
    """Yield the rows of an XML file: its elements whose children contain no further elements.

    The columns are the row's attributes and children, with text as values, white space at both ends removed; empty
    children are "". Attributes of children are left out. Raises UsageError, during iteration, if the file is not XML,
    has a document type declaration (which could define entities) or more than `DEPTH` levels, if a row has two columns
    of the same name, or if there is text between the columns of a row.
    """
    rows = _Rows()
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                rows.parser.Parse(chunk, False)
                yield from rows.taken()
            rows.parser.Parse(b"", True)
            yield from rows.taken()
    except expat.ExpatError as error:
        raise UsageError(f"the file is not XML ({error}); give a complete XML file") from None
    except OSError as error:
        raise UsageError(f"the file cannot be read ({error}); give a readable file") from None


class _Element:
    """An open element. `children`: the texts of its children by name; `nested`: whether one of them has children."""

    def __init__(self, name: str, attributes: dict[str, str]) -> None:
        self.name, self.attributes = name, attributes
        self.text: list[str] = []
        self.children: list[tuple[str, str]] = []
        self.nested = False


class _Rows:
    """Collects rows while expat parses."""

    def __init__(self) -> None:
        self.parser = expat.ParserCreate()
        self.parser.buffer_text = True
        self.parser.StartDoctypeDeclHandler = self._doctype
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._characters
        self.open: list[_Element] = []
        self.rows: list[Row] = []

    def taken(self) -> list[Row]:
        """The rows that are complete, once."""
        taken, self.rows = self.rows, []
        return taken

    def _doctype(self, *_: object) -> None:
        raise UsageError(
            f"line {self.parser.CurrentLineNumber}: has a document type declaration (<!DOCTYPE …>), which could define "
            "entities; remove it and write entities out"
        )

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if len(self.open) == DEPTH:
            raise UsageError(
                f"line {self.parser.CurrentLineNumber}: has more than {DEPTH} elements inside each other; give a file "
                "with one element per row"
            )
        self.open.append(_Element(name, attributes))

    def _characters(self, text: str) -> None:
        self.open[-1].text.append(text)

    def _end(self, _: str) -> None:
        ended = self.open.pop()
        text = "".join(ended.text).strip()
        if ended.children and not ended.nested:
            self.rows.append(self._row(ended, text))
        if self.open:
            self.open[-1].children.append((ended.name, text))
            self.open[-1].nested |= bool(ended.children)
            if ended.children:
                self.open[-1].children = self.open[-1].children[-1:]  # not a row: nothing of it is needed

    def _row(self, element: _Element, text: str) -> Row:
        columns = [*element.attributes.items(), *element.children]
        row: Row = dict(columns)
        where = f"line {self.parser.CurrentLineNumber}: <{element.name}>"
        if len(row) < len(columns):
            raise UsageError(f"{where} has two columns of the same name ({', '.join(name for name, _ in columns)})")
        if text:
            raise UsageError(f"{where} has text between its columns ({text[:40]!r}); put it into an element")
        return row
