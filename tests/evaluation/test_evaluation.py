"""Evaluation outside training: greedy, sampled, several answers per question, and invalid arguments."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gruppo
from gruppo.config.sections import Decoding
from gruppo.errors import UsageError
from gruppo.evaluation.runner import evaluate, evaluate_recipe
from gruppo.evaluation.sets import sampling_params
from gruppo.models.weights import save_model
from gruppo.utils.stats import bootstrap_interval
from tests.conftest import make_policy
from tests.small_runs import ROWS, small_run

pytestmark = pytest.mark.usefixtures("quick_workers")

LETTERS = "tests/functions_of_users.py:begins_early"


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("questions") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:5]))
    return str(path)


def test_several_answers_to_each_question(tiny_folder: str, questions: str) -> None:
    outcome = evaluate(
        tiny_folder, questions, samples=4, max_tokens=6, decoding={"temperature": 1.0}, grader=LETTERS, dtype="float32"
    )
    rows, figures = outcome.rows(), outcome.figures()
    assert [row["sample"] for row in rows] == [0, 1, 2, 3] * 5
    assert [row["question"] for row in rows] == [row["prompt"] for row in ROWS[:5] for _ in range(4)]
    assert figures["questions"] == 5
    assert figures["samples"] == 4
    assert figures["accuracy"] == sum(row["answer"][:1] in "abcdefghijklm" for row in rows if row["answer"]) / 20
    means = np.array(outcome.correct).reshape(5, 4).mean(axis=1)
    assert figures["interval"] == list(bootstrap_interval(means))
    assert len({row["answer"] for row in rows}) > 5, "answers to one question differ"


def test_sampled_answers_repeat_for_a_seed_and_differ_between_seeds(tiny_folder: str, questions: str) -> None:
    def answers(seed: int) -> list[str]:
        outcome = evaluate(
            tiny_folder, questions, max_tokens=6, decoding={"temperature": 1.0, "top_p": 0.9}, seed=seed,
            grader=LETTERS, dtype="float32",
        )  # fmt: skip
        return [row["answer"] for row in outcome.rows()]

    assert answers(0) == answers(0) != answers(1)


def test_options_of_decoding_reach_the_engine(tiny_folder: str, questions: str) -> None:
    longest = evaluate(
        tiny_folder, questions, max_tokens=6, decoding={"temperature": 1.0, "min_tokens": 6}, grader=LETTERS
    )
    assert {len(completion.token_ids) for completion in longest.completions} == {6}
    greedy = evaluate(tiny_folder, questions, max_tokens=6, grader=LETTERS)
    first = evaluate(tiny_folder, questions, max_tokens=6, decoding={"temperature": 1.0, "top_k": 1}, grader=LETTERS)
    assert [c.token_ids for c in first.completions] == [c.token_ids for c in greedy.completions]
    letter = next(c.text[0] for c in greedy.completions if c.text)
    stopped = evaluate(tiny_folder, questions, max_tokens=6, decoding={"stop": [letter]}, grader=LETTERS)
    assert "" in {completion.text for completion in stopped.completions}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"decoding": {"top_p": 0.0}}, ['decoding["top_p"] = 0.0']),
        ({"decoding": {"topp": 0.5}}, ["topp", "top_p"]),
        ({"decoding": {"stop": [""]}}, ['decoding["stop"]']),
        ({"decoding": {"min_tokens": 9}}, ['decoding["min_tokens"] = 9', "max_tokens = 6"]),
        ({"samples": 3}, ["samples = 3", 'decoding={"temperature": 1.0}']),
        ({"samples": 0}, ["samples = 0"]),
        ({"questions": 0}, ["questions = 0"]),
    ],
)
def test_wrong_arguments_are_refused_by_name(
    arguments: dict, words: list[str], tiny_folder: str, questions: str
) -> None:
    with pytest.raises(UsageError) as caught:
        evaluate(tiny_folder, questions, **{"max_tokens": 6, **arguments})
    assert all(word in str(caught.value) for word in words)
    assert not re.search(r"evaluation\.|recipe|\[evaluation", str(caught.value))


def test_tasks_are_refused_in_the_words_of_the_argument(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1 + 1", "answers": "2"}\n')
    named = {"name": str(rows)}
    for task, words in (
        ("none.jsonl", 'task = "none.jsonl": there is no such file'),
        (named, 'write task["columns"] = {"prompt": "question"}'),
        (str(rows), f'write task = {{"name": "{rows}", "columns": {{"prompt": "question"}}}}'),
        ({**named, "columns": {"prompt": "x"}}, 'task["columns"] = {"prompt": "x"}: '),
        ({**named, "template": "{x}"}, 'task["template"]: '),
        ({**named, "columns": {"prompt": "question"}}, 'write task["columns"] = {"answer": "answers"}'),
        ({**named, "options": {"a": 1}}, "task[\"options\"] = {'a': 1}: "),
    ):
        with pytest.raises(UsageError) as caught:
            evaluate("no-such-model", task)
        assert words in str(caught.value)
        assert "[task]" not in str(caught.value)
    with pytest.raises(UsageError, match=r'^options\["maximum"\] = '):
        evaluate("no-such-model", options={"maximum": "x"})
    with pytest.raises(UsageError, match=r"^model = 'no-such-model': "):
        evaluate("no-such-model")


def test_a_run_repeats_by_its_recipe(tiny_folder: str, questions: str, tmp_path: Path) -> None:
    """`gruppo eval RUN/model --recipe RUN/recipe.toml` gives the figures of the run's last evaluation."""
    settings = {"temperature": 1.0, "top_p": 0.8, "min_tokens": 2}
    result = small_run(
        tiny_folder, tmp_path / "run", run__steps=2, evaluation__task=questions, evaluation__samples=3,
        evaluation__grader=LETTERS, evaluation__decoding=settings, run__seed=4,
    )  # fmt: skip
    recipe = gruppo.load_recipe(tmp_path / "run/recipe.toml", [f"model.name={tmp_path / 'run/model'}"])
    again = evaluate_recipe(recipe)
    assert again.figures()["accuracy"] == result.summary["accuracy_after"]
    kept = result.evaluations()
    last = kept[kept["step"] == 2] if "step" in kept else kept
    assert [row["answer"] for row in again.rows()] == last["answer"].tolist()[-15:]


def test_recipe_without_evaluation_is_refused(tiny_folder: str) -> None:
    with pytest.raises(UsageError, match="evaluation"):
        evaluate_recipe(gruppo.load_recipe({"model": {"name": tiny_folder}}))


def test_model_in_memory(tiny_folder: str, questions: str) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
    held = evaluate(model, questions, tokenizer=tokenizer, max_tokens=6, grader=LETTERS, dtype="float32")
    named = evaluate(tiny_folder, questions, max_tokens=6, grader=LETTERS, dtype="float32")
    assert held.rows() == named.rows()


def test_base_model_without_chat_template_takes_text_and_refuses_messages(tmp_path: Path, questions: str) -> None:
    policy = make_policy(initializer_range=0.02)
    policy.tokenizer.chat_template = None
    save_model(policy, tmp_path / "base")
    folder = str(tmp_path / "base")
    assert evaluate(folder, questions, max_tokens=4, grader=LETTERS).figures()["questions"] == 5
    assert small_run(folder, tmp_path / "run", run__steps=1).summary["state"] == "done"
    with pytest.raises(UsageError, match="chat template"):
        evaluate(folder, {"name": questions, "system": "Be brief."}, max_tokens=4, grader=LETTERS)


def test_sampling_options_are_the_recipes() -> None:
    options = sampling_params(Decoding(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, min_tokens=2, stop=["x"]), 8)
    assert (options.temperature, options.top_k, options.top_p, options.min_p) == (0.5, 3, 0.9, 0.1)
    assert (options.min_tokens, options.stop, options.max_tokens) == (2, ("x",), 8)


def test_bootstrap_interval_of_known_values() -> None:
    """Equal values have no spread; of n coin flips about half the mass lies within a standard error of the mean."""
    assert bootstrap_interval(np.full(7, 0.25)) == (0.25, 0.25)
    flips = np.array([0.0, 1.0] * 200)
    low, high = bootstrap_interval(flips)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.05)
    assert (low + high) / 2 == pytest.approx(0.5, abs=0.005)
    with pytest.raises(ValueError, match="empty"):
        bootstrap_interval(np.array([]))


def test_an_exported_model_evaluates_the_same_by_transformers_alone(
    tiny_folder: str, questions: str, tmp_path: Path
) -> None:
    """What `generate` of transformers answers greedily is, token for token, what the evaluation had."""
    small_run(tiny_folder, tmp_path / "run", run__steps=2)
    gruppo.export(tmp_path / "run", tmp_path / "exported")
    ours = evaluate(str(tmp_path / "exported"), questions, max_tokens=6, grader=LETTERS, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    for prompt, (completion,), (verdict,) in zip(ours.eval_set.prompts, ours.answers, ours.verdicts, strict=True):
        ids = torch.tensor([prompt.token_ids])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
        assert tuple(made[0, len(prompt.token_ids) :].tolist()) == completion.token_ids
        text = AutoTokenizer.from_pretrained(tmp_path / "exported").decode(
            completion.token_ids, skip_special_tokens=True
        )
        assert verdict.correct == (text[:1] in "abcdefghijklm" and bool(text))
    assert len(ours.answers) == 5
