"""Sampling over several turns: by hand with scripted engines, and compared with the real engine."""

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
    """An engine that returns scripted texts, turn by turn, to every completion and records its requests."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, turns: Sequence[str], eos: int = END) -> None:
        self.tokenizer, self.turns, self.eos = tokenizer, turns, eos
        self.requests: list[Request] = []
        self.options: list[SamplingParams] = []
        self.turn_of: dict[tuple[int, ...], int] = {}

    def generate(self, requests, options, advance=None):
        self.requests += requests
        self.options.append(options)
        return [[self._one(r, stream, r.limits[n], options) for n, stream in enumerate(r.streams)] for r in requests]

    def _one(self, request: Request, stream: tuple[int, ...], limit: int, options: SamplingParams) -> Completion:
        turn = self.turn_of.get(stream[:4], 0)
        self.turn_of[stream[:4]] = turn + 1
        ids = [
            self.eos if piece == "." else token
            for piece in self.turns[turn].replace(".", "|.|").split("|")
            for token in ([0] if piece == "." else self.tokenizer(piece, add_special_tokens=False)["input_ids"])
        ]
        written = list(request.token_ids[len(request.token_ids) - request.written :])
        text = self.tokenizer.decode([token for token in [*written, *ids] if token != self.eos])
        ended, before = ids[-1] == self.eos, len(written)
        starts = [(text.find(stop, max(0, before - len(stop) + 1)), stop) for stop in options.stop]
        ends = [start + len(stop) * options.keep_stop for start, stop in starts if start >= 0]
        reason = "stop" if ended or ends else "length"
        kept = ids[:limit]
        if len(kept) < len(ids):
            reason, ends = "length", []
        return Completion(
            tuple(kept), (-0.5 - turn,) * len(kept), (True,) * len(kept), reason, 3, text[: min(ends, default=None)]
        )

    def load_weights(self, policy, version):
        pass


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def worlds() -> Iterator[dict[str, ProcessEnvironments]]:
    opened: dict[str, ProcessEnvironments] = {}

    class OpenedEnvironments(dict):
        def __missing__(self, name: str) -> ProcessEnvironments:
            kind, _, options = name.partition(" ")
            fields = {"options": {"rounds": int(options)}} if options else {}
            opened[name] = ProcessEnvironments(
                Environment(name=f"{WORLDS}:{kind}", workers=1, **fields), [], None, NullProgress()
            )
            return opened[name]

    yield OpenedEnvironments()
    for environments in opened.values():
        environments.close()


def prompts_of(tokenizer: PreTrainedTokenizerFast, *contents: object, **columns: object) -> list[Prompt]:
    rows = [{"prompt": content, **columns} for content in contents]
    return tokenize_part(Dataset("t", rows, range(len(rows))), tokenizer, 128, 24)[0]


def play(episodes: MultiTurnSampler, engine: object, prompts: list[Prompt], count: int = 1, options=OPTIONS):
    streams = [[(0, 1, index, number) for number in range(count)] for index in range(len(prompts))]
    return episodes.play(engine, prompts, streams, options, NullProgress(), Stop())  # type: ignore[arg-type]


def test_turns_of_a_gruppo_environment_by_hand(tokenizer, worlds) -> None:
    """The episode ends with the second turn; the answer to it is not appended."""
    engine = Scripted(tokenizer, ["ab?", "z="])
    episodes = MultiTurnSampler(worlds["Letters 2"], ChatRenderer(tokenizer, [END]), turns=4)
    started, ((completion,),) = play(episodes, engine, prompts_of(tokenizer, "q"))
    ids = tokenizer("ab?+z=")["input_ids"]
    assert completion == Completion(
        token_ids=tuple(ids),
        sampling_logprobs=(-0.5, -0.5, -0.5, 0.0, -1.5, -1.5),
        mask=(True, True, True, False, True, True),
        finish_reason="stop",
        policy_version=3,
        text="ab?+z=",
        episode=Episode(turns=2, reward=2 / 5),
    )
    assert started == prompts_of(tokenizer, "q")
    prompt = list(started[0].token_ids)
    assert [list(request.token_ids) for request in engine.requests] == [prompt, [*prompt, *ids[:4]]]
    assert [request.streams for request in engine.requests] == [[(0, 1, 0, 0)], [(0, 1, 0, 0, 5, 1)]]
    assert [request.limits for request in engine.requests] == [[24], [20]]
    assert all(request.stop == ("?", "=") for request in engine.options)


def test_after_the_last_answer_the_model_finishes_without_the_environment(tokenizer, worlds) -> None:
    engine = Scripted(tokenizer, ["a?", "b?c?."])
    episodes = MultiTurnSampler(worlds["Letters 9"], ChatRenderer(tokenizer, [END]), turns=1)
    _, ((completion,),) = play(episodes, engine, prompts_of(tokenizer, "q"))
    assert (completion.text, completion.token_ids[-1], completion.finish_reason) == ("a?+b?c?", END, "stop")
    assert completion.episode == Episode(turns=1, reward=1 / 2), (
        "text after the last turn does not reach the environment"
    )
    assert engine.options[1].stop == ()


def test_an_end_token_is_the_end_of_a_turn(tokenizer, worlds) -> None:
    """In plain text, the answer is appended unchanged."""
    engine = Scripted(tokenizer, ["a.", "b."])
    _, ((completion,),) = play(
        MultiTurnSampler(worlds["Letters 2"], ChatRenderer(tokenizer, [END]), 4), engine, prompts_of(tokenizer, "q")
    )
    assert list(completion.token_ids) == [*tokenizer("a")["input_ids"], END, *tokenizer("+b")["input_ids"], END]
    assert completion.mask == (True, True, False, True, True)
    assert (completion.text, completion.finish_reason, completion.episode) == (
        "a+b",
        "stop",
        Episode(turns=2, reward=1.0),
    )


def test_in_a_conversation_an_answer_is_a_message(tokenizer, worlds) -> None:
    """The template writes <question> and = for the assistant; after the EOS token come ">", the answer and "="."""
    engine = Scripted(tokenizer, ["a.", "b."])
    prompts = prompts_of(tokenizer, [{"role": "user", "content": "q"}])
    _, ((completion,),) = play(
        MultiTurnSampler(worlds["Letters 2"], ChatRenderer(tokenizer, [END]), 4), engine, prompts
    )
    answer = tokenizer("><+>=", add_special_tokens=False)["input_ids"]
    assert list(completion.token_ids) == [*tokenizer("a")["input_ids"], END, *answer, *tokenizer("b")["input_ids"], END]
    assert completion.mask == (True, True, *(False,) * 5, True, True)
    assert completion.text == "a\n+\nb"


def test_an_answer_that_does_not_fit_ends_the_completion(tokenizer, worlds) -> None:
    """The second answer has two tokens. With two left, no token could be sampled after it."""
    episodes = MultiTurnSampler(worlds["Letters 9"], ChatRenderer(tokenizer, [END]), 9)
    for max_tokens, text in ((5, "ab?+?"), (8, "ab?+?--e"), (7, "ab?+?")):
        engine = Scripted(tokenizer, ["ab?", "?", "efgh"])
        _, ((completion,),) = play(
            episodes, engine, prompts_of(tokenizer, "q"), options=replace(OPTIONS, max_tokens=max_tokens)
        )
        assert (completion.text, completion.finish_reason) == (text, "length")
        assert len(completion.token_ids) == len(completion.mask) == len(completion.sampling_logprobs) <= max_tokens


def test_a_truncated_turn_does_not_reach_the_environment(tokenizer, worlds) -> None:
    engine = Scripted(tokenizer, ["abcdefgh"])
    episodes = MultiTurnSampler(worlds["Letters 9"], ChatRenderer(tokenizer, [END]), 9)
    _, ((completion,),) = play(episodes, engine, prompts_of(tokenizer, "q"), options=replace(OPTIONS, max_tokens=4))
    assert (completion.text, completion.finish_reason, completion.episode) == ("abcd", "length", Episode(reward=0.0))


def test_an_environment_without_an_answer_lets_the_model_continue(tokenizer, worlds) -> None:
    """Within one turn; the environment receives the whole turn so far."""
    engine = Scripted(tokenizer, ["a?", "b?", "c."])
    _, ((completion,),) = play(
        MultiTurnSampler(worlds["Silent"], ChatRenderer(tokenizer, [END]), 4), engine, prompts_of(tokenizer, "q")
    )
    assert (completion.text, completion.mask) == ("a?b?c", (True,) * 6)
    assert completion.episode == Episode(turns=0, reward=pytest.approx((1 + 2 + 3) / (2 + 4 + 5)))


def test_stop_texts_of_the_recipe_end_a_completion_as_without_an_environment(tokenizer, worlds) -> None:
    engine = Scripted(tokenizer, ["a?", "bx"])
    episodes = MultiTurnSampler(worlds["Letters 9"], ChatRenderer(tokenizer, [END]), 4)
    options = replace(OPTIONS, stop=("x",), min_tokens=1)
    _, ((completion,),) = play(episodes, engine, prompts_of(tokenizer, "q"), options=options)
    assert (completion.text, completion.finish_reason) == ("a?+b", "stop")
    assert completion.token_ids[-1] == tokenizer("x")["input_ids"][0], "the tokens of the stop string are kept"
    assert [options.min_tokens for options in engine.options] == [1, 0]


@pytest.mark.parametrize(
    ("world", "turns", "text"),
    [
        ("Letters 9", ["a?", "bx"], "a?+bx"),  # the second turn ends with the stop string
        ("Letters 9", ["ax"], "ax"),
        ("Silent", ["a?", "b?", "x"], "a?b?x"),  # its stop string "?" ends no turn
    ],
)
def test_stop_strings_of_training_end_the_whole_completion(
    world: str, turns: list, text: str, tokenizer, worlds
) -> None:
    engine = Scripted(tokenizer, turns)
    episodes = MultiTurnSampler(worlds[world], ChatRenderer(tokenizer, [END]), 4)
    options = replace(OPTIONS, stop=("x",), keep_stop=True)
    _, ((completion,),) = play(episodes, engine, prompts_of(tokenizer, "q"), options=options)
    assert (completion.text, completion.finish_reason) == (text, "stop")
    assert list(completion.token_ids) == tokenizer(text)["input_ids"]
    assert completion.mask == tuple(letter != "+" for letter in text)


def test_a_stop_string_may_begin_before_an_ignored_stop_of_the_environment(tokenizer, worlds) -> None:
    """The text of a turn is one text, however many times the engine continued it."""
    engine = Scripted(tokenizer, ["a?", "x"])
    episodes = MultiTurnSampler(worlds["Silent"], ChatRenderer(tokenizer, [END]), 4)
    options = replace(OPTIONS, stop=("?x",), keep_stop=True)
    _, ((completion,),) = play(episodes, engine, prompts_of(tokenizer, "q"), options=options)
    assert (completion.text, completion.finish_reason) == ("a?x", "stop")


def test_a_first_observation_is_appended_to_the_prompt(tokenizer, worlds) -> None:
    episodes = MultiTurnSampler(worlds["Greets"], ChatRenderer(tokenizer, [END]), 1)
    for content in ("q", [{"role": "user", "content": "q"}]):
        prompts = prompts_of(tokenizer, content)
        (started,), (group,) = play(episodes, Scripted(tokenizer, ["x.", "y."]), prompts, count=3)
        letter = started.content[-1] if isinstance(started.content, str) else started.content[-1]["content"][-1]
        assert letter in "abcdefgh"
        whole = content + letter if isinstance(content, str) else f"<q{letter}>="
        assert list(started.token_ids) == tokenizer(whole)["input_ids"]
        assert [completion.mask[:2] for completion in group] == [(True, True)] * 3
        assert prompts[0].content == content, "the row is unchanged"


def test_different_first_observations_in_a_group_start_its_completions(tokenizer, worlds) -> None:
    """The prompt is their common prefix; the rest is part of the completions, without loss."""
    prompts = prompts_of(tokenizer, [{"role": "user", "content": "q"}])
    episodes = MultiTurnSampler(worlds["Various"], ChatRenderer(tokenizer, [END]), 1)
    engine = Scripted(tokenizer, ["x.", "y."])
    (started,), (group,) = play(episodes, engine, prompts, count=3)
    assert list(started.token_ids) == tokenizer("<q")["input_ids"]
    first = [tokenizer.decode(list(completion.token_ids[:3])) for completion in group]
    assert len(set(first)) == 3
    assert all(text[1:] == ">=" and text[0] in "abcdefgh" for text in first)
    assert [completion.mask[:5] for completion in group] == [(False, False, False, True, True)] * 3
    for number, request in enumerate(engine.requests[:3]):
        assert list(request.token_ids) == [*started.token_ids, *group[number].token_ids[:3]]
        assert request.limits == [OPTIONS.max_tokens - 3]


def test_a_first_observation_that_leaves_no_room_is_a_failure(tokenizer, worlds) -> None:
    episodes = MultiTurnSampler(worlds["Greets"], ChatRenderer(tokenizer, [END]), 1)
    _, ((completion,),) = play(
        episodes, Scripted(tokenizer, ["x."]), prompts_of(tokenizer, "q"), options=replace(OPTIONS, max_tokens=1)
    )
    assert completion.token_ids == ()
    assert completion.episode is not None
    assert "leaves no room" in str(completion.episode.failure)


def test_failures_end_a_completion_with_their_reason(tokenizer, worlds) -> None:
    prompts = [
        *prompts_of(tokenizer, "q", what="raise in reset"), *prompts_of(tokenizer, "q", what="raise in step"),
        *prompts_of(tokenizer, "q", what="raise in get_reward"), *prompts_of(tokenizer, "q", what="well"),
    ]  # fmt: skip
    engine = Scripted(tokenizer, ["x.", "y.", "z."])
    _, groups = play(MultiTurnSampler(worlds["Fails"], ChatRenderer(tokenizer, [END]), 1), engine, prompts)
    assert [completion.text for (completion,) in groups] == ["", "x", "xay", "xay"]
    played = [completion.episode for (completion,) in groups]
    assert [episode.reward for episode in played] == [None, None, None, 1.0]
    assert ["is broken" in str(episode.failure) for episode in played] == [True, True, True, False]


def pieces_tokenizer() -> PreTrainedTokenizerFast:
    """Tokens that cross line ends, like those of real models."""
    pieces = ["<eos>", "```python", "```", "\n", "\n\n", "print(3*7)", "output", "1", "2", "The answer is ", "?", "q"]
    tokenizer = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="?"))
    pattern = r"```python|```|\n\n|\n|print\(3\*7\)|output|1|2|The answer is |q|<eos>"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def test_blocks_of_python_are_run_and_their_output_follows() -> None:
    """The token after the closing fence extends past the end of the line; it was sampled, so it is kept."""
    tokenizer, pool = pieces_tokenizer(), FakePool()
    turns = ["```python\nprint(3*7)\n```\n\n", "```python\nprint(3*7)\n```\n", "The answer is 2."]
    environments = PythonEnvironments(pool, 1)
    episodes = MultiTurnSampler(environments, ChatRenderer(tokenizer, [END]), 2)
    options = replace(OPTIONS, max_tokens=64)
    _, ((completion, other),) = play(episodes, Scripted(tokenizer, turns), prompts_of(tokenizer, "q"), 2, options)
    environments.close()
    assert completion.text == turns[0] + "```output\n1\n```\n" + turns[1] + "```output\n2\n```\n" + "The answer is 2"
    assert completion.text == other.text, "state is kept within a completion, not across completions"
    assert [session.ran for session in pool.sessions] == [["print(3*7)"] * 2] * 2
    assert all(session.closed for session in pool.sessions)
    tokens = list(zip(completion.token_ids, completion.mask, strict=True))
    texts = ["".join(tokenizer.decode([t]) for t, m in tokens if m == sampled) for sampled in (True, False)]
    assert texts == [turns[0] + turns[1] + "The answer is 2<eos>", "```output\n1\n```\n```output\n2\n```\n"]
    assert completion.episode == Episode(turns=2, calls=2)
    assert completion.sampling_logprobs == tuple(
        value
        for value, m in zip(completion.sampling_logprobs, completion.mask, strict=True)
        for _ in [0]
        if m or value == 0
    )


def test_a_block_in_the_last_turn_is_not_run() -> None:
    tokenizer, pool = pieces_tokenizer(), FakePool()
    block = "```python\nprint(3*7)\n```\n"
    environments = PythonEnvironments(pool, 1)
    episodes = MultiTurnSampler(environments, ChatRenderer(tokenizer, [END]), 1)
    _, ((completion,),) = play(episodes, Scripted(tokenizer, [block, block + "."]), prompts_of(tokenizer, "q"), 1,
                         replace(OPTIONS, max_tokens=64))  # fmt: skip
    environments.close()
    assert completion.text == f"{block}```output\n1\n```\n{block}"
    assert len(pool.sessions[0].ran) == 1


def test_observations_contain_no_special_tokens(tokenizer) -> None:
    """Otherwise a tool's output could end turns or start new ones."""
    assert END in tokenizer("<eos>")["input_ids"]
    dialogue = ChatRenderer(tokenizer, [END])
    for ids in (dialogue.within(["a<eos>b"], [1]), dialogue.after(["a<eos>b"], [1])):
        assert END not in ids


HERMES = (
    "{% if tools %}[tools {% for t in tools %}{{ t.function.name }} {% endfor %}]{% endif %}"
    "{% for m in messages %}<{{ m.role }}:{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant:{% endif %}"
)


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_tools_go_through_a_template_that_supports_them() -> None:
    tokenizer = with_template(HERMES)
    from gruppo.rollout.environments.trl_tools import schema_of

    tools = tool_texts(tokenizer, [schema_of(Counter().add)])
    rows = [{"prompt": [{"role": "user", "content": "q"}]}]
    (prompt,), _ = tokenize_part(Dataset("t", rows, [0]), tokenizer, 128, 24, tools=tools)
    expected = tokenizer("[tools add ]<user:q<eos>\n<assistant:", add_special_tokens=False)["input_ids"]
    assert list(prompt.token_ids) == expected
    dialogue = ChatRenderer(tokenizer, [END], tools)
    assert dialogue.after(["a", "b"], [END]) == [
        token
        for text in ("\n<tool:", "a", "<eos>\n<tool:", "b", "<eos>\n<assistant:")
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]
    ]


def test_tools_are_in_the_system_message_if_the_template_has_no_tools(tokenizer) -> None:
    from gruppo.rollout.environments.trl_tools import schema_of

    tools = tool_texts(tokenizer, [schema_of(Counter().add)])
    assert tools is not None
    for content in ([], [{"role": "system", "content": "Be good."}]):
        messages = tools.add_to([*content, {"role": "user", "content": "q"}])
        assert [message["role"] for message in messages] == ["system", "user"]
        assert messages[0]["content"].startswith("Be good.\n\nYou can call" if content else "You can call")
        assert '"name": "add"' in messages[0]["content"]
    with pytest.raises(UsageError, match=r"task\.system"):
        tools.add_to("text")
    pieces = ChatRenderer(tokenizer, [END], tools)._frame(2)
    assert pieces[1] == "\n</tool_response>\n<tool_response>\n"


def test_templates_that_cannot_continue_a_conversation_are_refused() -> None:
    for template in (
        None,
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}{% endfor %}",
        "{{ messages[-1].content }}",
        "{% for m in messages %}<{{ m.content }}{{ m.content }}>{% endfor %}",
    ):
        with pytest.raises(UsageError, match="chat template cannot continue a conversation"):
            ChatRenderer(with_template(template), [END]).check()


def test_the_end_token_is_not_written_twice() -> None:
    for template, start in (
        ("{% for m in messages %}[{{ m.content }}] <eos>\n{% endfor %}", "] <eos>\n["),
        ("{% for m in messages %}{{ m.content }} <eos>\n{% endfor %}", "\n"),
        ("{% for m in messages %}{{ m.content }}<eos>{% endfor %}", ""),
    ):
        assert ChatRenderer(with_template(template), [END])._frame(1)[0] == start


def test_trl_tools_in_a_conversation(tokenizer, worlds) -> None:
    """The tiny tokenizer has no braces, so the decoding of its tokens is replaced by a call."""
    environments = worlds["Counter"]
    dialogue = ChatRenderer(tokenizer, [END], tool_texts(tokenizer, environments.schemas))
    text = '<tool_call>{"name": "add", "arguments": {"amount": 2}}</tool_call>'
    dialogue.text = lambda ids, _: text if list(ids) == [1] else "done"  # type: ignore[method-assign, assignment]
    engine = Scripted(tokenizer, ["a.", "b."])
    episodes = MultiTurnSampler(environments, dialogue, 4)
    prompts = prompts_of(tokenizer, [{"role": "user", "content": "q"}], start=1)
    (started,), ((completion,),) = play(episodes, engine, prompts, options=replace(OPTIONS, max_tokens=90))
    assert started.content[-1]["content"] == "q It is 1 now."
    assert completion.episode == Episode(turns=1, calls=1, reward=3.0)
    assert completion.text == f"{text}\ntotal 3\ndone"
    assert completion.mask.count(False) == len(dialogue.after(["total 3"], [END]))


def test_an_environment_that_never_answers_changes_no_completion(policy: LanguageModel) -> None:
    """With the real engine; and no completion depends on the number of others."""
    prompts = prompts_of(policy.tokenizer, "ab", "c")
    environments = PythonEnvironments(FakePool(), 1)
    episodes = MultiTurnSampler(environments, ChatRenderer(policy.tokenizer, policy.eos_ids), 4)
    arguments = NativeEngine(policy, 4), prompts, STREAMS, OPTIONS, NullProgress(), Stop()
    alone = sample_groups(*arguments)
    groups = episodes.sample(*arguments)
    environments.close()
    assert [[replace(completion, episode=None) for completion in group] for group in groups] == alone


def test_token_ids_are_those_that_the_engine_received(policy: LanguageModel, worlds, monkeypatch) -> None:
    """Prompt, sampled tokens and observations in order; requests are prefixes; log-probabilities are the engine's."""
    seen: list[tuple[int, ...]] = []
    sampled_from: list[tuple[tuple[int, ...], Completion]] = []
    generate = NativeEngine.generate

    def watched(self, requests, options, advance=None):
        groups = generate(self, requests, options, advance)
        for request, group in zip(requests, groups, strict=True):
            seen.append(request.token_ids)
            sampled_from.extend((request.token_ids, completion) for completion in group)
        return groups

    monkeypatch.setattr(NativeEngine, "generate", watched)
    prompts = prompts_of(policy.tokenizer, "ab", "c")
    episodes = MultiTurnSampler(worlds["Letters 9"], ChatRenderer(policy.tokenizer, policy.eos_ids), 6)
    options = replace(OPTIONS, max_tokens=40)
    started, groups = episodes.play(NativeEngine(policy, 4), prompts, STREAMS, options, NullProgress(), Stop())
    whole = [
        (prompt.token_ids + completion.token_ids, completion)
        for prompt, group in zip(started, groups, strict=True)
        for completion in group
    ]
    assert sum(completion.episode.turns for _, completion in whole) > 6, "enough turns for a meaningful test"
    for ids in seen:
        assert any(sequence[: len(ids)] == ids for sequence, _ in whole)
    for ids, completion in whole:
        start = len(ids) - len(completion.token_ids)
        logprobs = (None,) * start + completion.sampling_logprobs
        sampled_places = {
            place
            for prefix, turn in sampled_from
            for stretch in [slice(len(prefix), len(prefix) + len(turn.token_ids))]
            if ids[: stretch.stop] == prefix + turn.token_ids and logprobs[stretch] == turn.sampling_logprobs
            for place in range(stretch.start, stretch.stop)
        }
        assert sampled_places == {start + place for place, sampled in enumerate(completion.mask) if sampled}
    again = episodes.sample(NativeEngine(policy, 1), prompts, STREAMS, options, NullProgress(), Stop())
    assert [[completion.token_ids for completion in group] for group in again] == [
        [completion.token_ids for completion in group] for group in groups
    ], "a completion depends only on its stream and its environment"


def test_waves_by_hand() -> None:
    def waves(sizes: list[int], most: int) -> list[tuple[int, int]]:
        return [(wave.start, wave.stop) for wave in _waves(sizes, most)]

    assert waves([4, 4, 4], 8) == [(0, 2), (2, 3)]
    assert waves([4, 4, 4], 12) == [(0, 3)]
    assert waves([9, 4, 9], 8) == [(0, 1), (1, 2), (2, 3)]
    assert waves([], 8) == []


def test_waves_change_no_completion(policy: LanguageModel, worlds, monkeypatch) -> None:
    """Groups that wait for others get the same completions as groups sampled together."""
    prompts = prompts_of(policy.tokenizer, "ab", "c", "de")
    streams = [[(0, 1, place, number) for number in range(2)] for place in range(3)]
    environments = worlds["Letters 9"]
    episodes = MultiTurnSampler(environments, ChatRenderer(policy.tokenizer, policy.eos_ids), 6)
    arguments = NativeEngine(policy, 4), prompts, streams, OPTIONS, NullProgress(), Stop()
    together = episodes.play(*arguments)
    monkeypatch.setattr(environments, "most", 3)
    separate = episodes.play(*arguments)
    assert [[completion.token_ids for completion in group] for group in separate[1]] == [
        [completion.token_ids for completion in group] for group in together[1]
    ]
    assert separate[0] == together[0]
