"""Groups that are scored while others are sampled, as with reward hosts: no value depends on their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from gruppo.engines.base import Engine, Request, SamplingParams
from gruppo.rollout.live import LiveRollouts
from gruppo.rollout.sampling import sample_groups
from gruppo.rollout.workers.rewards import RewardPool
from gruppo.rollout.workers.scoring import Scoring
from gruppo.types import Completion
from gruppo.utils.progress import Advance, NullProgress
from gruppo.utils.signals import Interrupted, Stop
from tests.rollout.workers.test_rewards import group
from tests.small_runs import fingerprint, small_run

HOME = "tests.rewards.functions"
GROUPS = [group(text, text[::-1]) for text in ("abc", "mnop", "z", "aaaa", "hello")]
STATE = {"global_step": 3}


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool([f"{HOME}:{name}" for name in ("likes_letters", "logs")], [1.0, 0.5], [], timeout=60) as opened:
        yield opened


class InThisOrder(Engine):
    """Finishes prompts in an order. Before the last one it waits until a group is scored."""

    def __init__(self, order: Sequence[int], scoring: Scoring) -> None:
        self.order, self.scoring, self.scored_meanwhile = order, scoring, 0

    def stream(
        self, requests: Sequence[Request], params: SamplingParams, advance: Advance | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        assert advance is not None
        for place in self.order:
            while place == self.order[-1] and not self.scored_meanwhile:
                advance(1)
                self.scored_meanwhile = len(self.scoring._outcomes)
            yield place, GROUPS[place][1]


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 2, 3, 0, 1)])
def test_groups_are_scored_while_others_are_sampled(pool: RewardPool, order: Sequence[int]) -> None:
    prompts = [prompt for prompt, _ in GROUPS]
    with pool.begin(prompts, STATE) as scoring:
        engine = InThisOrder(order, scoring)
        streams = [[(0, number)] for number in range(len(prompts))]
        options = engine, prompts, streams, SamplingParams(1.0, 4), NullProgress(), Stop()
        assert sample_groups(*options, listener=scoring) == [completions for _, completions in GROUPS]
        shown: list[float] = []
        found = scoring.finish(shown.append)
    assert engine.scored_meanwhile
    assert found == pool.score(GROUPS, STATE)
    assert sum(shown) == pytest.approx(len(GROUPS))


def test_a_step_that_is_interrupted_leaves_no_old_answers(pool: RewardPool) -> None:
    def interrupted() -> None:
        with pool.begin([prompt for prompt, _ in GROUPS], STATE) as scoring:
            scoring.add(2, GROUPS[2][1])
            scoring.turn()
            raise Interrupted

    with pytest.raises(Interrupted):
        interrupted()
    assert pool.score(GROUPS[:2], STATE)[0] == pool.score(GROUPS, STATE)[0][:2]


def test_a_worker_stays_with_a_function(tmp_path: Path) -> None:
    """A change of functions costs a look at the process, and a new one if something was left behind."""
    log = tmp_path / "calls"
    for name in "ab":
        (tmp_path / f"{name}.py").write_text(
            f"def f(completions, **_):\n    open({str(log)!r}, 'a').write({name!r})\n    return [1.0]\n"
        )
    alone = [group(text) for text in "abcde"]
    with (
        RewardPool([f"{tmp_path}/{name}.py:f" for name in "ab"], [], [], workers=1) as opened,
        opened.begin([prompt for prompt, _ in alone], {}) as scoring,
    ):
        for place in (3, 1):
            scoring.add(place, alone[place][1])
        while len(scoring._outcomes) < 3:
            scoring.turn(0.5)
        for place in (0, 2, 4):
            scoring.add(place, alone[place][1])
        scoring.finish()
    assert log.read_text() in ("aabbbbbaaa", "aabbbaaabb")  # the last ones came before or after the second b


@pytest.mark.parametrize("changes", [{}, {"method__dynamic_sampling_rounds": 2, "reward__workers": 2}], ids=str)
def test_a_run_that_scores_while_it_samples_equals_one_that_does_not(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"reward__functions": [f"{HOME}:begins_with_a_letter", f"{HOME}:logs"], "run__steps": 3}
    small_run(tiny_folder, tmp_path / "one", **options, **changes)
    monkeypatch.setattr(LiveRollouts, "streamed", property(lambda _: True, lambda *_: None), raising=False)
    small_run(tiny_folder, tmp_path / "two", **options, **changes)
    assert fingerprint(tmp_path / "two") == fingerprint(tmp_path / "one")
