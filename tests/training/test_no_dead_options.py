"""Every field of the recipe that says how a method learns changes what is computed, or the recipe is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, get_args

import pyarrow.parquet as pq
import pytest

from gruppo.config.loading import RecipeError, load_recipe
from gruppo.config.method_section import Critic, Method
from gruppo.config.methods import METHODS
from gruppo.config.sections import Optimizer, RewardModel, Sampling, Section
from gruppo.errors import UsageError
from gruppo.models.footprint import measure_footprint
from gruppo.models.loading import find_model, load_model
from gruppo.rewards.combine import combine
from gruppo.rollout.workers.rewards import RewardPool
from gruppo.runs.results import Result
from gruppo.training.api import train
from gruppo.types import Completion, Prompt, Steps
from gruppo.utils.progress import NullProgress
from tests.conftest import make_policy
from tests.small_runs import recipe

# Another value for every number and text; fields with a list of choices are set to each of them.
OTHER: dict[str, dict[str, Any]] = {
    "method": {
        "success_threshold": 0.3,
        "deduplicate": "not",
        "max_per_prompt": 1,
        "dpo_beta": 0.7,
        "surrogate": ["clipped", "clipped-weight", "log-likelihood"],
        "clip_low": 0.9,
        "clip_high": 5.0,
        "kl_coef": 0.3,
        "tis_cap": 0.5,
        "inner_updates": 3,
        "minibatches": 2,
        "advantage_epsilon": 0.5,
        "kl_importance": True,
        "mask_truncated": "not",
        "dynamic_sampling_rounds": 1,
    },
    "sampling": {
        "prompts_per_step": 3,
        "group_size": 3,
        "max_tokens": 2,
        "temperature": 0.8,
        "stop": list("bcdfgh0257"),
    },
    "optimizer": {
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "warmup_ratio": 0.9,
        "beta1": 0.5,
        "beta2": 0.5,
        "epsilon": 1e-3,
        "weight_decay": 0.5,
        "max_grad_norm": 1e-3,
        "state": ["8bit"],  # "cpu" computes the same: tests/training/test_lean_optimizers.py
    },
    "critic": {"learning_rate": 1e-3, "clip": 0.001, "gamma": 0.5, "gae_lambda": 0.5},
    "reward_model": {
        "weight": 3.0,
        "prompts": 5,
        "held_out": 0.6,
        "learning_rate": 1e-2,
        "epochs": 3,
        "batch_size": 4,
        "replay_fraction": 0.5,
        "replay_capacity": 1,
        "seed": 5,
        "split": "lines",
        "continuations": 1,
    },
}
SECTIONS: dict[str, type[Section]] = {
    "method": Method,
    "sampling": Sampling,
    "optimizer": Optimizer,
    "critic": Critic,
    "reward_model": RewardModel,
}
ROWS = [{"prompt": f"{first}{second}", "answer": first} for first in "abcdef" for second in "123"]
# An SFT row has one completion per prompt; preferences have two.
GIVEN = [
    {**row, "completion": f"{row['answer']}b"[: 1 + place % 2], "chosen": f"{row['answer']}b", "rejected": "z1"}
    for place, row in enumerate(ROWS)
]


def test_every_field_has_another_value() -> None:
    for table, section in SECTIONS.items():
        choices = {name for name, field in section.model_fields.items() if _choices(field.annotation)}
        assert OTHER[table].keys() | choices == section.model_fields.keys() - {"name"} | (
            {"name"} & OTHER[table].keys()
        ), table


def _choices(annotation: Any) -> list[Any]:
    return [value for value in get_args(annotation) if isinstance(value, str)]


def _others(table: str, name: str, now: Any) -> list[Any]:
    written = OTHER[table].get(name)
    if written == "not":
        return [not now]
    if written is None:
        written = _choices(SECTIONS[table].model_fields[name].annotation)
    several = isinstance(written, list) and name != "stop"
    return [value for value in (written if several else [written]) if value != now]


class InProcessPool(RewardPool):
    """Scores without processes: the share of letters a to m; the same for all completions of a prompt with an "a".

    With `steps`, also one reward for each token.
    """

    steps = False

    def __init__(self, functions: Any, weights: Any, *_: Any, **__: Any) -> None:
        super().__init__(functions, weights, [], workers=0)
        self.names, self.weights = ["letters"], [1.0]

    def score(self, groups: Any, state: Any, advance: Any = None) -> Any:
        def reward(prompt: Prompt, completion: Completion) -> Any:
            text = completion.text
            value = 0.0 if "a" in prompt.text else sum("a" <= letter <= "m" for letter in text) / max(1, len(text))
            result = combine(self.names, self.weights, [value], {})
            size = len(completion.token_ids)
            steps = Steps(tuple(float(token % 3) for token in completion.token_ids), tuple(range(size)))
            return replace(result, steps={"letters": steps}) if self.steps and size else result

        return [[reward(prompt, completion) for completion in completions] for prompt, completions in groups], {}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from gruppo.models.weights import save_model

    folder = tmp_path_factory.mktemp("models") / "peaked"
    save_model(make_policy(initializer_range=0.45, eos_token_id=[0, *range(1, 48, 4)]), folder)
    return str(folder)


@pytest.fixture(scope="module")
def outcome(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder, runs, known = tmp_path_factory.mktemp("runs"), iter(range(10**6)), dict[str, Any]()

    def run(settings: Mapping[str, Any]) -> Any:
        """What a run computes: its completions, their rewards and advantages, and its final weights."""
        if (key := json.dumps(settings)) in known:
            return known[key]
        method = load_recipe(settings).method
        rows = GIVEN if method.source == "dataset" else ROWS
        patch.setattr(InProcessPool, "steps", method.credit == "step" and "reward_model" not in settings)
        result = train(settings, prompts=rows, out=folder / str(next(runs)), progress=False)
        columns = ("token_ids", "reward_parts", "advantages")
        table = [[row[column] for column in columns] for row in rollouts(result)]
        return known.setdefault(key, (result.summary["weights_sha256"], table))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gruppo.training.setup.RewardPool", InProcessPool)
        patch.setattr("gruppo.training.run.Checkpointer.save", lambda _: None)
        # Every run has the same model, so it is loaded and its memory is measured once: that takes half of the time of
        # such a run.
        loaded = load_model(find_model(model), "cpu", "float32")
        once = measure_footprint(loaded, 0, NullProgress())
        patch.setattr("gruppo.training.sizing.measure_footprint", lambda *_: once)
        tokenizer = {id(loaded.tokenizer): loaded.tokenizer}
        patch.setattr("gruppo.training.sizing.load_model", lambda *_: copy.deepcopy(loaded, dict(tokenizer)))
        yield run


def rollouts(result: Result) -> list[dict[str, Any]]:
    return [row for file in sorted((result.path / "rollouts").iterdir()) for row in pq.read_table(file).to_pylist()]


def base(model: str, method: str, changes: Mapping[str, Any], reward_model: Mapping[str, Any]) -> dict[str, Any]:
    """Two steps with two updates each where the method allows it, and weights that move far enough to be clipped."""
    settings = recipe(model, run__steps=2, sampling__max_tokens=3, sampling__group_size=6)
    settings["method"] = {"name": method, **changes}
    settings["optimizer"] = {"learning_rate": 3e-2}
    if METHODS[method].settings.get("surrogate") != "log-likelihood":
        settings["method"]["inner_updates"] = 2
    if "dataset" in (METHODS[method].settings.get("source"), changes.get("source")):
        del settings["reward"], settings["sampling"]["group_size"]
    if reward_model:
        settings["reward_model"] = {"prompts": 4, "batch_size": 8, "learning_rate": 1e-3, **reward_model}
        settings["run"]["iterations"] = 2 if METHODS[method].settings.get("source", "policy") == "policy" else 1
    if METHODS[method].settings.get("credit") == "value":
        settings["critic"] = {"learning_rate": 1e-2}
    return settings


def changed(settings: Mapping[str, Any], table: str, field: str, value: Any, model: str) -> dict[str, Any]:
    value = model if value == "the same model" else value
    return {**settings, table: {**settings.get(table, {}), field: value}}


def variations() -> Iterator[tuple[str, dict[str, Any], str]]:
    """Method, changes of [method] that it starts from, and the table whose fields are changed."""
    for method in METHODS:
        for table in SECTIONS:
            yield method, {}, table
    yield "dpo", {"source": "dataset"}, "method"


@pytest.mark.parametrize(("method", "changes", "table"), variations())
def test_no_field_is_without_effect(method: str, changes: dict[str, Any], table: str, model: str, outcome: Any) -> None:
    process = METHODS[method].settings.get("credit") == "step"
    reward_model: dict[str, Any] = {}
    if table == "reward_model":
        steps = {"kind": "process", "split": "tests/functions_of_users.py:every_two", "labels": "soft"}
        reward_model = steps if process else {"kind": "outcome"}
    settings = base(model, method, changes, reward_model)
    if METHODS[method].settings.get("source") == "dataset" and reward_model:
        with pytest.raises(RecipeError, match="scores nothing"):
            load_recipe(settings)
        return
    resolved = load_recipe(settings)
    for field in SECTIONS[table].model_fields:
        one_update = (table, field) == ("method", "surrogate") and resolved.method.inner_updates == 1
        if field == "name" or one_update:  # at ratio 1, all surrogates have the same gradient
            continue
        for value in _others(table, field, getattr(getattr(resolved, table), field)):
            if (method, value) == ("sft", "group-token-mean"):  # the sequence mean, if every group has one completion
                continue
            other = changed(settings, table, field, value, model)
            try:
                after = outcome(other)
            except UsageError:
                continue
            assert after != outcome(settings), f"{table}.{field} = {value!r} changes nothing"
