"""Compare gruppo with lm-evaluation-harness question by question: benchmarks/agreement.py --data gsm8k_test.jsonl.

Both use the same model in float32 and the same prompts through the same chat template, decode greedily and truncate at
the same length. The harness extracts and compares answers as its task gsm8k does (filters strict-match and
flexible-extract). gruppo's completions are graded by the same two rules and by gruppo's grader. Every difference is
printed. `make .venv-lmeval/.ready` creates the environment of the harness.
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
from gruppo.evaluation.runner import open_eval_sets, run_eval_set
from gruppo.utils.progress import NullProgress
from gruppo.utils.signals import Stop

# Copied from the task gsm8k of lm-evaluation-harness.
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
    parser.add_argument("--data", type=Path, required=True, help="test set of GSM8K, a .jsonl file")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--harness-python", type=Path, default=ROOT / ".venv-lmeval/bin/python")
    args = parser.parse_args()
    task = {"name": "gsm8k", "options": {"data": str(args.data)}}
    settings = {"task": task, "questions": args.questions, "max_tokens": args.max_tokens}
    recipe = load_recipe({"model": {"name": args.model, "dtype": "float32"}, "evaluation": settings})
    opened = open_eval_sets(recipe, NullProgress(), ExitStack())
    eval_set = opened.eval_sets[0]
    with tempfile.TemporaryDirectory(prefix="gruppo-agreement-") as folder:
        model = linked(opened.source, Path(folder) / "model").location
        theirs = harness(args, model, eval_set.prompts, Path(folder))
    ours = run_eval_set(eval_set, opened.engine, 0, NullProgress(), Stop())
    same_text, counts, differences = 0, {"strict-match": [0, 0], "flexible-extract": [0, 0]}, []
    for prompt, (completion,), (verdict,) in zip(eval_set.prompts, ours.answers, ours.verdicts, strict=True):
        sample = theirs[prompt.id]
        equal = sample["text"] == completion.text
        same_text += equal
        for name, pattern in (("strict-match", STRICT), ("flexible-extract", FLEXIBLE)):
            mine = as_harness(completion.text, str(prompt.columns["answer"]), pattern)
            counts[name] = [counts[name][0] + sample[name], counts[name][1] + mine]
            if mine != sample[name]:
                differences.append(f"{prompt.id}: {name}: harness {sample[name]}, gruppo {mine}; texts equal: {equal}")
        if verdict.correct != sample["flexible-extract"]:
            differences.append(
                f"{prompt.id}: gruppo's grader: {verdict.correct} ({verdict.rule}: {verdict.extracted}); the harness's "
                f"flexible-extract: {sample['flexible-extract']}; reference {prompt.columns['answer']}"
            )
    total = len(eval_set.prompts)
    print(f"{same_text} of {total} completions have the same text")
    for name, (harness_correct, our_correct) in counts.items():
        print(
            f"{name}: {harness_correct} of {total} correct by the harness, {our_correct} by the same rule on gruppo's "
            "completions"
        )
    print(f"gruppo's grader: {sum(ours.correct)} of {total} correct\n")
    print("\n".join(differences) or "no differences")


def harness(args: argparse.Namespace, model: str, prompts: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """Run the harness; returns its samples by prompt id: text, and whether each filter counts it as correct."""
    rows = [
        {"id": prompt.id, "text": prompt.content[-1]["content"], "answer": str(prompt.columns["answer"])}
        for prompt in prompts
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = folder / "tasks"
    tasks.mkdir()
    fields = {"strict": json.dumps(STRICT), "flexible": json.dumps(FLEXIBLE), "ignored": json.dumps(IGNORED)}
    (tasks / "gruppo_agreement.yaml").write_text(TASK.format(file=data, tokens=args.max_tokens, **fields))
    command = [
        args.harness_python, "-m", "lm_eval", "run", "--model", "hf", "--model_args",
        f"pretrained={model},dtype=float32", "--tasks", "gruppo_agreement", "--include_path", tasks, "--device", "cpu",
        "--batch_size", "16", "--apply_chat_template", "--log_samples", "--output_path", folder / "out",
    ]  # fmt: skip
    subprocess.run([str(part) for part in command], check=True)
    samples: dict[str, dict[str, Any]] = {}
    for file in (folder / "out").rglob("samples_*.jsonl"):
        for line in file.read_text().splitlines():
            sample = json.loads(line)
            entry = samples.setdefault(sample["doc"]["id"], {"text": sample["resps"][0][0]})
            entry[sample["filter"]] = bool(sample["exact_match"])
    return samples


def as_harness(text: str, answer: str, pattern: str) -> bool:
    """Whether the harness's regex filter and exact_match would count a text as correct.

    strict-match takes the first match, flexible-extract the last one.
    """
    matches = re.findall(pattern, text)
    extracted = "[invalid]"
    if matches:
        match = matches[-1 if pattern == FLEXIBLE else 0]
        extracted = next((part for part in match if part), "") if isinstance(match, tuple) else match
        extracted = extracted.strip()
    for ignored in IGNORED:
        extracted, answer = re.sub(ignored, "", extracted), re.sub(ignored, "", answer)
    return extracted.lower() == answer.lower()


if __name__ == "__main__":
    main()
