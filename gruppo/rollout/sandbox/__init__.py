"""A sandbox for Python code that a model writes."""

from gruppo.rollout.sandbox.bubblewrap import Limits
from gruppo.rollout.sandbox.interpreter import Ran, Status
from gruppo.rollout.sandbox.pool import PythonPool, Session

__all__ = ["Limits", "PythonPool", "Ran", "Session", "Status"]
