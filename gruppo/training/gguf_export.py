"""Exports as a GGUF file: what is checked before, the folder that is written, and its verification."""

from __future__ import annotations

import importlib.metadata
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from gruppo.config.sections import Decoding
from gruppo.engines.llama_cpp import LlamaCppEngine, llama_cpp_installed
from gruppo.errors import RunError, UsageError
from gruppo.evaluation.runner import Questions, evaluate_recipe, read_questions, run_eval_set
from gruppo.models.compatibility import eos_ids
from gruppo.models.gguf_file import DTYPES, require_gguf, unread_gguf, write_gguf
from gruppo.models.pretrained import load_weights, loading_progress
from gruppo.training.verify import Recorded, Verification, compared
from gruppo.utils.progress import Progress
from gruppo.utils.signals import Stop


def require_gguf_export(base: Path, dtype: str, verify: bool, trust_remote_code: bool) -> None:
    """Raise UsageError unless the model whose config and tokenizer are in `base` can be written, and verified."""
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)
    settings = GenerationConfig.from_pretrained(base) if (base / "generation_config.json").is_file() else None
    require_gguf(config, tokenizer, eos_ids(settings, config, tokenizer), dtype)
    if verify and not llama_cpp_installed() and (unread := unread_gguf(config)):
        raise UsageError(
            f"--verify: only llama.cpp reads a GGUF file with {unread}; run: pip install 'gruppo[gguf]', or leave "
            "--verify out"
        )


def gguf_file_name(name: str, dtype: str) -> str:
    """The name of the file for a run's `name`, such as "quickstart-Q8_0.gguf"."""
    return f"{name}-{DTYPES[dtype][0].name}.gguf"


def write_gguf_export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    name: str,
    dtype: str,
    decoding: Decoding,
) -> None:
    """Write the file, and a Modelfile, from which `ollama create` makes a model that decodes as the evaluations did."""
    file = gguf_file_name(name, dtype)
    write_gguf(model, tokenizer, eos_ids(model.generation_config, model.config, tokenizer), folder / file, dtype, name)
    settings = {"temperature": decoding.temperature, "repeat_penalty": 1}
    if decoding.temperature:
        settings |= {"top_k": decoding.top_k, "top_p": decoding.top_p, "min_p": decoding.min_p}
    lines = [f"FROM ./{file}", *(f"PARAMETER {key} {value:g}" for key, value in settings.items())]
    (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")


def verify_gguf(
    recorded: Recorded, file: Path, base: Path, dtype: str, trust_remote_code: bool, progress: Progress
) -> Verification:
    """Evaluate a written file on the run's own evaluation set: with llama.cpp if it is installed, else with gruppo.

    gruppo reads the weights from the file, and takes the tokenizer from `base`. `dtype`: the compute dtype of the run.
    Raises RunError if the answers leave the paired interval, or if llama.cpp reads prompts as other tokens than the run
    or does not end a turn where the run did.
    """
    if llama_cpp_installed():
        verification = _by_llama_cpp(recorded, file, base, trust_remote_code, progress)
    else:
        verification = _by_gruppo(recorded, file, base, dtype, trust_remote_code, progress)
    return recorded.accepted(verification, file, "Export with --gguf --dtype float32")


def _by_llama_cpp(
    recorded: Recorded, file: Path, base: Path, trust_remote_code: bool, progress: Progress
) -> Verification:
    recipe = recorded.recipe_for(str(base.absolute()), "float32", trust_remote_code)
    with ExitStack() as stack:
        questions = read_questions(recipe, progress, stack)
        tokenizer = questions.source.tokenizer
        engine = LlamaCppEngine(file, tokenizer, questions.longest + questions.room)
        stack.callback(engine.close)
        _require_same_tokens(engine, questions, file)
        sample = questions.sampler(tokenizer, engine.eos_ids)
        evaluation = run_eval_set(questions.eval_sets[0], engine, recipe.run.seed, progress, Stop(), sample)
    version = importlib.metadata.version("llama_cpp_python")
    return replace(compared(recorded.rows, evaluation.rows()), by=f"llama.cpp (llama-cpp-python {version})")


def _require_same_tokens(engine: LlamaCppEngine, questions: Questions, file: Path) -> None:
    """Raise RunError unless llama.cpp reads every prompt as the run did, and ends turns where the run did."""
    tokenizer = questions.source.tokenizer
    for prompt in questions.prompts:
        text = str(tokenizer.decode(list(prompt.token_ids)))
        theirs, ours = engine.tokens_of(text), tokenizer.encode(text, add_special_tokens=False)
        if theirs != ours:
            raise RunError(
                f"{file}: llama.cpp reads the prompt {text!r} as the tokens {theirs}, and the run as {ours}. The file "
                "is kept; do not use it. Export without --gguf"
            )
    settings = GenerationConfig.from_pretrained(questions.source.location)
    if missing := sorted(set(eos_ids(settings, questions.source.config, tokenizer)) - set(engine.eos_ids)):
        raise RunError(
            f"{file}: for llama.cpp the tokens {missing} do not end a turn, which they did in the run. The file is "
            "kept; do not use it. Export without --gguf"
        )


def _by_gruppo(
    recorded: Recorded, file: Path, base: Path, dtype: str, trust_remote_code: bool, progress: Progress
) -> Verification:
    recipe = recorded.recipe_for(str(base.absolute()), dtype, trust_remote_code)
    with loading_progress(progress):
        model = load_weights(str(file.parent), torch.float32, gguf_file=file.name)
    if hasattr(model.config, "quantization_config"):  # the weights are dequantized
        del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)
    rows = evaluate_recipe(recipe, model, tokenizer, progress=progress).rows()
    return replace(
        compared(recorded.rows, rows), by="gruppo, not llama.cpp, which is not installed (pip install 'gruppo[gguf]')"
    )
