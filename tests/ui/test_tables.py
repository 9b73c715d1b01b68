"""Pages about questions and evaluations of runs whose answers are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from gruppo.runs.eval_metrics import figures
from gruppo.ui import tables
from gruppo.ui.catalog import Catalog, run_key
from gruppo.ui.index import Index
from gruppo.ui.live import LiveRun
from gruppo.utils.stats import pass_at_k
from tests.ui.made import RECIPE, answer_row, make_run, rollout_row, write_answers, write_rollouts
from tests.ui.visits import HOST

RIGHT = {0: ("1000", "0000"), 2: ("1111", "1000"), 4: ("0011", "1110")}  # answers to two questions, by step


def known_run(run: Path, right: dict[int, Sequence[str]] = RIGHT, seed: int = 0) -> Path:
    """A run with evaluations whose right answers are known, and with question e/0 drawn at steps 1 to 3."""
    metrics = [
        {"step": step, "eval/accuracy": 0.5, "eval/accuracy_low": 0.25, "eval/accuracy_high": 0.75} for step in right
    ]
    make_run(run, RECIPE.replace("steps = 10", f"steps = 10\nseed = {seed}"), metrics, summary={"state": "done"})
    for step, questions in right.items():
        rows = [
            answer_row(prompt_id=f"e/{number}", question=f"question {number}", sample=sample, correct=one == "1",
                       answer=f"<b>answer</b> {one}", vote=one, extracted=f"read {one}")
            for number, answers in enumerate(questions) for sample, one in enumerate(answers)
        ]  # fmt: skip
        write_answers(run, *rows, step=step)
    for step, rewards in ((1, (0.0, 0.0)), (2, (0.0, 1.0)), (3, (1.0, 1.0))):
        rows = [rollout_row(step=step, completion=number, reward=reward, prompt_id="e/0", text=f"completion {reward}")
                for number, reward in enumerate(rewards)]  # fmt: skip
        write_rollouts(run, *rows, step=step)
    return run


def indexed(run: Path, cache: Path) -> Index:
    index = Index(run, cache)
    index.update()
    return index


def view(**changes: Any) -> tables.View:
    return tables.View(
        **{"sort": "", "descending": False, "offset": 0, "base": lambda **_: None, "values": {}, **changes}
    )


def test_a_question_through_time_has_its_turns(tmp_path: Path) -> None:
    run = known_run(tmp_path / "run")
    card = Catalog(tmp_path).cards()[0]
    found = tables.question_values(indexed(run, tmp_path / "cache"), card, "e/0", view(limit=20))
    assert [(row["kind"], row["step"], row["turn"]) for row in found["moments"]] == [
        ("evaluation", 0, "first right"), ("step", 1, ""), ("step", 2, "first right"), ("evaluation", 2, ""),
        ("step", 3, ""), ("evaluation", 4, "regression"),
    ]  # fmt: skip
    assert [row["text"] for row in found["moments"]][:3] == ["<b>answer</b> 1", "completion 0.0", "completion 1.0"]
    newest = tables.question_values(indexed(run, tmp_path / "cache"), card, "e/0", view(descending=True, limit=2))
    assert [(row["kind"], row["step"]) for row in newest["moments"]] == [("evaluation", 4), ("step", 3)]
    assert newest["view"].total == 6


def test_evaluations_have_the_recorded_interval_and_curves_over_answers(tmp_path: Path) -> None:
    run = known_run(tmp_path / "run")
    live = LiveRun(run)
    live.poll()
    found = tables.evaluations_values(indexed(run, tmp_path / "cache"), Catalog(tmp_path).cards()[0], live)
    (held_out,) = found["sets"]
    assert [(row["step"], row["accuracy"], row["low"], row["high"]) for row in held_out["rows"]] == [
        (0, 0.125, 0.25, 0.75), (2, 0.625, 0.25, 0.75), (4, 0.625, 0.25, 0.75),
    ]  # fmt: skip
    (chart,) = found["answer_curves"]
    assert [(curve["label"], "band" in curve) for curve in chart["curves"]] == [
        ("pass@k, step 4", True), ("maj@k, step 4", True), ("pass@k, step 0", False), ("maj@k, step 0", False),
    ]  # fmt: skip
    expected = [np.mean([pass_at_k(2, 4, k), pass_at_k(3, 4, k)]) for k in (1, 2, 4)]
    assert chart["curves"][0]["x"] == [1, 2, 4]
    assert chart["curves"][0]["y"] == pytest.approx(expected)
    low, high = (end["y"] for end in chart["curves"][0]["band"])
    assert all(one <= value <= other for one, value, other in zip(low, chart["curves"][0]["y"], high, strict=True))


def test_one_answer_per_question_has_no_curves(tmp_path: Path) -> None:
    index = indexed(known_run(tmp_path / "run", {0: ("1", "0")}), tmp_path / "cache")
    rows = index.evaluations()
    assert tables.answers_chart(index, {"name": "", "title": "held out", "rows": rows}) is None
    assert "curves" not in figures(tables.questions(index, 0, ""))


def test_the_only_evaluation_is_drawn_once(tmp_path: Path) -> None:
    index = indexed(known_run(tmp_path / "run", {2: ("10", "00")}), tmp_path / "cache")
    chart = tables.answers_chart(index, {"name": "", "title": "held out", "rows": index.evaluations()})
    assert chart is not None
    assert [curve["label"] for curve in chart["curves"]] == ["pass@k, step 2", "maj@k, step 2"]


def test_an_evaluation_beside_an_earlier_one(tmp_path: Path) -> None:
    index = indexed(known_run(tmp_path / "run", {0: ("1", "0", "0", "1"), 2: ("1", "1", "0", "0")}), tmp_path / "cache")
    found = tables.evaluation_values(index, 2, None, "", "", view(limit=20))
    assert found["counts"] == {"fixed": 1, "broken": 1, "still wrong": 1, "still right": 1, "not in both": 0}
    assert (found["before"], found["steps"]) == (0, [0, 2])
    assert found["test"]["difference"] == 0
    only = tables.evaluation_values(index, 2, 0, "", "broken", view(limit=20))
    assert [row["prompt_id"] for row in only["rows"]] == ["e/3"]
    assert tables.evaluation_values(index, 2, 99, "", "", view(limit=20))["before"] == 0


def opened(connect: Callable[..., TestClient], root: Path, *addresses: str) -> str:
    """The last of several pages, once the tables that they need are read."""
    client = connect(root)
    for key in Catalog(root).paths():
        while not client.get(f"/api/r/{key}/index").json()["ready"]:
            pass
    found = [client.get(f"http://{HOST}{address}") for address in addresses]
    assert [answer.status_code for answer in found] == [200] * len(found)
    return found[-1].text


def test_two_runs_question_by_question(tmp_path: Path, connect: Callable[..., TestClient]) -> None:
    root = tmp_path / "runs"
    known_run(root / "one", {4: ("1", "0", "0")})
    known_run(root / "two", {4: ("0", "1", "0")}, seed=1)
    known_run(root / "three", {2: ("1", "1", "1")}, seed=2)
    keys = {name: run_key(name) for name in ("one", "two", "three")}
    query = "&".join(f"run={key}" for key in keys.values())
    page = opened(connect, root, f"/compare?{query}&first={keys['one']}&second={keys['two']}")
    for words in ("“Fixed” means that two is right where one is wrong", "read 1", "one, after step 4",
                  "&lt;b&gt;answer&lt;/b&gt;", "Seeds of one recipe: one, two, three"):  # fmt: skip
        assert words in page, words
    other = opened(connect, root, f"/compare?{query}&first={keys['three']}&second={keys['one']}")
    assert "“Fixed” means that one is right where three is wrong" in other


def test_runs_without_a_common_set_say_so(tmp_path: Path, connect: Callable[..., TestClient]) -> None:
    root = tmp_path / "runs"
    known_run(root / "one", {4: ("1",)})
    known_run(root / "two", {}, seed=1)
    page = opened(connect, root, f"/compare?run={run_key('one')}&run={run_key('two')}")
    assert "The two runs have no evaluation of the same set." in page


def test_the_page_of_a_group_carries_its_data_as_text(tmp_path: Path, connect: Callable[..., TestClient]) -> None:
    run = make_run(tmp_path / "runs/run")
    write_rollouts(run, rollout_row(text="</script><script>alert(1)</script>", printed='{"right": "</script>"}'))
    page = opened(connect, tmp_path / "runs", f"/r/{run_key('run')}/steps/1/groups/0")
    block = page.partition('<script type="application/json" class="data">')[2].partition("</script>")[0]
    (completion,) = json.loads(block)["completions"]
    assert completion["text"] == "</script><script>alert(1)</script>"
    assert completion["printed"] == {"right": "</script>"}
    assert "<script>alert" not in page
