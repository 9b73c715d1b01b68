"""llama.cpp's side: it decodes all completions together, with its own samplers, on all cores this process may use.

The setting names the GGUF file, which is next to the work file, and how llama.cpp keeps what it reads:

- `dtype`: the name of the file, such as "q8_0".
- `unified`: sequences share one buffer of keys and values, and the cells of the prompts in it. Without it, each
  sequence has a buffer of its own, into which its prompt is copied: a token attends to the cells of its buffer.
- `as_in_file`: weights stay as they are in the file. Without it, llama.cpp may rearrange them for the processor.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import llama_cpp as llama
import numpy as np
from protocol import Channel, read_work, versions

# sequence, place of the token in the completion, row of the batch that has its logits -> token
Choose = Callable[[int, int, int], int]


class Sequences:
    """All completions of a work. The j-th completion of prompt p is sequence j·P + p, where P is the number of prompts.

    So the prompts are computed in the consecutive sequences 0 to P - 1, which llama.cpp puts into one micro-batch.
    """

    def __init__(self, work: dict[str, Any], setting: dict[str, Any], file: Path) -> None:
        self.prompts, self.size, self.end = work["prompts"], len(work["lengths"][0]), work["end_id"]
        self.count, longest = len(self.prompts) * self.size, work["max_tokens"]
        prompt_tokens = sum(map(len, self.prompts))
        logging.getLogger("llama-cpp-python").setLevel(logging.WARNING)
        llama.llama_backend_init()
        model_params = llama.llama_model_default_params()
        model_params.use_extra_bufts = not setting.get("as_in_file", False)
        model = llama.llama_model_load_from_file(str(file).encode(), model_params)
        params = llama.llama_context_default_params()
        params.kv_unified = setting.get("unified", False)
        params.n_ctx = self.count * longest + prompt_tokens * (1 if params.kv_unified else self.size)
        params.n_seq_max = self.count
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        self.context = llama.llama_init_from_model(model, params) if model else None
        if self.context is None:
            sys.exit(f"llama.cpp cannot load {file.name}")
        self.memory = llama.llama_get_memory(self.context)
        self.batch = llama.llama_batch_init(max(prompt_tokens, self.count), 0, 1)
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self.sampler = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        llama.llama_sampler_chain_add(self.sampler, llama.llama_sampler_init_temp(1.0))
        llama.llama_sampler_chain_add(self.sampler, llama.llama_sampler_init_dist(work["seed"]))

    def sample(self, tokens: int) -> list[list[list[int]]]:
        """Sample `tokens` tokens of every completion. End tokens do not end it."""
        return self._decode_all(tokens, lambda _, __, row: llama.llama_sampler_sample(self.sampler, self.context, row))

    def score(self, completions: Sequence[Sequence[Sequence[int]]]) -> list[list[list[float]]]:
        """The log-probabilities of given completions, computed as those of sampled ones are."""
        found: list[list[list[float]]] = [[[] for _ in group] for group in completions]

        def choose(sequence: int, place: int, row: int) -> int:
            index, prompt = divmod(sequence, len(self.prompts))
            token_ids = completions[prompt][index]
            if place >= len(token_ids):
                return int(self.end)  # the completion is over, and others are not
            pointer = llama.llama_get_logits_ith(self.context, row)
            logits = np.ctypeslib.as_array(pointer, shape=(self.vocabulary,)).astype(np.float64)
            top = logits.max()
            logprob = logits[token_ids[place]] - top - math.log(np.exp(logits - top).sum())
            found[prompt][index].append(float(logprob))
            return token_ids[place]

        self._decode_all(max(len(token_ids) for group in completions for token_ids in group), choose)
        return found

    def _decode_all(self, tokens: int, choose: Choose) -> list[list[list[int]]]:
        """Decode `tokens` tokens of every completion. The result has one row per prompt."""
        prompts, every = self.prompts, range(self.count)
        llama.llama_memory_clear(self.memory, False)
        self._decode(
            [
                (token, position, sequence, position == len(prompt) - 1)
                for sequence, prompt in enumerate(prompts)
                for position, token in enumerate(prompt)
            ]
        )
        last = [end - 1 for end in accumulate(map(len, prompts))]
        chosen = [[choose(sequence, 0, last[sequence % len(prompts)])] for sequence in every]
        for sequence in every[len(prompts) :]:
            llama.llama_memory_seq_cp(self.memory, sequence % len(prompts), sequence, -1, -1)
        for place in range(1, tokens):
            starts = [len(prompts[sequence % len(prompts)]) - 1 for sequence in every]
            self._decode([(chosen[sequence][-1], starts[sequence] + place, sequence, True) for sequence in every])
            for sequence in every:
                chosen[sequence].append(choose(sequence, place, sequence))
        return [chosen[prompt :: len(prompts)] for prompt in range(len(prompts))]

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Compute a batch. A row is a token, its position, its sequence, and whether its logits are wanted."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for number, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[number] = token
            batch.pos[number] = position
            batch.n_seq_id[number] = 1
            batch.seq_id[number][0] = sequence
            batch.logits[number] = wanted
        if code := llama.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode of {len(rows)} tokens failed with {code}")


def instructions() -> str:
    """What llama.cpp was compiled with, such as "AVX2 FMA LLAMAFILE OPENMP"."""
    switches = llama.llama_print_system_info().decode().split(":")[-1].split("|")
    return " ".join(
        name.strip() for name, _, value in (switch.partition("=") for switch in switches) if value.strip() == "1"
    )


def main() -> None:
    channel, work, setting = Channel(), read_work(), json.loads(sys.argv[2])
    sequences = Sequences(work, setting, Path(sys.argv[1]).with_name(f"{setting['dtype']}.gguf"))

    def step(tokens: int) -> dict[str, Any]:
        """Sample all completions once."""
        start = time.perf_counter()
        completions = sequences.sample(tokens)
        seconds = time.perf_counter() - start
        lengths = [[len(token_ids) for token_ids in group] for group in completions]
        return {"seconds": seconds, "phases": {"generation": seconds}, "lengths": lengths}

    about = versions("llama-cpp-python") | {"compiled with": instructions()}
    channel.reply(versions=about, threads=len(os.sched_getaffinity(0)))
    for command in channel:
        if command["command"] == "warm":
            first = step(1)["seconds"]
            step(work["max_tokens"])
            channel.reply(first_token=first)
        elif command["command"] == "score":
            channel.reply(logprobs=sequences.score(command["completions"]))
        else:
            channel.reply(**step(work["max_tokens"]))


if __name__ == "__main__":
    main()
