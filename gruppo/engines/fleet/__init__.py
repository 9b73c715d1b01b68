"""Many engines behind one: actors of Ray, each with a native engine or vLLM.

Ray reads its settings from the environment when it is imported, so they are set here, before the modules of this
package import it. What the user has set stays.
"""

import os

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",  # gruppo reports what ends an engine, in a line; Ray would print a page
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
for _name, _value in _SETTINGS.items():
    os.environ.setdefault(_name, _value)
