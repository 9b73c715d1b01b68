"""Tool use: the model calls a method of a class, reads the result, and is paid for a right answer.

python examples/tool_use.py [run.steps=20 …]
"""

import random
import sys

import gruppo


class Calculator:
    """Its public methods, other than `reset`, are the tools. The model sees their signatures and docstrings."""

    def reset(self, **row):
        """Begin a completion."""

    def multiply(self, a: int, b: int) -> int:
        """Multiply two numbers.

        Args:
            a: The first number
            b: The second number
        """
        return a * b


if __name__ == "__main__":
    pairs = [(random.Random(seed).randrange(11, 99), random.Random(-seed).randrange(11, 99)) for seed in range(1, 200)]
    rows = [{"prompt": [{"role": "user", "content": f"{a} * {b} = ?"}], "answer": str(a * b)} for a, b in pairs]
    recipe = {
        "run": {"name": "tools", "steps": 60},
        "model": {"name": "Qwen/Qwen2.5-0.5B-Instruct"},
        "environment": {"name": f"{__file__}:Calculator", "turns": 2},
        "sampling": {"prompts_per_step": 8, "group_size": 8, "max_tokens": 160},
        "optimizer": {"learning_rate": 2e-6},
    }
    result = gruppo.train(recipe, reward="last_number", prompts=rows, overrides=sys.argv[1:])
    print(result.frame()[["environment/called", "environment/errors", "reward/mean"]])
