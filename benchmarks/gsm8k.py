"""Compare greedy decoding on GSM8K with vLLM for CPU in one run: benchmarks/gsm8k.py --data gsm8k_test.jsonl.

Both sides get the same token ids and answer the same questions in bfloat16, in alternating batches, until the model
ends its turn or reaches --max-tokens. vLLM is loaded and warmed up before it is timed. Linux only.
`make .venv-vllm/.ready` creates the environment of vLLM.
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
from gruppo.evaluation.runner import open_eval_sets, sample_answers
from gruppo.evaluation.sets import EvalSet
from gruppo.evaluation.verdicts import grade_answer
from gruppo.types import Completion
from gruppo.utils.progress import NullProgress
from gruppo.utils.signals import Stop

Turn = tuple[
    range, dict[str, Any], list[list[Completion]], float
]  # questions, vLLM's answer, our completions, our seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="test set of GSM8K, a .jsonl file")
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--at-once", type=int, default=128, help="questions per batch")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--vllm-python", type=Path, default=ROOT / ".venv-vllm/bin/python")
    args = parser.parse_args()
    task = {"name": "gsm8k", "options": {"data": str(args.data)}}
    settings = {"task": task, "questions": args.questions, "max_tokens": args.max_tokens}
    recipe = load_recipe({"model": {"name": args.model, "dtype": "bfloat16"}, "evaluation": settings})
    load_start = time.perf_counter()
    opened = open_eval_sets(recipe, NullProgress(), ExitStack())
    our_load, eval_set = time.perf_counter() - load_start, opened.eval_sets[0]
    longest = max((prompt.token_ids for prompt in eval_set.prompts), key=len)
    with tempfile.TemporaryDirectory(prefix="gruppo-bench-") as name:
        folder = Path(name)
        model = linked(opened.source, folder / "model").location
        work = {"model": model, "prompts": [longest], "lengths": [[1]], "max_tokens": args.max_tokens}
        (folder / "work.json").write_text(json.dumps(work))
        bench = Bench(argparse.Namespace(quick=False, vllm_python=args.vllm_python), folder)
        setting = {"dtype": "bfloat16", "block_size": 32}
        with bench.start_on("vllm", folder / "work.json", json.dumps(setting)) as side:
            side.call("warm")
            turns: list[Turn] = []
            for start in range(0, len(eval_set.prompts), args.at_once):
                places = range(start, min(start + args.at_once, len(eval_set.prompts)))
                prompts = [list(eval_set.prompts[place].token_ids) for place in places]
                theirs = side.call("answer", prompts=prompts, tokens=args.max_tokens)
                turn_start = time.perf_counter()
                mine = sample_answers(opened.engine, eval_set, places, 0, NullProgress(), Stop())
                seconds = time.perf_counter() - turn_start
                turns.append((places, theirs, mine, seconds))
                peer = theirs["seconds"]
                print(f"{len(places)} questions: vllm {peer:.1f} s, gruppo {seconds:.1f} s", flush=True)
            peer_load = side.load_seconds
    tabulate(eval_set, turns, {"vllm": peer_load, "gruppo": our_load}, opened.policy.tokenizer.decode)


def tabulate(eval_set: EvalSet, turns: Sequence[Turn], loads: dict[str, float], decode: Callable[..., str]) -> None:
    """Print the table: rates of both sides, and their accuracies by gruppo's grader."""
    correct, tokens, same = dict.fromkeys(loads, 0), dict.fromkeys(loads, 0), 0
    seconds = {"vllm": sum(turn[1]["seconds"] for turn in turns), "gruppo": sum(turn[3] for turn in turns)}
    for places, theirs, mine, _ in turns:
        for place, peer_ids, (completion,) in zip(places, theirs["token_ids"], mine, strict=True):
            prompt = eval_set.prompts[place]
            texts = {"vllm": decode(peer_ids, skip_special_tokens=True), "gruppo": completion.text}
            same += tuple(peer_ids) == completion.token_ids
            for name, ids in (("vllm", peer_ids), ("gruppo", completion.token_ids)):
                correct[name] += grade_answer(texts[name], prompt, eval_set.graders[prompt.task]).correct
                tokens[name] += len(ids)
    count, max_tokens = len(eval_set.prompts), eval_set.options.max_tokens
    ratio = statistics.median(theirs["seconds"] / our_seconds for _, theirs, _, our_seconds in turns)
    print(f"\n{count} questions of GSM8K, greedy, at most {max_tokens} tokens, {len(os.sched_getaffinity(0))} cores")
    print("\n| side | s | questions/s | tokens/s | accuracy | load, s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, load in loads.items():
        print(
            f"| {name} | {seconds[name]:.1f} | {count / seconds[name]:.2f} | {tokens[name] / seconds[name]:.0f} | "
            f"{correct[name] / count:.1%} | {load:.0f} |"
        )
    print(
        f"\n{ratio:.2f} times as fast as vllm (median over batches); {same} of {count} completions have the same tokens"
    )


if __name__ == "__main__":
    main()
