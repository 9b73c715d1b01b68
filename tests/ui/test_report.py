"""`gruppo report`: one file with the pages of runs, which tells nothing of the machine and runs no foreign script."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gruppo.errors import UsageError
from gruppo.runs.results import load_result
from gruppo.ui.private import Private, every_text
from gruppo.ui.report import SCRIPTS, write_report
from gruppo.ui.sampling import Limits, by_weight, spread
from tests.fuzzing import command
from tests.small_runs import small_run

ATTACK = "</script ><script>alert(1)</script><!--<img src=x onerror=alert(2)>{{7*7}}\u2028\u202e\x00"


class Document(HTMLParser):
    """The elements of a report, and the pages that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.blocks: list[Any] = []
        self.pages: list[str] = []
        self.policy = ""
        self.links: set[str] = set()
        self.attributes: set[str] = set()
        self.tags: set[str] = set()
        self.words: list[str] = []
        self._script: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        self.attributes |= values.keys()
        self._script = (values.get("type") or "") if tag == "script" else None
        if tag == "template":
            self.pages.append(str(values["data-page"]))
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(values["content"])
        self.links |= {str(values[name]) for name in ("href", "src", "action") if values.get(name)}

    def handle_endtag(self, tag: str) -> None:
        self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is None:
            self.words.append(data)
        elif self._script == "application/json":
            self.blocks.append(json.loads(data))
        else:
            self.scripts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def run(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "test.jsonl"
    path.write_text("".join(json.dumps({"prompt": letter, "answer": "a"}) + "\n" for letter in "abc"))
    changes = {"evaluation__task": str(path), "evaluation__grader": "exact_match", "evaluation__every": 2}
    return small_run(tiny_folder, tmp_path_factory.mktemp("runs") / "tiny", run__steps=5, **changes).path


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints", "model", "base")))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def written(runs: list[Path], out: Path, **limits: Any) -> Document:
    write_report(runs, out, Limits(**limits), force=True)
    return Document(out.read_text(encoding="utf-8"))


@pytest.fixture
def report(run: Path, tmp_path: Path) -> Document:
    return written([run], tmp_path / "report.html")


def test_every_page_is_in_the_file_and_every_link_leads_to_one(report: Document) -> None:
    front = next(page for page in report.pages if page.count("/") == 2)
    for part in (
        "",
        "/steps",
        "/steps/1",
        "/steps/5/groups/3",
        "/questions",
        "/evaluations",
        "/evaluations/4",
        "/recipe",
    ):
        assert front + part in report.pages
    assert sum("/questions/" in page for page in report.pages) == 3 + len("abcdef") * 3
    assert sum("/answers/" in page for page in report.pages) == 2 * 3, "of the first and the last evaluation"
    assert len(set(report.pages)) == len(report.pages)
    inside = {link[1:] for link in report.links if link.startswith("#")} - {"main"}
    assert inside <= set(report.pages)
    assert {link for link in report.links if not link.startswith(("#", "data:image/svg+xml;base64,"))} == set()


def test_the_policy_allows_the_scripts_of_the_package_only(report: Document) -> None:
    assert len(report.scripts) == len(SCRIPTS)
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in report.scripts]
    policy = dict(part.split(" ", 1) for part in report.policy.split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"].split() == [f"'sha256-{found}'" for found in hashes]
    assert policy.keys() == {"default-src", "script-src", "style-src", "img-src", "base-uri", "form-action"}


def test_the_curves_of_every_axis_are_in_the_file(run: Path, report: Document) -> None:
    (charts,) = (block for block in report.blocks if "charts" in block)
    assert charts["axis"] == "step"
    assert charts["others"].keys() == {"tokens", "time"}
    rewards = [chart["curves"][0] for one in (charts, charts["others"]["tokens"]) for chart in one["charts"][:1]]
    assert rewards[0]["x"] == [1, 2, 3, 4, 5]
    values = [line["reward/mean"] for line in load_result(run).metrics if "reward/mean" in line]
    assert rewards[0]["y"] == rewards[1]["y"] == [float(f"{value:.6g}") for value in values]
    assert rewards[1]["x"] != rewards[0]["x"]


def test_a_group_has_its_tokens(run: Path, report: Document) -> None:
    (found,) = (block for block in report.blocks if (block.get("step"), block.get("group")) == (2, 1))
    rows = [row for row in pq.read_table(run / "rollouts/step-000002.parquet").to_pylist() if row["group"] == 1]
    assert [one["token_ids"] for one in found["completions"]] == [row["token_ids"] for row in rows]
    assert found["commands"][0]["command"].startswith("gruppo rerun-reward tiny --step 2 --group 1 ")


def test_the_same_folder_gives_the_same_bytes(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report([run], tmp_path / "one.html")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write_report([run], Path("two.html"), cache=tmp_path / "other")
    assert (tmp_path / "one.html").read_bytes() == Path("two.html").read_bytes()


def test_no_folder_of_the_machine_is_told(
    copy: Path, tiny_folder: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path_factory.mktemp("users") / "carol-private"
    monkeypatch.setenv("HOME", str(home))
    events = [
        {"time": "", "step": 2, "kind": "note", "message": f"read {home}/secret/rows.jsonl and /srv/data/more.jsonl"},
        {"time": "", "step": 2, "kind": "note", "message": f"in {copy}/failures"},
    ]
    (copy / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    change(copy, 3, printed=json.dumps({"likes_letters": f'File "{home}/rewards.py", line 3\n/opt/lab/x.py'}))
    (copy / "rollouts/step-000004.parquet").write_bytes(b"no table")
    document = written([copy], copy.parent / "report.html")
    text = (copy.parent / "report.html").read_text(encoding="utf-8")
    base = str(tmp_path_factory.getbasetemp())
    for secret in (base, str(copy), tiny_folder, "carol-private", "/srv/", "/opt/lab"):
        assert secret not in text, secret
    assert "…/more.jsonl" in document.text
    assert "in copy/failures" in document.text
    printed = next(block for block in document.blocks if block.get("step") == 3)["completions"][0]["printed"]
    assert printed == {"likes_letters": 'File "…/rewards.py", line 3\n…/x.py'}


def change(run: Path, step: int, folder: str = "rollouts", **values: Any) -> None:
    """Give all rows of a table these values."""
    path = run / folder / f"step-{step:06d}.parquet"
    table = pq.read_table(path)
    for name, value in values.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(
            place, table.schema.field(name), pa.array([value] * len(table), table.schema.types[place])
        )
    pq.write_table(table, path)


def test_hostile_texts_stay_texts(copy: Path, tmp_path: Path) -> None:
    recipe = (copy / "recipe.toml").read_text()
    (copy / "recipe.toml").write_text(recipe.replace('name = "tiny"', f"name = {json.dumps(ATTACK[:-1])}"))
    event = {"time": ATTACK, "step": 2, "kind": ATTACK, "message": ATTACK, "warning": ATTACK}
    (copy / "events.jsonl").write_text(json.dumps(event) + "\n")
    change(copy, 2, text=ATTACK, prompt=ATTACK, prompt_id=ATTACK, printed=json.dumps({ATTACK: ATTACK}), failure=ATTACK)
    change(copy, 0, "evaluations", answer=ATTACK, question=ATTACK, prompt_id=ATTACK, extracted=ATTACK)
    change(copy, 5, "evaluations", answer=ATTACK, question=ATTACK, prompt_id=ATTACK)
    document = written([copy], tmp_path / "report.html")
    assert len(document.scripts) == len(SCRIPTS)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    blocks = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL)
    assert len(blocks) == len(document.blocks)
    assert not [block for block in blocks if "<" in block], "nothing that a browser could take for the end of the block"
    assert "img" not in document.tags
    assert not {name for name in document.attributes if name.startswith("on") or not name.replace("-", "").isalpha()}
    group = next(block for block in document.blocks if block.get("step") == 2)
    assert group["completions"][0]["text"] == ATTACK
    assert "<script>alert(1)</script>" in document.text
    assert "49" not in document.text.split("alert(2)>")[1][:3]


def test_a_large_run_is_sampled_down_and_says_so(run: Path, tmp_path: Path) -> None:
    document = written([run], tmp_path / "few.html", steps=2, groups=1, questions=4)
    steps = [page.rpartition("/")[2] for page in document.pages if page.rpartition("/")[0].endswith("/steps")]
    assert steps == ["1", "5"]
    assert sum("/groups/" in page for page in document.pages) == 2
    assert sum("/questions/" in page for page in document.pages) == 4
    assert "2 of 5 steps have a page. 2 of 20 groups can be read token by token." in document.text
    assert "4 of 21 questions are shown." in document.text
    assert "at most 2 have a page: the last, the first" in document.text
    none = written([run], tmp_path / "none.html", megabytes=1e-6)
    assert not any("/groups/" in page or "/answers/" in page for page in none.pages)
    assert "0 of 20 groups can be read token by token." in none.text


def test_several_runs_are_compared(run: Path, copy: Path, tmp_path: Path) -> None:
    document = written([run, copy, run], tmp_path / "report.html")
    assert document.pages[0] == "/compare"
    assert sum(page.count("/") == 2 for page in document.pages) == 2, "a run that is named twice is in it once"
    assert "Comparing 2 runs" in document.text
    assert "Question by question The last evaluations of " in document.text
    inside = {link[1:] for link in document.links if link.startswith("#")} - {"main"}
    assert inside <= set(document.pages)
    twins = [Path(shutil.copytree(copy, tmp_path / place / "run")) for place in ("a", "b")]
    assert "a/run" in written(twins, tmp_path / "twins.html").text


def test_damaged_and_unfinished_runs(copy: Path, tmp_path: Path) -> None:
    (copy / "summary.json").unlink()
    status = json.loads((copy / "status.json").read_text())
    beat = "2026-01-02T03:04:05.000+00:00"
    (copy / "status.json").write_text(json.dumps({**status, "state": "running", "heartbeat": beat}))
    with (copy / "metrics.jsonl").open("a") as stream:
        stream.write("[1, 2]\nnonsense\n")
    (copy / "rollouts/step-000002.parquet").write_bytes(b"PAR1 no table")
    document = written([copy], tmp_path / "one.html")
    assert f"no sign of life, at step 5; last sign of life {beat}" in document.text
    assert "rollouts/step-000002.parquet" in document.text
    assert "2 lines of metrics.jsonl and events.jsonl are damaged" in document.text
    write_report([copy], tmp_path / "two.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    (copy / "recipe.toml").write_text("not a recipe")
    for path in copy.glob("*/step-*.parquet"):
        path.unlink()
    (copy / "metrics.jsonl").unlink()
    assert "No step has recorded completions yet." in written([copy], tmp_path / "empty.html").text


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "notes.html").write_text("<p>mine</p>")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: is not a folder; give a run folder"),
        (["{files}/empty"], "contains no run; give a run folder"),
        (["{run}", "-o", "{files}"], "is a folder or a device; name a file"),
        (["{run}", "-o", "{files}/pipe", "--force"], "is a folder or a device; name a file"),
        (["{run}", "-o", "{files}/no/report.html"], "there is no folder"),
        (["{run}", "-o", "{run}/report.html"], "inside of a run folder"),
        (
            ["{run}", "-o", "{files}/notes.html"],
            "exists and is no report; name another file, or replace it with --force",
        ),
        (["{run}", "--steps", "0"], "--steps 0: must be 1 or more"),
        (["{run}", "--megabytes", "0"], "--megabytes 0: must be more than 0"),
    ],
)
def test_what_cannot_be_done_is_said(run: Path, files: Path, arguments: list[str], message: str) -> None:
    code, out, err = command("report", *(part.format(run=run, files=files) for part in arguments))
    assert code == 2
    assert message in err
    assert out == ""
    assert (files / "notes.html").read_text() == "<p>mine</p>"


def test_the_command_line(run: Path, files: Path) -> None:
    out = files / "notes.html"
    code, said, _ = command("report", str(run), "-o", str(out), "--force", "--steps", "3")
    assert code == 0
    assert said.startswith(f"{out}: ")
    assert "3 of 5 steps have a page." in Document(out.read_text(encoding="utf-8")).text
    assert command("report", str(run), "-o", str(out))[0] == 0, "a report is replaced by a report"
    assert not list(files.glob("*.writing"))


def test_links_out_of_the_folder_are_refused(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (copy / "rewards.log").unlink(missing_ok=True)
    (copy / "rewards.log").symlink_to(tmp_path / "secret")
    with pytest.raises(UsageError, match="link that leads out of the folder"):
        write_report([copy], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_run_folder_is_not_changed(copy: Path, tmp_path: Path) -> None:
    def state() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in copy.rglob("*") if path.is_file()}

    before = state()
    write_report([copy], tmp_path / "report.html")
    assert state() == before


@pytest.mark.parametrize(
    ("count", "most", "kept", "places"),
    [
        (3, 5, [], [0, 1, 2]),
        (0, 5, [], []),
        (11, 3, [], [0, 5, 10]),
        (11, 4, [7], [0, 3, 7, 10]),
        (11, 2, [7], [0, 10]),
        (11, 1, [7], [10]),
        (101, 6, [0, 100], [0, 20, 40, 60, 80, 100]),
    ],
)
def test_places_are_spread_evenly(count: int, most: int, kept: list[int], places: list[int]) -> None:
    assert spread(count, most, kept) == places


def test_what_is_wanted_first() -> None:
    assert by_weight([0, 2, 4, 6, 8], [8, 0, 2, 8]) == [8, 0, 2, 4, 6]
    assert by_weight([0, 4, 8], []) == [0, 8, 4]
    assert by_weight([], [1]) == []


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("/runs/one/rollouts/x.parquet: damaged", "one/rollouts/x.parquet: damaged"),
        ("/runs/one-more/x", "…/x"),
        ("see https://example.org/a/b and ~/a/b", "see https://example.org/a/b and ~/a/b"),
        ("3/4/5, and/or, a /b", "3/4/5, and/or, a /b"),
        ('model "/data/models/qwen/"', 'model "…/qwen"'),
        ("/home/bob/x.py:f", "…/x.py:f"),
    ],
)
def test_paths_are_shortened(text: str, short: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/bob")
    private = Private({Path("/runs/one"): "one"})
    assert private.paths(text) == short
    assert private.folders("/home/bob/x /data/y/z") == "~/x /data/y/z"


def test_texts_are_changed_wherever_they_are() -> None:
    assert every_text({"a": ["x", ("y", 1, None)]}, str.upper) == {"a": ["X", ("Y", 1, None)]}
    assert every_text(Limits(), str.upper) == Limits()
