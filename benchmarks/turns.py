"""Measure what the turns of conversations cost: `.venv/bin/python benchmarks/turns.py`, ten minutes on two cores.

Episodes of several turns run through the native engine, all together. In each turn, the model writes a fixed number of
tokens, and a fixed number of others follows. One side lets the engine keep keys and values between turns; the other
computes each conversation again, as a request of its own. Sides alternate, after a conversation to warm up. Printed for
each turn and in all: the prompt tokens that were computed, the seconds for them, the seconds of the whole turn, and
the processor's seconds, which other processes on the machine change least.

--episodes, --turns, --prompt, --written, --observed: of a conversation. --rounds: measurements of each side.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from typing import Any

from works import MODEL, SEED

from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.native.attention import DecodingAttention
from gruppo.engines.native.engine import NativeEngine
from gruppo.models.loading import find_model, load_model
from gruppo.models.policy import LanguageModel

GROUP = 8
SIDES = {"again": False, "kept": True}


class Computed:
    """Counts and times what is computed besides decoding steps."""

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0
        hidden_states = LanguageModel.hidden_states

        def counted(policy: LanguageModel, token_ids: Any, positions: Any, plan: Any) -> Any:
            began = time.perf_counter()
            states = hidden_states(policy, token_ids, positions, plan)
            if not isinstance(plan, DecodingAttention):
                self.tokens += token_ids.numel()
                self.seconds += time.perf_counter() - began
            return states

        LanguageModel.hidden_states = counted  # type: ignore[method-assign]


def random_ids(generator: random.Random, count: int) -> tuple[int, ...]:
    return tuple(generator.randrange(100, 40000) for _ in range(count))


def converse(policy: LanguageModel, keep: bool, shape: argparse.Namespace, computed: Computed) -> list[dict[str, Any]]:
    """Run all turns. Returns for each of them the tokens and seconds that it took."""
    generator = random.Random(SEED)
    engine = NativeEngine(policy, shape.episodes)
    prompts = [random_ids(generator, shape.prompt) for _ in range(-(-shape.episodes // GROUP))]
    known = [prompts[episode // GROUP] for episode in range(shape.episodes)]
    params = SamplingParams(1.0, shape.written, min_tokens=shape.written)
    turns = []
    for turn in range(shape.turns):
        requests = requests_of(known, turn, shape.prompt if keep else None, keep and turn + 1 < shape.turns)
        tokens, seconds, began, used = computed.tokens, computed.seconds, time.perf_counter(), time.process_time()
        sampled = [completion for group in engine.generate(requests, params) for completion in group]
        turns.append(
            {
                "computed": computed.tokens - tokens,
                "computing_seconds": computed.seconds - seconds,
                "seconds": time.perf_counter() - began,
                "processor_seconds": time.process_time() - used,
            }
        )
        known = [
            (*ids, *completion.token_ids, *random_ids(generator, shape.observed))
            for ids, completion in zip(known, sampled, strict=True)
        ]
    return turns


def requests_of(known: Sequence[tuple[int, ...]], turn: int, shared: int | None, keep: bool) -> list[Request]:
    """A request for each conversation; in the first turn, when they are equal, for each group."""
    streams = [(SEED, turn, episode) for episode in range(len(known))]
    step = GROUP if turn == 0 else 1
    return [
        Request(known[first], streams[first : first + step], shared=shared, keep=keep, continues=turn > 0)
        for first in range(0, len(known), step)
    ]


def summed(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {name: sum(turn[name] for turn in turns) for name in turns[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"episodes": 32, "turns": 8, "prompt": 128, "written": 32, "observed": 32, "rounds": 2}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--model", default=MODEL)
    shape = parser.parse_args()
    policy, computed = load_model(find_model(shape.model)), Computed()
    warm = argparse.Namespace(**vars(shape) | {"episodes": GROUP, "turns": 2})
    for keep in SIDES.values():
        converse(policy, keep, warm, computed)
    best: dict[str, list[dict[str, Any]]] = {}  # by side, of all rounds
    for _ in range(shape.rounds):
        for name, keep in SIDES.items():
            turns = converse(policy, keep, shape, computed)
            print(json.dumps({"side": name, "round": summed(turns)}), flush=True)
            if name not in best or summed(turns)["seconds"] < summed(best[name])["seconds"]:
                best[name] = turns
    for name, turns in best.items():
        for turn, measured in enumerate(turns):
            print(json.dumps({"side": name, "turn": turn + 1, **measured}))
        print(json.dumps({"side": name, "all": summed(turns)}))


if __name__ == "__main__":
    main()
