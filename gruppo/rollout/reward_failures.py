"""Calls of rewards that failed, kept as files of the run folder that repeat them: failures/step-000012-0-name.json.

A file holds what the function was called with. `gruppo rerun-reward FILE` calls it again in a process of its own; in a
debugger: `my_reward(**json.load(open(FILE))["arguments"])`.
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

from gruppo.errors import UsageError
from gruppo.rewards import RewardFunction
from gruppo.rollout.workers.rewards import RewardPool, call_arguments
from gruppo.runs.atomic import write_whole
from gruppo.runs.recorder import Recorder
from gruppo.types import Completion, Group, Prompt, Reward

FOLDER = "failures"
MOST_FILES, MOST_BYTES = 50, 4 * 2**20  # of a run's folder, and of one file


@dataclass(frozen=True)
class Failure:
    """A function's failure on a group: why, and how many of its completions abstain by it."""

    name: str
    why: str
    group: Group
    completions: int


def failures_of(groups: Sequence[Group]) -> Iterator[Failure]:
    """Each failure of each group, in order: those with one reason are one."""
    for group in groups:
        counts = Counter(failure for reward in group.rewards for failure in reward.failures.items())
        for (name, why), count in sorted(counts.items()):
            yield Failure(name, why, group, count)


def record_failures(
    recorder: Recorder, folder: Path, step: int, groups: Sequence[Group], pool: RewardPool, state: Mapping[str, Any]
) -> list[str]:
    """An event for each failure of a reward on a group, with a file that keeps the call; the files' names.

    `state`: the `trainer_state` that the functions were called with.
    """
    files = []
    for failure in failures_of(groups):
        file = None
        if failure.name in pool.names:  # an environment's call cannot be repeated alone
            file = keep_call(folder, step, failure, pool, state)
        files += [] if file is None else [file]
        details = {"reward": failure.name, "completions": failure.completions, "file": file}
        message = f"{failure.name}: {failure.why}"
        recorder.event("reward_failed", message, step, prompt_id=failure.group.prompt.id, **details)
    for group in groups:  # of the reward model
        for why, count in Counter(each.failure for each in group.rewards if not each.failures).items():
            if why:
                recorder.event("reward_failed", why, step, prompt_id=group.prompt.id, completions=count)
    return files


def keep_call(folder: Path, step: int, failure: Failure, pool: RewardPool, state: Mapping[str, Any]) -> str | None:
    """Write the call that failed into the run folder; the file's name in it, or None where there are enough.

    Of a group that is too large for a file the arguments are left out, and it says where else they are.
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

    content = {
        "reward": failure.name,
        "function": pool.paths[place],  # None: it was given from Python
        "options": pool.options[place],
        "columns": pool.columns,
        "environment": pool.environment,
        "timeout": pool.timeout,
        "step": step,
        "prompt_id": group.prompt.id,
        "failure": failure.why,
        "trainer_state": dict(state),
    }
    try:
        arguments = json.dumps(call_arguments(group.prompt, group.completions), default=as_text)
    except (TypeError, ValueError, RecursionError):
        arguments = "null"
    if len(arguments) > MOST_BYTES:
        arguments, content["left_out"] = "null", f"{len(arguments)} bytes; they are in rollouts/step-{step:06d}.parquet"
    head = json.dumps({**content, "exact": exact and arguments != "null"}, indent=1, default=str)
    write_whole(path, f'{head[:-2]},\n "arguments": {arguments}\n}}\n'.encode())
    return f"{FOLDER}/{path.name}"


def read_call(file: str | Path) -> dict[str, Any]:
    """The content of such a file. Raises UsageError for another one."""
    wrong = f"{file}: holds no call of a reward; give a file of a run's {FOLDER}/"
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        held = content["arguments"]
        if held is None:
            where = content.get("left_out", "they are no JSON")
            raise UsageError(f"{file}: the call's arguments are not in it ({where})")
        size = len(held["completions"])
        lists = isinstance(content["columns"], list) and isinstance(content["options"], dict)
        sizes = {len(held[name]) for name in ("prompts", "completion_ids", *content["columns"])}
        numbers = isinstance(content["timeout"], int | float) and isinstance(content["trainer_state"], dict)
    except FileNotFoundError:
        raise UsageError(f"{file}: there is no such file; give one of a run's {FOLDER}/") from None
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UsageError(wrong) from None
    if not size or sizes != {size} or not lists or not numbers:
        raise UsageError(wrong)
    return dict(content)


def rerun_reward(
    file: str | Path,
    function: str | RewardFunction | None = None,
    timeout: float | None = None,
    log: Path | None = None,
) -> list[Reward]:
    """Call a reward again as it was called when it failed; what it gives to each completion.

    The function is the one that the file names, whose code then runs, unless another is given (one that came from
    Python has no name in it). `timeout` in seconds; `log`: a file for what it prints. Raises UsageError.
    """
    held = read_call(file)
    chosen = function if function is not None else held["function"]
    if chosen is None:
        raise UsageError(
            f"{file}: the reward {held['reward']!r} was given from Python; name it by --function file.py:name, or call "
            "gruppo.rollout.reward_failures.rerun_reward(FILE, function)"
        )
    arguments, columns = held["arguments"], held["columns"]
    texts = [each if isinstance(each, str) else str(each[-1]["content"]) for each in arguments["completions"]]
    completions = [
        Completion(tuple(ids), (0.0,) * len(ids), (True,) * len(ids), "stop", 0, text)
        for ids, text in zip(arguments["completion_ids"], texts, strict=True)
    ]
    own = {name: arguments[name][0] for name in columns}
    prompt = Prompt(held["prompt_id"], arguments["prompts"][0], (), "", own)
    options = {chosen: held["options"]} if isinstance(chosen, str) else {}
    limit = timeout or held["timeout"]
    with RewardPool([chosen], [], columns, limit, 1, log, options, environment=held["environment"]) as pool:
        rewards, _ = pool.score([(prompt, completions)], held["trainer_state"])
    return rewards[0]
