"""Questions of an evaluation among the training questions, and recall."""

from __future__ import annotations

import pytest

from gruppo.study.contamination import overlap, question_text, recall, words_of

STORY = "Anna has three red apples and gives two of them to her brother Ben who eats one"


def test_spaces_case_and_forms_do_not_count_but_signs_do() -> None:
    assert words_of("What  is\n2+3?") == words_of("what is 2 + 3 ?")
    assert words_of("ﬁve") == words_of("FIVE")
    assert words_of("He said: (two) pears.") == words_of("he said two pears")
    assert words_of("2 + 3") != words_of("2 - 3")


def test_same_and_near_questions_are_found() -> None:
    training = [STORY, "What is 7 + 5?", "Something else entirely, about pears"]
    found = overlap([STORY.upper(), f"{STORY}. How many are left?", "What is 7 + 6?", "A new question"], training)
    assert (found.questions, found.training, found.exact, found.near) == (4, 3, 1, 1)
    assert found.examples[1] == {"question": f"{STORY}. How many are left?", "training": STORY}


def test_half_of_the_ngrams_is_near_and_less_is_not() -> None:
    words = [f"w{number}" for number in range(24)]  # 17 n-grams
    for shared, near in ((16, 1), (15, 0)):  # 9 and 8 of them
        question = " ".join([*words[:shared], *(f"x{number}" for number in range(24 - shared))])
        assert overlap([question], [" ".join(words)]).near == near


def test_a_common_prompt_does_not_make_questions_near() -> None:
    prompt = "Solve the following problem and put the final answer into a box at the very end"
    training = [f"{prompt}: item {number} costs {number} coins" for number in range(40)]
    assert overlap([f"{prompt}: which of them is new?"], training).near == 0
    assert overlap([f"{prompt}: which of them is new?"], training[:5]).near == 1, "five cannot show what is common"


def test_the_question_of_a_row() -> None:
    assert question_text({"prompt": "long", "question": "short"}) == "short"
    assert question_text({"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}) == "u"


def test_recall_is_the_share_that_a_model_completes() -> None:
    ends = {"Anna has three": " red apples", "What is the": " answer"}
    found = recall(["Anna has three red apples", "What is the capital?"], lambda texts: [ends[text] for text in texts])
    assert found == {"questions": 2, "exact": 0.5, "words": pytest.approx(0.5)}
