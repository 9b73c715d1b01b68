"""Completions of all kinds, through rewards, graders, answers, steps, stop texts and the tables of a run."""

from __future__ import annotations

import json
import math
import sys
from contextlib import suppress
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from gruppo.algorithms.advantages import process_advantages
from gruppo.algorithms.credit import assign_advantages
from gruppo.algorithms.filtering import mark_trained, select
from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.native.engine import NativeEngine
from gruppo.errors import RunError, UsageError
from gruppo.evaluation.runner import Evaluation
from gruppo.evaluation.sets import EvalSet
from gruppo.evaluation.verdicts import mark
from gruppo.models.policy import LanguageModel
from gruppo.rewards.answers import exact_match, number
from gruppo.rewards.combine import combine
from gruppo.rewards.format import Regex, think_format
from gruppo.rewards.grading.graders import Named, find_grader
from gruppo.rewards.grading.last_number import last_number, same_number, same_text
from gruppo.rewards.grading.math_verify import same_mathematics
from gruppo.rewards.grading.verdicts import Verdict, verdicts
from gruppo.rewards.length import Overlong, Repetition
from gruppo.rewards.steps import checked_ends, lines, step_tokens
from gruppo.rollout.metrics import describe_groups
from gruppo.rollout.workers.reward_main import _score
from gruppo.rollout.workers.rewards import _outcome
from gruppo.runs.folder import RunFolder
from gruppo.runs.tables import EVALUATIONS, ROLLOUTS, rollout_rows
from gruppo.types import Completion, Group, Prompt, Reward
from gruppo.utils.metrics import Metrics
from gruppo.utils.text import as_json
from tests.conftest import make_tokenizer
from tests.fuzzing import ANY_TEXT, JSON_VALUES, NUMBERS, TEXT, clear, examples

TOKENIZER = make_tokenizer()
IDS = st.lists(st.integers(0, 47), min_size=1, max_size=12)
ANSWERS = TEXT | NUMBERS | JSON_VALUES
MATHS = st.sampled_from([
    "\\frac{1}{", "2", "+", "x", "^", "\\sqrt{", "}", "$", "\\boxed{", "=", "(", ")", "1e5", "####", " ",
    "<answer>", "</answer>", "%", "\\pi", ",", "_",
])  # fmt: skip


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("broken on purpose")

    __repr__ = __str__


def completion_of(ids: list[int], text: str | None = None, cut: bool = False) -> Completion:
    spoken = str(TOKENIZER.decode(ids)) if text is None else text
    size = len(ids)
    return Completion(tuple(ids), (-1.0,) * size, (True,) * size, "length" if cut else "stop", 0, spoken)


@examples(200, text=ANY_TEXT, answer=ANSWERS)
def test_answers_of_all_kinds(text: str, answer: Any) -> None:
    assert last_number(text) is None or last_number(text) == last_number(text)
    assert same_text(text, answer) in (True, False)
    with clear():
        assert same_number(text, answer) in (True, False)


@examples(25, parts=st.lists(MATHS, max_size=6), answer=st.lists(MATHS, max_size=4))
def test_mathematics_of_all_kinds(parts: list[str], answer: list[str]) -> None:
    with suppress(TimeoutError):  # an abstention
        assert same_mathematics("".join(parts), "".join(answer)) in (True, False, None)
    with clear():
        for grader in ("math_answer", "ocw"):
            assert verdicts("".join(parts), {"answer": "".join(answer)}, grader).correct in (True, False)


@examples(
    150,
    text=ANY_TEXT,
    grader=st.sampled_from(["numeric_answer", "exact_match", "choice", "reasoning_gym"]),
    columns=st.dictionaries(
        st.sampled_from(["answer", "solution", "choices", "question", "dataset", "parameters", "entry"]),
        ANSWERS,
        max_size=3,
    ),
)
def test_graders_on_all_kinds(text: str, grader: str, columns: dict) -> None:
    with clear():
        given = mark(text, Prompt("t/0", "q", (1,), "t", columns), Named(grader, find_grader(grader)))
        assert find_grader(grader)(text, columns) is given.correct


@examples(
    120,
    texts=st.lists(ANY_TEXT, min_size=1, max_size=4),
    ids=st.lists(IDS, min_size=4, max_size=4),
    chat=st.booleans(),
    answer=ANSWERS,
    ngram=st.integers(1, 4),
    most=st.integers(1, 9),
)
def test_rewards_on_all_kinds(texts: list, ids: list, chat: bool, answer: Any, ngram: int, most: int) -> None:
    completions = [[{"role": "assistant", "content": text}] if chat else text for text in texts]
    held = ids[: len(texts)]
    with clear():
        for made in (
            think_format(completions), Regex(r"\w*")(completions), Repetition(ngram)(completions),
            Overlong(most)(held), exact_match(completions, [answer] * len(texts)),
            number(completions, [answer] * len(texts)),
        ):  # fmt: skip
            assert len(made) == len(texts)
            assert all(math.isfinite(each) for each in made)


@examples(
    60,
    pattern=ANY_TEXT | JSON_VALUES,
    options=st.dictionaries(st.sampled_from(["ngram", "penalty", "max_tokens"]), JSON_VALUES, max_size=2),
)
def test_options_of_all_kinds(pattern: Any, options: dict) -> None:
    for make in (lambda: Regex(pattern), lambda: Repetition(**{k: v for k, v in options.items() if k != "max_tokens"}),
                 lambda: Overlong(options.get("max_tokens"), options.get("ngram"))):  # fmt: skip
        with clear():
            make()


STEPS = st.fixed_dictionaries(
    {"step_rewards": st.lists(NUMBERS | st.none() | TEXT, max_size=4) | JSON_VALUES,
     "step_ends": st.lists(st.integers(-2, 14) | NUMBERS, max_size=4) | JSON_VALUES}
)  # fmt: skip
RETURNED = (
    JSON_VALUES | st.lists(NUMBERS | st.none() | TEXT | STEPS | st.booleans(), max_size=4) | st.just(Unprintable())
)
GIVEN = RETURNED | st.lists(
    STEPS | st.just(Unprintable()) | st.just(ValueError("\ud800")) | NUMBERS, min_size=2, max_size=2
)


class Held:
    """A reward that gives what it was told to, as a process would call it."""

    options: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, value: Any, logged: Any) -> None:
        self.value, self.logged = value, logged

    def function(self, completions: Any, log_metric: Any, log_extra: Any, **_: Any) -> Any:
        if self.logged is not None:
            log_metric(*self.logged[0])
            log_extra(*self.logged[1])
        return self.value


LOGGED = st.none() | st.tuples(st.tuples(ANY_TEXT, NUMBERS), st.tuples(ANY_TEXT, st.lists(JSON_VALUES, max_size=3)))


@examples(200, value=GIVEN, logged=LOGGED, ids=st.lists(IDS, min_size=2, max_size=2))
def test_whatever_a_reward_returns_is_a_number_steps_or_an_abstention(value: Any, logged: Any, ids: list) -> None:
    completions = [completion_of(each) for each in ids]
    arguments = {"completions": [each.text for each in completions]}
    answer = json.loads(json.dumps(_score(Held(value, logged), arguments, {}, None)))  # type: ignore[arg-type]
    outcome = _outcome(answer, completions)
    rewards = [combine(["f"], [0.5], [each], {}) for each in outcome.values]
    assert len(rewards) == 2
    group = Group(Prompt("t/0", "q", (1, 2), "t", {}), completions, rewards)
    mark_trained([group], mask_truncated=False)
    from gruppo.config.method_section import Method

    settings, metrics = Method(name="grpo-process"), Metrics()
    select([group], settings)
    assign_advantages([group], settings, metrics)
    assert all(math.isfinite(each) for row in group.advantages for each in row)
    describe_groups([group], metrics)
    for name, numbers in outcome.metrics.items():
        metrics.mean(f"reward/log/{name}", sum(numbers), len(numbers))
    json.dumps(metrics.reduce(), allow_nan=False).encode()
    for reward in rewards:
        (reward.failure or "").encode()


@examples(
    120,
    rewards=st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=4),
    ends=st.lists(st.integers(0, 9), unique=True, min_size=4, max_size=4).map(sorted),
)
def test_step_rewards_of_all_sizes(rewards: list, ends: list) -> None:
    import torch

    given_ = (torch.tensor(rewards, dtype=torch.float64), tuple(ends[: len(rewards)]))
    made = process_advantages([[given_, given_]], [[10, 10]])[0]
    assert all(bool(torch.isfinite(each).all()) for each in made)


@examples(150, text=ANY_TEXT, ids=IDS)
def test_steps_end_within_their_completion(text: str, ids: list[int]) -> None:
    ends = checked_ends(lines, text)
    assert ends == sorted(set(ends))
    own = completion_of(ids)
    found = step_tokens(own, checked_ends(lines, own.text), TOKENIZER)
    assert all(0 <= token < len(ids) for token, _ in found)
    assert [token for token, _ in found] == sorted({token for token, _ in found})


@examples(60, given_ends=JSON_VALUES | st.lists(st.integers(-2, 9) | NUMBERS, max_size=4), text=ANY_TEXT)
def test_rules_that_give_any_ends(given_ends: Any, text: str) -> None:
    with clear():
        ends = checked_ends(lambda _: given_ends, text)
        assert all(0 < end <= len(text) for end in ends)


@examples(
    12,
    stops=st.lists(TEXT.filter(bool) | st.sampled_from(["a", "ab", "=", " "]), min_size=1, max_size=3),
    prompt=IDS,
    least=st.integers(0, 3),
    top_p=st.floats(0.01, 1),
    seed=st.integers(0, 99),
)
def test_stop_texts_of_all_kinds(
    policy: LanguageModel, stops: list, prompt: list, least: int, top_p: float, seed: int
) -> None:
    options = SamplingParams(1.0, 6, top_p=top_p, min_tokens=least, stop=tuple(stops))
    ((made,),) = NativeEngine(policy, 1).generate([Request(tuple(prompt), [(seed,)])], options)
    assert least or not any(stop in made.text for stop in stops)
    assert 1 <= len(made.token_ids) <= 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return RunFolder(tmp_path_factory.mktemp("run"))


OBJECTS = JSON_VALUES | st.sets(st.integers()) | st.binary(max_size=4) | st.just(Unprintable()) | st.just(object())
COLUMNS = st.dictionaries(ANY_TEXT, OBJECTS, max_size=3)


@examples(
    40,
    ids=st.lists(IDS, min_size=1, max_size=3),
    text=TEXT,
    columns=COLUMNS,
    name=TEXT,
    rewards=st.lists(st.floats(allow_nan=False, allow_infinity=False) | st.none(), min_size=3, max_size=3),
)
def test_tables_hold_what_was_made(
    run: RunFolder, ids: list, text: str, columns: dict, name: str, rewards: list
) -> None:
    prompt = Prompt(f"{name}/0", text, (1, 2), name, columns)
    group = Group(prompt, [completion_of(each) for each in ids], [
        Reward(reward, {name: reward}, extra={name: text}) for reward in rewards[: len(ids)]
    ])  # fmt: skip
    mark_trained([group], mask_truncated=False)
    path = run.table("rollouts", 1, rollout_rows(1, [group], TOKENIZER), ROLLOUTS)
    read = pq.read_table(path).to_pylist()
    assert [row["token_ids"] for row in read] == ids
    assert [row["reward"] for row in read] == rewards[: len(ids)]
    json.loads(read[0]["columns"])
    exam = EvalSet(
        "", [prompt], {prompt.task: Named("exact_match", same_text)}, SamplingParams(0.0, 12), len(ids), 0, None
    )
    verdicts = [[Verdict(True, text, "exact_match", {"boxed": False}) for _ in ids]]
    outcome = Evaluation(exam, [group.completions], verdicts)
    run.table("evaluations", 1, outcome.rows(), EVALUATIONS)
    outcome.figures()
    run.event("kind", text, 1, **{"prompt_id": prompt.id})


@examples(80, value=OBJECTS)
def test_columns_of_all_kinds_are_json(value: Any) -> None:
    as_json({"a": value}).encode()
    json.loads(as_json([value]))


@examples(60, message=ANY_TEXT)
def test_errors_are_one_line(message: str) -> None:
    for kind in (UsageError, RunError):
        text = str(kind(message))
        assert len(text.splitlines()) <= 1
        text.encode(sys.stderr.encoding or "utf-8")
