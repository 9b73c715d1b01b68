"""Documents that hold everything they need: style sheets, scripts, and a policy that allows these scripts alone."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from gruppo.ui.app import static_file


def assets(scripts: Sequence[str], styles: Sequence[str]) -> dict[str, Any]:
    """The parts of a document with these files of the package, for a template: `policy`, `styles`, `scripts`, `icon`.

    The policy names the hash of each script; it forbids all others, and everything that would come from elsewhere.
    plotly sets styles, which are therefore allowed.
    """
    contents = [_script(name) for name in scripts]
    hashes = " ".join(f"'sha256-{_hash(content)}'" for content in contents)
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {hashes}",
            "style-src 'unsafe-inline'",
            "img-src data: blob:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    icon = base64.b64encode(_read("icon.svg").encode()).decode()
    return {
        "policy": policy,
        "styles": [Markup(_read(name)) for name in styles],
        "scripts": [Markup(content) for content in contents],
        "icon": f"data:image/svg+xml;base64,{icon}",
    }


def _read(name: str) -> str:
    path = static_file(name)
    assert path is not None, name
    return path.read_text(encoding="utf-8")  # with the line ends that a browser reads


def _script(name: str) -> str:
    """A script that can stand in a page: nothing in its texts ends the element. A browser reads the same program."""
    return re.sub("</(?=script)", r"<\\/", _read(name), flags=re.IGNORECASE).replace("<!--", "\\x3C!--")


def _hash(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
