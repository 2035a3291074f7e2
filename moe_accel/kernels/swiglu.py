"""SwiGLU and routing weight in one pass over the first projection's output, and their backward in another.

forward    a = silu(gate) * up * weight                     reads u [P,2I] and weight [P], writes a [P,I]
backward   from the gradient of a: those of gate and up, of weight (summed over I in fp32), and a once more, so that the
           second projection's input need not be kept between forward and backward

silu(g) = g * sigmoid(g); its derivative is sigmoid(g) * (1 + g * (1 - sigmoid(g))). Shazeer, "GLU Variants Improve
Transformer" (2020). All arithmetic is in fp32, each result is rounded once; native rounds after every operation.

A second part of u, and of the gradient, is added where it is read: what a low-rank adapter contributes comes apart,
because added to u in bf16 it would be rounded away wherever it is smaller than half a unit in u's last place.

Sizes: P rows, I inner; u holds gate [:, :I] and up [:, I:].
"""

import torch
from torch import Tensor

from moe_accel.kernels.device import launch, tl, triton, use_triton
from moe_accel.kernels.more import load_with_more, more_or, with_more

COLUMNS = 1024  # of a tile


def swiglu(u: Tensor, weight: Tensor, u_more: Tensor | None = None) -> Tensor:
    """`silu(gate) * up * weight` of u + u_more: u [P,2I], weight [P], u_more [P,2I] -> [P,I] in the dtype of u."""
    if not use_triton(u):
        return swiglu_torch(u, weight, u_more)
    num_rows, inner = u.shape[0], u.shape[1] // 2
    out = u.new_empty(num_rows, inner)
    tensors = u.contiguous(), more_or(u_more, u), weight.contiguous(), out
    launch(_forward_kernel, (num_rows,), *tensors, HAS_MORE=u_more is not None, inner=inner, COLUMNS=COLUMNS)
    return out


def swiglu_backward(
    gradient: Tensor, u: Tensor, weight: Tensor, gradient_more: Tensor | None = None, u_more: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of `swiglu`, and its output again.

    Args:
        gradient: [P,I], of the output.
        u: [P,2I], as in forward.
        weight: [P], as in forward.
        gradient_more: [P,I], what is added to the gradient.
        u_more: [P,2I], as in forward.

    Returns:
        gradient of u [P,2I] in its dtype, gradient of weight [P] in its dtype, and `swiglu(u, weight, u_more)` [P,I].
    """
    if not use_triton(u):
        return swiglu_backward_torch(gradient, u, weight, gradient_more, u_more)
    num_rows, inner = gradient.shape
    gradient, u, weight = gradient.contiguous(), u.contiguous(), weight.contiguous()
    u_grad, weight_grad, out = torch.empty_like(u), torch.empty_like(weight), torch.empty_like(gradient)
    tensors = gradient, more_or(gradient_more, gradient), u, more_or(u_more, u), weight, u_grad, weight_grad, out
    has = {"HAS_GRADIENT_MORE": gradient_more is not None, "HAS_MORE": u_more is not None}
    launch(_backward_kernel, (num_rows,), *tensors, **has, inner=inner, COLUMNS=COLUMNS)
    return u_grad, weight_grad, out


def swiglu_torch(u: Tensor, weight: Tensor, u_more: Tensor | None = None) -> Tensor:
    """The definition of `swiglu`."""
    exact = torch.promote_types(u.dtype, torch.float32)
    gate, up = with_more(u, u_more, exact).chunk(2, 1)
    return (gate * gate.sigmoid() * up * weight.to(exact)[:, None]).to(u.dtype)


def swiglu_backward_torch(
    gradient: Tensor, u: Tensor, weight: Tensor, gradient_more: Tensor | None = None, u_more: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of `swiglu_backward`."""
    exact = torch.promote_types(u.dtype, torch.float32)
    (gate, up), scale = with_more(u, u_more, exact).chunk(2, 1), weight.to(exact)[:, None]
    gradient = with_more(gradient, gradient_more, exact)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    weighted = gradient * scale
    gate_grad = weighted * up * sigmoid * (1 + gate * (1 - sigmoid))
    u_grad = torch.cat([gate_grad, weighted * silu], 1).to(u.dtype)
    return u_grad, (gradient * silu * up).sum(1).to(weight.dtype), (silu * up * scale).to(u.dtype)


@triton.jit
def _forward_kernel(u, u_more, weight, out, HAS_MORE: tl.constexpr, inner: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(weight + row).to(tl.float32)
    for first in range(0, inner, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < inner
        gate = load_with_more(u, u_more, row * 2 * inner + column, inside, HAS_MORE)
        up = load_with_more(u, u_more, row * 2 * inner + inner + column, inside, HAS_MORE)
        value = gate * tl.sigmoid(gate) * up * scale
        tl.store(out + row * inner + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    gradient,
    gradient_more,
    u,
    u_more,
    weight,
    u_grad,
    weight_grad,
    out,
    HAS_GRADIENT_MORE: tl.constexpr,
    HAS_MORE: tl.constexpr,
    inner: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(weight + row).to(tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, inner, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < inner
        gate = load_with_more(u, u_more, row * 2 * inner + column, inside, HAS_MORE)
        up = load_with_more(u, u_more, row * 2 * inner + inner + column, inside, HAS_MORE)
        of_out = load_with_more(gradient, gradient_more, row * inner + column, inside, HAS_GRADIENT_MORE)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        weighted = of_out * scale
        total += of_out * silu * up
        of_gate = weighted * up * sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(u_grad + row * 2 * inner + column, of_gate.to(u_grad.dtype.element_ty), mask=inside)
        tl.store(u_grad + row * 2 * inner + inner + column, (weighted * silu).to(u_grad.dtype.element_ty), mask=inside)
        tl.store(out + row * inner + column, (silu * up * scale).to(out.dtype.element_ty), mask=inside)
    tl.store(weight_grad + row, tl.sum(total, 0).to(weight_grad.dtype.element_ty))
