"""gruppo's side: the training loop on the prompts, lengths and rewards of the work file."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from protocol import Channel, Phases, fixed_rewards, gradient_norm, perturb, read_work, versions

from gruppo.algorithms import credit, filtering
from gruppo.config.loading import load_recipe
from gruppo.config.method_section import Method
from gruppo.engines import build_engine
from gruppo.engines.base import Engine, Request, SamplingParams
from gruppo.evaluation.datasets import preflight
from gruppo.models.gguf_file import write_gguf
from gruppo.models.loading import find_model, load_model
from gruppo.models.packing import MAX_TOKENS, pack
from gruppo.models.policy import LanguageModel
from gruppo.models.weights import WeightSource
from gruppo.training import policy_loss as losses_of_batches
from gruppo.training.loop import train_step
from gruppo.training.run import TrainingRun
from gruppo.training.setup import prepare
from gruppo.types import Completion, Group, Prompt, Reward
from gruppo.utils.metrics import Metrics
from gruppo.utils.progress import Advance, NullProgress
from gruppo.utils.signals import Stop

CHECKED = 16  # tokens of a completion whose log-probabilities are compared


class FixedLengths(Engine):
    """An engine whose completions have the lengths in the work file: an EOS token there, and none before."""

    def __init__(self, engine: Engine, work: dict[str, Any]) -> None:
        self.engine, self.end = engine, work["end_id"]
        pairs = zip(work["prompts"], work["lengths"], strict=True)
        self.limits = {tuple(prompt): lengths for prompt, lengths in pairs}
        self.sampled: dict[tuple[int, ...], list[int]] = {}  # prompt -> lengths of its last completions

    @property
    def slots(self) -> int:  # type: ignore[override]
        """See `Engine`."""
        return self.engine.slots

    def stream(
        self, requests: Sequence[Request], params: SamplingParams, advance: Advance | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        """See `Engine`."""
        limited = [replace(request, limits=self.limits[request.token_ids]) for request in requests]
        for index, group in self.engine.stream(limited, replace(params, min_tokens=params.max_tokens), advance):
            self.sampled[requests[index].token_ids] = [len(completion.token_ids) for completion in group]
            yield index, [self._with_end_token(completion) for completion in group]

    def _with_end_token(self, completion: Completion) -> Completion:
        return replace(completion, token_ids=(*completion.token_ids[:-1], self.end), finish_reason="stop")

    def load_weights(self, source: WeightSource, version: int) -> None:
        """See `Engine`."""
        self.engine.load_weights(source, version)


class Training:
    """Steps of gruppo's training loop, in a temporary run folder."""

    def __init__(self, work: dict[str, Any], stack: ExitStack) -> None:
        self.work, self.phases = work, Phases()
        recipe = load_recipe(
            {
                "run": {"seed": work["seed"], "steps": 1000},
                "model": {"name": work["model"]},
                "task": {"name": "in-memory:prompts"},
                "reward": {"functions": ["fixed_rewards"]},
                "method": {"name": "grpo", "kl_coef": work["kl_coef"]},
                "sampling": {
                    "prompts_per_step": len(work["prompts"]),
                    "group_size": len(work["lengths"][0]),
                    "max_tokens": work["max_tokens"],
                },
                "optimizer": {"learning_rate": work["learning_rate"], "max_grad_norm": work["max_grad_norm"]},
            }
        )
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        pairs = zip(work["messages"], work["rewards"], strict=True)
        rows = [{"prompt": messages, "fixed": rewards} for messages, rewards in pairs]
        data = preflight(recipe, folder, False, [fixed_rewards], rows, NullProgress())
        parts = prepare(recipe, folder, False, [fixed_rewards], data, NullProgress(), stack)
        assert sorted(prompt.token_ids for prompt in parts.prompts) == sorted(map(tuple, work["prompts"]))
        self.engine = FixedLengths(parts.engine, work)
        parts.engine = parts.sampler = self.engine
        self.phases.watch_optimizer(parts.optimizer)
        self._watch_reference(parts.reference)
        self.parts, self.run = parts, TrainingRun(parts, NullProgress(), Stop())

    def _watch_reference(self, reference: LanguageModel | None) -> None:
        score = losses_of_batches.score

        def timed(policy: LanguageModel, *arguments: Any) -> Any:
            if policy is not reference:
                return score(policy, *arguments)
            with self.phases("reference"):
                return score(policy, *arguments)

        losses_of_batches.score = timed  # type: ignore[attr-defined]

    def step(self) -> dict[str, Any]:
        """Run one step of the loop."""
        start = time.perf_counter()
        train_step(self.run, self.run.state.step + 1)
        seconds = time.perf_counter() - start
        values = self.parts.run.metrics()[-1]
        inside = sum(self.phases.seconds.values())
        self.phases.add("generation", values["time/generate"])
        self.phases.add("loss and backward", values["time/update"] - inside)
        lengths = [self.engine.sampled[tuple(prompt)] for prompt in self.work["prompts"]]
        return {"seconds": seconds, "phases": self.phases.take(seconds), "lengths": lengths}

    def setting(self) -> str:
        """The dtype that gruppo chose for this machine."""
        return str(self.parts.policy.dtype).removeprefix("torch.")

    def forecast(self) -> int:
        """Estimated peak memory in bytes."""
        return int(self.parts.run.read_json("environment.json")["memory_forecast"]["peak"])


class Generation:
    """The engine alone, in the dtype that gruppo chooses for this machine."""

    def __init__(self, work: dict[str, Any], stack: ExitStack) -> None:
        self.work = work
        self.policy = load_model(find_model(work["model"]))
        slots = work["slots"] or sum(map(len, work["lengths"]))
        self.engine = build_engine(self.policy, slots)
        self.calls = 0

    def step(self, tokens: int | None = None) -> dict[str, Any]:
        """Sample all completions once; `tokens`: at most this many tokens per completion."""
        work, max_tokens = self.work, tokens or self.work["max_tokens"]
        self.calls += 1
        requests = [
            Request(
                tuple(prompt),
                [(work["seed"], self.calls, place, index) for index in range(len(lengths))],
                limits=[min(length, max_tokens) for length in lengths],
            )
            for place, (prompt, lengths) in enumerate(zip(work["prompts"], work["lengths"], strict=True))
        ]
        start = time.perf_counter()
        groups = self.engine.generate(requests, SamplingParams(1.0, max_tokens, min_tokens=max_tokens))
        seconds = time.perf_counter() - start
        lengths = [[len(completion.token_ids) for completion in group] for group in groups]
        return {"seconds": seconds, "phases": {"generation": seconds}, "lengths": lengths}

    def setting(self) -> str:
        """Dtype and number of concurrent completions."""
        return f"{str(self.policy.dtype).removeprefix('torch.')}, {self.engine.slots} in flight"


def check(work: dict[str, Any]) -> dict[str, Any]:
    """Sample the work's completions; returns them with loss and gradient norm of gruppo's objective in float64.

    Old policy and reference are the initial weights with noise, so that neither the ratio nor the KL term is trivial.
    """
    policy = load_model(find_model(work["model"]), dtype="float64")
    noisy = load_model(find_model(work["model"]), dtype="float64")
    perturb(noisy.model, work["seed"])
    method = Method(kl_coef=work["kl_coef"])
    engine = FixedLengths(build_engine(policy, 64), work)
    requests = [
        Request(tuple(prompt), [(work["seed"], 0, place, index) for index in range(len(lengths))])
        for place, (prompt, lengths) in enumerate(zip(work["prompts"], work["lengths"], strict=True))
    ]
    sampled = engine.generate(requests, SamplingParams(1.0, work["max_tokens"]))
    groups = [
        Group(Prompt("p", "", request.token_ids, "t", {}), completions, [Reward(reward, {}) for reward in rewards])
        for request, completions, rewards in zip(requests, sampled, work["rewards"], strict=True)
    ]
    filtering.mark_trained(groups, False)
    credit.assign_advantages(groups, method, Metrics())
    weights = losses_of_batches.token_weights(method, work["max_tokens"])
    batches = pack(groups, weights, MAX_TOKENS, with_kl=method.kl_in_loss)
    losses_of_batches.score_batches(noisy, noisy, batches, 1.0, Metrics())
    total = 0.0
    for batch in batches:
        loss = losses_of_batches.batch_loss(policy, noisy, batch, method, 1.0, Metrics())
        loss.backward()
        total += float(loss.detach())
    return {
        "loss": total,
        "gradient_norm": gradient_norm(policy.model),
        "rollouts": {
            "completions": [[list(completion.token_ids) for completion in group] for group in sampled],
            "advantages": [[advantages[0] for advantages in group.advantages] for group in groups],
        },
    }


def check_generation(work: dict[str, Any], dtypes: Sequence[str], folder: Path) -> dict[str, Any]:
    """The first tokens of the work's completions, with their log-probabilities by the engine in float32.

    Also writes the model into `folder` as a GGUF file of each dtype, as `gruppo export --gguf` does.
    """
    policy = load_model(find_model(work["model"]), dtype="float32")
    for dtype in dtypes:
        write_gguf(policy.model, policy.tokenizer, policy.eos_ids, folder / f"{dtype}.gguf", dtype, "benchmark")
    requests = [
        Request(tuple(prompt), [(work["seed"], 0, place, index) for index in range(len(lengths))])
        for place, (prompt, lengths) in enumerate(zip(work["prompts"], work["lengths"], strict=True))
    ]
    sampled = build_engine(policy, 64).generate(requests, SamplingParams(1.0, min(CHECKED, work["max_tokens"])))
    return {
        "completions": [[list(completion.token_ids) for completion in group] for group in sampled],
        "logprobs": [[list(completion.sampling_logprobs) for completion in group] for group in sampled],
    }


def main() -> None:
    channel, work = Channel(), read_work()
    about = {"versions": versions("torch", "transformers"), "threads": torch.get_num_threads()}
    if sys.argv[2] == "check":
        channel.reply(**about)
        for command in channel:
            if work["name"] == "generation":
                channel.reply(**check_generation(work, command["dtypes"], Path(sys.argv[1]).parent))
            else:
                channel.reply(**check(work))
        return
    with ExitStack() as stack:
        side = Generation(work, stack) if work["name"] == "generation" else Training(work, stack)
        forecast = side.forecast() if isinstance(side, Training) else None
        channel.reply(setting=side.setting(), forecast_bytes=forecast, **about)
        for command in channel:
            if command["command"] == "warm" and isinstance(side, Generation):
                first = side.step(1)["seconds"]
                side.step()
                channel.reply(first_token=first)
            else:
                channel.reply(**side.step())


if __name__ == "__main__":
    main()
