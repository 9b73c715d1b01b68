"""On the same tokens, advantages, loss, gradient and weights are those of TRL, where TRL is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from gruppo.trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

trl = pytest.importorskip("trl", reason="TRL is not installed, so there is nothing to compare with")

ROWS = [{"prompt": f"{first}{second}"} for first in "abcd" for second in "123"]
TOLERANCE = 1e-6


def counted(completions: list[str], **_: Any) -> list[float]:
    """Rewards that differ within a group, for letters and for length."""
    return [sum(letter in "abcdefg" for letter in text) - 0.1 * len(text) for text in completions]


def shared(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return {**arguments, **changes}


class Compared:
    """One training by gruppo, and TRL's on the tokens that gruppo sampled."""

    def __init__(self, model: str, out: Path, method: str = "GRPO", **changes: Any) -> None:
        ours = {"GRPO": (GRPOConfig, GRPOTrainer), "RLOO": (RLOOConfig, RLOOTrainer)}[method]
        options = shared(**changes)
        trainer = ours[1](model, counted, ours[0](str(out / "ours"), **options), ROWS)
        trainer.train()
        assert trainer.result is not None
        self.rollouts = trainer.result.rollouts(1)
        self.metrics = trainer.result.metrics[0]
        self.weights = trainer.model.state_dict()
        answers = iter(self.rollouts.itertuples())

        def recorded(prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
            rows = [next(answers) for _ in prompt_ids]
            assert [list(row.prompt_token_ids) for row in rows] == prompt_ids
            sampled = [list(map(int, row.token_ids)) for row in rows]
            return (sampled, None) if method == "GRPO" else sampled

        group = options["num_generations"]
        prompts = [trainer.tokenizer.decode(ids) for ids in self.rollouts.prompt_token_ids[::group]]
        theirs = getattr(trl, f"{method}Trainer")(
            model=AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager"),
            reward_funcs=counted,
            args=getattr(trl, f"{method}Config")(str(out / "theirs"), shuffle_dataset=False, **options),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            processing_class=AutoTokenizer.from_pretrained(model),
        )
        theirs._generate_single_turn = recorded
        theirs.train()
        self.theirs = theirs
        self.log = [line for line in theirs.state.log_history if "loss" in line]
        self.advantages = list(theirs._logs["advantages"])

    def check(self, loss: bool = True) -> None:
        """Advantages and loss to 1e-6, gradient norm to 1e-5 of itself, and weights as far as Adam lets compare."""
        ours = [row[0] for row in self.rollouts.advantages]
        assert ours == pytest.approx(self.advantages, abs=TOLERANCE)
        assert max(map(abs, ours)) > 0.5
        if loss:
            theirs = sum(line["loss"] for line in self.log) / len(self.log)
            assert self.metrics["loss/total"] == pytest.approx(theirs, abs=TOLERANCE)
        norm = sum(line["grad_norm"] for line in self.log) / len(self.log)
        assert self.metrics["optimizer/gradient_norm"] == pytest.approx(norm, rel=1e-5)


CASES = {
    "defaults": {},
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "bnpo": {"loss_type": "bnpo", "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1},
    "batch": {"scale_rewards": "batch"},
    "unscaled": {"scale_rewards": "none"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0, "num_iterations": 2, "max_steps": 2},
    "two iterations": {"num_iterations": 2, "max_steps": 2, "epsilon": 0.02, "epsilon_high": 0.03},
    "sequences": {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 2, "max_steps": 2},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "num_iterations": 2, "max_steps": 2},
    "kl": {"beta": 0.3, "num_iterations": 2, "max_steps": 2},
    "kl without ratio": {"beta": 0.3, "use_bias_correction_kl": False, "num_iterations": 2, "max_steps": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_grpo_is_that_of_trl(case: str, tiny_folder: str, tmp_path: Path) -> None:
    Compared(tiny_folder, tmp_path, **CASES[case]).check()


def test_a_step_of_rloo_has_the_gradient_of_trl(tiny_folder: str, tmp_path: Path) -> None:
    """TRL's loss is the mean of -Â, ours the mean of -Â log π; their gradients are equal where π is π_old."""
    Compared(tiny_folder, tmp_path, "RLOO", beta=0.0).check(loss=False)
