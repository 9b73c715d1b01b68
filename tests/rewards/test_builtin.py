"""Built-in rewards against numbers worked out by hand, including empty input."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import regex
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment, think_format_reward

from gruppo.data.tokenization import tokenize_rows
from gruppo.errors import UsageError
from gruppo.rewards.format import Regex, think_format
from gruppo.rewards.length import Overlong, Repetition
from gruppo.rollout.workers.rewards import RewardPool
from tests.conftest import make_tokenizer
from tests.rollout.workers.test_rewards import group, score, totals

UNITS = (
    "\\text{ cm}^{2}",
    "\\text{ cm}²",
    "\\,\\mathrm{m/s^{2}}",
    "\\mathrm{km\\,h^{-1}}",
    "\\text{ J}\\cdot\\text{s}",
)


@pytest.mark.parametrize(
    ("reference", "correct", "wrong"),
    [
        ("\\frac{1}{2}", ["\\boxed{0.5}", "so it is 2/4", "$\\frac{3}{6}$"], ["\\boxed{2}", "", "none"]),
        (72, ["72", "That makes 72 clips."], ["71"]),
        ("He has 5 and 6.\n5 + 6 = 11\n#### 11", ["11", "#### 11"], ["5"]),
        ("Therefore \\boxed{x^2+2x+1}.", ["\\boxed{(x+1)^2}"], ["\\boxed{(x-1)^2}"]),
        ("1,234", ["It is 1,234."], ["1.234"]),
        (9, ["So $n=9$. $\\square$", "\\boxed{9}, not $\\boxed{8}$", "\\boxed{\\approx 9}"], ["So $n=8$. $\\square$"]),
        (3, [f"\\boxed{{3{unit}}}" for unit in UNITS], [f"\\boxed{{4{unit}}}" for unit in UNITS]),
        (3, [], ["\\boxed{3\\mathrm{x^{2}}}", "\\boxed{3\\text{ and }4\\text{ cm}^{2}}"]),
    ],
)
def test_math(reference: object, correct: list[str], wrong: list[str]) -> None:
    expected = [1] * len(correct) + [0] * len(wrong)
    assert totals(score("math_verify", *correct, *wrong, answer=reference)) == expected
    assert totals(score("math_verify", *correct, *wrong, solution=reference)) == expected


def test_math_prefers_the_answer_to_the_solution() -> None:
    assert totals(score("math_verify", "4", "5", answer="4", solution="2 + 2 = 5")) == [1, 0]


@pytest.mark.parametrize("reference", ["", "\\frac{", "####"])
def test_math_does_not_apply_if_the_reference_is_not_math(reference: str) -> None:
    (reward,) = score("math_verify", "4", answer=reference)
    assert reward.total is None
    assert reward.failure is None


def test_a_large_formula_is_not_the_answer() -> None:
    large, correct = score("math_verify", "\\boxed{9^{9^9}}", "42", answer="42")
    assert (large.total, correct.total) == (0.0, 1.0)


def test_math_without_a_reference_is_refused_at_start() -> None:
    with pytest.raises(UsageError, match="answer or solution in every row"):
        RewardPool(["math_verify"], [], ["level"])


def test_choice_needs_the_letters() -> None:
    assert totals(score("choice", "The answer is (B).", "\\boxed{A}", "5", "A or B", answer="B")) == [1, 0, 0, 0]
    assert totals(score("choice", "故选：AD", "A", answer="A D")) == [1, 0]
    (reward,) = score("choice", "B", answer="the second one")
    assert reward.total is None


THOUGHTS = ["<think>a</think>b", "<think>\na\n</think>\n", "<think></think>", "<think>a", "a</think>", "",
            " <think>a</think>", "<think>a<think>b</think>", "<think>a</think><think>b</think>", "</think><think>",
            "x\n<think>a</think>"]  # fmt: skip


def test_think_format() -> None:
    assert think_format(THOUGHTS) == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("prompt", "ending"),
    [("Why?\n<think>", ""), ("Why?<think>\n", ""),
     ([{"role": "user", "content": "Why?"}], "<|assistant|>\n<think>\n\n"),
     ([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "<think>\nWell, "}], "Well, "),
     ([{"role": "assistant", "content": [{"type": "text", "text": "<think>"}, {"type": "text", "text": "Hm"}]}], ""),
     ([{"role": "assistant", "content": ["<think>Well, "]}], "Well, "),
     ("Why?", "?<think>")],
)  # fmt: skip
def test_think_format_where_the_prompt_opens_the_tag(prompt: object, ending: str) -> None:
    answers = [
        "a</think>b",
        "\n</think>\n",
        "</think>",
        "a",
        "",
        "<think>a</think>b",
        "a</think>b</think>",
        "a<think>b",
    ]
    expected = [1, 1, 1, 0, 0, 0, 0, 0]
    assert think_format(answers, prompts=[prompt] * 8, prompt_endings=[ending] * 8) == expected


@pytest.mark.parametrize(
    ("prompt", "ending"),
    [("Write <think>thoughts</think> first.", "first."), ("Open with <think> please", "please"), ("", ""),
     ("Why?<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"), ([{"role": "user", "content": "after <think>"}], "a:"),
     ([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Sure. "}], "Sure. "),
     ([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "<think>a</think>"}], "</think>"),
     ([{"role": "assistant", "content": [{"type": "text", "text": "Sure. "}, {"type": "image"}]}], "Sure. "),
     ([{"role": "assistant", "content": None}], "")],
)  # fmt: skip
def test_think_format_where_the_prompt_does_not_open_the_tag(prompt: object, ending: str) -> None:
    size = len(THOUGHTS)
    assert think_format(THOUGHTS, prompts=[prompt] * size, prompt_endings=[ending] * size) == think_format(THOUGHTS)


def test_think_format_sees_what_the_chat_template_writes() -> None:
    """A template that opens the tag, as reasoning models have: the row does not show it, the prompt's ending does."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}<think>{% endif %}"
    row = {"prompt": [{"role": "user", "content": "a b"}]}
    (prompt,) = tokenize_rows([row], tokenizer, 99, 5, "t")
    assert prompt.ending.endswith("<think>")
    _, completions = group("a</think>b", "<think>a</think>b")
    with RewardPool(["think_format"], [], [], workers=1) as pool:
        assert totals(pool.score([(prompt, completions)], {})[0][0]) == [1, 0]
        assert totals(pool.score([(replace(prompt, ending=""), completions)], {})[0][0]) == [0, 1]


def test_think_format_equals_trls_except_for_a_second_end_tag() -> None:
    assert think_format(THOUGHTS) == think_format_reward([[{"content": text}] for text in THOUGHTS])
    twice = "<think>a</think>b</think>"
    assert think_format([twice]) == [0]
    assert think_format_reward([[{"content": twice}]]) == [1]


def test_regex_matches_the_whole_text_across_line_breaks() -> None:
    reward = Regex(r"<answer>.+</answer>")
    assert reward(["<answer>4\n5</answer>", " <answer>4</answer>\n"]) == [1, 1]
    assert reward(["so <answer>4</answer>", "<answer></answer>", ""]) == [0, 0, 0]
    assert Regex("(?i)yes|no")(["YES", "no", "yes no"]) == [1, 1, 0]
    assert Regex("(?-s:.*)")(["a\nb", "ab"]) == [0, 1]
    assert Regex(r"\d+")([[{"role": "assistant", "content": "12"}]]) == [1]


@pytest.mark.parametrize(
    ("length", "value"), [(0, 0), (12288, 0), (12289, -1 / 4096), (14336, -0.5), (16384, -1), (16385, -1), (99999, -1)]
)
def test_overlong_as_in_the_paper(length: int, value: float) -> None:
    """DAPO: L = 16384 with a buffer of 4096, which is the default quarter."""
    assert Overlong(max_tokens=16384)([[1] * length]) == [value]


def test_overlong_takes_the_runs_maximum() -> None:
    """L = 8, buffer 2: seven tokens cost 0.5, eight cost 1."""
    state = SimpleNamespace(max_tokens=8)
    assert Overlong()([[1] * n for n in (0, 6, 7, 8, 9)], trainer_state=state) == [0, 0, -0.5, -1, -1]
    with RewardPool(["overlong"], [], [], workers=1) as pool:
        prompt, completions = group("ab", "abc")
        rewards = pool.score([(prompt, completions)], {"max_tokens": 2})[0][0]  # two tokens per completion
        assert totals(rewards) == [-1, -1]
        assert "reward.options.overlong.max_tokens" in str(pool.score([(prompt, completions)], {})[0][0][0].failure)


def test_overlong_equals_trls() -> None:
    source = random.Random(0)
    for _ in range(50):
        most = source.randrange(1, 200)
        buffer = source.randrange(1, most + 1)
        ids = [[1] * source.randrange(0, 2 * most) for _ in range(5)]
        assert Overlong(most, buffer)(ids) == get_soft_overlong_punishment(most, buffer)(completion_ids=ids)


def test_repetition() -> None:
    """ "a b a b a b": pairs ab ba ab ba ab, 2 of 5 distinct; triples aba bab aba bab, 2 of 4."""
    text = "a b A b\na b"
    assert Repetition(ngram=2)([text]) == pytest.approx([-3 / 5])
    assert Repetition(penalty=-0.4)([text]) == pytest.approx([-0.2])
    assert Repetition()(["", "a", "a a", "a b c d", "a a a"]) == [0, 0, 0, 0, 0]
    assert Repetition(ngram=1)(["a a a a"]) == [-0.75]
    assert Repetition(penalty=0)(["a a a a"]) == [0]


@pytest.mark.parametrize(
    ("once", "name"),
    [("我们先算出总数再除以三", "Han"), ("これはテストです", "Hiragana"), ("カタカナ", "Katakana"),
     ("สวัสดีครับ", "Thai"), ("ສະບາຍດີ", "Lao"), ("សួស្តី", "Khmer"), ("မင်္ဂလာပါ", "Myanmar"), ("བཀྲ་ཤིས", "Tibetan"),
     ("ꦲꦏ꧀ꦱꦫ", "Javanese"), ("𠀀𠀁𠀂", "Han")],
)  # fmt: skip
def test_repetition_in_scripts_without_spaces_counts_characters(once: str, name: str) -> None:
    assert Repetition()([once]) == [0]
    assert -1 < Repetition()([once * 20])[0] < -0.9
    grams = len({(once * 20)[start : start + 3] for start in range(20 * len(once) - 2)})
    assert Repetition()([once * 20]) == pytest.approx([-(1 - grams / (20 * len(once) - 2))])
    assert Repetition()([f"{once} one two one two one two"])[0] < 0


def test_repetition_counts_the_characters_of_exactly_the_scripts_without_spaces() -> None:
    """Every letter of these scripts is a unit, and no letter of any other script, except in full width."""
    scripts = "Han Hiragana Katakana Bopomofo Yi Thai Lao Khmer Myanmar Tibetan Tai_Le New_Tai_Lue Tai_Tham Tai_Viet "
    scripts += "Javanese Balinese Cham Ahom"
    letters = "".join(c for c in map(chr, range(0x110000)) if c.isalpha())
    unspaced, used = (
        set(regex.findall("[" + "".join(rf"\p{{{kind}={script}}}" for script in scripts.split()) + "]", letters))
        for kind in ("Script", "Script_Extensions")  # the second one adds letters that other scripts use too
    )
    full_width = set(map(chr, range(0xFF01, 0xFF5F)))
    assert len(unspaced) > 90_000
    assert all(Repetition(ngram=1)([letter * 2])[0] == -0.5 for letter in unspaced)
    assert all(Repetition(ngram=1)([letter * 2])[0] == 0 for letter in set(letters) - used - full_width)


@pytest.mark.parametrize("part", ["。", "，", "、", "！", "１２", "ＡＢ", "「」", "￥", "〜", "﹏", "︰", "・"])
def test_repetition_counts_east_asian_marks_and_full_width_forms(part: str) -> None:
    assert -1 < Repetition()([part * 100])[0] < -0.9
    assert Repetition(ngram=1)([f"字{part[0]}字{part[0]}"]) == pytest.approx([-0.5])


def test_repetition_of_spaced_texts_is_unchanged() -> None:
    for text in (
        "Это это это просто",
        "안녕 안녕 안녕 하세요",
        "na-na-na na-na-na",
        "שלום שלום שלום",
        "🙂🙂🙂 🙂🙂🙂",
        "x\u00a0x x",
        "字\u3000字\u3000字",
        "!!! !!! ...",
    ):
        words = text.lower().split()
        assert Repetition(ngram=1)([text]) == pytest.approx([-(1 - len(set(words)) / len(words))])


def test_repetition_equals_trls_if_words_are_tokens() -> None:
    source = random.Random(0)
    for _ in range(50):
        ids = [source.randrange(4) for _ in range(source.randrange(0, 12))]
        text = " ".join(map(str, ids))
        assert Repetition(2, -0.5)([text]) == pytest.approx(
            get_repetition_penalty_reward(2, -0.5)(completion_ids=[ids])
        )
