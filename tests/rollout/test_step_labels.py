"""Step labels by rule: shares of correct continuations against exact enumeration, and edge cases."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gruppo.config.sections import RewardModel
from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.native.engine import NativeEngine
from gruppo.errors import UsageError
from gruppo.models.policy import LanguageModel
from gruppo.rollout.labels import LabelledCompletion, label_rows, read_labels
from gruppo.rollout.step_labels import StepLabeller
from gruppo.rollout.workers.rewards import RewardPool
from gruppo.runs.folder import RunFolder
from gruppo.runs.tables import LABELS
from gruppo.types import Completion, Group, Prompt, Reward, Steps
from gruppo.utils.progress import NullProgress
from gruppo.utils.signals import Stop
from tests.conftest import END, make_policy

VOWELS = "tests/rewards/functions.py:ends_in_a_vowel"
EVERY_TWO = "tests/functions_of_users.py:every_two"
VOCABULARY = 8  # the EOS token and the letters a to g; a and e are correct
CORRECT = {"a", "e"}


@pytest.fixture(scope="module")
def small() -> LanguageModel:
    """A model with a smaller vocabulary than its tokenizer: it can only write the letters a to g."""
    return make_policy(vocab_size=VOCABULARY, seed=2, initializer_range=0.1)


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool([VOWELS], [], [], workers=1) as opened:
        yield opened


def labeller(policy: LanguageModel, pool: RewardPool, max_tokens: int, **settings: object) -> StepLabeller:
    engine = NativeEngine(policy, 256)
    chosen = RewardModel(**{"kind": "process", "split": EVERY_TWO, **settings})
    options = SamplingParams(temperature=1.0, max_tokens=max_tokens)
    return StepLabeller(engine, pool, policy.tokenizer, options, chosen, 0.5, NullProgress(), Stop())


def group_of(
    policy: LanguageModel, *texts: str, finish: str = "stop", verdicts: list[float | None] | None = None
) -> Group:
    completions = []
    for text in texts:
        ids = [*policy.tokenizer(text)["input_ids"], *([END] if finish == "stop" else [])]
        completions.append(Completion(tuple(ids), (0.0,) * len(ids), (True,) * len(ids), finish, 0, text))
    values = verdicts or [float(text[-1:] in CORRECT) for text in texts]
    rewards = [Reward(value, {"ends_in_a_vowel": value}, "failed" if value is None else None) for value in values]
    return Group(Prompt("t/0", "b", (2,), "t", {"answer": 1}), completions, rewards)


def probability_correct(policy: LanguageModel, ids: tuple[int, ...], text: str, room: int) -> float:
    """Exact probability of a correct end over all continuations of at most `room` tokens, by transformers."""
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([ids])).logits[0, -1].double()
    total = 0.0
    for token, share in enumerate(logits.softmax(0).tolist()):
        longer = text if token == END else text + str(policy.tokenizer.decode([token]))
        if token == END or room == 1:
            total += share * (longer[-1:] in CORRECT)
        else:
            total += share * probability_correct(policy, (*ids, token), longer, room - 1)
    return total


def test_soft_labels_are_the_probabilities_that_enumeration_gives(small: LanguageModel, pool: RewardPool) -> None:
    count = 4000
    ((labelled,), _) = labeller(small, pool, 7, continuations=count).label([group_of(small, "bacdge")], (0, 1))
    assert labelled.ends == (1, 3, 5)
    assert labelled.text_ends == (2, 4, 6)
    ids = small.tokenizer("bacdge")["input_ids"]
    for end, share in list(zip(labelled.ends, labelled.shares, strict=True))[:2]:
        exact = probability_correct(small, (2, *ids[: end + 1]), "bacdge"[: end + 1], 7 - (end + 1))
        assert 0.02 < exact < 0.98
        assert share == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / count))
    assert labelled.shares[2] == 1.0, "nothing follows the last step: the rule's verdict on the completion"


def test_the_last_step_gets_the_verdict_on_the_completion(small: LanguageModel, pool: RewardPool) -> None:
    tools = labeller(small, pool, 4, continuations=2)
    (wrong, correct), _ = tools.label([group_of(small, "bc", "be")], (0, 1))
    assert (wrong.right, wrong.shares) == (False, (0.0,))
    assert (correct.right, correct.shares) == (True, (1.0,))
    ((truncated,), _) = tools.label([group_of(small, "bcbe", finish="length")], (0, 1))
    assert truncated.shares[1] == 1.0, "truncated at the last token: there is no room to continue"


def test_the_same_key_gives_the_same_labels_and_failed_rewards_are_left_out(
    small: LanguageModel, pool: RewardPool
) -> None:
    tools = labeller(small, pool, 8, continuations=8)
    groups = [group_of(small, "bacd", "ggff", verdicts=[1.0, None]), group_of(small, "ed")]
    labelled, failures = tools.label(groups, (3, 1))
    assert [row.completion.text for row in labelled] == ["bacd", "ed"]
    assert failures == {"failed": 1}
    assert (labelled, failures) == tools.label(groups, (3, 1))
    assert [row.shares for row in labelled] != [row.shares for row in tools.label(groups, (4, 1))[0]]


def test_tokens_of_continuations_are_counted(
    small: LanguageModel, pool: RewardPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools, written = labeller(small, pool, 8, continuations=5), list[int]()
    generate = tools.engine.generate

    def counted(requests: Sequence[Request], *others: Any) -> list[list[Completion]]:
        sampled = generate(requests, *others)
        written.extend(sum(len(one.token_ids) for one in completions) for completions in sampled)
        return sampled

    monkeypatch.setattr(tools.engine, "generate", counted)
    labelled, _ = tools.label([group_of(small, "bacdge", "ed", "bcbe")], (0, 1))
    assert len(written) == 3, "two steps of the first and one of the third can be continued"
    assert [row.continuation_tokens for row in labelled] == [sum(written[:2]), 0, written[2]]


def test_a_completion_without_a_step_has_no_label(small: LanguageModel, pool: RewardPool) -> None:
    ((labelled,), _) = labeller(small, pool, 8).label([group_of(small, "")], (0, 1))
    assert labelled.ends == ()
    assert labelled.sample(RewardModel(kind="process")).labels == Steps((), ())


def test_hard_soft_and_outcome_labels() -> None:
    prompt, ids = Prompt("t/0", "q", (1,), "t", {}), (1, 2, 3, 4)
    completion = Completion(ids, (0.0,) * 4, (True,) * 4, "stop", 0, "abcd")
    labelled = LabelledCompletion(prompt, completion, True, (0, 1, 3), (1, 2, 4), (0.0, 0.25, 1.0))
    assert labelled.sample(RewardModel(kind="process")).labels == Steps((0.0, 1.0, 1.0), (0, 1, 3))
    assert labelled.sample(RewardModel(kind="process", labels="soft")).labels == Steps((0.0, 0.25, 1.0), (0, 1, 3))
    assert labelled.sample(RewardModel(kind="outcome")).labels == Steps((1.0,), (3,))


def test_outcome_labels_sample_nothing(small: LanguageModel, pool: RewardPool) -> None:
    tools = labeller(small, pool, 8, kind="outcome")
    assert [(row.right, row.ends) for row in tools.label([group_of(small, "ab", "ba")], (0, 1))[0]] == [
        (False, ()),
        (True, ()),
    ]


def test_written_labels_are_read_back(small: LanguageModel, pool: RewardPool, tmp_path: Path) -> None:
    labelled, _ = labeller(small, pool, 8, continuations=3).label([group_of(small, "bacd", "ed")], (0, 1))
    run = RunFolder(tmp_path / "labels")
    path = run.table("labels", 1, label_rows(labelled), LABELS)
    run.close()
    (row, _) = pq.read_table(path).to_pylist()
    assert row["step_texts"] == ["ba", "cd"]
    assert row["step_ends"] == [1, 3]
    assert row["hard"] == [share > 0 for share in row["soft"]]
    assert row["continuation_tokens"] >= 3, "three continuations of the first step; the last has none"
    again = read_labels([path])
    assert [(row.completion.token_ids, row.right, row.ends, row.shares, row.continuation_tokens) for row in again] == [
        (row.completion.token_ids, row.right, row.ends, row.shares, row.continuation_tokens) for row in labelled
    ]
    assert again[0].prompt.columns == {"answer": 1}


def test_a_failing_step_rule_gives_no_labels_and_is_counted(small: LanguageModel, pool: RewardPool) -> None:
    tools = labeller(small, pool, 8, split="tests/functions_of_users.py:fails_on_short_texts")
    labelled, failures = tools.label([group_of(small, "bacde", "ed")], (0, 1))
    assert [row.completion.text for row in labelled] == ["bacde"]
    ((why, count),) = failures.items()
    assert (count, "reward_model.split" in why) == (1, True)


def test_the_rule_labels_completions_for_which_another_reward_failed(small: LanguageModel, pool: RewardPool) -> None:
    group = group_of(small, "ba")
    group.rewards = [Reward(None, {"ends_in_a_vowel": 1.0, "other": None}, "other: broken")]
    ((labelled,), failures) = labeller(small, pool, 8, kind="outcome").label([group], (0, 1))
    assert labelled.right
    assert not failures


def test_a_file_that_is_not_a_table_of_labels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "step-000001.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(UsageError, match="is not a table of labels"):
        read_labels([path])
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(UsageError, match="is not a table of labels"):
        read_labels([path])
