"""Fuzz rewards, graders, answer extraction, step splitting, stop strings and run tables with arbitrary completions."""

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
from gruppo.data.references import alternatives
from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.native.engine import NativeEngine
from gruppo.errors import RunError, UsageError
from gruppo.evaluation.runner import Evaluation
from gruppo.evaluation.sets import EvalSet
from gruppo.evaluation.verdicts import grade_answer
from gruppo.models.policy import LanguageModel
from gruppo.rewards.answers import exact_match
from gruppo.rewards.answers import last_number as last_number_reward
from gruppo.rewards.combine import combine
from gruppo.rewards.format import Regex, think_format
from gruppo.rewards.grading.graders import Named, find_grader
from gruppo.rewards.grading.last_number import last_number, same_number, same_text
from gruppo.rewards.grading.math_verify import same_mathematics
from gruppo.rewards.grading.verdicts import Verdict, verdicts
from gruppo.rewards.length import Overlong, Repetition
from gruppo.rewards.steps import checked_ends, lines, step_tokens
from gruppo.rollout.metrics import describe_groups
from gruppo.rollout.workers.outcomes import outcome_of
from gruppo.rollout.workers.reward_main import _score
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
MATH_PARTS = st.sampled_from([
    "\\frac{1}{", "2", "+", "x", "^", "\\sqrt{", "}", "$", "\\boxed{", "=", "(", ")", "1e5", "####", " ",
    "<answer>", "</answer>", "%", "\\pi", ",", "_",
])  # fmt: skip


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("broken on purpose")

    __repr__ = __str__


def completion_of(ids: list[int], text: str | None = None, truncated: bool = False) -> Completion:
    decoded = str(TOKENIZER.decode(ids)) if text is None else text
    size = len(ids)
    return Completion(tuple(ids), (-1.0,) * size, (True,) * size, "length" if truncated else "stop", 0, decoded)


@examples(200, text=ANY_TEXT, answer=ANSWERS)
def test_answer_comparison_accepts_any_answer(text: str, answer: Any) -> None:
    assert last_number(text) is None or last_number(text) == last_number(text)
    assert same_text(text, answer) in (True, False)
    with clear():
        assert same_number(text, answer) in (True, False)


@examples(25, parts=st.lists(MATH_PARTS, max_size=6), answer=st.lists(MATH_PARTS, max_size=4))
def test_math_graders_accept_any_formula(parts: list[str], answer: list[str]) -> None:
    with suppress(TimeoutError):  # reported as a failure
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
def test_graders_accept_any_text_and_columns(text: str, grader: str, columns: dict) -> None:
    with clear():
        verdict = grade_answer(text, Prompt("t/0", "q", (1,), "t", columns), Named(grader, find_grader(grader)))
        assert find_grader(grader)(text, columns) is verdict.correct


@examples(
    120,
    texts=st.lists(ANY_TEXT, min_size=1, max_size=4),
    ids=st.lists(IDS, min_size=4, max_size=4),
    chat=st.booleans(),
    answer=ANSWERS,
    ngram=st.integers(1, 4),
    max_tokens=st.integers(1, 9),
)
def test_rewards_are_finite_for_any_text(
    texts: list, ids: list, chat: bool, answer: Any, ngram: int, max_tokens: int
) -> None:
    completions = [[{"role": "assistant", "content": text}] if chat else text for text in texts]
    completion_ids = ids[: len(texts)]
    with clear():
        for rewards in (
            think_format(completions), Regex(r"\w*")(completions), Repetition(ngram)(completions),
            Overlong(max_tokens)(completion_ids),
        ):  # fmt: skip
            assert len(rewards) == len(texts)
            assert all(math.isfinite(reward) for reward in rewards)
        for judge in (exact_match, last_number_reward):
            values = judge(completions, [answer] * len(texts))
            assert len(values) == len(texts)
            assert all(value in ((0, 1) if alternatives(answer) else (None,)) for value in values)


@examples(
    60,
    pattern=ANY_TEXT | JSON_VALUES,
    options=st.dictionaries(st.sampled_from(["ngram", "penalty", "max_tokens"]), JSON_VALUES, max_size=2),
)
def test_reward_options_are_accepted_or_refused_clearly(pattern: Any, options: dict) -> None:
    for build in (lambda: Regex(pattern), lambda: Repetition(**{k: v for k, v in options.items() if k != "max_tokens"}),
                 lambda: Overlong(options.get("max_tokens"), options.get("ngram"))):  # fmt: skip
        with clear():
            build()


STEPS = st.fixed_dictionaries(
    {"step_rewards": st.lists(NUMBERS | st.none() | TEXT, max_size=4) | JSON_VALUES,
     "step_ends": st.lists(st.integers(-2, 14) | NUMBERS, max_size=4) | JSON_VALUES}
)  # fmt: skip
RETURNED = (
    JSON_VALUES | st.lists(NUMBERS | st.none() | TEXT | STEPS | st.booleans(), max_size=4) | st.just(Unprintable())
)
REWARD_RESULTS = RETURNED | st.lists(
    STEPS | st.just(Unprintable()) | st.just(ValueError("\ud800")) | NUMBERS, min_size=2, max_size=2
)


class LoadedReward:
    """A reward as a reward process holds it; returns a fixed value and logs fixed metrics."""

    options: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, value: Any, logged: Any) -> None:
        self.value, self.logged = value, logged

    def function(self, completions: Any, log_metric: Any, log_extra: Any, **_: Any) -> Any:
        if self.logged is not None:
            log_metric(*self.logged[0])
            log_extra(*self.logged[1])
        return self.value


LOGGED = st.none() | st.tuples(st.tuples(ANY_TEXT, NUMBERS), st.tuples(ANY_TEXT, st.lists(JSON_VALUES, max_size=3)))


@examples(200, value=REWARD_RESULTS, logged=LOGGED, ids=st.lists(IDS, min_size=2, max_size=2))
def test_any_result_of_a_reward_becomes_rewards_or_a_failure(value: Any, logged: Any, ids: list) -> None:
    completions = [completion_of(token_ids) for token_ids in ids]
    arguments = {"completions": [completion.text for completion in completions]}
    answer = json.loads(json.dumps(_score(LoadedReward(value, logged), arguments, {}, None)))  # type: ignore[arg-type]
    outcome = outcome_of(answer, completions)
    rewards = [combine(["f"], [0.5], [value], {}) for value in outcome.values]
    assert len(rewards) == 2
    group = Group(Prompt("t/0", "q", (1, 2), "t", {}), completions, rewards)
    mark_trained([group], mask_truncated=False)
    from gruppo.config.method_section import Method

    settings, metrics = Method(name="grpo-process"), Metrics()
    select([group], settings)
    assign_advantages([group], settings, metrics)
    assert all(math.isfinite(advantage) for row in group.advantages for advantage in row)
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
def test_advantages_of_huge_step_rewards_are_finite(rewards: list, ends: list) -> None:
    import torch

    steps = (torch.tensor(rewards, dtype=torch.float64), tuple(ends[: len(rewards)]))
    advantages = process_advantages([[steps, steps]], [[10, 10]])[0]
    assert all(bool(torch.isfinite(row).all()) for row in advantages)


@examples(150, text=ANY_TEXT, ids=IDS)
def test_steps_end_within_their_completion(text: str, ids: list[int]) -> None:
    ends = checked_ends(lines, text)
    assert ends == sorted(set(ends))
    completion = completion_of(ids)
    tokens = step_tokens(completion, checked_ends(lines, completion.text), TOKENIZER, [])
    assert all(0 <= token < len(ids) for token, _ in tokens)
    assert [token for token, _ in tokens] == sorted({token for token, _ in tokens})


@examples(60, returned=JSON_VALUES | st.lists(st.integers(-2, 9) | NUMBERS, max_size=4), text=ANY_TEXT)
def test_ends_from_any_splitter_are_checked(returned: Any, text: str) -> None:
    with clear():
        ends = checked_ends(lambda _: returned, text)
        assert all(0 < end <= len(text) for end in ends)


@examples(
    12,
    stops=st.lists(TEXT.filter(bool) | st.sampled_from(["a", "ab", "=", " "]), min_size=1, max_size=3),
    prompt=IDS,
    min_tokens=st.integers(0, 3),
    top_p=st.floats(0.01, 1),
    seed=st.integers(0, 99),
)
def test_any_stop_string_is_respected(
    policy: LanguageModel, stops: list, prompt: list, min_tokens: int, top_p: float, seed: int
) -> None:
    options = SamplingParams(1.0, 6, top_p=top_p, min_tokens=min_tokens, stop=tuple(stops))
    ((completion,),) = NativeEngine(policy, 1).generate([Request(tuple(prompt), [(seed,)])], options)
    assert min_tokens or not any(stop in completion.text for stop in stops)
    assert 1 <= len(completion.token_ids) <= 6


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
def test_tables_keep_completions_unchanged(
    run: RunFolder, ids: list, text: str, columns: dict, name: str, rewards: list
) -> None:
    prompt = Prompt(f"{name}/0", text, (1, 2), name, columns)
    group = Group(prompt, [completion_of(token_ids) for token_ids in ids], [
        Reward(reward, {name: reward}, extra={name: text}) for reward in rewards[: len(ids)]
    ])  # fmt: skip
    mark_trained([group], mask_truncated=False)
    path = run.table("rollouts", 1, rollout_rows(1, [group], TOKENIZER), ROLLOUTS)
    read = pq.read_table(path).to_pylist()
    assert [row["token_ids"] for row in read] == ids
    assert [row["reward"] for row in read] == rewards[: len(ids)]
    json.loads(read[0]["columns"])
    eval_set = EvalSet(
        "", [prompt], {prompt.task: Named("exact_match", same_text)}, SamplingParams(0.0, 12), len(ids), 0, None
    )
    verdicts = [[Verdict(True, text, "exact_match", {"boxed": False}) for _ in ids]]
    outcome = Evaluation(eval_set, [group.completions], verdicts)
    run.table("evaluations", 1, outcome.rows(), EVALUATIONS)
    outcome.figures()
    run.event("kind", text, 1, **{"prompt_id": prompt.id})


@examples(80, value=OBJECTS)
def test_any_columns_become_json(value: Any) -> None:
    as_json({"a": value}).encode()
    json.loads(as_json([value]))


@examples(60, message=ANY_TEXT)
def test_errors_are_one_line(message: str) -> None:
    for kind in (UsageError, RunError):
        text = str(kind(message))
        assert len(text.splitlines()) <= 1
        text.encode(sys.stderr.encoding or "utf-8")
