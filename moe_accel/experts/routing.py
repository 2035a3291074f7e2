"""Sorting (token, choice) pairs by local expert: made once per layer and kept out of activation-checkpoint recompute.

Sizes: R rows, K top-k, e local experts, P pairs of a row and one of its local experts (R*K where all are local).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_accel.kernels.grouped import group_sizes
from moe_accel.kernels.rows import RowMap
from moe_accel.kernels.sort import can_sort, sort_triton


@dataclass(frozen=True)
class LocalRouting:
    """The pairs of this rank, sorted by expert.

    Attributes:
        pairs: [P] int64, flat index `row * K + choice` of each sorted pair.
        experts: [P], local expert of each sorted pair.
        ends: [e] int32, where each expert's pairs end.
        rows: copies of rows for their pairs.
    """

    pairs: Tensor
    experts: Tensor
    ends: Tensor
    rows: RowMap

    def counts(self) -> Tensor:
        """[e] int64: pairs of each expert."""
        return self.ends.diff(prepend=self.ends.new_zeros(1)).long()

    @cached_property
    def sizes(self) -> list[int]:
        """Pairs of each expert as the host knows them: the first time it waits for the device."""
        return group_sizes(self.ends)


def sort_by_expert(choices: Tensor, num_experts: int, num_pairs: int | None = None) -> LocalRouting:
    """Sort the pairs by expert, without any copy from the device to the host.

    Args:
        choices: [R,K] integer, local expert of each choice; -1 for one that is not computed here.
        num_experts: e.
        num_pairs: how many choices are not -1; None where all are.
    """
    if can_sort(choices, num_experts):
        pairs, experts, ends, *rows = sort_triton(choices, num_experts, num_pairs)
        return LocalRouting(pairs, experts, ends, RowMap(*rows))
    return sort_torch(choices, num_experts, num_pairs)


def sort_torch(choices: Tensor, num_experts: int, num_pairs: int | None = None) -> LocalRouting:
    """The definition of `sort_by_expert`."""
    num_rows, top_k = choices.shape
    flat = choices.reshape(-1)
    # One radix sort: fewer bits are fewer passes. What is not computed here goes to the tail.
    keys = flat.to(torch.int16 if num_experts < 2**15 else torch.int64)
    if num_pairs is not None:
        keys = keys.where(flat >= 0, num_experts)
    keys, pairs = keys.sort(stable=True)
    place = torch.empty_like(pairs).scatter_(0, pairs, torch.arange(pairs.numel(), device=pairs.device))
    if num_pairs is None:
        starts = torch.arange(0, pairs.numel(), max(top_k, 1), device=pairs.device)
    else:
        keys, pairs = keys[:num_pairs], pairs[:num_pairs]
        local = flat >= 0
        # The places of the local pairs, in order of rows; all others are written to one slot past the end.
        slots = (local.cumsum(0) - 1).where(local, num_pairs)
        place = place.new_empty(num_pairs + 1).scatter_(0, slots, place)[:num_pairs]
        per_row = local.view(num_rows, top_k).sum(1)
        starts = per_row.cumsum(0) - per_row
    all_experts = torch.arange(num_experts, device=keys.device, dtype=keys.dtype)
    ends = torch.searchsorted(keys, all_experts, right=True, out_int32=True)
    return LocalRouting(pairs, keys, ends, RowMap(pairs // max(top_k, 1), place, starts))


def pick(weights: Tensor, routing: LocalRouting) -> Tensor:
    """Routing weights [R,K] -> [P], those of the sorted pairs. Differentiable once, in weights."""
    return _Pick.apply(weights, routing.pairs)  # pyright: ignore[reportReturnType]


class _Pick(torch.autograd.Function):
    """weights [R,K] -> [P] of the sorted pairs. Each pair is picked once, so backward writes and never adds."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, pairs: Tensor) -> Tensor:
        ctx.save_for_backward(pairs)
        ctx.shape = weights.shape
        return weights.reshape(-1).index_select(0, pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (pairs,), (gradient,) = ctx.saved_tensors, gradients
        return gradient.new_zeros(ctx.shape.numel()).scatter_(0, pairs, gradient).view(ctx.shape), None
