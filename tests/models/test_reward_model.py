"""Reward models: inputs, training, quality figures, and loading by transformers."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    CohereConfig,
    LlamaForSequenceClassification,
    OPTConfig,
)

from gruppo.config.sections import RewardModel
from gruppo.errors import UsageError
from gruppo.models.loading import find_model
from gruppo.models.reward_model import check_kind, load_reward_model, save_reward_model
from gruppo.models.value_head import ScalarModel
from gruppo.rollout.reward_model import RewardModelScorer, Sample, probabilities, with_scores
from gruppo.training.reward_model import RewardModelTrainer, divided, fit, label_batches, minibatches, quality, replayed
from gruppo.types import Completion, Prompt, Reward, Steps
from gruppo.utils.oom_retry import BatchSizes
from gruppo.utils.progress import NullProgress
from gruppo.utils.signals import Stop
from gruppo.utils.stats import auc, calibration_error
from tests.conftest import make_policy

CPU = torch.device("cpu")


def scalar(kind: str, seed: int = 3, dtype: torch.dtype = torch.float64) -> ScalarModel:
    model = ScalarModel.on(make_policy(dtype, seed=seed), bias=kind == "process")
    torch.manual_seed(seed)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter)
    return model


def completion(ids: list[int], text: str = "") -> Completion:
    return Completion(tuple(ids), (0.0,) * len(ids), (True,) * len(ids), "stop", 0, text or str(ids))


def random_samples(kind: str, prompts: int = 4, size: int = 3, seed: int = 0) -> list[Sample]:
    source, samples = random.Random(seed), []
    for number in range(prompts):
        prompt = Prompt(
            f"t/{number}", "q", tuple(source.randrange(1, 48) for _ in range(source.randrange(2, 7))), "t", {}
        )
        for _ in range(size):
            ids = [source.randrange(1, 48) for _ in range(source.randrange(2, 9))]
            ends = (len(ids) - 1,) if kind == "outcome" else tuple(sorted({0, len(ids) // 2, len(ids) - 1}))
            labels = tuple(source.choice([0.0, 0.5, 1.0]) for _ in ends)
            samples.append(Sample(prompt, completion(ids), source.random() < 0.5, Steps(labels, ends)))
    source.shuffle(samples)
    return samples


def plain_scores(model: ScalarModel, sample: Sample) -> torch.Tensor:
    """Scores at the ends of a sample, by transformers' forward on its sequence alone."""
    ids = torch.tensor([[*sample.prompt.token_ids, *sample.completion.token_ids]])
    hidden = model.policy.model.get_decoder()(input_ids=ids).last_hidden_state[0]
    places = [len(sample.prompt.token_ids) + end for end in sample.labels.ends]
    return model.head(hidden[places])[:, 0]


@pytest.mark.parametrize("kind", ["outcome", "process"])
@pytest.mark.parametrize("budget", [10**9, 20])
def test_probabilities_are_read_at_the_ends_as_in_transformers(kind: str, budget: int) -> None:
    model, samples = scalar(kind), random_samples(kind)
    results = probabilities(model, samples, budget, CPU)
    for sample, probability in zip(samples, results, strict=True):
        with torch.no_grad():
            assert probability == pytest.approx(torch.sigmoid(plain_scores(model, sample)).tolist(), abs=1e-10)


@pytest.mark.parametrize("kind", ["outcome", "process"])
@pytest.mark.parametrize("budget", [10**9, 20])
def test_loss_and_gradient_are_those_of_binary_cross_entropy(kind: str, budget: int) -> None:
    """-mean over labels of y log σ(s) + (1 - y) log(1 - σ(s)), hard and soft labels."""
    model, samples = scalar(kind), random_samples(kind)
    scores = torch.cat([plain_scores(model, sample) for sample in samples])
    labels = torch.tensor([label for sample in samples for label in sample.labels.rewards], dtype=torch.float64)
    positive = torch.sigmoid(scores)
    expected = -(labels * positive.log() + (1 - labels) * (1 - positive).log()).mean()
    expected.backward()
    gradients = {name: each.grad.clone() for name, each in model.module.named_parameters() if each.grad is not None}
    model.module.zero_grad(set_to_none=True)
    batches, loss_of = label_batches(model, samples, budget)
    assert (len(batches) == 1) == (budget > 20)
    total = 0.0
    for batch in batches:
        loss = loss_of(batch)
        loss.backward()
        total += float(loss.detach())
    assert total == pytest.approx(float(expected.detach()), abs=1e-10)
    for name, each in model.module.named_parameters():
        torch.testing.assert_close(each.grad, gradients[name], atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("kind", ["outcome", "process"])
def test_saved_models_are_loaded_by_transformers_and_gruppo(kind: str, tmp_path: Path) -> None:
    """In a padded batch, with completions that end with the language model's padding token."""
    model, samples = scalar(kind, dtype=torch.float32), random_samples(kind, prompts=3, size=2)
    samples = [
        Sample(each.prompt, completion([*each.completion.token_ids, 0]), each.right, each.labels) for each in samples
    ]
    if kind == "outcome":
        last = [Steps(each.labels.rewards, (len(each.completion.token_ids) - 1,)) for each in samples]
        samples = [Sample(s.prompt, s.completion, s.right, labels) for s, labels in zip(samples, last, strict=True)]
    model.policy.tokenizer.unk_token = "?"  # the only special token that does not end a turn
    save_reward_model(model, kind, tmp_path / "model")
    auto = AutoModelForSequenceClassification if kind == "outcome" else AutoModelForTokenClassification
    loaded, report = auto.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    rows = [[*each.prompt.token_ids, *each.completion.token_ids] for each in samples]
    longest, pad = max(map(len, rows)), loaded.config.pad_token_id
    assert pad not in (0, None)
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        logits = loaded.eval()(input_ids=ids, attention_mask=mask).logits
    made = probabilities(model, samples, 10**9, CPU)
    for row, sample, own in zip(logits, samples, made, strict=True):
        at = row[0] if kind == "outcome" else row[[len(sample.prompt.token_ids) + e for e in sample.labels.ends], 0]
        assert list(own) == pytest.approx(torch.sigmoid(at).reshape(-1).tolist(), abs=1e-5)
    again = load_reward_model(find_model(str(tmp_path / "model")), kind, "cpu", "float32")
    assert probabilities(again, samples, 10**9, CPU) == made
    other = "process" if kind == "outcome" else "outcome"
    with pytest.raises(UsageError, match=r"reward_model\.kind = "):
        load_reward_model(find_model(str(tmp_path / "model")), other, "cpu", "float32")


def test_an_architecture_without_such_a_classifier_is_refused() -> None:
    with pytest.raises(UsageError, match=r"reward_model\.name: .* architecture 'cohere'"):
        check_kind(CohereConfig(), "process")
    with pytest.raises(UsageError, match=r"reward_model\.name: .* architecture 'opt'"):
        check_kind(OPTConfig(), "outcome")


def test_a_classifier_of_several_labels_is_refused_and_one_in_parts_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = make_policy().model.config
    config.num_labels = 2
    two = LlamaForSequenceClassification(config)
    two.save_pretrained(tmp_path / "two")
    make_policy().tokenizer.save_pretrained(tmp_path / "two")
    with pytest.raises(UsageError, match="has 2 labels"):
        load_reward_model(find_model(str(tmp_path / "two")), "outcome", "cpu", "float32")
    config.num_labels = 1
    one = LlamaForSequenceClassification(config)
    one.save_pretrained(tmp_path / "one", max_shard_size="20KB")
    make_policy().tokenizer.save_pretrained(tmp_path / "one")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    loaded = load_reward_model(find_model(str(tmp_path / "one")), "outcome", "cpu", "float32")
    assert (loaded.head.weight == one.score.weight).all()
    assert loaded.head.bias is None


def test_no_update_without_labels() -> None:
    model = scalar("process")
    before = [each.clone() for each in model.module.parameters()]
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=0.1)
    settings = RewardModel(kind="process")
    scorer = RewardModelScorer(model, settings, model.policy.tokenizer, BatchSizes(10**9, 1))
    trainer = RewardModelTrainer(scorer, optimizer, 1.0)
    blank = [Sample(each.prompt, each.completion, True, Steps((), ())) for each in random_samples("process")]
    assert fit(trainer, blank, 1, lambda *_: None, NullProgress(), Stop()).reduce() == {}
    assert all((parameter == old).all() for old, parameter in zip(before, model.module.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["outcome", "process"])
def test_learns_to_tell_correct_from_wrong(kind: str) -> None:
    """Correct completions contain token 5; a process model can tell from that token on, not before."""
    source, samples = random.Random(1), []
    for number in range(240):
        ids = [source.randrange(6, 48) for _ in range(6)]
        place = source.randrange(6) if number % 2 else None
        if place is not None:
            ids[place] = 5
        seen = [float(place is not None and place <= end) for end in range(6)]
        labels = Steps((seen[-1],), (5,)) if kind == "outcome" else Steps(tuple(seen), tuple(range(6)))
        samples.append(
            Sample(
                Prompt(f"t/{number}", "q", (1, 2, number % 40 + 3), "t", {}), completion(ids), place is not None, labels
            )
        )
    training, held_out = samples[:180], samples[180:]
    settings = RewardModel(kind=kind, epochs=15, batch_size=12, learning_rate=5e-3)
    model = ScalarModel.on(make_policy(initializer_range=0.1), bias=kind == "process")
    optimizer = torch.optim.AdamW(model.module.parameters(), weight_decay=0.0)
    optimizer.register_step_post_hook(lambda *_: model.policy.generation.advance())
    scorer = RewardModelScorer(model, settings, model.policy.tokenizer, BatchSizes(10**9, 1))
    trainer = RewardModelTrainer(scorer, optimizer, 1.0)
    before = quality(held_out, probabilities(model, held_out, 10**9, CPU))
    assert before["auc"] == 0.5, "a new head cannot tell them apart"
    metrics = fit(trainer, training, 1, lambda *_: None, NullProgress(), Stop()).reduce()
    after = quality(held_out, probabilities(model, held_out, 10**9, CPU))
    assert metrics["reward_model/loss"] < np.log(2)
    assert after["accuracy"] > 0.9
    assert after["auc"] > 0.95
    assert after["calibration_error"] < 0.2


# Figures.


def sample(prompt: str, right: bool, text: str, labels: tuple[float, ...]) -> Sample:
    sampled = completion(list(range(1, len(labels) + 1)), text)
    return Sample(Prompt(prompt, "q", (1,), "t", {}), sampled, right, Steps(labels, tuple(range(len(labels)))))


def test_figures_by_hand() -> None:
    """Two questions with three completions each: the model picks the best at the first, the vote at the second."""
    samples = [
        sample("a", True, "It is 4.", (1.0,)),
        sample("a", False, "It is 5.", (0.0,)),
        sample("a", False, "5", (0.0,)),
        sample("b", True, "7", (1.0,)),
        sample("b", True, "= 7.0", (1.0,)),
        sample("b", False, "8", (0.0,)),
    ]
    figures = quality(samples, [(0.9,), (0.2,), (0.4,), (0.3,), (0.1,), (0.6,)])
    assert figures["labels"] == 6
    assert figures["positives"] == 3
    assert figures["accuracy"] == pytest.approx(3 / 6)
    assert figures["auc"] == pytest.approx((3 + 1 + 0) / 9)  # 0.9 above all three, 0.3 above one, 0.1 above none
    assert figures["mean"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert figures["best_of_n"] == pytest.approx((1 + 0) / 2)
    assert figures["majority_vote"] == pytest.approx((0 + 1) / 2)
    assert figures["any_right"] == 1.0


def test_a_process_model_picks_the_highest_minimum_over_steps_and_ties_are_averaged() -> None:
    samples = [sample("a", True, "1", (1.0, 1.0)), sample("a", False, "2", (1.0, 0.0)), sample("a", False, "3", (0.0,))]
    figures = quality(samples, [(0.5, 0.6), (0.9, 0.1), (0.5,)])
    assert figures["best_of_n"] == pytest.approx(1 / 2)  # 0.5 and 0.5 are the highest
    assert figures["majority_vote"] == pytest.approx(1 / 3)  # three answers with one vote each


def test_figures_without_samples_are_none() -> None:
    assert quality([], []) == {"labels": 0.0, "positives": 0.0}
    one = quality([sample("a", True, "1", (1.0,))], [(0.7,)])
    assert one["auc"] is None
    assert "best_of_n" not in one


def test_auc_and_calibration_by_hand() -> None:
    assert auc(np.array([0.1, 0.5, 0.5, 0.9]), np.array([False, True, False, True])) == pytest.approx((1.5 + 2) / 4)
    assert auc(np.array([0.1, 0.2]), np.array([True, True])) is None
    # bins 0.0-0.1: mean p 0.05, mean y 0.5; 0.9-1.0: mean p 1.0, mean y 1.0
    error = calibration_error(np.array([0.04, 0.06, 1.0, 1.0]), np.array([0.0, 1.0, 1.0, 1.0]))
    assert error == pytest.approx(0.5 * 0.45)
    with pytest.raises(ValueError, match="empty"):
        calibration_error(np.array([]), np.array([]))


# Training data.


def test_minibatches_contain_every_sample_once_per_epoch_and_keep_prompts_together() -> None:
    samples, settings = random_samples("outcome", prompts=7, size=3), RewardModel(epochs=2, batch_size=6)
    batches = list(minibatches(samples, settings, 1))
    assert [len(each) for each in batches] == [6, 6, 6, 3] * 2
    for epoch in (batches[:4], batches[4:]):
        assert sorted(id(sample) for row in epoch for sample in row) == sorted(map(id, samples))
    assert all(len({each.prompt.id for each in row}) == 2 for row in batches[:3])
    assert [id(each) for row in batches[:4] for each in row] != [id(each) for row in batches[4:] for each in row]
    again = list(minibatches(samples, settings, 1))
    assert batches == again
    assert batches != list(minibatches(samples, settings, 2))


@pytest.mark.parametrize(("share", "count"), [(0.1, 10), (0.5, 90), (0.0, 0)])
def test_history_is_its_share_of_the_training_set(share: float, count: int) -> None:
    history = random_samples("outcome", prompts=100, size=2)
    again = replayed(history, 90, RewardModel(replay_fraction=share), 2)
    assert len(again) == count
    assert count / (count + 90) == pytest.approx(share)
    assert len({id(each) for each in again}) == count, "no sample twice"
    assert again == replayed(history, 90, RewardModel(replay_fraction=share), 2)
    if count:
        assert again != replayed(history, 90, RewardModel(replay_fraction=share), 3)
        assert again != replayed(history, 90, RewardModel(replay_fraction=share, seed=1), 2)


def test_history_is_the_latest_samples_up_to_its_capacity() -> None:
    history = random_samples("outcome", prompts=100, size=2)
    again = replayed(history, 90, RewardModel(replay_fraction=0.5, replay_capacity=20), 2)
    assert again == history[-20:]
    assert replayed(history, 90, RewardModel(replay_fraction=0.5, replay_capacity=0), 2) == []


def test_a_question_is_held_out_in_every_round_or_in_none() -> None:
    samples = random_samples("outcome", prompts=200, size=2)
    training, held_out = divided(samples, 0.25, 0)
    assert len(training) + len(held_out) == 400
    assert 60 < len(held_out) < 140
    assert not {each.prompt.id for each in training} & {each.prompt.id for each in held_out}
    again, _ = divided(list(reversed(samples)), 0.25, 0)
    assert {each.prompt.id for each in again} == {each.prompt.id for each in training}
    assert divided(samples, 0.0, 0) == (samples, [])


# The model's part of a reward.


def test_scores_are_added_to_the_reward() -> None:
    rule = Reward(1.0, {"rule": 1.0})
    combined = with_scores(rule, "outcome", (3,), (0.25,), 2.0)
    assert combined.total == 1.5
    assert combined.parts == {"rule": 1.0, "reward_model": 0.25}
    steps = with_scores(rule, "process", (1, 3), (0.25, 0.5), 2.0)
    assert steps.total == 1.0
    assert steps.steps == {"reward_model": Steps((0.25, 0.5), (1, 3))}
    assert with_scores(Reward(None, {"rule": None}), "outcome", (3,), (0.25,), 2.0).total == 0.5
    failed = Reward(None, {"rule": None}, "rule: broken")
    assert with_scores(failed, "outcome", (3,), (0.25,), 1.0) is failed
