"""Plans: the best placement, what does not fit, published runs, and the command."""

from __future__ import annotations

import itertools
import json
import re
import runpy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from gruppo.cli.main import app
from gruppo.config.recipe import Recipe
from gruppo.errors import UsageError
from gruppo.planning.assumptions import Assumptions
from gruppo.planning.describe import describe_plan
from gruppo.planning.devices import read_cluster
from gruppo.planning.placement import place, trainers_fit
from gruppo.planning.plan import Plan, make_plan
from gruppo.planning.published import compare_published
from gruppo.planning.shape import typical_shape

SIZES: dict[str, Any] = {"prompts_per_step": 64, "group_size": 8, "max_tokens": 1024}


def recipe(**tables: Any) -> Recipe:
    return Recipe.model_validate({"model": {"name": "m"}, "sampling": SIZES, **tables})


def plan(devices: str = "8xH100", weights: float = 7.6e9, assumed: Assumptions | None = None, **tables: Any) -> Plan:
    return make_plan(recipe(**tables), typical_shape(weights), read_cluster(devices), assumed or Assumptions())


def test_the_best_placement_is_the_fastest_of_all() -> None:
    found = plan("16xH100")
    steps = [
        placed.step
        for trainers, size in itertools.product(range(1, 16), (1, 2, 4, 8))
        if (16 - trainers) % size == 0
        and trainers_fit(found.shape, found.cluster, found.work, found.assumptions, trainers)
        if (placed := place(found.shape, found.cluster, found.work, found.assumptions, "ahead", trainers, size))
    ]
    ahead = next(placed for placed in found.placements if placed.kind == "ahead")
    assert len(steps) > 10
    assert ahead.step == min(steps)
    assert found.chosen is found.placements[0]
    assert ahead.trainers + ahead.engines * ahead.engine_devices == 16


def test_a_step_is_the_longer_part_if_sampling_is_ahead_and_the_sum_if_not() -> None:
    found = plan()
    for placed in found.placements:
        parts = placed.sampling_seconds, placed.training.seconds
        busy = max(parts) if placed.kind == "ahead" else sum(parts)
        assert placed.step == pytest.approx(1.05 * (busy + placed.transfer))
    assert found.total_seconds == pytest.approx(100 * found.placements[0].step)


def test_the_transfer_is_bounded_by_the_assumption_and_the_link() -> None:
    assert plan().placements[0].transfer == pytest.approx(2 * 7.6e9 / 8e9)
    fast = plan("4xL40S", 1e9, replace(Assumptions(), transfer_gb_s=1000.0))
    assert fast.placements[0].transfer == pytest.approx(2 * 1e9 / (0.7 * 32e9))


def test_the_reference_and_minibatches_add_scoring_passes() -> None:
    without = plan(method={"kl_coef": 0.0}).work.passes
    assert (without.scores, without.updates) == (0, 1)
    assert plan(method={"kl_coef": 0.04}).work.passes.scores == 1
    assert plan(method={"kl_coef": 0.0, "minibatches": 4}).work.passes.scores == 1
    assert plan(method={"name": "ppo", "kl_coef": 0.04}).work.passes.scores == 3  # reference, policy, values
    assert plan(method={"kl_coef": 0.0, "inner_updates": 3}).work.passes.updates == 3


def test_prompts_are_trained_on_once_for_each_group() -> None:
    found = plan(assumed=replace(Assumptions(), mean_tokens=100.0, prompt_tokens=50.0))
    assert found.work.training_tokens == pytest.approx(64 * 8 * 100 + 64 * 50)


def test_one_device_takes_turns_and_keeps_the_state() -> None:
    """16 bytes per weight: 1.5e9 weights leave 72 - 24 - 3 GB for the cache."""
    found = plan("1xH100", 1.5e9, method={"kl_coef": 0.0})
    assert found.settings == {"trainers": 1, "engines": 0, "engine_devices": 1, "lag": 0}
    assert [placed.kind for placed in found.placements] == ["colocated"]
    assert found.placements[0].transfer == 0
    assert plan("1xH100", 4.2e9, method={"kl_coef": 0.0}).problems  # 67 GB of state


def test_a_dataset_needs_no_engines() -> None:
    rows = {"name": "sft"}
    found = plan(method=rows, task={"name": "rows.jsonl", "completion": "{answer}"})
    assert found.settings == {"trainers": 8, "engines": 0, "engine_devices": 1, "lag": 0}
    assert found.placements[0].sampling_seconds == 0
    assert found.work.training_tokens == pytest.approx(64 * (512 + 128))


def test_adapters_fit_where_all_weights_do_not() -> None:
    full = plan("8xRTX4090", 14e9, assumed=replace(Assumptions(), micro_batch_tokens=2048.0), method={"kl_coef": 0.0})
    assert full.chosen is None
    lora = plan("8xRTX4090", 14e9, assumed=replace(Assumptions(), micro_batch_tokens=2048.0),
                model={"name": "m", "lora": {"rank": 16}})  # fmt: skip
    assert lora.chosen is not None


@pytest.mark.parametrize(
    ("devices", "weights", "sizes", "message"),
    [("8xH100", 70e9, {}, r"the training state: 1120 GB, 160.0 GB on each of 7 devices"),
     ("2x1xRTX4090", 32e9, {}, r"an engine: 64 GB of weights"),
     ("8xH100", 7.6e9, {"max_tokens": 500_000}, r"a micro-batch: [\d.]+ GB of activations")],
)  # fmt: skip
def test_what_does_not_fit_is_named_with_what_to_change(
    devices: str, weights: float, sizes: dict[str, int], message: str
) -> None:
    found = plan(devices, weights, sampling={**SIZES, **sizes}, method={"kl_coef": 0.0})
    assert found.chosen is None
    assert any(re.search(message, problem) for problem in found.problems), found.problems
    assert all("; use " in problem or "; add " in problem for problem in found.problems)
    assert "Does not fit:" in describe_plan(found)


def test_the_number_of_devices_that_a_problem_names_is_enough() -> None:
    found = plan("8xH100", 70e9, method={"kl_coef": 0.0})
    needed = int(re.search(r"use at least (\d+) devices", found.problems[0])[1])  # type: ignore[index]
    cluster = read_cluster("16x8xH100")
    assert trainers_fit(found.shape, cluster, found.work, found.assumptions, needed)
    assert not trainers_fit(found.shape, cluster, found.work, found.assumptions, needed - 1)


@pytest.mark.parametrize("field", ["flops", "bandwidth"])
def test_a_faster_device_never_takes_longer(field: str) -> None:
    cluster = read_cluster("8xH100")
    faster = replace(cluster, device=replace(cluster.device, **{field: 2 * getattr(cluster.device, field)}))
    work = recipe(method={"kl_coef": 0.04})
    steps = [
        make_plan(work, typical_shape(7.6e9), each, Assumptions()).placements[0].step for each in (cluster, faster)
    ]
    assert steps[1] < steps[0]


def test_contradictions_are_refused() -> None:
    with pytest.raises(UsageError, match=r"mean_tokens = 2000: must be at most sampling.max_tokens = 1024"):
        plan(assumed=replace(Assumptions(), mean_tokens=2000.0))
    with pytest.raises(UsageError, match=r'model\.dtype = "float32": plan knows the rates of bfloat16 only'):
        plan(model={"name": "m", "dtype": "float32"})


def test_published_runs_are_predicted_as_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    """The table of docs/plan.md is computed anew, and printed."""
    script = runpy.run_path("scripts/plan_tables.py")
    with capsys.disabled():
        print("\n" + script["published"]().split("\n\n")[0])
    assert script["page"]() == Path("docs/plan.md").read_text(encoding="utf-8"), "run `make plan-tables`"


def test_dense_models_with_known_lengths_are_predicted_within_half() -> None:
    runs = [run for run in compare_published() if run.name.startswith("NeMo RL") and "A3B" not in run.name]
    assert len(runs) == 6
    for run in runs:
        assert abs(run.error()) < 0.5, run.name


def test_updates_with_inferred_lengths_are_left_out_of_the_comparison() -> None:
    for run in compare_published():
        assert run.inferred == ("verl" in run.name)
        assert not (run.inferred and "updates" in run.published)
        assert run.published.keys() == run.predicted.keys()


def test_every_assumption_is_an_option() -> None:
    command = typer.main.get_command(app).commands["plan"]  # type: ignore[attr-defined]
    options = {name for parameter in command.params for name in parameter.opts}
    assert {f"--{each.name.replace('_', '-')}" for each in fields(Assumptions)} <= options


def invoke(tmp_path: Path, *arguments: str) -> Any:
    file = tmp_path / "r.toml"
    file.write_text('model.name = "nowhere"\n[sampling]\nprompts_per_step = 64\nmax_tokens = 1024\n')
    return CliRunner().invoke(app, ["plan", str(file), *arguments])


def test_the_command_prints_a_plan(tmp_path: Path) -> None:
    result = invoke(tmp_path, "--devices", "8xH100", "--parameters", "7.6e9", "--mfu", "0.4")
    assert result.exit_code == 0
    for text in ("trainers = ", "engines = ", "Bottleneck: ", "--mfu", "0.4 share", "Checked: these assumptions"):
        assert text in result.output
    assert max(map(len, result.output.splitlines())) <= 100


def test_the_command_prints_json(tmp_path: Path) -> None:
    result = invoke(tmp_path, "--devices", "8xH100", "--parameters", "7.6e9", "--mean-tokens", "300", "--json")
    values = json.loads(result.output)
    assert values["work"]["mean_tokens"] == pytest.approx(300)
    assert values["step_seconds"] == values["placements"][0]["step_seconds"]
    assert values["settings"]["lag"] == 1
    assert len(values["published"]) == len(compare_published())


def test_the_command_fails_if_nothing_fits(tmp_path: Path) -> None:
    assert invoke(tmp_path, "--devices", "1xRTX4090", "--parameters", "70e9").exit_code == 1
    assert (
        invoke(tmp_path, "--devices", "8xH100").exception.args[0].startswith('model.name = "nowhere": is no hub name')
    )
    missing = invoke(tmp_path, "--devices", "8xH100", "--active-parameters", "1e9")
    assert "needs" in missing.exception.args[0]
