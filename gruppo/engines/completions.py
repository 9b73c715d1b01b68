"""What every engine does with the tokens that it samples: checks of requests, text, completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from gruppo.engines.base import Request
from gruppo.errors import RunError
from gruppo.types import Completion, FinishReason
from gruppo.utils.token_text import text_of


def check_requests(requests: Sequence[Request]) -> None:
    """Raise ValueError for requests that `Engine.stream` refuses."""
    for request in requests:
        if not request.token_ids:
            raise ValueError("the prompt of a request has no tokens; give at least one")
        if request.limits is not None and (
            len(request.limits) != len(request.streams) or min(request.limits, default=1) < 1
        ):
            raise ValueError(
                f"limits of a request = {list(request.limits)}: must be one for each of its {len(request.streams)} "
                "streams, and all at least 1"
            )
        if not 0 <= request.written <= len(request.token_ids):
            raise ValueError(f"written of a request = {request.written}: it has {len(request.token_ids)} tokens")
        if request.shared is not None and not 1 <= request.shared <= len(request.token_ids):
            raise ValueError(
                f"shared of a request = {request.shared}: must be at least 1, and at most its {len(request.token_ids)} "
                "tokens"
            )


class NonFiniteError(RunError):
    """The engine's log-probabilities are infinite or NaN."""

    def __init__(self) -> None:
        super().__init__(
            "the log-probabilities of the model are not finite: its weights have diverged or are damaged, or the "
            "temperature is too low for them; start again with a lower optimizer.learning_rate"
        )


@dataclass(frozen=True)
class CompletionText:
    """The text of completions. `eos_ids`: all token ids that end a turn."""

    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]

    def of(self, request: Request, tokens: Sequence[int]) -> str:
        """The text of the written tokens and of the sampled `tokens`, without the EOS token at their end."""
        before = len(request.token_ids) - request.written
        tokens = [*request.token_ids[before:], *tokens]
        ended = tokens[-1:] and tokens[-1] in self.eos_ids
        return text_of(self.tokenizer, tokens[:-1] if ended else tokens, request.token_ids[:before])


def make_completion(
    text: CompletionText,
    request: Request,
    tokens: Sequence[int],
    logprobs: Sequence[float],
    text_end: int | None,
    version: int,
) -> Completion:
    """The completion of sampled tokens. `text_end`: where a stop string ended its text, if one did."""
    stopped = tokens[-1] in text.eos_ids or text_end is not None
    reason: FinishReason = "stop" if stopped else "length"
    return Completion(
        token_ids=tuple(tokens),
        sampling_logprobs=tuple(logprobs),
        mask=(True,) * len(tokens),
        finish_reason=reason,
        policy_version=version,
        text=text.of(request, tokens)[:text_end],
    )
