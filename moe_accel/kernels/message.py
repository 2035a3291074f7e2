"""What expert parallelism sends, prepared in two kernels: how many rows go where, and what travels behind each row.

In torch both are some thirty small operations, and starting those takes the host longer than the device needs for a
whole layer of a small batch. The definitions are `count_torch` and `write_torch` of `moe_accel/dispatch/`.

Sizes: N tokens, K top-k, G ranks, e experts of each rank, S rows sent.
"""

import torch
from torch import Tensor

from moe_accel.kernels.device import HAS_TRITON, INTERPRETED, launch, tl, triton

CHOICES, ROWS = 256, 64  # of a program


def can_prepare(values: Tensor) -> bool:
    """Whether the kernels take these: something on a GPU (or anywhere, interpreted)."""
    return HAS_TRITON and values.numel() > 0 and (values.is_cuda or INTERPRETED)


def count_triton(choices: Tensor, num_ranks: int, num_local_experts: int) -> tuple[Tensor, Tensor]:
    """Which rank each choice goes to, once for each of a token's ranks, and how much goes to a rank.

    Args:
        choices: [N,K] integer, expert of each choice, counted over all ranks.
        num_ranks: G.
        num_local_experts: e.

    Returns:
        [N,K] int32, rank of each choice, -1 where an earlier choice of the token has it; and [G,2] int32, the rows
        and the pairs (choices) of each rank.
    """
    num_tokens, top_k = choices.shape
    choices = choices.contiguous()
    ranks = choices.new_empty(num_tokens, top_k, dtype=torch.int32)
    counts = choices.new_zeros(num_ranks, 2, dtype=torch.int32)
    constants = {"TOP_K": top_k, "RANKS": max(32, triton.next_power_of_2(num_ranks)), "CHOICES": CHOICES}
    sizes = choices.numel(), num_ranks, num_local_experts
    launch(_count_kernel, (-(-choices.numel() // CHOICES),), choices, ranks, counts, *sizes, **constants)
    return ranks, counts


def write_triton(
    rows: Tensor, first: int, weights: Tensor, choices: Tensor | None, sources: Tensor, ranks: Tensor, num_local: int
) -> None:
    """Write the routing weights of each row, then its choices as its receiver counts them, into the row, in place.

    Args:
        rows: [S,W], rows of whole 4 bytes.
        first: the byte of a row where they begin; 4 divides it.
        weights: [N,K], K of them in whole 4 bytes.
        choices: [N,K] integer, expert of each choice; written as int32, -1 where it is not of the row's rank. Or None.
        sources: [S] int64, token of each row.
        ranks: [S], rank that each row goes to.
        num_local: e.
    """
    num_rows, num_bytes = len(rows), rows.shape[1] * rows.element_size()
    flat = weights.contiguous().reshape(-1)
    words = (flat.clone() if flat.data_ptr() % 4 else flat).view(torch.int32).view(len(weights), -1)
    experts = words if choices is None else choices.contiguous()
    top_k = 0 if choices is None else choices.shape[1]
    sizes = num_rows, num_bytes // 4, first // 4, num_local, words.shape[1], top_k
    constants = {"PADDED": triton.next_power_of_2(max(words.shape[1], top_k)), "ROWS": ROWS}
    tensors = words, experts, sources, ranks, rows.view(torch.int32)
    launch(_write_kernel, (-(-num_rows // ROWS),), *tensors, *sizes, HAS_CHOICES=choices is not None, **constants)


@triton.jit
def _count_kernel(
    choices,
    ranks,
    counts,
    num_choices,
    num_ranks,
    num_local,
    TOP_K: tl.constexpr,
    RANKS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    """One dimension throughout: on a GPU, Triton 3.6 applies a histogram's mask after a reshape to other values."""
    at = tl.program_id(0).to(tl.int64) * CHOICES + tl.arange(0, CHOICES)
    inside = at < num_choices
    rank = (tl.load(choices + at, mask=inside, other=0) // num_local).to(tl.int32)
    k, first = (at % TOP_K).to(tl.int32), at // TOP_K * TOP_K
    again = tl.zeros((CHOICES,), tl.int32)
    for j in tl.static_range(TOP_K - 1):
        earlier = inside & (j < k)
        other = (tl.load(choices + first + j, mask=earlier, other=0) // num_local).to(tl.int32)
        again += (earlier & (other == rank)).to(tl.int32)
    tl.store(ranks + at, tl.where(again > 0, -1, rank), mask=inside)
    pairs = tl.histogram(rank, RANKS, mask=inside)
    rows = tl.histogram(rank, RANKS, mask=inside & (again == 0))
    each = tl.arange(0, RANKS)
    tl.atomic_add(counts + each * 2, rows, mask=(each < num_ranks) & (rows > 0))
    tl.atomic_add(counts + each * 2 + 1, pairs, mask=(each < num_ranks) & (pairs > 0))


@triton.jit(do_not_specialize=["num_rows"])
def _write_kernel(
    words,
    experts,
    sources,
    ranks,
    out,
    num_rows,
    row_words,
    first,
    num_local,
    num_words,
    top_k,
    HAS_CHOICES: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    source = tl.load(sources + row, mask=inside, other=0)
    column = tl.arange(0, PADDED)
    place = row[:, None] * row_words + first + column[None, :]
    within = inside[:, None] & (column < num_words)[None, :]
    word = tl.load(words + source[:, None] * num_words + column[None, :], mask=within, other=0)
    tl.store(out + place, word, mask=within)
    if HAS_CHOICES:
        within = inside[:, None] & (column < top_k)[None, :]
        expert = tl.load(experts + source[:, None] * top_k + column[None, :], mask=within, other=0)
        rank = tl.load(ranks + row, mask=inside, other=0).to(tl.int64)
        local = expert.to(tl.int64) - (rank * num_local)[:, None]
        here = (local >= 0) & (local < num_local)
        tl.store(out + place + num_words, tl.where(here, local, -1).to(tl.int32), mask=within)
