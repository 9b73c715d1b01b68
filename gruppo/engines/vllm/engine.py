"""vLLM as an engine: token ids in and out, weights by name, one seed for each stream."""

from __future__ import annotations

import math
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from gruppo.config.engine_section import Engine as EngineTable
from gruppo.config.recipe import Recipe
from gruppo.engines.base import Engine, Request, SamplingParams
from gruppo.engines.completions import (
    CompletionText,
    NonFiniteError,
    check_requests,
    make_completion,
)
from gruppo.engines.stop_strings import StopFinder
from gruppo.engines.vllm.launch import COLDEST, Size, check_recipe, options, start, too_cold, truncates_otherwise
from gruppo.engines.vllm.transfer import choose_transfer
from gruppo.errors import RunError, first_line
from gruppo.models.policy import LanguageModel
from gruppo.models.weights import WeightSource, save_base
from gruppo.types import Completion
from gruppo.utils.progress import Advance
from gruppo.utils.waiting import waiting_for

CLOSING_SECONDS = 10.0  # until processes that do not end are killed
MESSAGE = 300  # characters of an error of vLLM that are shown


@dataclass
class _Sampled:
    """A completion under way: the `number`-th of request `index`. `stops`: None without stop strings."""

    index: int
    number: int
    stops: StopFinder | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class VllmEngine(Engine):
    """See `Engine`.

    vLLM runs in processes of its own. Only the policy's tokenizer is kept. Weights come from `load_weights` alone, so
    the engine can also run where the policy is not. In bfloat16, a completion depends on its neighbors by rounding.
    """

    def __init__(self, policy: LanguageModel, slots: int, length: int, settings: EngineTable, devices: int = 1) -> None:
        """Start vLLM. It has no weights before the first `load_weights`.

        `length`: the longest sequence, a prompt with its completion, in tokens. `devices`: CUDA devices over which vLLM
        splits the model.
        """
        self.slots, self.version = slots, 0
        self.text = CompletionText(policy.tokenizer, policy.eos_ids)
        self._length, self._asleep, self._numbers = length, False, 0
        with tempfile.TemporaryDirectory() as folder:
            save_base(policy, Path(folder))
            arguments = options(Path(folder), policy, settings, Size(slots, length, devices))
            with waiting_for("vLLM to start"):
                self._llm = start(arguments, policy.device, settings)
        self._transfer = choose_transfer(self._llm, policy, settings, devices)
        self._sleeps = bool(arguments.get("enable_sleep_mode"))

    @staticmethod
    def check(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> None:
        """Raise UsageError if this engine cannot be used for the recipe."""
        check_recipe(recipe, device, dtype)

    def stream(
        self, requests: Sequence[Request], params: SamplingParams, advance: Advance | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        """See `Engine`.

        Raises ValueError for temperatures between 0 and 0.01, for top_p with min_p, which vLLM applies in another
        order, and for sequences that are longer than the engine was built for. Raises RunError if vLLM ends.
        """
        check_requests(requests)
        self._check(requests, params)
        self._wake()
        yield from self._groups(requests, params, advance)

    def _check(self, requests: Sequence[Request], params: SamplingParams) -> None:
        if too_cold(params.temperature):
            raise ValueError(f"temperature = {params.temperature:g}: vLLM samples at {COLDEST:g} or more; or write 0")
        if truncates_otherwise(params.temperature, params.top_p, params.min_p):
            raise ValueError(f"min_p = {params.min_p:g}: vLLM applies it before top_p; write only one of them")
        longest = max(
            (len(request.token_ids) + request.limit(number, params) for request in requests
             for number in range(len(request.streams))), default=0,
        )  # fmt: skip
        if longest > self._length:
            raise ValueError(
                f"a prompt and its completion may have {longest} tokens together, and vLLM was started for sequences "
                f"of at most {self._length} tokens"
            )

    def _groups(
        self, requests: Sequence[Request], params: SamplingParams, advance: Advance | None
    ) -> Iterator[tuple[int, list[Completion]]]:
        waiting = deque(
            (index, number) for index, request in enumerate(requests) for number in range(len(request.streams))
        )
        groups: list[list[Completion | None]] = [[None] * len(request.streams) for request in requests]
        yield from ((index, []) for index, group in enumerate(groups) if not group)
        live: dict[str, _Sampled] = {}
        try:
            while waiting or live:
                while waiting and len(live) < self.slots:
                    index, number = waiting.popleft()
                    stops = StopFinder(self.text, requests[index], params) if params.stop else None
                    live[self._add(requests[index], number, params)] = _Sampled(index, number, stops)
                count, finished = self._step(live)
                if advance is not None and count:
                    advance(count)
                for sampled, text_end in finished:
                    group, request = groups[sampled.index], requests[sampled.index]
                    group[sampled.number] = make_completion(
                        self.text, request, sampled.tokens, sampled.logprobs, text_end, self.version
                    )
                    if all(group):
                        yield sampled.index, [completion for completion in group if completion is not None]
        finally:
            if live:
                with suppress(Exception):  # vLLM may be what failed
                    self._llm.llm_engine.abort_request(list(live))

    def _add(self, request: Request, number: int, params: SamplingParams) -> str:
        """Hand the completion of stream `number` to vLLM. Returns its name there."""
        from vllm import SamplingParams as VllmParams
        from vllm.sampling_params import RequestOutputKind

        self._numbers += 1
        name, limit = f"{self._numbers}", request.limit(number, params)
        seed = None
        if params.temperature:
            state = np.random.SeedSequence(tuple(request.streams[number])).generate_state(1, np.uint64)
            seed = int(state[0] >> np.uint64(1))
        wanted = VllmParams(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=seed,
            max_tokens=limit,
            min_tokens=min(params.min_tokens, limit),
            stop_token_ids=list(self.text.eos_ids),
            ignore_eos=True,  # the EOS tokens are those above
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        with _vllm_errors("sampling"):
            self._llm.llm_engine.add_request(name, {"prompt_token_ids": list(request.token_ids)}, wanted)
        return name

    def _step(self, live: dict[str, _Sampled]) -> tuple[int, list[tuple[_Sampled, int | None]]]:
        """Take the tokens of vLLM's next step. Returns their number, and the finished completions with the end of their
        text, if a stop string ended it; these leave `live`."""
        finished, stopped, count = [], [], 0
        with _vllm_errors("sampling"):
            outputs = self._llm.llm_engine.step()
        for output in outputs:
            if output.request_id not in live:
                continue  # of a call that was left early
            (part,) = output.outputs
            sampled, text_end = live[output.request_id], None
            for token, logprobs in zip(part.token_ids, part.logprobs, strict=True):
                sampled.tokens.append(token)
                sampled.logprobs.append(logprobs[token].logprob)
                count += 1
                if not math.isfinite(sampled.logprobs[-1]):
                    raise NonFiniteError
                if sampled.stops is not None and (text_end := sampled.stops.add(token)) is not None:
                    break
            if output.finished or text_end is not None:
                finished.append((live.pop(output.request_id), text_end))
                if not output.finished:
                    stopped.append(output.request_id)
        if stopped:
            with _vllm_errors("sampling"):
                self._llm.llm_engine.abort_request(stopped)
        return count, finished

    def load_weights(self, source: WeightSource, version: int) -> None:
        """See `Engine`. Raises RunError if vLLM refuses the weights."""
        self._wake()
        with _vllm_errors("loading weights"):
            self._transfer.send(source)
            self._llm.reset_prefix_cache()
        self.version = version

    def sleep(self) -> None:
        """See `Engine`: on a device that vLLM shares with the trainer, its weights move to the memory of the host."""
        if self._sleeps and not self._asleep:
            with _vllm_errors("going to sleep"):
                self._llm.sleep(level=1)
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            with _vllm_errors("waking up"):
                self._llm.wake_up()
                self._llm.reset_prefix_cache()  # its keys and values are gone
            self._asleep = False

    def close(self) -> None:
        """See `Engine`."""
        core = self._llm.llm_engine.engine_core
        processes = core.resources.engine_manager.processes
        core.shutdown(timeout=CLOSING_SECONDS)
        for process in processes:
            process.join(CLOSING_SECONDS)


@contextmanager
def _vllm_errors(during: str) -> Iterator[None]:
    """Raise RunError for an error of vLLM, with the start of its message, which can have thousands of characters."""
    try:
        with waiting_for(f"vLLM, {during}"):
            yield
    except Exception as error:
        raise RunError(
            f'engine.name = "vllm": vLLM failed while {during} ({first_line(error)[:MESSAGE]}); its own messages are '
            "above; the last checkpoint is intact: resume the run, with another engine.memory if memory ran out"
        ) from error
