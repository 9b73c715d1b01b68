"""The reward llm_judge against a stand-in, in its own process as in a run."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from gruppo.errors import UsageError
from gruppo.rewards import RewardRun, reward_path
from gruppo.rewards.loading import load_reward
from gruppo.rewards.remote import http
from gruppo.rewards.remote.judge import JudgeError, LLMJudge
from gruppo.rollout.workers.rewards import RewardPool
from gruppo.types import Reward
from tests.rewards.remote.stand_in import HANGS, Reply, StandIn, by_length, chat, in_turn, quoted, stand_in
from tests.rollout.workers.test_rewards import group, totals

TEXTS = ("a", "bbb", "cc", "a")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(http, "FIRST_PAUSE", 0.001)


def judge(one: StandIn, **options: Any) -> LLMJudge:
    return LLMJudge(**{"url": f"{one.url}/v1", "model": "m", **options})


def values(reward: LLMJudge, *texts: str, **columns: Any) -> list[Any]:
    """The values of a group; failures as texts."""
    size = len(texts)
    rows = {name: [value] * size for name, value in columns.items()}
    found = asyncio.run(reward(prompts=["q"] * size, completions=list(texts), **rows))
    return [str(value) if isinstance(value, JudgeError) else value for value in found]


def pool(one: StandIn, log: Path | None = None, name: str = "llm_judge", **changes: Any) -> RewardPool:
    """A process with a judge and, after it, another reward."""
    options = {"url": f"{one.url}/v1", "model": "m", "timeout": 2.0, **changes.pop("options", {})}
    settings = {"timeout": 10.0, "workers": 1, "options": {name.partition(" ")[0]: options}, **changes}
    cache = None if log is None else log.with_name("reward_cache.sqlite")
    return RewardPool([name, "tests.rewards.functions:length"], [1, 0], [], log=log, cache=cache, **settings)


def test_scores(capsys: pytest.CaptureFixture[str]) -> None:
    with stand_in(by_length) as one:
        assert values(judge(one), *TEXTS) == [0.1, 0.3, 0.2, 0.1]
    assert len(one.requests) == 3  # equal texts are judged once
    assert set(one.paths) == {"/v1/chat/completions"}
    assert {name: one.requests[0][name] for name in ("model", "temperature", "max_tokens")} == {
        "model": "m",
        "temperature": 0,
        "max_tokens": 512,
    }
    assert quoted(one.requests[0], "question") == "q"
    shown = capsys.readouterr().out
    assert 'completion 1: 0.3\n{"reason": "its length", "score": 3}' in shown


def test_pairwise_shares_of_wins() -> None:
    """a loses against bbb and cc and ties with its double, in both orders: 2 · ½ of 6."""
    with stand_in(by_length) as one:
        assert values(judge(one, mode="pairwise"), *TEXTS) == pytest.approx([1 / 6, 1.0, 4 / 6, 1 / 6], abs=1e-12)
    assert len(one.requests) == 6  # three texts, two orders; equal texts tie without being asked


def test_pairwise_with_fewer_opponents() -> None:
    """With one opponent, each is compared with the next and the one before, in a ring."""
    with stand_in(by_length) as one:
        found = values(judge(one, mode="pairwise", opponents=1), "a", "bb", "ccc", "dddd", "eeeee")
    assert found == [0.0, 0.5, 0.5, 0.5, 1.0]
    assert len(one.requests) == 10


def test_a_judge_that_prefers_a_place_decides_nothing() -> None:
    with stand_in(in_turn(chat("[[A]]"))) as one:
        assert values(judge(one, mode="pairwise"), "a", "bbb", "cc") == [0.5, 0.5, 0.5]


def test_a_group_of_one_has_nobody_to_be_compared_with() -> None:
    with stand_in(by_length) as one:
        (found,) = values(judge(one, mode="pairwise"), "a")
    assert "no other to compare it with" in found


def test_an_unreadable_answer_is_asked_for_once_more() -> None:
    with stand_in(in_turn(chat("I like it: 7"), chat("[[7]]"))) as one:
        assert values(judge(one), "a") == [0.7]
    first, second = one.requests
    assert second["messages"][:2] == first["messages"]
    assert second["messages"][2] == {"role": "assistant", "content": "I like it: 7"}
    assert "I cannot read this answer: it is no JSON object" in second["messages"][3]["content"]


def test_then_only_this_completion_has_no_value() -> None:
    def vague(body: dict[str, Any]) -> Reply:
        return chat("Well …") if quoted({"messages": body["messages"][:2]}, "response") == "bbb" else by_length(body)

    with stand_in(vague) as one:
        assert values(judge(one), *TEXTS) == [
            0.1,
            "the judge's answer cannot be read: it is no JSON object",
            0.2,
            0.1,
        ]
    assert len(one.requests) == 4


def test_a_hostile_completion_does_not_spoil_the_others() -> None:
    """A completion that makes the judge fail whenever it is compared is excluded; the others keep their other
    comparisons."""

    def confused(body: dict[str, Any]) -> Reply:
        return Reply({}, status=400) if "BREAK" in body["messages"][1]["content"] else by_length(body)

    with stand_in(confused) as one:
        found = values(judge(one, mode="pairwise"), "a", "BREAK", "ccc", "dd")
    assert found[0::2] == [0.0, 1.0]
    assert found[3] == 0.5
    assert "status 400" in found[1]


@pytest.mark.parametrize(
    "answer",
    [
        Reply({}, status=500),
        Reply({}, status=429, headers={"Retry-After": "0"}),
        Reply(b"<html>Bad gateway</html>", status=502),
        Reply(b"<html>Welcome</html>"),
        Reply({"choices": []}),
        Reply({"choices": [{"message": {"content": None}}]}),
        Reply({"choices": [{"message": {"content": None, "refusal": "I will not"}}]}),
        Reply([]),
        chat('{"score": NaN}'),
        chat('{"score": 99}'),
        HANGS,
    ],
    ids=str,
)
def test_a_judge_that_fails_excludes_and_never_gives_0(answer: Any) -> None:
    with stand_in(in_turn(answer)) as one:
        found = values(judge(one, tries=2, timeout=0.3), "a", "bb")
    assert [type(value) for value in found] == [str, str]


def test_a_judge_that_is_down_excludes_every_completion() -> None:
    with stand_in(by_length) as one:
        pass
    with pool(one, options={"tries": 2}) as rewards:
        scored = rewards.score([group("a", "bb")], {"global_step": 0})[0][0]
    assert totals(scored) == [None, None]
    assert all("ConnectError" in (reward.failure or "") for reward in scored)


def test_a_slow_judge_costs_only_the_completions_that_it_does_not_reach() -> None:
    """The call ends by itself before reward.timeout would end its process."""

    def slow(body: dict[str, Any]) -> Any:
        return HANGS if quoted(body, "response") == "bb" else by_length(body)

    with stand_in(slow) as one, pool(one, timeout=1.0, options={"timeout": 0.9}) as rewards:
        scored = rewards.score([group("a", "bb")], {"global_step": 0})[0][0]
        one.released.set()
    assert totals(scored) == [0.1, None]
    assert "no answer" in (scored[1].failure or "")


def test_prompts_references_and_criteria_reach_the_judge() -> None:
    options = {"rubric": "Costs $5 or less.", "reference": "right", "minimum": 1, "maximum": 5}
    with stand_in(in_turn(chat("[[3]]"))) as one:
        assert values(judge(one, **options), "a", right=42) == [0.5]
        text = one.requests[-1]["messages"][1]["content"]
        assert "Criteria: Costs $5 or less." in text
        assert "a number from 1 to 5 " in text
        assert quoted(one.requests[-1], "reference") == "42"
        assert values(judge(one, **options), "a", right=None) == [0.5]
        assert "<reference" not in one.requests[-1]["messages"][1]["content"]
        own = {"prompt": "Rate $response for $$1, from $minimum", "system": ""}
        assert values(judge(one, **own), "b") == [0.3]
        (message,) = one.requests[-1]["messages"]
        assert re.fullmatch(r"Rate <response-(\w+)>\nb\n</response-\1> for \$1, from 0", message["content"])


def test_conversations() -> None:
    asked = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
    started = [asked[1], {"role": "assistant", "content": "Hel"}]
    answer = [{"role": "assistant", "content": "lo"}]
    with stand_in(by_length) as one:
        assert asyncio.run(judge(one)(prompts=[asked], completions=[answer])) == [0.2]
        assert quoted(one.requests[-1], "question") == "[system]\nBe kind.\n\n[user]\nhi"
        assert asyncio.run(judge(one)(prompts=[started], completions=[answer])) == [0.5]
    assert quoted(one.requests[-1], "question") == "hi"
    assert quoted(one.requests[-1], "response") == "Hello"


def test_parameters_replace_the_defaults() -> None:
    with stand_in(by_length) as one:
        values(judge(one, parameters={"max_completion_tokens": 99}), "a")
    assert one.requests[0].keys() == {"model", "messages", "max_completion_tokens"}


def scored_with_cache(one: StandIn, log: Path, step: int, **changes: Any) -> tuple[list[Reward], dict[str, Any]]:
    with pool(one, log, **changes) as rewards:
        (found,), metrics = rewards.score([group(*TEXTS)], {"global_step": step})
    return found, {name: values for name, values in metrics.items() if name.startswith("llm_judge")}


def counts(calls: int, cached: int = 0, excluded: int = 0) -> dict[str, list[float]]:
    numbers = {"calls": calls, "retries": 0, "cached": cached, "prompt_tokens": 20 * calls,
               "completion_tokens": 5 * calls, "excluded": excluded}  # fmt: skip
    return {f"llm_judge/{name}": [number] for name, number in numbers.items()}


def test_a_resumed_step_has_the_same_values_metrics_and_texts(tmp_path: Path) -> None:
    """The judge changes its mind; the kept answers do not. In a later step they count as cached."""
    moods = iter(range(100))
    with stand_in(lambda _: chat(json.dumps({"score": next(moods)}))) as one:
        options = {"options": {"maximum": 1000}}
        first = scored_with_cache(one, tmp_path / "rewards.log", 3, **options)
        again = scored_with_cache(one, tmp_path / "rewards.log", 3, **options)
        later = scored_with_cache(one, tmp_path / "rewards.log", 4, **options)
        other = scored_with_cache(one, tmp_path / "rewards.log", 4, options={"maximum": 999})
        unkept = scored_with_cache(one, tmp_path / "rewards.log", 3, options={"maximum": 1000, "cache": False})
    assert first == again
    assert first[1] == counts(3)
    assert [reward.printed for reward in first[0]] == [reward.printed for reward in later[0]]
    assert '{"score": ' in first[0][0].printed["llm_judge"]
    assert totals(first[0]) == totals(later[0])
    assert later[1] == counts(0, cached=3)
    assert totals(other[0]) != totals(first[0]) != totals(unkept[0])
    assert len(one.requests) == 9


def test_failures_are_not_kept(tmp_path: Path) -> None:
    with stand_in(in_turn(*[chat("Well …")] * 6, by_length)) as one:
        first = scored_with_cache(one, tmp_path / "rewards.log", 0)
        second = scored_with_cache(one, tmp_path / "rewards.log", 0)
    assert totals(first[0]) == [None] * 4
    assert first[1] == counts(6, excluded=4)
    assert totals(second[0]) == [0.1, 0.3, 0.2, 0.1]


def test_two_judges_have_metrics_of_their_own() -> None:
    with stand_in(by_length) as one:
        options = {"url": one.url, "model": "m", "timeout": 2.0}
        names = ["kind = llm_judge", "true = llm_judge"]
        with RewardPool(names, [], [], options={"kind": options, "true": options}, workers=1) as rewards:
            _, metrics = rewards.score([group("a")], {"global_step": 0})
    assert metrics["kind/calls"] == metrics["true/calls"] == [1]


def test_the_key_is_passed_by_name_and_stays_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "sk-very-secret-1234"
    monkeypatch.setenv("JUDGE_KEY", secret)
    leak = Reply({"error": f"{secret} is no good key"}, status=401)
    with stand_in(in_turn(chat(f"[[7]] {secret}"), leak)) as one:
        settings = {"environment": ["JUDGE_KEY"], "options": {"key": "JUDGE_KEY"}}
        with pool(one, tmp_path / "rewards.log", **settings) as rewards:
            (found,), _ = rewards.score([group("a"), group("b")], {"global_step": 0})[0][:1], None
            scored = rewards.score([group("b", "c")], {"global_step": 1})[0][0]
        assert one.keys[0] == f"Bearer {secret}"
        with pytest.raises(UsageError, match=r'JUDGE_KEY is not passed .* write reward.environment = \["JUDGE_KEY"\]'):
            pool(one, options={"key": "JUDGE_KEY"})
    assert totals(found) == [0.7]
    assert "[[7]] ***" in found[0].printed["llm_judge"]
    assert "*** is no good key" in (scored[1].failure or "")
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"[[7]] ***" in written
    assert secret.encode() not in written


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ""}, "reward.options.llm_judge.model = '': must be text"),
        ({"mode": "votes"}, 'reward.options.llm_judge.mode = \'votes\': must be "rubric" or "pairwise"'),
        ({"minimum": 5, "maximum": 5}, "reward.options.llm_judge.minimum = 5: must be less than maximum = 5"),
        ({"maximum": float("inf")}, "reward.options.llm_judge.maximum = inf: must be a finite number"),
        ({"opponents": 2}, 'reward.options.llm_judge.opponents = 2: has no effect with mode = "rubric"'),
        ({"opponents": -1, "mode": "pairwise"}, "reward.options.llm_judge.opponents = -1: must be a whole number"),
        ({"prompt": "Grade it"}, "reward.options.llm_judge.prompt: lacks $response"),
        ({"prompt": "$response_a", "mode": "pairwise"}, "reward.options.llm_judge.prompt: lacks $response_b"),
        ({"system": "$rubric"}, "reward.options.llm_judge.system: has the unknown variable $rubric"),
        ({"parameters": {"stream": True}}, "reward.options.llm_judge.parameters.stream = True: is set by the judge"),
        ({"reference": "right"}, "needs the column right in every row"),
        ({"timeout": 10.0}, "timeout = 10: one request may take as long as reward.timeout = 10 allows"),
        ({"cache": "yes"}, "reward.options.llm_judge.cache = 'yes': must be true or false"),
        ({"api_key": "sk-1234"}, "reward.options.llm_judge.api_key = …: unknown option"),
        ({"judge": "m"}, "reward.options.llm_judge.judge = 'm': unknown option"),
    ],
)
def test_bad_options_are_refused_before_the_run(options: dict[str, Any], message: str) -> None:
    given = {"url": "http://127.0.0.1:1", "model": "m", "timeout": 2.0, **options}
    with pytest.raises(UsageError, match=re.escape(message)):
        load_reward(reward_path("llm_judge"), "llm_judge", given, [], run=RewardRun("llm_judge", 10.0))


def test_the_timeout_of_a_recipe_reaches_the_judge() -> None:
    with pytest.raises(UsageError, match=r"reward\.timeout = 2 allows"):
        RewardPool(["llm_judge"], [], [], 2.0, 1, options={"llm_judge": {"url": "http://127.0.0.1:1", "model": "m"}})


def test_the_process_is_kept_for_other_rewards() -> None:
    """Requests leave no thread and no patch behind for which the process would be replaced."""
    notes: list[str] = []
    with stand_in(by_length) as one, pool(one) as rewards:
        rewards.notify_of_restarts(notes.append)
        for step in range(3):
            rewards.score([group("a", "bb")], {"global_step": step})
    assert not notes
