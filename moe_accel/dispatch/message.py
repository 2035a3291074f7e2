"""Rows with what belongs to them, in one message: [ hidden states | routing weights | choices | room ].

One exchange instead of three: each costs the host a tenth of a millisecond and the device its start, whatever it
carries. The tail is bytes, whatever the dtypes, and what receives it reads hidden states in their place, row by row.

Sizes: S rows, N tokens, H hidden, K top-k.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_accel.dispatch.halves import scaled
from moe_accel.dispatch.plan import Ordered
from moe_accel.kernels.device import use_triton
from moe_accel.kernels.message import join_triton, pack_triton, sum_triton, take_triton
from moe_accel.kernels.more import with_tail
from moe_accel.kernels.rows import RowMap, gather, sum_copies, with_whole_rows

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
    def is_whole(self) -> bool:
        """Whether hidden states and weights are whole 4 bytes each: kernels read and write such."""
        return self.first % 4 == 0 and self.weights_bytes % 4 == 0

    @property
    def tail(self) -> int:
        """Columns behind the hidden states, in their dtype."""
        used = self.weights_bytes + self.has_choices * self.top_k * INT32_BYTES
        columns = self.hidden + -(-used // self.dtype.itemsize)
        return -(-columns // COLUMNS) * COLUMNS - self.hidden


def layout_of(x: Tensor, weights: Tensor, has_choices: bool) -> Layout:
    """Of a message of hidden states [R,H] with weights [R,K]."""
    return Layout(x.shape[1], weights.shape[1], x.dtype, weights.dtype, has_choices)


def packs_ahead(x: Tensor, weights: Tensor) -> bool:
    """Whether `pack` may be called before anybody on the host knows how many rows there are."""
    return use_triton(x) and layout_of(x, weights, False).is_whole


def pack(
    x: Tensor, weights: Tensor, choices: Tensor | None, ordered: Ordered, num_local_experts: int
) -> tuple[Tensor, Layout]:
    """What is sent of tokens: x [N,H], weights [N,K] and choices [N,K], counted over all ranks, or none.

    Args:
        ordered: the S rows, and whose each is: -1 replaces the choices that are not of that rank. All there are, or
            with room for more if `packs_ahead`.
        num_local_experts: of each rank.

    Returns:
        [S,W] in the dtype of x, and how it is laid out.
    """
    layout = layout_of(x, weights, choices is not None)
    rows, ranks, ends = ordered
    if packs_ahead(x, weights) and len(rows.sources):
        return pack_triton(
            with_whole_rows(x), weights, choices, rows, ends, ranks, num_local_experts, layout.tail
        ), layout
    packed = gather(x, rows, layout.tail)
    write_torch(packed, layout, weights, choices, rows.sources, ranks, num_local_experts)
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
    """What is behind the hidden states, written into packed [S,W]."""
    tail = _bytes(packed)[:, layout.first :]
    tail[:, : layout.weights_bytes] = _bytes(weights.index_select(0, sources))
    if choices is not None:
        local = choices.index_select(0, sources) - (ranks.long() * num_local_experts)[:, None]
        local = local.where((local >= 0) & (local < num_local_experts), -1).to(torch.int32)
        tail[:, layout.weights_bytes :][:, : layout.top_k * INT32_BYTES] = _bytes(local)


def pack_gradients(x_grad: Tensor, weights_grad: Tensor) -> tuple[Tensor, Layout]:
    """What is sent back: gradients of the rows received, [R,H], and of their weights, [R,K]."""
    layout = layout_of(x_grad, weights_grad, False)
    if packs_ahead(x_grad, weights_grad):
        return join_triton(with_whole_rows(x_grad), weights_grad, layout.tail), layout
    packed = with_tail(x_grad, layout.tail)
    _bytes(packed)[:, layout.first :][:, : layout.weights_bytes] = _bytes(weights_grad)
    return packed, layout


def unpack(packed: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states [R,H], a view; weights [R,K]; choices [R,K] int32, or None."""
    hidden = packed[:, : layout.hidden]
    if not (use_triton(packed) and layout.is_whole):
        return hidden, *unpack_torch(packed, layout)
    of_row = len(packed), layout.top_k
    weights = packed.new_empty(of_row, dtype=layout.weights_dtype)
    choices = packed.new_empty(of_row, dtype=torch.int32) if layout.has_choices else None
    take_triton(packed, layout.hidden, weights, choices)
    return hidden, weights, choices


def unpack_torch(packed: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """The definition of what `unpack` finds behind the hidden states."""
    tail = _bytes(packed)[:, layout.first :]
    weights = _own(tail[:, : layout.weights_bytes]).view(layout.weights_dtype)
    if not layout.has_choices:
        return weights, None
    return weights, _own(tail[:, layout.weights_bytes :][:, : layout.top_k * INT32_BYTES]).view(torch.int32)


def sum_gradients(packed: Tensor, layout: Layout, rows: RowMap, scale: float) -> tuple[Tensor, Tensor]:
    """What came back, [S,W] of `pack_gradients`, summed by token and times `scale`: gradients [N,H] and [N,K]."""
    if use_triton(packed) and layout.is_whole and layout.weights_dtype == torch.float32:
        return sum_triton(packed, layout.hidden, layout.top_k, rows, scale)
    found = (sum_copies(part, rows) for part in (packed[:, : layout.hidden], unpack(packed, layout)[1]))
    x_grad, weights_grad = (scaled(each, scale) for each in found)
    return x_grad, weights_grad


def _bytes(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.uint8)


def _own(part: Tensor) -> Tensor:
    """In memory of its own, which begins where any dtype may."""
    return part.clone(memory_format=torch.contiguous_format)
