"""A second part of what a kernel reads, added where it is read: in fp32, before anything is rounded. And room behind
what it writes.

What a low-rank adapter contributes comes apart from what it is added to: in bf16 it would be rounded away wherever it
is smaller than half a unit in the other's last place.
"""

import torch
from torch import Tensor

from moe_accel.kernels.device import tl, triton


def more_or(more: Tensor | None, instead: Tensor) -> Tensor:
    """The second part as a kernel takes it; any tensor, which is not read, where there is none."""
    return instead if more is None else more.contiguous()


def with_more(values: Tensor, more: Tensor | None, exact: torch.dtype) -> Tensor:
    """The definition of `load_with_more`: values + more in `exact`."""
    return values.to(exact) if more is None else values.to(exact) + more.to(exact)


def with_tail(rows: Tensor, tail: int) -> Tensor:
    """rows [P,C] -> [P,C+tail]: room for more columns, which hold nothing yet."""
    return torch.cat([rows, rows.new_empty(len(rows), tail)], 1) if tail else rows


@triton.jit
def load_with_more(values, more, at, inside, HAS_MORE: tl.constexpr):
    """values + more at these places in fp32; zeros outside."""
    found = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_MORE:
        found += tl.load(more + at, mask=inside, other=0.0).to(tl.float32)
    return found
