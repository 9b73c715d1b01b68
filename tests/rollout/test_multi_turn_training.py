"""Observations carry no loss, KL, entropy or log-probability; multi-turn runs learn, resume and can be reproduced."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from gruppo.algorithms.aggregation import token_mean_weights
from gruppo.algorithms.credit import assign_advantages
from gruppo.algorithms.filtering import mark_trained
from gruppo.config.method_section import Critic, Method
from gruppo.engines.native.engine import NativeEngine
from gruppo.errors import RunError, UsageError
from gruppo.models.packing import pack
from gruppo.models.policy import LanguageModel
from gruppo.preflight.check import check_recipe
from gruppo.preflight.smoke_test import compare_logprobs
from gruppo.rewards.combine import with_part
from gruppo.rollout.environments.client import EnvironmentHandle, ProcessEnvironments, PythonEnvironments
from gruppo.runs.reading import read_lines
from gruppo.runs.results import Result
from gruppo.runs.tables import rollout_rows
from gruppo.training.api import train
from gruppo.training.policy_loss import batch_loss, keep_logprobs, token_weights
from gruppo.training.reproduce import describe_reproduction, reproduce
from gruppo.types import Completion, Episode, Group, Prompt, Reward
from gruppo.utils.metrics import Metrics
from tests.conftest import END, make_policy, make_tokenizer
from tests.rollout.environments.test_protocol import FakePool
from tests.small_runs import ROWS, fingerprint, killed, recipe

pytestmark = pytest.mark.usefixtures("quick_workers")

TEMPERATURE = 0.8
WORLDS = "tests/rollout/environments/worlds.py"
LETTERS = {"name": f"{WORLDS}:Letters", "options": {"rounds": 3}, "workers": 1}


def group_with_observations(noise: float = 0.0) -> Group:
    """Three completions; the first two contain tokens from an environment."""
    ids = [[5, 6, 7, 8, 9, END], [10, 11, 12, 13], [14, 15]]
    masks = [(True, True, False, False, True, True), (False, True, True, False), (True, True)]
    completions = [
        Completion(tuple(each), tuple(-2.0 if m else noise for m in mask), mask, "stop", 0, str(each), Episode(1, 1))
        for each, mask in zip(ids, masks, strict=True)
    ]
    rewards = [Reward(value, {}) for value in (1.0, 0.0, 0.25)]
    return Group(Prompt("t/0", "q", (1, 2, 3), "t", {}), completions, rewards)


def logprobs_of(model: torch.nn.Module, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / TEMPERATURE, -1)


def by_token(policy: LanguageModel, reference: LanguageModel, group: Group, weigh: str) -> dict[str, torch.Tensor]:
    """Gradient of Eq. 3 and 4, token by token, summed over sampled tokens and divided by their number."""
    policy.model.zero_grad(set_to_none=True)
    rewards = torch.tensor([1.0, 0.0, 0.25], dtype=torch.float64)
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    sampled = [sum(completion.mask) for completion in group.completions]
    total = torch.zeros((), dtype=torch.float64)
    for completion, advantage, count in zip(group.completions, advantages, sampled, strict=True):
        here = logprobs_of(policy.model, group.prompt.token_ids, completion.token_ids)
        there = logprobs_of(reference.model, group.prompt.token_ids, completion.token_ids).detach()
        for place, (token, mask) in enumerate(zip(completion.token_ids, completion.mask, strict=True)):
            if not mask:
                continue
            log, ref = here[place, token], there[place, token]
            kl = torch.exp(ref - log) - (ref - log) - 1
            term = torch.exp(log - log.detach()) * advantage - 0.05 * kl
            total = total - term / (3 * count if weigh == "sequence-mean" else sum(sampled))
    total.backward()
    return {name: weight.grad.clone() for name, weight in policy.model.named_parameters() if weight.grad is not None}


def by_the_loop(
    policy: LanguageModel, reference: LanguageModel, group: Group, settings: Method, budget: int = 10**9
) -> tuple[dict[str, torch.Tensor], dict[str, float | None]]:
    policy.model.zero_grad(set_to_none=True)
    metrics = Metrics()
    mark_trained([group], settings.mask_truncated)
    assign_advantages([group], settings, metrics)
    batches = pack([group], token_weights(settings, 16), budget, with_kl=settings.kl_in_loss)
    for batch in batches:
        batch_loss(policy, reference, batch, settings, TEMPERATURE, metrics).backward()
    keep_logprobs([group], batches)
    gradient = {
        name: weight.grad.clone() for name, weight in policy.model.named_parameters() if weight.grad is not None
    }
    return gradient, metrics.reduce()


@pytest.fixture(scope="module")
def reference64() -> LanguageModel:
    return make_policy(torch.float64, seed=1)


@pytest.mark.parametrize("weigh", ["sequence-mean", "token-mean", "group-token-mean"])
@pytest.mark.parametrize("budget", [10**9, 1])
def test_gradient_covers_only_sampled_tokens(
    policy64: LanguageModel, reference64: LanguageModel, weigh: str, budget: int
) -> None:
    """trl#4975, trl#5144: tool output was trained on."""
    settings = Method(kl_coef=0.05, aggregation=weigh)  # type: ignore[arg-type]
    expected = by_token(policy64, reference64, group_with_observations(), weigh)
    gradients, _ = by_the_loop(policy64, reference64, group_with_observations(), settings, budget)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12)
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in expected.values())


def test_metrics_cover_only_sampled_tokens(policy64: LanguageModel, reference64: LanguageModel) -> None:
    """Entropy, KL and the difference from the engine, by hand."""
    group = group_with_observations()
    _, values = by_the_loop(policy64, reference64, group_with_observations(), Method(kl_coef=0.05))
    entropies, differences, kls = [], [], []
    for completion in group.completions:
        here = logprobs_of(policy64.model, group.prompt.token_ids, completion.token_ids).detach()
        there = logprobs_of(reference64.model, group.prompt.token_ids, completion.token_ids).detach()
        for place, (token, mask) in enumerate(zip(completion.token_ids, completion.mask, strict=True)):
            if mask:
                entropies.append(-float((here[place].exp() * here[place]).sum()))
                differences.append(abs(float(here[place, token]) + 2.0))
                log_ratio = float(there[place, token] - here[place, token])
                kls.append(math.exp(log_ratio) - log_ratio - 1)
    assert values["policy/entropy"] == pytest.approx(sum(entropies) / 8)
    assert values["engine/logprob_difference_mean"] == pytest.approx(sum(differences) / 8)
    assert values["engine/logprob_difference_max"] == pytest.approx(max(differences))
    assert values["policy/kl"] == pytest.approx(sum(kls) / 8)


METHODS = [
    Method(kl_coef=0.05, tis_cap=2.0),
    Method(name="gspo", kl_coef=0.05),
    Method(name="reinforce-pp"),
    Method(name="rloo"),
    Method(name="dr-grpo"),
]


@pytest.mark.parametrize("settings", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("noise", [-7.0, 3.0, float("nan"), float("inf")])
def test_logprobs_of_observations_change_nothing(
    policy64: LanguageModel, reference64: LanguageModel, settings: Method, noise: float
) -> None:
    """OpenRLHF#1240: NaN at masked positions. The engine's placeholder is never read, whatever its value."""
    results = []
    for value in (0.0, noise):
        group = group_with_observations(value)
        mark_trained([group], False)
        if settings.kl_in_reward:
            group.old_logprobs = [[-1.0 if m else value for m in c.mask] for c in group.completions]
            group.ref_logprobs = [[-2.0 if m else value for m in c.mask] for c in group.completions]
        metrics = Metrics()
        assign_advantages([group], settings, metrics)
        policy64.model.zero_grad(set_to_none=True)
        for batch in pack([group], token_weights(settings, 16), 10**9, with_kl=settings.kl_in_loss):
            batch_loss(policy64, reference64, batch, settings, TEMPERATURE, metrics).backward()
        gradient = torch.cat(
            [weight.grad.flatten() for weight in policy64.model.parameters() if weight.grad is not None]
        )
        results.append((gradient.clone(), group.advantages, metrics.reduce()))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]
    assert bool(results[0][0].isfinite().all())
    for advantages, completion in zip(results[0][1], group.completions, strict=True):
        assert all(value == 0 for value, m in zip(advantages, completion.mask, strict=True) if not m)


def test_value_model_learns_only_at_sampled_tokens() -> None:
    settings = Method(name="ppo", kl_coef=0.0)
    group = group_with_observations()
    mark_trained([group], False)
    group.values = [[*[0.5] * len(completion.token_ids), 0.0] for completion in group.completions]
    assign_advantages([group], settings, Metrics(), critic=Critic(gae_lambda=1.0))
    assert group.returns[0] == [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]


def test_a_completion_without_sampled_tokens_has_no_weight() -> None:
    group = group_with_observations()
    group.completions = [replace(group.completions[0], mask=(False,) * 6), *group.completions[1:]]
    mark_trained([group], False)
    assign_advantages([group], Method(), Metrics())
    batches = pack([group], token_mean_weights, 10**9, with_kl=True)
    assert float(sum(batch.weights.sum() for batch in batches)) == pytest.approx(1.0)


def test_tables_have_no_log_probability_for_tokens_that_were_not_sampled(policy64, reference64) -> None:
    group = group_with_observations()
    by_the_loop(policy64, reference64, group, Method(kl_coef=0.05))
    for row, completion in zip(rollout_rows(1, [group], make_tokenizer()), group.completions, strict=True):
        for name in ("sampling_logprobs", "old_logprobs", "ref_logprobs"):
            assert [value is not None for value in row[name]] == list(completion.mask)
        assert json.loads(row["episode"])["calls"] == 1


def test_the_comparison_with_the_engine_excludes_observations(policy64: LanguageModel) -> None:
    group = group_with_observations(noise=1e9)
    assert compare_logprobs(policy64, [group], TEMPERATURE, 10**9).figures["max"] < 100


def test_the_reward_of_an_environment_is_a_part_by_hand() -> None:
    scored = Reward(0.5, {"last_number": 0.5}, extra={"x": 1})
    assert with_part(scored, "environment", 2.0, 0.25) == Reward(
        1.0, {"last_number": 0.5, "environment": 0.25}, extra={"x": 1}
    )
    assert with_part(Reward(None, {}), "environment", 2.0, 0.25).total == 0.5
    assert with_part(scored, "environment", 2.0, None).total == 0.5
    failed = Reward(None, {"a": None}, "a: broke", failures={"a": "broke"})
    assert with_part(failed, "environment", 2.0, 0.25).total is None
    both = with_part(failed, "environment", 2.0, "it died")
    assert (both.failure, both.failures) == (
        "a: broke; environment: it died", {"a": "broke", "environment": "it died"},
    )  # fmt: skip


def run(model: str, out: Path, resume: bool = False, **changes: object) -> Result:
    """Train with the environment's reward only, unless `changes` add others."""
    environment = changes.pop("environment", LETTERS)
    settings = recipe(model, **{"sampling__max_tokens": 14, "method__kl_coef": 0.0, "reward__functions": [], **changes})
    settings |= {"environment": environment} if environment else {}
    return train(settings, prompts=ROWS, out=out, resume=resume)


@pytest.fixture(scope="module")
def finished(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Result:
    out = tmp_path_factory.mktemp("episodes") / "run"
    (out.parent / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))
    return run(
        tiny_folder, out, method__inner_updates=2, method__kl_coef=0.02, evaluation__grader="exact_match",
        evaluation__task=str(out.parent / "test.jsonl"), evaluation__decoding={"temperature": 1.0}, run__steps=4,
    )  # fmt: skip


def test_reward_rises_over_several_turns(tiny_folder: str, tmp_path: Path) -> None:
    """Only the environment gives rewards, and only for the turns it received."""
    result = run(
        tiny_folder, tmp_path / "run", run__steps=20, run__checkpoint_every=20, optimizer__learning_rate=1e-2,
        sampling__prompts_per_step=8, sampling__group_size=8,
    )  # fmt: skip
    rewards = [line["reward/environment/mean"] for line in result.metrics]
    assert rewards == pytest.approx([line["reward/mean"] for line in result.metrics])
    assert sum(rewards[:3]) / 3 < 0.25
    assert sum(rewards[-3:]) / 3 > 0.45


def test_metrics_and_tables_of_a_run(finished: Result) -> None:
    steps = [line for line in finished.metrics if "reward/mean" in line]
    assert len(steps) == 4
    for line in steps:
        rows = pq.read_table(finished.path / f"rollouts/step-{line['step']:06d}.parquet").to_pylist()
        episodes = [json.loads(row["episode"]) for row in rows]
        assert line["environment/turns"] == pytest.approx(sum(episode["turns"] for episode in episodes) / 16)
        assert line["environment/tokens"] == pytest.approx(sum(row["mask"].count(False) for row in rows) / 16)
        assert line["completion/length"] == pytest.approx(sum(row["mask"].count(True) for row in rows) / 16)
        assert line["environment/failed"] == 0
        assert line["environment/errors"] is None
        assert line["engine/logprob_difference_max"] < 1e-4
        assert sum(episode["turns"] for episode in episodes) > 0
        for row in rows:
            observed = "".join(text for text, m in zip(row["token_texts"], row["mask"], strict=True) if not m)
            assert set(observed) <= {"+", "-"}
            assert json.loads(row["reward_parts"]) == {"environment": row["reward"]}
            assert len(row["token_ids"]) <= 14


def test_evaluation_has_several_turns(finished: Result) -> None:
    rows = pq.read_table(finished.path / "evaluations" / "step-000004.parquet").to_pylist()
    assert any("?+" in row["answer"] or "=+" in row["answer"] for row in rows)


def test_a_killed_run_resumes_exactly(
    tiny_folder: str, finished: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of an episode."""
    changes = {
        "method__inner_updates": 2, "method__kl_coef": 0.02, "evaluation__grader": "exact_match", "run__steps": 4,
        "evaluation__task": str(finished.path.parent / "test.jsonl"),
        "evaluation__decoding": {"temperature": 1.0},
    }  # fmt: skip
    with killed(monkeypatch, "gruppo.rollout.environments.client.ProcessEnvironments.answer", 11):
        run(tiny_folder, tmp_path / "run", **changes)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["rewards_sha256"]
    run(tiny_folder, tmp_path / "run", resume=True, **changes)
    assert fingerprint(tmp_path / "run") == fingerprint(finished.path)


def test_a_step_is_reproduced_from_its_recorded_episodes(finished: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("reproduce must not call the engine or the environment")

    for target, name in ((NativeEngine, "generate"), (ProcessEnvironments, "answer"), (ProcessEnvironments, "end")):
        monkeypatch.setattr(target, name, fail)
    for step in (3, 4):
        result = reproduce(finished.path, step, prompts=ROWS)
        assert result.equal, describe_reproduction(result)
        assert "the environment was not called again" in describe_reproduction(result)


def test_reproduce_calls_reward_functions_again(tiny_folder: str, tmp_path: Path) -> None:
    result = run(
        tiny_folder, tmp_path / "run", reward__functions=["tests/rewards/functions.py:likes_letters"], run__steps=2,
        environment={**LETTERS, "weight": 0.5},
    )  # fmt: skip
    rows = pq.read_table(result.path / "rollouts" / "step-000001.parquet").to_pylist()
    for row in rows:
        parts = json.loads(row["reward_parts"])
        assert row["reward"] == pytest.approx(parts["likes_letters"] + 0.5 * parts["environment"])
        expected = sum("a" <= letter <= "m" for letter in row["text"]) / max(1, len(row["text"]))
        assert parts["likes_letters"] == pytest.approx(expected), "reward functions see observations too"
    reproduced = reproduce(result.path, 2, prompts=ROWS)
    assert reproduced.equal
    assert reproduced.rewards == 16


def test_first_observations_are_in_recorded_and_reproduced_prompts(tiny_folder: str, tmp_path: Path) -> None:
    changes = {
        "environment": {"name": f"{WORLDS}:Greets", "workers": 1, "turns": 1}, "run__steps": 2,
        "reward__functions": ["tests/rewards/functions.py:likes_letters"],
    }  # fmt: skip
    result = run(tiny_folder, tmp_path / "run", **changes)
    rows = pq.read_table(result.path / "rollouts" / "step-000002.parquet").to_pylist()
    assert all(row["prompt"][:2] in {question["prompt"] for question in ROWS} for row in rows)
    assert all(row["prompt"][2:] in tuple("abcdefgh") and len(row["prompt_token_ids"]) == 3 for row in rows)
    assert reproduce(result.path, 2, prompts=ROWS).equal


def test_python_blocks_in_a_run(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fake pool; the tiny model writes no block, so only the reported metrics differ."""
    pools = []

    def fake(settings):
        pools.append(FakePool())
        return pools[-1]

    monkeypatch.setattr("gruppo.rollout.environments.client.python_pool", fake)
    likes = {"reward__functions": ["tests/rewards/functions.py:likes_letters"], "run__steps": 2}
    alone = run(tiny_folder, tmp_path / "alone", environment=None, **likes)
    with_python = run(tiny_folder, tmp_path / "python", environment={"name": "python"}, **likes)
    assert alone.summary["weights_sha256"] == with_python.summary["weights_sha256"]
    assert with_python.metrics[0]["environment/called"] == 0
    assert pools[0].closed
    assert reproduce(with_python.path, 2, prompts=ROWS).equal
    assert len(pools) == 1, "reproduce needs no sandbox"


def test_environment_failures_exclude_completions_and_too_many_stop_the_run(tiny_folder: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"a{n}", "what": "raise in get_reward" if n < 3 else "well"} for n in range(4)]
    settings = recipe(tiny_folder, run__steps=1, method__kl_coef=0.0, reward__functions=[], reward__failure_limit=0.75)
    settings["environment"] = {"name": f"{WORLDS}:Fails", "workers": 1, "turns": 1}
    result = train(settings, prompts=rows, out=tmp_path / "run")
    assert result.metrics[0]["reward/excluded"] == 0.75
    assert result.metrics[0]["environment/failed"] == 0.75
    failures = [event for event in read_lines(tmp_path / "run" / "events.jsonl") if event["kind"] == "reward_failed"]
    assert len(failures) == 3
    assert "get_reward is broken" in failures[0]["message"]
    settings["reward"]["failure_limit"] = 0.5
    with pytest.raises(RunError, match="environment: ValueError"):
        train(settings, prompts=rows, out=tmp_path / "again")


def test_incompatible_settings_are_refused(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gruppo.rollout.environments.client.python_pool", lambda _: FakePool())
    for changes, message in (
        ({"method__name": "sft"}, 'source = "dataset"'),
        ({"reward_model__kind": "outcome"}, "reward_model"),
        ({"environment": {"name": "pyhton"}}, '"python"'),
        ({"environment": {"name": "python", "options": {"a": 1}}}, "remove"),
        ({"environment": {"name": "python"}}, "reward.functions"),
        ({"environment": {"name": "a.py:B", "run_model_code_WITHOUT_A_SANDBOX": True}}, "runs no code"),
        ({"environment": {"name": f"{WORLDS}:Greets"}}, "reward.functions"),
        ({"environment": {"name": f"{WORLDS}:Counter"}}, "task.system"),
    ):
        with pytest.raises(UsageError, match=message):
            run(tiny_folder, tmp_path / "run", **changes)


def test_check_samples_a_trial_step_with_the_environment(tiny_folder: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = recipe(tiny_folder, task__name=str(file), sampling__max_tokens=14, reward__functions=[])
    settings["environment"] = LETTERS
    report = check_recipe(settings, seconds=5)
    found = {finding.subject: finding for finding in report.findings}
    assert "environment" in found["reward"].what
    assert found["engine"].severity == "ok"


def test_sandboxes_are_closed_if_sampling_is_interrupted() -> None:
    """An interruption in the middle of a turn leaves no session open."""
    pool = FakePool()
    environments = PythonEnvironments(pool, 1)
    played = [EnvironmentHandle(0, {}, 0, ["```python\nx\n```\n"])]
    environments.answer(played, lambda: None)
    environments.drop()
    assert pool.sessions[0].closed
    environments.close()
