"""Processes of Ray: Ray for the duration of a run, what its processes need, and why one of them has ended.

Ray reads its settings from the environment when it is imported, so they are set here. A package that imports Ray
imports this one first. What the user has set stays.
"""

import os

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",  # gruppo reports what ends a process, in a line; Ray would print a page
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
for _name, _value in _SETTINGS.items():
    os.environ.setdefault(_name, _value)
