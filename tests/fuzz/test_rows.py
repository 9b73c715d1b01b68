"""Fuzz rows from files and lists: they become prompts, or the error names the row."""

from __future__ import annotations

import csv
import json
from contextlib import chdir
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from gruppo.config.loading import RecipeError, load_recipe
from gruppo.data.offline import offline_completions
from gruppo.data.tokenization import tokenize_part
from gruppo.data.transform import in_held_out, prompt_text
from gruppo.evaluation.datasets import read_data
from gruppo.utils.progress import NullProgress
from gruppo.utils.text import as_json
from tests.conftest import make_tokenizer
from tests.fuzzing import ANY_TEXT, JSON_VALUES, TEXT, clear, command, examples, said_clearly

MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | JSON_VALUES, "content": JSON_VALUES}
    ),
    max_size=4,
)
CONTENT = TEXT | MESSAGES | JSON_VALUES
NAMES = ["prompt", "answer", "completion", "chosen", "rejected", "messages", "question", "solution"]
ROWS = st.lists(st.dictionaries(st.sampled_from(NAMES) | ANY_TEXT, CONTENT, max_size=4) | JSON_VALUES, max_size=4)
_GOOD = st.fixed_dictionaries({"prompt": TEXT.filter(bool) | MESSAGES}, optional=dict.fromkeys(NAMES[1:], CONTENT))
GOOD = st.lists(_GOOD, min_size=1, max_size=4)
TASKS = st.fixed_dictionaries({}, optional={
    "columns": st.dictionaries(st.sampled_from(NAMES) | TEXT, st.sampled_from(NAMES) | TEXT, max_size=2),
    "template": TEXT | st.sampled_from(["{question} now", "{prompt}", "{answer}{{x}}"]),
    "system": TEXT,
    "completion": TEXT | st.just("{answer}"),
    "held_out": st.sampled_from([0.1, 0.5, 0.9]),
    "max_prompt_tokens": st.integers(1, 9),
    "overlong": st.just("filter"),
})  # fmt: skip
REWARDS = st.sampled_from([["last_number"], ["exact_match"], ["reasoning_gym"], ["math_verify", "think_format"]])
TOKENIZER = make_tokenizer()


def prepare(rows: Any, task: dict[str, Any], method: str, rewards: list[str]) -> None:
    """Turn rows into tokenized prompts as a run does."""
    table = {"reward": {"functions": rewards}} if method == "grpo" else {}
    try:
        recipe = load_recipe({
            "model": {"name": "m"}, "task": task, "method": {"name": method, "kl_coef": 0.0},
            "evaluation": {"grader": "exact_match"} if task.get("held_out") else None, **table,
        })  # fmt: skip
    except RecipeError:
        return  # invalid recipes are covered by tests/fuzz/test_recipes.py
    data = read_data(recipe, recipe.reward.functions, rows, NullProgress())
    for part in data.training:
        prompts, _ = tokenize_part(part, TOKENIZER, 128, 8, 48)
        for prompt in prompts:
            assert prompt.token_ids
            as_json(dict(prompt.columns)).encode()
            prompt.text.encode()
            if method != "grpo":
                offline_completions(prompt, TOKENIZER, method == "dpo")


@examples(250, rows=ROWS | GOOD, task=TASKS, method=st.sampled_from(["grpo", "sft", "dpo"]), rewards=REWARDS)
def test_any_list_of_rows(rows: list, task: dict, method: str, rewards: list[str]) -> None:
    with clear():
        prepare(rows, task, method, rewards)


@examples(60, rows=JSON_VALUES | st.binary() | st.sets(st.integers()) | st.just(object()) | st.just({"prompt": ["a"]}))
def test_other_objects_in_place_of_a_list(rows: Any) -> None:
    with clear():
        prepare(rows, {}, "grpo", ["last_number"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


FILES = [".jsonl", ".json", ".csv", ".tsv"]


def written(rows: list, suffix: str) -> bytes:
    if suffix == ".json":
        return json.dumps(rows).encode()
    if suffix == ".jsonl":
        return "\n".join(json.dumps(row) for row in rows).encode()
    import io

    stream = io.StringIO()
    tables = [row for row in rows if isinstance(row, dict)]
    names = list(dict.fromkeys(name for row in tables for name in row))
    writer = csv.writer(stream, delimiter="\t" if suffix == ".tsv" else ",")
    writer.writerow(names)
    writer.writerows([row.get(name, "") for name in names] for row in tables)
    return stream.getvalue().encode("utf-8", "replace")


@examples(
    150,
    rows=ROWS | GOOD,
    suffix=st.sampled_from(FILES),
    task=TASKS,
    cut=st.none() | st.integers(0, 200),
    noise=st.binary(max_size=3),
)
def test_damaged_text_files(folder: Path, rows: list, suffix: str, task: dict, cut: int | None, noise: bytes) -> None:
    path = folder / f"rows{suffix}"
    content = written(rows, suffix)
    path.write_bytes(content if cut is None else content[:cut] + noise + content[cut:])
    with clear():
        prepare(None, {**task, "name": str(path)}, "grpo", ["last_number"])


@examples(60, rows=ROWS | GOOD, cut=st.none() | st.integers(0, 400), noise=st.binary(max_size=3))
def test_damaged_parquet_files(folder: Path, rows: list, cut: int | None, noise: bytes) -> None:
    path = folder / "rows.parquet"
    try:
        pq.write_table(pa.Table.from_pylist([row for row in rows if isinstance(row, dict)]), path)
    except (pa.ArrowException, UnicodeError, OverflowError, TypeError, ValueError):
        return  # not representable as a table
    if cut is not None:
        content = path.read_bytes()
        path.write_bytes(content[:cut] + noise + content[cut:])
    with clear():
        prepare(None, {"name": str(path)}, "grpo", ["last_number"])


@examples(80, content=st.binary(max_size=80), suffix=st.sampled_from([*FILES, ".parquet", ".txt", ""]))
def test_any_bytes_as_a_file(folder: Path, content: bytes, suffix: str) -> None:
    path = folder / f"bytes{suffix}"
    path.write_bytes(content)
    with clear():
        prepare(None, {"name": str(path)}, "grpo", ["last_number"])


ENDINGS = st.sampled_from([":f", ".jsonl", "/x", ".py:f", ".parquet"])


@examples(
    80,
    name=ANY_TEXT | st.tuples(ANY_TEXT, ENDINGS).map("".join),
    split=st.none() | TEXT,
    options=st.dictionaries(TEXT, JSON_VALUES, max_size=2),
)
def test_any_task_name_split_and_options(folder: Path, name: str, split: str | None, options: dict) -> None:
    task = {"name": name, "options": options, **({} if split is None else {"split": split})}
    with clear(), chdir(folder):
        prepare(None, task, "grpo", ["last_number"])


@examples(60, row=st.fixed_dictionaries({"prompt": CONTENT}), share=st.floats(0, 1))
def test_held_out_split_accepts_any_row(row: dict, share: float) -> None:
    assert in_held_out(prompt_text(row), share) in (True, False)


@examples(10, rows=ROWS | GOOD)
def test_any_rows_on_the_command_line(folder: Path, tiny_folder: str, rows: list) -> None:
    path = folder / "rows.jsonl"
    path.write_bytes(written(rows, ".jsonl"))
    code, _, err = command("eval", tiny_folder, "--task", str(path), "--max-tokens", "2", "--device", "cpu", "--dtype",
                           "float32", "--grader", "exact_match")  # fmt: skip
    said_clearly(code, err)
