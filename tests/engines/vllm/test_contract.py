"""vLLM passes the contract of engines. What it does otherwise is stated here, and nowhere else.

- It applies min_p before top_k and top_p, so min_p together with top_p is refused.
- It has no temperature between 0 and 0.01; these are refused.
- In bfloat16, log-probabilities are within 0.05 nats of the trainer's on average, as for the native engine.
"""

from __future__ import annotations

from typing import Any

import pytest

from gruppo.engines.base import Request, SamplingParams
from gruppo.models.policy import LanguageModel
from tests.engines import test_contract as contract
from tests.engines.test_contract import ByHand, MakeEngine, check_frequencies
from tests.engines.vllm.conftest import Start

NOT_VLLM = {"all three"}
TRUNCATIONS = {name: row for name, row in contract.TRUNCATIONS.items() if name not in NOT_VLLM}

for _name, _test in vars(contract).items():
    if _name.startswith("test_") and _name != "test_truncated_frequencies_follow_the_distribution_by_hand":
        globals()[_name] = _test


@pytest.fixture
def make_engine(start: Start) -> MakeEngine:
    return start


@pytest.fixture
def draws() -> int:
    return 2000


@pytest.mark.parametrize(("options", "by_hand"), TRUNCATIONS.values(), ids=TRUNCATIONS.keys())
def test_truncated_frequencies(make_engine: MakeEngine, options: SamplingParams, by_hand: ByHand, draws: int) -> None:
    check_frequencies(make_engine, options, by_hand, draws)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 1.0, "top_p": 0.9, "min_p": 0.5}, "min_p = 0.5: vLLM applies it before top_p"),
        ({"temperature": 0.005}, "temperature = 0.005: vLLM samples at 0.01 or more"),
    ],
)
def test_what_vllm_does_otherwise_is_refused(
    make_engine: MakeEngine, policy: LanguageModel, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine(policy).generate([Request((5,), [(0,)])], SamplingParams(max_tokens=4, **options))


def test_a_sequence_that_is_too_long_is_refused(make_engine: MakeEngine, policy: LanguageModel) -> None:
    with pytest.raises(ValueError, match=r"may have 129 tokens together, and vLLM was started .* at most 128 tokens"):
        make_engine(policy).generate([Request((5, 6, 7), [(0,)])], SamplingParams(1.0, 126))
