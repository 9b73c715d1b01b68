"""vLLM's side: its CPU engine on all cores that this process may use."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from protocol import Channel, read_work, versions


def main() -> None:
    channel, work, setting = Channel(), read_work(), json.loads(sys.argv[2])
    cores = sorted(os.sched_getaffinity(0))
    os.environ |= {
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=work["model"],
        max_model_len=len(work["prompts"][0]) + work["max_tokens"],
        max_num_seqs=256,
        enable_prefix_caching=True,
        disable_log_stats=True,
        **setting,
    )
    prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in work["prompts"]]

    def step(tokens: int) -> dict[str, Any]:
        """Sample all completions once, ignoring end tokens. Prompts are recomputed, as new weights would require."""
        engine.reset_prefix_cache()
        options = SamplingParams(
            n=len(work["lengths"][0]), temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        outputs = engine.generate(prompts, options, use_tqdm=False)
        seconds = time.perf_counter() - start
        lengths = [[len(completion.token_ids) for completion in output.outputs] for output in outputs]
        return {"seconds": seconds, "phases": {"generation": seconds}, "lengths": lengths}

    def answer(requests: list[list[int]], tokens: int) -> dict[str, Any]:
        """Greedy completions of prompts, until an end token of the model or `tokens` tokens."""
        engine.reset_prefix_cache()
        options = SamplingParams(temperature=0.0, max_tokens=tokens, detokenize=False)
        start = time.perf_counter()
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in requests], options, use_tqdm=False)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "token_ids": [list(output.outputs[0].token_ids) for output in outputs]}

    channel.reply(versions=versions("vllm-cpu", "torch", "transformers"), threads=len(cores))
    for command in channel:
        if command["command"] == "warm":
            first = step(1)["seconds"]
            step(work["max_tokens"])
            channel.reply(first_token=first)
        elif command["command"] == "answer":
            channel.reply(**answer(command["prompts"], command["tokens"]))
        else:
            channel.reply(**step(work["max_tokens"]))


if __name__ == "__main__":
    main()
