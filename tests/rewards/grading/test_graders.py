"""Reading numbers and formulas, against texts that were graded by hand."""

import random
import unicodedata
from fractions import Fraction

import pytest

from gruppo.errors import UsageError
from gruppo.rewards.grading.digits import ascii_digits
from gruppo.rewards.grading.graders import find_grader
from gruppo.rewards.grading.last_number import last_number, same_number
from gruppo.rewards.grading.math_verify import same_mathematics


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 + 3 = 8.", 8),
        ("-3", -3),
        ("it is −3", -3),
        ("5-3", 3),
        ("20 - 12", 12),
        ("(4)-2", 2),
        ("7 - 12 = -5", -5),
        ("answer: -5.", -5),
        ("1,234", 1234),
        ("1,2", 2),
        ("$1,234,567.89!", Fraction(123456789, 100)),
        ("3.0 apples", 3),
        ("2.", 2),
        (".5", Fraction(1, 2)),
        ("x=-.5", Fraction(-1, 2)),
        ("3/4", Fraction(3, 4)),
        ("**12**", 12),
        ("\\boxed{7}", 7),
        ("first 1, then 2", 2),
        ("The answer is 3/4.", Fraction(3, 4)),
        ("= 1/2.\n", Fraction(1, 2)),
        ("on 1/2/2024", 2024),
        ("2024/01/02", 2),
        ("-7/2 of it", Fraction(-7, 2)),
        ("1.5/2", 2),
        ("١٢", 12),
        ("العدد −٣٫٥", Fraction(-7, 2)),
        ("۱۲٬۳۴۵", 12345),
        ("३/४", Fraction(3, 4)),
        ("４２", 42),
    ],
)
def test_last_number(text: str, number: Fraction) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize("text", ["", "none", "1/0", "-", ".", "Ⅻ", "²"])
def test_no_number(text: str) -> None:
    assert last_number(text) is None


def test_no_text_raises_an_error() -> None:
    source = random.Random(0)
    for _ in range(20_000):
        last_number("".join(source.choices("12/.,- 0+)", k=source.randrange(12))))
    assert last_number("9" * 5000) is None


def test_same_number_is_exact() -> None:
    assert same_number("it is 0.50", "1/2")
    assert not same_number("0.3333333333333333", "1/3")
    assert not same_number("no idea", "0")
    assert same_number("100000000000000000001", 100000000000000000001)


def test_answer_without_number_is_refused() -> None:
    with pytest.raises(UsageError, match="contains no number"):
        same_number("3", "three")


@pytest.mark.parametrize(
    ("text", "answer", "equal"),
    [
        ("is \\boxed{\\frac{2}{4}}", "\\frac{1}{2}", True),
        ("The answer is 0.5, not 3.", "$\\frac12$", True),
        ("\\boxed{1} and then 2", "1", True),
        ("\\boxed{1} then \\boxed{2}", "1", False),
        ("50%", "\\frac12", True),
        ("\\boxed{\\sqrt{8}}", "2\\sqrt2", True),
        ("\\boxed{2, 1}", "\\{1, 2\\}", True),
        ("$x = 3$", "3", True),
        ("\\boxed{\\text{Evelyn}}", "\\text{Evelyn}", True),
        ("\\boxed{32500}", "\\$32,500", True),
        ("0.00001", 1e-05, True),
        ("-3", "3", False),
        ("3.14", "\\pi", False),
        ("", "1", False),
        ("\\boxed{\\frac{}", "1", False),
        ("4", "He has 5.\n#### 4", True),
        ("1", "", None),
        ("1", "\\frac{", None),
    ],
)
def test_same_math(text: str, answer: object, equal: bool | None) -> None:
    assert same_mathematics(text, answer) is equal


@pytest.mark.parametrize(
    "text", ["9^{9^9}", "9^{9^{9^9}}", "999999999!", "1/(10^9)!", "2^{10^9}", "(9^{9^9}, 1)", "\\{10^{9^9}, 1\\}",
             "\\binom{10^9}{10^8}", "\\gcd(10^{99999}, 3)", "x^{10^9} + 1", "\\sin(10^{10^5})", "\\sum_{k=1}^{10^9} k",
             "[1, 9^{9^9}]", "9^{9^9} < x < 10^{9^9}", "(" * 400 + "1" + ")" * 400, "x^" * 200 + "2",
             "\\sqrt{" * 60 + "2" + "}" * 60,
             "\\frac{1}{1+" * 60 + "x" + "}" * 60, "+".join("1" * 400), "10^{-9^9}"]
)  # fmt: skip
def test_large_formulas_are_the_same_only_if_they_are_written_the_same(text: str) -> None:
    grader = find_grader("math_answer")
    assert grader(f"\\boxed{{{text}}}", {"answer": text})
    assert not grader(f"\\boxed{{{text}}}", {"answer": "42"})
    assert not grader("\\boxed{42}", {"answer": text})
    assert same_mathematics(f"\\boxed{{{text}}}", "42") is False


def test_math_grader() -> None:
    assert find_grader("math_answer")("\\boxed{0.5}", {"answer": "\\frac12"})
    assert find_grader("math_answer")("\\boxed{0.5}", {"solution": "so \\boxed{\\frac12}"})
    with pytest.raises(UsageError, match="cannot be read as math;"):
        find_grader("math_answer")("4", {"answer": "$$"})
    with pytest.raises(UsageError, match="no answer"):
        find_grader("math_answer")("4", {})


def test_graders() -> None:
    assert find_grader("numeric_answer")("so 4", {"answer": 4})
    assert find_grader("exact_match")(" four\n", {"answer": "four"})
    assert not find_grader("exact_match")("so four", {"answer": "four"})
    with pytest.raises(UsageError, match="no answer"):
        find_grader("numeric_answer")("4", {"solution": 4})
    with pytest.raises(UsageError, match='"numeric_answer"'):
        find_grader("numeric_answr")


@pytest.mark.parametrize(
    ("text", "answer"),
    [("<answer>4</answer>", "4"), ("<think>is it 3</think>\n<answer>4</answer>", "4"), ("it is 1e5", "1e5"),
     ("<answer>3</answer> or <answer>\\frac{1}{2}</answer>", "0.5")],
)  # fmt: skip
def test_math_in_answer_tags_and_with_exponents(text: str, answer: str) -> None:
    assert same_mathematics(text, answer) is True


def test_digits_of_every_script_are_read() -> None:
    """By every grader and reward, in the answer as in the reference."""
    decimals = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) == "Nd"]
    assert len(decimals) > 600
    assert "".join(map(ascii_digits, decimals)) == "".join(str(unicodedata.decimal(digit)) for digit in decimals)
    zeros = [digit for digit in decimals if unicodedata.decimal(digit) == 0]
    for zero in zeros:
        text = "".join(chr(ord(zero) + digit) for digit in (4, 0, 7))
        assert last_number(text) == 407
        for grader in ("numeric_answer", "math_answer", "ocw", "word_problem"):
            assert find_grader(grader)(f"\\boxed{{{text}}}", {"answer": "407"}), (grader, text)
            assert not find_grader(grader)(f"\\boxed{{{text}}}", {"answer": "408"}), (grader, text)
    for zero in zeros[:5]:
        text = "".join(chr(ord(zero) + digit) for digit in (4, 0, 7))
        assert same_mathematics(f"\\boxed{{{text}}}", "407")
        assert same_mathematics("\\boxed{407}", text)
