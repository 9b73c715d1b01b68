"""The main loop of the processes that run rewards and environments: it answers the trainer's messages one by one."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

from gruppo.rollout.workers.channel import MOST_BYTES
from gruppo.rollout.workers.limits import confine

# Own references, because user code may patch modules.
encode, _getpid, _exit = json.JSONEncoder().encode, os.getpid, os._exit


def serve_pipes(answer: Callable[[bytes], Mapping[str, Any]], too_large: str) -> None:
    """Answer messages, as JSON with the number of the message, until the trainer closes the pipe.

    `too_large`: the failure if an answer is too large, with {size} and {most} for its bytes and their limit. Ctrl-C is
    ignored. Arguments on the command line: the two pipe ends, and the memory limit in bytes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    read, write, memory = (int(argument) for argument in sys.argv[1:4])
    confine(memory)
    calls, answers, process = Connection(read, writable=False), Connection(write, readable=False), _getpid()
    for number in count(1):
        try:
            content = calls.recv_bytes()
        except EOFError:
            return
        answered = answer(content)
        if _getpid() != process:
            _exit(0)  # a child that user code forked and that returned from the call
        encoded = encode({**answered, "number": number}).encode()
        if len(encoded) > MOST_BYTES:
            failure = too_large.format(size=len(encoded), most=MOST_BYTES)
            encoded = encode({"failure": failure, "number": number}).encode()
        answers.send_bytes(encoded)
