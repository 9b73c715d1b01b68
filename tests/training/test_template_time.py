"""A chat template that prints the date prints that of the run's start, also when the run is resumed or reproduced."""

from __future__ import annotations

import json
import shutil
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

import pytest

from gruppo.config.loading import load_recipe
from gruppo.errors import UsageError
from gruppo.evaluation.eval_run import run_evaluation
from gruppo.models.weights import save_model
from gruppo.runs import folder as run_folder
from gruppo.training.api import train
from gruppo.training.reproduce import reproduce
from gruppo.training.reward_model_api import label
from gruppo.utils.progress import NullProgress
from gruppo.utils.signals import Stop
from tests.conftest import TEMPLATE, make_policy
from tests.small_runs import ROWS, fingerprint, killed, recipe

CHATS = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]


class Clock(datetime):
    """A clock that shows what a test sets."""

    moment = datetime(2024, 7, 26, 13, 5, 7, 1234)

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        return cls.moment


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    monkeypatch.setattr(run_folder, "datetime", Clock)
    monkeypatch.setattr(Clock, "moment", Clock.moment)
    return Clock


@pytest.fixture(scope="module")
def dated(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose chat template prints the date and the time."""
    policy = make_policy(initializer_range=0.02)
    policy.tokenizer.chat_template = "<{{ strftime_now('%Y %m %d %H %M %S') }}>" + TEMPLATE
    save_model(policy, path := tmp_path_factory.mktemp("models") / "dated")
    return str(path)


def test_a_resumed_run_has_the_date_of_its_start(
    dated: str, tmp_path: Path, clock: type[Clock], monkeypatch: pytest.MonkeyPatch
) -> None:
    def go(out: Path, resume: bool = False) -> None:
        reward = {"reward__functions": ["regex"], "reward__options": {"regex": {"pattern": "[a-k]"}}}
        train(recipe(dated, run__steps=4, **reward), prompts=CHATS, out=out, resume=resume, progress=False)

    go(tmp_path / "whole")
    with killed(monkeypatch, "gruppo.training.run.release_memory", 4):
        go(tmp_path / "cut")
    clock.moment = datetime(2031, 1, 2)
    go(tmp_path / "cut", resume=True)
    assert fingerprint(tmp_path / "cut") == fingerprint(tmp_path / "whole")
    assert json.loads((tmp_path / "cut/environment.json").read_text())["start_time"] == "2024-07-26T13:05:07.001234"
    assert reproduce(tmp_path / "cut", 3, prompts=CHATS, progress=False).equal
    # Another run has another date; and so has a run of a version that did not record it.
    go(tmp_path / "other")
    assert fingerprint(tmp_path / "other")["rollouts"] != fingerprint(tmp_path / "whole")["rollouts"]
    environment = json.loads((tmp_path / "cut/environment.json").read_text())
    del environment["start_time"]
    (tmp_path / "cut/environment.json").write_text(json.dumps(environment))
    with pytest.raises(UsageError, match="questions"):
        go(tmp_path / "cut", resume=True)
    (tmp_path / "cut/environment.json").write_text(json.dumps({**environment, "start_time": "yesterday"}))
    with pytest.raises(UsageError, match=r"environment\.json: is damaged"):
        go(tmp_path / "cut", resume=True)


def test_a_resumed_evaluation_has_the_date_of_its_start(dated: str, tmp_path: Path, clock: type[Clock]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in CHATS[:4]))

    def go(resume: bool = False) -> Any:
        settings = load_recipe(
            {
                "model": {"name": dated, "device": "cpu", "dtype": "float32"},
                "sampling": {"max_tokens": 4},
                "evaluation": {"task": str(rows), "grader": "exact_match"},
            }
        )
        return run_evaluation(settings, tmp_path / "out", resume, NullProgress(), Stop())

    first = go()
    clock.moment = datetime(2031, 1, 2)
    (tmp_path / "out/results.json").unlink()
    assert go(resume=True).as_dict() == first.as_dict()
    shutil.rmtree(tmp_path / "out/evaluations")
    recorded = tmp_path / "out/environment.json"
    without = {name: value for name, value in json.loads(recorded.read_text()).items() if name != "start_time"}
    recorded.write_text(json.dumps(without))
    with pytest.raises(UsageError, match="data_sha256"):
        go(resume=True)


def test_resumed_labels_have_the_date_of_their_start(dated: str, tmp_path: Path, clock: type[Clock]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    settings = recipe(dated, task__name=str(rows), reward_model__kind="outcome", reward_model__prompts=4)
    settings["reward"] = {"functions": ["exact_match"], "workers": 1}
    label(settings, out=tmp_path / "labels", progress=False)
    clock.moment = datetime(2031, 1, 2)
    label(settings, out=tmp_path / "labels", resume=True, progress=False)
