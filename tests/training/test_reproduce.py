"""Replaying: a step made again is what it was, for every method, and what was changed since is named."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w

import gruppo
from gruppo.cli.main import main
from gruppo.config.methods import METHODS
from gruppo.engines.native.engine import NativeEngine
from gruppo.errors import UsageError
from gruppo.runs.folder import RunFolder
from gruppo.runs.tables import ROLLOUTS
from gruppo.training.api import train
from gruppo.training.reproduce import Reproduction, describe_reproduction, reproduce
from tests.small_runs import ROWS, at_call, killed, recipe, small_run
from tests.training.test_iterations import rounds

REFILLED = "tests/rewards/functions.py:begins_with_a_letter"


def state_of(folder: Path) -> dict[str, str]:
    """Every file with its hash and time."""
    return {
        str(path): f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_mtime_ns}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def again(out: Path, step: int, monkeypatch: pytest.MonkeyPatch, **given: Any) -> Reproduction:
    """The step made again, with nothing sampled and nothing written to the run folder."""

    def samples(*_: object) -> None:
        raise AssertionError("a replay samples nothing")

    before = state_of(out)
    with monkeypatch.context() as patch:
        patch.setattr(NativeEngine, "generate", samples)
        made = reproduce(out, step, **{"prompts": ROWS, **given})
    assert state_of(out) == before
    assert json.loads(json.dumps(made.as_dict()))["equal"] == made.equal
    return made


@pytest.fixture(scope="module")
def finished(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tiny_folder, tmp_path_factory.mktemp("replay") / "run", method__inner_updates=2).path


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The finished run, to change something in it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize(("step", "begun"), [(1, 0), (3, 0), (5, 4), (6, 4)])
def test_equal_bit_for_bit_from_the_nearest_checkpoint(
    step: int, begun: int, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints of steps 4 and 6 are kept, and no best one."""
    made = again(finished, step, monkeypatch)
    assert (made.equal, made.begun, made.differences) == (True, begun, [])
    assert (made.completions, made.rewards) == (16, 16)
    assert made.metrics > 20
    page = describe_reproduction(made)
    assert (f"checkpoints/step-{begun:06d}" if begun else "the start model") in page
    assert page.endswith("Equal, bit for bit.")


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"method__name": method, "reward__functions": [REFILLED], "sampling__temperature": 0.7, "run__steps": 3}
    if method == "grpo-process":
        changes["reward__functions"] = ["tests/rewards/functions.py:steps"]
    settings = recipe(tiny_folder, **changes)
    del settings["method"]["kl_coef"]
    rows = ROWS
    if method == "sft":
        del settings["reward"]
        rows = [{**row, "completion": row["prompt"] + "z"} for row in ROWS]
    train(settings, prompts=rows, out=tmp_path / "run")
    made = again(tmp_path / "run", 3, monkeypatch, prompts=rows)
    assert made.equal, describe_reproduction(made)
    assert (made.begun, made.rewards > 0) == (2, method != "sft")


def test_adapters(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_run(tiny_folder, tmp_path / "run", model__lora={"rank": 2}, run__steps=3)
    assert again(tmp_path / "run", 3, monkeypatch).equal
    assert again(tmp_path / "run", 2, monkeypatch).begun == 0


@pytest.mark.parametrize("kind", ["outcome", "process"])
def test_iterations_train_their_reward_model_on_the_stored_labels(
    kind: str, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 3 begins with the training for the second iteration, whose labels are replayed from the first one's too."""
    train(rounds(tiny_folder, kind), prompts=ROWS, out=tmp_path / "run")
    for step, begun in ((3, 0), (6, 4)):
        made = again(tmp_path / "run", step, monkeypatch)
        assert made.equal, describe_reproduction(made)
        assert made.begun == begun


def test_a_run_that_is_going_on(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in step 4, as good as going on: no summary, a line that is half written, and the lock held."""
    with killed(monkeypatch, "gruppo.training.run.TrainingRun._describe", 4):
        small_run(tiny_folder, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "rew')
    held = RunFolder(tmp_path / "run")
    assert again(tmp_path / "run", 3, monkeypatch).equal
    held.close()
    with pytest.raises(UsageError, match="has made steps 1 to 3"):
        reproduce(tmp_path / "run", 4, prompts=ROWS)


def test_a_step_whose_micro_batch_was_halved(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps before the halving are made with the size that they had then."""
    with monkeypatch.context() as patch:
        patch.setattr("gruppo.models.packing.MAX_TOKENS", 60)
        at_call(patch, "gruppo.training.policy_trainer.batch_loss", 4, lambda: (_ for _ in ()).throw(MemoryError))
        small_run(tiny_folder, tmp_path / "run", run__steps=3, run__checkpoint_every=3)
    made = again(tmp_path / "run", 3, monkeypatch)
    assert made.equal, describe_reproduction(made)
    assert "memory ran out in step 2" in made.notes[0]


def change_rows(out: Path, step: int, change: Callable[[dict[str, Any]], None]) -> None:
    path = out / "rollouts" / f"step-{step:06d}.parquet"
    rows = pq.read_table(path).to_pylist()
    change(rows[5])
    pq.write_table(pa.Table.from_pylist(rows, ROLLOUTS), path)


def test_a_random_reward_is_named_and_the_rest_is_from_what_was_stored(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "import random\ndef f(completions, **_):\n    return [random.random() for _ in completions]\n"
    )
    small_run(tiny_folder, tmp_path / "run", reward__functions=[f"{tmp_path}/mine.py:f"], run__steps=2)
    made = again(tmp_path / "run", 2, monkeypatch)
    assert not made.equal
    assert {each.what for each in made.differences} == {"reward"}
    assert len(made.differences) == 16
    page = describe_reproduction(made)
    assert "16 of 16 completions differ" in page
    assert "computed from the stored rewards" in page
    assert page.endswith("Different.")


def test_a_changed_reward_function_is_noted(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("def f(completions, **_):\n    return [float(len(c)) for c in completions]\n")
    small_run(tiny_folder, tmp_path / "run", reward__functions=[f"{tmp_path}/mine.py:f"], run__steps=2)
    (tmp_path / "mine.py").write_text(
        "def f(completions, **_):\n    return [len(c) + ('a' in c) for c in completions]\n"
    )
    made = again(tmp_path / "run", 2, monkeypatch)
    assert "reward functions have changed" in made.notes[0]
    rows = pq.read_table(tmp_path / "run/rollouts/step-000002.parquet").to_pylist()
    assert len(made.differences) == sum("a" in row["text"] for row in rows) > 0


def test_a_reward_that_failed_then_and_not_now(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "import os\ndef f(completions, **_):\n"
        "    if not os.path.exists(__file__ + '.ok'):\n        raise OSError('no')\n"
        "    return [1.0 for _ in completions]\n"
    )
    settings = {"reward__functions": [f"{tmp_path}/mine.py:f"], "reward__failure_limit": 1.0}
    small_run(tiny_folder, tmp_path / "run", **settings, run__steps=1)
    assert again(tmp_path / "run", 1, monkeypatch).equal
    (tmp_path / "mine.py.ok").touch()
    made = again(tmp_path / "run", 1, monkeypatch)
    assert [each.what for each in made.differences] == ["reward"] * 16


CHANGED = {
    "advantage": (lambda row: row["advantages"].__setitem__(1, 7.0), {"advantages"}),
    "old log-probability": (lambda row: row["old_logprobs"].__setitem__(0, -9.0), {"old_logprobs"}),
    "trained": (lambda row: row.update(trained=False), {"trained"}),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_changed_result_in_the_rollouts_is_named(what: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, expected = CHANGED[what]
    change_rows(copy, 6, change)
    made = again(copy, 6, monkeypatch)
    assert {each.what for each in made.differences} == expected
    (found,) = made.differences
    assert (found.group, found.completion) == (1, 1)


def test_a_changed_token_shows_in_everything_that_follows(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_rows(copy, 6, lambda row: row["token_ids"].__setitem__(0, 1 + row["token_ids"][0] % 40))
    changed = {each.what for each in again(copy, 6, monkeypatch).differences}
    assert {"old_logprobs", "loss/total", "optimizer/gradient_norm"} <= changed


def test_a_changed_token_on_the_way_names_the_step(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_rows(copy, 2, lambda row: row["token_ids"].__setitem__(0, 1 + row["token_ids"][0] % 40))
    made = again(copy, 3, monkeypatch)
    assert made.earlier is not None
    assert made.earlier[0] == 2
    assert "Step 2, on the way, is the first that differs" in describe_reproduction(made)


def test_a_changed_metric_is_named_and_a_tolerance_forgives(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    lines[5]["optimizer/gradient_norm"] *= 1 + 1e-6
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = again(copy, 6, monkeypatch)
    assert [each.what for each in made.differences] == ["optimizer/gradient_norm"]
    assert "stored" in describe_reproduction(made)
    assert again(copy, 6, monkeypatch, tolerance=1e-5).equal


def test_a_damaged_checkpoint_is_passed_over(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "checkpoints/step-000004/weights.safetensors").write_bytes(b"rubbish")
    made = again(copy, 5, monkeypatch)
    assert (made.equal, made.begun) == (True, 0)
    assert "step-000004" in made.notes[0]


def test_rollouts_that_are_gone(copy: Path) -> None:
    (copy / "rollouts/step-000005.parquet").unlink()
    with pytest.raises(UsageError, match="rollouts were deleted"):
        reproduce(copy, 6, prompts=ROWS)


def test_what_was_given_in_memory_is_asked_for(tiny_folder: str, tmp_path: Path, finished: Path) -> None:
    with pytest.raises(UsageError, match=r"task.name = .* given in memory; call gruppo.reproduce\(run, step, prompts="):
        reproduce(finished, 6)

    def constant(completions, **_):
        return [float(len(text)) for text in completions]

    gruppo.train(
        recipe(tiny_folder, run__steps=1, reward__functions=[]), reward=constant, prompts=ROWS, out=tmp_path / "run"
    )
    with pytest.raises(UsageError, match=r"reward=…"):
        reproduce(tmp_path / "run", 1, prompts=ROWS)
    assert gruppo.reproduce(tmp_path / "run", 1, prompts=ROWS, reward=constant).equal


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        reproduce(tmp_path, 1)


def test_the_command(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 0 where all is equal, 1 where not, 2 for a step that is not there."""
    data = recipe(tiny_folder, run__steps=2)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data["task"] = {"name": str(tmp_path / "rows.jsonl")}
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(data))
    out = train(tmp_path / "tiny.toml", out=tmp_path / "run").path

    def called(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["gruppo", "reproduce", str(out), *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    code, page, _ = called("--step", "2")
    assert (code, page.strip().splitlines()[-1]) == (0, "Equal, bit for bit.")
    change_rows(out, 2, lambda row: row["advantages"].__setitem__(0, 3.0))
    code, page, _ = called("--step", "2", "--json")
    assert (code, json.loads(page)["differences"][0]["what"]) == (1, "advantages")
    code, _, error = called("--step", "9")
    assert (code, error.count("\n")) == (2, 1)
