"""Benchmarks: row formats of public copies, the usual file names, prompts, domains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gruppo.data.benchmark_table import BENCHMARKS, default_grader, domain
from gruppo.data.few_shot import Example
from gruppo.errors import UsageError
from gruppo.rewards.grading.graders import GRADERS, find_grader
from tests.data.load import both_sides, questions, training

LETTERS = ["(A) 4", "(B) 5", "(C) 6"]
# Benchmark, a row in the format of one of its public copies, and the values expected from it.
SHAPES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("gsm8k", {"question": "2 + 3?", "answer": "2 + 3 = <<2+3=5>>5.\n#### 5"},
     {"question": "2 + 3?", "answer": "5", "solution": "2 + 3 = <<2+3=5>>5.\n#### 5"}),
    ("gsm8k", {"id": 7, "question": "2 + 3?", "cot": "2 + 3 = 5.", "answer": "1,005"},
     {"question": "2 + 3?", "answer": "1,005", "id": 7}),
    ("math", {"problem": "$2+3$?", "solution": "So $\\boxed{5}$.", "level": "Level 1", "type": "Algebra"},
     {"question": "$2+3$?", "answer": "5", "level": "Level 1", "type": "Algebra", "solution": "So $\\boxed{5}$."}),
    ("math", {"problem": "$x^2=1$?", "solution": "$\\boxed{1}$ and $\\boxed{-1}$."}, {"answer": "1, -1"}),
    ("math", {"problem": "$2+3$?", "solution": "…", "answer": "\\frac{10}{2}", "subject": "Algebra", "level": 2,
              "unique_id": "test/1"}, {"answer": "\\frac{10}{2}", "topic": "Algebra", "level": 2, "id": "test/1"}),
    ("mgsm-zh", {"messages": [{"role": "user", "content": "二加三？"}, {"role": "assistant", "content": ""}],
                 "answer": "5", "id": "0"}, {"question": "二加三？", "answer": "5"}),
    ("mgsm-zh", {"question": "二加三？", "answer": None, "answer_number": 5, "equation_solution": None},
     {"answer": "5"}),
    ("cmath", {"grade": 1, "question": "二加三？", "golden": "5", "reasoning_step": 1, "num_digits": 1},
     {"answer": "5", "grade": 1, "reasoning_step": 1, "num_digits": 1}),
    ("sat", {"id": "0", "question": "2 + 3?", "options": "A) 4 B) 5 C) $\\frac{1}{2}$ D) None", "Answer": "B"},
     {"answer": "B", "choices": ["4", "5", "$\\frac{1}{2}$", "None"]}),
    ("sat", {"question": "2 + 3?", "options": "A. 4 B. 5 C. 6 D. 7", "Answer": "B"}, {"choices": ["4", "5", "6", "7"]}),
    ("ocw", {"problem": "How far?", "solution": "$\\boxed{1.6}$ cm", "answer": "1.6", "id": "0"}, {"answer": "1.6"}),
    ("minerva", {"question": "How far?", "answer": "4.5e33"}, {"answer": "4.5e33"}),
    ("minerva", {"problem": "How far?", "solution": "$\\boxed{1.6}$", "type": "Physics"},
     {"answer": "1.6", "type": "Physics"}),
    ("mmlu-stem", {"question": "2 + 3?", "subject": "astronomy", "choices": ["4", "5", "6", "7"], "answer": 1},
     {"answer": "B", "choices": ["4", "5", "6", "7"], "topic": "astronomy"}),
    ("mmlu-stem", {"question": "2 + 3?", "options": ["4", "5", "6", "7"], "answer": "B", "topic": "astronomy"},
     {"answer": "B", "topic": "astronomy"}),
    ("mmlu-stem", {"question": "2 + 3?", "A": "4", "B": "5", "C": "6", "D": "7", "target": "B"},
     {"answer": "B", "choices": ["4", "5", "6", "7"]}),
    ("gaokao-mathcloze", {"passage": None, "question": "$a=$", "options": None, "label": None, "answer": "$5$;$10$",
                          "other": {"source": "2021"}}, {"answer": "$5$;$10$", "source": {"source": "2021"}}),
    ("gaokao-mathqa", {"question": "$a=$\\\\\n", "options": LETTERS, "label": "B", "answer": None},
     {"question": "$a=$", "answer": "B", "choices": ["4", "5", "6"]}),
    ("gaokao-mathqa", {"question": "$a=$", "options": [*LETTERS, "(D)7"], "label": "A B D"}, {"answer": "ABD"}),
    ("gaokao-mathqa", {"query": "问题：$a=$ 从以下选项中选择:    (A)4 (B)5", "choices": ["(A)4", "(B)5"], "gold": [1]},
     {"answer": "B", "choices": ["4", "5"]}),
    ("svamp", {"ID": "chal-1", "Body": "He has 2.", "Question": "With 3 more?", "Answer": 5.0, "Equation": "( 2 + 3 )"},
     {"question": "He has 2. With 3 more?", "answer": "5", "equation": "( 2 + 3 )", "id": "chal-1"}),
    ("asdiv", {"body": "He has 2 apples.", "question": "With 3 more?", "solution_type": "Addition",
               "answer": "5 (apples)", "formula": "2+3=5"},
     {"question": "He has 2 apples. With 3 more?", "answer": "5 (apples)", "type": "Addition"}),
    ("asdiv", {"ID": "n-1", "Grade": "1", "Source": "http://x", "Body": "Ann has 2 pens, Bob has 3.", "Question":
               "Who has more?", "Solution-Type": "Comparison", "Answer": "Bob", "Formula": "3>2"},
     {"question": "Ann has 2 pens, Bob has 3. Who has more?", "answer": "Bob", "type": "Comparison", "grade": "1"}),
    ("asdiv", {"id": "test-1", "input": "2 + 3?", "output": ["5"]}, {"question": "2 + 3?", "answer": "5"}),
    ("mawps", {"input": "2 + 3?", "target": 5.0}, {"question": "2 + 3?", "answer": "5"}),
    ("mawps", {"id": "mawps__1", "question": "2 + 3?", "chain": "…", "result": "5", "result_float": 5.0,
               "equation": "x=2+3"}, {"answer": "5", "equation": "x=2+3"}),
    ("mawps", {"sQuestion": "2 + 3?", "lSolutions": [5.0], "iIndex": 1}, {"answer": "5"}),
    ("gsm-hard", {"input": "2 + 1000003?", "code": "…", "target": 1000005.0}, {"answer": "1000005"}),
    ("gsm-hard", {"input": "2 / 3?", "target": 0.6666666667}, {"answer": "0.6666666667"}),
    ("aqua", {"question": "2 + 3?", "options": ["A)4", "B)5", "C)6", "D)7", "E)8"], "rationale": "…", "correct": "B"},
     {"answer": "B", "choices": ["4", "5", "6", "7", "8"], "solution": "…"}),
    ("aime", {"ID": "2024-I-1", "Problem": "$2+3$?", "Solution": "…", "Answer": 5}, {"answer": "5", "id": "2024-I-1"}),
    ("aime", {"id": 1, "problem": "$2+3$?", "answer": "005", "year": "2024"}, {"answer": "005", "year": "2024"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "read"), SHAPES)
def test_row_formats(name: str, row: dict[str, Any], read: dict[str, Any]) -> None:
    result = BENCHMARKS[name].read(row)
    assert {column: result.get(column) for column in read} == read
    assert find_grader(default_grader(name))(f"The answer is $\\boxed{{{result['answer']}}}$.", result)
    assert not find_grader(default_grader(name))("", result)
    json.dumps(result)


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("gsm8k", {"questions": "2 + 3?", "answer": "5"}, ["no question", "questions, answer", "2 + 3?"]),
        ("gsm8k", {"question": "2 + 3?"}, ["no answer", "golden", "2 + 3?"]),
        ("gsm8k", {"question": "2 + 3?", "answer": "five"}, ["'five' contains no number", "2 + 3?"]),
        ("math", {"problem": "2 + 3?", "solution": "5"}, ["no answer", "no solution with a box"]),
        ("aqua", {"question": "2 + 3?", "correct": "B"}, ["no options"]),
        ("aqua", {"question": "2 + 3?", "options": ["A)4", "B)5"], "correct": "E"}, ["E is not one of its 2 options"]),
        ("aqua", {"question": "2 + 3?", "options": ["A)4", "B)5"], "correct": "six"}, ["'six'", "not a letter"]),
    ],
)
def test_a_row_that_cannot_be_read_is_shown_in_the_error(
    tmp_path: Path, name: str, row: dict[str, Any], words: list[str]
) -> None:
    good = {"question": "1 + 1?", "problem": "1 + 1?", "answer": "2", "correct": "A", "options": ["A)2", "B)3"]}
    write(tmp_path / "test.jsonl", [good, row])
    with pytest.raises(UsageError) as raised:
        questions(name, options={"data": str(tmp_path)})
    for word in ("test.jsonl, row 2", *words):
        assert word in str(raised.value)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


ROW = {"question": "2 + 3?", "answer": "#### 5"}


@pytest.mark.parametrize(
    "file",
    ["gsm8k_test.jsonl", "gsm8k-test.json", "GSM8K/test.jsonl", "gsm8k/main/test-00000-of-00001.parquet", "gsm8k.jsonl",
     "main/test-00000-of-00001.parquet", "test.jsonl", "data/test.parquet", "deep/in/gsm8k/gsm8k.jsonl"],
)  # fmt: skip
def test_usual_file_names(tmp_path: Path, file: str) -> None:
    write(tmp_path / file, [ROW])
    write(tmp_path / "other_test.jsonl", [{"question": "wrong", "answer": "0"}])
    assert [row["answer"] for row in questions("gsm8k", options={"data": str(tmp_path)}).rows] == ["5"]
    assert questions("gsm8k", options={"data": str(tmp_path / file)}).rows[0]["question"] == "2 + 3?"


def test_train_and_test_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k_train.jsonl", [ROW, ROW])
    write(tmp_path / "gsm8k_test.jsonl", [ROW])
    train, held_out = both_sides("gsm8k", options={"data": str(tmp_path)})
    assert (len(train.rows), len(held_out.rows)) == (2, 1)
    assert len(training("gsm8k", options={"data": str(tmp_path)})) == 2


def test_shards_are_joined_and_parts_are_named(tmp_path: Path) -> None:
    for shard in (0, 1):
        write(tmp_path / "gsm8k" / f"test-0000{shard}-of-00002.parquet", [ROW])
    assert len(questions("gsm8k", options={"data": str(tmp_path)}).rows) == 2
    write(tmp_path / "mawps_singleop.jsonl", [{"input": "2 + 3?", "target": 5.0}])
    write(tmp_path / "mawps_addsub.jsonl", [{"input": "2 + 4?", "target": 6.0}])
    rows = questions("mawps", options={"data": str(tmp_path)}).rows
    assert [(row["part"], row["answer"]) for row in rows] == [("addsub", "6"), ("singleop", "5")]
    for subject, split in (("algebra", "test"), ("geometry", "test"), ("algebra", "train")):
        write(tmp_path / "MATH" / split / subject / "1.json", [{"problem": f"{split}?", "solution": "\\boxed{1}"}])
    rows = questions("math", options={"data": str(tmp_path / "MATH")}).rows
    assert [(row["part"], row["question"]) for row in rows] == [("algebra", "test?"), ("geometry", "test?")]


def test_original_releases(tmp_path: Path) -> None:
    """MMLU and MGSM without headers, one file per subject; repositories with configurations; a subject's folder."""
    mmlu = tmp_path / "mmlu/data"
    for split, subject in (("test", "astronomy"), ("dev", "astronomy"), ("test", "law"), ("test", "machine_learning")):
        (mmlu / split).mkdir(parents=True, exist_ok=True)
        (mmlu / split / f"{subject}_{split}.csv").write_text(f'"In {subject}, {split}?",1,1,2,3,B\nAnd?,4,5,6,7,D\n')
    rows = questions("mmlu-stem", options={"data": str(tmp_path / "mmlu")}).rows
    assert [(row["part"], row["question"], row["answer"]) for row in rows] == [
        ("astronomy", "In astronomy, test?", "B"), ("astronomy", "And?", "D"),
        ("machine_learning", "In machine_learning, test?", "B"), ("machine_learning", "And?", "D"),
    ]  # fmt: skip
    assert rows[0]["choices"] == ["1", "1", "2", "3"]
    (tmp_path / "mgsm").mkdir()
    (tmp_path / "mgsm/mgsm_zh.tsv").write_text("二加三？\t5\n一千减一？\t999\n", encoding="utf-8")
    rows = questions("mgsm-zh", options={"data": str(tmp_path / "mgsm")}).rows
    assert [(row["question"], row["answer"]) for row in rows] == [("二加三？", "5"), ("一千减一？", "999")]
    (tmp_path / "mgsm/mgsm_zh.tsv").write_text("question\tanswer\n二加三？\t5\n", encoding="utf-8")
    assert len(questions("mgsm-zh", options={"data": str(tmp_path / "mgsm")}).rows) == 1
    for config in ("main", "socratic"):
        write(tmp_path / "sets/gsm8k" / config / "test-00000-of-00001.parquet", [ROW | {"question": config}])
    assert questions("gsm8k", options={"data": str(tmp_path / "sets")}).rows[0]["question"] == "main"
    for subject in ("algebra", "geometry"):
        write(tmp_path / "MATH/test" / subject / "1.json", [{"problem": subject, "solution": "\\boxed{1}"}])
    rows = questions("math", options={"data": str(tmp_path / "MATH/test/algebra")}).rows
    assert [(row["part"], row["question"]) for row in rows] == [("algebra", "algebra")]
    for file in ("aime_2024_problems.parquet", "AIME2024/AIME2024.jsonl", "aime2025-I.jsonl"):
        write(tmp_path / file[:8] / file, [{"problem": "2 + 3?", "answer": "5"}])
        assert len(questions("aime", options={"data": str(tmp_path / file[:8])}).rows) == 1
        (tmp_path / file[:8] / file).unlink()


def test_asdiv_as_its_authors_publish_it(tmp_path: Path) -> None:
    """Rows in the file's layout, with numbers, words, fractions and several numbers as answers."""
    problems = [
        ("9 (apples)", "Addition"),
        ("Mrs. Hilt", "Comparison"),
        ("1/3", "Ratio"),
        ("They are equal", "Comparison"),
    ]
    body = "".join(
        f'<Problem ID="n-{number}" Grade="1" Source="http://x">\n<Body>Mrs. Hilt &amp; Jacob {number}.</Body>\n'
        f'<Question>Which? </Question><Solution-Type UnitTrans="Money">{kind}</Solution-Type>\n'
        f"<Answer>{answer}</Answer><Formula>7+2=9 &gt; 3</Formula></Problem>\n"
        for number, (answer, kind) in enumerate(problems)
    )
    head = '<?xml version="1.0" encoding="UTF-8" ?>\n<Machine-Reading-Corpus-File>\n<ProblemSet>\n'
    (tmp_path / "ASDiv.xml").write_text(f"{head}{body}</ProblemSet>\n</Machine-Reading-Corpus-File>\n")
    rows = questions("asdiv", options={"data": str(tmp_path)}).rows
    assert [(row["answer"], row["type"]) for row in rows] == problems
    assert rows[1]["question"] == "Mrs. Hilt & Jacob 1. Which?"
    grade = find_grader(default_grader("asdiv"))
    for row in rows:
        assert grade(f"So the answer is {row['answer']}.", row)
        assert not grade("So the answer is 8.", row)
        assert not grade("Jacob.", row)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], ["no file of GSM8K", "gsm8k_test", "no data files"]),
        (["svamp.jsonl"], ["no file of GSM8K", "found svamp.jsonl"]),
        (["a/gsm8k_test.jsonl", "b/gsm8k_test.jsonl"], ["several files", "a/gsm8k_test.jsonl, b/gsm8k_test.jsonl"]),
    ],
)
def test_no_file_or_several_files_are_refused(tmp_path: Path, files: list[str], words: list[str]) -> None:
    for file in files:
        write(tmp_path / file, [ROW])
    with pytest.raises(UsageError) as raised:
        questions("gsm8k", options={"data": str(tmp_path)})
    for word in ("evaluation.task.options.data", *words):
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"options": {"data": "/nowhere/at/all"}}, ["options.data", "no such file or folder"]),
        ({"options": {"data": 3}}, ["options.data = 3"]),
        ({"options": {"prompt": "none"}}, ["options.prompt", "zero-shot, few-shot, tool"]),
        ({"options": {"format": "json"}}, ["options.format", '"text"']),
        ({"options": {"shots": 2}}, ["options.shots", "few-shot"]),
        ({"options": {"prompt": "few-shot", "shots": 99}}, ["1 to 6 examples"]),
        ({"options": {"promt": "tool"}}, ["promt", "data, prompt, shots, format"]),
        ({"split": "train"}, ["evaluation.task.split", "CMATH has nothing to train on", '"test"']),
    ],
)
def test_wrong_options(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as raised:
        questions("cmath", **fields)
    for word in words:
        assert word in str(raised.value)


def test_a_mistyped_name_is_reported() -> None:
    with pytest.raises(UsageError, match='did you mean "gsm8k"'):
        questions("gsm8K")


def prompt_of(folder: Path, name: str, row: dict[str, Any], **options: Any) -> Any:
    write(folder / "test.jsonl", [row])
    return questions(name, options={"data": str(folder), **options}).rows[0]["prompt"]


def test_chat_prompts(tmp_path: Path) -> None:
    (message,) = prompt_of(tmp_path, "gsm8k", ROW)
    assert message["role"] == "user"
    assert message["content"].startswith("2 + 3?\n\nReason step by step")
    assert "\\boxed{}" in message["content"]
    few = prompt_of(tmp_path, "gsm8k", ROW, prompt="few-shot")
    assert [turn["role"] for turn in few] == ["user", "assistant"] * 8 + ["user"]
    assert few[-1] == message
    assert len(prompt_of(tmp_path, "gsm8k", ROW, prompt="few-shot", shots=2)) == 5
    (tool,) = prompt_of(tmp_path, "gsm8k", ROW, prompt="tool")
    assert "```python" in tool["content"]
    assert "```output" in tool["content"]


def test_prompts_as_text(tmp_path: Path) -> None:
    text = prompt_of(tmp_path, "gsm8k", ROW, prompt="few-shot", shots=1, format="text")
    assert text.count("Question: ") == 2
    assert text.endswith("Question: 2 + 3?\nAnswer:")
    chinese = prompt_of(tmp_path, "cmath", {"question": "二加三？", "golden": "5"}, format="text")
    assert chinese.endswith("问题：二加三？\n解答：")


def test_prompts_show_options(tmp_path: Path) -> None:
    row = {"question": "2 + 3?", "options": ["A)4", "B)5"], "correct": "B"}
    (message,) = prompt_of(tmp_path, "aqua", row)
    assert "2 + 3?\n(A) 4\n(B) 5\n\n" in message["content"]
    assert "letter" in message["content"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_few_shot_examples_are_correct_by_the_benchmarks_grader(name: str) -> None:
    """Examples end in the format that the model is asked for."""
    benchmark = BENCHMARKS[name]
    assert benchmark.grader in GRADERS
    grade = find_grader(benchmark.grader)
    for example in benchmark.examples:
        columns = {"question": example.question, "answer": example.answer, "choices": list(example.choices)}
        shown = f"{example.working} The answer is $\\boxed{{{example.answer}}}$."
        assert grade(shown, columns), shown
        assert grade(example.working, columns) or benchmark.kind in ("formula", "blanks"), example.working


def test_word_problem_examples_are_distinct() -> None:
    assert isinstance(BENCHMARKS["gsm8k"].examples[0], Example)
    assert len({each.question for each in BENCHMARKS["gsm8k"].examples}) == 8


@pytest.mark.parametrize(
    ("task", "trained", "place"),
    [
        ("gsm8k", ["gsm8k"], "in-domain"),
        ("gsm8k", ["openai/gsm8k"], "in-domain"),
        ("gsm8k", ["math"], "out-of-domain"),
        ("math", ["gsm8k", "EleutherAI/hendrycks_math"], "in-domain"),
        ("mgsm-zh", ["gsm8k", "math"], "out-of-domain"),
        ("cmath", ["gsm8k", "math"], "out-of-domain"),
        ("ocw", ["minerva"], "in-domain"),
        ("gsm8k (held out)", ["gsm8k"], "in-domain"),
        ("rows.jsonl", ["rows.jsonl"], "in-domain"),
        ("reasoning-gym/countdown", ["reasoning-gym/countdown"], "in-domain"),
        ("reasoning-gym/countdown", ["reasoning-gym/leg_counting"], "out-of-domain"),
        ("gsm8k", [], "out-of-domain"),
    ],
)
def test_domains(task: str, trained: list[str], place: str) -> None:
    assert domain(task, trained) == place


def test_default_graders() -> None:
    assert default_grader("math") == "math_answer"
    assert default_grader("gaokao-mathqa") == "choice"
    assert default_grader("reasoning-gym/countdown") == "reasoning_gym"
    assert default_grader("rows.jsonl") == "numeric_answer"
    assert {each.grader for each in BENCHMARKS.values()} <= set(GRADERS)


def test_without_data_the_hub_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def read(name: str, split: str, options: Any, limit: int, progress: Any) -> list[dict[str, Any]]:
        calls.append((name, split, dict(options)))
        return [{"question": "2 + 3?", "answer": "5", "input": "2 + 3?", "target": 5.0, "subject": "law",
                 "choices": ["4", "5"]}]  # fmt: skip

    monkeypatch.setattr("gruppo.data.hub.read_dataset", read)
    assert questions("gsm8k").rows[0]["answer"] == "5"
    assert questions("gsm-hard").rows[0]["answer"] == "5"
    with pytest.raises(UsageError, match="has no rows in cais/mmlu"):
        questions("mmlu-stem")  # law is not a STEM subject
    assert calls == [
        ("openai/gsm8k", "test", {"name": "main"}),
        ("reasoning-machines/gsm-hard", "train", {}),
        ("cais/mmlu", "test", {"name": "all"}),
    ]


def test_a_folder_saved_by_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = datasets.DatasetDict({"test": datasets.Dataset.from_list([ROW])})
    saved.save_to_disk(str(tmp_path / "saved"))
    assert questions("gsm8k", options={"data": str(tmp_path / "saved")}).rows[0]["answer"] == "5"


def test_rows_that_are_already_prompts_are_split_into_question_and_instruction() -> None:
    """AGIEval's copies for lm-evaluation-harness: query, choices, and gold, the indices of the correct choices."""
    row = {
        "query": "问题：1+1=? 选项：(A)1 (B)2 (C)3 (D)4\n答案：从A到D, 我们应选择",
        "choices": ["(A)1", "(B)2", "(C)3", "(D)4"], "gold": [1],
    }  # fmt: skip
    read = BENCHMARKS["gaokao-mathqa"].read(row)
    assert (read["question"], read["choices"], read["answer"]) == ("1+1=?", ["1", "2", "3", "4"], "B")
    blank = BENCHMARKS["gaokao-mathcloze"].read({"query": "问题：1+1=____\n答案：", "answer": "2"})
    assert (blank["question"], blank["answer"]) == ("1+1=____", "2")
