"""In place of vLLM where it is not installed: a `vllm.LLM` that samples tokens from a list."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class StandIn:
    """Samples the same `tokens` in every completion, one in each step. It ends at the limit, or at an EOS token.

    `calls`: the names of all other methods that were called.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens, self.calls, self.llm_engine = tokens, list[str](), self
        self.running: dict[str, tuple[Any, int]] = {}

    def add_request(self, name: str, prompt: dict[str, Any], params: Any) -> None:
        self.running[name] = params, 0

    def abort_request(self, names: Sequence[str]) -> None:
        for name in names:
            del self.running[name]

    def step(self) -> list[Any]:
        outputs = []
        for name, (params, count) in list(self.running.items()):
            token = self.tokens[count]
            part = SimpleNamespace(token_ids=[token], logprobs=[{token: SimpleNamespace(logprob=-1.0)}])
            finished = count + 1 == params.max_tokens or token in params.stop_token_ids
            self.running[name] = params, count + 1
            if finished:
                del self.running[name]
            outputs.append(SimpleNamespace(request_id=name, outputs=[part], finished=finished))
        return outputs

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **named: self.calls.append(name)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `VllmEngine` find what it imports from vLLM."""
    for name, contents in (
        ("vllm", {"SamplingParams": SimpleNamespace}),
        ("vllm.sampling_params", {"RequestOutputKind": SimpleNamespace(DELTA="delta")}),
    ):
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
