"""Runs whose reward is a judge behind an address: training, a kill and a resume, `gruppo check`, and consent."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gruppo.config.loading import load_recipe
from gruppo.errors import RunError, UsageError
from gruppo.preflight.check import check_recipe
from gruppo.rewards import REWARDS
from gruppo.runs.trust import _SENDING, code_of, code_of_call
from gruppo.training.reproduce import reproduce
from tests.rewards.remote.stand_in import Reply, StandIn, by_length, chat, in_turn, quoted, stand_in
from tests.small_runs import ROWS, killed, recipe, small_run

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


def records(run: Path) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """Metrics and rollouts of the first two steps, without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines]
    tables = [pq.read_table(run / f"rollouts/step-{step:06d}.parquet").to_pylist() for step in (1, 2)]
    return [line for line in metrics if line["step"] in (1, 2) and "reward/mean" in line], tables


def test_a_killed_run_resumes_with_the_same_numbers(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge never says the same twice. The run is killed in step 3 without a checkpoint; its repeated steps have
    the kept answers, and so does a reproduced step."""
    scores, run = itertools.count(), tmp_path / "run"
    with stand_in(lambda _: chat(json.dumps({"score": next(scores)}))) as one:
        changes = settings(one)
        with killed(monkeypatch, "gruppo.training.run.describe_groups", 3):
            small_run(tiny_folder, run, **changes)
        before, asked = records(run), len(one.requests)
        small_run(tiny_folder, run, resume=True, **changes)
        assert len(one.requests) == asked
        assert records(run) == before
        assert not reproduce(run, 2, prompts=ROWS, progress=False).differences
        assert len(one.requests) == asked
    metrics, tables = before
    assert [line["reward/excluded"] for line in metrics] == [0, 0]
    assert sum(line["reward/log/llm_judge/calls"] for line in metrics) >= 6
    assert "completion 0: " in tables[0][0]["printed"]


def test_a_judge_that_fails_stops_the_run(tiny_folder: str, tmp_path: Path) -> None:
    broke = Reply({"error": "no credit"}, status=402)
    with stand_in(in_turn(broke)) as one, pytest.raises(RunError, match="no credit"):
        small_run(tiny_folder, tmp_path / "run", **settings(one))
    (event, *_) = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert event["kind"] == "reward_failed"
    assert "status 402" in event["message"]


def by_letters(body: dict[str, Any]) -> Reply:
    """A score for almost every completion; 0 if it has a letter a."""
    text = quoted(body, "response")
    return chat(f"[[{0 if 'a' in text else sum(map(ord, text)) % 1000}]]")


@pytest.mark.parametrize(
    ("answer", "severity", "text"),
    [(by_letters, "ok", "llm_judge 0 to 0."), (in_turn(Reply({}, status=401)), "problem", "status 401")],
)
def test_check_asks_the_judge(tiny_folder: str, tmp_path: Path, answer: Any, severity: str, text: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with stand_in(answer) as one:
        tried = recipe(tiny_folder, **settings(one), task__name=str(rows))
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


def test_a_stranger_s_run_with_a_judge_is_not_reproduced(tiny_folder: str, tmp_path: Path) -> None:
    with stand_in(by_length) as one:
        small_run(tiny_folder, tmp_path / "run", **settings(one, maximum=10_000))
        (tmp_path / "run").rename(tmp_path / "moved")
        asked = len(one.requests)
        with pytest.raises(UsageError, match=r'reward\.functions = "llm_judge"'):
            reproduce(tmp_path / "moved", 2, prompts=ROWS, progress=False)
        assert len(one.requests) == asked
