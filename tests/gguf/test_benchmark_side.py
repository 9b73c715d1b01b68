"""llama.cpp's side of the benchmark decodes every completion after its own prompt."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from gruppo.models.gguf_file import write_gguf
from tests.gguf.models import make_model
from tests.odd_tokenizers import byte_level

pytest.importorskip("llama_cpp")
SIDES = Path(__file__).parents[2] / "benchmarks/sides"
PROMPTS = [[70, 71, 72, 80, 66], [5, 9, 11, 40, 41, 42, 43, 44], [90]]


@pytest.mark.parametrize("unified", [False, True])
def test_logprobs_of_sampled_tokens_are_the_models(
    unified: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SIDES))
    side = importlib.import_module("llama_side")
    model, tokenizer = make_model("llama"), byte_level()
    write_gguf(model, tokenizer, (tokenizer.eos_token_id,), tmp_path / "tiny.gguf", "float32", "tiny")
    work: dict[str, Any] = {
        "prompts": PROMPTS, "lengths": [[12] * 4] * 3, "max_tokens": 12, "end_id": tokenizer.eos_token_id, "seed": 7,
    }  # fmt: skip
    sequences = side.Sequences(work, {"unified": unified}, tmp_path / "tiny.gguf")
    completions = sequences.sample(12)
    assert [[len(token_ids) for token_ids in group] for group in completions] == work["lengths"]
    assert len({tuple(token_ids) for group in completions for token_ids in group}) == 12
    completions[1][2] = completions[1][2][:3]
    for prompt, group, found in zip(PROMPTS, completions, sequences.score(completions), strict=True):
        for token_ids, theirs in zip(group, found, strict=True):
            ids = torch.tensor([[*prompt, *token_ids]])
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            ours = logprobs.gather(-1, ids[0, len(prompt) :, None])[:, 0]
            torch.testing.assert_close(torch.tensor(theirs, dtype=torch.float32), ours, atol=0.02, rtol=0)
