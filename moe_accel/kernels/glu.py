"""A gated linear unit, its bias and the routing weight in one pass over the first projection's output, and their
backward in another.

forward    a = act(gate) * up * weight                      reads u [P,2I] and weight [P], writes a [P,I]
backward   from the gradient of a: those of gate and up, of weight (summed over I in fp32), and a once more, so that the
           second projection's input need not be kept between forward and backward

act(g) = g * sigmoid(slope * g + cubic * g^3): SiLU, GELU by its tanh (Hendrycks and Gimpel, 2016: tanh(z) is
2 * sigmoid(2z) - 1) and GPT-OSS's are of this form; `Gate` says which, and what is clamped. Shazeer, "GLU Variants
Improve Transformer" (2020). All arithmetic is in fp32, each result rounded once; native rounds after every operation.

A second part of u, and of the gradient, is added where it is read: what a low-rank adapter contributes comes apart,
because added to u in bf16 it would be rounded away wherever it is smaller than half a unit in u's last place. So is
the bias of each row's expert.

Sizes: P rows, I inner, e experts; u holds gate [:, :I] and up [:, I:], or the two by turns where they are interleaved.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moe_accel.kernels.device import launch, tl, triton, use_triton
from moe_accel.kernels.more import load_with_more, more_or, stop_or, with_more, with_tail

COLUMNS = 1024  # of a tile


class Gate(NamedTuple):
    """`g * sigmoid(slope * g + cubic * g**3) * (up + shift)` of g = min(gate, limit) and up within -limit and limit.

    Attributes:
        slope: factor of g in the sigmoid.
        cubic: factor of its cube.
        limit: what gate and up are clamped to; None: they are not.
        shift: added to up.
        interleaved: gate and up by turns in u, rather than the one after the other.
    """

    slope: float = 1.0
    cubic: float = 0.0
    limit: float | None = None
    shift: float = 0.0
    interleaved: bool = False


SWIGLU = Gate()
GELU_TANH = Gate(2 * math.sqrt(2 / math.pi), 0.044715 * 2 * math.sqrt(2 / math.pi))


class ExpertBias(NamedTuple):
    """A bias for each row, that of its expert: `bias` [e,2I] in its own dtype, `experts` [P] integer."""

    bias: Tensor
    experts: Tensor

    def rows(self, exact: torch.dtype) -> Tensor:
        """[P,2I] in `exact`."""
        return self.bias.to(exact).index_select(0, self.experts.int())


def glu(
    u: Tensor,
    weight: Tensor,
    u_more: Tensor | None = None,
    gate: Gate = SWIGLU,
    bias: ExpertBias | None = None,
    tail: int = 0,
    stop: Tensor | None = None,
) -> Tensor:
    """The gate of u + u_more + bias, times weight: u [P,2I], weight [P], u_more [P,2I] -> [P,I+tail] in the dtype of u.

    The last `tail` columns are room for more: not written. `stop`: [1], see `rows.RowMap`.
    """
    if not use_triton(u):
        return with_tail(glu_torch(u, weight, u_more, gate, bias), tail)
    num_rows, inner = u.shape[0], u.shape[1] // 2
    out = u.new_empty(num_rows, inner + tail)
    tensors = u.contiguous(), more_or(u_more, u), *_bias_or(bias, u), weight.contiguous(), stop_or(stop, u), out
    constants = _constants(u_more, stop, bias, gate) | {"tail": tail, "inner": inner}
    launch(_forward_kernel, (num_rows,), *tensors, **constants, COLUMNS=COLUMNS)
    return out


def glu_backward(
    gradient: Tensor,
    u: Tensor,
    weight: Tensor,
    gradient_more: Tensor | None = None,
    u_more: Tensor | None = None,
    gate: Gate = SWIGLU,
    bias: ExpertBias | None = None,
    tail: int = 0,
    stop: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of `glu`, and its output again.

    Args:
        gradient: [P,I], of the output.
        u: [P,2I], as in forward.
        weight: [P], as in forward.
        gradient_more: [P,I], what is added to the gradient.
        u_more: [P,2I], as in forward.
        gate: as in forward.
        bias: as in forward.
        tail: columns of room behind the gradient of u, not written.
        stop: as in forward.

    Returns:
        gradient of u [P,2I+tail] in its dtype, gradient of weight [P] in its dtype, and the output of `glu` [P,I].
    """
    if not use_triton(u):
        u_grad, weight_grad, out = glu_backward_torch(gradient, u, weight, gradient_more, u_more, gate, bias)
        return with_tail(u_grad, tail), weight_grad, out
    num_rows, inner = gradient.shape
    gradient, u, weight = gradient.contiguous(), u.contiguous(), weight.contiguous()
    u_grad, weight_grad, out = (
        u.new_empty(num_rows, 2 * inner + tail),
        torch.empty_like(weight),
        torch.empty_like(gradient),
    )
    of_u = u, more_or(u_more, u), *_bias_or(bias, u), weight
    tensors = gradient, more_or(gradient_more, gradient), *of_u, stop_or(stop, u), u_grad, weight_grad, out
    constants = {"HAS_GRADIENT_MORE": gradient_more is not None} | _constants(u_more, stop, bias, gate)
    launch(_backward_kernel, (num_rows,), *tensors, **constants, tail=tail, inner=inner, COLUMNS=COLUMNS)
    return u_grad, weight_grad, out


def _bias_or(bias: ExpertBias | None, instead: Tensor) -> tuple[Tensor, Tensor]:
    return (instead, instead) if bias is None else (bias.bias.contiguous(), bias.experts.contiguous())


def _constants(
    u_more: Tensor | None, stop: Tensor | None, bias: ExpertBias | None, gate: Gate
) -> dict[str, bool | float | None]:
    slope, cubic, limit, shift, interleaved = gate
    of_gate = {"SLOPE": slope, "CUBIC": cubic, "LIMIT": limit, "SHIFT": shift, "INTERLEAVED": interleaved}
    has = {"HAS_MORE": u_more is not None, "HAS_STOP": stop is not None, "HAS_BIAS": bias is not None}
    return has | of_gate


def glu_torch(
    u: Tensor, weight: Tensor, u_more: Tensor | None = None, gate: Gate = SWIGLU, bias: ExpertBias | None = None
) -> Tensor:
    """The definition of `glu`."""
    exact = torch.promote_types(u.dtype, torch.float32)
    g, up = _clamped(*_gate_and_up(u, u_more, gate, bias, exact), gate.limit)
    sigmoid = torch.sigmoid(gate.slope * g + gate.cubic * g**3 if gate.cubic else gate.slope * g)
    return (g * sigmoid * (up + gate.shift) * weight.to(exact)[:, None]).to(u.dtype)


def glu_backward_torch(
    gradient: Tensor,
    u: Tensor,
    weight: Tensor,
    gradient_more: Tensor | None = None,
    u_more: Tensor | None = None,
    gate: Gate = SWIGLU,
    bias: ExpertBias | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of `glu_backward`."""
    exact = torch.promote_types(u.dtype, torch.float32)
    gradient, scale = with_more(gradient, gradient_more, exact), weight.to(exact)[:, None]
    unclamped, up_unclamped = _gate_and_up(u, u_more, gate, bias, exact)
    g, up = _clamped(unclamped, up_unclamped, gate.limit)
    up = up + gate.shift
    inside, slope = gate.slope * g, gate.slope * g
    if gate.cubic:
        inside, slope = inside + gate.cubic * g**3, slope + 3 * gate.cubic * g**3
    sigmoid = inside.sigmoid()
    act, weighted = g * sigmoid, gradient * scale
    g_grad = weighted * up * sigmoid * (1 + slope * (1 - sigmoid))
    up_grad = weighted * act
    if gate.limit is not None:
        g_grad, up_grad = g_grad * (unclamped <= gate.limit), up_grad * (up_unclamped.abs() <= gate.limit)
    u_grad = torch.stack([g_grad, up_grad], 2).flatten(1) if gate.interleaved else torch.cat([g_grad, up_grad], 1)
    return u_grad.to(u.dtype), (gradient * act * up).sum(1).to(weight.dtype), (act * up * scale).to(u.dtype)


def _gate_and_up(
    u: Tensor, u_more: Tensor | None, gate: Gate, bias: ExpertBias | None, exact: torch.dtype
) -> tuple[Tensor, Tensor]:
    u = with_more(u, u_more, exact)
    if bias is not None:
        u = u + bias.rows(exact)
    return (u[:, ::2], u[:, 1::2]) if gate.interleaved else (u[:, : u.shape[1] // 2], u[:, u.shape[1] // 2 :])


def _clamped(g: Tensor, up: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    return (g, up) if limit is None else (g.clamp(max=limit), up.clamp(-limit, limit))


@triton.jit
def _load(u, u_more, bias, start, of_expert, at, inside, HAS_MORE: tl.constexpr, HAS_BIAS: tl.constexpr):
    """u + u_more + bias at these places of a row, in fp32."""
    found = load_with_more(u, u_more, start + at, inside, HAS_MORE)
    if HAS_BIAS:
        found += tl.load(bias + of_expert + at, mask=inside, other=0.0).to(tl.float32)
    return found


@triton.jit
def _load_both(
    u,
    u_more,
    bias,
    start,
    of_expert,
    first,
    inner: tl.constexpr,
    HAS_MORE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gate and up of a tile, before clamps."""
    if INTERLEAVED:
        at = 2 * first + tl.arange(0, 2 * COLUMNS)
        both = _load(u, u_more, bias, start, of_expert, at, at < 2 * inner, HAS_MORE, HAS_BIAS)
        gate, up = tl.split(tl.reshape(both, (COLUMNS, 2)))
    else:
        at = first + tl.arange(0, COLUMNS)
        gate = _load(u, u_more, bias, start, of_expert, at, at < inner, HAS_MORE, HAS_BIAS)
        up = _load(u, u_more, bias, start, of_expert, inner + at, at < inner, HAS_MORE, HAS_BIAS)
    return gate, up


@triton.jit
def _clamp(gate, up, LIMIT: tl.constexpr):
    """A NaN stays one, as in torch."""
    if LIMIT is not None:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return gate, up


@triton.jit
def _sigmoid(gate, SLOPE: tl.constexpr, CUBIC: tl.constexpr):
    inside = gate * SLOPE
    if CUBIC != 0.0:
        inside += CUBIC * gate * gate * gate
    return tl.sigmoid(inside)


@triton.jit
def _forward_kernel(
    u,
    u_more,
    bias,
    experts,
    weight,
    stop,
    out,
    HAS_MORE: tl.constexpr,
    HAS_STOP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SLOPE: tl.constexpr,
    CUBIC: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    tail: tl.constexpr,
    inner: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if HAS_STOP:  # noqa: SIM102 of constants and then of values
        if row >= tl.load(stop):
            return
    of_expert = row
    if HAS_BIAS:
        of_expert = tl.load(experts + row).to(tl.int64) * 2 * inner
    scale = tl.load(weight + row).to(tl.float32)
    for first in range(0, inner, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        gate, up = _load_both(  # pyright: ignore[reportGeneralTypeIssues]
            u, u_more, bias, row * 2 * inner, of_expert, first, inner, HAS_MORE, HAS_BIAS, INTERLEAVED, COLUMNS
        )
        gate, up = _clamp(gate, up, LIMIT)
        value = gate * _sigmoid(gate, SLOPE, CUBIC) * (up + SHIFT) * scale
        tl.store(out + row * (inner + tail) + column, value.to(out.dtype.element_ty), mask=column < inner)


@triton.jit
def _backward_kernel(
    gradient,
    gradient_more,
    u,
    u_more,
    bias,
    experts,
    weight,
    stop,
    u_grad,
    weight_grad,
    out,
    HAS_GRADIENT_MORE: tl.constexpr,
    HAS_MORE: tl.constexpr,
    HAS_STOP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SLOPE: tl.constexpr,
    CUBIC: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    tail: tl.constexpr,
    inner: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if HAS_STOP:  # noqa: SIM102 of constants and then of values
        if row >= tl.load(stop):
            return
    of_expert = row
    if HAS_BIAS:
        of_expert = tl.load(experts + row).to(tl.int64) * 2 * inner
    scale = tl.load(weight + row).to(tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, inner, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < inner
        unclamped, up_unclamped = _load_both(  # pyright: ignore[reportGeneralTypeIssues]
            u, u_more, bias, row * 2 * inner, of_expert, first, inner, HAS_MORE, HAS_BIAS, INTERLEAVED, COLUMNS
        )
        gate, up = _clamp(unclamped, up_unclamped, LIMIT)
        up += SHIFT
        of_out = load_with_more(gradient, gradient_more, row * inner + column, inside, HAS_GRADIENT_MORE)
        sigmoid = _sigmoid(gate, SLOPE, CUBIC)
        act = gate * sigmoid
        weighted = of_out * scale
        total += of_out * act * up
        slope = gate * SLOPE
        if CUBIC != 0.0:
            slope += 3 * CUBIC * gate * gate * gate
        of_gate = weighted * up * sigmoid * (1 + slope * (1 - sigmoid))
        of_up = weighted * act
        if LIMIT is not None:
            of_gate = tl.where(unclamped <= LIMIT, of_gate, 0.0)
            of_up = tl.where(tl.abs(up_unclamped) <= LIMIT, of_up, 0.0)
        of_u = u_grad + row * (2 * inner + tail)
        if INTERLEAVED:
            at = 2 * first + tl.arange(0, 2 * COLUMNS)
            tl.store(of_u + at, tl.interleave(of_gate, of_up).to(u_grad.dtype.element_ty), mask=at < 2 * inner)
        else:
            tl.store(of_u + column, of_gate.to(u_grad.dtype.element_ty), mask=inside)
            tl.store(of_u + inner + column, of_up.to(u_grad.dtype.element_ty), mask=inside)
        tl.store(out + row * inner + column, (act * up * scale).to(out.dtype.element_ty), mask=inside)
    tl.store(weight_grad + row, tl.sum(total, 0).to(weight_grad.dtype.element_ty))
