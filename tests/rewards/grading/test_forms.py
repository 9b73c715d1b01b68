"""Kinds of answers with readers of their own: times of day, complex numbers, matrices, functions, weighed options."""

from __future__ import annotations

import pytest

from gruppo.rewards.grading.choices import choice_of
from gruppo.rewards.grading.complex_numbers import written_out
from gruppo.rewards.grading.formulas import same_formula
from gruppo.rewards.grading.graders import GRADERS
from gruppo.rewards.grading.labels import function_of, unlabelled_pair
from gruppo.rewards.grading.matrices import expanded_determinants, flat, from_lists
from gruppo.rewards.grading.normal_form import normal
from gruppo.rewards.grading.times import grade_time, plain, reference_times, times
from gruppo.rewards.grading.weighing import weighed

ASKED = "What time is it?"


@pytest.mark.parametrize("hour", range(24))
@pytest.mark.parametrize("minute", [0, 5, 30, 59])
def test_every_time_in_every_spelling(hour: int, minute: int) -> None:
    half, short = ("a", "p")[hour // 12], (hour - 1) % 12 + 1
    spellings = [f"{hour}:{minute:02}" if hour > 12 or not hour else f"{short}:{minute:02} {half}m"]
    spellings += [
        f"{short}:{minute:02}{text}"
        for text in (f" {half}.m.", f"{half}m", f" {half.upper()}.M.", f" {half} m", f" {half}.m")
    ]
    spellings += [f"${short}{{:}}{minute:02} \\text{{ {half}.m.}}$", f"{short:02}:{minute:02}:00 {half.upper()}M"]
    if not minute:
        spellings.append(f"{short} {half}m")
    for text in spellings:
        (time,) = times(plain(text))
        assert (time.seconds, time.sure) == (3600 * hour + 60 * minute, True), text
        other = f"{short}:{minute:02} {'ap'[hour < 12]}.m."
        assert grade_time(text, f"{short}:{minute:02} {half}.m.")
        assert grade_time(text, other) is False


@pytest.mark.parametrize(
    ("answer", "question", "is_time"),
    [
        ("4:30 p.m.", "", True),
        ("noon", "", True),
        ("3 o'clock", "", True),
        ("3:30", "", False),
        ("3:30", ASKED, True),
        ("16:30", "When does the train arrive?", True),
        ("3:30", "What is the ratio of cats to dogs at the time when the shop closes? When will it change?", False),
        ("3:30", "How long does it take?", False),
        ("3/30", ASKED, False),
        ("4.30", ASKED, False),
        ("30 pm", "", False),
        ("the pump runs until 4 p.m.", "", False),
        ("2 pm and 4 pm", "", True),
        ("5", ASKED, False),
        ("x = 4:30", ASKED, False),
    ],
)
def test_references_that_are_times(answer: str, question: str, is_time: bool) -> None:
    assert bool(reference_times(answer, question)) == is_time
    assert (grade_time("4:30", answer, question) is None) == (not is_time)


def test_a_ratio_stays_a_ratio() -> None:
    ratio = {"answer": "3:30", "question": "What is the ratio of cats to dogs?"}
    time = {"answer": "3:30", "question": ASKED}
    for grader in ("numeric_answer", "math_answer", "ocw", "word_problem"):
        assert not GRADERS[grader]("\\boxed{1:10}", time), grader
        assert GRADERS[grader]("\\boxed{3:30}", time), grader
    assert GRADERS["numeric_answer"]("1:10", ratio)
    assert not GRADERS["numeric_answer"]("3:30 p.m.", {"answer": "4"})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\\begin{vmatrix}a & b \\\\ c & d\\end{vmatrix}", "(a\\cdot d-b\\cdot c)"),
        ("|\\begin{pmatrix}5\\end{pmatrix}|", "(5)"),
        ("\\begin{vmatrix}0.5 & 2 \\\\ \\frac{1}{3} & -4\\end{vmatrix}", "(-\\frac{8}{3})"),
        ("\\begin{vmatrix}x+1 & 0 \\\\ 7 & y\\end{vmatrix}", "((x+1)\\cdot y)"),
        ("\\det \\begin{pmatrix}5\\end{pmatrix}+1", "(5)+1"),
        ("\\begin{pmatrix}1 & 2\\end{pmatrix}", "\\begin{pmatrix}1 & 2\\end{pmatrix}"),
        ("|\\begin{pmatrix}1 & 2\\end{pmatrix}|", "|\\begin{pmatrix}1 & 2\\end{pmatrix}|"),  # the length of a vector
        ("|x| + \\begin{pmatrix}1\\end{pmatrix}", "|x| + \\begin{pmatrix}1\\end{pmatrix}"),
        ("\\begin{pmatrix}", "\\begin{pmatrix}"),
    ],
)
def test_determinants(text: str, shown: str) -> None:
    assert expanded_determinants(text) == shown


@pytest.mark.parametrize("kind", ["matrix", "pmatrix", "bmatrix", "Bmatrix", "smallmatrix", "psmallmatrix", "matrix*"])
def test_every_matrix_environment_is_the_same_matrix(kind: str) -> None:
    text = f"\\begin{{{kind}}}1 & 2 \\\\ 3 & 4\\end{{{kind}}}"
    assert normal(text) == "\\begin{pmatrix}1 & 2 \\\\ 3 & 4\\end{pmatrix}"
    assert not same_formula(text, "\\begin{Vmatrix}1 & 2 \\\\ 3 & 4\\end{Vmatrix}")


def test_a_determinant_of_size_three() -> None:
    rows = "2 & 0 & 1 \\\\ 1 & 3 & 2 \\\\ 1 & 1 & 4"
    assert same_formula(f"\\begin{{vmatrix}}{rows}\\end{{vmatrix}}", "18")
    assert not same_formula(f"\\begin{{vmatrix}}{rows}\\end{{vmatrix}}", "22")


def test_lists_as_matrices() -> None:
    assert from_lists("[[1, 2], [3,4]]") == "\\begin{pmatrix}1 &  2 \\\\ 3 & 4\\end{pmatrix}"
    assert from_lists("[[1, 2], [3]]") == "[[1, 2], [3]]"
    assert flat("\\begin{pmatrix}1 \\\\ 2\\end{pmatrix}") == "(1,2)"
    assert flat("\\begin{pmatrix}\\end{pmatrix}") == "\\begin{pmatrix}\\end{pmatrix}"


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("2{}", True),
        ("{}+{}", True),
        ("4{}-{}-{}", True),
        ("3{}", False),
        ("{}", False),
        ("x{}", False),
        ("2{}+1", False),
        ("{}{}", False),
        ("2", False),
    ],
)
def test_multiples_and_sums_of_matrices(answer: str, same: bool) -> None:
    answer = answer.replace("{}", "\\begin{pmatrix}1 & 2 \\\\ 3 & 4\\end{pmatrix}")
    assert same_formula(answer, "\\begin{bmatrix}2 & 4 \\\\ 6 & 8\\end{bmatrix}") is same


def test_polar_forms() -> None:
    assert written_out("2\\operatorname{cis}(\\pi)") == "2(\\cos(\\pi)+i\\sin(\\pi))"
    assert written_out("\\text{cis} 60^\\circ") == "(\\cos(60^\\circ)+i\\sin(60^\\circ))"
    assert written_out("decision") == "decision"


@pytest.mark.parametrize(
    ("answer", "wanted", "same"),
    [
        ("i(2-i)", "1+2i", True),
        ("3i + 4j", "3i - 4j", False),
        ("-1", "i^2", True),
        ("(1+i)^{20}", "-1024", True),
        ("\\frac{5}{3-4i}", "\\frac{3+4i}{5}", True),
        ("\\sum_{i=1}^{3} i", "6", True),
        ("3+4i", "3+4", False),
        ("|2i|", "2", True),
        ("2+3j", "2+3i", True),
        ("2-3j", "2+3i", False),
        ("i+2j", "2i+j", False),
        ("i+2j", "3i", False),
        ("(1+i)^{1000000}", "i", False),
    ],
)
def test_the_imaginary_unit(answer: str, wanted: str, same: bool) -> None:
    assert same_formula(answer, wanted) is same


def test_functions() -> None:
    assert function_of("f^{-1}(x) = 2x") == ("f^-1", "x", "2x")
    assert function_of("x \\mapsto 2x") == ("y", "x", "2x")
    assert function_of("2x = 3") is None
    assert unlabelled_pair("f(t) = 2t + \\tan t", "g(x) = 2x") is None
    assert unlabelled_pair("f(t) = 2t + \\tan t", "f(x) = 1") == ("2x + \\tan x", "1")
    assert unlabelled_pair("f(t) = 2t + x", "f(x) = 1") is None
    assert unlabelled_pair("f(2) = 7", "f(3) = 7") is None
    assert unlabelled_pair("f(x) = 2x", "y - 2x = 0") == ("y = 2x", "y - 2x = 0")
    assert unlabelled_pair("f(x) = 3", "x = 3") == ("f(x) = 3", "x = 3")


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("For sure D, it can't be A.", "D"),
        ("Not B but C.", "C"),
        ("Between A and C, the answer is C.", "C"),
        ("A and C are both correct.", "AC"),
        ("B or C", None),
        ("Vitamin C helps.", None),
        ("Everything but B.", None),
        ("Is it B?", None),
        ("不是B，而是C。", "C"),
        ("不是A就是B。", None),
        ("", None),
    ],
)
def test_weighed_options(text: str, letters: str | None) -> None:
    found = weighed(text, "ABCD")
    assert (found and found.letters) == letters


def test_a_weighed_option_is_one_of_the_questions() -> None:
    assert weighed("Surely D, not A.", "ABC") is None
    chosen = choice_of("For sure D, it can't be A.", [], "ABCD")
    assert chosen is not None
    assert (chosen.letters, chosen.rule) == ("D", "weighed")
