"""Rows with what belongs to them, in one message: [ hidden states | routing weights | choices | room ].

One exchange instead of three: each costs the host a tenth of a millisecond and the device its start, whatever it
carries. The tail is bytes, whatever the dtypes, and what receives it reads hidden states in their place, row by row.

Sizes: S rows, N tokens, H hidden, K top-k.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_accel.kernels.message import can_prepare, write_triton
from moe_accel.kernels.more import with_tail
from moe_accel.kernels.rows import RowMap, gather

INT32_BYTES = 4
COLUMNS = 16
"""A row is a multiple of these: only if 16 divides its number of values does Triton read 16 bytes at once."""


@dataclass(frozen=True)
class Layout:
    """Of a row.

    Attributes:
        hidden: H.
        top_k: K.
        dtype: of hidden states, and of the message.
        weights_dtype: of routing weights.
        has_choices: whether K choices come behind the weights.
    """

    hidden: int
    top_k: int
    dtype: torch.dtype
    weights_dtype: torch.dtype
    has_choices: bool

    @property
    def first(self) -> int:
        """The byte where weights begin."""
        return self.hidden * self.dtype.itemsize

    @property
    def weights_bytes(self) -> int:
        """Of a row."""
        return self.top_k * self.weights_dtype.itemsize

    @property
    def tail(self) -> int:
        """Columns behind the hidden states, in their dtype."""
        used = self.weights_bytes + self.has_choices * self.top_k * INT32_BYTES
        columns = self.hidden + -(-used // self.dtype.itemsize)
        return -(-columns // COLUMNS) * COLUMNS - self.hidden


def pack(
    x: Tensor, weights: Tensor, choices: Tensor | None, rows: RowMap, ranks: Tensor, num_local_experts: int
) -> tuple[Tensor, Layout]:
    """What is sent of tokens: x [N,H], weights [N,K] and choices [N,K], counted over all ranks, or none.

    Args:
        rows: which token each of the S rows is.
        ranks: [S], where each row goes; -1 replaces the choices that are not of that rank.
        num_local_experts: of each rank.

    Returns:
        [S,W] in the dtype of x, and how it is laid out.
    """
    layout = Layout(x.shape[1], weights.shape[1], x.dtype, weights.dtype, choices is not None)
    packed = gather(x, rows, layout.tail)
    where = rows.sources, ranks, num_local_experts
    whole = layout.first % 4 == 0 and layout.weights_bytes % 4 == 0
    if can_prepare(packed) and whole:
        write_triton(packed, layout.first, weights, choices, *where)
    else:
        write_torch(packed, layout, weights, choices, *where)
    return packed, layout


def write_torch(
    packed: Tensor,
    layout: Layout,
    weights: Tensor,
    choices: Tensor | None,
    sources: Tensor,
    ranks: Tensor,
    num_local_experts: int,
) -> None:
    """The definition of `kernels.message.write_triton`."""
    tail = _bytes(packed)[:, layout.first :]
    tail[:, : layout.weights_bytes] = _bytes(weights.index_select(0, sources))
    if choices is not None:
        local = choices.index_select(0, sources) - (ranks.long() * num_local_experts)[:, None]
        local = local.where((local >= 0) & (local < num_local_experts), -1).to(torch.int32)
        tail[:, layout.weights_bytes :][:, : layout.top_k * INT32_BYTES] = _bytes(local)


def pack_gradients(x_grad: Tensor, weights_grad: Tensor) -> tuple[Tensor, Layout]:
    """What is sent back: gradients of the rows received, [R,H], and of their weights, [R,K]."""
    layout = Layout(x_grad.shape[1], weights_grad.shape[1], x_grad.dtype, weights_grad.dtype, False)
    packed = with_tail(x_grad, layout.tail)
    _bytes(packed)[:, layout.first :][:, : layout.weights_bytes] = _bytes(weights_grad)
    return packed, layout


def unpack(packed: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states [R,H], a view; weights [R,K]; choices [R,K] int32, or None."""
    tail = _bytes(packed)[:, layout.first :]
    weights = _own(tail[:, : layout.weights_bytes]).view(layout.weights_dtype)
    choices = None
    if layout.has_choices:
        choices = _own(tail[:, layout.weights_bytes :][:, : layout.top_k * INT32_BYTES]).view(torch.int32)
    return packed[:, : layout.hidden], weights, choices


def _bytes(rows: Tensor) -> Tensor:
    """The same memory by byte. Flat in between: strides of what has one row, or none, may be anything."""
    return rows.contiguous().reshape(-1).view(torch.uint8).view(len(rows), rows.shape[1] * rows.element_size())


def _own(part: Tensor) -> Tensor:
    """In memory of its own, which begins where any dtype may."""
    return part.clone(memory_format=torch.contiguous_format)
