"""Sorting (token, choice) pairs by local expert: made once per layer and kept out of activation-checkpoint recompute.

Sizes: R rows, K top-k, e local experts, P pairs of a row and one of its local experts (R*K where all are local).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_accel.kernels.rows import RowMap
from moe_accel.kernels.sort import sort_pairs


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
    def ends_on_host(self) -> Tensor:
        """`ends` as the host knows them: the first time it waits for the device."""
        return self.ends.cpu()


def sort_by_expert(choices: Tensor, num_experts: int, num_pairs: int | None = None) -> LocalRouting:
    """The pairs by expert, as `kernels.sort.sort_pairs` sorts them."""
    pairs, experts, ends, *rows = sort_pairs(choices, num_experts, num_pairs)
    return LocalRouting(pairs, experts, ends, RowMap(*rows))


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
