"""The templates, and what they can use."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import JSONResponse

from gruppo.ui import text
from gruppo.ui.links import Links
from gruppo.utils.timing import duration_text


@dataclass(frozen=True)
class Encoded:
    """A value that is JSON already (see `gruppo.ui.text.json_block`), and the field `page` of the value."""

    text: str
    page: Mapping[str, Any]


_FOLDER = Path(__file__).parent / "templates"


class Templates:
    """The templates of the dashboard, with the links of a server or of a report. Everything is escaped.

    `first`: a folder of templates that come before those of the same name. `finalize`: called with every value before
    it is escaped.
    """

    def __init__(self, links: Links, first: str = ".", finalize: Callable[[Any], Any] | None = None) -> None:
        self.links = links
        self.environment = Environment(
            loader=FileSystemLoader([_FOLDER / first, _FOLDER]),
            autoescape=True,
            finalize=finalize,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.environment.globals["links"] = links
        self.environment.filters.update(
            shown=text.shown,
            shown_lines=text.shown_lines,
            number=text.number,
            numbers=text.numbers,
            percent=text.percent,
            bytes=text.size,
            height=text.height,
            duration=duration_text,
            points=text.points,
            low=text.lowest,
            high=text.highest,
            json=lambda value: Markup(value.text if isinstance(value, Encoded) else text.json_block(value)),
        )

    def render(self, name: str, **values: Any) -> str:
        """A template as text. Halves of characters, which JSON and names of files can contain, become "?"."""
        content = self.environment.get_template(name).render(**values)
        return content.encode("utf-8", "replace").decode()


class Data(JSONResponse):
    """JSON in ASCII: texts of runs can contain halves of characters, which UTF-8 cannot. NaN must not be in it."""

    def render(self, content: Any) -> bytes:
        """The body of the answer."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")
