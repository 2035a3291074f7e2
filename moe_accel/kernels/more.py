"""A second part of what a kernel reads, added where it is read: in fp32, before anything is rounded. And room behind
what it writes.

What a low-rank adapter contributes comes apart from what it is added to: in bf16 it would be rounded away wherever it
is smaller than half a unit in the other's last place.
"""

import torch
from torch import Tensor

from moe_accel.kernels.device import launch, tl, triton, use_triton


def more_or(more: Tensor | None, instead: Tensor) -> Tensor:
    """The second part as a kernel takes it; any tensor, which is not read, where there is none."""
    return instead if more is None else more.contiguous()


def stop_or(stop: Tensor | None, instead: Tensor) -> Tensor:
    """Where the rows end that hold anything, as a kernel takes it; any tensor, not read, where all of them do."""
    return instead if stop is None else stop


def with_more(values: Tensor, more: Tensor | None, exact: torch.dtype) -> Tensor:
    """The definition of `load_with_more`: values + more in `exact`."""
    return values.to(exact) if more is None else values.to(exact) + more.to(exact)


def with_tail(rows: Tensor, tail: int) -> Tensor:
    """rows [P,C] -> [P,C+tail]: room for more columns, which hold nothing yet."""
    return torch.cat([rows, rows.new_empty(len(rows), tail)], 1) if tail else rows


def clear_behind(rows: Tensor, stop: Tensor, count: int) -> None:
    """Zero so many of the rows [P,C] that are behind the place `stop` [1]."""
    if not use_triton(rows):
        rows[int(stop) :][:count].zero_()
        return
    width = rows.shape[1]
    launch(_clear_kernel, (count,), rows, stop, len(rows), width=width, COLUMNS=1024)


@triton.jit(do_not_specialize=["num_rows"])
def _clear_kernel(rows, stop, num_rows, width: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.load(stop).to(tl.int64) + tl.program_id(0)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        zeros = tl.zeros((COLUMNS,), rows.dtype.element_ty)
        tl.store(rows + row * width + column, zeros, mask=(column < width) & (row < num_rows))


@triton.jit
def load_with_more(values, more, at, inside, HAS_MORE: tl.constexpr):
    """values + more at these places in fp32; zeros outside."""
    found = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_MORE:
        found += tl.load(more + at, mask=inside, other=0.0).to(tl.float32)
    return found
