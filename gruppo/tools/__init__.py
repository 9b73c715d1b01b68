"""What a model may use while it answers: Python, run in a sandbox (docs/sandbox.md)."""

from gruppo.tools.pool import PythonPool, Session
from gruppo.tools.process import Ran, Status
from gruppo.tools.sandbox import Limits

__all__ = ["Limits", "PythonPool", "Ran", "Session", "Status"]
