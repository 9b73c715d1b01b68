"""Loading of models from hub names, folders, GGUF files and memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from gruppo.errors import UsageError, error_line
from gruppo.models.attention.backends import check_attention
from gruppo.models.compatibility import context_length, unsupported, wrap_model
from gruppo.models.conversion import adapter_base, convert_gguf, is_adapter, merge_adapter
from gruppo.models.packaged import PACKAGED, packaged_model
from gruppo.models.policy import LanguageModel
from gruppo.models.precision import choose_device, choose_dtype
from gruppo.models.pretrained import (
    FOREIGN,
    NO_SAFETENSORS,
    load_weights,
    loading_progress,
    pickles_alone,
    require_whole_model,
)
from gruppo.utils.hub import hidden_bars, hub_problem, hub_reachable, split_revision
from gruppo.utils.imports import IN_MEMORY
from gruppo.utils.paths import is_dir, is_file, user_path
from gruppo.utils.progress import NullProgress, Progress
from gruppo.utils.system import keep_freed_memory, limit_threads

# The files of a model on the hub that are downloaded: no pickles, and the weights in transformers' format only.
_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "README.md"]
_OTHER_FORMATS = ["consolidated*.safetensors", "*/*.safetensors"]


@dataclass(frozen=True)
class ModelSource:
    """A model whose weights are not loaded yet, with config and tokenizer: enough to check prompts.

    `given`: the model, if it is in memory. `trusted`: its Python files may run. `owned`: the given model is not used
    elsewhere, so it need not be copied.
    """

    location: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    given: PreTrainedModel | None = None
    trusted: bool = False
    owned: bool = False

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

    A hub name can be followed by a revision: "owner/name@branch", or a tag or commit.

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
    location = _locate(name, progress or NullProgress(), trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
        if find_adapter_config_file(location) is not None:  # transformers would apply the adapter without asking
            raise ValueError(
                "it also contains an adapter (adapter_config.json); merge it into the weights, or remove it"
            )
    except Exception as error:  # third-party files can fail in any way
        if "trust_remote_code" in str(error):
            raise UsageError(f"model.name = {name!r}: {FOREIGN}") from None
        if not is_dir(Path(location)) and (problem := hub_problem(error)):
            raise UsageError(f"model.name = {name!r}: {problem}") from error
        raise UsageError(
            f"model.name = {name!r}: cannot be loaded ({error_line(error)}); write a hub name, a local folder, a "
            f".gguf file or one of: {', '.join(PACKAGED)}"
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
    source: ModelSource,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
    attention: str = "auto",
) -> LanguageModel:
    """Load the weights of a model onto the device, as float32, or as float64 with dtype "float64".

    `dtype`: the compute dtype. `attention`: the backend for packed groups. See `choose_device`, `choose_dtype` and
    `choose_backend` for the names.
    """
    keep_freed_memory()
    limit_threads()
    target = choose_device(device)
    compute = choose_dtype(dtype, target)
    check_attention(attention, target, compute)
    storage = torch.float64 if compute == torch.float64 else torch.float32
    with loading_progress(progress or NullProgress()):
        if source.given is None:
            model = load_weights(source.location, storage, source.trusted)
        else:
            model = _widened(source.given, storage) if source.owned else _copied(source.given, storage)
    nn.Module.to(model, target)
    return wrap_model(model, source.tokenizer, compute, attention, progress)


def _widened(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights in this dtype. Buffers are left as they are, as transformers leaves them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _copied(given: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model with the same config and weights that shares no memory, hook or frozen parameter with `given`."""
    weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in given.state_dict().items()}
    config = copy.deepcopy(given.config)
    loaded: Any = type(given).from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    model = require_whole_model(loaded[0], loaded[1], "in memory")
    model.generation_config = copy.deepcopy(given.generation_config)
    return model


def _final_model(path: Path, name: str) -> Path:
    """The final model of a run folder. Any other path is returned unchanged."""
    if not is_dir(path) or not (path / "recipe.toml").is_file() or (path / "config.json").is_file():
        return path
    if not (path / "model" / "config.json").is_file():
        raise UsageError(
            f"model.name = {name!r}: this run has no final model yet; finish it with --resume, or export a "
            f"checkpoint as a model: `gruppo export {name} --to DIR`"
        )
    return path / "model"


def _locate(name: str, progress: Progress, trust_remote_code: bool) -> str:
    path = user_path(name)
    if name in PACKAGED:
        return str(convert_gguf(packaged_model(name, progress), progress))
    if path.suffix == ".gguf":
        if not is_file(path):
            raise UsageError(f"model.name = {name!r}: there is no such file; write the path of a .gguf file")
        return str(convert_gguf(path, progress))
    path = _final_model(path, name)
    if is_adapter(path):
        return str(_merged_adapter(path, progress, trust_remote_code))
    if is_dir(path) and not (path / "config.json").is_file():
        raise UsageError(f"model.name = {name!r}: the folder has no config.json; write a folder saved by transformers")
    if is_dir(path):
        if problem := pickles_alone(path):
            raise UsageError(f"model.name = {name!r}: {problem}")
        return str(path)
    if name.startswith(IN_MEMORY):
        raise UsageError(f"model.name = {name!r}: was passed from Python; pass it again: gruppo.train(…, model=…)")
    return _on_hub(name, path, progress, trust_remote_code)


def _on_hub(name: str, path: Path, progress: Progress, trust_remote_code: bool) -> str:
    """The folder of a model on the hub. `path`: its name as a path, which is no folder."""
    repository, revision = split_revision(name)
    if is_file(path) or name.startswith((".", "/", "~")) or repository.count("/") > 1:
        raise UsageError(f"model.name = {name!r}: there is no such folder; write a folder saved by transformers")
    try:
        unreachable = out_of_reach(repository, revision)
    except HFValidationError:
        raise UsageError(
            f"model.name = {name!r}: neither a folder nor a Hugging Face hub name; write one of them"
        ) from None
    if unreachable:
        raise UsageError(
            f"model.name = {name!r}: there is no such folder, and the Hugging Face hub cannot be reached; go online, "
            f"write a folder or .gguf file, or one of: {', '.join(PACKAGED)}"
        )
    folder = _downloaded(name, progress, trust_remote_code)
    try:
        location = _locate(folder, progress, trust_remote_code)
    except UsageError as error:
        raise UsageError(str(error).replace(folder, name)) from None
    if not any(Path(location).glob("*.safetensors")):
        raise UsageError(f"model.name = {name!r}: {NO_SAFETENSORS}")
    return location


def _downloaded(name: str, progress: Progress, trust_remote_code: bool) -> str:
    """The folder in the hub's cache with a model. Downloads what is missing."""
    try:
        with progress.bar(f"Opening {name}", None, ""):
            return snapshot_of(name, trust_remote_code)
    except Exception as error:  # of the hub, the network or the disk
        raise UsageError(f"model.name = {name!r}: {hub_problem(error) or error_line(error)}") from error


def snapshot_of(name: str, trust_remote_code: bool = False) -> str:
    """The folder in the hub's cache with a model. Downloads what is missing; raises errors of huggingface_hub.

    transformers itself would ask the hub again for files that are in the cache, for minutes if it cannot be reached.
    """
    repository, revision = split_revision(name)
    patterns = [*_FILES, "*.py"] if trust_remote_code else _FILES
    with hidden_bars():
        return snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=_OTHER_FORMATS)


def _merged_adapter(folder: Path, progress: Progress, trust_remote_code: bool) -> Path:
    """The folder of an adapter's base model with the adapter merged into it."""
    base = adapter_base(folder)
    if is_adapter(user_path(base)):
        raise UsageError(
            f"model.name = {str(folder)!r}: its base model {base!r} is an adapter too; merge one of them into a model"
        )
    try:
        location = _locate(base, progress, trust_remote_code)
    except UsageError as error:
        raise UsageError(
            f"model.name = {str(folder)!r}: its adapter_config.json names the base model {base!r}, which cannot be "
            f"used: {error}"
        ) from None
    return merge_adapter(folder, location, progress, trust_remote_code)


def out_of_reach(name: str, revision: str | None = None) -> bool:
    """True if a hub model is neither cached nor reachable. Answers at once, not after half a minute of retries."""
    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    return not isinstance(cached, str) and not hub_reachable()


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
