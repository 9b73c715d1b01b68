"""How far the fast path's gradient is from the plain one, on a real model: `.venv/bin/python benchmarks/exactness.py`.

The plain path is transformers' own model in float32: every completion alone after its own copy of the prompt, whole
logits, log-softmax, torch's autograd. Beside it: gruppo's path in float32 (prefixes shared, written-out layers,
log-probabilities in parts) and in bfloat16, and the plain path under torch's own bfloat16 autocast. Distances are those
between the gradients of the same GRPO objective on the same completions, over the norm of the second one: from the
plain path in float64, and from the plain path in float32. The embedding of the padding token, which ends turns in the
prompts too, has its gradient everywhere; what torch's modules leave out by themselves is shown in the last line.
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
    """Groups sampled from the model, right and wrong in turn."""
    asked = [f"What is {3 * number + 7} + {5 * number + 4}?" for number in range(prompts)]
    made = []
    for place, text in enumerate(asked):
        ids = tuple(policy.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )["input_ids"])  # fmt: skip
        made.append(Request(ids, [(place, number) for number in range(group)]))
    sampled = NativeEngine(policy, prompts * group).generate(made, SamplingParams(1.0, tokens))
    groups = [
        Group(Prompt("p", "", each.token_ids, "t", {}), own, [Reward(float(number % 2), {}) for number in range(group)])
        for each, own in zip(made, sampled, strict=True)
    ]
    filtering.mark_trained(groups, False)
    credit.assign_advantages(groups, METHOD, Metrics())
    return groups


def fast(policy: LanguageModel, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """The gradient by gruppo's own path."""
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
    """The gradient by transformers alone, one completion at a time; `padding`: that token's embedding has its own."""
    model = AutoModelForCausalLM.from_pretrained(location, dtype=dtype)
    if padding:
        model.get_input_embeddings().padding_idx = None
    for batch in batches:
        start = 0
        for index, number, length in batch.members:
            stretch, prompt = slice(start, start + length), groups[index].prompt.token_ids
            ids = torch.tensor([*prompt, *groups[index].completions[number].token_ids])
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = model(ids[None, :-1]).logits[0, len(prompt) - 1 :]
            logprobs = logits.to(dtype).log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0]
            ref = batch.ref_logprobs
            assert ref is not None
            policy_loss(
                logprobs, logprobs.detach(), batch.advantages[stretch].to(dtype), batch.weights[stretch].to(dtype),
                METHOD.clip_low, METHOD.clip_high, ref[stretch].to(dtype), METHOD.kl_coef,
            ).loss.backward()  # fmt: skip
            start += length
    return gradients(model)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All gradients by name, in float64; the model's are gone after it."""
    made = {name: each.grad.double() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad(set_to_none=True)
    return made


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """|one - other| / |other| over all parameters."""
    assert one.keys() == other.keys()
    return norm({name: one[name] - other[name] for name in other}) / norm(other)


def norm(one: dict[str, torch.Tensor]) -> float:
    """Of all parameters together."""
    return sum(float(each.square().sum()) for each in one.values()) ** 0.5


def between(
    one: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], usual: dict[str, torch.Tensor]
) -> tuple[float, float, float]:
    """Distances from both, and how far its norm is from that of the truth, relatively."""
    return distance(one, truth), distance(one, usual), abs(norm(one) / norm(truth) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    given = parser.parse_args()
    source = find_model(given.model)
    policy = load_model(source, dtype="float32")
    groups = completions(policy, given.prompts, given.group, given.tokens)
    reference = load_model(source, dtype="float32")
    torch.manual_seed(0)
    for each in reference.model.parameters():  # so that the KL term is not trivial
        each.data.add_(0.005 * each.data.std() * torch.randn_like(each))
    batches = pack(groups, sequence_mean_weights, MAX_TOKENS, with_kl=True)
    losses_of_batches.score_batches(policy, reference, batches, 1.0, Metrics())
    for batch in batches:
        batch.old_logprobs = None  # the first update after sampling: each path is its own π_old
    del reference
    truth, usual = (plain(source.location, groups, batches, dtype) for dtype in (torch.float64, torch.float32))
    found = {"float32, fast path": between(fast(policy, batches), truth, usual)}
    del policy
    found["float32, transformers"] = between(usual, truth, usual)
    found["bfloat16, fast path"] = between(fast(load_model(source, dtype="bfloat16"), batches), truth, usual)
    found["bfloat16, torch's autocast, unpacked"] = between(
        plain(source.location, groups, batches, autocast=True), truth, usual
    )
    found["float32, padding's embedding without"] = between(
        plain(source.location, groups, batches, padding=False), truth, usual
    )
    tokens = sum(len(each.token_ids) for group in groups for each in group.completions)
    print(f"{tokens} completion tokens; norm of the gradient in float64 {norm(truth):.7g}\n")
    print("| path | from float64 | from transformers in float32 | the norm itself |\n| --- | --- | --- | --- |")
    for name, values in found.items():
        print(f"| {name} | {' | '.join(f'{each:.1e}' for each in values)} |")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
