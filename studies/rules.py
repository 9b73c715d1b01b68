"""Rewards that are wrong on purpose: those of choices.toml, controls.toml and noise.toml.

Each verdict is a function of prompt, completion and `seed` alone, so runs repeat and resume exactly. The same
completion always gets the same verdict: this is a rule that errs, not a rule that wavers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from gruppo.rewards.answers import last_number


def noisy_last_number(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], share: float, seed: int = 0, **_: Any
) -> list[float | None]:
    """`last_number` with a `share` (0 to 1) of its verdicts flipped: 1 becomes 0, and 0 becomes 1."""
    verdicts = last_number(completions, answer)
    return [
        verdict if verdict is None or _uniform(prompt, completion, seed) >= share else 1.0 - verdict
        for prompt, completion, verdict in zip(prompts, completions, verdicts, strict=True)
    ]


def chance(prompts: Sequence[Any], completions: Sequence[Any], seed: int = 0, **_: Any) -> list[float]:
    """1 or 0 with equal probability, whatever the completion says."""
    return [
        float(_uniform(prompt, completion, seed) < 0.5) for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _uniform(prompt: Any, completion: Any, seed: int) -> float:
    """A number from 0 to 1 that is a hash of its arguments."""
    digest = hashlib.sha256(repr((prompt, completion, seed)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
