"""GRPO on GSM8K with a rule: an answer is right if it equals the reference, symbolically.

python examples/gsm8k.py                                       (data from the hub)
python examples/gsm8k.py --data DIR run.steps=20               (a folder with gsm8k_train.jsonl and gsm8k_test.jsonl)
"""

import argparse

import gruppo

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", help="folder with local copies; without it, the hub")
    parser.add_argument("overrides", nargs="*", help="changes to the recipe, such as run.steps=20")
    arguments = parser.parse_intermixed_args()
    task = {"name": "gsm8k", "options": {"data": arguments.data} if arguments.data else {}}
    recipe = {
        "run": {"name": "gsm8k", "steps": 200, "checkpoint_every": 50},
        "model": {"name": "Qwen/Qwen2.5-0.5B-Instruct"},
        "task": task,
        "reward": {"functions": ["math_verify"]},
        "method": {"name": "dapo"},
        "sampling": {"prompts_per_step": 32, "group_size": 8, "max_tokens": 384},
        "optimizer": {"learning_rate": 1e-6},
        "evaluation": {"task": task, "questions": 256, "every": 50, "grader": "numeric_answer"},
    }
    print(gruppo.train(recipe, overrides=arguments.overrides))
