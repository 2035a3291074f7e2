"""RMSNorm in one pass each way: y = x / sqrt(mean(x^2) + eps) * (offset + weight), all of it in fp32, rounded once.

backward   with n = x * r, r = 1 / sqrt(mean(x^2) + eps) and g = dy * (offset + weight):
           dx = r * (g - n * mean(g * n)), dweight = sum over rows of dy * n
Between them r is kept, and x, which the layer before keeps anyway. Each program of backward walks over its own rows
and sums dweight of them in fp32; a second kernel adds the programs' sums, each in the same order: the same bits every
time.
Zhang & Sennrich, "Root Mean Square Layer Normalization" (2019).

Both kernels wait for memory: what counts is how many bytes are under way. Forward has a program for each tile, and many
of those on a multiprocessor at once. Backward has as many programs as there is room for, 512 threads of 16 values in
wide rows; while a row is computed the next two are already on their way into shared memory (`STAGES`). `tiles` has the
fastest of many.

Sizes: N rows, H width, P programs.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_accel.kernels.device import launch, num_multiprocessors, tl, triton, use_triton

SUMMED_ROWS, SUMMED_COLUMNS = 512, 8
"""Of the tile in which the programs' sums are added: 32 bytes of a row are the least that memory gives."""


class Tile(NamedTuple):
    """How a kernel walks over rows.

    Attributes:
        num_rows: read at once.
        num_warps: of a program.
        programs: of each multiprocessor, all of them there at once if registers allow; None: one for each tile.
        stages: tiles under way at once, the one that is computed among them; 1: each is waited for.
    """

    num_rows: int
    num_warps: int
    programs: int | None
    stages: int


@cache
def tiles(width: int) -> tuple[Tile, Tile]:
    """Of forward and backward, for rows of H values: the fastest that `tests/gpu/norm_speed.py` found on an H200."""
    columns = padded(width)
    if columns < 1024:
        rows = max(1, 2048 // columns)
        return Tile(rows, 4, None, 1), Tile(rows, 4, 7, 1)
    num_warps = min(32, columns // 512)
    stages = 3 if columns <= 8192 else 1  # wider ones in fp32 have no room in shared memory
    return Tile(1, max(4, columns // 2048), None, 1), Tile(1, num_warps, max(1, 16 // num_warps), stages)


def padded(width: int) -> int:
    """The columns of a tile: a power of two."""
    return 1 << (width - 1).bit_length()


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Normalise the last dimension: x [...,H], weight [H] -> [...,H] in the dtype of x. Differentiable once."""
    return _RMSNorm.apply(x, weight, eps, offset)  # pyright: ignore[reportReturnType]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        x = x.contiguous()
        y, inverse = (normalise if use_triton(x) else normalise_torch)(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        form = normalise_backward if use_triton(x) else normalise_backward_torch
        x_grad, weight_grad = form(gradients[0], x, weight, inverse, ctx.offset, ctx.needs_input_grad[1])
        return x_grad, weight_grad, None, None


def normalise_torch(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """The definition: x [...,H] -> normalised [...,H], and r [...,1] in fp32 at least."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = (exact.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (exact * inverse * (weight.to(exact.dtype) + offset)).to(x.dtype), inverse


def normalise_backward_torch(
    gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, offset: float, of_weight: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The definition of the gradients of x [...,H] and, where it is wanted, of weight [H]."""
    n, gradient = x.to(inverse.dtype) * inverse, gradient.to(inverse.dtype)
    g = gradient * (weight.to(inverse.dtype) + offset)
    x_grad = inverse * (g - n * (g * n).mean(-1, keepdim=True))
    weight_grad = (gradient * n).sum_to_size(weight.shape).to(weight.dtype) if of_weight else None
    return x_grad.to(x.dtype), weight_grad


def normalise(x: Tensor, weight: Tensor, eps: float, offset: float, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """`normalise_torch` as a kernel, of x [...,H] without gaps; r is [N,1]."""
    width = x.shape[-1]
    num_rows, tile = x.numel() // width, tile or tiles(width)[0]
    y, inverse = torch.empty_like(x), x.new_empty(num_rows, 1, dtype=torch.float32)
    grid = (_num_programs(tile, num_rows, x.device),)
    sizes = _constants(tile, width)
    launch(_forward_kernel, grid, x, weight.contiguous(), y, inverse, num_rows, eps=eps, offset=offset, **sizes)
    return y, inverse


def normalise_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    inverse: Tensor,
    offset: float,
    of_weight: bool = True,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`normalise_backward_torch` as a kernel, of x [...,H] without gaps and r [N,1]."""
    width = x.shape[-1]
    num_rows, tile = x.numel() // width, tile or tiles(width)[1]
    num_programs = _num_programs(tile, num_rows, x.device)
    x_grad = torch.empty_like(x)
    sums = x.new_empty(num_programs, width, dtype=torch.float32) if of_weight else inverse
    tensors = gradient.contiguous(), x, weight.contiguous(), inverse, x_grad, sums
    sizes = _constants(tile, width)
    launch(_backward_kernel, (num_programs,), *tensors, num_rows, OF_WEIGHT=of_weight, offset=offset, **sizes)
    return x_grad, sum_rows(sums, weight.dtype) if of_weight else None


def sum_rows(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """sums [P,H] in fp32 -> [H], always in the same order."""
    num_rows, width = sums.shape
    out = sums.new_empty(width, dtype=dtype)
    sizes = {"width": width, "ROWS": SUMMED_ROWS, "COLUMNS": SUMMED_COLUMNS, "num_warps": 8}
    launch(_sum_kernel, (-(-width // SUMMED_COLUMNS),), sums, out, num_rows, **sizes)
    return out


def _num_programs(tile: Tile, num_rows: int, device: torch.device) -> int:
    num_tiles = -(-num_rows // tile.num_rows)
    return num_tiles if tile.programs is None else min(num_tiles, tile.programs * num_multiprocessors(device))


@cache
def _constants(tile: Tile, width: int) -> dict[str, int]:
    sizes = {"width": width, "ROWS": tile.num_rows, "COLUMNS": padded(width), "STAGES": tile.stages}
    return sizes | {"num_warps": tile.num_warps}


@triton.jit(do_not_specialize=["num_rows"])
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
    STAGES: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)
    within = column < width
    scale = tl.load(weight + column, mask=within, other=0.0)
    first, end = tl.program_id(0), tl.cdiv(num_rows, ROWS)
    for tile in tl.range(first, end, tl.num_programs(0), num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & within[None, :]
        at = row[:, None].to(tl.int64) * width + column[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(value * value, 1) / width + eps)
        out = value * r[:, None] * (scale.to(tl.float32) + offset)[None, :]
        tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)
        tl.store(inverse + row, r, mask=row < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    gradient,
    x,
    weight,
    inverse,
    x_grad,
    sums,
    num_rows,
    OF_WEIGHT: tl.constexpr,
    offset: tl.constexpr,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of x, and `sums` [P,H] of that of weight where it is wanted."""
    program = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    within = column < width
    scale = tl.load(weight + column, mask=within, other=0.0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in tl.range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & within[None, :]
        at = row[:, None].to(tl.int64) * width + column[None, :]
        of_y = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(inverse + row, mask=row < num_rows, other=0.0)[:, None]
        n = value * r
        g = of_y * (scale.to(tl.float32) + offset)[None, :]
        mean = tl.sum(g * n, 1) / width
        tl.store(x_grad + at, (r * (g - n * mean[:, None])).to(x_grad.dtype.element_ty), mask=inside)
        if OF_WEIGHT:
            total += of_y * n
    if OF_WEIGHT:
        tl.store(sums + program.to(tl.int64) * width + column, tl.sum(total, 0), mask=within)


@triton.jit(do_not_specialize=["num_rows"])
def _sum_kernel(sums, out, num_rows, width: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum over the rows of `sums` [P,H] -> out [H]."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    within = column < width
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, num_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & within[None, :]
        total += tl.load(sums + row[:, None] * width + column[None, :], mask=inside, other=0.0)
    tl.store(out + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=within)
