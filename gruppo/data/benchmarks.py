"""Benchmark rows, from the hub or from local copies, with zero-shot, few-shot or tool prompts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from gruppo.data.benchmark_files import find_files
from gruppo.data.benchmark_rows import read_row
from gruppo.data.benchmark_table import BENCHMARKS, FORMATS, PROMPTS, Benchmark, Language
from gruppo.data.few_shot import Example
from gruppo.data.files import first_values, read_file
from gruppo.data.options import LETTERS
from gruppo.errors import UsageError
from gruppo.types import Message, Row
from gruppo.utils.paths import is_dir, is_file, user_path
from gruppo.utils.progress import Progress


def load_benchmark(
    name: str,
    split: str,
    limit: int,
    progress: Progress,
    data: str | None = None,
    prompt: str = "zero-shot",
    shots: int | None = None,
    format: str = "chat",  # noqa: A002  the name of the option
) -> Iterator[Row]:
    """Yield the rows of a benchmark with their prompts.

    `limit`: memory of a row or file in bytes, see `read_file`. `data`: a file, or a folder that contains a file with
    one of the usual names; None reads from the hub. `prompt`: "zero-shot", "few-shot" (`shots` examples before the
    question) or "tool" (the model writes Python and gets its output back). `format`: "chat" for messages, "text" for
    base models. Raises UsageError for impossible options, missing data and rows that cannot be read.
    """
    benchmark = BENCHMARKS[name]
    if split not in benchmark.splits:
        has = " or ".join(f'"{split_name}"' for split_name in benchmark.splits)
        reason = "nothing to train on" if split == "train" else "no such split"
        raise UsageError(f'split = "{split}": {benchmark.title} has {reason}; write {has}')
    ask = _asker(benchmark, prompt, shots, format)
    number = 0
    for place, row in _source_rows(benchmark, split, data, limit, progress):
        try:
            read = read_row(benchmark.read, row)
        except UsageError as error:
            raise UsageError(f"{place} {error}") from None
        number += 1
        yield {"prompt": ask(read), **read}
    if not number:
        raise UsageError(f"{benchmark.title} has no rows in {data or benchmark.hub}; give a file with rows")


def _source_rows(
    benchmark: Benchmark, split: str, data: str | None, limit: int, progress: Progress
) -> Iterator[tuple[str, Row]]:
    """Yield the rows as their source has them, each with its location for error messages."""
    if data is None:
        from gruppo.data.hub import read_dataset

        options = {**({"name": benchmark.config} if benchmark.config else {}), **benchmark.options}
        yield from _placed(
            benchmark, benchmark.hub, read_dataset(benchmark.hub, benchmark.splits[split], options, limit, progress)
        )
        return
    if not isinstance(data, str) or not data:
        raise UsageError(f'options.data = {data!r}: must be the path of a file or folder; write e.g. data = "data"')
    folder = user_path(data)
    if is_dir(folder) and any(is_file(folder / name) for name in ("state.json", "dataset_dict.json")):
        from gruppo.data.hub import read_dataset

        yield from _placed(benchmark, data, read_dataset(data, split, {}, limit, progress))
        return
    for file, part in find_files(benchmark, folder, split):
        options = {"header": benchmark.header} if _lacks_header(benchmark, file) else {}
        for place, row in _placed(benchmark, file.name, read_file(file, options, limit, progress)):
            yield place, {**row, "part": part} if part else row


def _lacks_header(benchmark: Benchmark, file: Path) -> bool:
    """Whether the first line of a CSV or TSV file is already a row.

    It is if it has as many values as the benchmark has columns and the last value looks like an answer.
    """
    if not benchmark.header or file.suffix.lower() not in (".csv", ".tsv"):
        return False
    values = first_values(file)
    return len(values) == len(benchmark.header) and bool(re.fullmatch(r"[A-Z]|-?\d[\d.,]*", values[-1].strip()))


def _placed(benchmark: Benchmark, name: str, rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(rows, start=1):
        if benchmark.keep is None or benchmark.keep(row):
            yield f"{name}, row {number}", row


def _asker(benchmark: Benchmark, prompt: str, shots: int | None, format_: str) -> Callable[[Row], str | list[Message]]:
    """Return the function that turns a row into a prompt. Raises UsageError for impossible options."""
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
    """Render the examples as user and assistant messages, followed by the question."""
    messages: list[Message] = []
    for shot in shots:
        messages += [
            {"role": "user", "content": f"{_asked(shot.question, shot.choices)}\n\n{instruction}"},
            {"role": "assistant", "content": _worked(shot, words)},
        ]
    return [
        *messages,
        {"role": "user", "content": f"{_asked(row['question'], row.get('choices', ()))}\n\n{instruction}"},
    ]


def _as_text(row: Row, instruction: str, shots: Sequence[Example], words: Mapping[str, str]) -> str:
    """Render a prompt for models without a chat template: instruction, examples, question and an opened answer."""
    parts = [instruction]
    for shot in shots:
        parts.append(
            f"{words['question']}{_asked(shot.question, shot.choices)}\n{words['answer']}{_worked(shot, words)}"
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
