"""The contract that every engine must pass. Here the native one does, also as on an accelerator.

`tests/engines/vllm` runs the same tests with vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from gruppo.algorithms.aggregation import sequence_mean_weights
from gruppo.config.engine_section import Engine as EngineTable
from gruppo.engines import build_engine
from gruppo.engines.base import Engine, Request, SamplingParams
from gruppo.models.packing import pack, score
from gruppo.models.policy import LanguageModel
from gruppo.types import Group, Prompt
from tests.architectures import ARCHITECTURES, make_architecture
from tests.conftest import END
from tests.conftest import make_policy as tiny_policy

PROMPTS = [(5, 6, 7), (8,), (9, 10, 11, 12, 13, 14, 15), (5, 6, 7)]

MakeEngine = Callable[..., Engine]
ByHand = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def policy(request: pytest.FixtureRequest) -> LanguageModel:
    return make_architecture(request.param)


AS_ON_A_DEVICE = "tests.engines.native.as_on_a_device:EngineAsOnADevice"


@pytest.fixture(params=["native", AS_ON_A_DEVICE])
def make_engine(request: pytest.FixtureRequest) -> MakeEngine:
    def make(policy: LanguageModel, slots: int = 64) -> Engine:
        return build_engine(policy, slots, settings=EngineTable(name=request.param))

    return make


@pytest.fixture
def draws() -> int:
    """How many tokens are sampled to compare their frequencies with a distribution."""
    return 8000


def make_policy(dtype: torch.dtype = torch.float32, **changes: object) -> LanguageModel:
    """A tiny Llama whose heads have a size that all engines have kernels for."""
    return tiny_policy(dtype, **{"vocab_size": 44, "head_dim": 32, **changes})


def requests(count: int = 4, seed: int = 0) -> list[Request]:
    return [Request(prompt, [(seed, number, index) for index in range(count)]) for number, prompt in enumerate(PROMPTS)]


def trainer_logprobs(
    policy: LanguageModel, requests: list[Request], results: list[list], temperature: float
) -> list[torch.Tensor]:
    groups = []
    for request, completions in zip(requests, results, strict=True):
        group = Group(Prompt("p", "", request.token_ids, "t", {}), completions, [])
        group.trained = [True] * len(completions)
        group.advantages = [[1.0] * len(completion.token_ids) for completion in completions]
        groups.append(group)
    (batch,) = pack(groups, sequence_mean_weights, 10**9, with_kl=True, device=policy.device)
    with torch.no_grad(), policy.precision():
        logprobs, _ = score(policy, batch, temperature)
    return list(logprobs.cpu().split([length for _, _, length in batch.members]))


def test_greedy_tokens_equal_transformers_generate(make_engine: MakeEngine, policy: LanguageModel) -> None:
    groups = make_engine(policy).generate(requests(1), SamplingParams(0.0, 20))
    for prompt, (completion,) in zip(PROMPTS, groups, strict=True):
        expected = policy.model.generate(
            torch.tensor([prompt], device=policy.device), max_new_tokens=20, do_sample=False
        )
        assert list(completion.token_ids) == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_sampling_logprobs_equal_the_trainers(
    make_engine: MakeEngine, policy: LanguageModel, temperature: float
) -> None:
    """open-instruct#1678: they belong to the distribution sampled from, including the temperature."""
    groups = make_engine(policy).generate(requests(), SamplingParams(temperature, 16))
    expected = trainer_logprobs(policy, requests(), groups, temperature)
    got = [completion.sampling_logprobs for group in groups for completion in group]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.tensor(one, dtype=torch.float32), other, rtol=0, atol=1e-4)


def test_sampling_logprobs_in_bfloat16_stay_within_the_stated_bound(make_engine: MakeEngine) -> None:
    """docs/decisions.md states the bound: 0.05 nats on average for a model of this size."""
    policy = make_policy(torch.bfloat16, initializer_range=0.1)
    groups = make_engine(policy).generate(requests(8), SamplingParams(1.0, 16))
    expected = torch.cat(trainer_logprobs(policy, requests(8), groups, 1.0))
    got = torch.tensor(
        [logprob for group in groups for completion in group for logprob in completion.sampling_logprobs]
    )
    difference = (got - expected).abs()
    assert float(difference.mean()) < 0.05


def test_completions_do_not_depend_on_neighbors(make_engine: MakeEngine, policy: LanguageModel) -> None:
    """Alone or together, in many slots or in two, in any order: the same tokens."""
    options = SamplingParams(1.0, 16)
    together = make_engine(policy).generate(requests(), options)
    few_slots = make_engine(policy, 2).generate(requests(), options)
    backwards = make_engine(policy, 5).generate(requests()[::-1], options)[::-1]
    tokens = [[completion.token_ids for completion in group] for group in together]
    assert [[completion.token_ids for completion in group] for group in few_slots] == tokens
    assert [[completion.token_ids for completion in group] for group in backwards] == tokens
    for request, group in zip(requests(), tokens, strict=True):
        for stream, expected in zip(request.streams, group, strict=True):
            ((alone,),) = make_engine(policy).generate([Request(request.token_ids, [stream])], options)
            assert alone.token_ids == expected


def test_streams_differ_and_are_reproducible(make_engine: MakeEngine, policy: LanguageModel) -> None:
    """ms-swift#4383: one seed for all streams would repeat completions. The same stream must repeat its completion."""
    options = SamplingParams(1.0, 16)
    groups = make_engine(policy).generate(requests(8), options)
    again = make_engine(policy).generate(requests(8), options)
    other = make_engine(policy).generate(requests(8, seed=1), options)
    assert groups == again
    assert [c.token_ids for g in groups for c in g] != [c.token_ids for g in other for c in g]
    assert len({completion.token_ids for completion in groups[0]}) > 1
    assert [c.token_ids for c in groups[0]] != [c.token_ids for c in groups[3]], "equal prompts have different streams"


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_distribution(make_engine: MakeEngine, temperature: float, draws: int) -> None:
    """Chi-square test of first tokens over a vocabulary of eight, at p = 0.001."""
    check_frequencies(make_engine, SamplingParams(temperature, 1), lambda plain: plain, draws)


def most_likely(plain: torch.Tensor, count: int) -> torch.Tensor:
    """The distribution restricted to its `count` most likely tokens."""
    kept = torch.zeros_like(plain)
    for token in sorted(range(len(plain)), key=lambda token: -float(plain[token]))[:count]:
        kept[token] = plain[token]
    return kept / kept.sum()


def nucleus(plain: torch.Tensor, share: float) -> torch.Tensor:
    """The distribution restricted to the fewest most likely tokens with at least this total probability."""
    count = next(n for n in range(1, 9) if float(plain.sort(descending=True).values[:n].sum()) >= share)
    return most_likely(plain, count)


def at_least(plain: torch.Tensor, share: float) -> torch.Tensor:
    """The distribution restricted to tokens with at least this share of the maximum probability."""
    kept = torch.tensor([p if p >= share * float(plain.max()) else 0.0 for p in plain.tolist()], dtype=plain.dtype)
    return kept / kept.sum()


# options, the distribution by hand
TRUNCATIONS: dict[str, tuple[SamplingParams, ByHand]] = {
    "top-k": (SamplingParams(1.0, 1, top_k=3), lambda plain: most_likely(plain, 3)),
    "top-1": (SamplingParams(1.5, 1, top_k=1), lambda plain: most_likely(plain, 1)),
    "top-p": (SamplingParams(1.5, 1, top_p=0.7), lambda plain: nucleus(plain, 0.7)),
    "tiny top-p": (SamplingParams(1.0, 1, top_p=1e-9), lambda plain: most_likely(plain, 1)),
    "min-p": (SamplingParams(2.0, 1, min_p=0.4), lambda plain: at_least(plain, 0.4)),
    "top-k then top-p": (
        SamplingParams(2.0, 1, top_k=6, top_p=0.8), lambda plain: nucleus(most_likely(plain, 6), 0.8)),
    "all three": (
        SamplingParams(2.0, 1, top_k=6, top_p=0.9, min_p=0.5),
        lambda plain: at_least(nucleus(most_likely(plain, 6), 0.9), 0.5)),
}  # fmt: skip


@pytest.mark.parametrize(("options", "by_hand"), TRUNCATIONS.values(), ids=TRUNCATIONS.keys())
def test_truncated_frequencies_follow_the_distribution_by_hand(
    make_engine: MakeEngine, options: SamplingParams, by_hand: ByHand, draws: int
) -> None:
    check_frequencies(make_engine, options, by_hand, draws)


def test_end_tokens_before_the_minimum_have_probability_zero(make_engine: MakeEngine, draws: int) -> None:
    """The first token comes from the other seven; a completion can end once it has the minimum."""

    def without_end(plain: torch.Tensor) -> torch.Tensor:
        kept = plain.clone()
        kept[END] = 0
        return kept / kept.sum()

    check_frequencies(make_engine, SamplingParams(1.5, 1, min_tokens=1), without_end, draws)
    policy = make_policy()
    groups = make_engine(policy).generate(requests(60), SamplingParams(2.0, 12, min_tokens=4))
    lengths = {len(c.token_ids) for group in groups for c in group}
    assert min(lengths) == 5, "four tokens, then the EOS token"
    assert max(lengths) == 12


def check_frequencies(make_engine: MakeEngine, options: SamplingParams, by_hand: ByHand, draws: int) -> None:
    """Check first tokens and their log-probabilities against `by_hand` of the plain distribution."""
    policy = make_policy(vocab_size=8)
    groups = make_engine(policy, 2000).generate([Request((5, 6), [(7, index) for index in range(draws)])], options)
    logits = policy.model(torch.tensor([[5, 6]], device=policy.device)).logits[0, -1].detach().cpu().double()
    distribution = by_hand(torch.softmax(logits / options.temperature, -1))
    expected = draws * distribution
    sampled = torch.tensor([completion.token_ids[0] for completion in groups[0]])
    counted = torch.bincount(sampled, minlength=8).double()
    assert counted[distribution == 0].sum() == 0
    likely = expected >= 5
    statistic = ((counted - expected).square() / expected)[likely].sum()
    rest = expected[~likely].sum()
    if rest > 0:
        statistic = statistic + (counted[~likely].sum() - rest).square() / rest
    assert float(statistic) < 24.32, "chi-square with 7 degrees of freedom, p = 0.001"
    got = torch.tensor([completion.sampling_logprobs[0] for completion in groups[0]], dtype=torch.float64)
    torch.testing.assert_close(got, distribution[sampled].log(), rtol=0, atol=1e-4)


def test_stop_texts_end_a_completion_across_token_boundaries(make_engine: MakeEngine) -> None:
    """Tokens are single characters, so a stop string of two spans two. The tokens are kept, the stop string is not."""
    policy = make_policy()
    plain = make_engine(policy).generate(requests(40), SamplingParams(2.0, 24))
    texts = [completion.text for group in plain for completion in group]
    stop = next(text[2:4] for text in texts if len(text) > 6)
    groups = make_engine(policy).generate(requests(40), SamplingParams(2.0, 24, stop=(stop, "never there")))
    matches = 0
    for before, after in zip((c for g in plain for c in g), (c for g in groups for c in g), strict=True):
        place = before.text.find(stop)
        if place < 0:
            assert after.token_ids == before.token_ids
            assert (after.text, after.finish_reason) == (before.text, before.finish_reason)
            continue
        matches += 1
        assert after.text == before.text[:place]
        assert after.finish_reason == "stop"
        assert after.token_ids == before.token_ids[: place + 2]
        assert after.sampling_logprobs == pytest.approx(before.sampling_logprobs[: place + 2], abs=1e-4)
    assert matches


def test_a_stop_string_can_stay_in_the_text(make_engine: MakeEngine) -> None:
    """As in training. The tokens are those of a completion without it, up to the end of the stop string."""
    policy = make_policy()
    plain = make_engine(policy).generate(requests(40), SamplingParams(2.0, 24))
    texts = [completion.text for group in plain for completion in group]
    stop = next(text[2:4] for text in texts if len(text) > 6)
    groups = make_engine(policy).generate(requests(40), SamplingParams(2.0, 24, stop=(stop,), keep_stop=True))
    matches = 0
    for before, after in zip((c for g in plain for c in g), (c for g in groups for c in g), strict=True):
        if stop in before.text:
            matches += 1
            place = before.text.find(stop) + 2
            assert (after.text, after.token_ids) == (before.text[:place], before.token_ids[:place])
            assert after.finish_reason == "stop"
        else:
            assert (after.text, after.finish_reason) == (before.text, before.finish_reason)
    assert matches


def test_a_stop_string_may_begin_in_text_that_was_written_before(make_engine: MakeEngine) -> None:
    policy = make_policy()
    options = SamplingParams(2.0, 24)
    prompt = tuple(policy.tokenizer("ab")["input_ids"])
    (plain,) = make_engine(policy).generate([Request(prompt, [(0, 0, index) for index in range(40)])], options)
    first = next(completion.text[0] for completion in plain if completion.text)
    for written, stop, text in ((0, first, first), (1, "b" + first, "b" + first), (2, "b" + first, "ab" + first)):
        request = Request(prompt, [(0, 0, index) for index in range(40)], written=written)
        (stopped,) = make_engine(policy).generate([request], replace(options, stop=(stop,), keep_stop=True))
        for before, after in zip(plain, stopped, strict=True):
            assert before.token_ids[: len(after.token_ids)] == after.token_ids
            if before.text.startswith(first):
                assert (after.text, len(after.token_ids), after.finish_reason) == (text, 1, "stop")
            else:
                assert after.text.startswith("ab"[2 - written :] + before.text[:1])
    with pytest.raises(ValueError, match="written of a request = 3: it has 2 tokens"):
        make_engine(policy).generate([replace(request, written=3)], options)


def test_stop_text_before_the_minimum_does_not_end_a_completion(make_engine: MakeEngine) -> None:
    policy = make_policy()
    plain = make_engine(policy).generate(requests(40), SamplingParams(2.0, 24, min_tokens=10))
    stops = tuple({completion.text[0] for group in plain for completion in group})
    groups = make_engine(policy).generate(requests(40), SamplingParams(2.0, 24, min_tokens=10, stop=stops))
    for before, after in zip((c for g in plain for c in g), (c for g in groups for c in g), strict=True):
        ends = [place for place, letter in enumerate(before.text) if place >= 9 and letter in stops]
        assert after.text == (before.text[: ends[0]] if ends else before.text)
        assert len(after.token_ids) >= 10


def test_finish_reason_where_pad_is_eos(make_engine: MakeEngine, policy: LanguageModel) -> None:
    """trl#7039: "stop" if and only if the EOS token was sampled, "length" at the limit; no tokens after an end."""
    reasons = set()
    for completion in (c for g in make_engine(policy).generate(requests(40), SamplingParams(2.0, 20)) for c in g):
        reasons.add(completion.finish_reason)
        assert (completion.finish_reason == "stop") == (completion.token_ids[-1] == END)
        assert END not in completion.token_ids[:-1]
        assert len(completion.token_ids) == 20 or completion.finish_reason == "stop"
        assert len(completion.sampling_logprobs) == len(completion.mask) == len(completion.token_ids)
    assert reasons == {"stop", "length"}


def test_end_token_at_the_limit_is_a_stop(make_engine: MakeEngine) -> None:
    policy = make_policy()
    policy.model.generation_config.eos_token_id = list(range(44))
    every_token_ends = LanguageModel(
        policy.model, policy.tokenizer, tuple(range(44)), policy.context, policy.device, policy.dtype
    )
    groups = make_engine(every_token_ends).generate(requests(2), SamplingParams(1.0, 1))
    assert {completion.finish_reason for group in groups for completion in group} == {"stop"}


def test_several_end_tokens(make_engine: MakeEngine) -> None:
    policy = make_policy()
    several = LanguageModel(policy.model, policy.tokenizer, (0, 3, 17, 30), policy.context, policy.device, policy.dtype)
    groups = make_engine(several).generate(requests(30), SamplingParams(2.0, 12))
    ends = {c.token_ids[-1] for g in groups for c in g if c.finish_reason == "stop"}
    assert len(ends) > 1
    assert ends <= {0, 3, 17, 30}
    assert not {0, 3, 17, 30} & {token for g in groups for c in g for token in c.token_ids[:-1]}


def test_weights_are_those_loaded_last(make_engine: MakeEngine) -> None:
    """verl#7495: the engine kept stale weights."""
    policy = make_policy()
    engine = make_engine(policy)
    engine.load_weights(policy.weight_source(), 0)
    before = engine.generate(requests(), SamplingParams(1.0, 12))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(0.5)
    policy.generation.advance()
    engine.load_weights(policy.weight_source(), 3)
    after = engine.generate(requests(), SamplingParams(1.0, 12))
    assert {completion.policy_version for group in after for completion in group} == {3}
    assert [c.token_ids for g in before for c in g] != [c.token_ids for g in after for c in g]
    expected = torch.cat(trainer_logprobs(policy, requests(), after, 1.0))
    got = torch.tensor([logprob for g in after for c in g for logprob in c.sampling_logprobs])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_more_completions_than_slots_come_in_order(make_engine: MakeEngine, policy: LanguageModel) -> None:
    counted = 0.0

    def advance(tokens: float) -> None:
        nonlocal counted
        counted += tokens

    groups = make_engine(policy, 3).generate(requests(9), SamplingParams(1.0, 10), advance)
    assert [len(group) for group in groups] == [9, 9, 9, 9]
    assert counted == sum(len(c.token_ids) for g in groups for c in g)
    whole = make_engine(policy, 100).generate(requests(9), SamplingParams(1.0, 10))
    assert [[c.token_ids for c in g] for g in groups] == [[c.token_ids for c in g] for g in whole]


def test_limits_truncate_completions_and_change_nothing_else(make_engine: MakeEngine, policy: LanguageModel) -> None:
    """Each completion is a prefix of the one without a limit; a limit above the maximum has no effect."""
    limits = [1, 5, 12, 99, 3, 1]
    plain = make_engine(policy, 5).generate(requests(6), SamplingParams(2.0, 12))
    limited = [replace(request, limits=limits) for request in requests(6)]
    groups = make_engine(policy, 5).generate(limited, SamplingParams(2.0, 12))
    truncated = 0
    for before, after in zip(plain, groups, strict=True):
        for whole, completion, limit in zip(before, after, limits, strict=True):
            assert completion.token_ids == whole.token_ids[:limit]
            ended = completion.token_ids[-1] == END
            assert completion.finish_reason == ("stop" if ended else "length")
            truncated += len(whole.token_ids) > limit
    assert truncated > 4


def test_requests_may_continue_completions(make_engine: MakeEngine, policy: LanguageModel) -> None:
    """What an engine keeps between turns changes no token, and no log-probability beyond rounding. Turns are uneven."""
    params, tokens = SamplingParams(1.0, 10), []
    for keep, slots in ((True, 64), (True, 3), (False, 64)):
        engine, known, turns = make_engine(policy, slots), [ids for ids in PROMPTS for _ in range(2)], []
        for turn in range(4):
            asked = [
                Request(ids, [(turn, number)], shared=len(PROMPTS[number // 2]), keep=keep, continues=turn > 0)
                for number, ids in enumerate(known)
            ]
            turns.append(engine.generate(asked, params))
            for one, other in zip(
                (completion.sampling_logprobs for (completion,) in turns[-1]),
                trainer_logprobs(policy, asked, turns[-1], 1.0),
                strict=True,
            ):
                torch.testing.assert_close(torch.tensor(one, dtype=torch.float32), other, rtol=0, atol=1e-4)
            known = [
                (*ids, *completion.token_ids, *range(5, 6 + (turn + number) % 5))
                for number, (ids, (completion,)) in enumerate(zip(known, turns[-1], strict=True))
            ]
        tokens.append([[completion.token_ids for (completion,) in turn] for turn in turns])
    assert tokens[0] == tokens[1] == tokens[2]


@pytest.mark.parametrize("limits", [[4], [4, 0], [4, 4, 4]])
def test_limits_that_do_not_fit_are_refused(make_engine: MakeEngine, limits: list[int]) -> None:
    with pytest.raises(ValueError, match="one for each of its 2 streams"):
        make_engine(make_policy()).generate([Request((5,), [(0,), (1,)], limits)], SamplingParams(1.0, 5))


def test_no_requests(make_engine: MakeEngine, policy: LanguageModel) -> None:
    assert make_engine(policy).generate([], SamplingParams(1.0, 5)) == []


def test_requests_without_streams(make_engine: MakeEngine, policy: LanguageModel) -> None:
    """Alone, beside others, and with no slot free."""
    nothing, params = Request((5, 6), []), SamplingParams(1.0, 5)
    assert make_engine(policy).generate([nothing, nothing], params) == [[], []]
    first, *_, last = requests(2)
    groups = make_engine(policy, 1).generate([first, nothing, last, nothing], params)
    assert groups == [*make_engine(policy, 1).generate([first], params), [], groups[2], []]
    assert [len(group) for group in groups] == [2, 0, 2, 0]


def test_empty_prompt_is_refused(make_engine: MakeEngine, policy: LanguageModel) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        make_engine(policy).generate([Request((), [(0,)])], SamplingParams(1.0, 5))
