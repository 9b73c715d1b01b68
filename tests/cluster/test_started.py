"""Runs that start their ranks through Ray, and what becomes of them when a rank is lost."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gruppo.cluster.ranks import ProcessRanks
from gruppo.errors import RunError
from gruppo.runs.results import Result
from gruppo.training.api import train
from tests.cluster.compare import assert_same_run, lines
from tests.engines.fleet.running import end_by_signal, events, started, wait_for_steps
from tests.small_runs import ROWS, at_call, fingerprint, recipe

TWO = {"cluster__trainers": 2, "cluster__patience": 120.0}
LOADING = "gruppo.cluster.ranks.ProcessRanks.begin"
UPDATE = "gruppo.training.policy_trainer.PolicyTrainer.update"
SAVING = "gruppo.training.model_files.ModelFiles.save"


def run(model: str, out: Path, **changes: Any) -> Result:
    """A run from Python, whose reward is a function without a name."""
    settings = recipe(model, **{**TWO, **changes})
    return train(settings, reward=lambda completions, **_: [text.count("a") / 8 for text in completions],
                 prompts=ROWS, out=out, progress=False)  # fmt: skip


def followers() -> Iterator[psutil.Process]:
    """The ranks that this process has started."""
    for child in psutil.Process().children(recursive=True):
        try:
            if "RankActor" in " ".join(child.cmdline()):
                yield child
        except psutil.Error:
            continue


def to_follower(number: signal.Signals) -> Callable[[], None]:
    """Sends a signal to the follower."""

    def send() -> None:
        (follower,) = followers()
        os.kill(follower.pid, number)

    return send


@pytest.fixture(scope="module")
def whole(running_ray: None, tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that loses no rank."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(tiny_folder, out).summary["state"] == "done"
    assert events(out, "rank_lost") == []
    return out


@pytest.mark.parametrize(
    ("target", "count"), [(LOADING, 1), (UPDATE, 4), (SAVING, 2)], ids=["loading", "update", "saving"]
)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_changes_nothing(
    whole: Path,
    tiny_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    count: int,
    number: signal.Signals,
) -> None:
    at_call(monkeypatch, target, count, to_follower(number))
    patience = 120.0 if number == signal.SIGKILL else 12.0  # a busy machine may need some seconds for an exchange
    result = run(tiny_folder, tmp_path / "run", cluster__patience=patience)
    assert result.summary["state"] == "done"
    assert fingerprint(tmp_path / "run") == fingerprint(whole)
    (event,) = events(tmp_path / "run", "rank_lost")
    cause = r"has ended: its process was killed" if number == signal.SIGKILL else r"is silent since .*, so it is killed"
    step = {LOADING: 0, UPDATE: 2, SAVING: 2}[target]
    words = rf"rank 1 \(process \d+ on .*\) {cause}.*; the run continues after step {step} on 2 ranks$"
    assert re.match(words, event["message"]), event
    assert list(followers()) == []


@pytest.mark.parametrize(
    "changes", [{"cluster__engines": 2}, {"cluster__lag": 1, "method__tis_cap": 2.0}], ids=["engines", "ahead"]
)
def test_a_rank_that_is_lost_beside_engines_or_ahead_changes_nothing(
    running_ray: None, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    run(tiny_folder, tmp_path / "whole", **changes)
    with monkeypatch.context() as patch:
        at_call(patch, UPDATE, 4, to_follower(signal.SIGKILL))
        run(tiny_folder, tmp_path / "run", **changes)
    found, expected = (fingerprint(tmp_path / name) for name in ("run", "whole"))
    for what in ("weights", "checkpoint", "rollouts"):
        assert found[what] == expected[what], what
    assert len(events(tmp_path / "run", "rank_lost")) == 1
    if "cluster__engines" in changes:
        assert [line["engine/1/version"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_run_whose_ranks_fail_again_and_again_stops(
    running_ray: None, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The follower cannot use what it gets, and says so itself."""
    monkeypatch.setattr("gruppo.cluster.ranks.described", lambda models: b"no models")
    begins = []
    begin = ProcessRanks.begin
    monkeypatch.setattr(ProcessRanks, "begin", lambda *arguments: (begins.append(1), begin(*arguments)))
    with pytest.raises(RunError) as caught:
        run(tiny_folder, tmp_path / "run")
    assert str(caught.value).startswith(
        "cluster.trainers = 2: ranks were lost 3 times without a checkpoint in between; the last time: rank 1 has "
        "failed (UnpicklingError: "
    )
    assert len(begins) == 3
    assert "\n" not in str(caught.value)


def test_losses_with_checkpoints_in_between_do_not_add_up(
    whole: Path, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events of losses that a later loss undoes are recorded again."""
    kill = to_follower(signal.SIGKILL)
    for count in (1, 2, 5, 6):  # updates: twice of step 1, and, after the checkpoint of step 2, twice of step 3
        at_call(monkeypatch, UPDATE, count, kill)
    run(tiny_folder, tmp_path / "run")
    assert fingerprint(tmp_path / "run") == fingerprint(whole)
    assert len(events(tmp_path / "run", "rank_lost")) == 4


def test_a_run_goes_on_with_the_ranks_for_which_there_is_room(
    whole: Path, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.util.placement_group import placement_group, remove_placement_group

    from gruppo.cluster.started import StartedRanks

    taken = []
    place = StartedRanks._place

    def lose_room() -> None:
        to_follower(signal.SIGKILL)()
        taken.append(placement_group([{"CPU": 1.0}] * 16))  # all of it, once the follower is gone

    def place_later(ranks: StartedRanks) -> Any:
        assert not taken or taken[0].wait(60)  # Ray does not serve requests in order
        return place(ranks)

    monkeypatch.setattr(StartedRanks, "_place", place_later)
    monkeypatch.setattr("gruppo.cluster.started.ROOM_SECONDS", 5.0)
    monkeypatch.setattr("gruppo.cluster.started.NOTICE_SECONDS", 5.0)
    at_call(monkeypatch, UPDATE, 4, lose_room)
    try:
        run(tiny_folder, tmp_path / "run")
    finally:
        remove_placement_group(taken[0])
    (event,) = events(tmp_path / "run", "rank_lost")
    assert event["message"].endswith("; the run continues after step 2 on 1 rank of 2, for which there is room")
    (change,) = events(tmp_path / "run", "changed")
    assert change["message"].startswith("cluster.trainers was 2 and is 1: sizes were chosen anew")
    assert_same_run(tmp_path / "run", whole, 1e-3)


def test_ranks_without_room_are_refused(
    running_ray: None, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gruppo.cluster.started.START_SECONDS", 1.0)
    with pytest.raises(RunError, match=r"cluster.trainers = 40: no room in Ray .* 39 ranks besides the leader need 39"):
        run(tiny_folder, tmp_path / "run", cluster__trainers=40, cluster__patience=1.0)


def test_the_command_equals_torchrun(tiny_folder: str, tmp_path: Path) -> None:
    """Bit for bit: weights, checkpoints, rollouts, metrics."""
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    found = {}
    for name, arguments in (("torchrun", launcher), ("ray", ())):
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = started(tiny_folder, tmp_path, *arguments, environment=one_thread, cluster__trainers=2)
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output
        assert output.count("Done: 6 steps") == 1
        found[name] = fingerprint(tmp_path / "run")
        (tmp_path / "run").rename(tmp_path / name)
    assert found["ray"] == found["torchrun"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_no_process(tiny_folder: str, tmp_path: Path, number: signal.Signals) -> None:
    process = started(tiny_folder, tmp_path, cluster__trainers=2, run__steps=2000, run__checkpoint_every=1000)
    wait_for_steps(tmp_path / "run", 3)
    names, _ = end_by_signal(process, number, tmp_path / "run")
    assert any("RankActor" in name for name in names), names
    if number != signal.SIGKILL:
        done = len((tmp_path / "run/metrics.jsonl").read_text().splitlines())
        assert (tmp_path / f"run/checkpoints/step-{done:06d}/manifest.json").is_file()
    else:
        status = json.loads((tmp_path / "run/status.json").read_text())
        assert status["state"] == "running"


def test_shards_fit_the_ranks_that_are_left() -> None:
    from gruppo.config.loading import load_recipe

    settings = load_recipe({"model": {"name": "m"}, "cluster": {"trainers": 4, "shards": 2, "address": "auto"}})
    left = {size: settings.on_ranks(size).cluster for size in (1, 2, 3, 4)}
    assert {size: cluster.shards for size, cluster in left.items() if cluster} == {1: 0, 2: 2, 3: 0, 4: 2}
    assert {size: cluster.address for size, cluster in left.items() if cluster} == {
        1: "local",
        2: "auto",
        3: "auto",
        4: "auto",
    }
    assert load_recipe(json.loads(json.dumps(settings.on_ranks(1).as_mapping()))) == settings.on_ranks(1)
