"""The table of benchmarks: names, sources, splits and readers."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gruppo.data.benchmark_rows import read_choice, read_formula, read_number, read_number_or_words
from gruppo.data.few_shot import Example, examples_of
from gruppo.types import Row

Language = Literal["en", "zh"]


Reader = Callable[[Mapping[str, Any]], Row]


PROMPTS = ("zero-shot", "few-shot", "tool")


FORMATS = ("chat", "text")


@dataclass(frozen=True)
class Benchmark:
    """A public benchmark.

    `hub`: its repository on the hub; `config`, `options`: further arguments of `load_dataset`; `splits`: our split
    names -> the repository's. `aliases`: names of its files; `several`: names of files that together make up the
    benchmark; `header`: the columns of CSV and TSV copies without a header. `read`: turns a row of any copy into
    question, answer and choices. `few_shot`: the name of its worked examples. `family`: training on a benchmark of the
    same family makes this one in-domain. `keep`: selects the rows of the repository that belong to the benchmark; None
    keeps all.
    """

    name: str
    title: str
    hub: str
    read: Reader
    grader: str
    few_shot: str
    language: Language = "en"
    config: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    aliases: Sequence[str] = ()
    several: Sequence[str] = ()
    header: Sequence[str] = ()
    family: str = ""
    kind: Literal["number", "formula", "choice", "blanks"] = "number"
    keep: Callable[[Mapping[str, Any]], bool] | None = None

    @property
    def examples(self) -> Sequence[Example]:
        """Worked examples for few-shot prompts."""
        return examples_of(self.few_shot)

    @property
    def shots(self) -> int:
        """Default number of examples in a few-shot prompt."""
        return len(self.examples)


STEM_SUBJECTS = frozenset(
    {
        "abstract_algebra",
        "astronomy",
        "college_biology",
        "college_chemistry",
        "college_computer_science",
        "college_mathematics",
        "college_physics",
        "computer_security",
        "conceptual_physics",
        "electrical_engineering",
        "elementary_mathematics",
        "high_school_biology",
        "high_school_chemistry",
        "high_school_computer_science",
        "high_school_mathematics",
        "high_school_physics",
        "high_school_statistics",
        "machine_learning",
    }
)


def is_stem(row: Mapping[str, Any]) -> bool:
    """Whether the subject of an MMLU row is a STEM subject; also true if the row names no subject."""
    subject = row.get("subject", row.get("topic"))
    return subject is None or str(subject).replace(" ", "_").lower() in STEM_SUBJECTS


SPLITS = frozenset({"train", "auxiliary_train", "test", "validation", "val", "dev"})


_ONLY_TEST = {"test": "test"}


_IN_TRAIN = {"test": "train"}  # test sets whose repository calls its only split "train"


ALL_BENCHMARKS = (
    Benchmark(
        "gsm8k", "GSM8K", "openai/gsm8k", read_number, "numeric_answer", "word_problems",
        config="main", aliases=("gsm8k", "grade_school_math"),
    ),
    Benchmark(
        "math", "MATH", "DigitalLearningGmbH/MATH-lighteval", read_formula, "math_answer", "competition",
        aliases=("math", "hendrycks_math", "competition_math", "math_500", "math500"), kind="formula",
        several=("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory",
                 "prealgebra", "precalculus"),
    ),
    Benchmark(
        "mgsm-zh", "MGSM-zh", "juletxara/mgsm", read_number, "numeric_answer", "chinese_word_problems", "zh",
        options={"revision": "refs/convert/parquet", "data_dir": "zh"}, splits=_ONLY_TEST, aliases=("mgsm_zh",),
        header=("question", "answer"),
    ),
    Benchmark(
        "cmath", "CMATH", "weitianwen/cmath", read_number, "numeric_answer", "chinese_word_problems", "zh",
        splits=_ONLY_TEST, aliases=("cmath",),
    ),
    Benchmark(
        "sat", "SAT mathematics, May 2023", "mcaleste/sat_multiple_choice_math_may_23", read_choice, "choice",
        "choices", splits=_IN_TRAIN, aliases=("sat", "sat_math", "math_sat"), kind="choice",
    ),
    Benchmark(
        "ocw", "OCWCourses", "math-ai/minervamath", read_formula, "ocw", "science",
        splits=_ONLY_TEST, aliases=("ocw", "ocwcourses", "ocw_courses"), family="ocw", kind="formula",
    ),
    Benchmark(
        "minerva", "Minerva Math, another copy of OCWCourses", "math-ai/minervamath", read_formula, "ocw",
        "science", splits=_ONLY_TEST, aliases=("minerva", "minerva_math", "minervamath"), family="ocw",
        kind="formula",
    ),
    Benchmark(
        "mmlu-stem", "MMLU, the 18 STEM subjects", "cais/mmlu", read_choice, "choice",
        "choices", config="all", splits={"test": "test", "validation": "validation"},
        aliases=("mmlu_stem", "mmlu"), kind="choice", keep=is_stem, several=sorted(STEM_SUBJECTS),
        header=("question", "A", "B", "C", "D", "answer"),
    ),
    Benchmark(
        "gaokao-mathcloze", "AGIEval Gaokao, fill in the blank", "hails/agieval-gaokao-mathcloze", read_formula,
        "math_answer", "chinese_blanks", "zh", splits=_ONLY_TEST, aliases=("gaokao_mathcloze", "gaokao_math_cloze"),
        kind="blanks",
    ),
    Benchmark(
        "gaokao-mathqa", "AGIEval Gaokao, multiple choice", "hails/agieval-gaokao-mathqa", read_choice, "choice",
        "chinese_choices", "zh", splits=_ONLY_TEST, aliases=("gaokao_mathqa", "gaokao_math_qa"), kind="choice",
    ),
    Benchmark(
        "svamp", "SVAMP", "ChilleD/SVAMP", read_number, "numeric_answer", "word_problems", aliases=("svamp",)
    ),
    Benchmark(
        "asdiv", "ASDiv", "EleutherAI/asdiv", read_number_or_words, "word_problem", "word_problems",
        splits={"test": "validation"}, aliases=("asdiv",),
    ),
    Benchmark(
        "mawps", "MAWPS", "MU-NLPC/Calc-mawps", read_number, "numeric_answer", "word_problems",
        splits={"train": "train", "test": "test", "validation": "validation"}, aliases=("mawps",),
        several=("singleop", "addsub", "multiarith", "singleeq", "simuleq", "singleop_test"),
    ),
    Benchmark(
        "gsm-hard", "GSM-Hard", "reasoning-machines/gsm-hard", read_number, "numeric_answer", "word_problems",
        splits=_IN_TRAIN, aliases=("gsm_hard", "gsmhard", "gsmhardv2"),
    ),
    Benchmark(
        "aqua", "AQuA-RAT", "deepmind/aqua_rat", read_choice, "choice", "choices", config="raw",
        splits={"train": "train", "test": "test", "validation": "validation"}, aliases=("aqua", "aqua_rat"),
        kind="choice",
    ),
    Benchmark(
        "aime", "AIME 2024", "Maxwell-Jia/AIME_2024", read_formula, "math_answer", "competition", splits=_IN_TRAIN,
        aliases=("aime", "aime_2024", "aime2024", "aime24", "aime_24", "aime_2024_problems", "aime_2025", "aime2025",
                 "aime25", "aime_25"), several=("aime2025_i", "aime2025_ii"), kind="formula",
    ),
)  # fmt: skip


BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in ALL_BENCHMARKS}


# Other names of the training split of a family.
COPIES = {
    "openai/gsm8k": "gsm8k", "gsm8k/main": "gsm8k", "EleutherAI/hendrycks_math": "math", "hendrycks/competition_math":
    "math", "lighteval/MATH": "math", "nlile/hendrycks-MATH-benchmark": "math",
} | {benchmark.hub: benchmark.name for benchmark in reversed(ALL_BENCHMARKS)}  # fmt: skip


def default_grader(task: str) -> str:
    """Name of the grader for the answers of a task if the recipe names none."""
    if task in BENCHMARKS:
        return BENCHMARKS[task].grader
    return "reasoning_gym" if task.startswith("reasoning-gym/") else "numeric_answer"


def domain(task: str, trained: Collection[str]) -> Literal["in-domain", "out-of-domain"]:
    """Whether the training tasks include this task or, for benchmarks, another one of its family.

    `trained`: task names as in a recipe. GSM8K's test split is in-domain if gsm8k was trained on, under that name or
    its repository's; MGSM-zh, the same questions in Chinese, is not (as in DeepSeekMath).
    """
    return "in-domain" if _family(task) in {_family(name) for name in trained} else "out-of-domain"


def _family(task: str) -> str:
    name = re.sub(r"(?:#\d+)?(?: \(held out\))?$", "", task)
    name = COPIES.get(name, name)
    return BENCHMARKS[name].family or name if name in BENCHMARKS else name
