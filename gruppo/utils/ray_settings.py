"""Settings of Ray, which it reads from the environment when it is imported. Ray itself is not imported here."""

from __future__ import annotations

import os

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",  # gruppo reports what ends an actor, in a line; Ray would print a page
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def set_ray_defaults() -> None:
    """Set what the user has not set. Packages that import Ray call this first."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
