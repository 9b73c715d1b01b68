"""The work that both sides do: prompts, lengths and rewards, fixed before anything is timed.

It is written to a JSON file that every side reads, so that a peer's environment does not need gruppo.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from gruppo.config.sections import Task
from gruppo.data.loading import load_training
from gruppo.data.tokenization import tokenize_rows
from gruppo.models.compatibility import wrap_model
from gruppo.models.loading import ModelSource, find_model
from gruppo.models.weights import save_model
from gruppo.utils.progress import NullProgress

MODEL = "smollm2-135m-instruct"
SEED = 20240203
WIDTH = 49
SUFFIX = " Think it through, then give the number."


@dataclass(frozen=True)
class Work:
    """One kind of work.

    `lengths` and `rewards` have one row per prompt and one value per completion. `parameters` is the model's N. `slots`
    is the number of concurrent completions, 0 for all.
    """

    name: str
    model: str
    parameters: int
    messages: Sequence[list[dict[str, Any]] | str]
    prompts: list[list[int]]
    lengths: list[list[int]]
    rewards: list[list[float]]
    max_tokens: int
    kl_coef: float
    end_id: int
    end_ids: list[int]
    learning_rate: float = 1e-6
    max_grad_norm: float = 1.0
    seed: int = SEED
    slots: int = 0

    @property
    def completions(self) -> int:
        """Completions per step."""
        return sum(map(len, self.lengths))

    @property
    def tokens(self) -> int:
        """Completion tokens per step."""
        return sum(map(sum, self.lengths))

    @property
    def flop(self) -> float:
        """Floating-point operations that every implementation needs.

        2·N per token sampled or scored, 6·N per token trained on, every prompt once per group. Without a KL term, a
        group of equal rewards needs no training.
        """
        tokens = [len(prompt) + sum(lengths) for prompt, lengths in zip(self.prompts, self.lengths, strict=True)]
        if self.name == "generation":
            return 2.0 * self.parameters * sum(tokens)
        has_gradient = [bool(self.kl_coef) or len(set(rewards)) > 1 for rewards in self.rewards]
        trained = sum(count for count, used in zip(tokens, has_gradient, strict=True) if used)
        passes = 2.0 if self.kl_coef else 1.0
        return self.parameters * (passes * 2.0 * sum(tokens) + 6.0 * trained)

    def describe(self) -> str:
        """One-line description for the table."""
        size, width = len(self.lengths[0]), len(self.prompts[0])
        text = f"{len(self.prompts)} prompts of {width} tokens × {size} completions of "
        mean = self.tokens / self.completions
        even = min(map(min, self.lengths)) == self.max_tokens
        text += f"{self.max_tokens} tokens" if even else f"at most {self.max_tokens} tokens ({mean:.1f} on average)"
        if self.name == "generation":
            return text + ", temperature 1"
        differing = sum(len(set(rewards)) > 1 for rewards in self.rewards)
        return f"{text}, β = {self.kl_coef:g}, μ = 1; rewards differ in {differing} of {len(self.rewards)} groups"


def make_works(folder: Path, quick: bool) -> dict[str, Work]:
    """All works by name, with the model linked into `folder`; `quick`: as small as possible."""
    source = linked(find_model(MODEL), folder / "model")
    many, size, short, long = (2, 2, 6, 8) if quick else (16, 8, 24, 64)
    few = 2 if quick else 8
    return {
        "A": _work(source, "A", few, size, _lengths(few, size, 0.7 * long, long), long, 0.04),
        "B": _work(source, "B", many, size, _lengths(many, size, 0.83 * short, short), short, 0.0),
        "generation": _work(source, "generation", few, size, [[long] * size] * few, long, 0.0),
    }


def linked(source: ModelSource, folder: Path) -> ModelSource:
    """Link the model's files into a folder whose config names the model class.

    TRL and vLLM need that name; a config from a GGUF file lacks it.
    """
    folder.mkdir()
    for file in Path(source.location).iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(source.config)]
    config["architectures"] = [kind.__name__]
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return replace(source, location=str(folder))


def _work(
    source: ModelSource, name: str, count: int, size: int, lengths: list[list[int]], longest: int, kl_coef: float
) -> Work:
    messages, prompts = _prompts(source, count)
    tokenizer: Any = source.tokenizer
    end = int(tokenizer.eos_token_id)
    halves = [[float((place + index) % 2) for index in range(size)] for place in range(count)]
    if name == "B":
        halves[1::2] = [[1.0] * size for _ in halves[1::2]]
    return Work(
        name=name,
        model=source.location,
        parameters=parameters_of(source.location),
        messages=messages,
        prompts=prompts,
        lengths=lengths,
        rewards=halves,
        max_tokens=longest,
        kl_coef=kl_coef,
        end_id=end,
        end_ids=_end_ids(source, end),
    )


def _prompts(source: ModelSource, count: int) -> tuple[list[list[dict[str, Any]]], list[list[int]]]:
    """The first questions of the arithmetic task that have 49 tokens with the suffix, so that no prompt is padded."""
    rows = load_training(Task(name="arithmetic"), "task", False, NullProgress())[0].rows
    questions = [{"prompt": [{"role": "user", "content": row["prompt"][0]["content"] + SUFFIX}]} for row in rows]
    prompts = tokenize_rows(questions, source.tokenizer, source.context, 64, "arithmetic")
    chosen = [prompt for prompt in prompts if len(prompt.token_ids) == WIDTH][:count]
    assert len(chosen) == count
    messages = [prompt.content for prompt in chosen if not isinstance(prompt.content, str)]
    return messages, [list(prompt.token_ids) for prompt in chosen]


def _lengths(count: int, size: int, mean: float, longest: int) -> list[list[int]]:
    """Lengths sampled from a normal distribution (seeded, standard deviation mean/3), clipped to 2..longest."""
    generator = random.Random(SEED)
    return [[min(longest, max(2, round(generator.gauss(mean, mean / 3)))) for _ in range(size)] for _ in range(count)]


def parameters_of(location: str) -> int:
    """Number of parameters N of a model."""
    total = 0
    with safe_open(f"{location}/model.safetensors", framework="np") as weights:
        names: list[str] = list(weights.keys())
        for name in names:
            total += math.prod(weights.get_slice(name).get_shape())
    return total


def _end_ids(source: ModelSource, end: int) -> list[int]:
    ids = GenerationConfig.from_pretrained(source.location).eos_token_id
    return sorted({end, *(ids if isinstance(ids, list) else [] if ids is None else [ids])})


def make_random_model(folder: Path, width: int) -> None:
    """Save a 12-layer Llama with random weights and the small model's tokenizer."""
    tokenizer = find_model(MODEL).tokenizer
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=49152, hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=12,
        num_attention_heads=width // 64, num_key_value_heads=width // 128, tie_word_embeddings=True,
        max_position_embeddings=2048, eos_token_id=end, pad_token_id=end, bos_token_id=None,
    )  # fmt: skip
    save_model(wrap_model(LlamaForCausalLM(config), tokenizer), folder)
