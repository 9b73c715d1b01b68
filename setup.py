"""What the package index shows: the README without pictures, and with links that work there.

Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

REPOSITORY = ""  # The address of the repository's files, up to the last "/". Fill it in here, and only here.


def for_index(text: str) -> str:
    """A Markdown text without pictures. Links to files lead to the repository; without one, their text remains."""
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)\n*", "", text)
    target = rf"[\1]({REPOSITORY}\2)" if REPOSITORY else r"\1"
    return re.sub(r"\[([^\]]+)\]\((?!https?://|#)([^)]+)\)", target, text)


setup(
    long_description=for_index(Path(__file__).with_name("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    project_urls={"Repository": REPOSITORY} if REPOSITORY else {},
)
