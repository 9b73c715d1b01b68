"""What a model can use while it completes a prompt: Python in a sandbox, and environments of several turns."""

from gruppo.tools.pool import PythonPool, Session
from gruppo.tools.process import Ran, Status
from gruppo.tools.sandbox import Limits

__all__ = ["Limits", "PythonPool", "Ran", "Session", "Status"]
