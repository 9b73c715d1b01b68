"""Exports a checkpoint as a Hugging Face folder that plain transformers can load, or as a GGUF file, with a model card.

Only the run folder is read: neither the initial model nor the network is needed, unless the run trained adapters, which
are merged into the initial model. The weights come from the checkpoint, config and tokenizer from the run's base/. The
generation config ends turns as the run did and samples as its evaluations did. The card contains no local paths.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gruppo.config.loading import load_recipe
from gruppo.config.recipe import Recipe
from gruppo.config.sections import Decoding
from gruppo.errors import UsageError
from gruppo.runs.atomic import publish, writing
from gruppo.runs.console import choose_progress
from gruppo.runs.folder import checkpoint_folders
from gruppo.runs.missing import base_problem
from gruppo.runs.reading import read_object, reading, require_own
from gruppo.training.model_card import accuracy_of, model_card
from gruppo.utils.paths import is_dir, user_path
from gruppo.utils.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import GenerationConfig

    from gruppo.training.checkpoint import State
    from gruppo.training.verify import Recorded, Verification

DTYPES = ("float32", "bfloat16")
GGUF_DTYPES = ("float16", "q8_0")  # of GGUF files only


@dataclass(frozen=True)
class Export:
    """An exported folder.

    `step`: of its checkpoint; `accuracy`: held-out, if that step was evaluated; `verification`: if it was asked for.
    """

    path: Path
    step: int
    accuracy: float | None
    files: int
    bytes: int
    verification: Verification | None = None


def export(
    run: str | Path,
    to: str | Path,
    *,
    checkpoint: str | int = "last",
    dtype: str = "float32",
    max_shard_size: str = "5GB",
    adapter: bool = False,
    gguf: bool = False,
    verify: bool = False,
    trust: bool = False,
    trust_remote_code: bool = False,
    progress: bool | Progress = True,
) -> Export:
    """Write a checkpoint of the run in the folder `run` to the new folder `to`.

    `checkpoint`: "last"; "best", the kept one with the highest held-out accuracy (the later one if tied); or a step.
    `dtype`: float32 as trained, or bfloat16. `max_shard_size`: maximum size of a weights file, e.g. "5GB"; larger
    models are split into several files. A run that trained adapters is exported as the merged model, or with `adapter`
    as the adapter alone, in peft format. `gguf`: write one GGUF file for llama.cpp and Ollama; then `dtype` can also be
    float16 or q8_0. `verify`: evaluate the folder on the run's own evaluation set, and raise
    RunError if it answers differently from the run (see `gruppo.training.verify`); the folder is kept. `trust`: run
    the code that the evaluation of a run folder from somebody else names. `trust_remote_code`: run the Python files
    that the model came with, regardless of the run's recipe. Raises UsageError if `to` contains files, or if the run
    or checkpoint is missing or damaged.
    """
    plan = plan_export(run, to, checkpoint, dtype, max_shard_size, adapter, gguf, verify, trust, trust_remote_code)
    return plan.write(choose_progress(progress))


@dataclass(frozen=True)
class Plan:
    """An export that was checked and can be written.

    `folder`: of the checkpoint. `environment`: the content of environment.json. `recorded`: the
    evaluation to verify against, if any.
    """

    source: Path
    target: Path
    recipe: Recipe
    folder: Path
    state: State
    environment: Mapping[str, Any]
    dtype: str
    max_shard_size: str
    adapter: bool
    gguf: bool
    trust_remote_code: bool
    recorded: Recorded | None

    def write(self, progress: Progress) -> Export:
        """Write the folder, and verify it if that was planned. Raises UsageError and RunError, see `export`."""
        size, files = self._write(progress)
        verified = None
        if self.recorded is not None:
            verified = self._verify(self.recorded, progress)
        accuracy = accuracy_of(self.state, self.state.step)
        return Export(self.target, self.state.step, accuracy, files, size, verified)

    @property
    def _gguf_file(self) -> str | None:
        """The name of the GGUF file, if one is written."""
        if not self.gguf:
            return None
        from gruppo.training.gguf_export import gguf_file_name

        return gguf_file_name(self.recipe.run.name, self.dtype)

    def _verify(self, recorded: Recorded, progress: Progress) -> Verification:
        """Evaluate what was written. Raises RunError, see `export`."""
        dtype, trust = self.environment["chosen"]["dtype"], self.trust_remote_code
        if self._gguf_file is None:
            return recorded.verify(self.target, dtype, trust, progress)
        from gruppo.training.gguf_export import verify_gguf

        file = self.target / self._gguf_file
        return verify_gguf(recorded, file, self.source / "base", dtype, trust, progress)

    def _write(self, progress: Progress) -> tuple[int, int]:
        """Write the folder. Returns its size in bytes and the number of its files."""
        recipe, dtype, trust, base = self.recipe, self.dtype, self.trust_remote_code, self.source / "base"
        with (
            reading(self.source, "export another checkpoint"),
            _new_folder(self.target) as building,
            _whole_weights(self.folder, building) as weights,
        ):
            if self.adapter:
                chat = _write_adapter(base, weights, building, recipe, dtype, trust)
            elif recipe.model.lora is not None:
                with _merged(base, weights, building, recipe, self.environment, trust, progress) as merged:
                    chat = self._write_model(merged, building, progress)
            else:
                chat = self._write_model(weights, building, progress)
            start = user_path(recipe.model.name)
            start_model = start if is_dir(start) else None
            card = model_card(
                recipe, self.state, self.environment, dtype, chat, self.adapter, start_model, self._gguf_file
            )
            (building / "README.md").write_text(str(card), encoding="utf-8")
            written = list(building.iterdir())
            return sum(path.stat().st_size for path in written), len(written)

    def _write_model(self, weights: Path, building: Path, progress: Progress) -> bool:
        """Write weights, configs and tokenizer. Returns whether there is a chat template."""
        from gruppo.models.compatibility import eos_ids
        from gruppo.models.tokenizer_files import save_tokenizer

        settings = self.recipe.evaluation.decoding if self.recipe.evaluation else Decoding()
        dtype = "float32" if self.gguf else self.dtype
        with _loaded(self.source / "base", weights, dtype, self.trust_remote_code, progress) as (model, tokenizer):
            if self.gguf:
                from gruppo.training.gguf_export import write_gguf_export

                write_gguf_export(model, tokenizer, building, self.recipe.run.name, self.dtype, settings)
            else:
                ends = eos_ids(model.generation_config, model.config, tokenizer)
                model.generation_config = _generation(ends, tokenizer, settings)
                model.save_pretrained(building, max_shard_size=self.max_shard_size)
                save_tokenizer(tokenizer, building)
        return bool(tokenizer.chat_template)


def plan_export(
    run: str | Path,
    to: str | Path,
    checkpoint: str | int = "last",
    dtype: str = "float32",
    max_shard_size: str = "5GB",
    adapter: bool = False,
    gguf: bool = False,
    verify: bool = False,
    trust: bool = False,
    trust_remote_code: bool = False,
) -> Plan:
    """Check what an export needs, without loading the model. The arguments and errors are those of `export`."""
    source, target = Path(run), Path(to)
    _check(source, target, dtype, max_shard_size, gguf)
    recipe = load_recipe(source / "recipe.toml")
    if adapter and recipe.model.lora is None:
        raise UsageError(f"--adapter: {source} trained all weights of its model, so there is no adapter; leave it out")
    if adapter and gguf:
        raise UsageError("--gguf: holds the merged model; leave --adapter out")
    folder = _choose(source, checkpoint)
    state, environment = _state(source, folder), _environment(source)
    if gguf:
        from gruppo.training.gguf_export import require_gguf_export

        with reading(source, "export without --gguf"):
            require_gguf_export(source / "base", dtype, verify, trust_remote_code)
    recorded = None
    if verify:
        from gruppo.training.verify import read_recorded

        recorded = read_recorded(source, recipe, state.step, trust)
    return Plan(
        source,
        target,
        recipe,
        folder,
        state,
        environment,
        dtype,
        max_shard_size,
        adapter,
        gguf,
        trust_remote_code,
        recorded,
    )


def _check(source: Path, target: Path, dtype: str, max_shard_size: str, gguf: bool) -> None:
    known = (*DTYPES, *GGUF_DTYPES) if gguf else DTYPES
    if dtype not in known:
        also = f"; --gguf also knows {' and '.join(GGUF_DTYPES)}" if not gguf else ""
        raise UsageError(f"--dtype {dtype}: cannot be exported; write {' or '.join(known)}{also}")
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", max_shard_size):
        raise UsageError(f"--max-shard-size {max_shard_size}: not a size; write e.g. 5GB or 500MB")
    if source.is_dir():
        require_own(source)
    if not (source / "recipe.toml").is_file():
        raise UsageError(f"{source}: contains no run; give a run folder, e.g. runs/quickstart")
    if not _steps(source):
        raise UsageError(f"{source}: the run has no checkpoint yet; train until it has one")
    if problem := base_problem(source):
        raise UsageError(
            f"{source}: {problem}; restore it from a copy, or use {source}/model, the model after the last step"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"--to {target}: already exists; give the name of a new folder")


def _steps(source: Path) -> dict[int, Path]:
    """The checkpoints by step, in order."""
    return checkpoint_folders(source)


def _environment(source: Path) -> dict[str, Any]:
    """The content of environment.json: how the run was made. Raises UsageError if that information is missing."""
    path = source / "environment.json"
    try:
        content = read_object(path)
        kinds = {"chosen": dict, "packages": dict, "python": str, "start_weights_sha256": str}
        if all(isinstance(content[name], kind) for name, kind in kinds.items()) and {"dtype", "device"} <= set(
            content["chosen"]
        ):
            return content
    except (FileNotFoundError, KeyError):
        pass
    raise UsageError(f"{path}: does not say how the run was made; restore it from a copy")


def _state(source: Path, folder: Path) -> State:
    """The state in a checkpoint whose hashes match. Raises UsageError if it is damaged."""
    from gruppo.training.checkpoint import load_state, problem_of

    if problem := problem_of(folder):
        raise UsageError(f"{folder}: the checkpoint is damaged ({problem}); {_others(source, folder)}")
    return load_state(folder)


def _choose(source: Path, checkpoint: str | int) -> Path:
    steps = _steps(source)
    if checkpoint == "last":
        return steps[max(steps)]
    if checkpoint == "best":
        evaluated = _state(source, steps[max(steps)]).comparable
        if len([step for step in evaluated if int(step)]) < 2:
            raise UsageError(
                "--checkpoint best: the run has not evaluated two steps that could be compared; use "
                "--checkpoint=last, or train with evaluation.every"
            )
        kept = [step for step in steps if str(step) in evaluated]
        if not kept:
            raise UsageError(f"--checkpoint best: no step with a checkpoint was evaluated; {_others(source)}")
        return steps[max(kept, key=lambda step: (evaluated[str(step)]["accuracy"], step))]
    try:
        return steps[int(checkpoint)]
    except (KeyError, ValueError):
        raise UsageError(
            f"--checkpoint {checkpoint}: no such checkpoint; write last, best, or a step; {_others(source)}"
        ) from None


def _others(source: Path, but: Path | None = None) -> str:
    steps = [str(step) for step, folder in _steps(source).items() if folder != but]
    return f"the steps with a checkpoint are {', '.join(steps)}" if steps else "there is no other checkpoint"


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, next to `target`. It is renamed to `target` if the block succeeds, and deleted if it fails."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=target.absolute().parent, prefix=f".writing-{target.name}-"))
    except OSError as error:
        raise UsageError(f"--to {target}: cannot be written to ({error}); choose another folder") from error
    try:
        with writing(target):
            yield building
        building.chmod(0o755)  # temporary folders and safetensors files are created readable by their owner only
        for path in building.iterdir():
            path.chmod(0o644)
        publish(building, target.absolute())
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextmanager
def _loaded(base: Path, weights: Path, dtype: str, trust: bool, progress: Progress) -> Iterator[tuple[Any, Any]]:
    """The model with the weights of a file, and its tokenizer. The model can be used inside the block only.

    `trust`: run the Python files of the model.
    """
    import torch
    from transformers import AutoTokenizer

    from gruppo.models.pretrained import load_weights, loading_progress

    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=trust)
    with tempfile.TemporaryDirectory() as name, loading_progress(progress):
        whole = Path(name)
        shutil.copytree(
            base,
            whole,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "adapter_config.json"),
        )
        (whole / "model.safetensors").symlink_to(weights.absolute())
        yield load_weights(str(whole), getattr(torch, dtype), trust), tokenizer


@contextmanager
def _whole_weights(checkpoint: Path, building: Path) -> Iterator[Path]:
    """The file with a checkpoint's weights. If they are in shards, it exists inside the block only."""
    from gruppo.models.weights import save_weights
    from gruppo.training.checkpoint import read_tensors

    file = checkpoint / "weights.safetensors"
    with reading(file, "export another checkpoint"):
        tensors = read_tensors(checkpoint)
    if file.is_file():
        del tensors
        yield file
        return
    with tempfile.TemporaryDirectory(dir=building.parent, prefix=f"{building.name}-") as folder:
        save_weights(tensors, Path(folder), file.name)
        del tensors
        yield Path(folder) / file.name


@contextmanager
def _merged(
    base: Path,
    adapter: Path,
    building: Path,
    recipe: Recipe,
    environment: Mapping[str, Any],
    trust: bool,
    progress: Progress,
) -> Iterator[Path]:
    """A file with the initial model's weights after merging a checkpoint's adapters. It exists inside the block only.

    An initial model that was passed from Python is in the run's base/.
    """
    from gruppo.models.loading import find_model, load_model
    from gruppo.models.lora import add_adapters
    from gruppo.models.weights import save_weights, weights_sha256
    from gruppo.training.checkpoint import load_weights_file

    name = str(base) if (base / "model.safetensors").is_file() else recipe.model.name
    policy = load_model(
        find_model(name, progress, trust_remote_code=trust), "cpu", environment["chosen"]["dtype"], progress
    )
    if weights_sha256(policy.model) != environment["start_weights_sha256"]:
        raise UsageError(
            f"model.name = {recipe.model.name!r}: its weights are not those that the run started with, and the "
            "checkpoint contains only adapters; restore them, or export the adapter with --adapter"
        )
    policy = add_adapters(policy, recipe.model.lora, recipe.run.seed)
    load_weights_file(adapter.parent, policy.model)
    with tempfile.TemporaryDirectory(dir=building) as folder:
        save_weights(policy.weights(), Path(folder))
        del policy
        yield Path(folder) / "model.safetensors"


def _write_adapter(base: Path, weights: Path, building: Path, recipe: Recipe, dtype: str, trust: bool) -> bool:
    """Write a checkpoint's adapter in peft format, which needs no weights of the initial model.

    Returns whether there is a chat template.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoTokenizer

    from gruppo.models.lora import lora_config, skeleton, write_adapter

    assert recipe.model.lora is not None
    config = lora_config(skeleton(AutoConfig.from_pretrained(base, trust_remote_code=trust), trust), recipe.model.lora)
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(weights).items()}
    write_adapter(config, tensors, building, recipe.model.name)
    return bool(AutoTokenizer.from_pretrained(base, trust_remote_code=trust).chat_template)


def _generation(ends: Sequence[int], tokenizer: Any, settings: Decoding) -> GenerationConfig:
    """A config that ends turns at every id that ended them in the run; greedy unless the run's evaluations sampled."""
    from transformers import GenerationConfig

    options = settings.model_dump(include={"temperature", "top_k", "top_p", "min_p"})
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), None)
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(ends) or None,
        pad_token_id=pad,
        **({"do_sample": True, **options} if settings.temperature else {}),
    )
