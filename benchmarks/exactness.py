"""Compare gruppo's gradient with transformers' on a real model: `.venv/bin/python benchmarks/exactness.py`.

The reference path is transformers' model in float32: every completion separately with its own copy of the prompt, full
logits, log-softmax, torch's autograd. It is compared with gruppo's path in float32 (shared prefixes, fused layers,
chunked log-probabilities) and in bfloat16, and with itself under torch's bfloat16 autocast. A distance is the norm of
the difference between two gradients of the same GRPO objective on the same completions, divided by the norm of the
second one; the second one is the reference path in float64 or in float32. The embedding of the padding token, which
also ends turns in the prompts, has a gradient everywhere except in the last row, where torch omits it by default.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM

from gruppo.algorithms import credit, filtering
from gruppo.algorithms.aggregation import sequence_mean_weights
from gruppo.algorithms.losses import policy_loss
from gruppo.config.method_section import Method
from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.native.engine import NativeEngine
from gruppo.models.loading import find_model, load_model
from gruppo.models.packing import MAX_TOKENS, Batch, pack
from gruppo.models.policy import LanguageModel
from gruppo.training import policy_loss as losses_of_batches
from gruppo.types import Group, Prompt, Reward
from gruppo.utils.metrics import Metrics

METHOD = Method(kl_coef=0.04)


def completions(policy: LanguageModel, prompts: int, group: int, tokens: int) -> list[Group]:
    """Groups sampled from the model, with rewards 0 and 1 in turn."""
    questions = [f"What is {3 * number + 7} + {5 * number + 4}?" for number in range(prompts)]
    requests = []
    for place, text in enumerate(questions):
        ids = tuple(policy.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )["input_ids"])  # fmt: skip
        requests.append(Request(ids, [(place, number) for number in range(group)]))
    sampled = NativeEngine(policy, prompts * group).generate(requests, SamplingParams(1.0, tokens))
    groups = [
        Group(
            Prompt("p", "", request.token_ids, "t", {}),
            samples,
            [Reward(float(number % 2), {}) for number in range(group)],
        )
        for request, samples in zip(requests, sampled, strict=True)
    ]
    filtering.mark_trained(groups, False)
    credit.assign_advantages(groups, METHOD, Metrics())
    return groups


def fast(policy: LanguageModel, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """The gradient by gruppo's path."""
    with policy.precision():
        for batch in batches:
            loss = losses_of_batches.batch_loss(policy, None, replace(batch), METHOD, 1.0, Metrics())
            with torch.autocast("cpu", enabled=False):
                loss.backward()
    return gradients(policy.model)


def plain(
    location: str,
    groups: list[Group],
    batches: list[Batch],
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    padding: bool = True,
) -> dict[str, torch.Tensor]:
    """The gradient by transformers, one completion at a time; `padding`: include the padding token's embedding."""
    model = AutoModelForCausalLM.from_pretrained(location, dtype=dtype)
    if padding:
        model.get_input_embeddings().padding_idx = None
    for batch in batches:
        start = 0
        for index, number, length in batch.members:
            span, prompt = slice(start, start + length), groups[index].prompt.token_ids
            ids = torch.tensor([*prompt, *groups[index].completions[number].token_ids])
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = model(ids[None, :-1]).logits[0, len(prompt) - 1 :]
            logprobs = logits.to(dtype).log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0]
            ref = batch.ref_logprobs
            assert ref is not None
            policy_loss(
                logprobs, logprobs.detach(), batch.advantages[span].to(dtype), batch.weights[span].to(dtype),
                METHOD.clip_low, METHOD.clip_high, ref[span].to(dtype), METHOD.kl_coef,
            ).loss.backward()  # fmt: skip
            start += length
    return gradients(model)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All gradients by parameter name in float64; clears those of the model."""
    result = {name: weight.grad.double() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return result


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """|one - other| / |other| over all parameters."""
    assert one.keys() == other.keys()
    return norm({name: one[name] - other[name] for name in other}) / norm(other)


def norm(one: dict[str, torch.Tensor]) -> float:
    """Norm of a gradient over all parameters."""
    return sum(float(gradient.square().sum()) for gradient in one.values()) ** 0.5


def between(
    one: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], usual: dict[str, torch.Tensor]
) -> tuple[float, float, float]:
    """Distances from `truth` and from `usual`, and the relative difference of norms to `truth`."""
    return distance(one, truth), distance(one, usual), abs(norm(one) / norm(truth) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    source = find_model(args.model)
    policy = load_model(source, dtype="float32")
    groups = completions(policy, args.prompts, args.group, args.tokens)
    reference = load_model(source, dtype="float32")
    torch.manual_seed(0)
    for weight in reference.model.parameters():  # so that the KL term is not trivial
        weight.data.add_(0.005 * weight.data.std() * torch.randn_like(weight))
    batches = pack(groups, sequence_mean_weights, MAX_TOKENS, with_kl=True)
    losses_of_batches.score_batches(policy, reference, batches, 1.0, Metrics())
    for batch in batches:
        batch.old_logprobs = None  # the first update after sampling: every path uses its own π_θ as π_old
    del reference
    truth, usual = (plain(source.location, groups, batches, dtype) for dtype in (torch.float64, torch.float32))
    distances = {"float32, fast path": between(fast(policy, batches), truth, usual)}
    del policy
    distances["float32, transformers"] = between(usual, truth, usual)
    distances["bfloat16, fast path"] = between(fast(load_model(source, dtype="bfloat16"), batches), truth, usual)
    distances["bfloat16, transformers with torch's autocast"] = between(
        plain(source.location, groups, batches, autocast=True), truth, usual
    )
    distances["float32, transformers without the padding embedding's gradient"] = between(
        plain(source.location, groups, batches, padding=False), truth, usual
    )
    tokens = sum(len(completion.token_ids) for group in groups for completion in group.completions)
    print(f"{tokens} completion tokens; gradient norm in float64: {norm(truth):.7g}\n")
    print(
        "| path | from float64 | from transformers in float32 | relative error of the norm |\n| --- | --- | --- | --- |"
    )
    for name, values in distances.items():
        print(f"| {name} | {' | '.join(f'{value:.1e}' for value in values)} |")
    print(json.dumps(distances))


if __name__ == "__main__":
    main()
