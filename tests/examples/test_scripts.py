"""Every script of examples/ runs from start to end with a tiny model, and does what its first line says."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from gruppo.runs.results import Result, load_result
from tests.conftest import make_tokenizer
from tests.examples.tiny import save_tiny

SCRIPTS = Path("examples").resolve()
SMALL = [
    "run.steps=1", "run.checkpoint_every=1", "model.device=cpu", "sampling.prompts_per_step=2",
    "sampling.max_tokens=16",
]  # fmt: skip
SAMPLED = ["sampling.group_size=2", "reward.workers=1"]
QUESTIONS = ["evaluation.questions=2", "evaluation.every=1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


def run(
    name: str, model: str, monkeypatch: pytest.MonkeyPatch, folder: Path, *changes: str
) -> tuple[dict[str, Any], Result]:
    """Run a script in `folder` as the command line would. Returns its globals and the one run that trained a policy."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", [name, *SMALL, *changes, f"model.name={model}"])
    found = runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    (summary,) = (path for path in folder.glob("runs/*/summary.json") if "weights_sha256" in path.read_text())
    result = load_result(summary.parent)
    assert result.summary["state"] == "done"
    assert result.summary["steps"] == 1
    return found, result


def test_gsm8k(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for split in ("train", "test"):
        rows = [{"question": f"{n} + 1 = ?", "answer": f"So {n + 1}.\n#### {n + 1}"} for n in range(4)]
        (tmp_path / f"gsm8k_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, result = run("gsm8k.py", model, monkeypatch, tmp_path, "--data", ".", *SAMPLED, *QUESTIONS)
    assert result.frame()["eval/accuracy"].notna().all()
    assert result.frame()["reward/math_verify/mean"][1] in (0, 0.25, 0.5, 0.75, 1)


def test_format_and_length(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, result = run("format_and_length.py", model, monkeypatch, tmp_path, *SAMPLED, *QUESTIONS)
    assert {"reward/last_number/mean", "reward/think_format/mean", "reward/brief/mean"} <= set(result.frame())
    lengths = [[0] * count for count in (10, 80, 120, 160, 400)]
    assert found["brief"](completion_ids=lengths) == [0, 0, -0.5, -1, -1]


def test_classifier_reward(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    labels = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
    judge = BertForSequenceClassification(
        BertConfig(**sizes, **labels, num_attention_heads=2, initializer_range=0.5, max_position_embeddings=512)
    )
    judge.save_pretrained(tmp_path / "judge")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "judge")
    judge_here = f"reward.options.classifier.model={tmp_path / 'judge'}"
    _, result = run("classifier_reward.py", model, monkeypatch, tmp_path, *SAMPLED, judge_here)
    assert 0 < result.frame()["reward/classifier/mean"][1] < 1


def test_tool_use(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, result = run("tool_use.py", model, monkeypatch, tmp_path, *SAMPLED)
    assert found["Calculator"]().multiply(12, 13) == 156
    assert result.frame()["environment/called"][1] == 0  # random weights call nothing
    assert "multiply" in str(result.rollouts(1)["prompt"][0])


def test_reward_model(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, result = run(
        "reward_model.py",
        model,
        monkeypatch,
        tmp_path,
        *SAMPLED,
        *QUESTIONS,
        "reward_model.prompts=8",
        "reward_model.epochs=1",
    )
    assert found["judge"].updates > 0
    frame = result.frame()
    assert 0 < frame["reward/reward_model/mean"][1] < 1
    assert math.isclose(frame["reward/mean"][1], frame["reward/reward_model/mean"][1], abs_tol=1e-6)


def test_preference_rows(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, result = run("preference_rows.py", model, monkeypatch, tmp_path, "sampling.max_tokens=128")
    assert math.isclose(result.frame()["dpo/loss"][1], math.log(2), abs_tol=1e-6)  # the policy is the reference yet


def test_every_script_has_a_test_and_less_than_forty_lines() -> None:
    names = {path.stem for path in SCRIPTS.glob("*.py")}
    assert names == {name.removeprefix("test_") for name in globals()} & names
    for path in SCRIPTS.glob("*.py"):
        assert len(path.read_text().splitlines()) < 40, path
