"""How long what is left of a study takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from gruppo.preflight import check
from gruppo.study.arms import load_study
from gruppo.study.plan import describe_plan
from gruppo.utils.progress import NullProgress
from tests.study.conftest import STUDY, write_study

ARMS = """
[[arms]]
name = "unscaled"
changes = {{ "method.scale" = "none", "method.aggregation" = "token-mean" }}

[[arms]]
name = "long"
changes = {{ "sampling.max_tokens" = 16 }}

[[arms]]
name = "penalized"
changes = {{ "method.kl_coef" = 0.01 }}

[[arms]]
name = "more-penalized"
changes = {{ "method.kl_coef" = 0.02 }}

[[evaluations]]"""


def test_arms_that_cost_the_same_are_measured_once(
    tmp_path: Path, tiny_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fake(recipe, **_):
        asked.append(recipe.run.name)
        return type("Check", (), {"seconds_per_step": 10.0})

    monkeypatch.setattr(check, "check_recipe", fake)
    study = load_study(write_study(tmp_path, tiny_folder, tokens=64, text=STUDY.replace("\n[[evaluations]]", ARMS, 1)))
    shown = describe_plan(study, (), NullProgress())
    assert asked == ["tiny-low-1", "tiny-long-1", "tiny-penalized-1"]
    # 64 tokens are a step of 2 x 4 completions of 8 tokens, and half a step of those of 16: 5 x 10 + 5 s a seed.
    assert "about 2 min" in shown
    assert describe_plan(study, (), NullProgress()) == shown
    assert len(asked) == 3, "the measurements are kept"
