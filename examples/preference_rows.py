"""DPO on rows of preferences: a prompt, a chosen and a rejected answer. Nothing is sampled or scored.

python examples/preference_rows.py [run.steps=20 …]
gruppo train RECIPE --set task.name=rows.jsonl       (the same with a file; task.columns renames its columns)
"""

import sys

import gruppo

THINGS = ["a river", "a bridge", "a violin", "a harbor", "a glacier", "a compass", "a lantern", "an orchard"]

if __name__ == "__main__":
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {thing}?"}],
            "chosen": f"In short: {thing} is something to look up in a dictionary.",
            "rejected": f"Great question! I would be delighted to tell you everything there is to know about {thing}.",
        }
        for thing in THINGS
    ]
    recipe = {
        "run": {"name": "preferences", "steps": 10},
        "model": {"name": "smollm2-135m-instruct"},
        "method": {"name": "dpo", "source": "dataset", "dpo_beta": 0.1, "aggregation": "sequence-sum"},
        "sampling": {"prompts_per_step": 8, "max_tokens": 64},
        "optimizer": {"learning_rate": 5e-6},
    }
    result = gruppo.train(recipe, prompts=rows, overrides=sys.argv[1:])
    print(result.frame()[["dpo/loss", "dpo/margin", "dpo/accuracy"]])
