"""The tables of a run folder: one row per completion, or per answer to a held-out question; nothing is left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from gruppo.types import Completion, Group
from gruppo.utils.text import as_json
from gruppo.utils.token_text import TokenTexts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXT, _INTEGER, _FLOAT, _BOOLEAN = pa.string(), pa.int64(), pa.float64(), pa.bool_()

# The version of these schemas, in the metadata of every file as "gruppo_schema". Files without one are version 1.
SCHEMA_VERSION = 3
ADDED = {  # columns, by version
    2: frozenset({"entropy", "prompt_token_ids", "prompt_token_texts", "token_texts", "printed"}),
    3: frozenset({"continuation_tokens"}),
}
AHEAD = frozenset({"staleness"})  # columns of runs that sample ahead


ROLLOUTS = pa.schema(
    {
        "step": _INTEGER,
        "group": _INTEGER,
        "completion": _INTEGER,
        "prompt_id": _TEXT,
        "prompt": _TEXT,
        "columns": _TEXT,
        "text": _TEXT,
        "finish_reason": _TEXT,
        "policy_version": _INTEGER,
        "reward": _FLOAT,
        "reward_parts": _TEXT,
        "steps": _TEXT,
        "failure": _TEXT,
        "extra": _TEXT,
        "printed": _TEXT,
        "episode": _TEXT,
        "trained": _BOOLEAN,
        "skipped": _TEXT,
        "prompt_token_ids": pa.list_(_INTEGER),
        "prompt_token_texts": pa.list_(_TEXT),
        "token_ids": pa.list_(_INTEGER),
        "token_texts": pa.list_(_TEXT),
        "mask": pa.list_(_BOOLEAN),
        "sampling_logprobs": pa.list_(_FLOAT),
        "old_logprobs": pa.list_(_FLOAT),
        "ref_logprobs": pa.list_(_FLOAT),
        "entropy": pa.list_(_FLOAT),
        "advantages": pa.list_(_FLOAT),
        "values": pa.list_(_FLOAT),
        "returns": pa.list_(_FLOAT),
    }
)


# With a lag between sampling and training. `staleness`: how many steps' updates came between the weights that sampled
# the completion and those that it trains.
ROLLOUTS_AHEAD = ROLLOUTS.insert(ROLLOUTS.get_field_index("policy_version") + 1, pa.field("staleness", _INTEGER))


EVALUATIONS = pa.schema(
    {
        "eval_set": _TEXT,
        "prompt_id": _TEXT,
        "sample": _INTEGER,
        "question": _TEXT,
        "columns": _TEXT,
        "answer": _TEXT,
        "correct": _BOOLEAN,
        "extracted": _TEXT,
        "rule": _TEXT,
        "other_rules": _TEXT,
        "vote": _TEXT,
        "score": _FLOAT,
        "finish_reason": _TEXT,
        "episode": _TEXT,
        "prompt_token_ids": pa.list_(_INTEGER),
        "prompt_token_texts": pa.list_(_TEXT),
        "token_ids": pa.list_(_INTEGER),
        "token_texts": pa.list_(_TEXT),
        "mask": pa.list_(_BOOLEAN),
        "logprobs": pa.list_(_FLOAT),
    }
)


# `continuation_tokens`: sampled to label the completion's steps.
LABELS = pa.schema(
    {
        "prompt_id": _TEXT,
        "prompt": _TEXT,
        "columns": _TEXT,
        "prompt_token_ids": pa.list_(_INTEGER),
        "text": _TEXT,
        "token_ids": pa.list_(_INTEGER),
        "finish_reason": _TEXT,
        "right": _BOOLEAN,
        "step_texts": pa.list_(_TEXT),
        "step_ends": pa.list_(_INTEGER),
        "step_text_ends": pa.list_(_INTEGER),
        "soft": pa.list_(_FLOAT),
        "hard": pa.list_(_BOOLEAN),
        "continuation_tokens": _INTEGER,
    }
)


# One row per completion that was scored with another reward (`gruppo rescore`). `recorded`: its value in the run, the
# total reward or, if `against` names one, that part. `rescored`: the new total, of which `reward_parts` has the parts.
# Both are null if the completion is excluded; `failure` is the reason why it has no new reward.
RESCORES = pa.schema(
    {
        "step": _INTEGER,
        "group": _INTEGER,
        "completion": _INTEGER,
        "prompt_id": _TEXT,
        "against": _TEXT,
        "recorded": _FLOAT,
        "rescored": _FLOAT,
        "reward_parts": _TEXT,
        "failure": _TEXT,
    }
)


def versioned(schema: pa.Schema) -> pa.Schema:
    """The schema with its version, for a file that is written."""
    return schema.with_metadata({"gruppo_schema": str(SCHEMA_VERSION)})


def _unknown(completion: Completion) -> bool:
    """Whether nobody knows the log-probabilities with which a completion was sampled: it came from a dataset row, or
    from a function that samples and does not say them."""
    return any(
        sampled and math.isnan(value)
        for value, sampled in zip(completion.sampling_logprobs, completion.mask, strict=True)
    )


def _where_sampled(mask: Sequence[bool], values: Sequence[float] | None) -> list[float | None] | None:
    if values is None:
        return None
    return [value if sampled else None for value, sampled in zip(values, mask, strict=True)]


def rollout_rows(step: int, groups: Sequence[Group], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """One row per completion: texts, token ids and their texts, log-probabilities, rewards and advantages.

    A row also says whether the completion was trained on, or why not. Lists have one entry per token. Joined, the texts
    of the tokens are what they add to the prompt, with all special tokens. Log-probabilities and entropies that were
    not computed, and those of tokens that were not sampled, are None.
    """
    rows, texts = [], TokenTexts(tokenizer, special=True)
    for index, group in enumerate(groups):
        shared = {
            "step": step,
            "group": index,
            "prompt_id": group.prompt.id,
            "prompt": group.prompt.content if isinstance(group.prompt.content, str) else as_json(group.prompt.content),
            "prompt_token_ids": list(group.prompt.token_ids),
            "prompt_token_texts": texts.of(group.prompt.token_ids),
            "columns": as_json(dict(group.prompt.columns)),
            "skipped": group.skipped,
        }
        for number, (completion, reward) in enumerate(zip(group.completions, group.rewards, strict=True)):
            sampled = partial(_where_sampled, completion.mask)
            rows.append(
                {
                    **shared,
                    "completion": number,
                    "text": completion.text,
                    "finish_reason": completion.finish_reason,
                    "policy_version": completion.policy_version,
                    "staleness": completion.staleness(step),
                    "reward": reward.total,
                    "reward_parts": as_json(dict(reward.parts)),
                    "steps": as_json({name: steps._asdict() for name, steps in reward.steps.items()}),
                    "failure": reward.failure,
                    "extra": as_json(dict(reward.extra)),
                    "printed": as_json(dict(reward.printed)) if reward.printed else None,
                    "episode": None if completion.episode is None else as_json(asdict(completion.episode)),
                    "trained": group.trained[number],
                    "token_ids": list(completion.token_ids),
                    "token_texts": texts.of(completion.token_ids, group.prompt.token_ids),
                    "mask": list(completion.mask),
                    "sampling_logprobs": None if _unknown(completion) else sampled(completion.sampling_logprobs),
                    "old_logprobs": sampled(group.old_logprobs[number]),
                    "ref_logprobs": sampled(group.ref_logprobs[number]),
                    "entropy": sampled(group.entropy[number]),
                    "advantages": group.advantages[number],
                    "values": group.values[number] if group.values else None,
                    "returns": group.returns[number] if group.returns else None,
                }
            )
    return rows
