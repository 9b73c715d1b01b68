"""`gruppo.rescore`: another reward on the recorded completions, called as in training, and compared."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gruppo
from gruppo.errors import UsageError
from gruppo.rollout.rescore import _chosen
from gruppo.runs.reading import read_table
from gruppo.runs.rescores import Rescores
from gruppo.runs.tables import RESCORES
from gruppo.utils.progress import NullProgress
from tests.fuzzing import command
from tests.rollout.test_reward_failures import CALLS
from tests.small_runs import small_run

MORE = (
    CALLS
    + """
def negative(completions, prompts, answer, trainer_state, prompt_endings, **_):
    return [-value for value in noisy(completions, prompts, answer, trainer_state, prompt_endings)]
def partly(completions, prompts, **_):
    if prompts[0] == "a1":
        raise RuntimeError("\\x1b[2Jbroken")
    return [None, float("nan"), *map(float, map(len, completions[2:]))]
def one(completions, **_): return [1.0]
def needs(completions, solution): return [1.0 for _ in completions]
def halves(completions, completion_ids, **_):
    return [{"step_rewards": [1.0, 0.0], "step_ends": [0, 1]} if len(ids) > 1 else 0.5 for ids in completion_ids]
"""
)
OLD = Path("tests/runs/revision_790d39a")


@pytest.fixture(scope="module")
def run(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, rewarded by `noisy` + 2 `plain`."""
    folder = tmp_path_factory.mktemp("rescore")
    (folder / "calls.py").write_text(MORE)
    functions = [f"{folder}/calls.py:noisy", f"{folder}/calls.py:plain"]
    return small_run(tiny_folder, folder / "run", run__steps=3, reward__functions=functions,
                     reward__weights=[1.0, 2.0]).path  # fmt: skip


def rescore(run: Path, *names: str, **arguments: Any) -> Rescores:
    rewards = [f"{run.parent}/calls.py:{name}" for name in names]
    return gruppo.rescore(run, rewards, progress=False, **arguments)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_rewards_of_the_run_give_the_recorded_values(run: Path) -> None:
    """Arguments, trainer_state and random numbers are those of training."""
    before = everything(run)
    found = rescore(run, "noisy", "plain", overrides=["reward.weights=[1, 2]"])
    frame, recorded = found.frame(), gruppo.load_result(run).rollouts()
    assert len(frame) == len(recorded) == 3 * 4 * 4
    for name in ("step", "group", "completion", "prompt_id"):
        assert frame[name].tolist() == recorded[name].tolist()
    assert frame["recorded"].tolist() == frame["rescored"].tolist() == recorded["reward"].tolist()
    assert (found.agreement.equal, found.agreement.pearson) == (1.0, pytest.approx(1.0))
    assert len(found.disagreements()) == len(found.changed_groups()) == 0
    assert everything(run) == before


def test_the_opposite_reward_turns_every_group_around(run: Path) -> None:
    part = rescore(run, "noisy", against="noisy")
    assert part.agreement.equal == 1.0
    found = rescore(run, "negative", against="noisy")
    assert found.agreement.spearman is not None
    figures = found.group_figures()
    assert figures["groups"] == figures["recorded_nonzero"] == figures["rescored_nonzero"] == 12
    assert (figures["gain_nonzero"], figures["lose_nonzero"]) == (0, 0)
    rows = found.disagreements(5)
    assert rows["difference"].abs().is_monotonic_decreasing
    texts = gruppo.load_result(run).rollouts().set_index(["step", "group", "completion"])["text"]
    for row in rows.to_dict("records"):
        assert row["text"] == texts[row["step"], row["group"], row["completion"]]
        assert row["difference"] == row["rescored"] - row["recorded"]


def test_functions_from_python_and_a_constant_reward(run: Path) -> None:
    found = gruppo.rescore(run, lambda completions, **_: [1] * len(completions), progress=False)
    assert found.agreement.pearson is None
    assert found.group_figures()["lose_nonzero"] == found.group_figures()["reordered"] == 12
    assert len(found.changed_groups()) == 12


def test_excluded_completions_are_counted_and_not_compared(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.copy(run.parent / "calls.py", tmp_path)
    path = copy / "rollouts/step-000001.parquet"
    rows = pq.read_table(path)
    rewards = [None if number % 4 == 3 else value for number, value in enumerate(rows["reward"].to_pylist())]
    pq.write_table(rows.set_column(rows.schema.get_field_index("reward"), "reward", pa.array(rewards)), path)
    found = rescore(copy, "partly")
    frame = found.frame()
    failed = frame["failure"].fillna("").str.contains("broken")
    assert set(frame[~failed]["failure"].dropna()) == {"partly: returned nan"}
    assert set(frame[frame["rescored"].isna() & frame["failure"].isna()]["completion"]) == {0}
    counts = {
        "recorded": int((frame["recorded"].isna() & frame["rescored"].notna()).sum()),
        "rescored": int((frame["recorded"].notna() & frame["rescored"].isna()).sum()),
        "both": int((frame["recorded"].isna() & frame["rescored"].isna()).sum()),
    }
    assert found.excluded() == counts
    assert counts["recorded"] + counts["both"] == 4
    assert found.agreement.count == 48 - sum(counts.values()) > 0


def test_step_rewards_count_with_their_mean(run: Path) -> None:
    found = rescore(run, "halves", steps=1, overrides=["reward.weights=[3]"])
    lengths = gruppo.load_result(run).rollouts(1)["token_ids"].map(len)
    assert found.frame()["rescored"].tolist() == [1.5] * len(lengths)


def test_nothing_of_a_foreign_folder_runs(run: Path, tmp_path: Path) -> None:
    """The copy comes from somebody else as far as gruppo knows; its recipe names a file that leaves a mark."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (tmp_path / "evil.py").write_text(
        f"open({str(tmp_path / 'mark')!r}, 'w')\ndef noisy(completions, **_): return []\n"
    )
    recipe = copy / "recipe.toml"
    recipe.write_text(recipe.read_text().replace(f"{run.parent}/calls.py", f"{tmp_path}/evil.py"))
    found = gruppo.rescore(copy, "think_format", progress=False)
    assert found.agreement.count == 48
    assert not (tmp_path / "mark").exists()


def test_tables_of_earlier_versions(tmp_path: Path) -> None:
    """The run was made before `number` became `last_number`, and has no token texts of prompts."""
    found = gruppo.rescore(OLD / "run", "last_number", against="last_number", progress=False)
    assert found.agreement.count == len(found.table) > 0
    assert found.agreement.equal == 1.0


def test_steps_and_limit(run: Path) -> None:
    def chosen(steps: Any, limit: int | None) -> list[tuple[str, int | None]]:
        return [(path.stem[-1:], most) for path, most in _chosen(run, steps, limit)]

    assert chosen(None, None) == [("1", None), ("2", None), ("3", None)]
    assert chosen(2, None) == [("2", None)]
    assert chosen(range(2, 99), 5) == [("2", 3), ("3", 2)]
    assert chosen(None, 2) == [("1", 1), ("2", 1)]
    found = rescore(run, "plain", steps=[3, 1], limit=3)
    assert found.frame().groupby(["step", "group"]).size().to_dict() == {(1, 0): 4, (1, 1): 4, (3, 0): 4}


def test_a_damaged_table_is_left_out_with_a_note(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.copy(run.parent / "calls.py", tmp_path)
    (copy / "rollouts/step-000001.parquet").write_bytes(b"PAR1")
    rows = pq.read_table(copy / "rollouts/step-000002.parquet")
    pq.write_table(rows.slice(1), copy / "rollouts/step-000002.parquet")  # begins inside of a group
    found = rescore(copy, "plain")
    assert set(found.frame()["step"]) == {3}
    assert [note.partition(": ")[0][-14:] for note in found.notes] == ["000001.parquet", "000002.parquet"]
    with pytest.raises(UsageError, match=r"step-000001\.parquet: is damaged"):
        rescore(copy, "plain", steps=range(1, 3))


def test_file_with_every_row(run: Path, tmp_path: Path) -> None:
    found = rescore(run, "negative", out=tmp_path / "r.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["r.parquet"]
    assert pq.read_schema(tmp_path / "r.parquet").metadata == {b"gruppo_schema": b"3"}
    again = Rescores.read(tmp_path / "r.parquet", run)
    assert again.table.equals(found.table)
    assert again.as_dict() == found.as_dict()
    assert again.disagreements().equals(found.disagreements())
    lost = Rescores(tmp_path, found.table).disagreements(1)
    assert lost["text"].tolist() == [None], "the tables of the run are gone"
    (tmp_path / "other.parquet").write_bytes((run / "rollouts/step-000001.parquet").read_bytes())
    with pytest.raises(UsageError, match=r"other\.parquet: is damaged, or not a table"):
        Rescores.read(tmp_path / "other.parquet", run)
    rows = [{**row, "reward_parts": "[1"} for row in found.table.to_pylist()[:1]]
    pq.write_table(pa.Table.from_pylist(rows, RESCORES), tmp_path / "bad.parquet")
    with pytest.raises(UsageError, match=r"bad\.parquet: is damaged"):
        Rescores.read(tmp_path / "bad.parquet", run)


def test_ctrl_c_leaves_no_file(run: Path, tmp_path: Path) -> None:
    class Interrupts(NullProgress):
        @contextmanager
        def bar(self, label: str, total: float | None, unit: str) -> Iterator[Callable[[float], None]]:
            yield lambda amount: os.kill(os.getpid(), signal.SIGINT) if label == "Rescoring" else None

    with pytest.raises(KeyboardInterrupt):
        gruppo.rescore(run, "think_format", out=tmp_path / "r.parquet", progress=Interrupts())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reward", "nope"], "--reward nope: unknown reward"),
        (["--reward", "CALLS:one"], "--reward one: fails on every completion of step 1: one: ValueError: returned 1"),
        (["--reward", "CALLS:needs"], 'needs the argument "solution", which is not available'),
        (["--reward", "regex"], "reward.options.regex.pattern: missing"),
        (["--reward", "CALLS:plain", "--steps", "7-9"], "has no rollouts of such a step; it has those of steps 1 to 3"),
        (["--reward", "CALLS:plain", "--step", "3-1"], "--steps 3-1: must be a step or a range of steps"),
        (["--reward", "CALLS:plain", "--limit", "0"], "--limit 0: must be at least 1"),
        (
            ["--reward", "CALLS:plain", "--against", "x"],
            "--against x: is not a part of the recorded reward; write one of",
        ),
        (["--reward", "CALLS:plain", "--set", "run.steps=3"], "only fields of [reward] other than functions"),
        (["--reward", "CALLS:plain", "--set", "reward.weights=[1, 2]"], "2 numbers for 1 functions"),
        (["--reward", "CALLS:plain", "--out", "r.txt"], "--out r.txt: must be a .parquet file"),
        (["--reward", "CALLS:plain", "--out", "RUN/r.parquet"], "is in the run folder, which is only read"),
    ],
)
def test_each_mistake_is_one_line(options: list[str], message: str, run: Path) -> None:
    words = [word.replace("CALLS", f"{run.parent}/calls.py").replace("RUN", str(run)) for word in options]
    code, out, err = command("rescore", str(run), *words)
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line.startswith("gruppo: ")]
    assert message in line


def test_folders_without_rollouts(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="contains no run"):
        gruppo.rescore(tmp_path, "think_format", progress=False)
    shutil.copy(run / "recipe.toml", tmp_path)
    with pytest.raises(UsageError, match="has no rollouts"):
        gruppo.rescore(tmp_path, "think_format", progress=False)
    with pytest.raises(UsageError, match="steps = 3: must be a number or a collection"):
        gruppo.rescore(run, "think_format", steps="3", progress=False)  # type: ignore[arg-type]


def test_the_command_prints_figures_and_only_printable_text(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    path = copy / "rollouts/step-000002.parquet"
    rows = pq.read_table(path)
    texts = pa.array(["\x1b[31mred\nline " + "x" * 500] * len(rows))
    pq.write_table(rows.set_column(rows.schema.get_field_index("text"), "text", texts), path)
    words = ["rescore", str(copy), "--reward", f"{run.parent}/calls.py:partly", "--set", "reward.workers=1"]
    code, out, err = command(*words, "--step", "2", "--out", str(tmp_path / "r.parquet"))
    assert code == 0, err
    assert "16 completions in 4 groups, scored with partly" in out
    assert "correlation  " in out
    assert "nonzero advantage  recorded" in out
    assert r"\x1b[31mred line xxx" in out
    assert max(map(len, out.splitlines())) < 200
    assert "\x1b" not in out + err
    assert len(read_table(tmp_path / "r.parquet", RESCORES)) == 16
    code, out, _ = command(*words, "--json", "--against", "plain")
    content = json.loads(out)
    assert content["completions"] == 48
    assert content["excluded"]["rescored"] >= 24
    assert content["against"] == "plain"
    assert len(content["disagreements"]) == 10
    assert content["agreement"]["count"] == 48 - content["excluded"]["rescored"]
