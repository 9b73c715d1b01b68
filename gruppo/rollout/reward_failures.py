"""Reward calls that can be rerun. Failed calls are saved in the run folder: failures/step-000012-NAME-HASH.json.

A file contains the arguments of the call. `gruppo rerun-reward FILE` calls the function again in a separate process. In
a debugger: `my_reward(**json.load(open(FILE))["arguments"])`. Every other call is rebuilt from the recorded rollouts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gruppo.config.labels import options_name, split_label
from gruppo.config.loading import load_recipe
from gruppo.errors import UsageError
from gruppo.rewards import RewardFunction
from gruppo.rollout.recorded_rows import completion_of, prompt_of, read_groups
from gruppo.rollout.workers.outcomes import call_arguments
from gruppo.rollout.workers.rewards import (
    RewardPool,
    Rewards,
    completion_columns,
    reward_names,
    trainer_state,
)
from gruppo.runs.atomic import write_whole
from gruppo.runs.reading import read_object, reading, require_own
from gruppo.runs.recorder import Recorder
from gruppo.runs.trust import code_of_call, refusal
from gruppo.types import Completion, Episode, Group, Prompt, Reward
from gruppo.utils.imports import IN_MEMORY
from gruppo.utils.paths import not_a_file
from gruppo.utils.text import text_of_content

FOLDER = "failures"
MOST_FILES, MOST_BYTES = 50, 4 * 2**20  # files per run; bytes of the arguments in one file


@dataclass(frozen=True)
class Failure:
    """Failure of a reward function on a group: the reason, and the number of completions excluded because of it."""

    name: str
    why: str
    group: Group
    completions: int


def failures_of(groups: Sequence[Group]) -> Iterator[Failure]:
    """The failures of each group, in order. Failures with the same reason are counted together."""
    for group in groups:
        counts = Counter(failure for reward in group.rewards for failure in reward.failures.items())
        for (name, why), count in sorted(counts.items()):
            yield Failure(name, why, group, count)


def record_failures(
    recorder: Recorder, folder: Path, step: int, groups: Sequence[Group], pool: Rewards, state: Mapping[str, Any]
) -> list[str]:
    """Record an event for each failure of a reward on a group and save the call. Returns the names of the files.

    `state`: the `trainer_state` that the functions were called with.
    """
    files = []
    for failure in failures_of(groups):
        file = None
        if failure.name in pool.names:  # an environment's call cannot be rerun on its own
            file = keep_call(folder, step, failure, pool, state)
        files += [] if file is None else [file]
        details = {"reward": failure.name, "completions": failure.completions, "file": file}
        message = f"{failure.name}: {failure.why}"
        recorder.event("reward_failed", message, step, prompt_id=failure.group.prompt.id, **details)
    for group in groups:  # failures of the reward model
        reasons = Counter(reward.failure for reward in group.rewards if not reward.failures)
        for why, count in reasons.items():
            if why:
                recorder.event("reward_failed", why, step, prompt_id=group.prompt.id, completions=count)
    return files


def keep_call(folder: Path, step: int, failure: Failure, pool: Rewards, state: Mapping[str, Any]) -> str | None:
    """Save the failed call in the run folder. Returns the file's name relative to it, or None if the limit of files is
    reached.

    If the group's arguments are too large, they are left out and the file says where else they are stored.
    """
    place, group = pool.names.index(failure.name), failure.group
    digest = hashlib.sha256(f"{group.prompt.id}\n{failure.why}".encode()).hexdigest()[:8]
    safe = re.sub(r"\W+", "-", failure.name, flags=re.ASCII)[:40]
    path = folder / FOLDER / f"step-{step:06d}-{safe}-{digest}.json"
    path.parent.mkdir(exist_ok=True)
    if len(list(path.parent.iterdir())) >= MOST_FILES:
        return None
    exact = True

    def as_text(value: Any) -> str:
        nonlocal exact
        exact = False
        return str(value)

    call = call_arguments(group.prompt, group.completions)
    columns = [*pool.columns, *completion_columns(group.completions)]
    content = {
        "reward": failure.name,
        "function": pool.paths[place],  # None: passed from Python
        "options": pool.options[place],
        "columns": [name for name in columns if name in call],
        "environment": pool.environment,
        "timeout": pool.timeout,
        "step": step,
        "prompt_id": group.prompt.id,
        "failure": failure.why,
        "trainer_state": dict(state),
    }
    try:
        arguments = json.dumps(call, default=as_text)
    except (TypeError, ValueError, RecursionError):
        arguments = "null"
    if len(arguments) > MOST_BYTES:
        arguments, content["left_out"] = "null", f"{len(arguments)} bytes; they are in rollouts/step-{step:06d}.parquet"
    head = json.dumps({**content, "exact": exact and arguments != "null"}, indent=1, default=str)
    write_whole(path, f'{head[:-2]},\n "arguments": {arguments}\n}}\n'.encode())
    return f"{FOLDER}/{path.name}"


def run_of(source: Path) -> Path:
    """The run folder that a source of calls belongs to."""
    return source if source.is_dir() else source.resolve().parent.parent


def read_call(file: str | Path) -> dict[str, Any]:
    """Read a saved reward call. Raises UsageError if the file is not one."""
    wrong = f"{file}: is not a saved reward call; give a file from a run's {FOLDER}/"
    if found := not_a_file(Path(file)):
        raise UsageError(f"{file}: is {found}, not a saved reward call; give a file from a run's {FOLDER}/")
    try:
        content = read_object(Path(file)) if not Path(file).exists() or Path(file).is_file() else {}
        arguments = content["arguments"]
        if arguments is None:
            where = content.get("left_out", "they cannot be written as JSON")
            raise UsageError(f"{file}: the call's arguments are not in it ({where})")
        size = len(arguments["completions"])
        lists = isinstance(content["columns"], list) and isinstance(content["options"], dict)
        lists &= all(isinstance(name, str) for name in content["environment"])
        lists &= content["function"] is None or isinstance(content["function"], str)
        sizes = {len(arguments[name]) for name in ("prompts", "completion_ids", *content["columns"])}
        numbers = isinstance(content["timeout"], int | float) and isinstance(content["trainer_state"], dict)
    except FileNotFoundError:
        raise UsageError(f"{file}: there is no such file; give one from a run's {FOLDER}/") from None
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UsageError(wrong) from None
    if not size or sizes != {size} or not lists or not numbers:
        raise UsageError(wrong)
    return dict(content)


def recorded_call(folder: Path, step: int | None, group: int | None, reward: str | None) -> dict[str, Any]:
    """The call of a reward on a group of a step, as `read_call` returns it, with the `recorded` values of the reward.

    `group`: its number in the step, from 0. `reward`: the name of the function, which may be left out if there is only
    one. Raises UsageError if the folder is not that of a run, or has no such call.
    """
    if not (folder / "recipe.toml").is_file():
        raise UsageError(
            f"{folder}: is not a saved reward call, nor the folder of a run; give a run folder, or a file from a "
            f"run's {FOLDER}/"
        )
    require_own(folder)
    if step is None or group is None:
        raise UsageError(f"{folder}: is a run folder; name the call too, e.g. --step 3 --group 0")
    recipe = load_recipe(folder / "recipe.toml")
    names = reward_names(recipe.reward.functions)
    if not names:
        raise UsageError(f"{folder}: the run has no reward functions, so it has no calls to repeat")
    if reward is None and len(names) > 1:
        raise UsageError(f"{folder}: the run has several rewards; name one, e.g. --reward={names[0]}")
    reward = names[0] if reward is None else reward
    if reward not in names:
        raise UsageError(f"--reward {reward}: is not a reward of the run; write one of {', '.join(names)}")
    groups = read_groups(folder / f"rollouts/step-{step:06d}.parquet")
    if not 0 <= group < len(groups):
        raise UsageError(f"--group {group}: step {step} has the groups 0 to {len(groups) - 1}")
    with reading(folder / f"rollouts/step-{step:06d}.parquet", "restore it from a copy"):
        rows = groups[group]
        function = recipe.reward.functions[names.index(reward)]
        prompt = prompt_of(rows[0])
        completions = [completion_of(row) for row in rows]
        return {
            "reward": reward,
            "function": None if split_label(function)[1].startswith(IN_MEMORY) else function,
            "options": dict(recipe.reward.options.get(options_name(function), {})),
            "columns": [*prompt.columns, *completion_columns(completions)],
            "environment": list(recipe.reward.environment),
            "timeout": recipe.reward.timeout,
            "prompt_id": prompt.id,
            "trainer_state": trainer_state(recipe, step),
            "arguments": call_arguments(prompt, completions),
            "recorded": [json.loads(row["reward_parts"]).get(reward) for row in rows],
        }


def find_call(
    source: Path, step: int | None = None, group: int | None = None, reward: str | None = None
) -> dict[str, Any]:
    """The call in a file from failures/, or one that the rollouts of a run folder record."""
    if source.is_dir():
        return recorded_call(source, step, group, reward)
    if step is not None or group is not None or reward is not None:
        raise UsageError(f"{source}: is a file with one call; leave --step, --group and --reward out")
    return read_call(source)


def rerun_reward(
    source: str | Path,
    function: str | RewardFunction | None = None,
    timeout: float | None = None,
    log: Path | None = None,
    *,
    step: int | None = None,
    group: int | None = None,
    reward: str | None = None,
    trust: bool = False,
) -> list[Reward]:
    """Repeat a reward call. Returns the reward of each completion.

    `source`: a file from failures/, or a run folder with the `step`, the `group` (its number in the step, from 0) and
    the name of the `reward`, unless there is only one. The function that the source names is imported and called,
    unless `function` is given; a function that was passed from Python has no name there. `timeout`: in seconds, default
    the recorded one; `log`: file for the function's output. `trust`: run the function that the source names even if it
    comes from somebody else. Raises UsageError if there is no such call, if its function cannot be used, or if it is
    code from somebody else without `trust`.
    """
    file = Path(source)
    call = find_call(file, step, group, reward)
    if function is None and not trust and (code := code_of_call(run_of(file), call)):
        raise refusal(file, code, "pass trust=True")
    chosen = function if function is not None else call["function"]
    if chosen is None:
        raise UsageError(
            f"{file}: the reward {call['reward']!r} was passed from Python; name it with --function=file.py:name, or "
            "call gruppo.rollout.reward_failures.rerun_reward(source, function)"
        )
    arguments, columns = call["arguments"], call["columns"]
    texts = [
        content if isinstance(content, str) else text_of_content(content[-1]["content"])
        for content in arguments["completions"]
    ]
    own = [Episode(columns={name: arguments[name][place] for name in columns}) for place in range(len(texts))]
    completions = [
        Completion(tuple(ids), (0.0,) * len(ids), (True,) * len(ids), "stop", 0, text, episode)
        for ids, text, episode in zip(arguments["completion_ids"], texts, own, strict=True)
    ]
    ending = arguments.get("prompt_endings", [""])[0]  # files of earlier versions have none
    prompt = Prompt(call["prompt_id"], arguments["prompts"][0], (), "", {}, ending=ending)
    options = {options_name(chosen): call["options"]} if isinstance(chosen, str) else {}
    limit = timeout or call["timeout"]
    with RewardPool([chosen], [], columns, limit, 1, log, options, environment=call["environment"]) as pool:
        rewards, _ = pool.score([(prompt, completions)], call["trainer_state"])
    return rewards[0]
