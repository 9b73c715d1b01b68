"""Reward options: how they reach the reward, and which are refused before any work."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gruppo.config.loading import RecipeError, load_recipe
from gruppo.errors import UsageError
from gruppo.evaluation.datasets import require_independent_audit
from gruppo.rewards import reward_path
from gruppo.rollout.workers.rewards import RewardPool
from gruppo.runs.trust import code_of
from tests.rollout.workers.test_rewards import group, totals
from tests.small_runs import small_run

OWN = '''
import pathlib

def scaled(completions, level=1, factor=1.0, **columns):
    return [factor * level[0] if isinstance(level, list) else factor * level for _ in completions]

class Counts:
    """Counts its calls; instantiated once."""

    def __init__(self, start, step=1):
        if step == 0:
            raise ZeroDivisionError("no step")
        self.count, self.step = start, step

    def __call__(self, completions, **columns):
        self.count += self.step
        return [self.count] * len(completions)

class NoCall:
    pass
'''


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return str(path)


def scores(function: Any, options: dict[str, Any], *texts: str, **columns: Any) -> list[float | None]:
    named = {function: options} if options else {}
    with RewardPool([function], [], list(columns), workers=1, options=named) as pool:
        return totals(pool.score([group(*texts, **columns)], {})[0][0])


def test_builtin() -> None:
    assert scores("regex", {"pattern": r"\d+"}, "12", "a") == [1, 0]
    assert scores("repetition", {"ngram": 1, "penalty": -2.0}, "a a", "a b") == [-1, 0]
    assert scores("overlong", {"max_tokens": 4, "buffer_tokens": 4}, "a") == [-0.5]  # two tokens


def test_function_of_the_users_file(own: str) -> None:
    assert scores(f"{own}:scaled", {"factor": 3.0}, "a", "b") == [3, 3]
    assert scores(f"{own}:scaled", {"factor": 3.0}, "a", level=2) == [6]


def test_class_is_instantiated_once_and_then_called(own: str) -> None:
    name = f"{own}:Counts"
    with RewardPool([name], [], [], workers=1, options={name: {"start": 10, "step": 2}}) as pool:
        rewards = pool.score([group("a"), group("b"), group("c")], {})[0]
    assert [totals(scored) for scored in rewards] == [[12], [14], [16]]


def test_object_or_class_or_partial_from_python() -> None:
    class Always:
        def __init__(self, value: float = 5.0) -> None:
            self.value = value

        def __call__(self, completions: list[str], **_: Any) -> list[float]:
            return [self.value] * len(completions)

    def scaled(completions: list[str], factor: float, **_: Any) -> list[float]:
        return [factor] * len(completions)

    assert scores(Always, {}, "a") == [5]
    assert scores(Always(7), {}, "a") == [7]
    with RewardPool([partial(scaled, factor=2.0)], [], [], workers=1) as pool:
        assert pool.names == ["scaled"]
        assert totals(pool.score([group("a")], {})[0][0]) == [2]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("regex", {}, ["reward.options.regex.pattern", "missing"]),
        ("regex", {"pattern": "("}, ["reward.options.regex.pattern = '('", "unterminated"]),
        ("regex", {"pattern": 3}, ["reward.options.regex.pattern = 3"]),
        ("regex", {"patern": "a"}, ["reward.options.regex.patern", 'did you mean "pattern"']),
        ("think_format", {"tag": "x"}, ["reward.options.think_format.tag", "no options"]),
        ("think_format", {"completions": []}, ["reward.options.think_format.completions", "the run passes"]),
        ("overlong", {"max_tokens": 0}, ["reward.options.overlong.max_tokens = 0", "1 or more"]),
        ("overlong", {"max_tokens": 4, "buffer_tokens": 5}, ["buffer_tokens = 5", "max_tokens = 4"]),
        ("overlong", {"buffer_tokens": 2.5}, ["buffer_tokens = 2.5"]),
        ("repetition", {"ngram": 0}, ["reward.options.repetition.ngram = 0"]),
        ("repetition", {"penalty": 0.5}, ["reward.options.repetition.penalty = 0.5", "at most 0"]),
        ("OWN:scaled", {"facto": 2}, ['own.py:scaled".facto = 2', 'did you mean "factor"']),
        ("OWN:scaled", {"level": 2}, ['own.py:scaled".level = 2', "the run passes level itself"]),
        ("OWN:Counts", {}, ['own.py:Counts".start', "missing"]),
        ("OWN:Counts", {"start": 1, "step": 0}, ["ZeroDivisionError: no step"]),
        ("OWN:NoCall", {}, ["cannot be called"]),
    ],
)
def test_wrong_options_are_refused_at_start(own: str, name: str, options: dict[str, Any], words: list[str]) -> None:
    name = name.replace("OWN", own)
    with pytest.raises(UsageError) as caught:
        RewardPool([name], [], ["level"], options={name: options})
    for word in words:
        assert word in str(caught.value)


def test_options_of_a_function_that_is_not_used() -> None:
    with pytest.raises(UsageError, match=r'reward\.options\.regx .* did you mean "regex"'):
        RewardPool(["regex"], [], [], options={"regx": {"pattern": "a"}})
    with pytest.raises(UsageError, match=r"functools\.partial"):
        RewardPool([lambda completions: [1.0]], [], [], options={"<lambda>": {"a": 1}})
    with pytest.raises(RecipeError, match=r'reward\.options\.regx = .*did you mean "regex"'):
        load_recipe({"model": {"name": "m"}, "reward": {"functions": ["regex"], "options": {"regx": {}}}})
    load_recipe({"model": {"name": "m"}, "reward": {"options": {"regex": {"pattern": "a"}}}})


def test_recipe_options_reach_the_reward(tiny_folder: str, tmp_path: Path, own: str) -> None:
    """At most eight tokens and a buffer of eight: each token costs an eighth, so the reward shows the length."""
    result = small_run(
        tiny_folder,
        tmp_path / "run",
        run__steps=1,
        reward__functions=["overlong", f"{own}:scaled"],
        reward__options={"overlong": {"buffer_tokens": 8}, f"{own}:scaled": {"factor": 3.0}},
    )
    line = result.metrics[0]
    assert line["reward/overlong/mean"] == pytest.approx(-line["completion/length"] / 8)
    assert line["reward/scaled/mean"] == 3


def test_changed_options_are_a_changed_recipe(tiny_folder: str, tmp_path: Path) -> None:
    settings = {"reward__functions": ["repetition"], "run__steps": 1}
    small_run(tiny_folder, tmp_path / "run", reward__options={"repetition": {"ngram": 2}}, **settings)
    with pytest.raises(UsageError, match="options"):
        small_run(tiny_folder, tmp_path / "run", resume=True, reward__options={"repetition": {"ngram": 3}}, **settings)


def test_labels_give_one_function_several_sets_of_options(tiny_folder: str, tmp_path: Path) -> None:
    functions = ["any = regex", "short = regex", "both =  tests/rewards/functions.py:likes_letters"]
    result = small_run(
        tiny_folder,
        tmp_path / "run",
        run__steps=1,
        reward__functions=functions,
        reward__options={"any": {"pattern": ".*"}, "short": {"pattern": ".{0,6}"}},
    )
    (metrics,) = (line for line in result.metrics if "reward/mean" in line)
    parts = {name: metrics[f"reward/{name}/mean"] for name in ("any", "short", "both")}
    assert parts["any"] != parts["short"]
    texts = list(result.rollouts()["text"])
    for name, pattern in (("any", ".*"), ("short", ".{0,6}")):
        matches = [re.fullmatch(pattern, text.strip()) is not None for text in texts]
        assert parts[name] == pytest.approx(sum(matches) / len(texts))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"functions": ["regex", "regex"], "options": {"regex": {"pattern": "a"}}}, 'names "regex" 2 times; give each'),
        ({"functions": ["a = regex", "a = choice"]}, 'two have the label "a"'),
        ({"functions": ["a = regex"], "options": {"regex": {"pattern": "a"}}}, "options.regex.*no function of this"),
        ({"functions": ["a=regex"]}, r'"a=regex": a label is made of .*; write "a = regex"'),
        ({"functions": ["a= regex"], "options": {"a": {"pattern": "a"}}}, 'write "a = regex"'),
        ({"functions": ["my-label = regex"]}, 'write "my_label = regex"'),
        ({"functions": ["2 = regex"]}, 'write "_2 = regex"'),
        ({"functions": ["= regex"]}, 'write "label = regex"'),
        ({"functions": ["a=own.py:f"]}, 'write "a = own.py:f"'),
        ({"functions": ["a = regexp"]}, None),
    ],
)
def test_labels_are_checked(reward: dict[str, Any], message: str | None) -> None:
    if message is None:
        with pytest.raises(UsageError, match='did you mean "regex"'):
            reward_path(reward["functions"][0])
        return
    with pytest.raises(RecipeError, match=message):
        load_recipe({"model": {"name": "x"}, "reward": reward})


def test_labels_from_python_are_checked_and_paths_may_contain_an_equals_sign(tmp_path: Path) -> None:
    for name in ("a=regex", "my-label = regex"):
        with pytest.raises(UsageError, match="a label is made of letters"):
            reward_path(name)
    (tmp_path / "a=b.py").write_text("")
    for path in (f"{tmp_path}/a=b.py:f", "runs/lr=1/own.py:f", "verl:a=b.py:f"):
        assert reward_path(path) == path


def test_a_file_with_an_equals_sign_in_its_name_is_no_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.py").write_text("")
    assert reward_path("a=b.py:f") == "a=b.py:f"


def test_an_unknown_option_names_the_label(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"reward\.options\.short\.patern = 'a': unknown option; did you mean"):
        RewardPool(["short = regex"], [], [], options={"short": {"pattern": "b", "patern": "a"}})


def test_the_code_behind_a_label_is_named() -> None:
    recipe = load_recipe(
        {
            "model": {"name": "x"},
            "reward": {"functions": ["mine = evil.py:f"], "options": {"mine": {"level": 2}}},
            "audit": {"function": "evil.py:f"},
        }
    )
    code = code_of(recipe)[0]
    assert (code.name, code.options) == ("evil.py:f", {"level": 2})
    require_independent_audit(recipe, recipe.reward.functions)
    with pytest.raises(UsageError, match="audits itself"):
        require_independent_audit(recipe, ["mine = evil.py:f", "other = evil.py:f"])
