"""Runs whose reward is a judge behind an address: training, a kill and a resume, `gruppo check`, and consent."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from gruppo.config.loading import load_recipe
from gruppo.errors import RunError, UsageError
from gruppo.preflight.check import check_recipe
from gruppo.runs.trust import _SENDING, code_of, code_of_call
from gruppo.rewards import REWARDS
from gruppo.training.reproduce import reproduce
from tests.rewards.remote.stand_in import Reply, StandIn, by_length, chat, in_turn, stand_in
from tests.small_runs import ROWS, fingerprint, killed, recipe, small_run

JUDGE = {"model": "m", "maximum": 1000, "timeout": 5.0}


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def settings(one: StandIn, **options: Any) -> dict[str, Any]:
    judge = {**JUDGE, "url": one.url, **options}
    return {
        "reward__functions": ["llm_judge"],
        "reward__options": {"llm_judge": judge},
        "reward__timeout": 20.0,
        "run__steps": 3,
        "run__checkpoint_every": 3,
    }


def test_a_killed_run_resumes_with_the_same_numbers(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that never says the same twice. The killed run repeats its steps with the kept answers; the run that is
    not killed starts with a copy of them."""
    scores = itertools.count()
    with stand_in(lambda _: chat(json.dumps({"score": next(scores)}))) as one:
        changes = settings(one)
        with killed(monkeypatch, "gruppo.training.run.describe_groups", 3):
            small_run(tiny_model, tmp_path / "run", **changes)
        asked = len(one.requests)
        kept = (tmp_path / "run/reward_cache.sqlite").read_bytes()
        small_run(tiny_model, tmp_path / "run", resume=True, **changes)
        assert len(one.requests) == asked
        resumed = fingerprint(tmp_path / "run")
        whole = tmp_path / "whole"
        monkeypatch.setattr("gruppo.training.setup.REWARD_CACHE", "../kept.sqlite")
        (tmp_path / "kept.sqlite").write_bytes(kept)
        small_run(tiny_model, whole, **changes)
        assert len(one.requests) == asked
        assert fingerprint(whole) == resumed
        monkeypatch.undo()
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert not reproduce(tmp_path / "run", 2, progress=False).differences
        assert len(one.requests) == asked
    assert resumed["metrics"][0]["reward/log/llm_judge/calls"] > 0


def test_a_judge_that_fails_stops_the_run(tiny_model: str, tmp_path: Path) -> None:
    with stand_in(in_turn(Reply({"error": "no credit"}, status=402))) as one:
        with pytest.raises(RunError, match="no credit"):
            small_run(tiny_model, tmp_path / "run", **settings(one))
    (event, *_) = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert event["kind"] == "reward_failed"
    assert "status 402" in event["message"]


@pytest.mark.parametrize(
    ("answer", "severity", "text"),
    [(by_length, "ok", "llm_judge 0."), (in_turn(Reply({}, status=401)), "problem", "status 401")],
)
def test_check_asks_the_judge(tiny_model: str, tmp_path: Path, answer: Any, severity: str, text: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with stand_in(answer) as one:
        tried = recipe(tiny_model, **settings(one), task__name=str(rows))
        found = check_recipe(tried, seconds=20).findings
    assert one.requests
    assert any(finding.severity == severity and text in finding.what for finding in found), found


def test_rewards_that_send_data_need_consent(tmp_path: Path) -> None:
    """A stranger's run folder could send an environment variable of the user's to the stranger."""
    assert set(_SENDING) <= set(REWARDS)
    options = {"url": "http://stranger.invalid", "model": "m", "key": "HOME"}
    tried = recipe("m", reward__functions=["kind = llm_judge", "last_number"], reward__options={"kind": options},
                   reward__environment=["HOME"])  # fmt: skip
    (code,) = code_of(load_recipe(tried))
    assert (code.name, code.options, code.variables) == ("llm_judge", options, ("HOME",))
    call = {"function": "kind = llm_judge", "options": options, "environment": ["HOME"]}
    assert "http://stranger.invalid" in str(code_of_call(tmp_path, call)[0])


def test_a_stranger_s_run_with_a_judge_is_not_reproduced(tiny_model: str, tmp_path: Path) -> None:
    with stand_in(by_length) as one:
        small_run(tiny_model, tmp_path / "run", **settings(one, maximum=10_000))
        (tmp_path / "run").rename(tmp_path / "moved")
        asked = len(one.requests)
        with pytest.raises(UsageError, match='reward.functions = "llm_judge"'):
            reproduce(tmp_path / "moved", 2, progress=False)
        assert len(one.requests) == asked
