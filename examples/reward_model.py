"""A reward model: label completions with a rule, train on the labels, and then train a policy on the model alone.

python examples/reward_model.py [run.steps=20 …]
"""

import sys

import gruppo

recipe = {
    "run": {"name": "reward-model", "steps": 20},
    "model": {"name": "smollm2-135m-instruct"},
    "task": {"name": "arithmetic"},
    "reward": {"functions": ["last_number"]},
    "reward_model": {"kind": "outcome", "prompts": 224, "epochs": 4, "learning_rate": 1e-4},
    "method": {"kl_coef": 0.04},
    "sampling": {"prompts_per_step": 16, "group_size": 8, "max_tokens": 24},
    "optimizer": {"learning_rate": 5e-6},
    "evaluation": {"questions": 256, "every": 10},
}

if __name__ == "__main__":
    changes = sys.argv[1:]
    gruppo.label(recipe, out="runs/labels", overrides=changes)
    judge = gruppo.train_reward_model(recipe, "runs/labels", out="runs/judge", overrides=changes)
    print(f"AUC on held-out labels: {judge.before['auc']} -> {judge.after['auc']}")
    frozen = {"kind": "outcome", "name": f"{judge.path}/model", "prompts": 0}
    rule = {"functions": ["last_number"], "weights": [0.0]}  # only measured
    overrides = [change for change in changes if not change.startswith("reward_model.")]
    print(gruppo.train(recipe | {"reward": rule, "reward_model": frozen}, overrides=overrides))
