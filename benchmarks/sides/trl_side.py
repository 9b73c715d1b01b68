"""TRL's side: GRPOTrainer in one setting, one step per command."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from protocol import Channel, Phases, fixed_rewards, gradient_norm, perturb, read_work, versions
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class FixedLengths(LogitsProcessor):
    """Forces completion lengths: no end token before the length of a row, and only an end token there."""

    def __init__(self, work: dict[str, Any]) -> None:
        self.lengths = torch.tensor([length for lengths in work["lengths"] for length in lengths])
        self.prompts = torch.tensor([prompt for prompt in work["prompts"] for _ in work["lengths"][0]])
        self.ends, self.end = work["end_ids"], work["end_id"]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        width = self.prompts.shape[1]
        assert torch.equal(input_ids[:, :width], self.prompts), "the prompts differ from the work file"
        last = self.lengths == input_ids.shape[1] - width + 1
        scores[:, self.ends] = -torch.inf
        scores[last] = -torch.inf
        scores[last, self.end] = 0.0
        return scores


class Watched(GRPOTrainer):  # type: ignore[misc]
    """The unchanged trainer with timed phases."""

    def __init__(self, work: dict[str, Any], **options: Any) -> None:
        super().__init__(**options)
        self.phases, self.lengths = Phases(), FixedLengths(work)
        self.sampled: list[int] = []  # lengths of the last completions
        plain = self.model.generate
        self.model.generate = lambda **options: plain(**options, logits_processor=LogitsProcessorList([self.lengths]))

    def _generate_single_turn(self, *arguments: Any, **options: Any) -> Any:
        with self.phases("generation"):
            completion_ids, logprobs = super()._generate_single_turn(*arguments, **options)
        self.sampled = [len(token_ids) for token_ids in completion_ids]
        return completion_ids, logprobs

    def _get_per_token_logps_and_entropies(self, model: Any, *arguments: Any, **options: Any) -> Any:
        if self.ref_model is None or model is not self.ref_model:
            return super()._get_per_token_logps_and_entropies(model, *arguments, **options)
        with self.phases("reference"):
            return super()._get_per_token_logps_and_entropies(model, *arguments, **options)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        start = time.perf_counter()
        inputs = super()._prepare_inputs(generation_batch)
        self.phases.add("loss and backward", start - time.perf_counter())
        return inputs

    def training_step(self, *arguments: Any, **options: Any) -> Any:
        with self.phases("loss and backward"):
            return super().training_step(*arguments, **options)


class Remote(TrainerCallback):  # type: ignore[misc]
    """Delays every step until a command asks for it, and answers with its time."""

    def __init__(self, channel: Channel, work: dict[str, Any]) -> None:
        self.channel, self.work, self.trainer = channel, work, None
        self.started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Do a tiny update, so that one-time work does not fall into the first step."""
        inner = optimizer.optimizer
        batch = {name: tensor[:2] for name, tensor in _inputs(self.work, _placeholders(self.work)).items()}
        self.trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
        self.trainer.model.train()
        self.trainer.compute_loss(self.trainer.model_wrapped, batch).backward()
        inner.step()
        inner.zero_grad()
        self.trainer.phases.watch_optimizer(inner)
        self.channel.reply()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.channel.read() is None:
            raise SystemExit(0)
        self.trainer.phases.seconds.clear()
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds = time.perf_counter() - self.started
        sampled, size = self.trainer.sampled, len(self.work["lengths"][0])
        lengths = [sampled[start : start + size] for start in range(0, len(sampled), size)]
        self.channel.reply(seconds=seconds, phases=self.trainer.phases.take(seconds), lengths=lengths)


def _placeholders(work: dict[str, Any]) -> dict[str, Any]:
    """Completions of the right lengths with arbitrary tokens."""
    completions = [[[work["end_id"]] * length for length in lengths] for lengths in work["lengths"]]
    return {"completions": completions, "advantages": work["rewards"]}


def _inputs(work: dict[str, Any], rollouts: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Inputs of `_compute_loss` for all completions, with zeros in place of log-probabilities."""
    completions = [torch.tensor(token_ids) for group in rollouts["completions"] for token_ids in group]
    size = len(work["lengths"][0])
    padded = pad_sequence(completions, batch_first=True, padding_value=work["end_id"])
    mask = pad_sequence([torch.ones_like(completion) for completion in completions], batch_first=True)
    prompts = torch.tensor([prompt for prompt in work["prompts"] for _ in range(size)])
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": padded,
        "completion_mask": mask,
        "advantages": torch.tensor([value for group in rollouts["advantages"] for value in group], dtype=torch.float32),
        "old_per_token_logps": torch.zeros(padded.shape),
        "ref_per_token_logps": torch.zeros(padded.shape),
    }


def _widen(model: Any) -> None:
    """Make the model compute in float64, and give the embedding of the padding token a gradient.

    Norms are replaced because transformers computes them in float32 regardless of the dtype. The padding token ends
    turns in the prompts.
    """

    def norm(module: Any) -> Any:
        def forward(hidden: torch.Tensor) -> torch.Tensor:
            size = (hidden.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()
            return module.weight * (hidden * size)

        return forward

    model.double()
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = norm(module)
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None


def check(trainer: Watched, work: dict[str, Any], rollouts: dict[str, Any]) -> dict[str, Any]:
    """Loss and gradient norm by TRL's `_compute_loss` in float64, on the completions and advantages of `rollouts`."""
    model, size = trainer.model, trainer.args.per_device_train_batch_size
    _widen(model)
    inputs = _inputs(work, rollouts)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    perturb(model, work["seed"])
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    with torch.no_grad():
        width = inputs["completion_ids"].shape[1]
        noisy = trainer._get_per_token_logps_and_entropies(model, ids, mask, width, size)[0]
    model.load_state_dict(plain)
    inputs["old_per_token_logps"] = inputs["ref_per_token_logps"] = noisy
    trainer.current_gradient_accumulation_steps = len(ids) // size
    model.train()
    total = 0.0
    for start in range(0, len(ids), size):
        batch = {name: tensor[start : start + size] for name, tensor in inputs.items()}
        loss = trainer._compute_loss(model, batch)
        loss.backward()
        total += float(loss.detach())
    return {"loss": total, "gradient_norm": gradient_norm(model)}


def make_trainer(work: dict[str, Any], setting: dict[str, Any], folder: str, callback: Remote) -> Watched:
    """GRPOTrainer with the objective of the work file; `setting`: bf16, and the micro-batch size in completions."""
    completions, size = sum(map(len, work["lengths"])), setting["micro_batch"]
    config = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=setting["bf16"],
        per_device_train_batch_size=size,
        gradient_accumulation_steps=completions // size,
        num_generations=len(work["lengths"][0]),
        max_completion_length=work["max_tokens"],
        cache_implementation=setting.get("cache"),
        beta=work["kl_coef"],
        use_bias_correction_kl=False,
        loss_type="grpo",
        scale_rewards="group",
        num_iterations=1,
        max_steps=1000,
        learning_rate=work["learning_rate"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        max_grad_norm=work["max_grad_norm"],
        gradient_checkpointing=False,
        shuffle_dataset=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=work["seed"] % 2**31,
    )
    pairs = zip(work["messages"], work["rewards"], strict=True)
    rows = [{"prompt": messages, "fixed": rewards} for messages, rewards in pairs]
    trainer = Watched(
        work,
        model=work["model"],
        reward_funcs=[fixed_rewards],
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(work["model"], padding_side="left"),
        callbacks=[callback],
    )
    callback.trainer = trainer
    return trainer


def main() -> None:
    channel, work, setting = Channel(), read_work(), json.loads(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(work, setting, folder, Remote(channel, work))
        channel.reply(versions=versions("trl", "torch", "transformers"), threads=torch.get_num_threads())
        for command in channel:
            if command["command"] == "check":
                channel.reply(**check(trainer, work, json.loads(Path(command["rollouts"]).read_text())))
            else:
                trainer.train()


if __name__ == "__main__":
    main()
