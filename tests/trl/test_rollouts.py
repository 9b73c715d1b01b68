"""Rollout functions, on the tiny model."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gruppo
from gruppo.errors import RunError, UsageError
from gruppo.rollout.reward_failures import rerun_reward
from gruppo.trl import GRPOConfig, GRPOTrainer, generate_rollout_completions
from tests.conftest import END
from tests.functions_of_users import from_env
from tests.trl.test_trainer import CHATS, ROWS, arguments, counted


def plain(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """Samples as the trainer would."""
    outputs = generate_rollout_completions(trainer, prompts)
    return {name: [output[name] for output in outputs] for name in ("prompt_ids", "completion_ids", "logprobs")}


def two_turns(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """Plays one episode after the other. The environment answers "b", and rewards with the length of the last turn."""
    tokenizer, answer = trainer.processing_class, trainer.processing_class("b")["input_ids"]
    columns: dict[str, list[Any]] = {"env_reward": [], "texts": []}
    rows: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "env_mask": []}
    for prompt in prompts:
        start = tokenizer(prompt)["input_ids"]
        (first,) = generate_rollout_completions(trainer, [start], generation_overrides={"max_tokens": 2})
        ids = [*first["completion_ids"], *answer]
        (last,) = generate_rollout_completions(trainer, [[*start, *ids]], generation_overrides={"max_tokens": 3})
        rows["prompt_ids"].append(start)
        rows["completion_ids"].append([*ids, *last["completion_ids"]])
        rows["logprobs"].append([*first["logprobs"], *[0.0] * len(answer), *last["logprobs"]])
        rows["env_mask"].append([1] * len(first["completion_ids"]) + [0] * len(answer) + [1] * len(last["logprobs"]))
        columns["env_reward"].append(float(len(last["completion_ids"])))
        columns["texts"].append([first["text"], last["text"]])
    return {**rows, **columns, "game": "letters"}


def trained(model: str, out: Path, rewards: Any = counted, rows: Any = ROWS, **more: Any) -> GRPOTrainer:
    changes = more.pop("changes", {})
    trainer = GRPOTrainer(model, rewards, arguments(out, **changes), rows, **more)
    trainer.train()
    return trainer


def weights_of(trainer: GRPOTrainer) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = trainer.model.state_dict()
    return weights


@pytest.mark.parametrize("rows", [ROWS, CHATS], ids=["text", "messages"])
def test_a_function_that_only_samples_changes_nothing(tiny_folder: str, tmp_path: Path, rows: Any) -> None:
    def score(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(sum(ids) % 7) for ids in completion_ids]

    without = trained(tiny_folder, tmp_path / "without", score, rows)
    seen: list[Any] = []

    def function(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        seen.append(prompts)
        return plain(prompts, trainer)

    with_it = trained(tiny_folder, tmp_path / "with", score, rows, rollout_func=function)
    for name, tensor in weights_of(without).items():
        assert torch.equal(tensor, weights_of(with_it)[name])
    assert [len(prompts) for prompts in seen] == [8, 8]
    prompts = [row["prompt"] for row in rows]
    assert all(seen[0][0] == prompt for prompt in seen[0][:4])
    assert all(prompt in prompts for prompt in seen[0])
    assert seen[0][0] != seen[0][4]
    assert without.result is not None
    assert with_it.result is not None
    for before, after in zip(without.result.metrics, with_it.result.metrics, strict=True):
        for name, value in before.items():
            if not name.startswith(("time/", "memory/")):
                assert after[name] == value, name


class Episodes:
    """A training with a function that plays two turns, and what its reward functions got."""

    def __init__(self, model: str, out: Path) -> None:
        self.got: list[dict[str, Any]] = []
        self.steps: list[int] = []
        self.trainer = trained(
            model, out, [from_env, self.see], rollout_func=self.play, changes={"max_steps": 3, "save_steps": 1}
        )
        assert self.trainer.result is not None
        self.result = self.trainer.result

    def play(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        self.steps.append(trainer.state.global_step)
        return two_turns(prompts, trainer)

    def see(self, completions: list[str], texts: list[Any], game: list[str], **more: Any) -> list[float]:
        self.got.append({"completions": completions, "texts": texts, "game": game, **more})
        return counted(completions)


@pytest.fixture(scope="module")
def episodes(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Episodes:
    return Episodes(tiny_folder, tmp_path_factory.mktemp("rollouts") / "out")


def test_what_a_function_returns_reaches_the_rewards(episodes: Episodes) -> None:
    assert episodes.steps == [0, 1, 2]
    for call in episodes.got:
        assert call["game"] == ["letters"] * 8
        for text, (first, last) in zip(call["completions"], call["texts"], strict=True):
            assert text == f"{first}b{last}"
        assert len(call["answer"]) == 8
    line = episodes.trainer.state.log_history[0]
    assert line["rewards/from_env/mean"] == pytest.approx(sum(episodes.got[0]["env_reward"]) / 8)


def test_masked_tokens_are_recorded_and_not_trained_on(episodes: Episodes) -> None:
    rollouts = episodes.result.rollouts(1)
    for ids, mask, text, old, sampled in zip(
        rollouts.token_ids, rollouts["mask"], rollouts.text, rollouts.old_logprobs, rollouts.sampling_logprobs,
        strict=True,
    ):  # fmt: skip
        assert list(mask).count(False) == 1
        place = list(mask).index(False)
        assert text[place if END not in list(ids)[:place] else place - 1] == "b"
        assert len(ids) == len(mask)
        for number, is_sampled in enumerate(mask):
            if is_sampled:
                assert old[number] == pytest.approx(sampled[number], abs=1e-4)
            else:
                assert sampled[number] is None or sampled[number] != sampled[number]
    metrics = episodes.result.metrics[0]
    assert metrics["engine/logprob_difference_max"] < 1e-3
    assert metrics["completion/length"] == pytest.approx(
        sum(sum(mask) for mask in rollouts["mask"]) / len(rollouts["mask"])
    )
    assert json.loads(rollouts.episode[0])["columns"]["game"] == "letters"


@pytest.mark.parametrize("step", [1, 3])
def test_a_step_is_reproduced_from_its_recorded_rollouts(episodes: Episodes, step: int) -> None:
    def see(completions: list[str], texts: list[Any], game: list[str], **_: Any) -> list[float]:
        return [float(sum(letter in "abcdefg" for letter in text)) for text in completions]

    found = gruppo.reproduce(episodes.result.path, step, reward=[from_env, see], prompts=ROWS, progress=False)
    assert found.equal, found.differences
    assert found.rewards == 8


def test_recorded_episodes_are_rescored(episodes: Episodes) -> None:
    def longest(completions: list[str], texts: list[Any], **_: Any) -> list[float]:
        return [float(max(map(len, pair))) for pair in texts]

    table = gruppo.rescore(episodes.result.path, longest, steps=1, progress=False).table.to_pylist()
    assert [row["rescored"] for row in table] == [float(max(map(len, pair))) for pair in episodes.got[0]["texts"]]


def test_a_failed_reward_call_is_repeated_with_the_columns_of_the_function(tiny_folder: str, tmp_path: Path) -> None:
    def breaks(completions: list[str], env_reward: list[float], **_: Any) -> list[float]:
        raise LookupError("not yet")

    with pytest.raises(RunError, match="LookupError: not yet"):
        trained(tiny_folder, tmp_path, breaks, rollout_func=two_turns)
    calls = sorted((tmp_path / "gruppo" / "failures").iterdir())
    assert calls
    for call in calls:
        saved = json.loads(call.read_text())["arguments"]["env_reward"]
        assert [reward.total for reward in rerun_reward(call, from_env)] == saved


def test_a_training_that_a_function_ended_continues_bit_for_bit(
    tiny_folder: str, tmp_path: Path, episodes: Episodes
) -> None:
    calls = 0

    def dies(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ConnectionError("the environment is away")
        return two_turns(prompts, trainer)

    def see(completions: list[str], texts: list[Any], **_: Any) -> list[float]:
        return counted(completions)

    changes = {"max_steps": 3, "save_steps": 10}
    with pytest.raises(RunError, match=r"rollout_func: it raised ConnectionError: the environment is away .*resume"):
        trained(tiny_folder, tmp_path, [from_env, see], rollout_func=dies, changes=changes)
    resumed = GRPOTrainer(tiny_folder, [from_env, see], arguments(tmp_path, **changes), ROWS, rollout_func=two_turns)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    for name, tensor in weights_of(episodes.trainer).items():
        assert torch.equal(tensor, weights_of(resumed)[name])


def test_prompts_that_differ_within_a_group(tiny_folder: str, tmp_path: Path) -> None:
    returned: list[dict[str, Any]] = []
    got: list[Any] = []

    def differing(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        longer = [f"{prompt}{'xyz'[: number % 4]}" for number, prompt in enumerate(prompts)]
        returned.append(plain(longer, trainer))
        return returned[-1]

    def score(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        got.append(completion_ids)
        return counted(completions)

    trainer = trained(tiny_folder, tmp_path, score, rollout_func=differing)
    assert trainer.result is not None
    rollouts = trainer.result.rollouts(1)
    assert got[0] == returned[0]["completion_ids"]
    for number, (prompt, ids, mask) in enumerate(
        zip(rollouts.prompt_token_ids, rollouts.token_ids, rollouts["mask"], strict=True)
    ):
        rest = number % 4
        assert [*prompt, *ids] == [*returned[0]["prompt_ids"][number], *returned[0]["completion_ids"][number]]
        assert list(mask) == [False] * rest + [True] * (len(ids) - rest)
    assert trainer.result.metrics[0]["engine/logprob_difference_max"] < 1e-3


def test_unknown_logprobs_are_those_of_the_trainer(tiny_folder: str, tmp_path: Path) -> None:
    notes: list[str] = []

    def silent(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        trainer.note = notes.append
        return {**plain(prompts, trainer), "logprobs": None}

    trainer = trained(tiny_folder, tmp_path / "silent", rollout_func=silent)
    said = trained(tiny_folder, tmp_path / "said", rollout_func=plain)
    assert [note for note in notes if "logprobs = None" in note] == notes[:1]
    assert trainer.result is not None
    assert all(logprobs is None for logprobs in trainer.result.rollouts(1).sampling_logprobs)
    assert all(logprobs is not None for logprobs in trainer.result.rollouts(1).old_logprobs)
    assert not any(name.startswith("engine/") for name in trainer.result.metrics[0])
    for name, tensor in weights_of(said).items():
        assert torch.equal(tensor, weights_of(trainer)[name])


def change(name: str, to: Callable[[Any], Any]) -> Callable[..., dict[str, Any]]:
    def function(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        returned = plain(prompts, trainer)
        found = to(returned.get(name))
        return {key: value for key, value in {**returned, name: found}.items() if value is not ...}

    return function


def first(row: Any) -> Callable[[Any], Any]:
    """Puts a row in place of the first."""
    return lambda rows: [row, *rows[1:]]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda prompts, trainer: None, "it returned a NoneType; return a dict with prompt_ids"),
        (change("prompt_ids", lambda _: ...), "it returned no prompt_ids"),
        (change("logprobs", lambda _: ...), 'it returned no logprobs; write "logprobs": None'),
        (change("completion_ids", lambda rows: rows[:3]), "completion_ids has 3 entries for 8 prompts"),
        (change("completion_ids", lambda rows: rows * 2), "completion_ids has 16 entries for 8 prompts"),
        (change("completion_ids", lambda _: 3), "completion_ids is a int; return a list"),
        (change("completion_ids", first(["a"])), "completion_ids is not a list of lists of numbers"),
        (change("completion_ids", first([])), "completion_ids[0] is empty"),
        (change("completion_ids", first([1, 2.5])), "completion_ids is not a list of lists of numbers"),
        (change("completion_ids", first("12")), "completion_ids is not a list of lists of numbers"),
        (change("completion_ids", first([1, 48])), "[0] has the token 48; the model has the tokens 0 to 47"),
        (change("prompt_ids", first([-1])), "prompt_ids[0] has the token -1"),
        (change("prompt_ids", first([5] * 130)), "130 + "),
        (change("prompt_ids", first([47])), "differ in their first token"),
        (change("logprobs", first([0.0] * 9)), "logprobs[0] has 9 values for the"),
        (change("logprobs", lambda rows: [[float("nan")] * len(row) for row in rows]), "logprobs[0][0] is nan"),
        (change("logprobs", lambda rows: [[float("-inf")] * len(row) for row in rows]), "logprobs[0][0] is -inf"),
        (change("logprobs", lambda rows: [[0.5] * len(row) for row in rows]), "logprobs[0][0] is 0.5; a log-prob"),
        (change("env_mask", lambda _: [[1]] * 8), "env_mask[0] has 1 values for the"),
        (change("env_mask", lambda _: [[1]] * 3), "env_mask has 3 entries for 8 prompts"),
        (change("env_reward", lambda _: [1.0]), "env_reward has 1 values for 8 completions"),
        (change("completions", lambda _: ["a"] * 8), "it returned 'completions', which reward functions get"),
        (lambda prompts, trainer: {}[3], "it raised KeyError: 3 (line"),
        (
            lambda prompts, trainer: generate_rollout_completions(trainer, prompts, generation_overrides={"top_k": 5}),
            "generation_overrides['top_k'] = 5: training samples from the full distribution",
        ),
        (
            lambda prompts, trainer: generate_rollout_completions(
                trainer, prompts, generation_overrides={"temperature": 0.5}
            ),
            "the policy is trained at temperature 1.0",
        ),
        (
            lambda prompts, trainer: generate_rollout_completions(trainer, ["a" * 128]),
            "a prompt has 128 tokens, and the model's context is 128",
        ),
        (lambda prompts, trainer: generate_rollout_completions(trainer, "ab"), "prompts: is text; give a list"),
        (lambda prompts, trainer: generate_rollout_completions(trainer, [[]]), "a prompt is empty"),
        (lambda prompts, trainer: generate_rollout_completions(trainer, [[1, 48]]), "a prompt has the token 48; the"),
        (lambda prompts, trainer: generate_rollout_completions(trainer, [[1.5]]), "a prompt is [1.5]; give text"),
        (
            lambda prompts, trainer: generate_rollout_completions(
                trainer, prompts, generation_overrides={"max_tokens": 0}
            ),
            'generation_overrides["max_tokens"] = 0: must be a whole number of at least 1',
        ),
        (lambda prompts, trainer: trainer.vllm_generation.llm, "sample with gruppo.trl.generate_rollout_completions"),
    ],
)  # fmt: skip
def test_wrong_returns_are_named(tiny_folder: str, tmp_path: Path, function: Callable[..., Any], words: str) -> None:
    with pytest.raises(RunError) as caught:
        trained(tiny_folder, tmp_path, rollout_func=function)
    assert str(caught.value).startswith("rollout_func: ")
    assert words in str(caught.value)


@pytest.mark.parametrize("value", [2, 0.5])
def test_values_of_env_mask(tiny_folder: str, tmp_path: Path, value: float) -> None:
    def function(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        returned = plain(prompts, trainer)
        return {**returned, "env_mask": [[value] * len(ids) for ids in returned["completion_ids"]]}

    with pytest.raises(RunError, match=rf"env_mask\[0\] has the value {value}; write 1 for tokens of the model"):
        trained(tiny_folder, tmp_path, rollout_func=function)


def test_a_reward_that_misses_a_column_is_named(tiny_folder: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="missing 1 required positional argument: 'env_reward'"):
        trained(tiny_folder, tmp_path, from_env, rollout_func=plain)


def test_tensors_are_accepted_and_the_policy_can_be_used(tiny_folder: str, tmp_path: Path) -> None:
    """A function that samples with the model in training, which is not the one that the script gave."""
    models: list[Any] = []

    def function(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        model = trainer.accelerator.unwrap_model(trainer.model)
        tokenizer = trainer.processing_class
        models.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        asked = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in prompts]
        found = [model.generate(ids, max_new_tokens=4, do_sample=True, pad_token_id=END)[0] for ids in asked]
        return {
            "prompt_ids": [ids[0] for ids in asked],
            "completion_ids": [ids[asked[place].shape[1] :] for place, ids in enumerate(found)],
            "logprobs": None,
        }

    trainer = trained(tiny_folder, tmp_path, rollout_func=function)
    assert trainer.state.global_step == 2
    assert any(not torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


def test_episodes_may_be_played_in_threads(tiny_folder: str, tmp_path: Path) -> None:
    def function(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        found: dict[int, Any] = {}

        def play(place: int) -> None:
            found[place] = generate_rollout_completions(trainer, [prompts[place]])[0]

        threads = [threading.Thread(target=play, args=(place,)) for place in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {
            name: [found[place][name] for place in range(len(prompts))]
            for name in ("prompt_ids", "completion_ids", "logprobs")
        }

    trainer = trained(tiny_folder, tmp_path, rollout_func=function)
    assert trainer.result is not None
    assert trainer.result.metrics[0]["engine/logprob_difference_max"] < 1e-3


def test_stop_strings_of_a_call(tiny_folder: str, tmp_path: Path) -> None:
    texts: list[str] = []

    def function(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        outputs = generate_rollout_completions(trainer, prompts, generation_overrides={"stop": list("abcdefghijklm")})
        texts.extend(output["text"] for output in outputs)
        return {name: [output[name] for output in outputs] for name in ("prompt_ids", "completion_ids", "logprobs")}

    trained(tiny_folder, tmp_path, rollout_func=function)
    assert not any(letter in "".join(texts) for letter in "abcdefghijklm")


def test_evaluation_calls_the_function(tiny_folder: str, tmp_path: Path) -> None:
    sizes: list[int] = []

    def function(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        sizes.append(len(prompts))
        return two_turns(prompts, trainer)

    args = arguments(tmp_path, num_generations_eval=2, eval_strategy="steps", eval_steps=2)
    trainer = GRPOTrainer(tiny_folder, from_env, args, ROWS, ROWS[:3], rollout_func=function)
    before = trainer.evaluate()
    trainer.train()
    assert sizes == [6, 8, 8, 6]
    assert 1.0 <= before["eval_reward"] <= 3.0


def test_functions_that_cannot_be_used_are_refused(tiny_folder: str, tmp_path: Path) -> None:
    args: GRPOConfig = arguments(tmp_path)
    with pytest.raises(UsageError, match="leave environment_factory out"):
        GRPOTrainer(tiny_folder, counted, args, ROWS, rollout_func=plain, environment_factory=object)
    with pytest.raises(UsageError, match="leave tools out"):
        GRPOTrainer(tiny_folder, counted, args, ROWS, rollout_func=plain, tools=[print])
    with pytest.raises(UsageError, match="rollout_func = 3: write a function"):
        GRPOTrainer(tiny_folder, counted, args, ROWS, rollout_func=3)
    trainer = GRPOTrainer(tiny_folder, counted, args, ROWS, rollout_func=plain)
    with pytest.raises(UsageError, match="no rollout_func is running"):
        generate_rollout_completions(trainer, ["a"])
