"""`gruppo reproduce`: a rerun step equals the recorded one for every method, and later changes are reported."""

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
    """The hash and modification time of every file."""
    return {
        str(path): f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_mtime_ns}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def reproduced(out: Path, step: int, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> Reproduction:
    """Reproduce a step, and check that nothing is sampled and nothing is written to the run folder."""

    def samples(*_: object) -> None:
        raise AssertionError("a reproduced step samples nothing")

    before = state_of(out)
    with monkeypatch.context() as patch:
        patch.setattr(NativeEngine, "generate", samples)
        result = reproduce(out, step, **{"prompts": ROWS, "trust": True, **arguments})
    assert state_of(out) == before
    assert json.loads(json.dumps(result.as_dict()))["equal"] == result.equal
    return result


@pytest.fixture(scope="module")
def finished(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tiny_folder, tmp_path_factory.mktemp("replay") / "run", method__inner_updates=2).path


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test can change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize(("step", "begun"), [(1, 0), (3, 0), (5, 4), (6, 4)])
def test_a_step_is_reproduced_exactly_from_the_nearest_checkpoint(
    step: int, begun: int, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoints of steps 4 and 6 are kept, and no best checkpoint."""
    result = reproduced(finished, step, monkeypatch)
    assert (result.equal, result.begun, result.differences) == (True, begun, [])
    assert (result.completions, result.rewards) == (16, 16)
    assert result.metrics > 20
    page = describe_reproduction(result)
    assert (f"checkpoints/step-{begun:06d}" if begun else "the initial model") in page
    assert page.endswith("Reproduced exactly.")


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
    result = reproduced(tmp_path / "run", 3, monkeypatch, prompts=rows)
    assert result.equal, describe_reproduction(result)
    assert (result.begun, result.rewards > 0) == (2, method != "sft")


def test_adapters(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_run(tiny_folder, tmp_path / "run", model__lora={"rank": 2}, run__steps=3)
    assert reproduced(tmp_path / "run", 3, monkeypatch).equal
    assert reproduced(tmp_path / "run", 2, monkeypatch).begun == 0


@pytest.mark.parametrize("kind", ["outcome", "process"])
def test_iterations_train_their_reward_model_on_the_stored_labels(
    kind: str, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 3 begins with the training of the second iteration, which also replays labels of the first iteration."""
    train(rounds(tiny_folder, kind), prompts=ROWS, out=tmp_path / "run")
    for step, begun in ((3, 0), (6, 4)):
        result = reproduced(tmp_path / "run", step, monkeypatch)
        assert result.equal, describe_reproduction(result)
        assert result.begun == begun


def test_a_run_in_progress(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in step 4, which looks like a run in progress: no summary, a partly written line, and the lock is held."""
    with killed(monkeypatch, "gruppo.training.run.TrainingRun._describe", 4):
        small_run(tiny_folder, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "rew')
    held = RunFolder(tmp_path / "run")
    assert reproduced(tmp_path / "run", 3, monkeypatch).equal
    held.close()
    with pytest.raises(UsageError, match="has steps 1 to 3"):
        reproduce(tmp_path / "run", 4, prompts=ROWS)


def test_a_step_whose_micro_batch_was_halved(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps before the halving are rerun with their original size."""
    with monkeypatch.context() as patch:
        patch.setattr("gruppo.models.packing.MAX_TOKENS", 60)
        at_call(patch, "gruppo.training.policy_trainer.batch_loss", 4, lambda: (_ for _ in ()).throw(MemoryError))
        small_run(tiny_folder, tmp_path / "run", run__steps=3, run__checkpoint_every=3)
    result = reproduced(tmp_path / "run", 3, monkeypatch)
    assert result.equal, describe_reproduction(result)
    assert "out of memory during updating in step 2" in result.notes[0]


def change_rows(out: Path, step: int, change: Callable[[dict[str, Any]], None]) -> None:
    path = out / "rollouts" / f"step-{step:06d}.parquet"
    rows = pq.read_table(path).to_pylist()
    change(rows[5])
    pq.write_table(pa.Table.from_pylist(rows, ROLLOUTS), path)


def test_a_reward_without_a_seed_is_reported_and_stored_rewards_are_used(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "import random\ndef f(completions, **_):\n    return [random.SystemRandom().random() for _ in completions]\n"
    )
    small_run(tiny_folder, tmp_path / "run", reward__functions=[f"{tmp_path}/mine.py:f"], run__steps=2)
    result = reproduced(tmp_path / "run", 2, monkeypatch)
    assert not result.equal
    assert {found.what for found in result.differences} == {"reward"}
    assert len(result.differences) == 16
    page = describe_reproduction(result)
    assert "16 of 16 completions differ" in page
    assert "computed from the stored rewards" in page
    assert page.endswith("Not reproduced: there are differences.")


def test_a_changed_reward_function_is_noted(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("def f(completions, **_):\n    return [float(len(c)) for c in completions]\n")
    small_run(tiny_folder, tmp_path / "run", reward__functions=[f"{tmp_path}/mine.py:f"], run__steps=2)
    (tmp_path / "mine.py").write_text(
        "def f(completions, **_):\n    return [len(c) + ('a' in c) for c in completions]\n"
    )
    result = reproduced(tmp_path / "run", 2, monkeypatch)
    assert "the code of f has changed" in result.notes[0]
    rows = pq.read_table(tmp_path / "run/rollouts/step-000002.parquet").to_pylist()
    assert len(result.differences) == sum("a" in row["text"] for row in rows) > 0


def test_a_reward_that_failed_in_the_run_but_not_in_the_rerun(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "import os\ndef f(completions, **_):\n"
        "    if not os.path.exists(__file__ + '.ok'):\n        raise OSError('no')\n"
        "    return [1.0 for _ in completions]\n"
    )
    settings = {"reward__functions": [f"{tmp_path}/mine.py:f"], "reward__failure_limit": 1.0}
    small_run(tiny_folder, tmp_path / "run", **settings, run__steps=1)
    assert reproduced(tmp_path / "run", 1, monkeypatch).equal
    (tmp_path / "mine.py.ok").touch()
    result = reproduced(tmp_path / "run", 1, monkeypatch)
    assert [found.what for found in result.differences] == ["reward"] * 16


CHANGED = {
    "advantage": (lambda row: row["advantages"].__setitem__(1, 7.0), {"advantages"}),
    "old log-probability": (lambda row: row["old_logprobs"].__setitem__(0, -9.0), {"old_logprobs"}),
    "trained": (lambda row: row.update(trained=False), {"trained"}),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_changed_value_in_the_rollouts_is_reported(what: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, expected = CHANGED[what]
    change_rows(copy, 6, change)
    result = reproduced(copy, 6, monkeypatch)
    assert {found.what for found in result.differences} == expected
    (found,) = result.differences
    assert (found.group, found.completion) == (1, 1)


def test_a_changed_token_affects_all_derived_values(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_rows(copy, 6, lambda row: row["token_ids"].__setitem__(0, 1 + row["token_ids"][0] % 40))
    changed = {each.what for each in reproduced(copy, 6, monkeypatch).differences}
    assert {"old_logprobs", "loss/total", "optimizer/gradient_norm"} <= changed


def test_a_changed_token_in_an_intermediate_step_is_reported_with_the_step(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_rows(copy, 2, lambda row: row["token_ids"].__setitem__(0, 1 + row["token_ids"][0] % 40))
    result = reproduced(copy, 3, monkeypatch)
    assert result.earlier is not None
    assert result.earlier[0] == 2
    assert "Step 2, an intermediate step, is the first that differs" in describe_reproduction(result)


def test_a_changed_metric_is_reported_unless_within_the_tolerance(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    lines[5]["optimizer/gradient_norm"] *= 1 + 1e-6
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = reproduced(copy, 6, monkeypatch)
    assert [found.what for found in result.differences] == ["optimizer/gradient_norm"]
    assert "stored" in describe_reproduction(result)
    assert reproduced(copy, 6, monkeypatch, tolerance=1e-5).equal


def test_a_damaged_checkpoint_is_skipped_with_a_note(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "checkpoints/step-000004/weights.safetensors").write_bytes(b"rubbish")
    result = reproduced(copy, 5, monkeypatch)
    assert (result.equal, result.begun) == (True, 0)
    assert "step-000004" in result.notes[0]


def test_deleted_rollouts_are_reported(copy: Path) -> None:
    (copy / "rollouts/step-000005.parquet").unlink()
    with pytest.raises(UsageError, match="rollouts were deleted"):
        reproduce(copy, 6, prompts=ROWS, trust=True)


def test_arguments_passed_from_python_must_be_passed_again(tiny_folder: str, tmp_path: Path, finished: Path) -> None:
    with pytest.raises(
        UsageError, match=r"task.name = .* passed from Python; call gruppo.reproduce\(run, step, prompts="
    ):
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
    with pytest.raises(UsageError, match="contains no run"):
        reproduce(tmp_path, 1)


def test_the_command(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 0 if everything is equal, 1 if not, 2 for a missing step."""
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
    assert (code, page.strip().splitlines()[-1]) == (0, "Reproduced exactly.")
    change_rows(out, 2, lambda row: row["advantages"].__setitem__(0, 3.0))
    code, page, _ = called("--step", "2", "--json")
    assert (code, json.loads(page)["differences"][0]["what"]) == (1, "advantages")
    code, _, error = called("--step", "9")
    assert (code, error.count("\n")) == (2, 1)
