"""`method.old_logprobs`: a setting decides whether π_old comes from the trainer or from the engine."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from gruppo.config.loading import load_recipe
from gruppo.errors import UsageError
from tests.small_runs import recipe, small_run


def rollouts(out: Path) -> list[dict]:
    return [row for path in sorted((out / "rollouts").iterdir()) for row in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize("updates", [1, 2])
def test_pi_old_of_the_engine_is_what_it_sampled_from(updates: int, tiny_folder: str, tmp_path: Path) -> None:
    small_run(
        tiny_folder,
        tmp_path / "run",
        run__steps=2,
        method__old_logprobs="engine",
        method__inner_updates=updates,
        model__dtype="bfloat16",
    )
    rows = [row for row in rollouts(tmp_path / "run") if row["old_logprobs"]]
    assert rows
    for row in rows:
        assert row["old_logprobs"] == row["sampling_logprobs"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["engine/logprob_difference_max"] for line in lines] == [0.0, 0.0]
    # Engine and trainer round differently in bfloat16, so the ratio of the first update is not exactly 1.
    assert any(line["policy/ratio_max"] > 1 for line in lines)


def test_pi_old_of_the_trainer_makes_the_first_ratio_one(tiny_folder: str, tmp_path: Path) -> None:
    small_run(tiny_folder, tmp_path / "run", run__steps=1, model__dtype="bfloat16")
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["policy/ratio_max"] == line["policy/ratio_min"] == 1
    assert line["engine/logprob_difference_max"] > 0


@pytest.mark.parametrize(
    ("method", "word"),
    [
        ({"tis_cap": 2.0}, "tis_cap"),
        ({"kl_estimator": "k1", "kl_coef": 0.1}, "KL in the reward"),
        ({"name": "online-rft", "source": "initial"}, 'source = "initial"'),
    ],
)
def test_methods_that_need_the_trainer_refuse_the_engine(method: dict, word: str, tiny_folder: str) -> None:
    data = recipe(tiny_folder)
    data["method"] = {"old_logprobs": "engine", **method}
    with pytest.raises(UsageError, match=word) as caught:
        load_recipe(data)
    assert 'write old_logprobs = "trainer"' in str(caught.value)
