"""relu(u)^2 and routing weight in one pass over the first projection's output, and their backward in another.

For experts without a gate. The functions take and return what those of `glu.py` do, with u [P,I] in place of
[P,2I]: arithmetic in fp32, each result rounded once, a second part of u and of the gradient added where it is read.
The derivative of relu(u)^2 is 2 * relu(u). So et al., "Primer" (2021).

Sizes: P rows, I inner.
"""

import torch
from torch import Tensor

from moe_accel.kernels.device import launch, tl, triton, use_triton
from moe_accel.kernels.more import load_with_more, more_or, stop_or, with_more, with_tail

COLUMNS = 1024  # of a tile


def squared_relu(
    u: Tensor, weight: Tensor, u_more: Tensor | None = None, tail: int = 0, stop: Tensor | None = None
) -> Tensor:
    """`relu(u + u_more)^2 * weight`: u [P,I], weight [P], u_more [P,I] -> [P,I+tail] in the dtype of u.

    The last `tail` columns are room for more: not written. `stop`: [1], see `rows.RowMap`.
    """
    if not use_triton(u):
        return with_tail(squared_relu_torch(u, weight, u_more), tail)
    num_rows, inner = u.shape
    out = u.new_empty(num_rows, inner + tail)
    tensors = u.contiguous(), more_or(u_more, u), weight.contiguous(), stop_or(stop, u), out
    constants = {
        "HAS_MORE": u_more is not None,
        "HAS_STOP": stop is not None,
        "tail": tail,
        "inner": inner,
        "COLUMNS": COLUMNS,
    }
    launch(_forward_kernel, (num_rows,), *tensors, **constants)
    return out


def squared_relu_backward(
    gradient: Tensor,
    u: Tensor,
    weight: Tensor,
    gradient_more: Tensor | None = None,
    u_more: Tensor | None = None,
    tail: int = 0,
    stop: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of `squared_relu`, and its output again.

    Args:
        gradient: [P,I], of the output.
        u: [P,I], as in forward.
        weight: [P], as in forward.
        gradient_more: [P,I], what is added to the gradient.
        u_more: [P,I], as in forward.
        tail: columns of room behind the gradient of u, not written.
        stop: as in forward.

    Returns:
        gradient of u [P,I+tail] in its dtype, that of weight [P] in its dtype, and `squared_relu(u, weight, u_more)`.
    """
    if not use_triton(u):
        u_grad, weight_grad, out = squared_relu_backward_torch(gradient, u, weight, gradient_more, u_more)
        return with_tail(u_grad, tail), weight_grad, out
    num_rows, inner = gradient.shape
    gradient, u, weight = gradient.contiguous(), u.contiguous(), weight.contiguous()
    u_grad, weight_grad, out = u.new_empty(num_rows, inner + tail), torch.empty_like(weight), torch.empty_like(gradient)
    of_u = u, more_or(u_more, u), weight, stop_or(stop, u)
    tensors = gradient, more_or(gradient_more, gradient), *of_u, u_grad, weight_grad, out
    has = {"HAS_GRADIENT_MORE": gradient_more is not None, "HAS_MORE": u_more is not None}
    has |= {"HAS_STOP": stop is not None}
    launch(_backward_kernel, (num_rows,), *tensors, **has, tail=tail, inner=inner, COLUMNS=COLUMNS)
    return u_grad, weight_grad, out


def squared_relu_torch(u: Tensor, weight: Tensor, u_more: Tensor | None = None) -> Tensor:
    """The definition of `squared_relu`."""
    exact = torch.promote_types(u.dtype, torch.float32)
    return (with_more(u, u_more, exact).relu().square() * weight.to(exact)[:, None]).to(u.dtype)


def squared_relu_backward_torch(
    gradient: Tensor, u: Tensor, weight: Tensor, gradient_more: Tensor | None = None, u_more: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of `squared_relu_backward`."""
    exact = torch.promote_types(u.dtype, torch.float32)
    positive, scale = with_more(u, u_more, exact).relu(), weight.to(exact)[:, None]
    gradient = with_more(gradient, gradient_more, exact)
    square = positive.square()
    u_grad = (gradient * scale * 2 * positive).to(u.dtype)
    return u_grad, (gradient * square).sum(1).to(weight.dtype), (square * scale).to(u.dtype)


@triton.jit
def _forward_kernel(
    u,
    u_more,
    weight,
    stop,
    out,
    HAS_MORE: tl.constexpr,
    HAS_STOP: tl.constexpr,
    tail: tl.constexpr,
    inner: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if HAS_STOP:  # noqa: SIM102 of constants and then of values
        if row >= tl.load(stop):
            return
    scale = tl.load(weight + row).to(tl.float32)
    for first in range(0, inner, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < inner
        value = load_with_more(u, u_more, row * inner + column, inside, HAS_MORE)
        positive = tl.where(value < 0, 0.0, value)  # keeps a NaN, as relu does
        tl.store(
            out + row * (inner + tail) + column, (positive * positive * scale).to(out.dtype.element_ty), mask=inside
        )


@triton.jit
def _backward_kernel(
    gradient,
    gradient_more,
    u,
    u_more,
    weight,
    stop,
    u_grad,
    weight_grad,
    out,
    HAS_GRADIENT_MORE: tl.constexpr,
    HAS_MORE: tl.constexpr,
    HAS_STOP: tl.constexpr,
    tail: tl.constexpr,
    inner: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if HAS_STOP:  # noqa: SIM102 of constants and then of values
        if row >= tl.load(stop):
            return
    scale = tl.load(weight + row).to(tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, inner, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < inner
        at = row * inner + column
        value = load_with_more(u, u_more, at, inside, HAS_MORE)
        of_out = load_with_more(gradient, gradient_more, at, inside, HAS_GRADIENT_MORE)
        positive = tl.where(value < 0, 0.0, value)
        square = positive * positive
        total += of_out * square
        of_u = (of_out * scale * 2 * positive).to(u_grad.dtype.element_ty)
        tl.store(u_grad + row * (inner + tail) + column, of_u, mask=inside)
        tl.store(out + at, (square * scale).to(out.dtype.element_ty), mask=inside)
    tl.store(weight_grad + row, tl.sum(total, 0).to(weight_grad.dtype.element_ty))
