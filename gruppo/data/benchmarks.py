"""Public benchmarks by name: where their rows are, how they are asked, how they are graded, what they belong to.

A benchmark comes from the Hugging Face hub, or with `data` from a local file or folder. Its rows get a `prompt` and
keep `question`, `answer` and, where there are options, `choices`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from gruppo.data import few_shot as examples
from gruppo.data.benchmark_rows import read_choice, read_formula, read_number
from gruppo.data.few_shot import Example
from gruppo.data.files import FILES, first_values, read_file
from gruppo.errors import UsageError
from gruppo.rewards.grading.choices import LETTERS
from gruppo.types import Message, Row
from gruppo.utils.paths import is_dir, is_file, user_path
from gruppo.utils.progress import Reporter

Language = Literal["en", "zh"]
Reader = Callable[[Mapping[str, Any]], Row]

PROMPTS = ("zero-shot", "few-shot", "tool")
FORMATS = ("chat", "text")
MOST_LISTED = 12  # files that an error names
MOST_FILES = 20_000  # of a folder that is looked through


@dataclass(frozen=True)
class Benchmark:
    """A public set by its name.

    `hub`: its repository, `config` and `options` what else `load_dataset` needs; `splits`: ours and theirs. `aliases`:
    how its files are called, `several`: that several such files make it up, `header`: the columns of copies in CSV or
    TSV that do not name them. `read`: a row of any of its copies as question, answer, choices. `shots`: the usual
    number of `examples` in a few-shot prompt. `family`: training on a set of the same family makes it in-domain.
    `keep`: which rows of the repository belong to it.
    """

    name: str
    title: str
    hub: str
    read: Reader
    grader: str
    examples: Sequence[Example]
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
    def shots(self) -> int:
        """How many examples a few-shot prompt has, unless it is told otherwise."""
        return len(self.examples)


_STEM = frozenset(
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


def _is_stem(row: Mapping[str, Any]) -> bool:
    subject = row.get("subject", row.get("topic"))
    return subject is None or str(subject).replace(" ", "_").lower() in _STEM


_SPLITS = frozenset({"train", "auxiliary_train", "test", "validation", "val", "dev"})
_ONLY_TEST = {"test": "test"}
_IN_TRAIN = {"test": "train"}  # sets to test with whose repository calls their only part "train"

_ALL = (
    Benchmark(
        "gsm8k", "GSM8K", "openai/gsm8k", read_number, "number", examples.WORD_PROBLEMS,
        config="main", aliases=("gsm8k", "grade_school_math"),
    ),
    Benchmark(
        "math", "MATH", "DigitalLearningGmbH/MATH-lighteval", read_formula, "math", examples.COMPETITION,
        aliases=("math", "hendrycks_math", "competition_math", "math_500", "math500"), kind="formula",
        several=("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory",
                 "prealgebra", "precalculus"),
    ),
    Benchmark(
        "mgsm-zh", "MGSM-zh", "juletxara/mgsm", read_number, "number", examples.CHINESE_WORD_PROBLEMS, "zh",
        options={"revision": "refs/convert/parquet", "data_dir": "zh"}, splits=_ONLY_TEST, aliases=("mgsm_zh",),
        header=("question", "answer"),
    ),
    Benchmark(
        "cmath", "CMATH", "weitianwen/cmath", read_number, "number", examples.CHINESE_WORD_PROBLEMS, "zh",
        splits=_ONLY_TEST, aliases=("cmath",),
    ),
    Benchmark(
        "sat", "SAT mathematics, May 2023", "mcaleste/sat_multiple_choice_math_may_23", read_choice, "choice",
        examples.CHOICES, splits=_IN_TRAIN, aliases=("sat", "sat_math", "math_sat"), kind="choice",
    ),
    Benchmark(
        "ocw", "OCWCourses", "math-ai/minervamath", read_formula, "ocw", examples.SCIENCE,
        splits=_ONLY_TEST, aliases=("ocw", "ocwcourses", "ocw_courses"), family="ocw", kind="formula",
    ),
    Benchmark(
        "minerva", "Minerva Math, another copy of OCWCourses", "math-ai/minervamath", read_formula, "ocw",
        examples.SCIENCE, splits=_ONLY_TEST, aliases=("minerva", "minerva_math", "minervamath"), family="ocw",
        kind="formula",
    ),
    Benchmark(
        "mmlu-stem", "MMLU, its 18 subjects of science and technology", "cais/mmlu", read_choice, "choice",
        examples.CHOICES, config="all", splits={"test": "test", "validation": "validation"},
        aliases=("mmlu_stem", "mmlu"), kind="choice", keep=_is_stem, several=sorted(_STEM),
        header=("question", "A", "B", "C", "D", "answer"),
    ),
    Benchmark(
        "gaokao-mathcloze", "AGIEval Gaokao, blanks", "hails/agieval-gaokao-mathcloze", read_formula, "math",
        examples.CHINESE_BLANKS, "zh", splits=_ONLY_TEST, aliases=("gaokao_mathcloze", "gaokao_math_cloze"),
        kind="blanks",
    ),
    Benchmark(
        "gaokao-mathqa", "AGIEval Gaokao, multiple choice", "hails/agieval-gaokao-mathqa", read_choice, "choice",
        examples.CHINESE_CHOICES, "zh", splits=_ONLY_TEST, aliases=("gaokao_mathqa", "gaokao_math_qa"), kind="choice",
    ),
    Benchmark(
        "svamp", "SVAMP", "ChilleD/SVAMP", read_number, "number", examples.WORD_PROBLEMS, aliases=("svamp",)
    ),
    Benchmark(
        "asdiv", "ASDiv", "EleutherAI/asdiv", read_number, "number", examples.WORD_PROBLEMS,
        splits={"test": "validation"}, aliases=("asdiv",),
    ),
    Benchmark(
        "mawps", "MAWPS", "MU-NLPC/Calc-mawps", read_number, "number", examples.WORD_PROBLEMS,
        splits={"train": "train", "test": "test", "validation": "validation"}, aliases=("mawps",),
        several=("singleop", "addsub", "multiarith", "singleeq", "simuleq", "singleop_test"),
    ),
    Benchmark(
        "gsm-hard", "GSM-Hard", "reasoning-machines/gsm-hard", read_number, "number", examples.WORD_PROBLEMS,
        splits=_IN_TRAIN, aliases=("gsm_hard", "gsmhard", "gsmhardv2"),
    ),
    Benchmark(
        "aqua", "AQuA-RAT", "deepmind/aqua_rat", read_choice, "choice", examples.CHOICES, config="raw",
        splits={"train": "train", "test": "test", "validation": "validation"}, aliases=("aqua", "aqua_rat"),
        kind="choice",
    ),
    Benchmark(
        "aime", "AIME 2024", "Maxwell-Jia/AIME_2024", read_formula, "math", examples.COMPETITION, splits=_IN_TRAIN,
        aliases=("aime", "aime_2024", "aime2024", "aime24", "aime_24", "aime_2024_problems", "aime_2025", "aime2025",
                 "aime25", "aime_25"), several=("aime2025_i", "aime2025_ii"), kind="formula",
    ),
)  # fmt: skip

BENCHMARKS: dict[str, Benchmark] = {each.name: each for each in _ALL}

# Other names under which the training part of a family is known.
_COPIES = {
    "openai/gsm8k": "gsm8k", "gsm8k/main": "gsm8k", "EleutherAI/hendrycks_math": "math", "hendrycks/competition_math":
    "math", "lighteval/MATH": "math", "nlile/hendrycks-MATH-benchmark": "math",
} | {each.hub: each.name for each in reversed(_ALL)}  # fmt: skip


def default_grader(task: str) -> str:
    """The name of the grader that a task's answers are graded by where none is asked for."""
    if task in BENCHMARKS:
        return BENCHMARKS[task].grader
    return "reasoning_gym" if task.startswith("reasoning-gym/") else "number"


def domain(task: str, trained: Collection[str]) -> Literal["in-domain", "out-of-domain"]:
    """Whether a task is of the kind that was trained on: itself, or for benchmarks a set of its family.

    `trained`: names of tasks as in a recipe. GSM8K's test part is in-domain where gsm8k was trained on, by that name or
    its repository's; MGSM-zh, the same questions in Chinese, is not (as in DeepSeekMath).
    """
    return "in-domain" if _family(task) in {_family(each) for each in trained} else "out-of-domain"


def _family(task: str) -> str:
    name = re.sub(r"(?:#\d+)?(?: \(held out\))?$", "", task)
    name = _COPIES.get(name, name)
    return BENCHMARKS[name].family or name if name in BENCHMARKS else name


def load_benchmark(
    name: str,
    split: str,
    reporter: Reporter,
    data: str | None = None,
    prompt: str = "zero-shot",
    shots: int | None = None,
    format: str = "chat",  # noqa: A002  the word of the option
) -> Iterator[Row]:
    """Rows of a benchmark with their prompts.

    `data`: a file, or a folder that has one with a usual name; without it the hub's. `prompt`: "zero-shot", "few-shot"
    (`shots` examples before the question) or "tool" (Python, whose output the model gets back). `format`: "chat" for
    messages, "text" for base models. Raises UsageError.
    """
    benchmark = BENCHMARKS[name]
    if split not in benchmark.splits:
        has = " or ".join(f'"{each}"' for each in benchmark.splits)
        reason = "nothing to train on" if split == "train" else "no such part"
        raise UsageError(f'split = "{split}": {benchmark.title} has {reason}; write {has}')
    ask = _asker(benchmark, prompt, shots, format)
    number = 0
    for place, row in _source(benchmark, split, data, reporter):
        try:
            read = benchmark.read(row)
        except UsageError as error:
            raise UsageError(f"{place} {error}") from None
        number += 1
        yield {"prompt": ask(read), **read}
    if not number:
        raise UsageError(f"{benchmark.title} has no rows in {data or benchmark.hub}; give a file with rows")


def _source(benchmark: Benchmark, split: str, data: str | None, reporter: Reporter) -> Iterator[tuple[str, Row]]:
    """The rows as their source has them, each with its place for errors."""
    if data is None:
        from gruppo.data.hub import read_dataset

        options = {**({"name": benchmark.config} if benchmark.config else {}), **benchmark.options}
        yield from _placed(
            benchmark, benchmark.hub, read_dataset(benchmark.hub, benchmark.splits[split], options, reporter)
        )
        return
    if not isinstance(data, str) or not data:
        raise UsageError(f'options.data = {data!r}: must be the path of a file or folder; write e.g. data = "data"')
    folder = user_path(data)
    if is_dir(folder) and any(is_file(folder / name) for name in ("state.json", "dataset_dict.json")):
        from gruppo.data.hub import read_dataset

        yield from _placed(benchmark, data, read_dataset(data, split, {}, reporter))
        return
    for file, part in find_files(benchmark, folder, split):
        options = {"header": benchmark.header} if _lacks_header(benchmark, file) else {}
        for place, row in _placed(benchmark, file.name, read_file(file, options, reporter)):
            yield place, {**row, "part": part} if part else row


def _lacks_header(benchmark: Benchmark, file: Path) -> bool:
    """Whether a file's first line is a row already: as many values as the set has columns, of which the last is an
    answer."""
    if not benchmark.header or file.suffix.lower() not in (".csv", ".tsv"):
        return False
    values = first_values(file)
    return len(values) == len(benchmark.header) and bool(re.fullmatch(r"[A-Z]|-?\d[\d.,]*", values[-1].strip()))


def _placed(benchmark: Benchmark, name: str, rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(rows, start=1):
        if benchmark.keep is None or benchmark.keep(row):
            yield f"{name}, row {number}", row


def find_files(benchmark: Benchmark, data: Path, split: str) -> list[tuple[Path, str | None]]:
    """The files of a benchmark in a folder (or the one that `data` is), each with its part of the set where several
    make it up. Raises UsageError where none or several others fit."""
    if is_file(data):
        if data.suffix.lower() not in FILES:
            raise UsageError(
                f'options.data = "{data}": this kind of file is not known; write one of {", ".join(FILES)}'
            )
        return [(data, None)]
    if not is_dir(data):
        raise UsageError(f'options.data = "{data}": there is no such file or folder (looked in {Path.cwd()})')
    found = _listed(data)
    for pattern in _patterns(benchmark, split):
        fitting = {key: files for key, files in found.items() if re.fullmatch(pattern, key)}
        usual = {key: files for key, files in fitting.items() if benchmark.config in key.split("/")}
        fitting = usual or fitting  # the configuration that the hub's rows are of, beside others
        if len(fitting) == 1:
            return [(file, None) for file in next(iter(fitting.values()))]
        if len(fitting) > 1:
            names = [str(file.relative_to(data)) for files in fitting.values() for file in files]
            raise UsageError(
                f'options.data = "{data}": several files there may be {benchmark.title} ({_shown(names)}); '
                "name one of them"
            )
    parts = _parts(benchmark, split, found)
    if parts:
        return parts
    # The folder may be one part's own: MATH/test/algebra, which holds 1.json and so on.
    above = "/".join(_as_key(each) for each in data.resolve().parts[-2:])
    parts = _parts(benchmark, split, {f"{above}/{key}": files for key, files in found.items()})
    if parts:
        return parts
    names = [str(file.relative_to(data)) for files in found.values() for file in files]
    raise UsageError(
        f'options.data = "{data}": no file of {benchmark.title} there; looked for {_looked_for(benchmark, split)} '
        f"(.jsonl, .json, .csv, .tsv or .parquet) and found {_shown(names) or 'no such files'}; name the file itself"
    )


def _listed(folder: Path) -> dict[str, list[Path]]:
    """Data files of a folder by their path in it, in small letters and without endings; the shards of one together."""
    found: dict[str, list[Path]] = {}
    files = list(islice(folder.rglob("*"), MOST_FILES + 1))
    if len(files) > MOST_FILES:
        raise UsageError(
            f'options.data = "{folder}": the folder holds more than {MOST_FILES:,} files; name the data\'s own folder'
        )
    for file in sorted(files):
        if file.suffix.lower() in FILES and is_file(file):
            key = _as_key(file.relative_to(folder).with_suffix("").as_posix())
            found.setdefault(re.sub(r"_\d{5}_of_\d{5}(?:_[0-9a-f]+)?$|/\d{4}$", "", key), []).append(file)
    return found


def _as_key(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")


def _patterns(benchmark: Benchmark, split: str) -> Iterator[str]:
    """What a file of the split may be called, the surest first."""
    own = "|".join(benchmark.aliases)
    theirs = "|".join({split, benchmark.splits[split]} - ({"train"} if split == "test" else set()))
    yield rf"(?:.*/)?(?:{own})[_/.](?:.*/)?(?:{theirs})"
    if split == "test":
        yield rf"(?:.*/)?(?:{own})(?:/(?:{own}))?"
    yield rf"(?:(?:main|data|default|raw|all|zh)/)?(?:{theirs})"


def _parts(benchmark: Benchmark, split: str, found: Mapping[str, list[Path]]) -> list[tuple[Path, str | None]]:
    """The files of a set that is made up of several, each with its part's name."""
    if not benchmark.several:
        return []
    own, parts = "|".join(benchmark.aliases), "|".join(benchmark.several)
    pattern = re.compile(rf"(.*/)?(?:(?:{own})[_/.])?({parts})(?:[_/](\w+))?(?:/\d+)?")
    chosen: list[tuple[Path, str | None]] = []
    for key, files in found.items():
        if named := pattern.fullmatch(key):
            sides = _SPLITS & {*(named[1] or "").split("/"), named[3]}
            if sides & {split, benchmark.splits[split]} or (split == "test" and not sides):
                chosen += [(file, named[2]) for file in files]
    return chosen


def _looked_for(benchmark: Benchmark, split: str) -> str:
    own = benchmark.aliases[0]
    names = [f"{own}_{split}", f"{own}/{split}", *([own] if split == "test" else []), split]
    return ", ".join([*names, *(f"{own}_{part}" for part in benchmark.several[:2])])


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return ", ".join(names[:MOST_LISTED]) + more


def _asker(benchmark: Benchmark, prompt: str, shots: int | None, format_: str) -> Callable[[Row], str | list[Message]]:
    """How a row of the benchmark is asked. Raises UsageError for impossible options."""
    if prompt not in PROMPTS:
        raise UsageError(f"options.prompt = {prompt!r}: must be one of {', '.join(PROMPTS)}")
    if format_ not in FORMATS:
        raise UsageError(f'options.format = {format_!r}: must be "chat" (messages) or "text" (for base models)')
    if shots is not None and prompt != "few-shot":
        raise UsageError(f'options.shots = {shots!r}: only a few-shot prompt has examples; write prompt = "few-shot"')
    most = len(benchmark.examples)
    if shots is not None and (type(shots) is not int or not 1 <= shots <= most):
        raise UsageError(f"options.shots = {shots!r}: {benchmark.title} has 1 to {most} examples")
    chosen = benchmark.examples[: shots or benchmark.shots] if prompt == "few-shot" else ()
    words = _WORDS[benchmark.language]
    instruction = words[f"tool {benchmark.kind}" if prompt == "tool" else benchmark.kind]
    build = _as_chat if format_ == "chat" else _as_text
    return lambda row: build(row, instruction, chosen, words)


def _as_chat(row: Row, instruction: str, shots: Sequence[Example], words: Mapping[str, str]) -> list[Message]:
    """Each example as a question of the user's and an answer of the assistant's, then the question itself."""
    messages: list[Message] = []
    for each in shots:
        messages += [
            {"role": "user", "content": f"{_asked(each.question, each.choices)}\n\n{instruction}"},
            {"role": "assistant", "content": _worked(each, words)},
        ]
    return [
        *messages,
        {"role": "user", "content": f"{_asked(row['question'], row.get('choices', ()))}\n\n{instruction}"},
    ]


def _as_text(row: Row, instruction: str, shots: Sequence[Example], words: Mapping[str, str]) -> str:
    """For models without a chat template: what to do, the examples, and the question with its answer begun."""
    parts = [instruction]
    for each in shots:
        parts.append(
            f"{words['question']}{_asked(each.question, each.choices)}\n{words['answer']}{_worked(each, words)}"
        )
    parts.append(f"{words['question']}{_asked(row['question'], row.get('choices', ()))}\n{words['answer'].rstrip()}")
    return "\n\n".join(parts)


def _asked(question: str, choices: Sequence[str]) -> str:
    return "\n".join([question, *(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))])


def _worked(example: Example, words: Mapping[str, str]) -> str:
    return f"{example.working} {words['so'].replace('ANSWER', example.answer)}".strip()


_TOOL = (
    "Solve it with the help of Python: write code in a block that begins with ```python and ends with ```. It is run, "
    "and you are given what it prints in a block that begins with ```output; go on from there, with more code where "
    "you need it. "
)
_TOOL_CHINESE = (
    "请借助 Python 解答：把代码写在以 ```python 开头、以 ``` 结尾的代码块中。代码会被运行，输出会写在以 ```output "
    "开头的代码块中交还给你，你可以接着推理，需要时再写代码。"
)
_ENDINGS = {
    "number": "put the final answer, a number alone, in \\boxed{}.",
    "formula": "put the final answer in \\boxed{}.",
    "choice": "put the letter of the right option in \\boxed{}.",
    "blanks": "put the final answer in \\boxed{}, those of several blanks in their order with semicolons between them.",
}
_ENDINGS_CHINESE = {
    "number": "把最终答案（只写数字）放在 \\boxed{} 中。",
    "formula": "把最终答案放在 \\boxed{} 中。",
    "choice": "把正确选项的字母放在 \\boxed{} 中；如有多个正确选项，把字母写在一起。",
    "blanks": "把最终答案放在 \\boxed{} 中；如有多个空，按顺序填写，用分号隔开。",
}
_WORDS: dict[Language, dict[str, str]] = {
    "en": {
        "question": "Question: ",
        "answer": "Answer: ",
        "so": "The answer is $\\boxed{ANSWER}$.",
        **{kind: f"Reason step by step, then {ending}" for kind, ending in _ENDINGS.items()},
        **{f"tool {kind}": f"{_TOOL}At the end {ending}" for kind, ending in _ENDINGS.items()},
    },
    "zh": {
        "question": "问题：",
        "answer": "解答：",
        "so": "答案是 $\\boxed{ANSWER}$。",
        **{kind: f"请一步一步推理，然后{ending}" for kind, ending in _ENDINGS_CHINESE.items()},
        **{f"tool {kind}": f"{_TOOL_CHINESE}最后{ending}" for kind, ending in _ENDINGS_CHINESE.items()},
    },
}
