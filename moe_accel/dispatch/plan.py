"""Which rows a rank sends: each token once to every rank that holds any of its experts.

In two steps, so that the counts are on their way while the order of rows is worked out: `count`, then `order`. Neither
waits for the device.

Sizes: N tokens of this rank, K top-k, G ranks, e experts of each rank, S rows sent.
"""

import warnings
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from moe_accel.kernels.device import triton
from moe_accel.kernels.message import can_prepare, count_triton
from moe_accel.kernels.rows import RowMap
from moe_accel.kernels.sort import sort_pairs


class Counted(NamedTuple):
    """Where tokens go.

    Attributes:
        counts: [G,2] int32, rows and pairs (of a token and one of its experts) for each rank.
        ranks: [N,K] int32, rank of each choice, -1 where an earlier choice of the token has the same.
    """

    counts: Tensor
    ranks: Tensor


def count(choices: Tensor, num_ranks: int, num_local_experts: int) -> Counted:
    """Of choices [N,K], experts counted over all ranks."""
    sizes = num_ranks, num_local_experts
    if can_prepare(choices) and _is_counted_right(choices.device, choices.dtype, choices.shape[1], *sizes):
        ranks, counts = count_triton(choices, *sizes)
        return Counted(counts, ranks)
    return count_torch(choices, *sizes)


@cache
def _is_counted_right(
    device: torch.device, dtype: torch.dtype, top_k: int, num_ranks: int, num_local_experts: int
) -> bool:
    """Whether the kernel, as Triton compiles it for these sizes, counts as torch does: tried once.

    Rows would be lost without a word otherwise, and Triton 3.6 did get an earlier form of the kernel wrong, for some K.
    It makes two kernels of it, for numbers of choices that 16 divides and for others: both are tried.
    """
    generator = torch.Generator(device).manual_seed(0)

    def counts_right(num_tokens: int) -> bool:
        shape, num_experts = (num_tokens, top_k), num_ranks * num_local_experts
        choices = torch.randint(num_experts, shape, generator=generator, device=device, dtype=dtype)
        ranks, counts = count_triton(choices, num_ranks, num_local_experts)
        expected = count_torch(choices, num_ranks, num_local_experts)
        return torch.equal(counts, expected.counts) and torch.equal(ranks, expected.ranks)

    if all(map(counts_right, (1008, 1001))):
        return True
    warnings.warn(
        f"Triton {triton.__version__} miscompiles the count of rows of {num_ranks} ranks and top {top_k}: torch counts",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def count_torch(choices: Tensor, num_ranks: int, num_local_experts: int) -> Counted:
    """The definition of `count`."""
    ranks = torch.div(choices, num_local_experts, rounding_mode="floor").to(torch.int32)
    earlier = torch.ones(ranks.shape[1], ranks.shape[1], dtype=torch.bool, device=ranks.device).tril(-1)
    again = ((ranks[:, :, None] == ranks[:, None, :]) & earlier).any(2)
    of_rank = ranks[..., None] == torch.arange(num_ranks, device=ranks.device, dtype=torch.int32)
    rows, pairs = (of_rank & ~again[..., None]).sum((0, 1)), of_rank.sum((0, 1))
    return Counted(torch.stack([rows, pairs], dim=1).to(torch.int32), ranks.masked_fill(again, -1))


def order(counted: Counted) -> tuple[RowMap, Tensor]:
    """The rows sent, ordered by rank, then by token, and the rank of each.

    What is [S] here has room for the most rows that there can be; behind those that there are it holds nothing of
    worth.
    """
    ranks, num_ranks = counted.ranks, len(counted.counts)
    most = ranks.shape[0] * min(num_ranks, ranks.shape[1])
    found = sort_pairs(ranks, num_ranks, most)
    return RowMap(found.sources, found.copies, found.starts), found.experts


def cut(rows: RowMap, num_rows: int) -> RowMap:
    """Without the places where there is no row."""
    return RowMap(rows.sources[:num_rows], rows.copies[:num_rows], rows.starts)
