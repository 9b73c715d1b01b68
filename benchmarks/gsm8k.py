"""Greedy answers to GSM8K beside vLLM for CPUs, alternately and in one go: benchmarks/gsm8k.py --data gsm8k_test.jsonl.

Both read the same token ids and answer the same questions, some at a time, in bfloat16, until the model ends its turn
or at --max-tokens. vLLM is loaded and warm before its first time is taken. Linux; the environment of the peer is made
by `make .venv-vllm/.ready`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench import ROOT, Bench
from works import linked

from gruppo.config.loading import load_recipe
from gruppo.evaluation.runner import answer, open_eval_sets
from gruppo.evaluation.sets import EvalSet
from gruppo.evaluation.verdicts import mark
from gruppo.types import Completion
from gruppo.utils.progress import NullProgress
from gruppo.utils.signals import Stop

Turn = tuple[range, dict[str, Any], list[list[Completion]], float]  # questions, vLLM's answers, ours, our seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the test set of GSM8K, a .jsonl file")
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--at-once", type=int, default=128, help="questions a turn of each side")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--vllm-python", type=Path, default=ROOT / ".venv-vllm/bin/python")
    given = parser.parse_args()
    task = {"name": "gsm8k", "options": {"data": str(given.data)}}
    settings = {"task": task, "questions": given.questions, "max_tokens": given.max_tokens}
    recipe = load_recipe({"model": {"name": given.model, "dtype": "bfloat16"}, "evaluation": settings})
    begun = time.perf_counter()
    opened = open_eval_sets(recipe, NullProgress(), ExitStack())
    ours_loaded, exam = time.perf_counter() - begun, opened.exams[0]
    longest = max((prompt.token_ids for prompt in exam.prompts), key=len)
    with tempfile.TemporaryDirectory(prefix="gruppo-bench-") as held:
        folder = Path(held)
        model = linked(opened.source, folder / "model").location
        work = {"model": model, "prompts": [longest], "lengths": [[1]], "max_tokens": given.max_tokens}
        (folder / "work.json").write_text(json.dumps(work))
        bench = Bench(argparse.Namespace(quick=False, vllm_python=given.vllm_python), folder)
        with bench.start_on("vllm", folder / "work.json", json.dumps({"block_size": 32})) as side:
            side.call("warm")
            turns: list[Turn] = []
            for start in range(0, len(exam.prompts), given.at_once):
                places = range(start, min(start + given.at_once, len(exam.prompts)))
                asked = [list(exam.prompts[place].token_ids) for place in places]
                theirs = side.call("answer", prompts=asked, tokens=given.max_tokens)
                begun = time.perf_counter()
                mine = answer(opened.engine, exam, places, 0, NullProgress(), Stop())
                seconds = time.perf_counter() - begun
                turns.append((places, theirs, mine, seconds))
                peer = theirs["seconds"]
                print(f"{len(places)} questions: vllm {peer:.1f} s, gruppo {seconds:.1f} s", flush=True)
            loaded = side.load_seconds
    tabulate(exam, turns, {"vllm": loaded, "gruppo": ours_loaded}, opened.policy.tokenizer.decode)


def tabulate(exam: EvalSet, turns: Sequence[Turn], loads: dict[str, float], decode: Callable[..., str]) -> None:
    """Print the table: rates, and accuracies of both sides by gruppo's grader."""
    right, tokens, same = dict.fromkeys(loads, 0), dict.fromkeys(loads, 0), 0
    seconds = {"vllm": sum(turn[1]["seconds"] for turn in turns), "gruppo": sum(turn[3] for turn in turns)}
    for places, theirs, mine, _ in turns:
        for place, peer_ids, (completion,) in zip(places, theirs["token_ids"], mine, strict=True):
            prompt = exam.prompts[place]
            texts = {"vllm": decode(peer_ids, skip_special_tokens=True), "gruppo": completion.text}
            same += tuple(peer_ids) == completion.token_ids
            for name, ids in (("vllm", peer_ids), ("gruppo", completion.token_ids)):
                right[name] += mark(texts[name], prompt, exam.graders[prompt.task]).correct
                tokens[name] += len(ids)
    count, most = len(exam.prompts), exam.options.max_tokens
    ratio = statistics.median(theirs["seconds"] / own for _, theirs, _, own in turns)
    print(f"\n{count} questions of GSM8K, greedy, at most {most} tokens, {len(os.sched_getaffinity(0))} cores")
    print("\n| side | s | questions/s | tokens/s | accuracy | s to load |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, load in loads.items():
        print(
            f"| {name} | {seconds[name]:.1f} | {count / seconds[name]:.2f} | {tokens[name] / seconds[name]:.0f} | "
            f"{right[name] / count:.1%} | {load:.0f} |"
        )
    print(f"\n{ratio:.2f} times as fast as vllm (median of turns); {same} of {count} answers are the same tokens")


if __name__ == "__main__":
    main()
