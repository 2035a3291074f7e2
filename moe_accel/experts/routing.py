"""Sorting (token, choice) pairs by local expert: made once per layer and kept out of activation-checkpoint recompute.

Sizes: R rows, K top-k, e local experts, P pairs of a row and one of its local experts (R*K where all are local).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moe_accel.kernels.rows import RowMap
from moe_accel.kernels.sort import sort_pairs


@dataclass(frozen=True)
class LocalRouting:
    """The pairs of this rank, sorted by expert.

    Attributes:
        pairs: [P] int64, flat index `row * K + choice` of each sorted pair.
        experts: [P], local expert of each sorted pair.
        ends: [e] int32, where each expert's pairs end.
        rows: copies of rows for their pairs. With a `stop` of its own there is room for more pairs than there are, and
            what is behind them are pairs R*K, of expert 0.
    """

    pairs: Tensor
    experts: Tensor
    ends: Tensor
    rows: RowMap

    def counts(self) -> Tensor:
        """[e] int64: pairs of each expert."""
        return counts_of(self.ends)

    @cached_property
    def ends_on_host(self) -> Tensor:
        """`ends` as the host knows them: the first time it waits for the device."""
        return self.ends.cpu()


def counts_of(ends: Tensor) -> Tensor:
    """[e] int64: pairs of each expert, by where they end."""
    return ends.diff(prepend=ends.new_zeros(1)).long()


def sort_by_expert(choices: Tensor, num_experts: int, num_pairs: int | None = None) -> LocalRouting:
    """The pairs by expert, as `kernels.sort.sort_pairs` sorts them."""
    pairs, experts, ends, *rows = sort_pairs(choices, num_experts, num_pairs)
    return LocalRouting(pairs, experts, ends, RowMap(*rows))


def sort_with_room(choices: Tensor, num_experts: int) -> LocalRouting:
    """The same with room for the most pairs there can be, so that all sizes are known whatever was chosen.

    No choice of a row may be there twice.
    """
    num_rows, top_k = choices.shape
    room = num_rows * min(top_k, num_experts)
    pairs, experts, ends, *rows = sort_pairs(choices, num_experts, room, fills=True)
    return LocalRouting(pairs, experts, ends, RowMap(*rows, stop=ends[-1:]))


def pick(weights: Tensor, routing: LocalRouting) -> Tensor:
    """Routing weights [R,K] -> [P], those of the sorted pairs; 0 behind them. Differentiable once, in weights."""
    return _Pick.apply(weights, routing.pairs, routing.rows.stop is not None)  # pyright: ignore[reportReturnType]


class _Pick(torch.autograd.Function):
    """weights [R,K] -> [P] of the sorted pairs. Each pair is picked once, so backward writes and never adds.

    Where there is room for more, what is behind them is picked from one place behind the weights.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, pairs: Tensor, has_room: bool) -> Tensor:
        ctx.save_for_backward(pairs)
        ctx.shape, ctx.has_room = weights.shape, has_room
        flat = weights.reshape(-1)
        return (functional.pad(flat, (0, 1)) if has_room else flat).index_select(0, pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (pairs,), (gradient,) = ctx.saved_tensors, gradients
        count = ctx.shape.numel()
        found = gradient.new_zeros(count + ctx.has_room).scatter_(0, pairs, gradient)
        return found[:count].view(ctx.shape), None, None
