"""A checkpoint of a run as a Hugging Face folder that transformers alone loads, with a card that says how it was made.

All that is read is the run folder: neither the start model nor the network is needed, unless the run trained adapters,
whose checkpoints are merged into the start model. The weights are the checkpoint's, config and tokenizer the run's
base/; the generation config ends turns where the run did and draws as its evaluations did. No path of this machine goes
into the card.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from gruppo.config.methods import METHODS
from gruppo.config.recipe import Decoding, Recipe, load_recipe
from gruppo.errors import UsageError
from gruppo.runs.atomic import writing
from gruppo.runs.folder import checkpoint_folders, publish
from gruppo.runs.reading import read_object, reading, require_own
from gruppo.utils.progress import Reporter, Silent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import GenerationConfig

    from gruppo.training.checkpoint import State

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Export:
    """A written folder. `step`: of its checkpoint; `accuracy`: held-out, at that step, where it was evaluated."""

    path: Path
    step: int
    accuracy: float | None
    files: int
    bytes: int


def export(
    run: str | Path,
    to: str | Path,
    *,
    checkpoint: str | int = "last",
    dtype: str = "float32",
    max_shard_size: str = "5GB",
    adapter: bool = False,
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> Export:
    """Write a checkpoint of the run in the folder `run` as the new folder `to`.

    `checkpoint`: "last"; "best", the kept one of the highest held-out accuracy (the later of equals); or a step.
    `dtype`: float32 as trained, or bfloat16. `max_shard_size`: bytes of a weights file at the most, like "5GB"; larger
    models are written in several. A run that trained adapters gives the merged model, or with `adapter` the adapter
    alone, in peft's format. `trust_remote_code`: run the Python files that the model came with, whatever the run's
    recipe says. Raises UsageError: `to` holds files, no such run or checkpoint, one that is damaged.
    """
    source, target, shown = Path(run), Path(to), reporter or Silent()
    _check(source, target, dtype, max_shard_size)
    recipe = load_recipe(source / "recipe.toml")
    if adapter and recipe.model.lora is None:
        raise UsageError(f"--adapter: {source} trained all weights of its model, so there is no adapter; leave it out")
    folder = _choose(source, checkpoint)
    state = _state(source, folder)
    environment = _environment(source)
    options = dtype, max_shard_size, trust_remote_code
    with reading(source, "export another checkpoint"), _new_folder(target) as building:
        weights = folder / "weights.safetensors"
        if adapter:
            chat = _write_adapter(source / "base", weights, building, recipe, dtype, trust_remote_code)
        elif recipe.model.lora is not None:
            with _merged(source / "base", weights, building, recipe, environment, trust_remote_code, shown) as merged:
                chat = _write_model(source / "base", merged, building, recipe, options, shown)
        else:
            chat = _write_model(source / "base", weights, building, recipe, options, shown)
        text = card(recipe, state, environment, dtype, chat, adapter)
        (building / "README.md").write_text(text, encoding="utf-8")
        written = list(building.iterdir())
        size = sum(path.stat().st_size for path in written)
    return Export(target, state.step, _accuracy(state, state.step), len(written), size)


def _check(source: Path, target: Path, dtype: str, max_shard_size: str) -> None:
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: cannot be exported; write {' or '.join(DTYPES)}")
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", max_shard_size):
        raise UsageError(f"--max-shard-size {max_shard_size}: not a size; write e.g. 5GB or 500MB")
    if source.is_dir():
        require_own(source)
    if not (source / "recipe.toml").is_file():
        raise UsageError(f"{source}: holds no run; give the folder of one, e.g. runs/quickstart")
    if not _steps(source):
        raise UsageError(f"{source}: the run has no checkpoint yet; train until it has one")
    if not (source / "base").is_dir():
        raise UsageError(f"{source}: has no base/ (config and tokenizer), which runs of gruppo 0.1.0 did not write")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"--to {target}: is there already; give the name of a new folder")


def _steps(source: Path) -> dict[int, Path]:
    """The checkpoints by step, in order."""
    return checkpoint_folders(source)


def _environment(source: Path) -> dict[str, Any]:
    """What environment.json says of how the run was made. Raises UsageError where it does not."""
    path = source / "environment.json"
    try:
        found = read_object(path)
        kinds = {"chosen": dict, "packages": dict, "python": str, "start_weights_sha256": str}
        if all(isinstance(found[name], kind) for name, kind in kinds.items()) and {"dtype", "device"} <= set(
            found["chosen"]
        ):
            return found
    except (FileNotFoundError, KeyError):
        pass
    raise UsageError(f"{path}: does not say how the run was made; put it back from a copy")


def _state(source: Path, folder: Path) -> State:
    """The state in a checkpoint that agrees with its hashes."""
    from gruppo.training.checkpoint import load_state, problem_of

    if problem := problem_of(folder):
        raise UsageError(f"{folder}: the checkpoint is damaged ({problem}); {_others(source, folder)}")
    return load_state(folder)


def _choose(source: Path, checkpoint: str | int) -> Path:
    steps = _steps(source)
    if checkpoint == "last":
        return steps[max(steps)]
    if checkpoint == "best":
        evaluated = _state(source, steps[max(steps)]).evaluations
        if len([step for step in evaluated if int(step)]) < 2:
            raise UsageError(
                "--checkpoint best: the run has not evaluated two steps that could be compared; take --checkpoint "
                "last, or train with evaluation.every"
            )
        kept = [step for step in steps if str(step) in evaluated]
        if not kept:
            raise UsageError(f"--checkpoint best: no step with a checkpoint was evaluated; {_others(source)}")
        return steps[max(kept, key=lambda step: (evaluated[str(step)]["accuracy"], step))]
    try:
        return steps[int(checkpoint)]
    except (KeyError, ValueError):
        raise UsageError(f"--checkpoint {checkpoint}: there is none; write last, best, or {_others(source)}") from None


def _others(source: Path, but: Path | None = None) -> str:
    found = [str(step) for step, folder in _steps(source).items() if folder != but]
    return f"the steps with a checkpoint are {', '.join(found)}" if found else "there is no other"


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill beside `target`, which gets its name when the block ends well and goes when it does not."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=target.absolute().parent, prefix=f".writing-{target.name}-"))
    except OSError as error:
        raise UsageError(f"--to {target}: cannot be written to ({error}); choose another folder") from error
    try:
        with writing(target):
            yield building
        building.chmod(0o755)  # temporary folders, and safetensors' files, are for their owner's eyes only
        for path in building.iterdir():
            path.chmod(0o644)
        publish(building, target.absolute())
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_model(
    base: Path, weights: Path, building: Path, recipe: Recipe, options: tuple[str, str, bool], reporter: Reporter
) -> bool:
    """Write weights, configs and tokenizer; whether there is a chat template. `options`: dtype, size of files, trust
    in the Python files of the model."""
    import torch
    from transformers import AutoTokenizer

    from gruppo.models.policy import eos_ids, load_weights, loading_progress

    dtype, max_shard_size, trust = options
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=trust)
    with tempfile.TemporaryDirectory() as name, loading_progress(reporter):
        whole = Path(name)
        shutil.copytree(
            base,
            whole,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "adapter_config.json"),
        )
        (whole / "model.safetensors").symlink_to(weights.absolute())
        model = load_weights(str(whole), getattr(torch, dtype), trust)
        settings = recipe.evaluation.decoding if recipe.evaluation else Decoding()
        model.generation_config = _generation(eos_ids(model, tokenizer), tokenizer, settings)
        model.save_pretrained(building, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(building)
    return bool(tokenizer.chat_template)


@contextmanager
def _merged(
    base: Path,
    adapter: Path,
    building: Path,
    recipe: Recipe,
    environment: Mapping[str, Any],
    trust: bool,
    reporter: Reporter,
) -> Iterator[Path]:
    """A file, inside the block, with the weights of the start model that the adapters of a checkpoint are merged into.
    A model that was in memory stands in the run's base/."""
    from gruppo.models.lora import add_adapters
    from gruppo.models.policy import find_model, load_model, save_weights, weights_sha256
    from gruppo.training.checkpoint import load_weights_file

    name = str(base) if (base / "model.safetensors").is_file() else recipe.model.name
    policy = load_model(
        find_model(name, reporter, trust_remote_code=trust), "cpu", environment["chosen"]["dtype"], reporter
    )
    if weights_sha256(policy.model) != environment["start_weights_sha256"]:
        raise UsageError(
            f"model.name = {recipe.model.name!r}: its weights are not those that the run began with, and the "
            "checkpoint holds adapters alone; put them back, or export the adapter with --adapter"
        )
    policy = add_adapters(policy, recipe.model.lora, recipe.run.seed)
    load_weights_file(adapter, policy.model)
    with tempfile.TemporaryDirectory(dir=building) as folder:
        save_weights(policy.weights(), Path(folder))
        del policy
        yield Path(folder) / "model.safetensors"


def _write_adapter(base: Path, weights: Path, building: Path, recipe: Recipe, dtype: str, trust: bool) -> bool:
    """Write the adapter of a checkpoint in peft's format, which needs no weights of the start model; whether there is a
    chat template."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoTokenizer

    from gruppo.models.lora import lora_config, skeleton, write_adapter

    assert recipe.model.lora is not None
    config = lora_config(skeleton(AutoConfig.from_pretrained(base, trust_remote_code=trust), trust), recipe.model.lora)
    held = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(weights).items()}
    write_adapter(config, held, building, recipe.model.name)
    return bool(AutoTokenizer.from_pretrained(base, trust_remote_code=trust).chat_template)


def _generation(ends: Sequence[int], tokenizer: Any, settings: Decoding) -> GenerationConfig:
    """Ends turns at every id that ended them in the run; greedy unless the run's evaluations were not."""
    from transformers import GenerationConfig

    options = settings.model_dump(include={"temperature", "top_k", "top_p", "min_p"})
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), None)
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(ends) or None,
        pad_token_id=pad,
        **({"do_sample": True, **options} if settings.temperature else {}),
    )


def card(
    recipe: Recipe, state: State, environment: Mapping[str, Any], dtype: str, chat: bool, adapter: bool = False
) -> str:
    """The model card: what the model is, method, data, figures, the command that makes it again, how to load it."""
    front = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": sorted({"gruppo", "grpo", recipe.method.name}),
    }
    front |= {"base_model": recipe.model.name} if _on_hub(recipe.model.name) else {}
    if sets := [task.name for task in recipe.tasks if _on_hub(task.name)]:
        front["datasets"] = sets
    step = f"step {state.step} of {recipe.run.steps}"
    what = "An adapter for " if adapter else ""
    sections = [
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items()) + "---",
        f"# {recipe.run.name}",
        f"{what}`{_portable(recipe.model.name)}` after {step} of [Group Relative Policy Optimization]"
        f"(https://arxiv.org/abs/2402.03300) with gruppo, weights in {dtype}.",
        "## Use",
        (_USE_ADAPTER if adapter else _USE).format(inputs=_CHAT if chat else _TEXT, base=_portable(recipe.model.name)),
        "## Method",
        _method(recipe),
        "## Data",
        _data(recipe, environment),
        "## Figures",
        _figures(recipe, state),
        "## Made by",
        _made_by(recipe, environment),
    ]
    return "\n\n".join(sections) + "\n"


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
_TEXT = 'tokenizer("What is 3 + 4?", return_tensors="pt")'
_CHAT = (
    'tokenizer.apply_chat_template([{"role": "user", "content": "What is 3 + 4?"}], add_generation_prompt=True, '
    'return_dict=True, return_tensors="pt")'
)


def _method(recipe: Recipe) -> str:
    row, sampling, optimizer = METHODS[recipe.method.name], recipe.sampling, recipe.optimizer
    rows = {
        "method": f"`{recipe.method.name}`: {row.equation}",
        "signal": row.signal,
        "loss": row.loss,
        "a step": f"{sampling.prompts_per_step} questions × {sampling.group_size} completions of at most "
        f"{sampling.max_tokens} tokens at temperature {sampling.temperature:g}",
        "optimizer": f"AdamW, learning rate {optimizer.learning_rate:g} ({optimizer.schedule}), "
        f"{recipe.method.inner_updates} updates a step",
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
        "questions": names + (f", {environment['prompts']} rows" if "prompts" in environment else ""),
        "rewards": ", ".join(f"`{_portable(name)}` (weight {weight:g})" for name, weight in rewards) or "none",
    }
    if recipe.evaluation:
        task = recipe.evaluation.task
        held = f"`{_portable(task.name)}`" if task else "the held-out part of the task"
        rows["held-out questions"] = f"{held}, judged by `{_portable(recipe.evaluation.grader)}`"
    return _two_columns(rows)


def _figures(recipe: Recipe, state: State) -> str:
    rows = {
        f"held-out accuracy {when}": f"{figures['accuracy']:.1%} (95 % interval {figures['interval'][0]:.1%} to "
        f"{figures['interval'][1]:.1%}, {figures['questions']} questions)"
        for when, step in (("before", 0), (f"after step {state.step}", state.step))
        if (figures := state.evaluations.get(str(step)))
    }
    rows |= {
        "steps": str(state.step),
        "seconds of training": f"{state.train_seconds:.0f}",
        "seed": str(recipe.run.seed),
    }
    return _two_columns(rows)


def _made_by(recipe: Recipe, environment: Mapping[str, Any]) -> str:
    given = [
        what
        for what, names in (
            ("the model", [recipe.model.name]),
            ("the questions", [task.name for task in recipe.tasks]),
            ("reward functions", recipe.reward.functions),
        )
        if any(name.startswith("given:") for name in names)
    ]
    if given:
        how = f'`gruppo.train("recipe.toml", …)` from Python, which was given {", ".join(given)} (`given:` below)'
    else:
        how = "`gruppo train recipe.toml`"
    versions = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    return (
        f"{how}, with the recipe below; Python {environment['python']}, {versions}; products in "
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
    """A value of the recipe with absolute paths cut to their last part: folders are this machine's business."""
    if isinstance(value, dict):
        prompts = {"system", "template"}
        return {_portable(key): each if key in prompts else _portable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_portable(each) for each in value]
    return re.sub(r"^((?:\w+:)?)[/~].*/", r"\1", value) if isinstance(value, str) else value


def _accuracy(state: State, step: int) -> float | None:
    accuracy: float | None = state.evaluations.get(str(step), {}).get("accuracy")
    return accuracy
