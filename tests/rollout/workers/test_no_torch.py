"""Live worker processes of rewards and environments never import torch: it would cost each one seconds and memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from gruppo.config.sections import Environment
from gruppo.rollout.environments.client import EnvironmentHandle, ProcessEnvironments
from gruppo.rollout.workers.rewards import RewardPool
from gruppo.types import Prompt
from gruppo.utils.progress import NullProgress
from tests.conftest import make_completion

HEAVY = '{"torch", "transformers", "numpy", "vllm"}'
REWARD = f"""
import sys

def loaded(completions, **kwargs):
    return [float(len({HEAVY} & set(sys.modules)))] * len(completions)
"""
ENVIRONMENT = f"""
import sys

class Tools:
    def reset(self, **columns):
        pass

    def look(self, where: str) -> str:
        \"\"\"Look somewhere.

        Args:
            where: The place.
        \"\"\"
        return "loaded: " + " ".join({HEAVY} & set(sys.modules))
"""
CALL = '<tool_call>\n{"name": "look", "arguments": {"where": "here"}}\n</tool_call>'


@pytest.mark.parametrize("name", ["last_number", "regex", "choice", "think_format", "overlong", "repetition"])
def test_reward_workers(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(REWARD)
    mine = f"{tmp_path}/mine.py:loaded"
    options = {"regex": {"pattern": "a"}, "overlong": {"max_tokens": 8, "buffer_tokens": 4}}
    prompt = Prompt("t/0", "q", (1,), "t", {"answer": "4", "solution": "4"})
    completions = [make_completion([1, 2]), make_completion([1, 3])]
    pool = RewardPool([name, mine], [], ["answer"], timeout=30, workers=1, options={name: options.get(name, {})})
    with pool:
        (rewards,), _ = pool.score([(prompt, completions)], {"global_step": 1, "max_tokens": 8})
    assert [reward.failure for reward in rewards] == [None, None]
    assert [reward.parts["loaded"] for reward in rewards] == [0.0, 0.0]


def test_environment_workers(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(ENVIRONMENT)
    settings = Environment(name=f"{tmp_path}/mine.py:Tools", workers=1)
    environments = ProcessEnvironments(settings, [], None, NullProgress())
    try:
        handle = EnvironmentHandle(0, {}, 1)
        environments.answer([handle], lambda: None)
        handle.texts.append(CALL)
        (answer,) = environments.answer([handle], lambda: None)
    finally:
        environments.close()
    assert (answer.observations, answer.calls, answer.errors) == (("loaded: ",), 1, 0)
