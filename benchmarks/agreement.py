"""Question by question, gruppo beside lm-evaluation-harness: benchmarks/agreement.py --data gsm8k_test.jsonl.

The same model in float32, the same prompts through the same chat template, greedy, cut at the same length. The harness
extracts and compares as its task gsm8k does (its filters strict-match and flexible-extract); gruppo's answers are
judged by the same two rules, and by its own grader. Every difference is printed. The environment of the harness is made
by `make .venv-lmeval/.ready`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench import ROOT
from works import linked

from gruppo.config.loading import load_recipe
from gruppo.evaluation.runner import hold, open_eval_sets
from gruppo.utils.progress import NullProgress
from gruppo.utils.signals import Stop

# As the task gsm8k of lm-evaluation-harness has them.
STRICT, FLEXIBLE = r"#### (\-?[0-9\.\,]+)", r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
IGNORED = [",", r"\$", r"(?s).*#### ", r"\.$"]
TASK = """task: gruppo_agreement
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: []
  do_sample: false
  max_gen_toks: {tokens}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: false
    regexes_to_ignore: {ignored}
filter_list:
  - name: strict-match
    filter:
      - function: regex
        regex_pattern: {strict}
      - function: take_first
  - name: flexible-extract
    filter:
      - function: regex
        group_select: -1
        regex_pattern: {flexible}
      - function: take_first
metadata:
  version: 1
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the test set of GSM8K, a .jsonl file")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--harness-python", type=Path, default=ROOT / ".venv-lmeval/bin/python")
    given = parser.parse_args()
    task = {"name": "gsm8k", "options": {"data": str(given.data)}}
    settings = {"task": task, "questions": given.questions, "max_tokens": given.max_tokens}
    recipe = load_recipe({"model": {"name": given.model, "dtype": "float32"}, "evaluation": settings})
    opened = open_eval_sets(recipe, NullProgress(), ExitStack())
    exam = opened.exams[0]
    with tempfile.TemporaryDirectory(prefix="gruppo-agreement-") as held:
        theirs = harness(given, linked(opened.source, Path(held) / "model").location, exam.prompts, Path(held))
    ours = hold(exam, opened.engine, 0, NullProgress(), Stop())
    same_text, counts, odd = 0, {"strict-match": [0, 0], "flexible-extract": [0, 0]}, []
    for prompt, (completion,), (verdict,) in zip(exam.prompts, ours.answers, ours.verdicts, strict=True):
        sample = theirs[prompt.id]
        equal = sample["text"] == completion.text
        same_text += equal
        for name, pattern in (("strict-match", STRICT), ("flexible-extract", FLEXIBLE)):
            mine = as_harness(completion.text, str(prompt.columns["answer"]), pattern)
            counts[name] = [counts[name][0] + sample[name], counts[name][1] + mine]
            if mine != sample[name]:
                odd.append(f"{prompt.id}: {name}: harness {sample[name]}, gruppo {mine}; texts equal: {equal}")
        if verdict.correct != sample["flexible-extract"]:
            odd.append(
                f"{prompt.id}: gruppo's grader says {verdict.correct} ({verdict.rule}: {verdict.extracted}), the "
                f"harness's flexible-extract {sample['flexible-extract']}; reference {prompt.columns['answer']}"
            )
    total = len(exam.prompts)
    print(f"{same_text} of {total} answers are the same text")
    for name, (harness_right, our_right) in counts.items():
        print(f"{name}: harness {harness_right} right, the same rule on gruppo's answers {our_right}, of {total}")
    print(f"gruppo's grader: {sum(ours.correct)} right of {total}\n")
    print("\n".join(odd) or "no differences")


def harness(given: argparse.Namespace, model: str, prompts: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """The harness's samples, by prompt id."""
    rows = [
        {"id": prompt.id, "text": prompt.content[-1]["content"], "answer": str(prompt.columns["answer"])}
        for prompt in prompts
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = folder / "tasks"
    tasks.mkdir()
    fields = {"strict": json.dumps(STRICT), "flexible": json.dumps(FLEXIBLE), "ignored": json.dumps(IGNORED)}
    (tasks / "gruppo_agreement.yaml").write_text(TASK.format(file=data, tokens=given.max_tokens, **fields))
    command = [
        given.harness_python, "-m", "lm_eval", "run", "--model", "hf", "--model_args",
        f"pretrained={model},dtype=float32", "--tasks", "gruppo_agreement", "--include_path", tasks, "--device", "cpu",
        "--batch_size", "16", "--apply_chat_template", "--log_samples", "--output_path", folder / "out",
    ]  # fmt: skip
    subprocess.run([str(each) for each in command], check=True)
    found: dict[str, dict[str, Any]] = {}
    for file in (folder / "out").rglob("samples_*.jsonl"):
        for line in file.read_text().splitlines():
            sample = json.loads(line)
            own = found.setdefault(sample["doc"]["id"], {"text": sample["resps"][0][0]})
            own[sample["filter"]] = bool(sample["exact_match"])
    return found


def as_harness(text: str, answer: str, pattern: str) -> bool:
    """What the harness's regex filter and exact_match make of a text: the first match of strict-match, the last of
    flexible-extract."""
    matches = re.findall(pattern, text)
    found = "[invalid]"
    if matches:
        match = matches[-1 if pattern == FLEXIBLE else 0]
        found = next((part for part in match if part), "") if isinstance(match, tuple) else match
        found = found.strip()
    for each in IGNORED:
        found, answer = re.sub(each, "", found), re.sub(each, "", answer)
    return found.lower() == answer.lower()


if __name__ == "__main__":
    main()
