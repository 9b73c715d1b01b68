"""stub until merge"""

from typing import Any

BENCHMARKS: dict[str, Any] = {}
