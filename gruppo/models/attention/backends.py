"""The attention backends of packed groups by name, and the choice between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gruppo.config.sections import Model
from gruppo.errors import UsageError, error_line
from gruppo.models.attention.flex import FlexAttention
from gruppo.models.attention.interface import AttentionPlan, CapturingAttention, Layer
from gruppo.models.attention.sdpa import SdpaAttention
from gruppo.models.attention.sequences import Layout
from gruppo.models.attention.shared_prefix import SharedPrefixAttention
from gruppo.models.attention.varlen import VarlenAttention
from gruppo.models.precision import choose_device, choose_dtype

MakePlan = Callable[[Layout, torch.device], AttentionPlan]


@dataclass(frozen=True)
class Backend:
    """An attention backend: makes the plans of packed rows."""

    name: str
    make: MakePlan

    def __call__(self, groups: Layout, device: torch.device) -> AttentionPlan:
        """The plan of a packed row. See `SharedPrefixAttention` for what each token sees."""
        return self.make(groups, device)


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpu", SharedPrefixAttention),
        Backend("sdpa", SdpaAttention),
        Backend("flex", FlexAttention),
        Backend("varlen", VarlenAttention),
    )
}
_ORDER = {"cpu": ("cpu",), "cuda": ("varlen", "flex", "sdpa")}  # of "auto"; on other devices: sdpa


def check_compute(settings: Model) -> tuple[torch.device, torch.dtype]:
    """The device and the compute dtype of a model. Needs no weights.

    Raises UsageError if they, attention and compilation do not go together.
    """
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    check_attention(settings.attention, device, dtype)
    if settings.compile and settings.attention in ("auto", "cpu") and device.type == "cpu":
        raise UsageError(
            f'model.compile = true: model.attention = "{settings.attention}" on a CPU leaves nothing to compile; '
            'remove it, or write model.attention = "sdpa"'
        )
    return device, dtype


def check_attention(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UsageError if the attention backend `name` cannot run on the device or in the compute dtype."""
    if name != "auto" and (problem := _unfit(name, device, dtype)):
        raise UsageError(f'model.attention = "{name}": {problem}; write "auto"')


def choose_backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    trial: CapturingAttention,
    backends: Mapping[str, Backend] = BACKENDS,
) -> tuple[Backend, list[str]]:
    """The backend `name`. For "auto", the first that fits and passes a trial, and why those before it do not.

    In the trial, every kind of layer that `trial` has seen computes random heads of its shape, in the compute dtype
    `dtype`, and their gradients. Raises UsageError if `name` does not fit or fails.
    """
    check_attention(name, device, dtype)
    problems: list[str] = []
    for candidate in _ORDER.get(device.type, ("sdpa",)) if name == "auto" else (name,):
        backend = backends[candidate]
        problem = _unfit(candidate, device, dtype) or _fails(backend, trial, device, dtype)
        if problem is None:
            return backend, problems
        problems.append(f"{candidate}: {problem}")
    fix = 'write "auto"' if name != "auto" else 'write model.device = "cpu"'
    raise UsageError(f'model.attention = "{name}": {"; ".join(problems)}; {fix}')


def _unfit(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if name == "cpu" and device.type != "cpu":
        return f"is for a CPU, and the model is on {device.type}"
    if name in ("flex", "varlen") and device.type != "cuda":
        return f"needs an NVIDIA or AMD GPU (cuda), and the model is on {device.type}"
    if name == "varlen" and dtype != torch.bfloat16:
        return f"computes in bfloat16 only, and model.dtype is {str(dtype).removeprefix('torch.')}"
    if name == "flex" and dtype == torch.float64:
        return "does not compute in float64"
    return None


_TRIAL = [(5, (4, 2)), (3, ())]
# Largest relative error of outputs and gradients; kernels round to the compute dtype at other places.
_BOUNDS = {torch.bfloat16: 0.03, torch.float32: 1e-3, torch.float64: 1e-9}


def _fails(backend: Backend, trial: CapturingAttention, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot compute one of the layers; None if it can."""
    kinds = {}
    for layer in trial.layers:
        window = None if layer.window is None else 3  # shorter than the sequences of the trial
        kind = layer.scale, layer.softcap, window, layer.sinks is None
        heads = [(tensor.shape[0], tensor.shape[-1]) for tensor in trial.captured[layer.index]]
        kinds[*kind, *heads] = replace(layer, window=window), heads
    for layer, heads in kinds.values():
        try:
            error = _trial_error(backend, layer, heads, device, dtype)
        except Exception as problem:  # noqa: BLE001  kernels and compilers raise anything
            return f"fails in layer {layer.index} ({error_line(problem)})"
        if not error < _BOUNDS[dtype]:
            return f"gives other numbers in layer {layer.index} (relative error {error:.2g})"
    return None


@torch.enable_grad()
def _trial_error(
    backend: Backend, layer: Layer, heads: Sequence[tuple[int, int]], device: torch.device, dtype: torch.dtype
) -> float:
    """The largest relative error of a layer's output and gradients on random heads.

    `heads`: the number and width of the heads of queries, keys and values.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = sum(prompt + sum(completions) for prompt, completions in _TRIAL)
    shapes = [*heads, (heads[0][0], heads[2][1])]  # the last is the gradient of the output
    drawn = [torch.randn(1, count, tokens, width, generator=generator) for count, width in shapes]
    # Rounded to the compute dtype, so that only computing differs.
    values = [tensor.to(device, dtype) for tensor in drawn]
    exact = SdpaAttention(_TRIAL, device, explicit=True)
    wide = torch.promote_types(dtype, torch.float32)
    expected = _with_gradients(exact, layer, [tensor.to(wide) for tensor in values])
    plan = backend(_TRIAL, device)
    found = _with_gradients(plan, layer, [tensor.to(wide) if plan.wide else tensor for tensor in values])
    pairs = zip(found, expected, strict=True)
    return max(float(torch.dist(one.to(wide), other) / other.norm()) for one, other in pairs)


def _with_gradients(plan: AttentionPlan, layer: Layer, values: Sequence[Tensor]) -> list[Tensor]:
    inputs = [tensor.clone().requires_grad_() for tensor in values[:3]]
    output = plan.attend(layer, *inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, values[3].transpose(1, 2))]
