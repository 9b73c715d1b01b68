"""What a model can use while it completes a prompt: Python in a sandbox, and environments of several turns."""

from gruppo.rollout.sandbox.bubblewrap import Limits
from gruppo.rollout.sandbox.interpreter import Ran, Status
from gruppo.rollout.sandbox.pool import PythonPool, Session

__all__ = ["Limits", "PythonPool", "Ran", "Session", "Status"]
