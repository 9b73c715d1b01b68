"""TRL's `rollout_func`: a function of the script that samples a step's completions, in place of the trainer.

    rollout_func(prompts, trainer) -> {"prompt_ids": …, "completion_ids": …, "logprobs": …, "env_mask": …, NAME: …}

As in TRL, it is called once per step with the prompts of all completions, each prompt `num_generations` times in a row,
and returns one entry per completion in every list. What else it returns, reward functions get by name.

π_old is computed by the trainer, as always. `logprobs` are those with which the tokens were sampled. Tokens whose
`env_mask` is 0 were not sampled by the model, and are not trained on. A group has one prompt, so if the `prompt_ids` of
its completions differ, the prompt is what they begin with in common, and the rest is at the start of each completion,
like tokens whose `env_mask` is 0.
"""

from __future__ import annotations

import copy
import math
import operator
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

from gruppo.data.tokenization import ENDING, prompt_tokens
from gruppo.engines.base import Engine, Request, SamplingParams
from gruppo.errors import RunError, UsageError
from gruppo.rewards.loading import OFFERED
from gruppo.rollout.episodes import Episodes
from gruppo.rollout.multi_turn import common_prefix
from gruppo.rollout.workers.reward_main import describe_error
from gruppo.trl.recipes import sampling_options
from gruppo.types import Completion, Episode, Prompt
from gruppo.utils.progress import Advance, Progress
from gruppo.utils.signals import Stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RolloutFunc = Callable[[list[Any], Any], Mapping[str, Any]]

_REQUIRED = ("prompt_ids", "completion_ids", "logprobs")
_MASK = "env_mask"
_LATER = 8  # marks the random streams of prompts beyond the number of completions of a step
_ROUNDING = 1e-3  # a log-probability may be above 0 by this much


class _Owner(Protocol):
    """What a rollout function's trainer has to have."""

    @property
    def steps_done(self) -> int:
        """Steps of the run so far, which number the versions of the weights."""

    def note(self, text: str) -> None:
        """Show a line."""


def generate_rollout_completions(
    trainer: Any,
    prompts: Sequence[Any],
    *,
    generation_overrides: Mapping[str, Any] | None = None,
    as_chat: bool | None = None,
) -> list[dict[str, Any]]:
    """Sample one completion of each prompt from the policy, inside a rollout function; as TRL's function of this name.

    `prompts`: texts, lists of messages, which are rendered with the chat template, or lists of token ids. Pass the
    prompts of a turn together: they are sampled together. `generation_overrides`: max_tokens and stop, in place of the
    trainer's. `as_chat`: may be left out.

    Returns for each prompt its "prompt_ids", "completion_ids", the "logprobs" (nats) with which these tokens were
    sampled, and their "text" without special tokens and stop strings. A prompt of which the same prompts were sampled
    before in the step gets other random numbers; in another run of the step it gets the same, if the function makes the
    same calls in the same order.

    Raises UsageError outside a rollout function, for options that change the distribution, and for a prompt that
    leaves no room in the model's context.
    """
    rollouts = getattr(trainer, "rollouts", None)
    if not isinstance(rollouts, RolloutFunction) or rollouts.call is None:
        raise UsageError(
            "generate_rollout_completions: no rollout_func is running; call it in the function that you give to "
            "GRPOTrainer(rollout_func=…)"
        )
    if isinstance(prompts, str):
        raise UsageError("prompts: is text; give a list of prompts, here [text]")
    if as_chat and any(isinstance(prompt, str) for prompt in prompts):
        raise UsageError("as_chat = True: a prompt is text; give lists of messages, or as_chat=False")
    return rollouts.call.generate(list(prompts), generation_overrides or {})


@dataclass
class RolloutFunction:
    """A rollout function of a script. See `gruppo.rollout.episodes.Opened`.

    `context`: most tokens of a sequence of the model; `vocabulary`: its number of tokens; `template_options`: what chat
    templates get. `call`: the call in progress.
    """

    function: RolloutFunc
    trainer: _Owner
    context: int
    vocabulary: int
    template_options: Mapping[str, Any] = field(default_factory=dict)
    call: _Call | None = None
    gives_reward: bool = False
    digests: list[str] = field(default_factory=list)
    _said: bool = False

    def tools(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """There are none."""

    def episodes(
        self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], prompts: Iterable[Prompt]
    ) -> RolloutSampler:
        """See `Opened`."""
        return RolloutSampler(self, tokenizer, frozenset({*eos_ids, tokenizer.pad_token_id}))

    def called(self, prompts: list[Any], call: _Call) -> _Returned:
        """What the function returns for these prompts. Raises RunError if it raises, or returns something unusable."""
        self.call = call
        try:
            returned = self.function(prompts, self.trainer)
        except Exception as error:
            why = str(error) if isinstance(error, UsageError) else describe_error(error)
            raise _wrong(f"it raised {why}") from error
        finally:
            self.call = None
        checked = _checked(returned, len(prompts), self.context, self.vocabulary)
        if checked.logprobs is None and not self._said:
            self._said = True
            self.trainer.note(
                "rollout_func returns logprobs = None: the log-probabilities with which the completions were sampled "
                "are not known, so the trainer's stand for them (importance weights are 1)"
            )
        return checked


@dataclass
class _Call:
    """A call of a rollout function, which may sample with the engine. `keys`: random streams of its completions."""

    rollouts: RolloutFunction
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    options: SamplingParams
    keys: Sequence[tuple[int, ...]]
    advance: Advance
    sampled: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)  # functions play episodes in threads

    def generate(self, prompts: Sequence[Any], overrides: Mapping[str, Any]) -> list[dict[str, Any]]:
        """See `generate_rollout_completions`."""
        params = self._params(overrides)
        requests: dict[tuple[int, ...], list[int]] = {}
        for place, prompt in enumerate(prompts):
            requests.setdefault(self._ids(prompt), []).append(place)
        room = {ids: min(params.max_tokens, self.rollouts.context - len(ids)) for ids in requests}
        if full := [len(ids) for ids, left in room.items() if left < 1]:
            raise UsageError(
                f"generate_rollout_completions: a prompt has {max(full)} tokens, and the model's context is "
                f"{self.rollouts.context}; shorten it"
            )
        with self.lock:
            streams = [self._stream(self.sampled + place) for place in range(len(prompts))]
            self.sampled += len(prompts)
            found = self.engine.generate(
                [
                    Request(ids, [streams[place] for place in places], [room[ids]] * len(places))
                    for ids, places in requests.items()
                ],
                params,
                self.advance,
            )
        results: dict[int, dict[str, Any]] = {}
        for (ids, places), completions in zip(requests.items(), found, strict=True):
            for place, completion in zip(places, completions, strict=True):
                results[place] = {
                    "prompt_ids": list(ids),
                    "completion_ids": list(completion.token_ids),
                    "logprobs": list(completion.sampling_logprobs),
                    "text": completion.text,
                }
        return [results[place] for place in range(len(prompts))]

    def _stream(self, number: int) -> tuple[int, ...]:
        """The random stream of the prompt with this number: first those that completions have without a function."""
        lap, place = divmod(number, len(self.keys))
        return (*self.keys[place], _LATER, lap) if lap else self.keys[place]

    def _ids(self, prompt: Any) -> tuple[int, ...]:
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], Mapping)):
            return tuple(prompt_tokens(prompt, self.tokenizer, None, self.rollouts.template_options))
        try:
            ids = tuple(map(operator.index, prompt))
        except TypeError:
            raise UsageError(
                f"generate_rollout_completions: a prompt is {prompt!r}; give text, messages or a list of token ids"
            ) from None
        if not ids:
            raise UsageError("generate_rollout_completions: a prompt is empty; give at least one token")
        if problem := _outside(ids, self.rollouts.vocabulary):
            raise UsageError(f"generate_rollout_completions: a prompt has {problem}")
        return ids

    def _params(self, overrides: Mapping[str, Any]) -> SamplingParams:
        wanted = sampling_options(overrides, "generation_overrides")
        temperature = wanted.pop("temperature", self.options.temperature)
        if temperature != self.options.temperature:
            raise UsageError(
                f'generation_overrides["temperature"] = {temperature}: the policy is trained at temperature '
                f"{self.options.temperature}; set it in the trainer's args"
            )
        most = wanted.get("max_tokens", 1)
        if not isinstance(most, int) or most < 1:
            raise UsageError(f'generation_overrides["max_tokens"] = {most}: must be a whole number of at least 1')
        stop = tuple(wanted.pop("stop", self.options.stop))
        return replace(self.options, **wanted, stop=stop, keep_stop=False)


@dataclass(frozen=True)
class RolloutSampler(Episodes):
    """Samples with a rollout function. See `Episodes`. `ends`: ids that end a completion."""

    rollouts: RolloutFunction
    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int | None]
    weight: float | None = None

    def play(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        streams: Sequence[Sequence[tuple[int, ...]]],
        options: SamplingParams,
        progress: Progress,
        stop: Stop,
        label: str = "Sampling",
    ) -> tuple[list[Prompt], list[list[Completion]]]:
        """See `Episodes`. Raises RunError if the function raises, or returns something unusable."""
        contents = [copy.deepcopy(prompt.content) for prompt, row in zip(prompts, streams, strict=True) for _ in row]
        keys = [tuple(key) for row in streams for key in row]
        with progress.bar(label, len(keys) * options.max_tokens, "tokens") as show:

            def advance(tokens: float) -> None:
                stop.check()
                show(tokens)

            call = _Call(self.rollouts, self.tokenizer, engine, options, keys, advance)
            returned = self.rollouts.called(contents, call)
        stop.check()
        used, groups, start = [], [], 0
        for prompt, row in zip(prompts, streams, strict=True):
            places = range(start, start := start + len(row))
            shared = common_prefix([returned.prompt_ids[place] for place in places])
            if not shared:
                raise _wrong(
                    f"prompt_ids of the completions {places[0]} to {places[-1]}, which belong to one prompt, differ in "
                    "their first token; start them with the same token"
                )
            same = all(len(returned.prompt_ids[place]) == len(shared) for place in places)
            ending = str(self.tokenizer.decode(list(shared[-ENDING:]), skip_special_tokens=False)) if same else ""
            used.append(replace(prompt, token_ids=shared, ending=ending))
            groups.append([self._completion(returned, place, len(shared), same) for place in places])
        return used, groups

    def _completion(self, returned: _Returned, place: int, shared: int, same: bool) -> Completion:
        """The completion at `place`, of whose prompt the first `shared` tokens are the group's prompt."""
        rest, ids = returned.prompt_ids[place][shared:], returned.completion_ids[place]
        mask = (True,) * len(ids) if returned.mask is None else returned.mask[place]
        unknown = tuple(math.nan if sampled else 0.0 for sampled in mask)
        logprobs = unknown if returned.logprobs is None else returned.logprobs[place]
        columns = {name: values[place] for name, values in returned.columns.items()}
        if not same:
            columns["completion_ids"] = list(ids)  # reward functions get it as it was returned
        return Completion(
            token_ids=(*rest, *ids),
            sampling_logprobs=(*[0.0] * len(rest), *logprobs),
            mask=(*[False] * len(rest), *mask),
            finish_reason="stop" if ids[-1] in self.ends else "length",
            policy_version=self.rollouts.trainer.steps_done,
            text=str(self.tokenizer.decode(list(ids), skip_special_tokens=True)),
            episode=Episode(turns=sum(not sampled for sampled, _ in groupby(mask)), columns=columns),
        )

    def notify_of_restarts(self, notify: Callable[[str], None]) -> None:
        """Does nothing: there is no process that could be started again."""


@dataclass(frozen=True)
class _Returned:
    """What a rollout function returned, with one entry per completion, and one per token in `completion_ids`,
    `logprobs` and `mask`. `columns`: for reward functions."""

    prompt_ids: list[tuple[int, ...]]
    completion_ids: list[tuple[int, ...]]
    logprobs: list[tuple[float, ...]] | None
    mask: list[tuple[bool, ...]] | None
    columns: dict[str, Sequence[Any]]


def _wrong(what: str) -> RunError:
    return RunError(f"rollout_func: {what}; fix the function, and continue with train(resume_from_checkpoint=True)")


def _checked(returned: Any, count: int, context: int, vocabulary: int) -> _Returned:
    """What a rollout function returned for `count` prompts. Raises RunError for anything that cannot be trained on."""
    if not isinstance(returned, Mapping):
        raise _wrong(f"it returned a {type(returned).__name__}; return a dict with {', '.join(_REQUIRED)}")
    if missing := [name for name in _REQUIRED if name not in returned]:
        hint = '; write "logprobs": None if they are not known' if missing == ["logprobs"] else ""
        raise _wrong(f"it returned no {', '.join(missing)}{hint}")
    prompt_ids = _rows(returned, "prompt_ids", count, operator.index)
    completion_ids = _rows(returned, "completion_ids", count, operator.index)
    for name, rows in (("prompt_ids", prompt_ids), ("completion_ids", completion_ids)):
        for place, ids in enumerate(rows):
            if not ids:
                raise _wrong(f"{name}[{place}] is empty; return at least one token")
            if problem := _outside(ids, vocabulary):
                raise _wrong(f"{name}[{place}] has {problem}")
    for place, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        if len(prompt) + len(completion) > context:
            raise _wrong(
                f"completion {place} has {len(prompt)} + {len(completion)} tokens with its prompt, and the model's "
                f"context is {context}; end the episode earlier"
            )
    mask = None
    if returned.get(_MASK) is not None:
        mask = _per_token(returned, _MASK, completion_ids, float)
        for place, row in enumerate(mask):
            if strange := [value for value in row if value not in (0, 1)]:
                raise _wrong(f"{_MASK}[{place}] has the value {strange[0]:g}; write 1 for tokens of the model, else 0")
    logprobs = None
    if returned["logprobs"] is not None:
        logprobs = _sampled(_per_token(returned, "logprobs", completion_ids, float), mask)
    return _Returned(
        prompt_ids,
        completion_ids,
        logprobs,
        None if mask is None else [tuple(map(bool, row)) for row in mask],
        _columns(returned, count),
    )


def _outside(ids: Iterable[int], vocabulary: int) -> str | None:
    """What is wrong with token ids of which one is not in the vocabulary."""
    outside = next((token for token in ids if not 0 <= token < vocabulary), None)
    return None if outside is None else f"the token {outside}; the model has the tokens 0 to {vocabulary - 1}"


def _rows(returned: Mapping[str, Any], name: str, count: int, kind: Callable[[Any], Any]) -> list[tuple[Any, ...]]:
    """A list of lists of numbers, one list per completion."""
    rows = _listed(returned[name])
    if not isinstance(rows, list):
        raise _wrong(f"{name} is a {type(rows).__name__}; return a list with one list per completion")
    if len(rows) != count:
        raise _wrong(
            f"{name} has {len(rows)} entries for {count} prompts; return one per prompt (each prompt comes as often as "
            "it needs completions)"
        )
    try:
        return [tuple(kind(value) for value in _listed(row)) for row in rows]
    except (TypeError, ValueError) as error:
        raise _wrong(f"{name} is not a list of lists of numbers ({error})") from None


def _per_token(
    returned: Mapping[str, Any], name: str, ids: Sequence[Sequence[int]], kind: Callable[[Any], Any]
) -> list[tuple[Any, ...]]:
    """As `_rows`, with one number per token of each completion."""
    rows = _rows(returned, name, len(ids), kind)
    for place, (row, tokens) in enumerate(zip(rows, ids, strict=True)):
        if len(row) != len(tokens):
            raise _wrong(
                f"{name}[{place}] has {len(row)} values for the {len(tokens)} tokens of completion_ids[{place}]; "
                "return one per token"
            )
    return rows


def _sampled(rows: Sequence[tuple[float, ...]], mask: Sequence[tuple[int, ...]] | None) -> list[tuple[float, ...]]:
    """Log-probabilities of sampled tokens, and 0 for others."""
    found = []
    for place, row in enumerate(rows):
        used = (
            row
            if mask is None
            else [value if sampled else 0.0 for value, sampled in zip(row, mask[place], strict=True)]
        )
        for token, value in enumerate(used):
            if not (math.isfinite(value) and value <= _ROUNDING):
                raise _wrong(
                    f"logprobs[{place}][{token}] is {value}; a log-probability is a finite number of at most 0: write "
                    '"logprobs": None if they are not known'
                )
        found.append(tuple(used))
    return found


def _columns(returned: Mapping[str, Any], count: int) -> dict[str, Sequence[Any]]:
    """What reward functions get: a list with one value per completion, or one value for all."""
    columns: dict[str, Sequence[Any]] = {}
    for name, value in returned.items():
        if name in (*_REQUIRED, _MASK):
            continue
        if name in OFFERED or not isinstance(name, str):
            raise _wrong(f"it returned {name!r}, which reward functions get from the trainer; give it another name")
        values = _listed(value)
        if isinstance(values, list) and len(values) != count:
            raise _wrong(f"{name} has {len(values)} values for {count} completions; return one per completion")
        columns[name] = values if isinstance(values, list) else [value] * count
    return columns


def _listed(value: Any) -> Any:
    """A tensor, an array or a tuple as a list; anything else as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value
