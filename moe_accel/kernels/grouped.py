"""Grouped GEMM: rows sorted by expert times the matrix of their expert.

On a GPU with bf16 it is torch's own grouped_mm: 695 TFLOP/s forward on even and 624 on uneven groups (64 experts,
65,536 rows x 2048 -> 2048, one H100, 2026-11-24; TransformerEngine's GroupedLinear: 557 and 520). Elsewhere it is one
matrix product per expert.

Sizes: P rows, e experts, A inner, B outer.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from moe_accel.kernels.device import capability
from moe_accel.kernels.rows import gather, sum_copies


def grouped_mm(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Multiply each group of rows by its own matrix.

    Args:
        rows: [P,A], sorted by group.
        matrices: [e,A,B], the dtype of `rows`; a transposed view is as good.
        ends: [e] int32, where each group ends in `rows`. A group may be empty. The last may be less than P: rows
            behind it are not read.

    Returns:
        [P,B], differentiable in rows and matrices; behind the last end nothing of worth.
    """
    if takes_torch_grouped_mm(rows, matrices):
        return functional.grouped_mm(rows, matrices, offs=ends)
    return grouped_mm_by_group(rows, matrices, ends)


def grouped_outer(rows: Tensor, others: Tensor, ends: Tensor) -> Tensor:
    """For each group of rows its `rows.T @ others`: the gradient of a grouped GEMM's matrices.

    Args:
        rows: [P,A], sorted by group.
        others: [P,B], the dtype of `rows`.
        ends: [e] int32, as for `grouped_mm`.

    Returns:
        [e,A,B]; zeros for a group without rows. Not differentiable.
    """
    if takes_torch_grouped_mm(rows, others[None]) and rows.shape[0]:
        return functional.grouped_mm(rows.t(), others, offs=ends)
    parts = zip(_groups(rows, ends), _groups(others, ends), strict=True)
    return torch.stack([a.t() @ b for a, b in parts])


class GroupedGemm(NamedTuple):
    """Who multiplies groups, and who brings rows to them and back: functions with the contracts of `grouped_mm`,
    `grouped_outer`, `rows.gather` and `rows.sum_copies`."""

    multiply: Callable[[Tensor, Tensor, Tensor], Tensor]
    outer: Callable[[Tensor, Tensor, Tensor], Tensor]
    gather: Callable[..., Tensor] = gather
    sum_copies: Callable[..., Tensor] = sum_copies


TORCH = GroupedGemm(grouped_mm, grouped_outer)


def grouped_mm_by_group(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """`grouped_mm` as one product per group: the definition, and what runs without a GPU."""
    products = [group @ matrix for group, matrix in zip(_groups(rows, ends), matrices.unbind(), strict=True)]
    computed = sum(map(len, products))
    behind = rows.new_full((len(rows) - computed, matrices.shape[2]), torch.nan)  # to be seen, if anybody reads it
    return torch.cat([*products, behind]) if len(behind) else torch.cat(products)


def _groups(rows: Tensor, ends: Tensor) -> list[Tensor]:
    """[n,C] of each group; waits for the device."""
    sizes = group_sizes(ends)
    return list(rows[: sum(sizes)].split(sizes))


def group_sizes(ends: Tensor) -> list[int]:
    """Rows of each group as the host knows them; waits for the device."""
    stops = ends.tolist()
    return [stop - start for start, stop in zip([0, *stops], stops, strict=False)]


def takes_torch_grouped_mm(rows: Tensor, matrices: Tensor) -> bool:
    """Whether torch has a real grouped kernel for these: bf16 on an Ampere or newer GPU, rows of whole 16 bytes."""
    if rows.dtype != torch.bfloat16 or not rows.is_cuda or capability(rows.device) < (8, 0):
        return False
    return rows.shape[1] % 8 == 0 and matrices.shape[2] % 8 == 0 and matrices.data_ptr() % 16 == 0
