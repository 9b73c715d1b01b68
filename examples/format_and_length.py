"""Reasoning between <think> and </think>, a right answer, and no more words than it takes.

python examples/format_and_length.py [run.steps=20 …]
"""

import sys

import gruppo


def brief(completion_ids, goal=80, **columns):
    """0 up to `goal` tokens, then falling linearly to -1 at twice as many."""
    return [-min(1.0, max(0.0, len(ids) / goal - 1)) for ids in completion_ids]


if __name__ == "__main__":
    recipe = {
        "run": {"name": "format", "steps": 40},
        "model": {"name": "smollm2-135m-instruct"},
        "task": {"name": "arithmetic", "system": "Reason between <think> and </think>, then give the number."},
        "reward": {"weights": [1.0, 0.5, 0.2]},
        "sampling": {"prompts_per_step": 16, "group_size": 8, "max_tokens": 160},
        "optimizer": {"learning_rate": 5e-6},
        "evaluation": {"questions": 128, "every": 10},
    }
    result = gruppo.train(recipe, reward=["last_number", "think_format", brief], overrides=sys.argv[1:])
    print(result.frame()[["reward/think_format/mean", "completion/length"]].dropna())
