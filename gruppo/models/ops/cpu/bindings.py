"""What a decoder does between its matrix products, each in one pass over memory where kernels can be compiled.

Every function here says what it computes, and does so with torch's operations where `library` has nothing for the dtype
of products or the device: in float64, on accelerators, without a compiler. "Narrow" is the dtype of products, "wide"
that of everything between them: float32, or float64 in proofs.

Rows are shared out to threads, so a row's result depends on that row alone; sums over rows (the gradient of a norm's
weight) are taken in an order that the number of threads fixes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import silu

from gruppo.models.ops.cpu.build import library

Rope = tuple[Tensor, Tensor]  # cosines and sines [N, D]
Tensors = Sequence[Tensor | None]
Norms = tuple[Tensor | None, Tensor | None, float]  # weights of the norms of each query's and key's head, and ε


def _kernels(
    dtype: torch.dtype, *, narrow: Tensors = (), wide: Tensors = (), whole: Tensors = ()
) -> ctypes.CDLL | None:
    """The library for products in `dtype`, where what it would read lies in memory as it reads it: narrow tensors in
    that dtype, wide ones in float32, whole numbers in 64 bits. One that is None is left out."""
    for expected, tensors in ((dtype, narrow), (torch.float32, wide), (torch.int64, whole)):
        for each in tensors:
            if each is not None and (each.dtype != expected or each.device.type != "cpu" or not each.is_contiguous()):
                return None
    return library(dtype)


def _new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Room for a kernel to write to, whatever defaults torch is set to."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _of(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def _whole(number: int) -> ctypes.c_int64:
    return ctypes.c_int64(number)


def _threads() -> ctypes.c_int:
    return ctypes.c_int(torch.get_num_threads())


def add_norm(
    hidden: Float[Tensor, "N H"],
    delta: Float[Tensor, "N H"] | None,
    weight: Float[Tensor, " H"] | None,
    epsilon: float,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "N H"], Float[Tensor, "N H"] | None]:
    """The sum x = hidden + delta (hidden itself without a delta), wide; and weight · x / √(mean x² + ε), narrow, where
    there is a weight. `dtype` is the narrow one, which the delta has."""
    kernels = _kernels(dtype, narrow=[delta], wide=[hidden, weight])
    if kernels is not None:
        made = hidden if delta is None else torch.empty_like(hidden)
        normed = None if weight is None else _new(*hidden.shape, dtype=dtype)
        kernels.add_norm(
            *map(_whole, hidden.shape), _of(hidden), _of(delta), _of(weight), ctypes.c_float(epsilon), _of(made),
            _of(normed), _threads(),
        )  # fmt: skip
        return made, normed
    made = hidden if delta is None else hidden + delta
    return made, None if weight is None else norm(made, weight, epsilon).to(dtype)


def norm(rows: Float[Tensor, "... H"], weight: Float[Tensor, " H"], epsilon: float) -> Float[Tensor, "... H"]:
    """RMS norm, wide: weight · x / √(mean x² + ε)."""
    wide = rows.to(torch.promote_types(rows.dtype, weight.dtype))
    return (wide * weight).mul_(_inverse_size(wide, epsilon))


def _inverse_size(rows: Tensor, epsilon: float) -> Tensor:
    """1 / √(mean x² + ε) of each row."""
    sizes: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return sizes.square_().div_(rows.shape[-1]).add_(epsilon).rsqrt_()


def norm_backward(
    grad: Float[Tensor, "*N H"],
    rows: Float[Tensor, "*N H"],
    weight: Float[Tensor, " H"],
    epsilon: float,
    more: Float[Tensor, "*N H"] | None = None,
) -> tuple[Float[Tensor, "*N H"], Float[Tensor, " H"]]:
    """The gradient of a norm's rows, plus `more`, and that of its weight; both wide.

    With s = 1 / √(mean x² + ε) and n = x · s: s · (g · w - n · mean(g · w · n)), and Σ g · n over the rows.
    """
    kernels = _kernels(grad.dtype, narrow=[grad], wide=[rows, weight, more])
    if kernels is not None and rows.ndim == 2:
        made, threads = torch.empty_like(rows), torch.get_num_threads()
        parts = _new(threads, rows.shape[1])
        kernels.norm_backward(
            *map(_whole, rows.shape), _of(grad), _of(rows), _of(weight), ctypes.c_float(epsilon), _of(more), _of(made),
            _of(parts), ctypes.c_int(threads),
        )  # fmt: skip
        return made, parts.sum(dim=0)
    wide, grad = rows.to(weight.dtype), grad.to(weight.dtype)
    scale = _inverse_size(wide, epsilon)
    normed = wide * scale
    joint = grad * normed
    of_weight = joint.flatten(0, -2).sum(dim=0)
    share = (joint @ weight).div_(weight.numel()).unsqueeze(-1)
    made = torch.mul(grad, weight, out=joint).addcmul_(normed, share, value=-1).mul_(scale)
    return (made if more is None else made.add_(more)), of_weight


def gate(gated: Float[Tensor, "N 2*I"]) -> Float[Tensor, "N I"]:
    """silu(gate) · up of rows [gate, up], narrow."""
    rows, size = len(gated), gated.shape[1] // 2
    kernels = _kernels(gated.dtype, narrow=[gated])
    if kernels is not None:
        made = gated.new_empty(rows, size)
        kernels.gate(_whole(rows), _whole(size), _of(gated), _of(made), _threads())
        return made
    first, second = gated.chunk(2, dim=-1)
    return silu(first).mul_(second)


def gate_backward(gated: Float[Tensor, "N 2*I"], grad: Float[Tensor, "N I"]) -> Float[Tensor, "N 2*I"]:
    """The gradient of `gate` with respect to its rows, narrow."""
    kernels = _kernels(gated.dtype, narrow=[gated, grad])
    made = torch.empty_like(gated)
    if kernels is not None:
        kernels.gate_backward(*map(_whole, grad.shape), _of(gated), _of(grad), _of(made), _threads())
        return made
    first, second = gated.chunk(2, dim=-1)
    size = first.shape[-1]
    torch.mul(grad, silu(first), out=made[:, size:])
    torch.ops.aten.silu_backward.grad_input(grad * second, first, grad_input=made[:, :size])
    return made


def turn_heads(
    projected: Float[Tensor, "N Q+2*K D"], queries: int, rope: Rope, norms: Norms, dtype: torch.dtype
) -> tuple[Float[Tensor, "N Q D"], Float[Tensor, "N K D"], Float[Tensor, "N K D"]]:
    """Queries, keys and values of rows [queries, keys, values], in `dtype`: queries and keys normed where there are
    weights for it, then turned by their rotary positions: (a, b) -> (a · cos - b · sin, b · cos + a · sin) of the two
    halves of each head."""
    rows, heads, width = projected.shape
    keys = (heads - queries) // 2
    kernels = _kernels(projected.dtype, narrow=[projected], wide=[*rope, *norms[:2]])
    if kernels is not None and dtype == torch.float32:
        made = _new(rows, queries, width), _new(rows, keys, width), _new(rows, keys, width)
        kernels.turn_heads(
            *map(_whole, (rows, queries, keys, width)), _of(projected), *map(_of, (*rope, *norms[:2])),
            ctypes.c_float(norms[2]), *map(_of, made), _threads(),
        )  # fmt: skip
        return made
    both, value = projected[:, : queries + keys].to(dtype), projected[:, queries + keys :].to(dtype)
    if norms[0] is not None and norms[1] is not None:
        both = torch.cat([norm(both[:, :queries], norms[0], norms[2]), norm(both[:, queries:], norms[1], norms[2])], 1)
    cos, sin = (each.unsqueeze(1) for each in rope)
    half = width // 2
    turned = both * cos
    turned[..., :half].addcmul_(both[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(both[..., :half], sin[..., half:])
    return turned[:, :queries], turned[:, queries:], value


def turn_heads_backward(
    query: Float[Tensor, "N Q D"],
    key: Float[Tensor, "N K D"],
    value: Float[Tensor, "N K D"],
    rope: Rope,
    dtype: torch.dtype,
) -> Float[Tensor, "N Q+2*K D"]:
    """The gradient of the rows that `turn_heads` read, in `dtype`, from those of what it made; where heads have norms
    of their own, that of what those made."""
    (rows, queries, width), keys = query.shape, key.shape[1]
    kernels = _kernels(dtype, wide=[query, key, value, *rope])
    if kernels is not None:
        made = _new(rows, queries + 2 * keys, width, dtype=dtype)
        kernels.turn_heads_backward(
            *map(_whole, (rows, queries, keys, width)), *map(_of, (query, key, value, *rope, made)), _threads()
        )
        return made
    cos, sin = (each.unsqueeze(1) for each in rope)
    both, half = torch.cat([query, key], dim=1), width // 2
    turned = both * cos
    turned[..., :half].addcmul_(both[..., half:], sin[..., half:])
    turned[..., half:].addcmul_(both[..., :half], sin[..., :half], value=-1)
    return torch.cat([turned.to(dtype), value.to(dtype)], dim=1)


def _fields(**names: str) -> list[tuple[str, type]]:
    """Of a structure of kernels.c: kinds with the names of what has them, in order."""
    kinds = {"whole": ctypes.c_int64, "real": ctypes.c_float, "at": ctypes.c_void_p}
    return [(name, kinds[kind.rstrip("_")]) for kind, listed in names.items() for name in listed.split()]


class _Decoding(ctypes.Structure):
    """`struct decoding` of kernels.c."""

    _fields_ = _fields(
        whole="rows queries keys own_room prefix_room window",
        at="projected cosine sine query_norm key_norm",
        real="epsilon scale",
        at_="own_keys own_values prefix_keys prefix_values order place prefix_length position made",
    )


class _Packing(ctypes.Structure):
    """`struct packing` of kernels.c."""

    _fields_ = _fields(
        whole="groups queries keys window",
        at="first start length query key value",
        real="scale",
        at_="made normaliser grad of_query of_key of_value",
    )


_EVERYTHING = 2**62  # a window that nothing is outside of


class PackedLayout:
    """Where the sequences of a packed row lie: of each group its prompt, then its completions."""

    def __init__(self, groups: Sequence[tuple[int, Sequence[int]]]) -> None:
        """`groups`: for each, the length of its prompt and of its completions, in tokens."""
        lengths = [[prompt, *completions] for prompt, completions in groups]
        self.groups = len(groups)
        with torch.device("cpu"):
            self.length = torch.tensor([each for own in lengths for each in own], dtype=torch.int64)
            self.start = self.length.cumsum(0) - self.length
            self.first = torch.tensor([0, *map(len, lengths)], dtype=torch.int64).cumsum(0)

    def fits(self, *tensors: Float[Tensor, "N heads D"]) -> bool:
        """Whether `attend_packed` can attend between them, and is quick: a thread takes a key head of a group."""
        width, keys = tensors[-1].shape[-1], tensors[-1].shape[1]
        return (
            all(each.dtype == torch.float32 and each.device.type == "cpu" for each in tensors)
            and {each.shape[-1] for each in tensors} == {width}
            and width % 16 == 0
            and self.groups * keys >= torch.get_num_threads()
            and library(torch.float32) is not None
        )


def attend_packed(
    query: Float[Tensor, "N Q D"],
    key: Float[Tensor, "N K D"],
    value: Float[Tensor, "N K D"],
    layout: PackedLayout,
    scale: float,
    window: int | None,
) -> tuple[Float[Tensor, "N Q D"], Float[Tensor, "N Q"]]:
    """Attention over a packed row of groups, and the log-sum-exp of each query's scores, scale · q·k.

    A prompt's token sees the prompt up to itself, a completion's the whole prompt of its group and its own completion
    up to itself; of that, where there is a window, the last so many. All contiguous, and such as the layout `fits`.
    """
    made, normaliser = torch.empty_like(query), query.new_empty(query.shape[:2])
    _attend_packed([query, key, value], layout, scale, window, [made, normaliser, None, None, None, None])
    return made, normaliser


def attend_packed_backward(
    grad: Float[Tensor, "N Q D"],
    tensors: Sequence[Tensor],
    made: tuple[Float[Tensor, "N Q D"], Float[Tensor, "N Q"]],
    layout: PackedLayout,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, which are `tensors`; `made` is what `attend_packed` made of them."""
    query, key, value = torch.empty_like(tensors[0]), torch.zeros_like(tensors[1]), torch.zeros_like(tensors[2])
    _attend_packed(tensors, layout, scale, window, [*made, grad, query, key, value])
    return query, key, value


def _attend_packed(
    tensors: Sequence[Tensor], layout: PackedLayout, scale: float, window: int | None, rest: Sequence[Tensor | None]
) -> None:
    kernels = library(torch.float32)
    assert kernels is not None
    packing = _Packing(
        layout.groups, tensors[0].shape[1], tensors[1].shape[1], _EVERYTHING if window is None else window,
        *(each.data_ptr() for each in (layout.first, layout.start, layout.length, *tensors)), scale,
        *(None if each is None else each.data_ptr() for each in rest),
    )  # fmt: skip
    backward = ctypes.c_int(rest[2] is not None)
    if kernels.attend_packed(_whole(tensors[0].shape[-1]), ctypes.byref(packing), backward, _threads()):
        raise MemoryError("the attention of a packed row")


def attend_decoding(
    projected: Float[Tensor, "N Q+2*K D"],
    queries: int,
    rope: Rope,
    norms: Norms,
    scale: float,
    window: int | None,
    own: tuple[Float[Tensor, "S K T D"], Float[Tensor, "S K T D"]],
    prefix: tuple[Float[Tensor, "P K R D"], Float[Tensor, "P K R D"]],
    rows: Sequence[Int[Tensor, " N"]],
) -> Float[Tensor, "N Q*D"] | None:
    """Attention of a decoding step, narrow; None where no kernel can do it, and nothing has happened then.

    Each row's queries and key are turned (and normed) as by `turn_heads`, its key and value written to the stores of
    its own tokens, row n to slot n; its queries then see the last `window` positions (all without one) of its prompt
    and its own tokens. `rows` are four: an order of rows in which those of one prompt stand together; each row's place
    among the prompts, the length of that prompt, and the position in its own store that it writes to.
    """
    count, heads, width = projected.shape
    wide = [*rope, *norms[:2], *own, *prefix]
    kernels = _kernels(projected.dtype, narrow=[projected], wide=wide, whole=rows)
    if kernels is None or own[0].shape != own[1].shape or width % 16:
        return None
    made = projected.new_empty(count, queries * width)
    addresses = [None if each is None else each.data_ptr() for each in (projected, *rope, *norms[:2])]
    step = _Decoding(
        count, queries, (heads - queries) // 2, own[0].shape[2], prefix[0].shape[2],
        _EVERYTHING if window is None else window, *addresses, norms[2], scale,
        *(each.data_ptr() for each in (*own, *prefix, *rows, made)),
    )  # fmt: skip
    if kernels.attend(_whole(width), ctypes.byref(step), _threads()):
        raise MemoryError("the attention of a decoding step")
    return made


def logprobs_of_part(
    logits: Float[Tensor, "N V"],
    temperature: float,
    targets: Int[Tensor, " N"],
    start: int,
    target: Float[Tensor, " N"],
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Of a part of the vocabulary that begins at `start`, with z = logits / temperature: log Σ exp z, and the mean of z
    under its softmax; both wide. The z of targets that are in this part go into `target`."""
    kernels = _kernels(logits.dtype, narrow=[logits], wide=[target], whole=[targets])
    if kernels is not None:
        normaliser, mean = torch.empty_like(target), torch.empty_like(target)
        kernels.logprobs_of_part(
            *map(_whole, logits.shape), _of(logits), ctypes.c_float(1 / temperature), _of(targets), _whole(start),
            *map(_of, (normaliser, mean, target)), _threads(),
        )  # fmt: skip
        return normaliser, mean
    wide = logits.to(target.dtype).div_(temperature) if logits.dtype != target.dtype else logits.div(temperature)
    places = targets - start
    inside = (places >= 0) & (places < wide.shape[-1])
    held = wide.gather(-1, places.clamp(0, wide.shape[-1] - 1)[:, None])[:, 0]
    target.copy_(torch.where(inside, held, target))
    within = torch.softmax(wide, dim=-1)  # a quicker kernel than exp's
    normaliser = wide.amax(dim=-1) - within.amax(dim=-1).log_()
    return normaliser, within.mul_(wide).sum(dim=-1)


def logprobs_backward(
    logits: Float[Tensor, "N V"],
    temperature: float,
    targets: Int[Tensor, " N"],
    start: int,
    normaliser: Float[Tensor, " N"],
    scale: Float[Tensor, " N"],
) -> Float[Tensor, "N V"]:
    """scale · (onehot(target) - exp(logits / temperature - normaliser)) of the same part, in the dtype of the logits,
    whose memory may be taken for it."""
    kernels = _kernels(logits.dtype, narrow=[logits], wide=[normaliser, scale], whole=[targets])
    if kernels is not None:
        kernels.logprobs_backward(
            *map(_whole, logits.shape), _of(logits), ctypes.c_float(1 / temperature), _of(targets), _whole(start),
            _of(normaliser), _of(scale), _threads(),
        )  # fmt: skip
        return logits
    wide = logits.to(scale.dtype).div_(temperature) if logits.dtype != scale.dtype else logits.div(temperature)
    made = wide.sub_(normaliser[:, None]).exp_().mul_(-scale[:, None])
    places = targets - start
    inside = (places >= 0) & (places < made.shape[-1])
    made.scatter_add_(-1, places.clamp(0, made.shape[-1] - 1)[:, None], (scale * inside)[:, None])
    return made.to(logits.dtype)


def sample(
    logits: Float[Tensor, "N V"], temperature: float, uniforms: Float[Tensor, " N"]
) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]] | None:
    """A token a row of softmax(logits / temperature), by inverting its distribution function at a number of [0, 1), and
    its log-probability (NaN where the logits are not finite); None where no kernel can do it."""
    kernels = _kernels(logits.dtype, narrow=[logits])
    if kernels is None or uniforms.dtype != torch.float64:
        return None
    uniforms = uniforms.cpu().contiguous()
    assert len(uniforms) == len(logits)
    tokens, logprobs = _new(len(logits), dtype=torch.int64), _new(len(logits))
    kernels.sample(
        *map(_whole, logits.shape), _of(logits), ctypes.c_float(1 / temperature), _of(uniforms), _of(tokens),
        _of(logprobs), _threads(),
    )  # fmt: skip
    return tokens, logprobs
