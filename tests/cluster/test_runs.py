"""Whole runs on several ranks equal those of one process, and continue on any number of ranks."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gruppo.cluster.follower import follow
from gruppo.cluster.joining import make_mesh
from gruppo.cluster.ranks import ProcessRanks
from gruppo.cluster.torchrun import check_launch
from gruppo.config.loading import load_recipe
from gruppo.errors import UsageError
from gruppo.models.blueprint import described
from gruppo.training.api import run_recipe, train
from gruppo.training.export import export
from gruppo.training.reproduce import reproduce
from gruppo.training.shard_files import local_tensor
from gruppo.utils.progress import NullProgress
from tests.cluster.compare import assert_same_run, lines
from tests.cluster.team import Team, started
from tests.conftest import make_policy
from tests.small_runs import ROWS, fingerprint, recipe

CLUSTER = pytest.mark.cluster
LABELLED = {"reward_model__prompts": 4, "reward_model__held_out": 0.3, "reward_model__learning_rate": 1e-3}


def settings_of(model: str, **changes: Any) -> dict[str, Any]:
    small = {"model__dtype": "float64", "run__steps": 4, "optimizer__schedule": "constant"}
    if changes.get("method__name") == "dpo":
        small["method__kl_coef"] = 0.0
    return recipe(model, **small | changes)


def run_on(ranks: ProcessRanks, settings: dict[str, Any], out: Path, shards: int = 0) -> dict[str, Any]:
    """Run or resume a recipe, as the leader or as a follower. Returns the leader's summary, or its error."""
    if ranks.rank:
        follow(ranks)
        return {}
    cluster = {**settings.get("cluster", {}), "trainers": ranks.size, "shards": shards}
    settings = settings | {"cluster": cluster}
    try:
        result, _ = run_recipe(settings, prompts=ROWS, out=out, resume=True, progress=NullProgress(), ranks=ranks)
        return result.summary
    except Exception as error:  # noqa: BLE001  the test compares it
        return {"error": str(error)}
    finally:
        ranks.end()


def alone(settings: dict[str, Any], out: Path) -> None:
    train(settings, prompts=ROWS, out=out, resume=True, progress=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"method__inner_updates": 2, "method__minibatches": 2, "sampling__temperature": 0.8},
        pytest.param({"method__name": "ppo"}, marks=CLUSTER),
        pytest.param({"method__name": "dpo"}, marks=CLUSTER),
        pytest.param({"model__lora": {"rank": 2}}, marks=CLUSTER),
        {"run__iterations": 2, **LABELLED},
        pytest.param({"cluster__lag": 2, "method__tis_cap": 2.0}, marks=CLUSTER),
    ],
    ids=["grpo", "ppo", "dpo", "lora", "reward model", "ahead"],
)
def test_a_run_on_two_ranks_equals_one_process(
    team: Team, tiny_folder: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings = settings_of(tiny_folder, **changes)
    alone(settings, tmp_path / "one")
    summary = team.run(2, run_on, settings, tmp_path / "two")[0]
    assert summary.get("state") == "done", summary
    assert_same_run(tmp_path / "two", tmp_path / "one")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "two/model", dtype=torch.float64)
    assert sum(parameter.numel() for parameter in model.parameters()) > 0
    reproduced = reproduce(tmp_path / "two", 3, prompts=ROWS, tolerance=1e-8, trust=True, progress=False)
    assert reproduced.equal, reproduced.differences
    assert any(note.startswith("2 ranks trained") for note in reproduced.notes)


@pytest.mark.parametrize(
    ("before", "after"), [pytest.param(2, 1, marks=CLUSTER), pytest.param(1, 3, marks=CLUSTER), (3, 2)]
)
def test_a_run_continues_on_another_number_of_ranks(
    team: Team, tiny_folder: str, tmp_path: Path, before: int, after: int
) -> None:
    settings = settings_of(tiny_folder, method__name="ppo")
    shorter = settings_of(tiny_folder, method__name="ppo", run__steps=2)
    alone(settings, tmp_path / "whole")
    environment = tmp_path / "run/environment.json"
    for size, one in ((before, shorter), (after, settings)):
        if size == 1:
            alone(one, tmp_path / "run")
        else:
            summary = team.run(size, run_on, one, tmp_path / "run")[0]
            assert summary.get("state") == "done", summary
        if size == before:
            started = json.loads(environment.read_text())
            environment.write_text(json.dumps({**started, "chosen": {**started["chosen"], "slots": 1}}))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert json.loads(environment.read_text())["chosen"]["slots"] > 1, "sizes are chosen again"
    (change,) = (
        event for event in events(tmp_path / "run") if event["kind"] == "changed" and "trainers" in event["field"]
    )
    assert change["message"].startswith(f"cluster.trainers was {before} and is {after}: sizes were chosen anew (micro_")
    names = {path.name for path in (tmp_path / "run/checkpoints/step-000002").iterdir()}
    assert ("critic.weights.safetensors" in names) == (before == 1)
    assert_no_pickle(tmp_path / "run")


@CLUSTER
@pytest.mark.parametrize("changes", [{}, {"model__lora": {"rank": 2}}], ids=["whole", "lora"])
def test_weights_of_two_dtypes_are_sharded_together(
    team: Team, tiny_folder: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """In bfloat16, a reference and the base of adapters have weights of both dtypes."""
    settings = settings_of(tiny_folder, model__dtype="bfloat16", run__steps=2, **changes)
    alone(settings, tmp_path / "one")
    summary = team.run(2, run_on, settings, tmp_path / "two")[0]
    assert summary.get("state") == "done", summary
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert two["engine/logprob_difference_mean"] < 0.02
        assert two["policy/entropy"] == pytest.approx(one["policy/entropy"], abs=0.02)


@CLUSTER
def test_a_run_with_copies_of_shards_continues_in_one_process(tiny_folder: str, tmp_path: Path) -> None:
    settings = settings_of(tiny_folder)
    alone(settings, tmp_path / "whole")
    with started(4, tmp_path) as four:
        shorter = settings_of(tiny_folder, run__steps=2)
        summary = four.run(4, run_on, shorter, tmp_path / "run", 2, replicas=2)[0]
        assert summary.get("state") == "done", summary
    names = {path.name for path in (tmp_path / "run/checkpoints/step-000002").glob("weights*")}
    assert names == {f"weights-0000{number}-of-00002.safetensors" for number in (1, 2)}
    alone(settings, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def timeouts(ranks: ProcessRanks, shards: int) -> list[float]:
    """Seconds that exchanges of weights wait for a rank."""
    mesh = make_mesh("cpu", shards, timedelta(seconds=77))
    groups: list[Any] = mesh.get_all_groups()
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


@pytest.mark.parametrize(("shards", "dimensions"), [(3, 1), (1, 2)])
def test_patience_holds_for_every_exchange_of_weights(team: Team, shards: int, dimensions: int) -> None:
    assert team.run(3, timeouts, shards) == [[77.0] * dimensions] * 3


def held(ranks: ProcessRanks) -> tuple[int, int]:
    """Numbers that this rank holds of a policy and its reference, before and after it gets its shards."""
    policy = make_policy(torch.float64, tie_word_embeddings=False)
    if ranks.rank:
        policy = pickle.loads(described(replace(policy, body=None)))
    before = sum(weight.untyped_storage().nbytes() for weight in policy.model.parameters() if not weight.is_meta)
    models = ranks.distribute(policy, True, False)
    assert models.reference is not None
    kept = [*models.policy.model.parameters(), *models.reference.model.parameters()]
    return before, sum(local_tensor(weight).untyped_storage().nbytes() for weight in kept)


def test_a_follower_holds_shards_alone(team: Team) -> None:
    (whole, leaders), (nothing, followers) = team.run(2, held)
    assert nothing == 0
    assert leaders == followers == whole  # half of two models


def test_a_run_continues_bit_for_bit_on_as_many_ranks(team: Team, tiny_folder: str, tmp_path: Path) -> None:
    settings = settings_of(tiny_folder, model__dtype="float32", method__inner_updates=2)
    shorter = settings | {"run": {**settings["run"], "steps": 2}}
    team.run(2, run_on, settings, tmp_path / "whole")
    team.run(2, run_on, shorter, tmp_path / "run")
    team.run(2, run_on, settings, tmp_path / "run")
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def assert_no_pickle(folder: Path) -> None:
    """No file is a pickle, or a zip archive as torch.save writes it."""
    for path in folder.rglob("*"):
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.is_file():
            assert not path.read_bytes().startswith((b"\x80", b"PK")), path


@CLUSTER
def test_a_sharded_checkpoint_is_exported_as_a_whole_model(team: Team, tiny_folder: str, tmp_path: Path) -> None:
    settings = settings_of(tiny_folder, run__steps=2)
    team.run(3, run_on, settings, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "model")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model", dtype=torch.float64)
    for (name, one), (_, two) in zip(exported.named_parameters(), final.named_parameters(), strict=True):
        assert float((one - two).abs().max()) <= 1e-6, name


@CLUSTER
def test_a_missing_shard_makes_a_checkpoint_unusable(team: Team, tiny_folder: str, tmp_path: Path) -> None:
    team.run(2, run_on, settings_of(tiny_folder), tmp_path / "run")
    (tmp_path / "run/checkpoints/step-000004/weights-00002-of-00002.safetensors").unlink()
    (tmp_path / "run/model").rename(tmp_path / "model")
    summary = team.run(2, run_on, settings_of(tiny_folder), tmp_path / "run")[0]
    assert summary.get("state") == "done", summary
    assert [event["message"] for event in events(tmp_path / "run") if event["kind"] == "checkpoint_unusable"] == [
        "step-000004: weights-00002-of-00002.safetensors is missing"
    ]


def test_an_update_that_is_not_finite_ends_all_ranks_with_its_cause(
    team: Team, tiny_folder: str, tmp_path: Path
) -> None:
    settings = settings_of(tiny_folder, model__dtype="float32", optimizer__learning_rate=1e38)
    error = team.run(2, run_on, settings, tmp_path / "run")[0]["error"]
    assert "not finite" in error or "is nan" in error, error


def test_a_reward_model_that_is_not_finite_is_reported_by_the_leader_alone(
    team: Team, tiny_folder: str, tmp_path: Path
) -> None:
    settings = settings_of(
        tiny_folder, model__dtype="float32", run__iterations=2, **LABELLED | {"reward_model__learning_rate": 1e38}
    )
    error = team.run(2, run_on, settings, tmp_path / "run")[0]["error"]  # an error of another rank would be raised
    assert "the reward model's probability" in error, error


def test_as_many_ranks_must_be_started_as_the_recipe_has() -> None:
    ranks, none = (load_recipe({"model": {"name": "m"}, **table}) for table in ({"cluster": {"trainers": 2}}, {}))
    check_launch(ranks, {"RANK": "0", "WORLD_SIZE": "2"})
    check_launch(ranks, {})  # the run starts them
    check_launch(none, {})
    check_launch(none, {"WORLD_SIZE": "1"})
    for recipe_, environment, words in (
        (ranks, {"RANK": "0", "WORLD_SIZE": "3"}, "WORLD_SIZE = 3, so 3 processes were started"),
        (none, {"RANK": "0", "WORLD_SIZE": "4"}, "add `--set cluster.trainers=4`"),
    ):
        with pytest.raises(UsageError, match=words):
            check_launch(recipe_, environment)


def test_a_run_that_may_not_start_its_ranks_says_what_to_do(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(tiny_folder, cluster__trainers=2)
    monkeypatch.setattr("gruppo.actors.needs.installed", lambda package: False)
    command = "torchrun --nproc-per-node 2 --no-python gruppo train RECIPE"
    with pytest.raises(UsageError, match=rf'run: pip install "gruppo\[cluster\]", or start the ranks with `{command}`'):
        train(settings, prompts=ROWS, out=tmp_path, progress=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=rf"starts the ranks itself; start the script once, .* or run `{command}`"):
        train(settings, prompts=ROWS, out=tmp_path, progress=False)
