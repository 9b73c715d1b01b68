"""`gruppo convert`: the rewards of verl and OpenRLHF, above all those that a server computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gruppo.config.loading import load_recipe
from gruppo.config.recipe import Recipe
from gruppo.conversion.convert import Conversion, convert
from gruppo.rollout.workers.rewards import RewardPool
from tests.rewards.remote.stand_in import Reply, StandIn, stand_in
from tests.rollout.workers.test_rewards import group, totals

OPENRLHF = ["python", "-m", "openrlhf.cli.train_ppo_ray", "--actor.model_name_or_path", "example/x",
            "--algo.advantage.estimator", "rloo", "--rollout.n_samples_per_prompt", "4"]  # fmt: skip
VERL = ["actor_rollout_ref.model.path=example/x", "data.train_files=a.parquet", "algorithm.adv_estimator=grpo"]


def converted(tmp_path: Path, *words: str) -> tuple[Conversion, Recipe]:
    conversion = convert(words)
    path = tmp_path / "recipe.toml"
    path.write_text(conversion.recipe)
    return conversion, load_recipe(path)


def scores(recipe: Recipe, *texts: str) -> list[float | None]:
    """What the rewards of a recipe give the completions of the prompt "q", with its options and its time."""
    reward = recipe.reward
    with RewardPool(
        reward.functions, reward.weights, ["answer"], reward.timeout, workers=1, options=reward.options
    ) as pool:
        (rewards,), _ = pool.score([group(*texts, answer="4")], {"global_step": 0})
    return totals(rewards)


def serve(answer: Any) -> Any:
    return stand_in(lambda body: Reply(answer(body)))


def test_a_reward_server_of_openrlhf_is_asked_what_openrlhf_asks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    one: StandIn
    with serve(lambda body: {"rewards": [len(query) for query in body["query"]]}) as one:
        conversion, recipe = converted(tmp_path, *OPENRLHF, "--reward.remote_url", f"{one.url}/get_reward")
        assert recipe.reward.functions == ["remote"]
        assert not any("reward" in line for line in conversion.draft.to_fill)
        assert scores(recipe, "a", "bbb") == [2.0, 4.0]
    assert one.requests == [{"query": ["qa", "qbbb"], "prompts": ["q", "q"], "labels": ["4", "4"]}]
    assert one.paths == ["/get_reward"]


def test_a_reward_server_of_openrlhf_gets_the_time_and_the_template_that_it_had(tmp_path: Path) -> None:
    servers = "http://a:5000/get_reward,http://b:5000/get_reward"
    chat = ["--data.apply_chat_template", "--data.prompt_dataset", "example/d"]
    conversion, recipe = converted(tmp_path, *OPENRLHF, "--remote_rm_url", servers, *chat)
    assert recipe.reward.options["remote"] == {
        "url": "http://a:5000/get_reward", "format": "openrlhf", "timeout": 180.0, "tries": 5, "tokenizer": "example/x",
    }  # fmt: skip
    assert recipe.reward.timeout == 720.0
    told = "\n".join(conversion.draft.missing)
    assert "http://b:5000/get_reward: a reward asks one server" in told
    assert "the EOS token at the end of each query" in told


def test_a_server_of_openrlhf_is_used_in_place_of_a_reward_model_and_with_a_penalty(tmp_path: Path) -> None:
    more = ["--reward.model_name_or_path", "example/rm", "--reward.overlong_buffer_len", "64"]
    _, recipe = converted(tmp_path, *OPENRLHF, "--reward.remote_url", "http://a/get_reward", *more)
    assert recipe.reward.functions == ["remote", "overlong"]
    assert recipe.reward.options["overlong"] == {"buffer_tokens": 64}


@pytest.mark.parametrize("more", [["rewards.py"], ["http://a/b", "--train.agent_func_path", "agent.py"]])
def test_a_file_or_an_agent_of_openrlhf_is_to_be_filled_in(tmp_path: Path, more: list[str]) -> None:
    conversion, recipe = converted(tmp_path, *OPENRLHF, "--reward.remote_url", *more)
    assert recipe.reward.functions == ["my_rewards.py:reward"]
    assert any(line.startswith("reward.functions: ") for line in conversion.draft.to_fill)


@pytest.mark.parametrize("name", ["reward.remote_url", "reward_model.url", "reward.reward_model.api_endpoint"])
def test_an_address_that_verl_does_not_have_becomes_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    one: StandIn
    with serve(lambda body: {"score": len(body["solution_str"])}) as one:
        conversion, recipe = converted(tmp_path, *VERL, f"+{name}={one.url}/score")
        assert recipe.reward.functions == ["remote"]
        assert scores(recipe, "a", "bbb") == [1.0, 3.0]
    assert conversion.draft.to_fill == [
        f"reward.functions: {name} = {one.url}/score, which is not a name of verl; if the server does not take the "
        "arguments of compute_score, change format (docs/rewards.md)"
    ]


def test_the_sandbox_of_verl_is_no_reward_server(tmp_path: Path) -> None:
    conversion, recipe = converted(tmp_path, *VERL, "reward.sandbox_fusion.url=http://a/run_code")
    assert "remote" not in recipe.reward.functions
    assert any("sandbox_fusion.url" in line for line in conversion.draft.missing)


def test_the_arguments_of_a_reward_function_of_verl_are_its_options(tmp_path: Path) -> None:
    arguments = ["+reward.custom_reward_function.reward_kwargs.url=http://a/b",
                 "+reward.custom_reward_function.reward_kwargs.scale=2"]  # fmt: skip
    _, recipe = converted(tmp_path, *VERL, "reward.custom_reward_function.path=r.py", *arguments)
    assert recipe.reward.functions == ["verl:r.py:compute_score"]
    assert recipe.reward.options == {"verl:r.py:compute_score": {"url": "http://a/b", "scale": 2}}


@pytest.mark.parametrize("name", ["naive", "remote", "rate_limited", "dapo"])
def test_managers_of_verl_that_call_compute_score_once_per_completion(tmp_path: Path, name: str) -> None:
    conversion, _ = converted(tmp_path, *VERL, f"reward.reward_manager.name={name}")
    assert not any("reward_manager" in line for line in conversion.draft.missing)


@pytest.mark.parametrize("name", ["batch", "prime", "gdpo", "mine"])
def test_other_managers_of_verl_have_no_equivalent(tmp_path: Path, name: str) -> None:
    conversion, _ = converted(tmp_path, *VERL, f"reward_model.reward_manager={name}")
    assert any(line.startswith(f"reward_model.reward_manager = {name}: ") for line in conversion.draft.missing)


def test_the_lengths_of_verls_dapo_manager(tmp_path: Path) -> None:
    lengths = [f"+reward.reward_kwargs.{name}" for name in (
        "overlong_buffer_cfg.enable=True", "overlong_buffer_cfg.len=64", "max_resp_len=512")]  # fmt: skip
    _, recipe = converted(tmp_path, *VERL, "custom_reward_function.path=r.py", *lengths)
    assert recipe.reward.functions == ["verl:r.py:compute_score", "overlong"]
    assert recipe.reward.options == {"overlong": {"buffer_tokens": 64, "max_tokens": 512}}
