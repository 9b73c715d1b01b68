"""Sampling over several turns, worked by hand with scripted engines and compared with the real one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gruppo.config.sections import Environment
from gruppo.data.loading import Dataset
from gruppo.data.tokenization import tokenize_part
from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.native.engine import NativeEngine
from gruppo.errors import UsageError
from gruppo.models.policy import LanguageModel
from gruppo.rollout.chat_rendering import ChatRenderer, tool_texts
from gruppo.rollout.environments.client import ProcessEnvironments, PythonEnvironments
from gruppo.rollout.multi_turn import MultiTurnSampler, _waves
from gruppo.rollout.sampling import sample_groups
from gruppo.types import Completion, Episode, Prompt
from gruppo.utils.progress import NullProgress
from gruppo.utils.signals import Stop
from tests.conftest import END, make_tokenizer
from tests.rollout.environments.test_protocol import FakePool
from tests.rollout.environments.worlds import Counter

WORLDS = "tests/rollout/environments/worlds.py"
OPTIONS = SamplingParams(1.0, 24)
STREAMS = [[(0, 1, place, number) for number in range(3)] for place in range(2)]


class Scripted:
    """Gives the texts of a script, turn by turn, to every completion; keeps what it was asked."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, turns: Sequence[str], eos: int = END) -> None:
        self.tokenizer, self.turns, self.eos = tokenizer, turns, eos
        self.requests: list[Request] = []
        self.options: list[SamplingParams] = []
        self.asked: dict[tuple[int, ...], int] = {}

    def generate(self, requests, options, advance=None):
        self.requests += requests
        self.options.append(options)
        return [[self._one(r, stream, r.limits[n], options) for n, stream in enumerate(r.streams)] for r in requests]

    def _one(self, request: Request, stream: tuple[int, ...], limit: int, options: SamplingParams) -> Completion:
        turn = self.asked.get(stream[:4], 0)
        self.asked[stream[:4]] = turn + 1
        ids = [
            self.eos if piece == "." else token
            for piece in self.turns[turn].replace(".", "|.|").split("|")
            for token in ([0] if piece == "." else self.tokenizer(piece, add_special_tokens=False)["input_ids"])
        ]
        text = self.tokenizer.decode([each for each in ids if each != self.eos])
        ended = ids[-1] == self.eos
        starts = [text.find(stop) for stop in options.stop if stop in text]
        reason = "stop" if ended or starts else "length"
        kept = ids[:limit]
        if len(kept) < len(ids):
            reason, starts = "length", []
        return Completion(
            tuple(kept), (-0.5 - turn,) * len(kept), (True,) * len(kept), reason, 3, text[: min(starts, default=None)]
        )

    def load_weights(self, policy, version):
        pass


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def worlds() -> Iterator[dict[str, ProcessEnvironments]]:
    made: dict[str, ProcessEnvironments] = {}

    class OpenedEnvironments(dict):
        def __missing__(self, name: str) -> ProcessEnvironments:
            kind, _, options = name.partition(" ")
            fields = {"options": {"rounds": int(options)}} if options else {}
            made[name] = ProcessEnvironments(
                Environment(name=f"{WORLDS}:{kind}", workers=1, **fields), [], None, NullProgress()
            )
            return made[name]

    yield OpenedEnvironments()
    for each in made.values():
        each.close()


def prompts_of(tokenizer: PreTrainedTokenizerFast, *contents: object, **columns: object) -> list[Prompt]:
    rows = [{"prompt": content, **columns} for content in contents]
    return tokenize_part(Dataset("t", rows, range(len(rows))), tokenizer, 128, 24)[0]


def play(episodes: MultiTurnSampler, engine: object, prompts: list[Prompt], count: int = 1, options=OPTIONS):
    streams = [[(0, 1, place, number) for number in range(count)] for place in range(len(prompts))]
    return episodes.play(engine, prompts, streams, options, NullProgress(), Stop())  # type: ignore[arg-type]


def test_turns_of_an_environment_of_ours_by_hand(tokenizer, worlds) -> None:
    """ab? + c= is over: the answer to the last turn is read by nobody."""
    engine = Scripted(tokenizer, ["ab?", "z="])
    episodes = MultiTurnSampler(worlds["Letters 2"], ChatRenderer(tokenizer, [END]), turns=4)
    begun, ((made,),) = play(episodes, engine, prompts_of(tokenizer, "q"))
    ids = tokenizer("ab?+z=")["input_ids"]
    assert made == Completion(
        token_ids=tuple(ids),
        sampling_logprobs=(-0.5, -0.5, -0.5, 0.0, -1.5, -1.5),
        mask=(True, True, True, False, True, True),
        finish_reason="stop",
        policy_version=3,
        text="ab?+z=",
        episode=Episode(turns=2, reward=2 / 5),
    )
    assert begun == prompts_of(tokenizer, "q")
    prompt = list(begun[0].token_ids)
    assert [list(each.token_ids) for each in engine.requests] == [prompt, [*prompt, *ids[:4]]]
    assert [each.streams for each in engine.requests] == [[(0, 1, 0, 0)], [(0, 1, 0, 0, 5, 1)]]
    assert [each.limits for each in engine.requests] == [[24], [20]]
    assert all(each.stop == ("?", "=") for each in engine.options)


def test_after_the_last_answer_the_model_ends_by_itself(tokenizer, worlds) -> None:
    engine = Scripted(tokenizer, ["a?", "b?c?."])
    episodes = MultiTurnSampler(worlds["Letters 9"], ChatRenderer(tokenizer, [END]), turns=1)
    _, ((made,),) = play(episodes, engine, prompts_of(tokenizer, "q"))
    assert (made.text, made.token_ids[-1], made.finish_reason) == ("a?+b?c?", END, "stop")
    assert made.episode == Episode(turns=1, reward=1 / 2), "what comes after is not heard"
    assert engine.options[1].stop == ()


def test_an_end_token_is_the_end_of_a_turn(tokenizer, worlds) -> None:
    """Of plain text the answer follows as it stands."""
    engine = Scripted(tokenizer, ["a.", "b."])
    _, ((made,),) = play(
        MultiTurnSampler(worlds["Letters 2"], ChatRenderer(tokenizer, [END]), 4), engine, prompts_of(tokenizer, "q")
    )
    assert list(made.token_ids) == [*tokenizer("a")["input_ids"], END, *tokenizer("+b")["input_ids"], END]
    assert made.mask == (True, True, False, True, True)
    assert (made.text, made.finish_reason, made.episode) == ("a+b", "stop", Episode(turns=2, reward=1.0))


def test_in_a_conversation_an_answer_is_a_message(tokenizer, worlds) -> None:
    """The template writes <question> and = for the assistant: after its end token come ">", the answer and "="."""
    engine = Scripted(tokenizer, ["a.", "b."])
    prompts = prompts_of(tokenizer, [{"role": "user", "content": "q"}])
    _, ((made,),) = play(MultiTurnSampler(worlds["Letters 2"], ChatRenderer(tokenizer, [END]), 4), engine, prompts)
    answer = tokenizer("><+>=", add_special_tokens=False)["input_ids"]
    assert list(made.token_ids) == [*tokenizer("a")["input_ids"], END, *answer, *tokenizer("b")["input_ids"], END]
    assert made.mask == (True, True, *(False,) * 5, True, True)
    assert made.text == "a\n+\nb"


def test_an_answer_that_does_not_fit_ends_the_completion(tokenizer, worlds) -> None:
    """Two tokens are said after the second turn, and two are left: nothing could be written behind them."""
    episodes = MultiTurnSampler(worlds["Letters 9"], ChatRenderer(tokenizer, [END]), 9)
    for most, text in ((5, "ab?+?"), (8, "ab?+?--e"), (7, "ab?+?")):
        engine = Scripted(tokenizer, ["ab?", "?", "efgh"])
        _, ((made,),) = play(episodes, engine, prompts_of(tokenizer, "q"), options=replace(OPTIONS, max_tokens=most))
        assert (made.text, made.finish_reason) == (text, "length")
        assert len(made.token_ids) == len(made.mask) == len(made.sampling_logprobs) <= most


def test_a_turn_that_is_cut_is_not_heard(tokenizer, worlds) -> None:
    engine = Scripted(tokenizer, ["abcdefgh"])
    episodes = MultiTurnSampler(worlds["Letters 9"], ChatRenderer(tokenizer, [END]), 9)
    _, ((made,),) = play(episodes, engine, prompts_of(tokenizer, "q"), options=replace(OPTIONS, max_tokens=4))
    assert (made.text, made.finish_reason, made.episode) == ("abcd", "length", Episode(reward=0.0))


def test_an_environment_that_says_nothing_lets_the_model_go_on(tokenizer, worlds) -> None:
    """Within one turn; what it hears grows with it."""
    engine = Scripted(tokenizer, ["a?", "b?", "c."])
    _, ((made,),) = play(
        MultiTurnSampler(worlds["Silent"], ChatRenderer(tokenizer, [END]), 4), engine, prompts_of(tokenizer, "q")
    )
    assert (made.text, made.mask) == ("a?b?c", (True,) * 6)
    assert made.episode == Episode(turns=0, reward=pytest.approx((1 + 2 + 3) / (2 + 4 + 5)))


def test_texts_of_the_recipe_end_a_completion_as_they_do_without_an_environment(tokenizer, worlds) -> None:
    engine = Scripted(tokenizer, ["a?", "bx"])
    episodes = MultiTurnSampler(worlds["Letters 9"], ChatRenderer(tokenizer, [END]), 4)
    options = replace(OPTIONS, stop=("x",), min_tokens=1)
    _, ((made,),) = play(episodes, engine, prompts_of(tokenizer, "q"), options=options)
    assert (made.text, made.finish_reason) == ("a?+b", "stop")
    assert made.token_ids[-1] == tokenizer("x")["input_ids"][0], "its tokens are kept"
    assert [each.min_tokens for each in engine.options] == [1, 0]


def test_what_is_said_first_ends_the_prompt(tokenizer, worlds) -> None:
    episodes = MultiTurnSampler(worlds["Greets"], ChatRenderer(tokenizer, [END]), 1)
    for content in ("q", [{"role": "user", "content": "q"}]):
        prompts = prompts_of(tokenizer, content)
        (begun,), (group,) = play(episodes, Scripted(tokenizer, ["x.", "y."]), prompts, count=3)
        letter = begun.content[-1] if isinstance(begun.content, str) else begun.content[-1]["content"][-1]
        assert letter in "abcdefgh"
        whole = content + letter if isinstance(content, str) else f"<q{letter}>="
        assert list(begun.token_ids) == tokenizer(whole)["input_ids"]
        assert [each.mask[:2] for each in group] == [(True, True)] * 3
        assert prompts[0].content == content, "the row stays as it was"


def test_where_a_group_is_told_different_things_they_begin_its_completions(tokenizer, worlds) -> None:
    """The prompt is what they have in common; what is not counts as said in the completion."""
    prompts = prompts_of(tokenizer, [{"role": "user", "content": "q"}])
    episodes = MultiTurnSampler(worlds["Various"], ChatRenderer(tokenizer, [END]), 1)
    engine = Scripted(tokenizer, ["x.", "y."])
    (begun,), (group,) = play(episodes, engine, prompts, count=3)
    assert list(begun.token_ids) == tokenizer("<q")["input_ids"]
    first = [tokenizer.decode(list(each.token_ids[:3])) for each in group]
    assert len(set(first)) == 3
    assert all(text[1:] == ">=" and text[0] in "abcdefgh" for text in first)
    assert [each.mask[:5] for each in group] == [(False, False, False, True, True)] * 3
    for number, request in enumerate(engine.requests[:3]):
        assert list(request.token_ids) == [*begun.token_ids, *group[number].token_ids[:3]]
        assert request.limits == [OPTIONS.max_tokens - 3]


def test_what_is_said_first_and_leaves_no_room_abstains(tokenizer, worlds) -> None:
    episodes = MultiTurnSampler(worlds["Greets"], ChatRenderer(tokenizer, [END]), 1)
    _, ((made,),) = play(
        episodes, Scripted(tokenizer, ["x."]), prompts_of(tokenizer, "q"), options=replace(OPTIONS, max_tokens=1)
    )
    assert made.token_ids == ()
    assert made.episode is not None
    assert "leaves no room" in str(made.episode.failure)


def test_failures_end_a_completion_with_their_reason(tokenizer, worlds) -> None:
    prompts = [
        *prompts_of(tokenizer, "q", what="raise in reset"), *prompts_of(tokenizer, "q", what="raise in step"),
        *prompts_of(tokenizer, "q", what="raise in get_reward"), *prompts_of(tokenizer, "q", what="well"),
    ]  # fmt: skip
    engine = Scripted(tokenizer, ["x.", "y.", "z."])
    _, groups = play(MultiTurnSampler(worlds["Fails"], ChatRenderer(tokenizer, [END]), 1), engine, prompts)
    assert [made.text for (made,) in groups] == ["", "x", "xay", "xay"]
    told = [made.episode for (made,) in groups]
    assert [each.reward for each in told] == [None, None, None, 1.0]
    assert ["is broken" in str(each.failure) for each in told] == [True, True, True, False]


def pieces_tokenizer() -> PreTrainedTokenizerFast:
    """Tokens that run past the borders of lines, as those of real models do."""
    pieces = ["<eos>", "```python", "```", "\n", "\n\n", "print(3*7)", "output", "1", "2", "The answer is ", "?", "q"]
    tokenizer = Tokenizer(models.WordLevel({piece: place for place, piece in enumerate(pieces)}, unk_token="?"))
    pattern = r"```python|```|\n\n|\n|print\(3\*7\)|output|1|2|The answer is |q|<eos>"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def test_blocks_of_python_are_run_and_their_output_follows() -> None:
    """The token behind the closing fence runs on past the line's end: it was sampled, so it stays."""
    tokenizer, pool = pieces_tokenizer(), FakePool()
    turns = ["```python\nprint(3*7)\n```\n\n", "```python\nprint(3*7)\n```\n", "The answer is 2."]
    environments = PythonEnvironments(pool, 1)
    episodes = MultiTurnSampler(environments, ChatRenderer(tokenizer, [END]), 2)
    options = replace(OPTIONS, max_tokens=64)
    _, ((made, other),) = play(episodes, Scripted(tokenizer, turns), prompts_of(tokenizer, "q"), 2, options)
    environments.close()
    assert made.text == turns[0] + "```output\n1\n```\n" + turns[1] + "```output\n2\n```\n" + "The answer is 2"
    assert made.text == other.text, "state is kept within a completion, and not beyond it"
    assert [each.ran for each in pool.sessions] == [["print(3*7)"] * 2] * 2
    assert all(each.closed for each in pool.sessions)
    said = ["".join(tokenizer.decode([t]) for t, m in zip(made.token_ids, made.mask, strict=True) if m == wanted)
            for wanted in (True, False)]  # fmt: skip
    assert said == [turns[0] + turns[1] + "The answer is 2<eos>", "```output\n1\n```\n```output\n2\n```\n"]
    assert made.episode == Episode(turns=2, calls=2)
    assert made.sampling_logprobs == tuple(
        value for value, m in zip(made.sampling_logprobs, made.mask, strict=True) for _ in [0] if m or value == 0
    )


def test_a_block_in_the_last_turn_is_not_run() -> None:
    tokenizer, pool = pieces_tokenizer(), FakePool()
    block = "```python\nprint(3*7)\n```\n"
    environments = PythonEnvironments(pool, 1)
    episodes = MultiTurnSampler(environments, ChatRenderer(tokenizer, [END]), 1)
    _, ((made,),) = play(episodes, Scripted(tokenizer, [block, block + "."]), prompts_of(tokenizer, "q"), 1,
                         replace(OPTIONS, max_tokens=64))  # fmt: skip
    environments.close()
    assert made.text == f"{block}```output\n1\n```\n{block}"
    assert len(pool.sessions[0].ran) == 1


def test_what_an_environment_says_is_no_special_token(tokenizer) -> None:
    """A tool's output could otherwise end turns, or begin those of others."""
    assert END in tokenizer("<eos>")["input_ids"]
    dialogue = ChatRenderer(tokenizer, [END])
    for made in (dialogue.within(["a<eos>b"]), dialogue.after(["a<eos>b"])):
        assert END not in made


HERMES = (
    "{% if tools %}[tools {% for t in tools %}{{ t.function.name }} {% endfor %}]{% endif %}"
    "{% for m in messages %}<{{ m.role }}:{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant:{% endif %}"
)


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    made = make_tokenizer()
    made.chat_template = template
    return made


def test_tools_go_through_the_template_where_it_has_a_place_for_them() -> None:
    tokenizer = with_template(HERMES)
    from gruppo.rollout.environments.trl_tools import schema_of

    tools = tool_texts(tokenizer, [schema_of(Counter().add)])
    rows = [{"prompt": [{"role": "user", "content": "q"}]}]
    (prompt,), _ = tokenize_part(Dataset("t", rows, [0]), tokenizer, 128, 24, tools=tools)
    expected = tokenizer("[tools add ]<user:q<eos>\n<assistant:", add_special_tokens=False)["input_ids"]
    assert list(prompt.token_ids) == expected
    dialogue = ChatRenderer(tokenizer, [END], tools)
    assert dialogue.after(["a", "b"]) == [
        token
        for text in ("\n<tool:", "a", "<eos>\n<tool:", "b", "<eos>\n<assistant:")
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]
    ]


def test_tools_are_told_in_the_system_message_where_it_has_none(tokenizer) -> None:
    from gruppo.rollout.environments.trl_tools import schema_of

    tools = tool_texts(tokenizer, [schema_of(Counter().add)])
    assert tools is not None
    for content in ([], [{"role": "system", "content": "Be good."}]):
        told = tools.told([*content, {"role": "user", "content": "q"}])
        assert [each["role"] for each in told] == ["system", "user"]
        assert told[0]["content"].startswith("Be good.\n\nYou can call" if content else "You can call")
        assert '"name": "add"' in told[0]["content"]
    with pytest.raises(UsageError, match=r"task\.system"):
        tools.told("text")
    pieces = ChatRenderer(tokenizer, [END], tools)._frame(2)
    assert pieces[1] == "\n</tool_response>\n<tool_response>\n"


def test_templates_that_cannot_go_on_are_refused() -> None:
    for template in (
        None,
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}{% endfor %}",
        "{{ messages[-1].content }}",
        "{% for m in messages %}<{{ m.content }}{{ m.content }}>{% endfor %}",
    ):
        with pytest.raises(UsageError, match="chat template cannot go on"):
            ChatRenderer(with_template(template), [END]).check()


def test_the_end_token_is_not_written_twice() -> None:
    for template, begins in (
        ("{% for m in messages %}[{{ m.content }}] <eos>\n{% endfor %}", "] <eos>\n["),
        ("{% for m in messages %}{{ m.content }} <eos>\n{% endfor %}", "\n"),
        ("{% for m in messages %}{{ m.content }}<eos>{% endfor %}", ""),
    ):
        assert ChatRenderer(with_template(template), [END])._frame(1)[0] == begins


def test_tools_of_trl_in_a_conversation(tokenizer, worlds) -> None:
    """What this model can write has no braces, so its tokens are heard as a call."""
    environments = worlds["Counter"]
    dialogue = ChatRenderer(tokenizer, [END], tool_texts(tokenizer, environments.schemas))
    text = '<tool_call>{"name": "add", "arguments": {"amount": 2}}</tool_call>'
    dialogue.heard = lambda ids: text if ids == [1] else "done"  # type: ignore[method-assign, assignment]
    engine = Scripted(tokenizer, ["a.", "b."])
    episodes = MultiTurnSampler(environments, dialogue, 4)
    prompts = prompts_of(tokenizer, [{"role": "user", "content": "q"}], start=1)
    (begun,), ((made,),) = play(episodes, engine, prompts, options=replace(OPTIONS, max_tokens=90))
    assert begun.content[-1]["content"] == "q It is 1 now."
    assert made.episode == Episode(turns=1, calls=1, reward=3.0)
    assert made.text == "a\ntotal 3\nb"
    assert made.mask.count(False) == len(dialogue.after(["total 3"]))


def test_an_environment_that_never_speaks_changes_no_completion(policy: LanguageModel) -> None:
    """With the real engine; and no completion depends on how many stand beside it."""
    prompts = prompts_of(policy.tokenizer, "ab", "c")
    environments = PythonEnvironments(FakePool(), 1)
    episodes = MultiTurnSampler(environments, ChatRenderer(policy.tokenizer, policy.eos_ids), 4)
    asked = NativeEngine(policy, 4), prompts, STREAMS, OPTIONS, NullProgress(), Stop()
    alone = sample_groups(*asked)
    made = episodes.sample(*asked)
    environments.close()
    assert [[replace(each, episode=None) for each in group] for group in made] == alone


def test_token_ids_are_those_that_the_engine_saw(policy: LanguageModel, worlds, monkeypatch) -> None:
    """Prompt, sampled and said, in order; every request is a beginning of it; log-probabilities are the engine's."""
    seen: list[tuple[int, ...]] = []
    drawn: list[tuple[tuple[int, ...], Completion]] = []
    generate = NativeEngine.generate

    def watched(self, requests, options, advance=None):
        made = generate(self, requests, options, advance)
        for request, group in zip(requests, made, strict=True):
            seen.append(request.token_ids)
            drawn.extend((request.token_ids, each) for each in group)
        return made

    monkeypatch.setattr(NativeEngine, "generate", watched)
    prompts = prompts_of(policy.tokenizer, "ab", "c")
    episodes = MultiTurnSampler(worlds["Letters 9"], ChatRenderer(policy.tokenizer, policy.eos_ids), 6)
    options = replace(OPTIONS, max_tokens=40)
    begun, groups = episodes.play(NativeEngine(policy, 4), prompts, STREAMS, options, NullProgress(), Stop())
    whole = [
        (prompt.token_ids + made.token_ids, made) for prompt, group in zip(begun, groups, strict=True) for made in group
    ]
    assert sum(made.episode.turns for _, made in whole) > 6, "or this proves little"
    for ids in seen:
        assert any(each[: len(ids)] == ids for each, _ in whole)
    for ids, made in whole:
        start = len(ids) - len(made.token_ids)
        logprobs = (None,) * start + made.sampling_logprobs
        drawn_here = {
            place
            for asked, each in drawn
            for stretch in [slice(len(asked), len(asked) + len(each.token_ids))]
            if ids[: stretch.stop] == asked + each.token_ids and logprobs[stretch] == each.sampling_logprobs
            for place in range(stretch.start, stretch.stop)
        }
        assert drawn_here == {start + place for place, sampled in enumerate(made.mask) if sampled}
    again = episodes.sample(NativeEngine(policy, 1), prompts, STREAMS, options, NullProgress(), Stop())
    assert [[each.token_ids for each in group] for group in again] == [
        [each.token_ids for each in group] for group in groups
    ], "a completion depends on its stream and its environment alone"


def test_waves_by_hand() -> None:
    def waves(sizes: list[int], most: int) -> list[tuple[int, int]]:
        return [(each.start, each.stop) for each in _waves(sizes, most)]

    assert waves([4, 4, 4], 8) == [(0, 2), (2, 3)]
    assert waves([4, 4, 4], 12) == [(0, 3)]
    assert waves([9, 4, 9], 8) == [(0, 1), (1, 2), (2, 3)]
    assert waves([], 8) == []


def test_waves_change_no_completion(policy: LanguageModel, worlds, monkeypatch) -> None:
    """Groups that wait for others to be over get what they would have got beside them."""
    prompts = prompts_of(policy.tokenizer, "ab", "c", "de")
    streams = [[(0, 1, place, number) for number in range(2)] for place in range(3)]
    environments = worlds["Letters 9"]
    episodes = MultiTurnSampler(environments, ChatRenderer(policy.tokenizer, policy.eos_ids), 6)
    asked = NativeEngine(policy, 4), prompts, streams, OPTIONS, NullProgress(), Stop()
    together = episodes.play(*asked)
    monkeypatch.setattr(environments, "most", 3)
    apart = episodes.play(*asked)
    assert [[each.token_ids for each in group] for group in apart[1]] == [
        [each.token_ids for each in group] for group in together[1]
    ]
    assert apart[0] == together[0]
