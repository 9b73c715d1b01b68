"""Runs that sample with two engines equal runs that sample in their own process, and leave no process of Ray behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import psutil
import pytest

from gruppo.engines.fleet import fleet as fleet_module
from gruppo.engines.fleet.member import Member
from gruppo.errors import RunError
from gruppo.training.api import train
from tests.cluster.compare import assert_close, lines
from tests.engines.fleet.running import end_by_signal, events, started, wait_for_steps, wait_for_the_end
from tests.small_runs import ROWS, fingerprint, killed, recipe, small_run

OF_THE_FLEET = ("engine/idle_share", "engine/load_", "engine/0/", "engine/1/")
EVALUATION: dict[str, Any] = {
    "evaluation__questions": 4,
    "evaluation__grader": "exact_match",
    "task__held_out": 0.3,
    "run__steps": 4,
}


def of_the_run(out: Path) -> dict[str, Any]:
    """The fingerprint of a run without what only a fleet reports."""
    found = fingerprint(out)
    for line in found["metrics"]:
        for name in list(line):
            if name.startswith(OF_THE_FLEET):
                del line[name]
    return found


@pytest.mark.parametrize(
    "changes",
    [{}, {"cluster__weights": "files"}, {"model__dtype": "float64"}, {"model__lora": {"rank": 2}}],
    ids=["objects", "files", "float64", "lora"],
)
def test_a_run_with_two_engines_equals_the_run_without(
    running_ray: None, tiny_folder: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Weights and checkpoints to the last bit; tokens, rewards and metrics but those of time and of the engines.

    Only what the engine says of its log-probabilities may differ in the last bits, because pieces are smaller batches.
    """
    alone = {name: value for name, value in changes.items() if not name.startswith("cluster__")}
    small_run(tiny_folder, tmp_path / "one", **EVALUATION, **alone)
    small_run(tiny_folder, tmp_path / "two", cluster__engines=2, **EVALUATION, **changes)
    found, expected = of_the_run(tmp_path / "two"), of_the_run(tmp_path / "one")
    assert (found["weights"], found["checkpoint"]) == (expected["weights"], expected["checkpoint"])
    for name in ("rollouts", "evaluations", "metrics"):
        assert_close(found[name], expected[name], 1e-6, name)
    steps = [line for line in lines(tmp_path / "two") if "engine/idle_share" in line]
    assert [line["engine/1/version"] for line in steps] == [1, 2, 3, 4]
    assert not (tmp_path / "two" / "engine_weights").exists()


def test_a_run_that_samples_ahead_with_two_engines_equals_the_one_without(
    running_ray: None, tiny_folder: str, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {**EVALUATION, "cluster__lag": 2, "method__tis_cap": 2.0}
    small_run(tiny_folder, tmp_path / "one", **changes)
    small_run(tiny_folder, tmp_path / "two", cluster__engines=2, **changes)
    found, expected = of_the_run(tmp_path / "two"), of_the_run(tmp_path / "one")
    for name in ("rollouts", "evaluations", "metrics"):
        assert_close(found[name], expected[name], 1e-5, name)


def test_a_run_that_loses_engines_equals_one_that_loses_none(
    running_ray: None, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run(tiny_folder, tmp_path / "whole", cluster__engines=2)
    send, sent = Member.send_piece, 0

    def kills(member: Member, *arguments: Any) -> None:
        nonlocal sent
        sent += 1
        send(member, *arguments)
        if sent in {2, 7}:
            assert member.hello is not None
            os.kill(member.hello.pid, signal.SIGKILL)

    monkeypatch.setattr(Member, "send_piece", kills)
    small_run(tiny_folder, tmp_path / "run", cluster__engines=2)
    assert of_the_run(tmp_path / "run") == of_the_run(tmp_path / "whole")
    found = events(tmp_path / "run", "engine_lost", "engine_back")
    assert [event["kind"] for event in found].count("engine_lost") == 2
    assert all("engine " in event["message"] and event["step"] >= 1 for event in found)


def test_an_engine_that_finds_no_place_at_the_start_is_reported_and_not_waited_for(
    running_ray: None, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a run that is resumed, which forgets the events after its checkpoint."""
    small_run(tiny_folder, tmp_path / "whole", cluster__engines=2)
    with killed(monkeypatch, "gruppo.engines.fleet.fleet.Fleet.load_weights", 4):
        small_run(tiny_folder, tmp_path / "run", cluster__engines=2)
    start = Member.start

    def first_without_a_place(member: Member) -> None:
        member.gpus = int(member.number == 1 and member.starts == 0)
        start(member)

    monkeypatch.setattr(Member, "start", first_without_a_place)
    monkeypatch.setattr(fleet_module, "START_SECONDS", 30.0)
    small_run(tiny_folder, tmp_path / "run", resume=True, cluster__engines=2, cluster__patience=30.0)
    assert of_the_run(tmp_path / "run") == of_the_run(tmp_path / "whole")
    lost, *_ = events(tmp_path / "run", "engine_lost", "engine_back")
    assert lost["message"].startswith("engine 1: silent for 30 s while starting (cluster.patience), so it was killed; ")
    assert lost["step"] == 3


def test_a_killed_run_resumes_to_the_same_numbers(
    running_ray: None, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run(tiny_folder, tmp_path / "whole", cluster__engines=2)
    with killed(monkeypatch, "gruppo.engines.fleet.fleet.Fleet.load_weights", 4):
        small_run(tiny_folder, tmp_path / "run", cluster__engines=2)
    small_run(tiny_folder, tmp_path / "run", resume=True, cluster__engines=2)
    assert of_the_run(tmp_path / "run") == of_the_run(tmp_path / "whole")


def test_a_run_whose_engines_all_fail_is_saved(
    running_ray: None, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, sent = Member.send_piece, 0

    def kills(member: Member, *arguments: Any) -> None:
        nonlocal sent
        sent += 1
        send(member, *arguments)
        if sent > 6:
            assert member.hello is not None
            os.kill(member.hello.pid, signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(Member, "send_piece", kills)
        with pytest.raises(RunError, match=r"engine [01] has ended 3 times without finishing any work; the last time:"):
            small_run(tiny_folder, tmp_path / "run", cluster__engines=2, run__checkpoint_every=100)
    assert (tmp_path / "run/checkpoints/step-000003/manifest.json").is_file()
    small_run(tiny_folder, tmp_path / "run", resume=True, cluster__engines=2, run__checkpoint_every=100)
    small_run(tiny_folder, tmp_path / "whole", cluster__engines=2, run__checkpoint_every=100)
    assert of_the_run(tmp_path / "run") == of_the_run(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_no_process_of_ray(tiny_folder: str, tmp_path: Path, number: signal.Signals) -> None:
    process = started(tiny_folder, tmp_path, cluster__engines=2, run__steps=2000, run__checkpoint_every=1000)
    wait_for_steps(tmp_path / "run", 3)
    names, output = end_by_signal(process, number, tmp_path / "run")
    assert "raylet" in names
    if number != signal.SIGKILL:
        done = len((tmp_path / "run/metrics.jsonl").read_text().splitlines())
        assert (tmp_path / f"run/checkpoints/step-{done:06d}/manifest.json").is_file()
        assert "(raylet)" not in output


def test_a_ray_that_runs_already_is_used_and_left(tiny_folder: str, tmp_path: Path) -> None:
    """`ray start` with a token, as on several machines."""
    token = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["ray", "start", "--head", "--block", "--port", str(port), "--num-cpus", "2", "--include-dashboard=false"]
    head = subprocess.Popen(
        [str(Path(sys.executable).with_name(command[0])), *command[1:], "--node-ip-address=127.0.0.1",
         "--object-store-memory=200000000"],
        env=token, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert head.stdout is not None
        wait_for_line(head.stdout, "Ray runtime started")
        address = f"127.0.0.1:{port}"
        process = started(
            tiny_folder, tmp_path, environment=token, cluster__engines=2, run__steps=2, cluster__address=address
        )
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        assert [line["engine/1/version"] for line in lines(tmp_path / "run")] == [1, 2]
        assert head.poll() is None, "the run ends only what it has started"
        (tmp_path / "other").mkdir()
        wrong = token | {"RAY_AUTH_TOKEN": "1" * 64}
        process = started(
            tiny_folder, tmp_path / "other", environment=wrong, cluster__engines=2, cluster__address=address
        )
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 1
        assert f'cluster.address = "{address}": Ray cannot be reached (' in output
    finally:
        children = psutil.Process(head.pid).children(recursive=True)
        head.send_signal(signal.SIGTERM)
        wait_for_the_end(children, 120)


def wait_for_line(stream: IO[str], words: str) -> None:
    seen = []
    for line in stream:
        seen.append(line)
        if words in line:
            return
    raise AssertionError("".join(seen))


def test_two_ranks_and_two_engines_equal_one_process(tiny_folder: str, tmp_path: Path) -> None:
    small: dict[str, Any] = {"run__steps": 3, "model__dtype": "float64"}
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    process = started(tiny_folder, tmp_path, *launcher, cluster__trainers=2, cluster__engines=2, **small)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    train(recipe(tiny_folder, **small), prompts=ROWS, out=tmp_path / "one", progress=False)
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "run"), strict=True):
        assert two["engine/0/version"] == two["step"]
        for name, value in one.items():
            if not name.startswith(("time/", "memory/")):
                assert_close(two[name], value, 1e-10, name)


def test_engines_sample_while_the_policy_is_trained(
    running_ray: None, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of each step are those that the lag says, also in an engine that has just been replaced, and in a
    run that was killed."""
    lagged: dict[str, Any] = {"cluster__engines": 2, "cluster__lag": 2, "method__tis_cap": 2.0, **EVALUATION}
    small_run(tiny_folder, tmp_path / "whole", **lagged)
    rows = [row for table in of_the_run(tmp_path / "whole")["rollouts"].values() for row in table]
    assert {row["step"]: row["policy_version"] for row in rows} == {1: 0, 2: 0, 3: 0, 4: 1}
    send, sent = Member.send_piece, 0

    def kills(member: Member, *arguments: Any) -> None:
        nonlocal sent
        sent += 1
        send(member, *arguments)
        if sent == 5:
            assert member.hello is not None
            os.kill(member.hello.pid, signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(Member, "send_piece", kills)
        small_run(tiny_folder, tmp_path / "lost", **lagged)
    assert of_the_run(tmp_path / "lost") == of_the_run(tmp_path / "whole")
    assert len(events(tmp_path / "lost", "engine_lost")) == 1
    with killed(monkeypatch, "gruppo.training.run.TrainingRun._describe", 3):
        small_run(tiny_folder, tmp_path / "run", **lagged)
    small_run(tiny_folder, tmp_path / "run", resume=True, **lagged)
    assert of_the_run(tmp_path / "run") == of_the_run(tmp_path / "whole")
