"""A small sentiment classifier as the reward: stories that end well. No language model judges.

hf download distilbert/distilbert-base-uncased-finetuned-sst-2-english
python examples/classifier_reward.py [run.steps=20 …]
"""

import sys

import gruppo

BEGINNINGS = ["The dog was lost", "The train was late", "She opened the letter", "The rain began", "He missed the bus"]

if __name__ == "__main__":
    rows = [{"prompt": [{"role": "user", "content": f"Continue in one sentence: {text}"}]} for text in BEGINNINGS]
    recipe = {
        "run": {"name": "sentiment", "steps": 30},
        "model": {"name": "smollm2-135m-instruct"},
        "reward": {
            "functions": ["classifier", "repetition"],  # the second keeps "great great great" from winning
            "workers": 1,  # each worker loads the classifier
            "timeout": 120,
            "options": {
                "classifier": {
                    "model": "distilbert/distilbert-base-uncased-finetuned-sst-2-english",
                    "label": "POSITIVE",
                },
            },
        },
        "method": {"kl_coef": 0.05},
        "sampling": {"prompts_per_step": 5, "group_size": 8, "max_tokens": 48},
        "optimizer": {"learning_rate": 5e-6},
    }
    print(gruppo.train(recipe, prompts=rows, overrides=sys.argv[1:]))
