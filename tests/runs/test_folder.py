"""The run folder and its checkpoints, file by file."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gruppo.config.loading import load_recipe
from gruppo.errors import UsageError
from gruppo.models.weights import weights_sha256
from gruppo.runs.atomic import write_whole
from gruppo.runs.folder import RunFolder, check_folder
from gruppo.runs.reading import read_lines
from gruppo.training.checkpoint import State, load_models, load_state, newest_checkpoint, save_checkpoint, save_models
from tests.conftest import make_policy

SCHEMA = pa.schema({"a": pa.int64()})
RECIPE = load_recipe({"model": {"name": "m"}})


@pytest.fixture
def run(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    yield folder
    folder.close()


def test_lines_are_truncated_and_later_tables_deleted(run: RunFolder) -> None:
    run.metric({"step": 1})
    run.table("rollouts", 1, [{"a": 1}], SCHEMA)
    lengths = run.lengths()
    run.metric({"step": 2})
    run.event("kind", "message", 2)
    run.table("rollouts", 2, [{"a": 2}], SCHEMA)
    (run.path / "rollouts" / "step-000003.writing").write_text("half")
    run.cut_back(lengths, 1)
    assert run.metrics() == [{"step": 1}]
    assert read_lines(run.path / "events.jsonl") == []
    assert [path.name for path in (run.path / "rollouts").iterdir()] == ["step-000001.parquet"]
    assert pq.read_table(run.path / "rollouts" / "step-000001.parquet").to_pylist() == [{"a": 1}]


def test_metrics_contain_no_nan(run: RunFolder) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.metric({"step": 1, "x": float("nan")})


def test_second_run_in_a_folder_is_refused(run: RunFolder) -> None:
    with pytest.raises(UsageError, match="another run"):
        RunFolder(run.path)
    run.close()
    RunFolder(run.path).close()


def test_files_are_replaced_atomically(tmp_path: Path) -> None:
    write_whole(tmp_path / "x", b"one")
    write_whole(tmp_path / "x", b"two")
    assert (tmp_path / "x").read_bytes() == b"two"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_folder_rules(run: RunFolder, tmp_path: Path) -> None:
    check_folder(tmp_path / "new", RECIPE, resume=False)
    check_folder(run.path, RECIPE, resume=True)
    run.start(RECIPE)
    check_folder(run.path, RECIPE, resume=True)
    with pytest.raises(UsageError, match="already contains a run"):
        check_folder(run.path, RECIPE, resume=False)
    (change,) = check_folder(run.path, load_recipe(RECIPE, ["run.steps=7"]), resume=True)
    assert change.message == "run.steps was 100 and is 7"
    with pytest.raises(UsageError, match=r"run\.seed was 0 and is 7"):
        check_folder(run.path, load_recipe(RECIPE, ["run.seed=7"]), resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        check_folder(tmp_path / "other", RECIPE, resume=True)
    with pytest.raises(UsageError, match="is a file"):
        check_folder(tmp_path / "other" / "thesis.tex", RECIPE, resume=False)


def trained(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = make_policy(seed=seed).model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.tensor([[1, 2, 3]])).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def saving(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Path], None]:
    return partial(save_models, models={"": (model, optimizer)})


def test_checkpoint_restores_weights_optimizer_and_state(run: RunFolder) -> None:
    model, optimizer = trained(0)
    run.metric({"step": 1})
    folder = save_checkpoint(run, saving(model, optimizer), State(step=3, cursor=12, evaluated=True))
    state = load_state(folder)
    assert (state.step, state.cursor, state.evaluated) == (3, 12, True)
    assert state.lengths == {"metrics.jsonl": len('{"step": 1}\n'), "events.jsonl": 0}
    other, other_optimizer = trained(1)
    load_models(folder, {"": (other, other_optimizer)})
    for one, two in ((model, optimizer), (other, other_optimizer)):
        one(torch.tensor([[4, 5]])).logits.square().mean().backward()
        two.step()
    assert weights_sha256(model) == weights_sha256(other)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("fused", [True, False])
def test_steps_of_a_fused_optimizer_are_restored_on_the_device(run: RunFolder, fused: bool) -> None:
    """On any device but the CPU, a fused AdamW needs the number of its steps there; "meta" stands for one."""
    model, optimizer = trained(0)
    folder = save_checkpoint(run, saving(model, optimizer), State(step=3))
    on_device = make_policy(seed=1).model.to("meta")
    on_device.tie_weights()
    restored = torch.optim.AdamW(on_device.parameters(), fused=fused)
    load_models(folder, {"": (on_device, restored)})
    kinds = {(kind, tensor.device.type) for state in restored.state.values() for kind, tensor in state.items()}
    step = ("step", "meta" if fused else "cpu")
    assert kinds == {step, ("exp_avg", "meta"), ("exp_avg_sq", "meta")}
    assert len(restored.state) == len(optimizer.state)


def test_last_two_and_best_are_kept(run: RunFolder) -> None:
    model, optimizer = trained(0)
    state = State()
    for step, accuracy in enumerate([0.1, 0.9, 0.2, 0.3, 0.4], start=1):
        state.step = step
        state.evaluations[str(step)] = {"accuracy": accuracy}
        save_checkpoint(run, saving(model, optimizer), state)
    kept = sorted(path.name for path in (run.path / "checkpoints").iterdir())
    assert kept == ["step-000002", "step-000004", "step-000005"]


@pytest.mark.parametrize("damage", ["flipped bit", "missing file", "truncated manifest", "empty manifest"])
def test_damaged_checkpoint_is_skipped(run: RunFolder, damage: str) -> None:
    model, optimizer = trained(0)
    good = save_checkpoint(run, saving(model, optimizer), State(step=1))
    bad = save_checkpoint(run, saving(model, optimizer), State(step=2))
    if damage == "flipped bit":
        content = bytearray((bad / "weights.safetensors").read_bytes())
        content[-5] ^= 1
        (bad / "weights.safetensors").write_bytes(content)
    elif damage == "missing file":
        (bad / "optimizer.safetensors").unlink()
    elif damage == "truncated manifest":
        text = (bad / "manifest.json").read_text()
        (bad / "manifest.json").write_text(text[: len(text) // 2])
    else:
        (bad / "manifest.json").write_text(json.dumps({}))
    found, problems = newest_checkpoint(run)
    assert found == good
    assert len(problems) == 1
    assert "step-000002" in problems[0]


def test_no_checkpoint_yet(run: RunFolder) -> None:
    assert newest_checkpoint(run) == (None, [])


def test_kill_while_a_checkpoint_is_replaced_loses_nothing(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old folder is moved aside before the new one gets its name; in between, the old one is still found."""
    model, optimizer = trained(0)
    save_checkpoint(run, saving(model, optimizer), State(step=2, cursor=1))
    rename = Path.replace

    def dies(self: Path, target: Path) -> Path:
        if self.is_dir():
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(run, saving(model, optimizer), State(step=2, cursor=2))
    assert not (run.path / "checkpoints" / "step-000002").exists()
    found, problems = newest_checkpoint(run)
    assert problems == []
    assert found is not None
    assert load_state(found).cursor == 1
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step-000002"]
