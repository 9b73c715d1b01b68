"""Reward functions in the style of open-r1, written from its documentation: one positional list of conversations,
columns by name, **kwargs for the rest; factories that take the settings."""

from __future__ import annotations

import asyncio
import math
import re

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

BOXED = LatexExtractionConfig(
    normalization_config=NormalizationConfig(basic_latex=True, units=True, boxed="all"),
    boxed_match_priority=0,
    try_extract_without_anchor=False,
)


def _is_correct(content, solution):
    """None if the solution cannot be parsed."""
    gold = parse(solution, extraction_mode="first_match")
    if not gold:
        return None
    return verify(gold, parse(content, extraction_config=[BOXED], extraction_mode="first_match"))


def accuracy_reward(completions: list[list[dict[str, str]]], solution: list[str], **kwargs) -> list[float | None]:
    contents = [completion[0]["content"] for completion in completions]
    correct = [_is_correct(content, sol) for content, sol in zip(contents, solution)]
    return [None if verdict is None else float(verdict) for verdict in correct]


def format_reward(completions, **kwargs):
    pattern = r"^<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>$"
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(pattern, content, re.DOTALL | re.MULTILINE) else 0.0 for content in contents]


def tag_count_reward(completions, **kwargs) -> list[float]:
    """A quarter for each of the four tags that occurs exactly once."""
    tags = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")
    return [sum(0.25 for tag in tags if completion[0]["content"].count(tag) == 1) for completion in completions]


def reasoning_steps_reward(completions, **kwargs):
    """1 for three or more steps ("Step 1:", "1.", a bullet, "First,"), less for fewer."""
    pattern = r"(Step \d+:|^\d+\.|\n-|\n\*|First,|Second,|Next,|Finally,)"
    return [min(1.0, len(re.findall(pattern, completion[0]["content"])) / 3) for completion in completions]


def len_reward(completions: list[list[dict[str, str]]], solution: list[str], **kwargs) -> list[float]:
    """Kimi 1.5: 0.5 - (length - shortest) / (longest - shortest), at most 0 for wrong answers."""
    contents = [completion[0]["content"] for completion in completions]
    lengths = [len(content) for content in contents]
    shortest, longest = min(lengths), max(lengths)
    if shortest == longest:
        return [0.0] * len(completions)
    rewards = []
    for content, sol, length in zip(contents, solution, lengths):
        value = 0.5 - (length - shortest) / (longest - shortest)
        rewards.append(min(0.0, value) if _is_correct(content, sol) is False else value)
    return rewards


def get_cosine_scaled_reward(
    min_value_wrong=-1.0, max_value_wrong=-0.5, min_value_correct=0.5, max_value_correct=1.0, max_len=1000
):
    def cosine_scaled_reward(completions, solution, **kwargs):
        rewards = []
        for completion, sol in zip(completions, solution):
            content = completion[0]["content"]
            low, high = (min_value_correct, max_value_correct)
            if not _is_correct(content, sol):
                low, high = (max_value_wrong, min_value_wrong)
            cosine = math.cos(len(content) / max_len * math.pi)
            rewards.append(float(low + 0.5 * (high - low) * (1.0 + cosine)))
        return rewards

    return cosine_scaled_reward


def get_repetition_penalty_reward(ngram_size: int, max_penalty: float):
    if max_penalty > 0:
        raise ValueError(f"max_penalty {max_penalty} should not be positive")

    def repetition_penalty_reward(completions, **kwargs) -> list[float]:
        rewards = []
        for completion in completions:
            words = completion[0]["content"].lower().split()
            grams = list(zip(*[words[start:] for start in range(ngram_size)]))
            if completion[0]["content"] == "" or not grams:
                rewards.append(0.0)
            else:
                rewards.append((1 - len(set(grams)) / len(grams)) * max_penalty)
        return rewards

    return repetition_penalty_reward


async def binary_code_reward(completions, verification_info: list[dict] | None = None, num_parallel=2, **kwargs):
    """1 if all tests pass; None if the language is unknown. `eval` stands in for the sandbox."""
    semaphore = asyncio.Semaphore(num_parallel)

    async def passed(completion, info):
        if info["language"] != "python":
            return None
        async with semaphore:
            await asyncio.sleep(0)
            code = re.findall(r"```python\n(.*?)```", completion[-1]["content"], re.DOTALL)
            cases = info["test_cases"]
            share = sum(eval(code[-1], {"x": case["input"]}) == case["output"] for case in cases) / len(cases)
            return 1.0 if share > 0.99 else 0.0

    return await asyncio.gather(*(passed(*pair) for pair in zip(completions, verification_info)))


cosine = get_cosine_scaled_reward(max_len=100)
repetition = get_repetition_penalty_reward(ngram_size=3, max_penalty=-1.0)
