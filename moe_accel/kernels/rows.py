"""Copying rows to several places, and summing them back: the two halves of dispatch and of sorting by expert.

`gather_rows` and `sum_rows` are each other's transpose, so each is the other's backward. Written with `x[rows]` alone,
autograd would scatter with atomics (`index_put`, 1.46 ms of a 19.5 ms block on an H100, and not deterministic). Here
the sum is one segmented reduction, which accumulates bf16 in fp32: a Triton kernel on a GPU, `embedding_bag` elsewhere.

Sizes: N source rows, P copies, H columns.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_accel.kernels.device import launch, tl, triton, use_triton
from moe_accel.kernels.more import stop_or, with_tail


class RowMap(NamedTuple):
    """Which source row each copy comes from, and the same by source row. On the rows' device; all but the last int64.

    Attributes:
        sources: [P] source row of each copy.
        copies: [P] the copies, ordered by source row.
        starts: [N] where each source row's copies begin in `copies`.
        places: the same once more for who else moves rows (`te_rows.py`); None where nobody asked for it.
        stop: [1] integer, how many copies there are, where there is room for more: what is [P] holds nothing of worth
            behind them, and neither do rows that are gathered. None: P.
    """

    sources: Tensor
    copies: Tensor
    starts: Tensor
    places: Tensor | None = None
    stop: Tensor | None = None


def gather_rows(x: Tensor, rows: RowMap) -> Tensor:
    """Copy rows: x [N,H] -> [P,H], `x[rows.sources]`. Differentiable once, in x."""
    return _Rows.apply(x, *rows[:3], True)  # pyright: ignore[reportReturnType]


def sum_rows(y: Tensor, rows: RowMap, y_more: Tensor | None = None) -> Tensor:
    """Sum the copies of each source row: y [P,H] -> [N,H], zeros where a row has no copy. Differentiable once, in y.

    y_more [P,H] is added in the sum, before it is rounded.
    """
    return _Rows.apply(y, *rows[:3], False, y_more)  # pyright: ignore[reportReturnType]


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, sources: Tensor, copies: Tensor, starts: Tensor, is_gather: bool, more: Any = None
    ) -> Tensor:
        ctx.save_for_backward(sources, copies, starts)
        ctx.is_gather, ctx.has_more = is_gather, more is not None
        rows = RowMap(sources, copies, starts)
        return gather(values, rows) if is_gather else sum_copies(values, rows, more)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), rows = gradients, RowMap(*ctx.saved_tensors)
        gradient = sum_copies(gradient, rows) if ctx.is_gather else gather(gradient, rows)
        return gradient, None, None, None, None, gradient if ctx.has_more else None


def gather(values: Tensor, rows: RowMap, tail: int = 0) -> Tensor:
    """values [N,H] -> [P,H+tail], `values[rows.sources]` and room for more. Not differentiable: see `gather_rows`."""
    if use_triton(values) and len(rows.sources):
        return gather_triton(_with_whole_rows(values), rows, tail)
    copied = values.index_select(0, rows.sources)
    return with_tail(copied, tail)


def sum_copies(values: Tensor, rows: RowMap, more: Tensor | None = None) -> Tensor:
    """values [P,H] -> [N,H], as `sum_torch`. Not differentiable: see `sum_rows`."""
    if use_triton(values):
        return sum_triton(_with_whole_rows(values), rows.copies, rows.starts, more, rows.stop)
    copies = rows.copies if rows.stop is None else rows.copies[: int(rows.stop)]
    return sum_torch(values.contiguous(), copies, rows.starts, more)


def _with_whole_rows(values: Tensor) -> Tensor:
    """Rows may lie apart, as in a message; a row's values not."""
    return values if values.stride(1) == 1 and values.stride(0) >= values.shape[1] else values.contiguous()


def sum_torch(values: Tensor, copies: Tensor, starts: Tensor, more: Tensor | None = None) -> Tensor:
    """The definition: values [P,H] -> [N,H], row n the sum of `values[copies[starts[n]:starts[n + 1]]]`.

    more [P,H] is summed likewise; the two sums are added before they are rounded, 16-bit values in fp32.
    """
    if starts.numel() == 0:  # embedding_bag insists on one bag at least
        return values.new_zeros(0, values.shape[1])
    exact = torch.promote_types(values.dtype, torch.float32)
    if more is not None or (exact != values.dtype and not values.is_cuda):  # the CPU's embedding_bag sums in bf16
        whole = values.to(exact) if more is None else values.to(exact) + more.to(exact)
        return sum_torch(whole, copies, starts).to(values.dtype)
    return torch.embedding_bag(values, copies, starts, mode=0)[0]


COLUMNS, COPIES = 1024, 8  # of a tile; 8 copies of 16,384 rows of 2048, one H100: see tests/gpu/results


def sum_triton(
    values: Tensor, copies: Tensor, starts: Tensor, more: Tensor | None = None, stop: Tensor | None = None
) -> Tensor:
    """`sum_torch` as a kernel: each program sums the copies of one row, in their order, in fp32."""
    (num_pairs, width), num_rows = values.shape, starts.numel()
    out = values.new_empty(num_rows, width)
    grid = num_rows, -(-width // COLUMNS)
    tensors = values, values if more is None else more.contiguous(), copies, starts, stop_or(stop, starts), out
    constants = {"HAS_MORE": more is not None, "HAS_STOP": stop is not None, "COPIES": COPIES, "COLUMNS": COLUMNS}
    launch(_sum_kernel, grid, *tensors, num_rows, num_pairs, width, values.stride(0), **constants)
    return out


def gather_triton(values: Tensor, rows: RowMap, tail: int = 0) -> Tensor:
    """`gather` as a kernel: each program reads one source row once and writes all its copies.

    65,536 copies of 8192 rows of 2048 in bf16: 0.115 ms, `index_select` 0.165 (one H100, 2026-11-26).
    """
    (num_rows, width), num_pairs = values.shape, len(rows.sources)
    out = values.new_empty(num_pairs, width + tail)
    constants = {"HAS_STOP": rows.stop is not None, "COPIES": COPIES, "COLUMNS": COLUMNS}
    tensors = values, rows.copies, rows.starts, stop_or(rows.stop, rows.starts), out
    launch(
        _gather_kernel,
        (num_rows, -(-width // COLUMNS)),
        *tensors,
        num_rows,
        num_pairs,
        width,
        values.stride(0),
        width + tail,
        **constants,
    )
    return out


@triton.jit
def _span(starts, stop, row, num_rows, num_pairs, HAS_STOP: tl.constexpr):
    """Where a row's copies begin and end."""
    if HAS_STOP:
        num_pairs = tl.load(stop)
    start = tl.load(starts + row)
    end = tl.load(starts + row + 1, mask=row + 1 < num_rows, other=num_pairs)
    return start, end


@triton.jit(do_not_specialize=["num_rows", "num_pairs"])
def _gather_kernel(
    values,
    copies,
    starts,
    stop,
    out,
    num_rows,
    num_pairs,
    width,
    step,
    out_width,
    HAS_STOP: tl.constexpr,
    COPIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    value = tl.load(values + row * step + columns, mask=inside)
    start, end = _span(starts, stop, row, num_rows, num_pairs, HAS_STOP)  # pyright: ignore[reportGeneralTypeIssues]
    while start < end:
        at = start + tl.arange(0, COPIES)
        copy = tl.load(copies + at, mask=at < end, other=0)
        place = copy[:, None] * out_width + columns[None, :]
        tile = tl.broadcast_to(value[None, :], (COPIES, COLUMNS))
        tl.store(out + place, tile, mask=(at < end)[:, None] & inside[None, :])
        start += COPIES


@triton.jit(do_not_specialize=["num_rows", "num_pairs"])
def _sum_kernel(
    values,
    more,
    copies,
    starts,
    stop,
    out,
    num_rows,
    num_pairs,
    width,
    step,
    HAS_MORE: tl.constexpr,
    HAS_STOP: tl.constexpr,
    COPIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    start, end = _span(starts, stop, row, num_rows, num_pairs, HAS_STOP)  # pyright: ignore[reportGeneralTypeIssues]
    total = tl.zeros((COLUMNS,), tl.float32)
    while start < end:
        at = start + tl.arange(0, COPIES)
        copy = tl.load(copies + at, mask=at < end, other=0)
        within = (at < end)[:, None] & inside[None, :]
        tile = tl.load(values + copy[:, None] * step + columns[None, :], mask=within, other=0.0).to(tl.float32)
        if HAS_MORE:
            place = copy[:, None] * width + columns[None, :]
            tile += tl.load(more + place, mask=within, other=0.0).to(tl.float32)
        total += tl.sum(tile, 0)
        start += COPIES
    tl.store(out + row * width + columns, total.to(out.dtype.element_ty), mask=inside)
