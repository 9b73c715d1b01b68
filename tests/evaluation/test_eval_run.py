"""`gruppo eval` with a folder: several tasks, kills, comparisons, reward model scores, and evaluation during a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tomli_w

from gruppo.cli.eval_arguments import EvalArguments, _labels
from gruppo.config.loading import load_recipe
from gruppo.config.recipe import Recipe
from gruppo.errors import UsageError
from gruppo.evaluation import eval_run
from gruppo.evaluation.compare import compare_all, read_evaluation
from gruppo.evaluation.eval_run import run_evaluation
from gruppo.evaluation.results import EvalResult
from gruppo.models.loading import find_model
from gruppo.models.reward_model import load_reward_model, save_reward_model
from gruppo.models.weights import save_model
from gruppo.training.api import train
from gruppo.utils.progress import NullProgress
from gruppo.utils.signals import Stop
from tests.cli.test_cli import gruppo
from tests.conftest import make_policy
from tests.small_runs import ROWS, Killed, recipe, small_run

pytestmark = pytest.mark.usefixtures("quick_workers")

LETTERS = "tests/functions_of_users.py:begins_early"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tasks")
    paths = [folder / "letters.jsonl", folder / "digits.jsonl"]
    for path, rows in zip(paths, (ROWS[:5], ROWS[5:12]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path) for path in paths]


def asked(model: str, files: list[str], samples: int = 3, **fields: object) -> Recipe:
    tables = [
        {
            "task": each,
            "samples": samples,
            "max_tokens": 6,
            "grader": LETTERS,
            "decoding": {"temperature": 1.0},
            **fields,
        }
        for each in files
    ]
    return load_recipe({"model": {"name": model, "dtype": "float32", "device": "cpu"}, "benchmarks": tables})


def go(recipe: Recipe, out: Path | None = None, resume: bool = False) -> EvalResult:
    return run_evaluation(recipe, out, resume, NullProgress(), Stop())


def test_several_tasks_into_a_folder(tiny_folder: str, files: list[str], tmp_path: Path) -> None:
    made = go(asked(tiny_folder, files), tmp_path / "out")
    rows = pq.read_table(tmp_path / "out/samples.parquet").to_pylist()
    assert len(rows) == (5 + 7) * 3
    for name, result in made.sets.items():
        own = [row for row in rows if row["eval_set"] == name]
        assert result.figures["accuracy"] == pytest.approx(sum(row["correct"] for row in own) / len(own))
        assert result.figures["curves"]["pass"]["3"]["value"] >= result.figures["accuracy"]
    held = json.loads((tmp_path / "out/results.json").read_text())
    assert held["sets"]["letters"]["questions"] == 5
    assert read_evaluation(tmp_path / "out").as_dict() == made.as_dict()
    memory = go(asked(tiny_folder, files))
    assert memory.as_dict() == made.as_dict(), "with or without a folder"


def test_a_killed_evaluation_resumes_with_the_same_results(
    tiny_folder: str, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gruppo.evaluation.sets.CHUNK", 6)  # two questions at a time
    settings = asked(tiny_folder, files)
    whole = go(settings, tmp_path / "whole")
    grade, calls = eval_run.grade_answers, []

    def dies(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 5:
            raise Killed
        return grade(*arguments)

    monkeypatch.setattr(eval_run, "grade_answers", dies)
    with pytest.raises(Killed):
        go(settings, tmp_path / "cut")
    assert len(list((tmp_path / "cut/evaluations").iterdir())) == 4
    assert not (tmp_path / "cut/results.json").exists()
    with pytest.raises(UsageError, match="resume=True"):
        go(settings, tmp_path / "cut")
    monkeypatch.setattr(eval_run, "grade_answers", grade)
    resumed = go(settings, tmp_path / "cut", resume=True)
    assert resumed.as_dict() == whole.as_dict()
    assert pq.read_table(tmp_path / "cut/samples.parquet") == pq.read_table(tmp_path / "whole/samples.parquet")
    other = settings.model_copy(update={"run": settings.run.model_copy(update={"seed": 5})})
    with pytest.raises(UsageError, match=r"run\.seed"):
        go(other, tmp_path / "cut", resume=True)


def test_slots_are_those_that_run_memory_allows(
    tiny_folder: str, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, the answers are the same. The folder records the slots and the estimate, which differ at a resume."""
    monkeypatch.setattr("gruppo.engines.memory.process_bytes", lambda _: 0)
    settings = asked(tiny_folder, files)

    def within(size: str) -> Recipe:
        return settings.model_copy(update={"run": settings.run.model_copy(update={"memory": size})})

    roomy = go(within("9 GB"), tmp_path / "roomy")
    most = json.loads((tmp_path / "roomy/environment.json").read_text())
    assert most["slots"] == 7 * 3
    forecast = most["memory_forecast"]
    assert forecast["peak"] == sum(size for part, size in forecast.items() if part != "peak")
    budget = forecast["peak"] - forecast["cache"] // 2
    tight = go(within(f"{budget // 1024} KiB"), tmp_path / "tight")
    least = json.loads((tmp_path / "tight/environment.json").read_text())
    assert 1 < least["slots"] < 7 * 3
    assert least["memory_forecast"]["peak"] <= budget
    assert {name: made.figures for name, made in tight.sets.items()} == {
        name: made.figures for name, made in roomy.sets.items()
    }
    with pytest.raises(
        UsageError, match=r"run\.memory: allows 0\.00 GB, but sampling needs .* benchmarks\[\d\]\.max_tok"
    ):
        go(within("1 MB"), tmp_path / "none")
    assert not (tmp_path / "none/environment.json").exists()


def test_another_model_in_the_same_folder_is_refused(tiny_folder: str, files: list[str], tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    settings = asked(str(tmp_path / "model"), files)
    go(settings, tmp_path / "out")
    shutil.rmtree(tmp_path / "model")
    save_model(make_policy(seed=3), tmp_path / "model")
    with pytest.raises(UsageError, match="weights_sha256"):
        go(settings, tmp_path / "out", resume=True)


def test_two_models_are_compared(tiny_folder: str, files: list[str], tmp_path: Path) -> None:
    save_model(make_policy(seed=3), tmp_path / "other")
    first, second = go(asked(tiny_folder, files)), go(asked(str(tmp_path / "other"), files))
    found = compare_all(first, second)
    for name in ("letters", "digits"):
        apart = second.sets[name].figures["accuracy"] - first.sets[name].figures["accuracy"]
        assert found[name]["difference"] == pytest.approx(apart)
        assert found[name]["left_out"] == 0
    same = compare_all(first, first)
    assert same["letters"]["difference"] == 0
    low, high = same["letters"]["interval"]
    assert low < 0 < high, "five questions without a difference promise little"
    with pytest.raises(UsageError, match="nothing to compare"):
        compare_all(go(asked(tiny_folder, files[:1])), go(asked(tiny_folder, files[1:])))


def test_other_questions_in_a_finished_folder_are_refused(tiny_folder: str, tmp_path: Path) -> None:
    task = tmp_path / "rows.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:5]))
    settings = asked(tiny_folder, [str(task)])
    first = go(settings, tmp_path / "out")
    assert go(settings, tmp_path / "out", resume=True).as_dict() == first.as_dict()
    task.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    with pytest.raises(UsageError, match="data_sha256"):
        go(settings, tmp_path / "out", resume=True)


def test_settings_that_differ_are_listed(tiny_folder: str, files: list[str]) -> None:
    found = compare_all(go(asked(tiny_folder, files[:1])), go(asked(tiny_folder, files[:1], max_tokens=3)))
    assert found["letters"]["settings"] == ["max_tokens 6 and 3"]


def test_one_model_twice_has_two_names(tiny_folder: str, files: list[str]) -> None:
    once = go(asked(tiny_folder, files[:1]))
    assert _labels([once, once]) == [f"{tiny_folder} (first)", f"{tiny_folder} (second)"]


def test_a_reward_model_scores_the_answers(tiny_folder: str, files: list[str], tmp_path: Path) -> None:
    head = load_reward_model(find_model(tiny_folder, NullProgress()), "outcome", "cpu", "float32")
    save_reward_model(head, "outcome", tmp_path / "judge")
    settings = asked(tiny_folder, files[:1])
    judged = load_recipe({**settings.as_mapping(), "reward_model": {"name": str(tmp_path / "judge"), "prompts": 0}})
    made = go(judged, tmp_path / "out")
    rows = pq.read_table(tmp_path / "out/samples.parquet").to_pylist()
    assert {row["score"] for row in rows} == {0.5}, "a new head is at 0"
    best = made.sets["letters"].figures["curves"]["best"]
    assert best["3"]["value"] == pytest.approx(made.sets["letters"].figures["accuracy"]), "all tie, so any is taken"
    assert "weighted_vote" in made.sets["letters"].figures


def test_ambiguous_answers_are_events(tmp_path: Path) -> None:
    """Answers whose last number and box differ are reported, each with its text and verdicts."""
    path = tmp_path / "given.jsonl"
    texts = ["\\boxed{2} of 5", "\\boxed{2}", "we have 3"]
    path.write_text("".join(json.dumps({"id": i, "answer": "2", "completion": t}) + "\n" for i, t in enumerate(texts)))
    settings = load_recipe({"model": {"name": "x"}})
    made = eval_run.grade_file(settings, path, False, tmp_path / "out", False, NullProgress(), Stop())
    events = [json.loads(line) for line in (tmp_path / "out/events.jsonl").read_text().splitlines()]
    assert [event["prompt_id"] for event in events] == ["0"]
    assert events[0]["answer"] == texts[0]
    assert True in events[0]["other_rules"].values() or events[0]["correct"]
    assert next(iter(made.sets.values())).figures["ambiguous_share"] == pytest.approx(1 / 3)


def test_a_run_evaluates_benchmarks_with_their_own_settings(tiny_folder: str, files: list[str], tmp_path: Path) -> None:
    tables = [
        {
            "task": files[0],
            "every": 1,
            "samples": 2,
            "max_tokens": 5,
            "grader": LETTERS,
            "decoding": {"temperature": 1.0},
        },
        {"task": files[1], "name": "second", "questions": 3, "max_tokens": 4, "grader": LETTERS},
    ]
    data = {**recipe(tiny_folder, run__steps=2), "benchmarks": tables}
    result = train(data, prompts=ROWS, out=tmp_path / "run")
    lines = [line for line in result.metrics if "eval/letters/accuracy" in line]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert ["eval/second/accuracy" in line for line in lines] == [True, False, True]
    assert "eval/letters/pass@2" in lines[0]
    rows = result.evaluations(1)
    assert set(rows["eval_set"]) == {"letters"}
    assert len(rows) == 10
    assert {len(ids) <= 5 for ids in rows["token_ids"]} == {True}
    held = result.summary["benchmarks"]
    assert held["second"]["before"]["questions"] == 3
    assert held["second"]["domain"] == "out-of-domain"
    assert result.summary["accuracy_before"] is None
    again = go(load_recipe({**data, "model": {"name": str(tmp_path / "run/model"), "dtype": "float32"}}))
    assert again.sets["letters"].figures["accuracy"] == held["letters"]["after"]["accuracy"]


def test_evaluation_sets_do_not_change_what_is_trained(tiny_folder: str, files: list[str], tmp_path: Path) -> None:
    plain = small_run(tiny_folder, tmp_path / "plain", run__steps=2)
    data = {**recipe(tiny_folder, run__steps=2), "benchmarks": [{"task": files[0], "every": 1, "grader": LETTERS}]}
    asked_too = train(data, prompts=ROWS, out=tmp_path / "asked")
    assert asked_too.summary["weights_sha256"] == plain.summary["weights_sha256"]


def test_the_command_line_from_a_model_to_a_picture(tiny_folder: str, files: list[str], tmp_path: Path) -> None:
    options = ["--samples", 4, "--temperature", 1.0, "--max-tokens", 5, "--grader", LETTERS, "--dtype", "float32"]
    tasks = ["--task", files[0], "--task", files[1]]
    made = gruppo("eval", tiny_folder, *tasks, *options, "--out", tmp_path / "a")
    assert made.returncode == 0, made.stderr
    assert "letters: accuracy" in made.stdout
    assert "digits: accuracy" in made.stdout
    assert "pass@k" in made.stdout
    shown = gruppo("eval", tmp_path / "a", "--compare", tmp_path / "a", "--curves", tmp_path / "figure.svg", "--json")
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["differences"]["letters"]["difference"] == 0
    assert (tmp_path / "figure.svg").read_text().startswith("<?xml")
    unheard = gruppo("eval", tmp_path / "a", "--task", files[0])
    assert (unheard.returncode, "--task" in unheard.stderr) == (2, True)
    refused = gruppo("eval", tiny_folder, *tasks, *options, "--out", tmp_path / "a")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--answers"]),
        (["m", "--resume"], ["--resume", "--out"]),
        (["m", "--task", "arithmetic", "--samples", "1001", "--temperature", "1"], ["--samples 1001"]),
        (["--answers", "x.jsonl", "--samples", "4"], ["--samples", "--answers"]),
        (["--answers", "x.jsonl", "--task", "gsm8k", "--task", "math"], ["--task math"]),
        (["m", "--answers", "x.jsonl"], ["--answers"]),
        (["m", "--curves", "x.txt"], ["--curves x.txt", ".svg"]),
        (["m", "--data", "x"], ["--data", "--task"]),
        (["m", "--task", "rows.jsonl", "--data", "x"], ["--data x", "not a benchmark"]),
        (["m", "--task", "arithmetic", "--samples", "2"], ["--samples 2", "--temperature"]),
        (["m", "--reward-model", "nowhere"], ["--reward-model nowhere"]),
        (["--answers", "x.jsonl", "--compare", "m"], ["--answers"]),
    ],
)
def test_wrong_options_are_refused_in_a_line(arguments: list, words: list[str]) -> None:
    shown = gruppo("eval", *arguments)
    assert shown.returncode == 2
    assert shown.stderr.count("\n") == 1
    assert all(word in shown.stderr for word in words), shown.stderr


def test_a_damaged_folder_is_refused(tiny_folder: str, files: list[str], tmp_path: Path) -> None:
    go(asked(tiny_folder, files[:1]), tmp_path / "out")
    samples = tmp_path / "out/samples.parquet"
    held = samples.read_bytes()
    samples.write_bytes(held[: len(held) // 2])
    with pytest.raises(UsageError, match=r"samples\.parquet"):
        read_evaluation(tmp_path / "out")
    with pytest.raises(UsageError, match="contains no finished evaluation"):
        read_evaluation(tmp_path)


def test_answers_can_be_written_with_an_environment(tiny_folder: str, files: list[str], tmp_path: Path) -> None:
    settings = asked(tiny_folder, files[:1], samples=1, max_tokens=30)
    world = {"name": "tests/rollout/environments/worlds.py:Letters", "turns": 3, "workers": 1}
    go(load_recipe({**settings.as_mapping(), "environment": world}), tmp_path / "out")
    rows = pq.read_table(tmp_path / "out/samples.parquet").to_pylist()
    assert len(rows) == 5
    assert all(json.loads(row["episode"])["turns"] >= 1 for row in rows)
    assert all(False in row["mask"] or row["finish_reason"] == "length" for row in rows)


@pytest.mark.parametrize(
    ("asking", "name"),
    [
        (EvalArguments(tasks=["gsm8k"], options={"prompt": "tool"}), "python"),
        (EvalArguments(tasks=["gsm8k"], options={"prompt": "tool"}, environment="game.py:Game"), "game.py:Game"),
        (EvalArguments(tasks=["gsm8k"]), None),
    ],
)
def test_a_tool_prompt_brings_its_tool(asking: EvalArguments, name: str | None) -> None:
    environment = asking.recipe_of("m").environment
    assert (environment.name if environment else None) == name


def test_what_is_asked_goes_before_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        '[model]\nname = "a"\n[task]\nname = "gsm8k"\n[evaluation]\nquestions = 7\nmax_tokens = 9\n'
        '[[benchmarks]]\ntask = "math"\nmax_tokens = 5\n'
    )
    own = EvalArguments(recipe=path, data=tmp_path, fields={"questions": 3}).recipe_of("b")
    assert own.model.name == "b"
    assert own.evaluation is not None
    assert (own.evaluation.questions, own.evaluation.max_tokens) == (3, 9)
    assert own.benchmarks[0].task is not None
    assert own.benchmarks[0].task.options == {"data": str(tmp_path)}
    assert (own.benchmarks[0].questions, own.benchmarks[0].max_tokens) == (3, 5)
    other = EvalArguments(
        recipe=path, tasks=["sat", "cmath"], temperature=0.5, overrides=["evaluation.decoding.top_p=0.9"]
    )
    made = other.recipe_of("b")
    assert made.evaluation is None
    assert [each.title for each in made.benchmarks] == ["sat", "cmath"]
    assert {(each.decoding.temperature, each.decoding.top_p, each.max_tokens) for each in made.benchmarks} == {
        (0.5, 0.9, 9)
    }


def test_data_for_a_recipe_without_a_benchmark_is_refused(tmp_path: Path) -> None:
    """It would not be read."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1", "answer": "1"}\n')
    own = {"task": str(tmp_path / "rows.jsonl")}
    for tables, refused in (
        ({"evaluation": own}, True),
        ({"benchmarks": [own]}, True),
        ({"task": {"held_out": 0.5}, "evaluation": {}}, True),
        ({"benchmarks": [own, {"task": "gsm8k"}]}, False),
        ({"evaluation": {"task": "gsm8k"}}, False),
    ):
        (tmp_path / "recipe.toml").write_text(tomli_w.dumps({"model": {"name": "x"}, **tables}))
        arguments = EvalArguments(recipe=tmp_path / "recipe.toml", data=tmp_path / "rows.jsonl")
        if refused:
            with pytest.raises(UsageError, match=r"data = .*no evaluation set of .*recipe\.toml is a benchmark"):
                arguments.recipe_of("x")
        else:
            assert "rows.jsonl" in str(arguments.recipe_of("x"))
