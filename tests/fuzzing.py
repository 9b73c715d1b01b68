"""Helpers of the property-based tests: number of examples, definition of a clear error, and strategies for values.

Every run tries the same examples. GRUPPO_FUZZ=40 tries forty times as many (see `make fuzz`); the end of pytest's
output says how many were tried.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import wraps
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gruppo.config.loading import RecipeError
from gruppo.errors import RunError, UsageError

TIMES = int(os.environ.get("GRUPPO_FUZZ", "1"))
tried = 0


def examples(count: int, **strategies: st.SearchStrategy) -> Callable:
    """Run the test on `count` examples (times GRUPPO_FUZZ), and count them in `tried`."""

    def decorate(test: Callable) -> Callable:
        @wraps(test)
        def counted(*args: Any, **arguments: Any) -> None:
            global tried
            tried += 1
            test(*args, **arguments)

        checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
        limited = settings(
            max_examples=count * TIMES, deadline=None, derandomize=True, database=None, suppress_health_check=checks
        )
        return limited(given(**strategies)(counted))

    return decorate


@contextmanager
def clear() -> Iterator[None]:
    """Assert that the block succeeds or raises a user-facing error with a clear message.

    The message must be one line that can be encoded; a `RecipeError` has one line per mistake.
    """
    try:
        yield
    except (UsageError, RunError) as error:
        message = error
    else:
        return
    lines = str(message).encode().decode().splitlines()
    assert lines, "an error without a message"
    assert all(line.strip() for line in lines), f"an empty line: {lines}"
    assert isinstance(message, RecipeError) or len(lines) == 1, f"several lines: {lines}"


def command(*arguments: str) -> tuple[int, str, str]:
    """Run the command line in this process; returns exit code, standard output and standard error.

    Any exception other than SystemExit fails the test.
    """
    from gruppo.cli.main import main

    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
    code = 0
    with mock.patch.object(sys, "argv", ["gruppo", *arguments]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 0 if exit_.code is None else 1
    return code, *(stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]


def said_clearly(code: int, err: str) -> None:
    """Assert that the command succeeded, or failed with a clear message and an exit code of at most 2."""
    assert code in (0, 1, 2)
    assert "Traceback" not in err
    assert code == 0 or any(line.startswith(("gruppo: ", "Error: ", "Usage: ")) for line in err.splitlines())


# Text that users may pass: letters, strings with a special meaning somewhere, and (in ANY_TEXT) lone surrogates.
ODD_TEXT = st.sampled_from([
    "", " ", "\n", "a", "ab", "assistant", "user", "system", "{question}", "{", "}}", "{{ x }}", "\x00", "\x1b[31m",
    "﷽", "1/0", "-5", "1,000", "1e999", "NaN", "#### 4", "\\boxed{", "$x$", "<answer>3</answer>", "<think>", "../..",
    "~", "~a", "a:b", "arithmetic", "reasoning-gym/", "x.jsonl", "١٢", "²", "\u2028", "🙂", "e\u0301", "\r\n", "a\tb",
    '"', "'", "\\",
])  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12) | ODD_TEXT
ANY_TEXT = TEXT | st.text(max_size=6) | st.sampled_from(["\ud800", "a\udfff"])
NUMBERS = st.integers(-3, 40) | st.integers() | st.sampled_from([2**31, 2**63, 10**400, -(2**64)]) | st.floats()


def values(leaves: st.SearchStrategy, keys: st.SearchStrategy) -> st.SearchStrategy:
    """Nested lists and tables of `leaves`."""
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=6
    )


TOML_VALUES = values(st.booleans() | NUMBERS | TEXT | st.dates() | st.datetimes() | st.times(), TEXT)
JSON_VALUES = values(st.none() | st.booleans() | NUMBERS | ANY_TEXT, ANY_TEXT)
