"""RMSNorm in one pass each way: y = x / sqrt(mean(x^2) + eps) * (offset + weight), all of it in fp32, rounded once.

backward   with n = x * r, r = 1 / sqrt(mean(x^2) + eps) and g = dy * (offset + weight):
           dx = r * (g - n * mean(g * n)), dweight = sum over rows of dy * n
Between them r is kept, and x, which the layer before keeps anyway. Where the weight is trained, each program sums
dweight over its own rows in fp32, then one torch sum adds the programs' rows: the same bits every time. Zhang &
Sennrich, "Root Mean Square Layer Normalization" (2019).

Sizes: N rows, H width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_accel.kernels.device import launch, tl, triton, use_triton

TILE = 4096
"""Elements of a tile: whole rows, several of them where they are short."""
NUM_PROGRAMS = 1024
"""Of backward, each with its own sum over rows: about eight for every multiprocessor of an H100."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Normalise the last dimension: x [...,H], weight [H] -> [...,H] in the dtype of x. Differentiable once."""
    return _RMSNorm.apply(x, weight, eps, offset)  # pyright: ignore[reportReturnType]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y, inverse = (normalise if use_triton(rows) else normalise_torch)(rows, weight, eps, offset)
        ctx.save_for_backward(rows, weight, inverse)
        ctx.shape, ctx.offset = x.shape, offset
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, inverse = ctx.saved_tensors
        gradient = gradients[0].reshape(rows.shape)
        form = normalise_backward if use_triton(rows) else normalise_backward_torch
        x_grad, weight_grad = form(gradient, rows, weight, inverse, ctx.offset, ctx.needs_input_grad[1])
        return x_grad.view(ctx.shape), weight_grad, None, None


def normalise_torch(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """The definition: x [N,H] -> normalised [N,H], and r [N,1] in fp32 at least."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = (exact.square().mean(1, keepdim=True) + eps).rsqrt()
    return (exact * inverse * (weight.to(exact.dtype) + offset)).to(x.dtype), inverse


def normalise_backward_torch(
    gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, offset: float, needs_weight: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The definition of the gradients of x [N,H] and weight [H], which is None where nobody needs it."""
    n, gradient = x.to(inverse.dtype) * inverse, gradient.to(inverse.dtype)
    g = gradient * (weight.to(inverse.dtype) + offset)
    x_grad = inverse * (g - n * (g * n).mean(1, keepdim=True))
    return x_grad.to(x.dtype), (gradient * n).sum(0).to(weight.dtype) if needs_weight else None


def normalise(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """`normalise_torch` as a kernel."""
    num_rows, width = x.shape
    x = x.contiguous()
    y, inverse = torch.empty_like(x), x.new_empty(num_rows, 1, dtype=torch.float32)
    sizes = _tile(width)
    grid = (-(-num_rows // sizes["ROWS"]),)
    launch(_forward_kernel, grid, x, weight.contiguous(), y, inverse, num_rows, eps=eps, offset=offset, **sizes)
    return y, inverse


def normalise_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, offset: float, needs_weight: bool = True
) -> tuple[Tensor, Tensor | None]:
    """`normalise_backward_torch` as a kernel."""
    num_rows, width = x.shape
    sizes = _tile(width)
    num_programs = min(NUM_PROGRAMS, -(-num_rows // sizes["ROWS"]))
    x = x.contiguous()
    x_grad = torch.empty_like(x)
    sums = x.new_empty(num_programs, width, dtype=torch.float32) if needs_weight else inverse  # not written then
    tensors = gradient.contiguous(), x, weight.contiguous(), inverse, x_grad, sums
    constants = {"offset": offset, **sizes, "HAS_SUMS": needs_weight}
    launch(_backward_kernel, (num_programs,), *tensors, num_rows, num_programs, **constants)
    return x_grad, sums.sum(0).to(weight.dtype) if needs_weight else None


def _tile(width: int) -> dict[str, int]:
    columns = 1 << (width - 1).bit_length()
    return {"width": width, "ROWS": max(1, TILE // columns), "COLUMNS": columns}


@triton.jit
def _forward_kernel(
    x,
    weight,
    y,
    inverse,
    num_rows,
    eps: tl.constexpr,
    offset: tl.constexpr,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < num_rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + offset
    r = tl.rsqrt(tl.sum(value * value, 1) / width + eps)
    tl.store(y + at, (value * r[:, None] * scale[None, :]).to(y.dtype.element_ty), mask=inside)
    tl.store(inverse + row, r, mask=row < num_rows)


@triton.jit
def _backward_kernel(
    gradient,
    x,
    weight,
    inverse,
    x_grad,
    sums,
    num_rows,
    num_programs,
    offset: tl.constexpr,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_SUMS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + offset
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = program * ROWS
    while first < num_rows:
        row = first + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & (column < width)[None, :]
        at = row[:, None] * width + column[None, :]
        of_y = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(inverse + row, mask=row < num_rows, other=0.0)[:, None]
        n = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * r
        g = of_y * scale[None, :]
        mean = tl.sum(g * n, 1) / width
        tl.store(x_grad + at, (r * (g - n * mean[:, None])).to(x_grad.dtype.element_ty), mask=inside)
        if HAS_SUMS:
            total += of_y * n
        first += num_programs * ROWS
    if HAS_SUMS:
        tl.store(sums + program * width + column, tl.sum(total, 0), mask=column < width)
