"""The reward remote: the requests and answers of OpenRLHF's and verl's reward servers."""

from __future__ import annotations

import asyncio
import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from gruppo.errors import UsageError
from gruppo.rewards import RewardRun, reward_path
from gruppo.rewards.loading import load_reward
from gruppo.rewards.remote import http
from gruppo.rewards.remote.http import RequestError
from gruppo.rewards.remote.server import Remote
from gruppo.rollout.workers.rewards import RewardPool
from tests.conftest import make_tokenizer
from tests.hub_server import Hub, serving, use
from tests.rewards.remote.stand_in import CUTS, HANGS, Reply, StandIn, in_turn, stand_in
from tests.rollout.workers.test_rewards import group, totals

ASKED = [{"role": "user", "content": "one or two"}]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(http, "FIRST_PAUSE", 0.001)


def values(one: StandIn, kind: str, *texts: Any, prompt: Any = "q: ", columns: Any = None, **options: Any) -> list:
    """The values of a group; failures as texts."""
    reward = Remote(url=one.url, format=kind, **options)  # type: ignore[arg-type]
    size = len(texts)
    rows = {name: [value] * size for name, value in (columns or {}).items()}
    found = asyncio.run(reward(prompts=[prompt] * size, completions=list(texts), **rows))
    return [str(value) if isinstance(value, RequestError) else value for value in found]


def lengths(body: dict[str, Any]) -> Reply:
    """An OpenRLHF server that counts characters."""
    return Reply({"rewards": [len(query) for query in body["query"]]})


def test_openrlhf_sends_a_group_at_once() -> None:
    with stand_in(lengths) as one:
        assert values(one, "openrlhf", "a", "bbb", columns={"answer": 4}) == [4.0, 6.0]
        assert values(one, "openrlhf", "a", columns={"right": [1, date(2026, 1, 2)]}, label="right") == [4.0]
    assert one.requests == [
        {"query": ["q: a", "q: bbb"], "prompts": ["q: ", "q: "], "labels": [4, 4]},
        {"query": ["q: a"], "prompts": ["q: "], "labels": [[1, "2026-01-02"]]},
    ]


def test_openrlhf_extra_logs_are_logged() -> None:
    answer = {"rewards": [1, 2.5], "scores": [0, 1], "extra_logs": {"kind": [3, 5], "note": ["x", None], "odd": [1]}}
    with stand_in(in_turn(Reply(answer))) as one:
        options = {"remote": {"url": one.url, "format": "openrlhf", "timeout": 2.0}}
        with RewardPool(["remote"], [], [], options=options, workers=1) as pool:
            (rewards,), metrics = pool.score([group("a", "b")], {"global_step": 0})
    assert totals(rewards) == [1.0, 2.5]
    assert [reward.extra for reward in rewards] == [{"kind": "3", "note": "x"}, {"kind": "5", "note": "None"}]
    assert metrics["kind"] == [3, 5]
    assert metrics["remote/calls"] == [1]
    assert "odd" not in metrics


@pytest.mark.parametrize(
    "answer", [0.5, {"score": 0.5, "acc": 1}, {"reward": 0.5}, {"reward_score": 0.5, "reward_extra_info": {}}]
)
def test_verl_sends_the_arguments_of_compute_score(answer: Any) -> None:
    columns = {"data_source": "maths", "reward_model": {"ground_truth": "4"}, "extra_info": {"split": "train"}}
    with stand_in(in_turn(Reply(answer))) as one:
        assert values(one, "verl", "is 4", "is 4", prompt=ASKED, columns=columns) == [0.5, 0.5]
    shared = {"data_source": "maths", "ground_truth": "4", "extra_info": {"split": "train"}}
    assert one.requests == [{**shared, "solution_str": "is 4"}]


def test_verl_without_a_ground_truth() -> None:
    with stand_in(in_turn(Reply(1))) as one:
        assert values(one, "verl", "a") == [1.0]
    assert one.requests == [{"data_source": "", "solution_str": "a", "ground_truth": None, "extra_info": {}}]


def test_vllm_and_sglang_score_a_rendered_conversation(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    with stand_in(in_turn(Reply({"data": [{"probs": [0.1, 0.9]}]}))) as one:
        found = values(one, "vllm", "one", prompt=ASKED, model="rm", tokenizer=str(tmp_path))
        assert found == [0.9]
        assert one.requests == [{"model": "rm", "input": "<one or two><one>", "use_activation": False}]
    with stand_in(in_turn(Reply({"data": [{"embedding": [-2.5]}]}))) as one:
        assert values(one, "sglang", "one", prompt=ASKED, model="rm") == [-2.5]
        assert one.requests == [{"model": "rm", "input": "one or two\none"}]


def test_openrlhf_renders_the_prompt_with_its_generation_prompt(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    with stand_in(lengths) as one:
        values(one, "openrlhf", "one", prompt=ASKED, tokenizer=str(tmp_path))
        started = [*ASKED, {"role": "assistant", "content": "it is "}]
        values(one, "openrlhf", "one", prompt=started, tokenizer=str(tmp_path))
        values(one, "openrlhf", "one", prompt=ASKED)
    assert [body["query"] for body in one.requests] == [
        ["<one or two>=one"],
        ["<one or two><it is one"],
        ["one or two\none"],
    ]


def test_the_tokenizer_on_the_hub_at_a_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    hub = Hub()
    hub.add("me/policy", {})
    files = {path.name: path.read_bytes() for path in (tmp_path / "tokenizer").iterdir()}
    hub.repositories["models", "me/policy"].commit("v1", files)
    with serving(hub) as address, stand_in(lengths) as one:
        use(address, None, str(tmp_path / "cache"), monkeypatch)
        values(one, "openrlhf", "one", prompt=ASKED, tokenizer="me/policy@v1")
        with pytest.raises(UsageError, match="tokenizer = 'me/policy': cannot be loaded"):
            values(one, "openrlhf", "one", prompt=ASKED, tokenizer="me/policy")
    assert one.requests[0]["query"] == ["<one or two>=one"]


@pytest.mark.parametrize(
    ("kind", "answer", "why"),
    [
        ("openrlhf", {"rewards": [1]}, "1 rewards for 2 completions"),
        ("openrlhf", {"rewards": [1, 2, 3]}, "3 rewards for 2 completions"),
        ("openrlhf", {"rewards": [1, None]}, "None in place of a finite number"),
        ("openrlhf", {"rewards": [1, "2"]}, "2 in place of a finite number"),
        ("openrlhf", {"rewards": [[1], [2]]}, "[1] in place of a finite number"),
        ("openrlhf", {"rewards": [True, False]}, "True in place of a finite number"),
        ("openrlhf", {"rewards": 1}, 'without a list "rewards"'),
        ("openrlhf", {"scores": [1, 2]}, 'without a list "rewards"'),
        ("openrlhf", [1, 2], 'without a list "rewards"'),
        ("verl", {"acc": 1}, "None in place of a finite number"),
        ("verl", "0.5", "0.5 in place of a finite number"),
        ("vllm", {"data": []}, 'without data[-1]["probs"][-1]'),
        ("sglang", {"data": [{"probs": [1]}]}, 'without data[-1]["embedding"][-1]'),
        ("openrlhf", b'{"rewards": [NaN, 1]}', "not JSON"),
        ("openrlhf", b'{"rewards": [1e999, 1]}', "inf in place of a finite number"),
        ("openrlhf", b"<html>Welcome</html>", "not JSON (<html>Welcome</html>)"),
        ("openrlhf", {"rewards": [1, 9]}, "9, which is not from 0 to 1"),
    ],
)
def test_a_wrong_answer_excludes_and_never_gives_0(kind: str, answer: Any, why: str) -> None:
    options: dict[str, Any] = {"minimum": 0, "maximum": 1} if "9, which" in why else {}
    options |= {"model": "rm"} if kind in ("vllm", "sglang") else {}
    with stand_in(in_turn(Reply(answer))) as one:
        found = values(one, kind, "a", "b", tries=2, **options)
    assert all(isinstance(value, str) and why in value and "in 2 tries" in value for value in found)


@pytest.mark.parametrize("trouble", [HANGS, CUTS, Reply({}, status=500), Reply({}, status=429)], ids=str)
def test_trouble_that_passes(trouble: Any) -> None:
    with stand_in(in_turn(trouble, lengths)) as one:
        assert values(one, "openrlhf", "a", timeout=0.5) == [4.0]


def test_one_completion_fails_alone_where_each_has_its_request() -> None:
    def odd(body: dict[str, Any]) -> Reply:
        return Reply({}, status=422) if body["solution_str"] == "b" else Reply({"score": 1})

    with stand_in(odd) as one:
        assert [type(value) for value in values(one, "verl", "a", "b", "c")] == [float, str, float]


def test_answers_are_kept_for_a_resume(tmp_path: Path) -> None:
    moods = iter(range(10))
    with stand_in(lambda _: Reply({"score": next(moods), "note": "n"})) as one:
        found = []
        for step in (2, 2, 3):
            options = {"remote": {"url": one.url, "format": "verl", "timeout": 2.0}}
            with RewardPool(["remote"], [], [], options=options, workers=1, cache=tmp_path / "cache.sqlite") as pool:
                found.append(pool.score([group("a", "b")], {"global_step": step}))
    assert len(one.requests) == 2
    assert found[0] == found[1]
    assert found[2][0] == found[0][0]
    assert found[2][1]["remote/cached"] == [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tgi"}, "reward.options.remote.format = 'tgi': unknown format; known: openrlhf"),
        ({"format": "vllm"}, "reward.options.remote.model = '': format = \"vllm\" sends a model"),
        ({"model": "rm"}, "reward.options.remote.model = 'rm': format = \"verl\" sends no model; remove it"),
        ({"tokenizer": "x"}, "reward.options.remote.tokenizer = 'x': format = \"verl\" sends no conversation"),
        ({"minimum": 1, "maximum": 0}, "reward.options.remote.minimum = 1: must be less than maximum = 0"),
        ({"maximum": float("nan")}, "reward.options.remote.maximum = nan: must be a finite number"),
        (
            {"tokenizer": "/nowhere", "format": "openrlhf"},
            "reward.options.remote.tokenizer = '/nowhere': cannot be loaded",
        ),
        ({"label": 3}, "reward.options.remote.label = 3: must be text"),
        ({"url": "host:80"}, "reward.options.remote.url = 'host:80': must be an address"),
        ({"timeout": 60}, "timeout = 60: one request may take as long as reward.timeout = 10 allows"),
    ],
)
def test_bad_options_are_refused_before_the_run(options: dict[str, Any], message: str) -> None:
    given = {"url": "http://127.0.0.1:1", "format": "verl", "timeout": 2.0, **options}
    with pytest.raises(UsageError, match=re.escape(message)):
        load_reward(reward_path("remote"), "remote", given, [], run=RewardRun("remote", 10.0))
