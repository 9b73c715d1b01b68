"""The command line as a user meets it: help, exit codes, one clear line for each mistake."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tomli_w

from gruppo.config.loading import load_recipe
from tests.fuzzing import command
from tests.small_runs import ROWS, recipe

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def gruppo(*arguments: object) -> subprocess.CompletedProcess:
    """Run the command line in this process, which saves seconds for importing torch."""
    return subprocess.CompletedProcess(arguments, *command(*map(str, arguments)))


def gruppo_process(*arguments: object) -> subprocess.CompletedProcess:
    """Run the command line as a user does."""
    line = [sys.executable, "-m", "gruppo.cli.main", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)


@pytest.fixture
def recipe_file(tiny_folder: str, tmp_path: Path) -> Path:
    data = recipe(tiny_folder, evaluation__task=str(tmp_path / "rows.jsonl"), evaluation__questions=4,
                  evaluation__grader="exact_match")  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data["task"] = {"name": str(tmp_path / "rows.jsonl")}
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(data))
    return path


def test_help_explains_every_option() -> None:
    for name, options in {
        (): ["train", "check", "eval", "sample", "export", "rerun-reward", "rescore", "reproduce", "schema",
             "--version"],
        ("train",): ["--set", "--out", "--resume", "--show"],
        ("check",): ["--set", "--json", "--quick", "--seconds"],
        ("eval",): ["--recipe", "--task", "--questions", "--samples", "--max-tokens", "--grader", "--device", "--dtype",
                    "--option", "--set", "--out"],
        ("sample",): ["--prompt", "--count", "--temperature", "--top-k", "--top-p", "--min-p", "--max-tokens",
                      "--min-tokens", "--stop", "--seed", "--plain", "--json"],
        ("rescore",): ["--reward", "--set", "--against", "--steps", "--limit", "--out", "--json"],
        ("export",): ["--to", "--checkpoint", "--dtype", "--max-shard-size"],
        ("schema",): ["--markdown"],
    }.items():  # fmt: skip
        shown = gruppo(*name, "--help")
        assert shown.returncode == 0
        for option in options:
            line = next(line for line in shown.stdout.splitlines() if option in line)
            assert len(line.split()) > 2, f"{option} is not explained"


def test_version() -> None:
    assert gruppo("--version").stdout.startswith("gruppo 0.")


def test_show_prints_the_whole_recipe_and_does_nothing(tmp_path: Path) -> None:
    recipe = Path("gruppo/recipes/quickstart.toml")
    shown = gruppo("train", recipe, "--show", "--set", "run.steps=3", "--out", tmp_path / "run")
    assert shown.returncode == 0, shown.stderr
    read = load_recipe(tomllib.loads(shown.stdout))
    assert read == load_recipe(recipe, ["run.steps=3"])
    assert list(tmp_path.iterdir()) == []


def test_schema_is_the_committed_one() -> None:
    assert gruppo("schema").stdout == Path("gruppo/recipes/schema.json").read_text()
    assert gruppo("schema", "--markdown").stdout == Path("docs/recipe.md").read_text()


def test_train_eval_and_sample(recipe_file: Path, tmp_path: Path) -> None:
    done = gruppo_process("train", recipe_file, "--out", tmp_path / "run", "--set", "run.steps=2")
    assert done.returncode == 0, done.stderr
    assert "step    1  reward" in done.stdout
    assert "held-out accuracy" in done.stdout
    assert "before: " in done.stdout
    assert "after : " in done.stdout
    assert "Next:" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr, "plain lines where there is no terminal"
    measured = gruppo("eval", tmp_path / "run" / "model", "--task", tmp_path / "rows.jsonl", "--grader", "exact_match",
                      "--max-tokens", 8, "--out", tmp_path / "answers")  # fmt: skip
    assert measured.returncode == 0, measured.stderr
    assert "18 questions" in measured.stdout
    assert len(pq.read_table(tmp_path / "answers/samples.parquet")) == 18
    written = gruppo("export", tmp_path / "run", "--to", tmp_path / "exported", "--dtype", "bfloat16")
    assert written.returncode == 0, written.stderr
    assert written.stdout.startswith("step 2, held-out accuracy")
    assert "of bfloat16 in" in written.stdout
    assert (tmp_path / "exported" / "README.md").is_file()
    refused = gruppo("export", tmp_path / "run", "--to", tmp_path / "exported")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    made = gruppo("sample", tmp_path / "run" / "model", "-p", "abc", "-n", 2, "--max-tokens", 5, "--plain")
    assert made.returncode == 0, made.stderr
    assert made.stdout.count("---") == 2
    assert (
        gruppo("sample", tmp_path / "run" / "model", "-p", "abc", "-n", 2, "--max-tokens", 5, "--plain").stdout
        == made.stdout
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["repeat", "failure.json"], "command repeat: was renamed; write gruppo rerun-reward"),
        (["replay", "run", "--step", "1"], "command replay: was renamed; write gruppo reproduce"),
        (
            ["train", "r.toml", "--num_generations", "8"],
            "--num_generations: no such option; write --set sampling.group_size=8",
        ),
        (["train", "r.toml", "--beta=0.1"], "write --set method.kl_coef=0.1, the weight of the KL term"),
        (["train", "--model_name_or_path", "a b"], "write --set 'model.name=a b'"),
        (["train", "r.toml", "--output_dir", "x"], "--output_dir: no such option; write --out"),
        (["train", "r.toml", "--steps", "3"], "write --set run.steps=3"),
        (["check", "r.toml", "--bf16"], "write --set model.dtype=bfloat16"),
        (
            ["train", "r.toml", "--use_vllm"],
            "--use_vllm: no such option; remove it: gruppo samples with its own engine",
        ),
        (["eval", "m", "--num_samples", "4"], "write --samples 4"),
        (["eval", "m", "--max_new_tokens=4"], "write --max-tokens 4"),
        (["sample", "m", "--max_new_tokens", "4"], "write --max-tokens 4"),
        (["train", "quickstart", "--set", "num_generations=8"], "write --set sampling.group_size=8"),
        (["sample", "model", "--messages", '{"role": "user", "content": "hi"}'], "must be a list of messages"),
    ],
)
def test_mistakes_before_a_model_is_loaded(arguments: list[str], message: str) -> None:
    done = gruppo(*arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "run.stepz=3"], ["run.stepz", '"steps"']),
        (["--set", "run.steps=many"], ["run.steps", "integer"]),
        (["--set", "model.name=no/such-model"], ["model.name", "no/such-model"]),
        (["--set", "task.name=none.jsonl"], ["none.jsonl", "no such file"]),
        (["--set", "task.name=arithmetik"], ["arithmetik", '"arithmetic"']),
        (["--set", 'reward.functions=["nowhere:f"]'], ["nowhere:f", "cannot be imported"]),
        (["--set", 'reward.functions=["tests/rewards/functions.py:needs_more"]'], ["solution"]),
        (["--set", "sampling.max_tokens=1000"], ["context of 128"]),
        (["--set", "model.device=cuda"], ["model.device"]),
    ],
)
def test_each_mistake_is_one_line_and_exit_code_2(
    recipe_file: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    failed = gruppo("train", recipe_file, "--out", tmp_path / "run", *arguments)
    assert failed.returncode == 2
    lines = [line for line in failed.stderr.splitlines() if line.startswith("gruppo: ")]
    assert len(lines) == 1
    assert "Traceback" not in failed.stderr
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("arguments", "start", "words"),
    [
        (["--task", "nope.jsonl"], "--task nope.jsonl: there is no such file", ""),
        (["--task", "ROWS", "--grader", "nope"], "--grader nope: unknown grader", ""),
        (["--task", "ROWS", "--grader", "exact_match"], "--grader exact_match: ", "write --columns answer=answers"),
        (["--task", "ROWS"], "--grader numeric_answer: ", "write --columns answer=answers"),
        (["--task", "ROWS", "--columns", "prompt=x"], "--columns prompt=x: ", 'no column "x"'),
        (["--task", "ROWS", "--template", "{x}"], "--template: ", "no column {x}"),
        (["--task", "ROWS", "--template", "a b"], "--template 'a b': ", "contains no column"),
        (["--task", "ROWS", "--questions", "0"], "--questions 0: ", "write e.g. --questions 256"),
        (["--samples", "4"], "--samples 4: ", "write --temperature, or --samples 1"),
        (["--max-tokens", "0"], "--max-tokens 0: ", ""),
        (["--temperature", "-1"], "--temperature -1.0: ", ""),
        (["--option", "maximum=x"], "--option maximum: needs --task", ""),
        (["--task", "arithmetic", "--option", "maximum=x"], "--option maximum=x: ", ""),
        (["--task", "ROWS", "--option", "a=1"], "--option: ", "has no options"),
        (["--task", "gsm8k", "--data", "nope"], "--data nope: ", ""),
        (["--device", "tpu"], "--device tpu: ", "write e.g. --device auto"),
        (["--dtype", "int8"], "--dtype int8: ", ""),
        (["--environment", "nope"], "--environment nope: ", ""),
        (["--recipe", "RECIPE"], "RECIPE: evaluation.questions = 0: ", "write e.g. questions = 256"),
        (["--task", "arithmetic"], "model no-such-model: there is no such folder", ""),
    ],
)
def test_mistakes_of_eval_name_its_options(tmp_path: Path, arguments: list[str], start: str, words: str) -> None:
    files = {"ROWS": tmp_path / "rows.jsonl", "RECIPE": tmp_path / "r.toml"}
    files["ROWS"].write_text('{"prompt": "1 + 1", "answers": "2"}\n')
    files["RECIPE"].write_text('[model]\nname = "m"\n[evaluation]\nquestions = 0\n')
    done = gruppo("eval", "no-such-model", *(files.get(text, text) for text in arguments))
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("gruppo: ")]
    assert line.startswith(f"gruppo: {start.replace('RECIPE', str(files['RECIPE']))}")
    assert words in line
    assert "benchmarks[" not in line


def test_fields_that_a_recipe_sets_keep_their_names_in_eval(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('[model]\nname = "m"\n[evaluation]\ntask = "arithmetic"\ngrader = "nope"\n')
    for options, start in (
        ([], 'evaluation.grader = "nope": '),
        (["--samples", "3"], "--samples 3: "),
        (["--grader", "none"], "--grader none: "),
    ):
        done = gruppo("eval", "no-such-model", "--recipe", tmp_path / "r.toml", *options)
        assert done.stderr.splitlines()[-1].startswith(f"gruppo: {start}")


def test_bad_usage_is_exit_code_2() -> None:
    """Also that of the process, which is started once."""
    for run, arguments in (
        (gruppo_process, ["train", "x.toml", "--nonsense"]), (gruppo, ["train"]), (gruppo, ["train", "x.toml"]),
        (gruppo, ["nonsense"]), (gruppo, ["eval", "m", "--device", "tpu"]),
        (gruppo, ["sample", "m", "-p", "x", "-n", "0"]),
    ):  # fmt: skip
        failed = run(*arguments)
        assert failed.returncode == 2
        assert "Traceback" not in failed.stderr


def test_folder_with_another_run(recipe_file: Path, tmp_path: Path) -> None:
    assert gruppo("train", recipe_file, "--out", tmp_path / "run", "--set", "run.steps=1").returncode == 0
    again = gruppo("train", recipe_file, "--out", tmp_path / "run", "--set", "run.steps=1")
    assert again.returncode == 2
    assert "--resume" in again.stderr
    changed = gruppo("train", recipe_file, "--out", tmp_path / "run", "--set", "run.seed=2", "--resume")
    assert changed.returncode == 2
    assert "run.seed was 0 and is 2" in changed.stderr


def test_interrupted_saves_says_how_to_go_on_and_exits_with_130(recipe_file: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "gruppo.cli.main", "train", str(recipe_file), "--out", str(tmp_path / "run")]
    line += ["--set", "run.steps=500"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout is not None
    for shown in process.stdout:
        if shown.startswith("step    3  reward"):
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in errors
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["state"] == "interrupted"
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("models", "wrong"),
    [(["no/model"], "task"), (["no/model"], "environment"), (["no/model", "--compare", "no/other"], "task")],
)
def test_a_model_is_downloaded_after_cheap_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: list[str], wrong: str
) -> None:
    def looked_for(*_: object, **__: object) -> None:
        raise AssertionError("the model is looked for")

    for module in ("gruppo.models.loading", "gruppo.evaluation.runner"):
        monkeypatch.setattr(f"{module}.find_model", looked_for)
    rows = tmp_path / "rows.jsonl"
    if wrong == "environment":
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = ["--grader", "exact_match", "--environment", "nowhere.py:World"]
    shown = gruppo("eval", *models, "--task", rows, *options)
    assert shown.returncode == 2
    assert (str(rows) if wrong == "task" else "nowhere.py") in shown.stderr


def test_sample_says_that_memory_is_too_little(tiny_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gruppo.engines.memory.free_memory", lambda _: 0)
    shown = gruppo("sample", tiny_folder, "--max-tokens", 8)
    assert shown.returncode == 2
    assert re.search(r"memory: there is room for \d\.\d\d GB, but sampling needs at least", shown.stderr)
    assert shown.stderr.rstrip().endswith("; stop other programs, or use a smaller --max-tokens or model")


def test_sample_as_json_with_truncation_and_stop_texts(tiny_folder: str) -> None:
    """Four answers with the log-probabilities of their tokens; none contains the stop string."""
    flags = ["-p", "ab", "--plain", "-n", 4, "--max-tokens", 12, "--top-k", 20, "--top-p", 0.95, "--min-p", 0.001,
             "--min-tokens", 3, "--dtype", "float32", "--json"]  # fmt: skip
    plain = gruppo("sample", tiny_folder, *flags)
    assert plain.returncode == 0, plain.stderr
    answers = [json.loads(line) for line in plain.stdout.splitlines()]
    assert len(answers) == 4
    for answer in answers:
        assert 3 <= len(answer["token_ids"]) == len(answer["logprobs"]) <= 12
        assert max(answer["logprobs"]) <= 0
    letter = answers[0]["text"][4]
    stopped = [json.loads(line) for line in gruppo("sample", tiny_folder, *flags, "--stop", letter).stdout.splitlines()]
    assert stopped[0]["finish_reason"] == "stop"
    assert answers[0]["text"].startswith(stopped[0]["text"])
    assert len(stopped[0]["text"]) < len(answers[0]["text"])


def test_eval_repeats_the_evaluation_of_a_recipe(recipe_file: Path, tiny_folder: str) -> None:
    shown = gruppo("eval", tiny_folder, "--recipe", recipe_file)
    assert shown.returncode == 0, shown.stderr
    assert "  4 questions, in-domain\n" in shown.stdout
    drawn = gruppo("eval", tiny_folder, "--recipe", recipe_file, "--samples", 2, "--questions", 3, "--temperature", 1.0)
    assert "3 questions, 2 answers each" in drawn.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["sample", "m", "--top-p", 1.5], "evaluation.decoding.top_p = 1.5"),
        (["sample", "m", "--top-k", -1], "evaluation.decoding.top_k = -1"),
        (["sample", "m", "--min-tokens", 300], "min_tokens = 300"),
        (["sample", "m", "--stop", ""], "evaluation.decoding.stop"),
        (["eval", "m", "--samples", 4], "--samples 4"),
        (["eval", "m", "--option", "maximum=3"], "--task"),
        (["eval", "m", "--set", "evaluation.decoding.top_p=2"], "evaluation.decoding.top_p = 2"),
    ],
)
def test_wrong_decoding_is_refused_before_a_model_is_looked_for(arguments: list, word: str) -> None:
    shown = gruppo(*arguments)
    assert shown.returncode == 2
    assert word in shown.stderr
