"""Reading a run folder, as in a notebook."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gruppo
from gruppo.errors import UsageError
from gruppo.runs.notebook import HEIGHT, WIDTH, curve, result_html
from gruppo.runs.results import Result
from gruppo.runs.tables import SCHEMA_VERSION
from tests.small_runs import small_run


@pytest.fixture(scope="module")
def finished(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Result:
    path = tmp_path_factory.mktemp("data") / "test.jsonl"
    path.write_text("".join(json.dumps({"prompt": letter, "answer": "a"}) + "\n" for letter in "abc"))
    changes = {"evaluation__task": str(path), "evaluation__grader": "exact_match", "evaluation__every": 2}
    return small_run(tiny_folder, tmp_path_factory.mktemp("run") / "tiny", **changes)


def test_frame_has_one_row_per_step_with_its_evaluation(finished: Result) -> None:
    frame = finished.frame()
    assert list(frame.index) == [0, 1, 2, 3, 4, 5, 6]
    assert frame.index.name == "step"
    assert "step" not in frame.columns
    for line in finished.metrics:
        for name, value in line.items():
            if name != "step":
                held = frame.loc[line["step"], name]
                assert held == value if value is not None else math.isnan(held)
    assert list(frame["eval/accuracy"].dropna().index) == [0, 2, 4, 6]
    assert math.isnan(frame.loc[0, "reward/mean"])


def test_rollouts_of_one_step_and_of_all(finished: Result) -> None:
    every = finished.rollouts()
    assert len(every) == 6 * 16
    assert list(every["step"].unique()) == [1, 2, 3, 4, 5, 6]
    one = finished.rollouts(3)
    assert one["text"].tolist() == every[every["step"] == 3]["text"].tolist()
    assert one.loc[0, "token_ids"].dtype == "int64"


def test_evaluations_contain_every_answer(finished: Result) -> None:
    every = finished.evaluations()
    assert len(every) == 4 * 3
    accuracy = every.groupby("step")["correct"].mean()
    assert accuracy.to_dict() == finished.frame()["eval/accuracy"].dropna().to_dict()
    assert finished.evaluations(6)["answer"].tolist() == every[every["step"] == 6]["answer"].tolist()


def test_tables_name_the_version_of_their_schema(finished: Result) -> None:
    for table in ("rollouts", "evaluations"):
        schema = pq.read_schema(finished.path / table / "step-000002.parquet")
        assert schema.metadata[b"gruppo_schema"] == str(SCHEMA_VERSION).encode()


@pytest.mark.parametrize(("table", "steps"), [("rollouts", "1, 2, 3, 4, 5, 6"), ("evaluations", "0, 2, 4, 6")])
def test_a_missing_step_is_reported_with_the_existing_ones(finished: Result, table: str, steps: str) -> None:
    with pytest.raises(UsageError, match=f"of step 7; it has those of {steps}"):
        getattr(finished, table)(7)


def test_run_without_evaluations(tiny_folder: str, tmp_path: Path) -> None:
    result = small_run(tiny_folder, tmp_path / "run", run__steps=1)
    with pytest.raises(UsageError, match="it has none yet"):
        result.evaluations()


def test_events(finished: Result, tmp_path: Path, tiny_folder: str) -> None:
    assert list(finished.events().columns) == ["time", "step", "kind", "message"]
    assert len(finished.events()) == 0
    small_run(tiny_folder, tmp_path / "run", run__steps=1)
    again = small_run(tiny_folder, tmp_path / "run", run__steps=1, resume=True)
    assert again.events()["kind"].tolist() == ["resume"]


def test_a_result_read_from_the_folder_is_the_same(finished: Result) -> None:
    for opened in (gruppo.load_result(finished.path), Result.read(str(finished.path))):
        assert opened == finished
    assert opened.load_model().num_parameters() > 0


def test_a_run_in_progress_can_be_read(finished: Result, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text((finished.path / "recipe.toml").read_text())
    lines = (finished.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    result = gruppo.load_result(tmp_path)
    assert len(result.metrics) == 3, "a line that is still being written is left out"
    assert result.summary == {"state": "unfinished"}
    with pytest.raises(UsageError, match="the run is unfinished"):
        result.load_model()


def test_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="contains no run"):
        gruppo.load_result(tmp_path)


class Elements(HTMLParser):
    """The elements of a text, each with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_a_notebook_shows_a_table_with_curves(finished: Result) -> None:
    html = finished._repr_html_()
    frame = finished.frame()
    rewards = frame["reward/mean"].dropna()
    row = html[html.index(">reward<") :]
    assert re.findall(r"<td[^>]*>([^<]+)</td>", row)[:2] == [f"{rewards.iloc[0]:.3f}", f"{rewards.iloc[-1]:.3f}"]
    assert "done after step 6 of 6" in html
    assert {tag for tag, _ in Elements(html).found} == {
        "div", "p", "b", "span", "table", "thead", "tbody", "tr", "th", "td", "svg", "polyline",
    }  # fmt: skip
    labels = [values["aria-label"] for tag, values in Elements(html).found if tag == "svg"]
    assert labels[0] == f"held-out accuracy: {frame['eval/accuracy'][0]:.1%} to {frame['eval/accuracy'][6]:.1%}"


def test_a_notebook_shows_a_foreign_result_as_text(tmp_path: Path) -> None:
    folder = tmp_path / "<script>x"
    metrics: list[dict[str, Any]] = [
        {"step": 1, "reward/mean": "<b>", "policy/kl": 10**400},
        {"step": 2, "loss/total": math.nan},
    ]
    html = result_html(Result(folder, metrics, {"state": "<script>", "steps": []}))
    assert "<script" not in html
    assert "&lt;script&gt;x" in html
    assert "No step is done yet." in html


@pytest.mark.parametrize(
    ("values", "points"),
    [
        ([0.0, 1.0], [f"3.0,{HEIGHT - 3:.1f} {WIDTH - 3:.1f},3.0"]),
        ([5.0, 5.0], [f"3.0,{HEIGHT / 2:.1f} {WIDTH - 3:.1f},{HEIGHT / 2:.1f}"]),
        ([1.0], [f"3.0,{HEIGHT / 2:.1f} 3.0,{HEIGHT / 2:.1f}"]),
        ([0.0, None, 1.0], [f"3.0,{HEIGHT - 3:.1f} 3.0,{HEIGHT - 3:.1f}", f"{WIDTH - 3:.1f},3.0 {WIDTH - 3:.1f},3.0"]),
        ([-1e308, 1e308], [f"3.0,{HEIGHT - 3:.1f} {WIDTH - 3:.1f},3.0"]),
        ([], []),
    ],
)
def test_a_curve_is_drawn_in_its_box(values: list[float | None], points: list[str]) -> None:
    assert re.findall(r'points="([^"]+)"', curve(values, "")) == points


def test_the_token_view_is_a_page_in_a_frame(finished: Result) -> None:
    view = finished.view(2, 1)
    ((tag, values),) = Elements(view._repr_html_()).found
    assert (tag, values["sandbox"]) == ("iframe", "allow-scripts")
    assert values["srcdoc"] == view.html
    rows = [row for row in finished.rollouts(2).to_dict("records") if row["group"] == 1]
    data = json.loads(re.findall(r'<script type="application/json" class="data">(.*?)</script>', view.html)[0])
    assert [one["text"] for one in data["completions"]] == [row["text"] for row in rows]
    elements = Elements(view.html).found
    policy = next(one["content"] for name, one in elements if name == "meta" and "http-equiv" in one)
    scripts = sum(name == "script" and not one for name, one in elements)
    assert str(policy).count("'sha256-") == scripts == 3
    assert not [one for _, one in elements if {"src", "href"} & one.keys()]
    lines = repr(view).splitlines()
    assert lines[0] == "tiny: step 2, group 1"
    assert len(lines) == 2 + len(rows)
    assert lines[2].split()[:4] == [
        "#0",
        f"{rows[0]['reward']:.4f}".rstrip("0").rstrip("."),
        str(len(rows[0]["token_ids"])),
        "tokens",
    ]
    with pytest.raises(UsageError, match="step 2 has no group 9"):
        finished.view(2, 9)


def test_the_token_view_holds_hostile_text_as_text(finished: Result, tmp_path: Path) -> None:
    table = pq.read_table(finished.path / "rollouts/step-000001.parquet")
    attack = "</script><script>alert(1)</script><!--\"'>"
    table = table.set_column(table.schema.get_field_index("text"), "text", pa.array([attack] * len(table)))
    (tmp_path / "rollouts").mkdir()
    pq.write_table(table, tmp_path / "rollouts/step-000001.parquet")
    view = Result(tmp_path, [], {}).view(1)
    assert attack not in view.html
    assert len(Elements(view._repr_html_()).found) == 1
    assert attack in unescape(repr(view))


def test_a_result_writes_a_report(finished: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert finished.report(tmp_path / "report.html", steps=1) == tmp_path / "report.html"
    assert "1 of 6 steps have a page." in (tmp_path / "report.html").read_text(encoding="utf-8")
    (tmp_path / "mine.html").write_text("")
    with pytest.raises(UsageError, match=r"^out = .*mine\.html: exists and is no report.*replace it with force=True"):
        finished.report(tmp_path / "mine.html")


def test_the_view_names_the_missing_extra(finished: Result) -> None:
    code = (
        "import sys; sys.modules['jinja2'] = None\n"
        f"from gruppo.runs.results import Result\nResult.read({str(finished.path)!r}).view(1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'UsageError: jinja2: is not installed; the token view needs: pip install "gruppo[ui]"' in done.stderr
