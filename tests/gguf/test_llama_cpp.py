"""llama.cpp computes what gruppo computes, from the files that gruppo writes. `make test-gguf` runs this."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.llama_cpp import LlamaCppEngine
from gruppo.engines.native.engine import NativeEngine
from gruppo.errors import RunError, UsageError
from gruppo.models.compatibility import wrap_model
from gruppo.models.gguf_file import DTYPES, write_gguf
from gruppo.models.gguf_vocabulary import Vocabulary, gguf_vocabulary
from gruppo.models.loading import find_model, load_model
from gruppo.models.policy import LanguageModel
from gruppo.training import gguf_export
from gruppo.training.export import export
from gruppo.types import Completion
from tests.gguf.models import MODELS, make_model
from tests.models.test_gguf import DIGITS, LLAMA3, QWEN2, rounded, split, with_splits
from tests.odd_tokenizers import CHATML, byte_level, closing
from tests.training.test_gguf_export import run_of, start

llama_cpp = pytest.importorskip("llama_cpp")

PROMPTS = [(70, 71, 72, 80, 66), (5,), tuple(range(3, 100))]
# llama.cpp keeps keys and values in float16, and multiplies by q8_0 matrices in 8 bits.
DIFFERENCE = {"float32": 0.02, "float16": 0.03, "bfloat16": 0.3, "q8_0": 0.6}


def engines(name: str, dtype: str, folder: Path) -> tuple[LlamaCppEngine, LanguageModel]:
    """llama.cpp with a file, and a policy with the numbers that are in the file."""
    model, tokenizer = make_model(name), byte_level(template=CHATML)
    write_gguf(model, tokenizer, (tokenizer.eos_token_id,), folder / "tiny.gguf", dtype, "tiny")
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim > 1:
                tensor.copy_(rounded(tensor, dtype))
    return LlamaCppEngine(folder / "tiny.gguf", tokenizer, 128), wrap_model(model, tokenizer)


def differences(policy: LanguageModel, prompts: Sequence[Sequence[int]], answers: Sequence[Completion]) -> torch.Tensor:
    """By how much the log-probabilities of completions differ from the policy's own."""
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([[*prompt, *answer.token_ids]])
        with torch.no_grad():
            logprobs = policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        chosen = logprobs.gather(-1, ids[0, len(prompt) :, None])[:, 0]
        found.append(chosen - torch.tensor(answer.sampling_logprobs))
    return torch.cat(found).abs()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_logprobs_are_those_of_the_numbers_in_the_file(name: str, dtype: str, tmp_path: Path) -> None:
    engine, policy = engines(name, dtype, tmp_path)
    requests = [Request(prompt, [(0, number)]) for number, prompt in enumerate(PROMPTS)]
    answers = [group[0] for group in engine.generate(requests, SamplingParams(1.0, 24))]
    assert all(len(answer.token_ids) == 24 or answer.finish_reason == "stop" for answer in answers)
    found = differences(policy, PROMPTS, answers)
    print(f"{name} {dtype}: mean {found.mean():.5f}, max {found.max():.5f}")
    assert found.max() < DIFFERENCE[dtype]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_the_native_engines(name: str, tmp_path: Path) -> None:
    """Where two tokens are almost equally likely, rounding may choose: completions are compared up to there."""
    engine, policy = engines(name, "float32", tmp_path)
    requests = [Request(prompt, [(0,)]) for prompt in PROMPTS]
    ours = NativeEngine(policy, 4).generate(requests, SamplingParams(0.0, 24))
    theirs = engine.generate(requests, SamplingParams(0.0, 24))
    for prompt, (one,), (other,) in zip(PROMPTS, ours, theirs, strict=True):
        pairs = enumerate(zip(one.token_ids, other.token_ids))
        first = next((place for place, (left, right) in pairs if left != right), None)
        if first is not None:
            with torch.no_grad():
                logits = policy.model(input_ids=torch.tensor([[*prompt, *one.token_ids[:first]]])).logits[0, -1]
            assert logits[one.token_ids[first]] - logits[other.token_ids[first]] < 0.02
    assert any(one.token_ids == other.token_ids for (one,), (other,) in zip(ours, theirs))


def test_streams_stop_texts_limits_and_ends(tmp_path: Path) -> None:
    engine, _ = engines("llama", "float32", tmp_path)
    request = Request(PROMPTS[0], [(0, 1), (0, 2), (0, 1)], limits=[3, 9, 24])
    ((first, second, third),) = engine.generate([request], SamplingParams(1.0, 24))
    assert len(first.token_ids) == 3
    assert first.finish_reason == "length"
    assert third.token_ids[:3] == first.token_ids, "the same stream, although others were sampled in between"
    assert second.token_ids[:3] != first.token_ids
    stop = next(letter for letter in third.text[2:] if "!" <= letter <= "~")
    ((stopped,),) = engine.generate([Request(PROMPTS[0], [(0, 1)])], SamplingParams(1.0, 24, stop=(stop,)))
    assert stopped.finish_reason == "stop"
    assert stopped.text == third.text[: third.text.index(stop)]
    end = byte_level().eos_token_id
    assert end in engine.eos_ids
    ((long,),) = engine.generate([Request(PROMPTS[1], [(3,)])], SamplingParams(50.0, 24, min_tokens=24))
    assert not set(long.token_ids[:-1]) & set(engine.eos_ids)


TOKENIZERS = {
    "gpt-2": byte_level(template=CHATML),
    "smollm": with_splits(*DIGITS),
    "qwen2": with_splits(*split(QWEN2)),
    "llama-bpe": with_splits(*split(LLAMA3), ignore_merges=True),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer, and llama.cpp with a file that has it."""
    tokenizer, file = TOKENIZERS[request.param], tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(make_model("llama"), tokenizer, (tokenizer.eos_token_id,), file, "float32", "tiny")
    return tokenizer, LlamaCppEngine(file, tokenizer, 32)


PIECES = [
    "<|im_start|>",
    "<think>",
    "</s>",
    "ab",
    " a",
    "44 4",
    "I've 'LL",
    "\n\n",
    "\r\n ",
    "\t",
    "é",
    "漢字",
    "😶‍🌫️",
    "１２",
    "a\u0301",
]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(PIECES) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))))
def test_tokens_of_any_text_are_equal(tokenized: Any, parts: list[str]) -> None:
    tokenizer, engine = tokenized
    text = "".join(parts)
    assert engine.tokens_of(text) == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("tokenizer", [byte_level(), closing(byte_level())], ids=["plain", "with BOS and EOS"])
def test_tokens_around_a_text_are_equal(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_gguf(make_model("llama"), tokenizer, (tokenizer.eos_token_id,), tmp_path / "t.gguf", "float32", "tiny")
    model = llama_cpp.Llama(str(tmp_path / "t.gguf"), vocab_only=True, verbose=False)
    assert model.tokenize(b"ab 4", add_bos=True, special=True) == tokenizer.encode("ab 4")


def test_chat_template_and_ends_are_in_the_file(tmp_path: Path) -> None:
    tokenizer = byte_level(template=CHATML)
    ends = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>", "<pad>"])
    write_gguf(make_model("llama"), tokenizer, ends, tmp_path / "tiny.gguf", "float32", "tiny")
    engine = LlamaCppEngine(tmp_path / "tiny.gguf", tokenizer, 32)
    assert set(ends) <= set(engine.eos_ids)
    metadata = llama_cpp.Llama(str(tmp_path / "tiny.gguf"), vocab_only=True, verbose=False).metadata
    chat = llama_cpp.llama_chat_format.Jinja2ChatFormatter(
        template=metadata["tokenizer.chat_template"], eos_token="</s>", bos_token="<s>"
    )
    messages = [{"role": "user", "content": "What is 4 + 4?"}]
    assert chat(messages=messages).prompt == tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def test_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(UsageError, match=r"broken\.gguf: llama\.cpp cannot load it"):
        LlamaCppEngine(tmp_path / "broken.gguf", byte_level(), 32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "llama3"])
def test_exports_are_verified_with_llama_cpp(name: str, dtype: str, tmp_path: Path) -> None:
    run = run_of(start(tmp_path / "model", name), tmp_path / "run")
    verification = export(run.path, tmp_path / "out", gguf=True, dtype=dtype, verify=True, progress=False).verification
    assert verification is not None
    assert verification.by.startswith("llama.cpp (llama-cpp-python 0.")
    assert verification.answers == 18


def test_a_tokenizer_that_llama_cpp_reads_otherwise_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(start(tmp_path / "model"), tmp_path / "run")

    def exchanged(*arguments: Any) -> Vocabulary:
        vocabulary = gguf_vocabulary(*arguments)
        other = {"a": "b", "b": "a"}
        return replace(vocabulary, tokens=[other.get(token, token) for token in vocabulary.tokens])

    monkeypatch.setattr("gruppo.models.gguf_file.gguf_vocabulary", exchanged)
    words = r"mine-F32\.gguf: llama\.cpp reads the prompt 'a1a1' as the tokens \[65, 16, 65, 16\], and the run as \[64,"
    with pytest.raises(RunError, match=words):
        export(run.path, tmp_path / "out", gguf=True, verify=True, progress=False)


def test_ends_that_llama_cpp_does_not_know_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(start(tmp_path / "model"), tmp_path / "run")
    monkeypatch.setattr(gguf_export, "eos_ids", lambda *_: (5,))
    monkeypatch.setattr(gguf_export, "write_gguf", lambda model, tokenizer, ends, *rest: write_gguf(
        model, tokenizer, (tokenizer.eos_token_id,), *rest))  # fmt: skip
    with pytest.raises(RunError, match=r"for llama\.cpp the tokens \[5\] do not end a turn"):
        export(run.path, tmp_path / "out", gguf=True, verify=True, progress=False)


@pytest.fixture(scope="module")
def smollm() -> LanguageModel:
    return load_model(find_model("smollm2-135m-instruct"), "cpu", "float32")


QUESTIONS = ["What is 8 + 19?", "Name three colors.", "Write a haiku about 2026."]


@pytest.mark.parametrize("dtype", ["float32", "q8_0"])
def test_smollm2_answers_as_gruppo_does(smollm: LanguageModel, dtype: str, tmp_path: Path) -> None:
    write_gguf(smollm.model, smollm.tokenizer, smollm.eos_ids, tmp_path / "smollm.gguf", dtype, "SmolLM2")
    engine = LlamaCppEngine(tmp_path / "smollm.gguf", smollm.tokenizer, 128)
    texts = [
        str(smollm.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                                 add_generation_prompt=True)) for text in QUESTIONS
    ]  # fmt: skip
    prompts = [engine.tokens_of(text) for text in texts]
    assert prompts == [smollm.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    requests = [Request(tuple(prompt), [(0,)]) for prompt in prompts]
    theirs = [group[0] for group in engine.generate(requests, SamplingParams(0.0, 24))]
    found = differences(smollm, prompts, theirs)
    ours = [group[0] for group in NativeEngine(smollm, 4).generate(requests, SamplingParams(0.0, 24))]
    same = sum(one.token_ids == other.token_ids for one, other in zip(ours, theirs))
    print(json.dumps({"dtype": dtype, "mean": float(found.mean()), "max": float(found.max()), "same": same}))
    assert found.mean() < {"float32": 0.01, "q8_0": 0.1}[dtype]
    assert dtype != "float32" or same == len(QUESTIONS)
