"""Turns of a conversation: the native engine computes the new tokens of each, and nothing twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.native.attention import DecodingAttention
from gruppo.engines.native.engine import DecodingOptions, NativeEngine, _Decoder
from gruppo.engines.native.kept import Conversation, Conversations, KeptPrompt
from gruppo.engines.resizing import ResizingEngine
from gruppo.models.footprint import measure_footprint
from gruppo.models.policy import LanguageModel
from gruppo.training.memory_estimate import Workload, forecast_memory
from gruppo.types import Completion
from gruppo.utils.oom_retry import BatchSizes
from gruppo.utils.progress import NullProgress
from tests.conftest import END, make_policy
from tests.engines.native.as_on_a_device import EngineAsOnADevice

GROUPS = [(5, 6, 7), (8, 9, 10, 11, 12, 13, 14)]
SIZE, TURNS, MOST = 3, 8, 8
COUNT = SIZE * len(GROUPS)


def observation(turn: int, number: int) -> tuple[int, ...]:
    """What follows a turn of conversation `number`: uneven, and different for each."""
    return tuple(20 + (7 * turn + 3 * number + place) % 20 for place in range(1 + (turn + 5 * number) % 6))


def converse(
    engine: NativeEngine | ResizingEngine, keep: bool = True, turns: int = TURNS, temperature: float = 1.0
) -> list[list[Completion]]:
    """The completions of the conversations, turn by turn."""
    known = [prompt for prompt in GROUPS for _ in range(SIZE)]
    shared = [len(prompt) for prompt in known]
    params, found = SamplingParams(temperature, MOST), []
    for turn in range(turns):
        numbers: dict[tuple[int, ...], list[int]] = {}
        for number, ids in enumerate(known):
            numbers.setdefault(ids, []).append(number)
        requests = [
            Request(
                ids,
                [(turn, number) for number in same],
                shared=shared[same[0]],
                keep=keep and turn < turns - 1,
                continues=turn > 0,
            )
            for ids, same in numbers.items()
        ]
        groups = engine.generate(requests, params)
        completions = {
            number: completion
            for same, group in zip(numbers.values(), groups, strict=True)
            for number, completion in zip(same, group, strict=True)
        }
        found.append([completions[number] for number in range(COUNT)])
        known = [(*ids, *completions[number].token_ids, *observation(turn, number)) for number, ids in enumerate(known)]
    return found


def tokens(turns: Sequence[Sequence[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in turn] for turn in turns]


def largest_difference(one: Sequence[Sequence[Completion]], other: Sequence[Sequence[Completion]]) -> float:
    return max(
        abs(mine - theirs)
        for turn, again in zip(one, other, strict=True)
        for completion, same in zip(turn, again, strict=True)
        for mine, theirs in zip(completion.sampling_logprobs, same.sampling_logprobs, strict=True)
    )


@pytest.fixture
def policy() -> LanguageModel:
    return make_policy(max_position_embeddings=256, initializer_range=0.1)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each computation of prompts or turns."""
    counts: list[int] = []
    hidden_states = LanguageModel.hidden_states

    def counted(self, token_ids, positions, plan):
        if not isinstance(plan, DecodingAttention):
            counts.append(token_ids.numel())
        return hidden_states(self, token_ids, positions, plan)

    monkeypatch.setattr(LanguageModel, "hidden_states", counted)
    return counts


PROMPTS = sum(map(len, GROUPS))
OBSERVED = sum(len(observation(turn, number)) for turn in range(TURNS - 1) for number in range(COUNT))


def test_only_new_tokens_are_computed(policy: LanguageModel, computed: list[int]) -> None:
    """Each prompt once, then the observations, with the last token of each turn, which no step has read."""
    converse(NativeEngine(policy, COUNT))
    assert sum(computed) == PROMPTS + OBSERVED + (TURNS - 1) * COUNT
    assert len(computed) == TURNS, "the conversations of a turn are computed together"


def test_with_a_lag_a_further_step_has_read_the_last_token(policy: LanguageModel, computed: list[int]) -> None:
    converse(NativeEngine(policy, COUNT, DecodingOptions(torch.float32, page_tokens=4, lag=1)))
    assert sum(computed) == PROMPTS + OBSERVED


def test_without_keeping_everything_is_computed_again(policy: LanguageModel, computed: list[int]) -> None:
    turns = converse(NativeEngine(policy, COUNT), keep=False)
    sampled = sum(
        len(completion.token_ids) * (TURNS - 1 - turn) for turn, row in enumerate(turns) for completion in row
    )
    observed = sum(
        len(observation(turn, number)) * (TURNS - 1 - turn) for turn in range(TURNS - 1) for number in range(COUNT)
    )
    assert sum(computed) == TURNS * PROMPTS + sampled + observed, "a prompt once per turn: its group shares it"


@pytest.mark.parametrize("engine", [NativeEngine, EngineAsOnADevice])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_kept_turns_have_the_completions_of_turns_that_are_computed_again(
    engine: Callable[..., NativeEngine], dtype: torch.dtype, temperature: float
) -> None:
    policy = make_policy(dtype, max_position_embeddings=256, initializer_range=0.1)
    kept = converse(engine(policy, COUNT), temperature=temperature)
    again = converse(engine(policy, COUNT), keep=False, temperature=temperature)
    assert tokens(kept) == tokens(again)
    assert 0 < largest_difference(kept, again) < {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]


def test_in_bfloat16_the_difference_is_that_of_the_trainer(policy: LanguageModel) -> None:
    """docs/decisions.md states the bound: 0.05 nats on average. Greedy, up to the first token that differs."""
    narrow = make_policy(torch.bfloat16, max_position_embeddings=256, initializer_range=0.1)
    kept = converse(NativeEngine(narrow, COUNT), temperature=0.0)
    again = converse(NativeEngine(narrow, COUNT), keep=False, temperature=0.0)
    differences, same = [], set(range(COUNT))
    for turn, other in zip(kept, again, strict=True):
        for number in sorted(same):
            pairs = zip(turn[number].sampling_logprobs, other[number].sampling_logprobs, strict=False)
            if turn[number].token_ids != other[number].token_ids:
                same.discard(number)
                continue
            differences += [abs(one - another) for one, another in pairs]
    assert len(differences) > 50
    assert sum(differences) / len(differences) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [2, COUNT])
@pytest.mark.parametrize("engine", [NativeEngine, EngineAsOnADevice])
def test_a_repeated_conversation_is_equal_to_the_last_bit(
    engine: Callable[..., NativeEngine], slots: int, dtype: torch.dtype
) -> None:
    policy = make_policy(dtype, max_position_embeddings=256, initializer_range=0.1)
    assert converse(engine(policy, slots)) == converse(engine(policy, slots))


@pytest.mark.parametrize("engine", [NativeEngine, EngineAsOnADevice])
@pytest.mark.parametrize("slots", [1, 2, 4, 5])
def test_the_number_of_slots_changes_no_token(
    policy: LanguageModel, engine: Callable[..., NativeEngine], slots: int
) -> None:
    few, many = converse(engine(policy, slots)), converse(engine(policy, COUNT))
    assert tokens(few) == tokens(many)
    assert largest_difference(few, many) < 1e-5


def test_as_many_conversations_are_kept_as_there_are_slots(policy: LanguageModel, computed: list[int]) -> None:
    """The first of each call; the others are computed again, behind the prompt that their group shares."""
    engine = NativeEngine(policy, 2)
    (first,) = converse(engine, turns=1)
    assert len(engine.kept) == 0, "nothing follows the last turn"
    engine.generate([Request(GROUPS[0], [(0, number) for number in range(5)], keep=True)], SamplingParams(1.0, MOST))
    assert len(engine.kept) == 2
    engine.sleep()
    del computed[:]
    assert tokens(converse(engine, turns=2))[0] == tokens([first])[0]
    assert len(engine.kept) == 0, "those that were kept have been continued"
    new = [1 + len(observation(0, number)) for number in range(2)]
    again = [len(first[number].token_ids) + len(observation(0, number)) for number in range(2, COUNT)]
    one, other = map(len, GROUPS)
    # How often the second turn computes a prompt depends on whether a completion of its group is unfinished.
    possible = {often * one + times * other for often in (0, 1) for times in (1, 2, 3)}
    assert sum(computed) - (one + other) - sum(new) - sum(again) in possible


@pytest.fixture
def kept_engine(policy: LanguageModel) -> NativeEngine:
    engine = NativeEngine(policy, COUNT)
    engine.generate([Request(GROUPS[0], [(0, 0), (0, 1)], keep=True)], SamplingParams(1.0, MOST))
    assert len(engine.kept) == 2
    return engine


def test_new_weights_and_sleep_forget(kept_engine: NativeEngine) -> None:
    """Keys and values of other weights would go unnoticed."""
    policy = kept_engine.policy
    kept_engine.load_weights(policy.weight_source(), 1)
    assert len(kept_engine.kept) == 0
    kept_engine.generate([Request(GROUPS[0], [(0, 0)], keep=True)], SamplingParams(1.0, MOST))
    assert len(kept_engine.kept) == 1
    kept_engine.sleep()
    assert len(kept_engine.kept) == 0


def test_a_call_that_continues_nothing_forgets(kept_engine: NativeEngine) -> None:
    """So the completions of a step or an evaluation do not depend on what the engine sampled before."""
    params = SamplingParams(1.0, MOST)
    kept_engine.generate([Request((3, 4), [(0, 0)], keep=True), Request((3, 4, 5), [])], params)
    assert len(kept_engine.kept) == 1
    kept_engine.generate([Request((3, 4), [(0, 0)])], params)
    assert len(kept_engine.kept) == 0


def test_a_call_that_ends_early_forgets(kept_engine: NativeEngine) -> None:
    def stop(_: float) -> None:
        raise InterruptedError

    request = Request((3, 4), [(0, 0)], keep=True, continues=True)
    with pytest.raises(InterruptedError):
        kept_engine.generate([request], SamplingParams(1.0, MOST), stop)
    assert len(kept_engine.kept) == 0


def test_without_memory_the_turns_are_computed_again_in_fewer_slots(
    policy: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = converse(NativeEngine(policy, COUNT))
    engine, failures = NativeEngine(policy, COUNT), iter([False, False, True])
    own_states = _Decoder._own_states

    def failing(self, filled):
        if next(failures, False):
            raise MemoryError("no memory")
        return own_states(self, filled)

    monkeypatch.setattr(_Decoder, "_own_states", failing)
    sizes = BatchSizes(1, COUNT)
    found = converse(ResizingEngine(engine, sizes))  # type: ignore[arg-type]
    assert (sizes.slots, next(failures, None)) == (COUNT // 2, None)
    assert tokens(found) == tokens(expected)


@pytest.mark.parametrize("slots", [2, 4, COUNT])
@pytest.mark.parametrize("options", [DecodingOptions(torch.float32), DecodingOptions(torch.float32, page_tokens=4)])
def test_the_memory_estimate_covers_what_is_kept(
    policy: LanguageModel, slots: int, options: DecodingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a call and of what is kept, at any time, if all conversations have the longest prompt and the most tokens."""
    keep, most = _Decoder._keep, 0

    def measured(self, slot):
        nonlocal most
        keep(self, slot)
        stores = self.cache.prompts, self.cache.completions
        pairs = [pair for store in stores for block in store._blocks for pair in block.values()]
        waiting = [job.kept for job in self.jobs if job.kept is not None]
        prompts = {one.prompt for one in (*waiting, *self.kept._kept.values())} | {*self.cache._kept_prompts.values()}
        kept = {*waiting, *self.kept._kept.values(), *prompts}
        pairs += [pair for one in kept for pair in one.pairs.values()]
        most = max(most, sum(tensor.nbytes for pair in pairs for tensor in pair))

    monkeypatch.setattr(_Decoder, "_keep", measured)
    turns = converse(NativeEngine(policy, slots, options))
    prompt, ends = max(map(len, GROUPS)), range(COUNT)
    tokens = MOST + max(
        sum(len(turn[number].token_ids) + len(observation(place, number)) for place, turn in enumerate(turns[:-1]))
        for number in ends
    )
    work = Workload(prompt_tokens=prompt, max_tokens=tokens, prompts_per_step=2, group_size=SIZE, turns=True)
    estimate = forecast_memory(measure_footprint(policy, 0, NullProgress()), work, 256, slots)
    assert estimate.cache / 4 < most <= estimate.cache


def test_completions_of_one_request_may_continue_a_conversation(policy: LanguageModel, computed: list[int]) -> None:
    """Each has the tokens between prompt and completion in its own slot, also where slots are freed one by one."""
    first = Request(GROUPS[0], [(0, 0)], keep=True)
    params = SamplingParams(1.0, MOST)
    found = []
    for slots in (1, 2, 8):
        engine = NativeEngine(policy, slots)
        ((completion,),) = engine.generate([first], params)
        del computed[:]
        ids = (*GROUPS[0], *completion.token_ids, 30, 31)
        request = Request(ids, [(1, number) for number in range(5)], continues=True)
        found.append(engine.generate([request], params))
        assert sum(computed) == 5 * 3
    assert tokens(found[0]) == tokens(found[1]) == tokens(found[2])


def test_a_conversation_may_end_with_the_first_token(policy: LanguageModel, computed: list[int]) -> None:
    """Then only the prompt has keys and values."""
    engine = NativeEngine(policy, 4)
    ((completion,),) = engine.generate([Request(GROUPS[1], [(0, 0)], keep=True)], SamplingParams(1.0, 1))
    ids = (*GROUPS[1], *completion.token_ids, 30, 31)
    del computed[:]
    kept = engine.generate([Request(ids, [(1, 0)], continues=True)], SamplingParams(1.0, MOST))
    assert computed == [3]
    assert tokens(kept) == tokens(NativeEngine(policy, 4).generate([Request(ids, [(1, 0)])], SamplingParams(1.0, MOST)))


def test_long_turns_are_computed_in_parts(
    policy: LanguageModel, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of PREFILL_TOKENS tokens at most, unless one turn has more."""
    expected = converse(NativeEngine(policy, COUNT))
    del computed[:]
    monkeypatch.setattr("gruppo.engines.native.engine.PREFILL_TOKENS", 8)
    assert tokens(converse(NativeEngine(policy, COUNT))) == tokens(expected)
    assert sum(computed) == PROMPTS + OBSERVED + (TURNS - 1) * COUNT
    assert max(computed) <= 8
    assert len(computed) > 2 * TURNS


@pytest.mark.parametrize("shared", [0, 4])
def test_shared_tokens_are_tokens_of_the_request(policy: LanguageModel, shared: int) -> None:
    with pytest.raises(ValueError, match=f"shared of a request = {shared}: must be at least 1, and at most its 3"):
        NativeEngine(policy, 1).generate([Request((1, 2, 3), [(0,)], shared=shared)], SamplingParams(1.0, 1))


def conversation(prompt: Sequence[int], own: Sequence[int]) -> Conversation:
    return Conversation(KeptPrompt(tuple(prompt), {}), tuple(own), {})


@pytest.fixture
def kept() -> Conversations:
    conversations = Conversations()
    for own in ([5], [5, 6], [5, 6, 9], [5, 7], []):
        conversations.put(conversation([1, 2], own), 9)
    return conversations


@pytest.mark.parametrize(
    ("token_ids", "own"),
    [
        ((1, 2, 5, 6, 9, 1), (5, 6, 9)),
        ((1, 2, 5, 6, 9), (5, 6)),  # at least one token has to be computed
        ((1, 2, 5, 6, 8), (5, 6)),
        ((1, 2, 5, 8), (5,)),
        ((1, 2, 9, 9), ()),
        ((1, 2), None),
        ((1, 9, 5), None),
        ((0, 0, 0), None),
        ((), None),
        ((9, 9), None),
    ],
)
def test_the_longest_conversation_is_continued(
    kept: Conversations, token_ids: tuple[int, ...], own: tuple[int, ...] | None
) -> None:
    (found,) = kept.take([token_ids])
    assert (found and found.own) == own
    assert len(kept) == 5 - (found is not None)


def test_one_conversation_may_be_continued_twice_in_a_call(kept: Conversations) -> None:
    one, other = kept.take([(1, 2, 5, 6, 1), (1, 2, 5, 6, 2)])
    assert one is other is not None
    assert kept.take([(1, 2, 5, 6, 1)])[0].own == (5,), "not in a later one"  # type: ignore[union-attr]


def test_the_oldest_conversation_makes_room(kept: Conversations) -> None:
    kept.put(conversation([1, 2], [5]), 5)  # the same tokens: newest now
    kept.put(conversation([3], [END]), 3)
    assert len(kept) == 3
    assert [found and found.own for found in kept.take([(1, 2, 5, 9), (3, END, 1), (1, 2, 5, 7, 1)])] == [
        (5,),
        (END,),
        (5,),
    ]
