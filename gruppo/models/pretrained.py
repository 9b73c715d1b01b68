"""Loading of weights with transformers: all tensors or an error, never a pickle, with gruppo's progress bars."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from gruppo.errors import UsageError, error_line
from gruppo.models.weights import damage_of
from gruppo.utils.progress import Progress


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
            raise UsageError(f"model.name = {location!r}: {FOREIGN}") from None
        others = _has_pickles(Path(location)) or not Path(location).exists()  # not a folder: a hub model
        if "safetensors" in str(error) and others and "gguf_file" not in options:
            raise UsageError(f"model.name = {location!r}: {NO_SAFETENSORS}") from error
        raise UsageError(
            f"model.name: the weights in {location} cannot be loaded ({error_line(error)}); use a complete model"
        ) from error
    return require_whole_model(loaded[0], loaded[1], f"in {Path(location) / options.get('gguf_file', '')}")


UNDAMAGED = "use an undamaged copy: compare the files with their source, or download them again"


FOREIGN = (
    "needs its own Python code, which would run on this machine; read the code, and if you trust it, write "
    "model.trust_remote_code = true (on the command line --trust-remote-code), or use another model"
)


NO_SAFETENSORS = (
    "has no safetensors weights. Weights in pickles are never read, because reading one can run any code; if you trust "
    "them, convert them with transformers: "
    "AutoModelForCausalLM.from_pretrained(name).save_pretrained(folder)"
)


def pickles_alone(folder: Path) -> str | None:
    """The advice for a folder whose only weights are pickles, or None for any other folder."""
    return NO_SAFETENSORS if _has_pickles(folder) and not any(folder.glob("*.safetensors")) else None


def _has_pickles(folder: Path) -> bool:
    return any(path.suffix in {".bin", ".pt", ".pth"} for path in folder.glob("*"))


def require_whole_model(model: PreTrainedModel, report: dict[str, Any], where: str) -> PreTrainedModel:
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
