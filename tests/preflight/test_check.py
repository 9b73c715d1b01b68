"""`gruppo check` estimates memory, time and disk, refuses what training would refuse, and writes nothing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from gruppo.config.loading import load_recipe
from gruppo.errors import UsageError
from gruppo.preflight.check import check_recipe, describe_check
from gruppo.preflight.timing import round_seconds
from gruppo.training.disk_estimate import eval_set_count
from tests.cli.test_cli import gruppo, recipe_file  # noqa: F401  # a fixture
from tests.small_runs import ROWS, recipe, small_run


@pytest.fixture
def data(tiny_folder: str, tmp_path: Path) -> dict:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    changes = {"evaluation__task": str(rows), "evaluation__questions": 4, "evaluation__grader": "exact_match"}
    return {**recipe(tiny_folder, **changes), "task": {"name": str(rows)}}


def test_it_prints_memory_time_and_disk_and_leaves_no_folder(recipe_file: Path, tmp_path: Path) -> None:  # noqa: F811
    before = sorted(tmp_path.rglob("*"))
    shown = gruppo("check", recipe_file, "--set", "run.memory='3 GB'")
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert re.fullmatch(r'Memory, in GB: peak \d\.\d\d, budget 3\.00 \(run\.memory = "3 GB"\)', lines[0])
    for phase, line in zip(["sampling", "training", "evaluation"], lines[1:4], strict=True):
        assert re.fullmatch(
            rf"  {phase} +\d\.\d\d  process \d\.\d\d, (?:[\w ]+ \d\.\d\d, ){{0,2}}others \d\.\d\d", line
        ), line
        total, *parts = [float(each) for each in re.findall(r"\d\.\d\d", line)]
        assert total == pytest.approx(sum(parts), abs=0.021)
    time = lines.index("Time, if all completions have 8 tokens and prompts 2; no rewards, no saving")
    assert re.fullmatch(r"  per step +\S+ s  generate \S+, score \S+, update \S+", lines[time + 1])
    assert re.fullmatch(r"  evaluation +\S+ s  \d+ times", lines[time + 2])
    assert re.fullmatch(r"  in all +\S+ (?:s|min)  \d+ steps, evaluations included", lines[time + 3])
    disk = lines.index("Disk, if all completions have 8 tokens")
    assert re.fullmatch(r"  finished run +\S+ [GM]B  with \d checkpoints? of \S+ [GM]B", lines[disk + 1])
    assert any(re.fullmatch(r"  free +\S+ GB  for runs/tiny", line) for line in lines[disk:])
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("runs/tiny").exists()


def test_json_holds_the_same(recipe_file: Path) -> None:  # noqa: F811
    shown = gruppo("check", recipe_file, "--json", "--set", "run.steps=5")
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    phases = {name: sum(parts.values()) for name, parts in found["memory_bytes"].items() if name != "peak"}
    assert found["memory_bytes"]["peak"] == max(phases.values()) <= found["budget_bytes"]
    seconds = found["step_seconds"]
    assert seconds["total"] == pytest.approx(seconds["generate"] + seconds["score"] + seconds["update"])
    assert found["total_seconds"] == pytest.approx(5 * seconds["total"] + 2 * sum(found["eval_set_seconds"]))
    assert found["workload"]["prompt_tokens"] == 2


def test_the_training_of_a_reward_model_counts(recipe_file: Path) -> None:  # noqa: F811
    changes = ["reward_model.prompts=8", "run.iterations=2", "run.steps=4", "evaluation.every=0"]
    shown = gruppo("check", recipe_file, "--json", "--quick", *(part for each in changes for part in ("--set", each)))
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["round_seconds"] > 0
    parts = [4 * found["step_seconds"]["total"], 2 * sum(found["eval_set_seconds"]), 2 * found["round_seconds"]]
    assert found["total_seconds"] == pytest.approx(sum(parts))


def test_seconds_of_a_round_by_hand(data: dict) -> None:
    data["sampling"] |= {"prompts_per_step": 4, "group_size": 4}
    data["reward_model"] = {"prompts": 8, "held_out": 0.25, "replay_fraction": 0.0, "batch_size": 8, "epochs": 2}
    # Two steps' worth of samples, of which 0.5 is measured twice and 1.5 trained on twice, in 3 updates each time.
    seconds = round_seconds(load_recipe(data), generation=10.0, forward=1.0, backward=2.0, optimizer=0.5)
    assert seconds == pytest.approx(2 * 10 + 2 * 0.5 * 1 + 2 * (1.5 * 3 + 3 * 0.5))
    del data["reward_model"]
    assert round_seconds(load_recipe(data), 10.0, 1.0, 2.0, 0.5) == 0


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("run.memory=2", "run.memory = 2"),
        ("run.memory='1 MB'", "run.memory: allows 0.00 GB"),
        ("task.name=none.jsonl", "no such file"),
        ("model.name=no/such-model", "no/such-model"),
        ('reward.functions=["nowhere:f"]', "nowhere:f"),
        ('reward.functions=["tests/rewards/functions.py:needs_more"]', "solution"),
        ("sampling.max_tokens=1000", "context of 128"),
    ],
)
def test_what_training_refuses_is_one_line_and_exit_code_2(recipe_file: Path, change: str, word: str) -> None:  # noqa: F811
    shown = gruppo("check", recipe_file, "--set", change)
    assert shown.returncode == 2
    (line,) = [each for each in shown.stderr.splitlines() if each.startswith("gruppo: ")]
    assert word in line
    assert shown.stdout == ""


def test_it_predicts_the_sizes_that_training_chooses(data: dict, tmp_path: Path) -> None:
    data["run"]["memory"] = "2 GB"
    found = check_recipe(data).chosen
    del data["task"]
    small_run(data["model"]["name"], tmp_path / "run", run__memory="2 GB", run__steps=1)
    chosen = json.loads((tmp_path / "run" / "environment.json").read_text())["chosen"]
    assert (chosen["micro_batch_tokens"], chosen["slots"], chosen["recompute"], chosen["memory_budget_bytes"]) == (
        found.micro_batch_tokens, found.slots, found.recompute, found.budget_bytes,
    )  # fmt: skip


def test_a_reference_and_inner_updates_cost_time(data: dict) -> None:
    without = check_recipe(data, overrides=["method.kl_coef=0.0"])
    assert without.step_seconds["score"] == 0
    assert check_recipe(data).step_seconds["score"] > 0
    assert check_recipe(data, overrides=["method.kl_coef=0.0"]).chosen.memory.reference == 0
    assert "  per step" in describe_check(without)
    assert "optimizer" in without.as_dict()["memory_bytes"]["training"]


@pytest.mark.parametrize(("steps", "every", "count"), [(6, 0, 2), (6, 2, 4), (7, 3, 4), (4, 9, 2)])
def test_evaluations_are_counted_as_the_loop_makes_them(
    data: dict, tmp_path: Path, steps: int, every: int, count: int
) -> None:
    changed = load_recipe(data, [f"run.steps={steps}", f"evaluation.every={every}"])
    assert eval_set_count(changed, every) == count
    made = small_run(
        data["model"]["name"], tmp_path / "run", run__steps=steps, evaluation__every=every,
        evaluation__task=data["evaluation"]["task"], evaluation__questions=2, evaluation__grader="exact_match",
    )  # fmt: skip
    assert len(list((made.path / "evaluations").iterdir())) == count
    assert eval_set_count(load_recipe(data, [f"run.steps={10**15}"]), 1) == 10**15 + 1


def test_what_is_sampled_is_the_start_model(data: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    from gruppo.models.loading import find_model, load_model
    from gruppo.models.weights import weights_sha256
    from gruppo.preflight import smoke_test

    start = weights_sha256(load_model(find_model(data["model"]["name"]), "cpu", "float32").model)
    seen, sample = [], smoke_test.run_smoke_test

    def looked(recipe, engine, *rest):
        model = engine.policy.model
        seen.append((weights_sha256(model), [each.grad for each in model.parameters()]))
        return sample(recipe, engine, *rest)

    monkeypatch.setattr(smoke_test, "run_smoke_test", looked)
    check_recipe(data, overrides=["optimizer.learning_rate=0.1", "optimizer.weight_decay=0.1"])
    assert [(weights, set(gradients)) for weights, gradients in seen] == [(start, {None})]


def test_check_leaves_no_process_behind(data: dict, tmp_path: Path) -> None:
    """Neither those of rewards nor the one that renders chat templates, with or without an error."""
    import psutil

    rows = tmp_path / "chats.jsonl"
    chats = [{"prompt": [{"role": "user", "content": letter}], "answer": "a"} for letter in "abcd"]
    rows.write_text("".join(json.dumps(row) + "\n" for row in chats))
    chat = {**data, "task": {"name": str(rows)}, "evaluation": {**data["evaluation"], "task": str(rows)}}
    before = set(psutil.Process().children(recursive=True))  # those that other tests share
    check_recipe(chat, quick=True)
    with pytest.raises(UsageError, match="max_tokens"):
        check_recipe(chat, overrides=["sampling.max_tokens=1000"])
    left = set(psutil.Process().children(recursive=True)) - before
    assert not [each for each in left if "gruppo" in " ".join(each.cmdline())]


def test_wrong_targets_are_told_before_weights_are_loaded(data: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gruppo.training.setup.load_model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(UsageError, match=r"model\.lora\.targets.*nope"):
        check_recipe(data, overrides=['model.lora.targets=["nope"]'])


def test_a_problem_is_exit_code_1_in_text_of_80_columns_and_in_json(recipe_file: Path) -> None:  # noqa: F811
    constant = ["--set", 'reward.functions=["tests/rewards/functions.py:always_half"]']
    shown = gruppo("check", recipe_file, *constant)
    assert shown.returncode == 1, shown.stderr
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert shown.stdout.splitlines()[-1].startswith("Found: 2 problems, ")
    assert "problem  nonzero advantage: in 0 of 18 groups of 4 (0%; 95% interval" in shown.stdout
    told = gruppo("check", recipe_file, *constant, "--json")
    assert told.returncode == 1, told.stderr
    found = json.loads(told.stdout)
    assert found["problems"] == 2
    assert {each["subject"] for each in found["findings"] if each["severity"] == "problem"} == {
        "reward", "nonzero advantage",
    }  # fmt: skip
    assert all(each["what"] and set(each) >= {"why", "change", "figures"} for each in found["findings"])


def test_seconds_that_are_none(recipe_file: Path) -> None:  # noqa: F811
    shown = gruppo("check", recipe_file, "--seconds", 0)
    assert (shown.returncode, shown.stderr.strip()) == (
        2, "gruppo: --seconds 0: must be more than 0; write e.g. 60, or use --quick",
    )  # fmt: skip


def test_a_lag_is_checked(data: dict) -> None:
    """Sampling takes memory beside training. It saves time only if the engine has a device of its own."""
    data |= {"cluster": {"lag": 2}}
    data["method"] = {**data.get("method", {}), "tis_cap": 2.0}
    found = check_recipe(data, quick=True)
    (note,) = [finding for finding in found.findings if finding.subject == "lag"]
    assert (note.severity, note.what.split(" with ")[0]) == ("note", "cluster.lag = 2")
    training = found.as_dict()["memory_bytes"]["training"]
    assert training["versions"] > 0
    assert training["cache"] > 0
    total = sum(found.step_seconds.values())
    assert found.seconds_per_step == pytest.approx(total)
    assert "; sampling is 2 ahead" in " ".join(describe_check(found).split())
    apart = replace(found, recipe=load_recipe({**data, "engine": {"name": "vllm"}}))
    sampling = found.step_seconds["generate"]
    assert apart.seconds_per_step == pytest.approx(max(sampling, total - sampling))
    assert apart.seconds_per_step < total
