"""Reward models: a language model with a head that gives the probability that a completion is right.

An outcome model is read at a completion's last token, a process model at the last token of each step, all in one pass.
Both are trained on labels that a rule made; see `gruppo.training.step_labels`. What is saved is loaded by transformers: an outcome
model as a sequence classifier of one label, a process model as a token classifier of one.
"""

from __future__ import annotations

import copy
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
)

from gruppo.algorithms.losses import label_loss
from gruppo.config.recipe import RewardModel
from gruppo.errors import UsageError
from gruppo.models.lora import skeleton
from gruppo.models.policy import LanguageModel, ModelSource, load_model, save_base, save_weights
from gruppo.models.value_head import ScalarModel, pack_states, read_states
from gruppo.rewards.grading.graders import last_number
from gruppo.runs.reading import read_object
from gruppo.training.packing import Batch
from gruppo.types import Completion, Group, Prompt, Reward, Steps
from gruppo.utils.progress import Reporter
from gruppo.utils.stats import auc, calibration_error

NAME = "reward_model"  # of its part of a reward
_KINDS: dict[str, tuple[str, Any]] = {
    "outcome": ("ForSequenceClassification", MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    "process": ("ForTokenClassification", MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING),
}


@dataclass(frozen=True)
class Sample:
    """A completion with its labels. `right`: by the rule; `labels`: from 0 to 1, each with the token at whose end the
    model is read: of an outcome the last one, else the ends of steps."""

    prompt: Prompt
    completion: Completion
    right: bool
    labels: Steps


def last_token(completion: Completion) -> tuple[int, ...]:
    """Where an outcome is read; nowhere in a completion without tokens."""
    return (len(completion.token_ids) - 1,) if completion.token_ids else ()


def _grouped(samples: Sequence[Sample]) -> tuple[list[Group], dict[tuple[int, int], int]]:
    """Samples as groups, each prompt once, and which sample each completion is."""
    together: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        together[sample.prompt.token_ids].append(place)
    groups, places = [], {}
    for index, own in enumerate(together.values()):
        completions = [samples[place].completion for place in own]
        groups.append(Group(samples[own[0]].prompt, completions, [], trained=[True] * len(own)))
        places.update({(index, number): place for number, place in enumerate(own)})
    return groups, places


def probabilities(
    model: ScalarModel, samples: Sequence[Sample], budget: int, device: torch.device
) -> list[tuple[float, ...]]:
    """The model's probability at each end of each sample; labels are not looked at."""
    groups, places = _grouped(samples)
    made: list[tuple[float, ...]] = [()] * len(samples)
    for index, number, scores in read_states(model, groups, budget, device):
        place = places[index, number]
        at = torch.tensor([scores[end + 1] for end in samples[place].labels.ends], dtype=torch.float64)
        made[place] = tuple(torch.sigmoid(at).tolist())
    return made


def label_batches(
    model: ScalarModel, samples: Sequence[Sample], budget: int
) -> tuple[list[Batch], Callable[[Batch], Tensor]]:
    """Micro-batches of the samples and the loss of one of them; over all it is the mean over the labels."""
    groups, places = _grouped(samples)
    batches = pack_states(groups, budget, model.policy.device)
    total = sum(len(sample.labels.ends) for sample in samples)

    def loss(batch: Batch) -> Tensor:
        rows: list[int] = []
        labels: list[float] = []
        start = 0
        for index, number, length in batch.members:
            own = samples[places[index, number]].labels
            rows += [start + end + 1 for end in own.ends]
            labels += own.rewards
            start += length
        numbers = model.numbers(batch)
        wanted = torch.tensor(labels, dtype=numbers.dtype, device=numbers.device)
        at = numbers[torch.tensor(rows, dtype=torch.long, device=numbers.device)]
        return label_loss(at, wanted, torch.full_like(wanted, 1 / max(1, total)))

    return batches, loss


def minibatches(samples: Sequence[Sample], settings: RewardModel, turn: int) -> Iterator[list[Sample]]:
    """What each update learns from, epoch after epoch: prompts in an order that the seed and `turn` decide, the
    completions of one together, cut where `batch_size` are there."""
    together: dict[tuple[int, ...], list[Sample]] = defaultdict(list)
    for sample in samples:
        together[sample.prompt.token_ids].append(sample)
    prompts = list(together.values())
    for epoch in range(settings.epochs):
        order = _random(settings.seed, turn, 1, epoch).permutation(len(prompts))
        row = [sample for place in order for sample in prompts[place]]
        for start in range(0, len(row), settings.batch_size):
            yield row[start : start + settings.batch_size]


def replayed(history: Sequence[Sample], new: int, settings: RewardModel, turn: int) -> list[Sample]:
    """Samples of earlier rounds that make up the share `history` of a training set with `new` ones, drawn without
    repetition from the last `history_capacity` of them; fewer where there are not so many."""
    kept = history[-settings.history_capacity :] if settings.history_capacity else []
    wanted = round(settings.history * new / (1 - settings.history))
    chosen = _random(settings.seed, turn, 2).permutation(len(kept))[:wanted]
    return [kept[place] for place in sorted(chosen)]


def _random(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def divided(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """To train on, and held out. A question is on the same side in every round: by a hash of its tokens."""

    def held(sample: Sample) -> bool:
        digest = hashlib.sha256(repr((seed, sample.prompt.token_ids)).encode()).digest()
        return int.from_bytes(digest[:8], "big") < share * 2**64

    sides = [held(sample) for sample in samples]
    return (
        [sample for sample, out in zip(samples, sides, strict=True) if not out],
        [sample for sample, out in zip(samples, sides, strict=True) if out],
    )


def quality(samples: Sequence[Sample], made: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """Figures of a model's probabilities on samples with labels; all from 0 to 1, None where there is nothing to tell.

    accuracy (a probability above ½ against a label above ½), auc, calibration_error (10 bins), labels (how many),
    positives (how many of them above ½). Over the questions with several completions: mean (how often a completion is
    right), best_of_n (the one with the highest probability; of a process model, the highest least one of its steps),
    majority_vote (the commonest answer, its last number or else its text), any_right; what is tied is shared.
    """
    flat = np.array([each for own in made for each in own])
    labels = np.array([each for sample in samples for each in sample.labels.rewards])
    positive = labels > 0.5
    figures: dict[str, float | None] = {"labels": float(len(labels)), "positives": float(positive.sum())}
    if len(flat):
        figures["accuracy"] = float(((flat > 0.5) == positive).mean())
        figures["auc"] = auc(flat, positive)
        figures["calibration_error"] = calibration_error(flat, labels)
    together: dict[str, list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        together[sample.prompt.id].append(place)
    questions = [own for own in together.values() if len(own) > 1]
    if not questions:
        return figures
    shares: dict[str, list[float]] = defaultdict(list)
    for own in questions:
        right = np.array([samples[place].right for place in own], dtype=float)
        scores = np.array([min(made[place], default=0.0) for place in own])
        answers = [_answer(samples[place].completion.text) for place in own]
        votes = np.array([answers.count(answer) for answer in answers])
        shares["mean"].append(float(right.mean()))
        shares["best_of_n"].append(float(right[scores == scores.max()].mean()))
        shares["majority_vote"].append(float(right[votes == votes.max()].mean()))
        shares["any_right"].append(float(right.max()))
    return figures | {name: float(np.mean(values)) for name, values in shares.items()}


def _answer(text: str) -> object:
    number = last_number(text)
    return text.strip() if number is None else number


def with_scores(reward: Reward, kind: str, ends: Sequence[int], made: Sequence[float], weight: float) -> Reward:
    """A completion's reward with the model's judgement: of an outcome added to the total with its weight, of steps
    beside it. A completion that abstained does so still, unless nothing failed."""
    if reward.failure or not made:
        return reward
    if kind == "process":
        steps = {**reward.steps, NAME: Steps(tuple(made), tuple(ends))}
        return replace(reward, total=reward.total or 0.0, steps=steps)
    return replace(reward, total=(reward.total or 0.0) + weight * made[0], parts={**reward.parts, NAME: made[0]})


# Loading and saving.


def check_kind(config: PreTrainedConfig, kind: str) -> None:
    """Raise UsageError where transformers has no class of classifier that holds what a model of the architecture has
    and a head; weights are not needed to tell."""
    ending, mapping = _KINDS[kind]
    fits = type(config) in mapping
    if fits:
        target, layers = _skeleton(config, kind), skeleton(config).get_decoder()
        prefix = f"{target.base_model_prefix}."
        wanted = {name for name in target.state_dict() if name.startswith(prefix)}
        fits = wanted == {prefix + name for name in layers.state_dict()} and _linear(target, prefix)
    if not fits:
        raise UsageError(
            f"reward_model.name: architecture {config.model_type!r} has no …{ending} in transformers that is "
            f"its layers and a head, as which a model of kind {kind!r} is saved; use another (Llama, Qwen, Mistral, …)"
        )


def _linear(target: Any, prefix: str) -> bool:
    """Whether the head is one linear layer."""
    shapes = [list(each.shape) for name, each in target.named_parameters() if not name.startswith(prefix)]
    return [1, target.config.get_text_config().hidden_size] in shapes and len(shapes) <= 2


def is_trained(config: PreTrainedConfig) -> bool:
    """Whether a folder holds a reward model, and not a language model without a head."""
    return any(str(each).endswith(ending) for each in config.architectures or () for ending, _ in _KINDS.values())


def kind_of(name: str) -> str:
    """The kind of the reward model in a folder. Raises UsageError where there is none."""
    file = Path(name) / "config.json"
    held = read_object(file).get("architectures") if file.is_file() else None
    first = str(held[0]) if isinstance(held, list) and held else ""
    for kind, (ending, _) in _KINDS.items():
        if first.endswith(ending):
            return kind
    raise UsageError(
        f"--reward-model {name}: holds no reward model; give the folder of one, e.g. runs/NAME/reward_model"
    )


def load_reward_model(
    source: ModelSource, kind: str, device: str, dtype: str, reporter: Reporter | None = None
) -> ScalarModel:
    """A head on a language model's weights, of zeros, or with that of a reward model that was saved. Raises UsageError
    where that one is of the other kind."""
    check_kind(source.config, kind)
    ending, _ = _KINDS[kind]
    if not is_trained(source.config):
        return ScalarModel.on(load_model(source, device, dtype, reporter), bias=kind == "process")
    held = str((source.config.architectures or [""])[0])
    if not held.endswith(ending):
        raise UsageError(f"reward_model.kind = {kind!r}: {source.location} is a {held}; write the other kind")
    if source.config.num_labels != 1:
        raise UsageError(
            f"reward_model.name = {source.location!r}: has {source.config.num_labels} labels; take a model with one, "
            'or reward.functions = ["classifier"]'
        )
    layers, head = _parts(source, kind)
    given = replace(source, given=layers)
    model = ScalarModel.on(load_model(given, device, dtype, reporter), bias=kind == "process")
    with torch.no_grad():
        for own, each in zip((model.head.weight, model.head.bias), head, strict=False):
            if own is not None:
                own.copy_(each)
    return model


def _parts(source: ModelSource, kind: str) -> tuple[Any, list[Tensor]]:
    """The language model of a reward model's folder, its output head, which nothing reads, of zeros; and the tensors of
    the head that is read."""
    try:
        loaded: Any = _KINDS[kind][1][type(source.config)].from_pretrained(
            source.location,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except Exception as error:  # weights are other people's files: anything can be wrong with them
        raise UsageError(
            f"reward_model.name = {source.location!r}: cannot be loaded ({type(error).__name__}: {error})"
        ) from error
    classifier, report = loaded
    if missing := sorted(map(str, report["missing_keys"])):
        raise UsageError(f"reward_model.name = {source.location!r}: has no weights for {missing[0]}; give all of it")
    model = AutoModelForCausalLM.from_config(copy.deepcopy(source.config), trust_remote_code=False)
    prefix = f"{classifier.base_model_prefix}."
    named = dict(classifier.state_dict())
    layers = {name.removeprefix(prefix): each for name, each in named.items() if name.startswith(prefix)}
    output = model.get_output_embeddings().weight
    if output is not model.get_input_embeddings().weight:
        nn.init.zeros_(output)
    model.get_decoder().load_state_dict(layers)
    return model, [named[name].detach() for name in _head_names(source.config, kind)]


def _skeleton(config: PreTrainedConfig, kind: str) -> Any:
    _, mapping = _KINDS[kind]
    with torch.device("meta"):
        return mapping[type(config)](_described(config, kind))


def _head_names(config: PreTrainedConfig, kind: str) -> list[str]:
    """Names of the head's weight and of its bias, if it has one."""
    model = _skeleton(config, kind)
    prefix = f"{model.base_model_prefix}."
    names = [name for name, _ in model.named_parameters() if not name.startswith(prefix)]
    return sorted(names, key=lambda name: name.endswith("bias"))


def _described(config: PreTrainedConfig, kind: str) -> PreTrainedConfig:
    own = copy.deepcopy(config)
    own.num_labels = 1
    own.architectures = [_KINDS[kind][1][type(config)].__name__]
    return own


def save_reward_model(model: ScalarModel, kind: str, folder: Path) -> None:
    """Write weights, config and tokenizer, so that transformers' AutoModelForSequenceClassification (an outcome model)
    or AutoModelForTokenClassification (a process model) loads the folder.

    transformers reads a sequence at its last token that is no padding: a padding token that also ends turns would hide
    the place that the model was trained at, so another one is written into config and tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    policy = model.policy
    config = _described(policy.model.config, kind)
    target = _skeleton(config, kind)
    prefix = f"{target.base_model_prefix}."
    weights = {prefix + name: each for name, each in policy.model.get_decoder().state_dict().items()}
    head = dict(zip(_head_names(config, kind), [model.head.weight, model.head.bias], strict=False))
    weights |= {name: each for name, each in head.items() if each is not None}
    save_base(policy, folder)
    tokenizer = copy.deepcopy(policy.tokenizer)
    config.pad_token_id = _padding(policy)
    if config.pad_token_id is not None:
        tokenizer.pad_token_id = config.pad_token_id
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    save_weights({name: each.detach() for name, each in weights.items()}, folder)


def _padding(policy: LanguageModel) -> int | None:
    """A token that ends no turn, of those that the tokenizer sets apart; None where there is none."""
    held = policy.tokenizer.pad_token_id
    apart = [held, policy.tokenizer.unk_token_id, policy.tokenizer.bos_token_id, *policy.tokenizer.all_special_ids]
    return next((int(each) for each in apart if each is not None and each not in policy.eos_ids), None)
