"""The model card of an exported model."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from huggingface_hub import ModelCard, ModelCardData

from gruppo.config.methods import METHODS
from gruppo.config.recipe import Recipe
from gruppo.utils.hub import split_revision
from gruppo.utils.imports import IN_MEMORY

if TYPE_CHECKING:
    from gruppo.training.checkpoint import State

# alias of a model -> its name on the hub, its license
ORIGINS = {"smollm2-135m-instruct": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}


def model_card(
    recipe: Recipe,
    state: State,
    environment: Mapping[str, Any],
    dtype: str,
    chat: bool,
    adapter: bool = False,
    start_model: Path | None = None,
    gguf: str | None = None,
) -> ModelCard:
    """The card of an exported model: what it is, how to use it, method, data, results, and the recipe that trained it.

    `chat`: the tokenizer has a chat template. `adapter`: the export is a LoRA adapter, not a whole model.
    `start_model`: the folder of the initial model, whose card names its license. `gguf`: the name of the GGUF file that
    is the export.
    """
    base, license_name = _origin(recipe.model.name, start_model)
    data = ModelCardData(
        base_model=base,
        datasets=[task.name for task in recipe.tasks if _on_hub(task.name)] or None,
        library_name="gguf" if gguf else "peft" if adapter else "transformers",
        license=license_name,
        pipeline_tag="text-generation",
        tags=sorted({"gruppo", "grpo", recipe.method.name, *(["lora"] if recipe.model.lora else [])}),
    )
    inputs = _CHAT if chat else _TEXT
    template = _USE_GGUF if gguf else _USE_ADAPTER if adapter else _USE
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {recipe.run.name}",
        f"{'A LoRA adapter for' if adapter else 'Trained from'} `{_portable(base or recipe.model.name)}` with [Group "
        "Relative Policy Optimization](https://arxiv.org/abs/2402.03300) by gruppo: step "
        f"{state.step} of {recipe.run.steps}, weights in {dtype}.",
        "## Use",
        template.format(inputs=inputs, base=_portable(base or recipe.model.name), file=gguf),
        "## Method",
        _method(recipe),
        "## Data",
        _data(recipe, environment),
        "## Results",
        _results(recipe, state),
        "## How it was trained",
        _how(recipe, environment),
    ]
    return ModelCard("\n\n".join(sections) + "\n")


def _origin(name: str, folder: Path | None) -> tuple[str | None, str | None]:
    """The initial model's name on the hub and its license, if known."""
    if name in ORIGINS:
        return ORIGINS[name]
    name, _ = split_revision(name)
    card = ModelCardData()
    if folder is not None and (folder / "README.md").is_file():
        with suppress(Exception):  # a third-party file: anything can be wrong with it
            card = ModelCard.load(folder / "README.md").data
    named = name if _on_hub(name) else getattr(card, "base_model", None)
    return (named if isinstance(named, str) else None), getattr(card, "license", None)


_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this folder")
model = AutoModelForCausalLM.from_pretrained("this folder")
inputs = {inputs}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```"""


_USE_ADAPTER = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{base}")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "this folder")
inputs = {inputs}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```"""


_USE_GGUF = """```
llama-cli -m {file}
ollama create NAME -f Modelfile
```"""


_TEXT = 'tokenizer("What is 3 + 4?", return_tensors="pt")'


_CHAT = (
    'tokenizer.apply_chat_template([{"role": "user", "content": "What is 3 + 4?"}], add_generation_prompt=True, '
    'return_dict=True, return_tensors="pt")'
)


def _method(recipe: Recipe) -> str:
    row, sampling, optimizer = METHODS[recipe.method.name], recipe.sampling, recipe.optimizer
    rows = {
        "method": f"`{recipe.method.name}`: {row.equation}",
        "advantage": row.signal,
        "loss": row.loss,
        "step": f"{sampling.prompts_per_step} questions × {sampling.group_size} completions of at most "
        f"{sampling.max_tokens} tokens at temperature {sampling.temperature:g}",
        "optimizer": f"AdamW, learning rate {optimizer.learning_rate:g} ({optimizer.schedule}), "
        f"{recipe.method.inner_updates * recipe.method.minibatches} updates per step",
        "parameters": ", ".join(
            f"{name} = {_portable(value)}" for name, value in recipe.method.model_dump().items() if name != "name"
        ),
    }
    if lora := recipe.model.lora:
        rows["adapters"] = f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}, on {lora.targets}"
    return _two_columns(rows)


def _data(recipe: Recipe, environment: Mapping[str, Any]) -> str:
    weights = recipe.reward.weights or [1.0] * len(recipe.reward.functions)
    rewards = zip(recipe.reward.functions, weights, strict=True)
    names = ", ".join(f"`{_portable(task.name)}`" for task in recipe.tasks)
    rows = {
        "prompts": names + (f", {environment['prompts']} rows" if "prompts" in environment else ""),
        "rewards": ", ".join(f"`{_portable(name)}` (weight {weight:g})" for name, weight in rewards) or "none",
    }
    if recipe.evaluation:
        task = recipe.evaluation.task
        source = f"`{_portable(task.name)}`" if task else "the held-out share of the task"
        rows["held-out questions"] = f"{source}, graded by `{_portable(recipe.evaluation.grader)}`"
    return _two_columns(rows)


def _results(recipe: Recipe, state: State) -> str:
    rows = {
        f"held-out accuracy {when}": f"{figures['accuracy']:.1%} (95% interval {figures['interval'][0]:.1%} to "
        f"{figures['interval'][1]:.1%}, {figures['questions']} questions)"
        for when, step in (("before training", 0), (f"after step {state.step}", state.step))
        if (figures := state.evaluations.get(str(step)))
    }
    rows |= {
        "steps": str(state.step),
        "seconds of training": f"{state.train_seconds:.0f}",
        "seed": str(recipe.run.seed),
    }
    return _two_columns(rows)


def _how(recipe: Recipe, environment: Mapping[str, Any]) -> str:
    passed = [
        what
        for what, names in (
            ("the model", [recipe.model.name]),
            ("the prompts", [task.name for task in recipe.tasks]),
            ("the reward functions", recipe.reward.functions),
        )
        if any(name.startswith(IN_MEMORY) for name in names)
    ]
    if passed:
        names = ", ".join(passed)
        how = f'`gruppo.train("recipe.toml", …)` in Python, with {names} passed from Python (`in-memory:` below)'
    else:
        how = "`gruppo train recipe.toml`"
    versions = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    return (
        f"{how}, with the recipe below; Python {environment['python']}, {versions}; matrix multiplications in "
        f"{environment['chosen']['dtype']} on {environment['chosen']['device']}.\n\n"
        f"```toml\n{tomli_w.dumps(_portable(tomllib.loads(recipe.to_toml())))}```"
    )


def _two_columns(rows: Mapping[str, str]) -> str:
    cells = [f"| {name} | {' '.join(text.split()).replace('|', chr(92) + '|')} |" for name, text in rows.items()]
    return "\n".join(["| | |", "| --- | --- |", *cells])


def _on_hub(name: str) -> bool:
    """Whether a model or data set is named as the Hugging Face hub names them."""
    hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not name.startswith("reasoning-gym/")
    return bool(hub) and not Path(name).exists()


def _portable(value: Any) -> Any:
    """A value of the recipe, with absolute paths shortened to their last component to hide local folders."""
    if isinstance(value, dict):
        prompts = {"system", "template"}
        return {_portable(key): entry if key in prompts else _portable(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_portable(entry) for entry in value]
    return re.sub(r"^((?:\w+:)?)[/~].*/", r"\1", value) if isinstance(value, str) else value


def accuracy_of(state: State, step: int) -> float | None:
    """Held-out accuracy after a step, if it was evaluated."""
    accuracy: float | None = state.evaluations.get(str(step), {}).get("accuracy")
    return accuracy
