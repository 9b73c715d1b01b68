"""Run folders whose texts attack the page that shows them, and damaged ones; written by hand, without a model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w

from gruppo.runs.tables import EVALUATIONS, ROLLOUTS, versioned
from tests.small_runs import recipe

MARK = "pwned"  # in every attack
ATTACKS = (
    "<script>window.pwned=1</script>",
    "</script><script>window.pwned=1</script>",
    "</textarea></title></style></noscript><script>window.pwned=1</script>",
    '"><img src=x onerror="window.pwned=1">',
    "' onmouseover='window.pwned=1' autofocus onfocus='window.pwned=1",
    "<svg/onload=window.pwned=1><iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "javascript:window.pwned=1",
    "[link](javascript:window.pwned=1) ![image](http://evil.example/pwned.png) <http://evil.example/pwned>",
    "[1]: http://evil.example/pwned\n\n![image][1]\n\n<details open ontoggle=window.pwned=1>",
    "$\\href{javascript:window.pwned=1}{x}$ \\(\\unicode{<script>window.pwned=1</script>}\\) $$\\style{url(//x)}{x}$$",
    '<math><mtext></table></mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror=window.pwned=1&gt;">',
    "<base href=//evil.example/><link rel=stylesheet href=//evil.example/pwned><meta http-equiv=refresh content=0;//x>",
    "<form action=//evil.example/pwned><button>go</button></form><a href=//evil.example/pwned>here</a>",
    "{{7*7}}{% include 'pwned' %}{# pwned #}${7*7}<%= 7*7 %>{0.__class__}%(pwned)s%n",
    "<!-- pwned --!><![CDATA[ pwned ]]><?pwned ?>",
    "line\u2028pwned\u2029paragraph\u0085next",
    "right\u202epwned\u2066left\u200b\u200f\ufeff\u061c",
    "nul\x00pwned\x07bell\x1b[31mred\x1b]0;title\x07\x9b31m",
    "../../../../etc/passwd%2e%2e%2fpwned\\..\\..\\pwned",
    "'; DROP TABLE groups; -- pwned\" OR 1=1 $(touch pwned) `touch pwned`",
    "&lt;script&gt;pwned&lt;/script&gt;&#60;script&#62;&quot;",
    "<tool_call>pwned</tool_call><|im_end|>[INST]<think>pwned",
    "pwned " + "x" * 700 + " " + "界🙂" * 100,
)
SURROGATE = "\ud83d lone \udc00 pwned"  # only JSON can hold it
NAMES = (  # of run folders
    "<img src=x onerror=window.pwned=1>",
    "'\"><script>window.pwned=1<",
    "-o pwned; touch pwned $(touch pwned) `pwned`",
    "pwned..%2e%2e%2f..\\..",
    "right\u202epwned\nline\x1b[31m",
    "{{7*7}}pwned",
)


def harmless(count: int = len(ATTACKS)) -> list[str]:
    """As many texts as there are attacks, which attack nothing."""
    return [f"text {number}" for number in range(count)]


def lines_of(objects: Sequence[Mapping[str, Any]]) -> str:
    """JSON Lines."""
    return "".join(json.dumps(entry) + "\n" for entry in objects)


def write_run(
    folder: Path, texts: Sequence[str] = ATTACKS, lone: str = SURROGATE, rows: Sequence[str] | None = None
) -> Path:
    """A finished run of two steps with these texts wherever a run has text. `lone`: a text for JSON alone; `rows`: the
    texts of the tables, by default all."""
    folder.mkdir(parents=True)
    first, name, rows = texts[0], texts[3], texts if rows is None else rows
    data = recipe(
        first, run__steps=2, task__name=texts[1], evaluation__task=texts[4], evaluation__grader="exact_match",
        reward__functions=[f"tests/rewards/functions.py:{text}" for text in texts],
    )  # fmt: skip
    (folder / "recipe.toml").write_text(tomli_w.dumps(data), encoding="utf-8")
    (folder / "environment.json").write_text(
        json.dumps(
            {
                "platform": first,
                "processor": lone,
                "cores": texts[2],
                "packages": dict.fromkeys(texts, lone),
                "git_revision": texts[5],
                "chosen": {texts[6]: texts[7], lone: lone},
            }
        )
    )
    metrics = [
        {"step": step, "completion/length": 4.0, "reward/mean": 0.5, "time/step": 1.0, "eval/accuracy": 0.5,
         **{f"reward/{text}/mean": 0.25 for text in (*texts, lone)},
         **{f"eval/{text}/accuracy": 0.5 for text in texts}, **dict.fromkeys(texts, 1.0)}
        for step in (1, 2)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text(lines_of(metrics))
    events = [{"step": 1, "time": text, "kind": text, "message": text, "state": text} for text in (*texts, lone)]
    events += [{"step": 2, "kind": "warning", "warning": text, "message": text} for text in (*texts, lone, name)]
    (folder / "events.jsonl").write_text(lines_of(events))
    (folder / "summary.json").write_text(
        json.dumps({"state": name, "steps": 2, "benchmarks": {text: {"domain": text} for text in texts}})
    )
    status = {"state": name, "phase": name, "unit": name, "step": 2, "steps": 2, "heartbeat": name}
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "rewards.log").write_text("\n".join(texts), encoding="utf-8")
    write_table(folder / "rollouts/step-000001.parquet", ROLLOUTS, rollouts(1, rows, lone))
    write_table(folder / "rollouts/step-000002.parquet", ROLLOUTS, rollouts(2, rows, lone))
    write_table(folder / "evaluations/step-000000.parquet", EVALUATIONS, evaluation(rows, lone, False))
    write_table(folder / "evaluations/step-000002.parquet", EVALUATIONS, evaluation(rows, lone, True))
    return folder


def write_table(path: Path, schema: pa.Schema, rows: list[dict[str, Any]]) -> None:
    """A table of a run with these rows; what a row lacks is null."""
    path.parent.mkdir(exist_ok=True)
    full = [{name: row.get(name) for name in schema.names} for row in rows]
    pq.write_table(pa.Table.from_pylist(full, versioned(schema)), path)


def rollouts(step: int, texts: Sequence[str], lone: str) -> list[dict[str, Any]]:
    """Rows of a step: in group g the g-th text is everywhere; in the first group every text is a completion."""
    rows = []
    for group, text in enumerate(texts):
        for completion, answer in enumerate(texts if group == 0 else [text, text]):
            parts = {text: 0.5, lone: None, "odd": float("nan")}
            prompt = text if group % 2 else json.dumps([{"role": text, "content": text, "name": lone}])
            rows.append(
                {"step": step, "group": group, "completion": completion, "prompt_id": text, "prompt": prompt,
                 "columns": json.dumps({text: text, "lone": lone}), "text": answer, "finish_reason": text,
                 "policy_version": step - 1, "reward": completion / 2, "reward_parts": json.dumps(parts),
                 "steps": json.dumps({text: {"rewards": [1.0], "ends": [1]}}), "failure": text,
                 "extra": json.dumps({text: [text, lone]}), "printed": json.dumps({text: text, lone: lone}),
                 "episode": json.dumps({text: text, lone: lone}), "trained": True, "skipped": text,
                 **tokens(answer), "prompt_token_ids": [1, 2], "prompt_token_texts": [text, ""]}
            )  # fmt: skip
    return rows


def evaluation(texts: Sequence[str], lone: str, right: bool) -> list[dict[str, Any]]:
    """Rows of an evaluation of sets with these names: all texts as questions of the first, one of every other set."""
    asked = [(texts[0], text) for text in texts] + [(text, text) for text in texts[1:]]
    return [
        {"eval_set": name, "prompt_id": text, "sample": sample, "question": text, "answer": text, "correct": right,
         "columns": json.dumps({"answer": text}), "extracted": text, "rule": text, "vote": text, "finish_reason": text,
         "other_rules": json.dumps({lone: text}), "episode": json.dumps({text: lone}), **tokens(text, "logprobs")}
        for name, text in asked
        for sample in (0, 1)
    ]  # fmt: skip


def tokens(text: str, logprobs: str = "sampling_logprobs") -> dict[str, Any]:
    """Columns of three tokens whose texts are those of the completion, and numbers that JSON does not have."""
    odd = [-0.5, float("nan"), float("-inf")]
    return {
        "token_ids": [1, 2, 3], "token_texts": [text, "\u202e", ""], "mask": [True, False, True], logprobs: odd,
        "advantages": [0.5, None, float("inf")],
    }  # fmt: skip


def write_damaged(root: Path) -> dict[str, Path]:
    """Folders of runs that are damaged, each in another way, by name. Their tables are small: most are not damaged, and
    every text in them is a group, a question and a set of an evaluation."""
    made = {}

    def run(name: str) -> Path:
        made[name] = write_run(root / name, harmless(8), "words", harmless(2))
        return made[name]

    for kind, content in {"bytes": b"\x00\xff{[" * 50 + b"\n", "empty": b"", "deep": b"[" * 100_000 + b"\n"}.items():
        (run(f"{kind}-recipe") / "recipe.toml").write_bytes(b"a = " * (kind == "deep") + content)
        files = run(f"{kind}-files")
        for name in FILES:
            (files / name).write_bytes(content)
    missing = run("missing-files")
    for name in FILES:
        (missing / name).unlink()
    (run("odd-recipe") / "recipe.toml").write_text(
        'run = 1\nmethod = []\ntask = [1]\nmixture = [1, {name = 3}]\nreward = "x"\n'
    )
    (run("dates-in-recipe") / "recipe.toml").write_text("[run]\nname = 1979-05-27\nsteps = inf\n[model]\nname = nan\n")
    odd: tuple[Any, ...] = ([], {}, 1, None, True, "x", 1e308, float("nan"), 10**400)
    (run("odd-events") / "events.jsonl").write_text(
        lines_of([{"kind": one, "message": one, "step": one, "warning": one, "state": one, "time": one} for one in odd])
        + lines_of([{"kind": "warning", "warning": one, "step": one, "message": one} for one in odd])
    )
    (run("odd-metrics") / "metrics.jsonl").write_text(
        lines_of([{"step": one, "completion/length": 1.0} for one in odd])
        + lines_of([{"step": n, **dict.fromkeys(NUMBERS, one)} for n, one in enumerate(odd)])
        + lines_of([{"step": n, **dict.fromkeys(NUMBERS, 1e308)} for n in range(10, 13)])
    )
    for number, value in enumerate(odd):
        values = dict.fromkeys(("state", "steps", "benchmarks", "packages", "chosen", "memory_bytes", "cores"), value)
        status = dict.fromkeys(("state", "phase", "done", "total", "unit", "steps", "heartbeat", "truncated_to"), value)
        for name, changed in (("odd", {"state": "running"}), ("odd-state", {"heartbeat": "2026-01-01"})):
            folder = run(f"{name}-{number}")
            (folder / "status.json").write_text(json.dumps({**status, "step": 1, **changed}))
            (folder / "summary.json").write_text(json.dumps(values))
            (folder / "environment.json").write_text(json.dumps(values))
    half = run("half-written")
    for path in (
        half / "metrics.jsonl",
        half / "rollouts/step-000002.parquet",
        half / "evaluations/step-000002.parquet",
    ):
        os.truncate(path, path.stat().st_size * 2 // 3)
    write_table(run("no-rows") / "rollouts/step-000002.parquet", ROLLOUTS, [])
    write_table(made["no-rows"] / "evaluations/step-000002.parquet", EVALUATIONS, [])
    nulls = [{"group": 0, "completion": 0, "prompt_id": "a"}, {"group": 0, "completion": 1, "prompt_id": "a"}]
    write_table(run("nulls") / "rollouts/step-000002.parquet", ROLLOUTS, nulls)
    write_table(made["nulls"] / "evaluations/step-000002.parquet", EVALUATIONS, [{"eval_set": "", "prompt_id": "a"}])
    foreign = pa.table({"group": ["a"], "completion": [[1]], "x": [None]})
    pq.write_table(foreign, run("foreign-tables") / "rollouts/step-000002.parquet")
    pq.write_table(foreign, made["foreign-tables"] / "evaluations/step-000002.parquet")
    _not_utf8(run("not-utf-8"))
    only = root / "only-a-recipe"
    only.mkdir()
    (only / "recipe.toml").write_text("")
    made["only-a-recipe"] = only
    return made


FILES = ("metrics.jsonl", "events.jsonl", "summary.json", "status.json", "environment.json")
NUMBERS = (
    "completion/length", "reward/mean", "time/step", "time/generate", "time/tokens_per_second", "time/evaluate",
    "eval/accuracy", "eval/accuracy_low", "eval/accuracy_high", "groups/nonzero_advantage", "completion/truncated",
)  # fmt: skip


def _not_utf8(run: Path) -> None:
    """Make every text of both tables bytes that are no UTF-8, which a Parquet file can hold."""
    for path, schema in (
        (run / "rollouts/step-000002.parquet", ROLLOUTS),
        (run / "evaluations/step-000002.parquet", EVALUATIONS),
    ):
        table = pq.read_table(path)
        for place, field in enumerate(schema):
            if pa.types.is_string(field.type) and field.name not in ("eval_set",):
                values = pa.array([b"\xff\xfe pwned"] * len(table), pa.binary())
                table = table.set_column(place, field, values.view(pa.string()))
        pq.write_table(table.replace_schema_metadata(versioned(schema).metadata), path)
