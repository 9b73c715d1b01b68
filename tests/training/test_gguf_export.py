"""`--gguf`: the folder, its verification by gruppo where llama.cpp is not installed, and what is refused before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gruppo.errors import RunError, UsageError
from gruppo.models import pretrained
from gruppo.models.gguf_file import write_gguf
from gruppo.runs.results import Result
from gruppo.training import gguf_export
from gruppo.training.export import export
from tests.fuzzing import command
from tests.gguf.models import make_model
from tests.odd_tokenizers import CHATML, byte_level
from tests.small_runs import ROWS, small_run


@pytest.fixture(autouse=True)
def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_export, "llama_cpp_installed", lambda: False)


def says_something(text: str, _: Any) -> bool:
    """A grader."""
    return bool(text)


def start(folder: Path, name: str = "llama") -> str:
    """A model with a byte-level tokenizer on disk."""
    make_model(name).save_pretrained(folder)
    byte_level(template=CHATML).save_pretrained(folder)
    return str(folder)


def run_of(model: str, folder: Path, **changes: Any) -> Result:
    """A run that is evaluated before the first and after its last step."""
    questions = folder.parent / "questions.jsonl"
    questions.write_text("".join(json.dumps({"prompt": row["prompt"] * 2, "answer": "a"}) + "\n" for row in ROWS))
    evaluation = {"task": str(questions), "grader": "tests/training/test_gguf_export.py:says_something"}
    changes |= {f"evaluation__{name}": value for name, value in evaluation.items()}
    return small_run(model, folder, run__steps=1, run__name="mine", **changes)


@pytest.fixture
def run(tmp_path: Path) -> Result:
    return run_of(start(tmp_path / "model"), tmp_path / "run")


def test_the_file_gives_every_answer_again(run: Result, tmp_path: Path) -> None:
    exported = export(run.path, tmp_path / "out", gguf=True, verify=True, progress=False)
    assert {path.name for path in exported.path.iterdir()} == {"mine-F32.gguf", "Modelfile", "README.md"}
    assert exported.files == 3
    verification = exported.verification
    assert verification is not None
    assert (verification.difference, verification.changed, verification.answers) == (0, 0, 18)
    assert verification.by.startswith("gruppo, not llama.cpp, which is not installed")
    modelfile = (exported.path / "Modelfile").read_text()
    assert modelfile == "FROM ./mine-F32.gguf\nPARAMETER temperature 0\nPARAMETER repeat_penalty 1\n"
    card = (exported.path / "README.md").read_text()
    assert "library_name: gguf" in card
    assert "llama-cli -m mine-F32.gguf" in card


def test_adapters_are_merged_into_the_file(tmp_path: Path) -> None:
    run_of(start(tmp_path / "model"), tmp_path / "run", model__lora={"rank": 4})
    verification = export(tmp_path / "run", tmp_path / "out", gguf=True, verify=True, progress=False).verification
    assert verification is not None
    assert verification.changed == 0


def test_sampled_evaluations_are_verified_with_their_random_numbers(tmp_path: Path) -> None:
    decoding = {"temperature": 0.7, "top_p": 0.9}
    run_of(start(tmp_path / "model"), tmp_path / "run", evaluation__decoding=decoding, evaluation__samples=2)
    exported = export(tmp_path / "run", tmp_path / "out", gguf=True, verify=True, progress=False)
    assert exported.verification is not None
    assert (exported.verification.changed, exported.verification.answers) == (0, 36)
    modelfile = (exported.path / "Modelfile").read_text().splitlines()
    assert {"PARAMETER temperature 0.7", "PARAMETER top_p 0.9", "PARAMETER top_k 0"} <= set(modelfile)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_other_dtypes_are_evaluated_as_written(
    dtype: str, run: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[torch.Tensor] = []

    def load(*arguments: Any, **options: Any) -> Any:
        model = pretrained.load_weights(*arguments, **options)
        used.append(model.lm_head.weight.detach().clone())
        return model

    monkeypatch.setattr(gguf_export, "load_weights", load)
    out = tmp_path / "out"
    code, printed, err = command("export", str(run.path), "--to", str(out), "--gguf", "--dtype", dtype, "--verify")
    assert code == 0, err
    assert f"MB of {dtype} in {out}" in printed
    assert "answers differ; answered by gruppo, not llama.cpp, which is not installed" in printed
    trained = run.load_model().lm_head.weight
    assert 0 < (used[0] - trained).abs().max() < 0.01 * trained.abs().max()


def test_a_file_that_answers_otherwise_fails(run: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mute(model: Any, tokenizer: Any, *arguments: Any) -> None:
        """Write a model whose most likely token is always EOS."""
        for weight in model.parameters():
            weight.data.fill_(float(weight.ndim == 1))
        model.get_input_embeddings().weight.data.fill_(1)[tokenizer.eos_token_id] = 2
        write_gguf(model, tokenizer, *arguments)

    monkeypatch.setattr(gguf_export, "write_gguf", mute)
    with pytest.raises(RunError, match=r"mine-F32\.gguf: does not answer as the run did after step 1: .* The file is"):
        export(run.path, tmp_path / "out", gguf=True, verify=True, progress=False)
    assert (tmp_path / "out" / "mine-F32.gguf").is_file()


def test_what_cannot_be_written_is_refused_before_anything_is_written(
    run: Result, tiny_folder: str, tmp_path: Path
) -> None:
    small_run(tiny_folder, tmp_path / "plain", run__steps=1)
    run_of(start(tmp_path / "llama3", "llama3"), tmp_path / "scaled")
    for folder, options, words in (
        (tmp_path / "plain", {}, "gguf=True: the tokenizer is not byte-level BPE"),
        (run.path, {"dtype": "q4_0"}, r"dtype = q4_0: .* write float32 or bfloat16 or float16 or q8_0$"),
        (run.path, {"dtype": "q8_0", "gguf": False}, r"dtype = q8_0: .*; gguf=True also knows float16 and q8_0$"),
        (tmp_path / "scaled", {"verify": True}, "only llama.cpp reads a GGUF file with positions scaled by 'llama3'"),
    ):
        with pytest.raises(UsageError, match=words):
            export(folder, tmp_path / "out", progress=False, **{"gguf": True, **options})
    assert not (tmp_path / "out").exists()
    assert export(tmp_path / "scaled", tmp_path / "out", gguf=True, progress=False).files == 3
