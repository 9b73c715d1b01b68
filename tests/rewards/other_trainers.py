"""Functions with the signatures of verl and of verifiers' classic rubrics."""

from __future__ import annotations

import asyncio


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    """verl: a weight that depends on the data source, or 0."""
    weight = {"openai/gsm8k": 1.0}.get(data_source, 0.5)
    return weight if solution_str.split()[-1:] == [str(ground_truth)] else 0.0


def with_parts(solution_str, ground_truth, extra_info, bonus=0.0):
    right = solution_str == ground_truth
    return {"score": right + bonus, "acc": right, "difficulty": extra_info["difficulty"], "pred": solution_str}


async def judged(data_source, solution_str, ground_truth, extra_info=None):
    await asyncio.sleep(0.01)
    if solution_str == "broken":
        raise RuntimeError("no judge")
    return float(len(solution_str))


def runs_its_own_loop(data_source, solution_str, ground_truth):
    return asyncio.run(judged(data_source, solution_str, ground_truth))


def without_score(solution_str):
    return {"acc": 1.0}


def needs_a_tokenizer(solution_str, tokenizer):
    return 0.0


def exact_answer(completion, answer):
    """verifiers: one reward per rollout, with arguments passed by name."""
    return 1.0 if completion[-1]["content"] == answer else 0.0


async def asked(prompt, completion, **kwargs):
    await asyncio.sleep(0)
    assert sorted(kwargs) == ["answer", "info", "state", "task"]
    return float(len(prompt) + len(completion[-1]["content"]))


def reads_the_state(state, info, task, scale=1.0):
    assert state["completion"][-1]["content"] == state["responses"][-1]
    assert (state["info"], state["task"], state["turn"]) == (info, task, 1)
    return scale * info.get("level", 0) if task == "sums" else -1.0


def fails_on_empty(completion):
    return 1 / len(completion)


class Judge:
    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, completion) -> float:
        return self.value
