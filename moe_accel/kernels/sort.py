"""(token, choice) pairs sorted by expert: a stable counting sort in three kernels, the same bits in every run.

torch's radix sort and what is made of its result are some ten small kernels: for a few ten thousand pairs, starting
them costs more than the work. Here (1) each block of pairs counts its experts, (2) for each expert the counts are
summed over the blocks before, (3) each block puts its pairs where they belong, and what follows from that beside them.

Sizes: R rows, K top-k, e local experts, P pairs of which a rank computes, B blocks, E experts padded to a power of two.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_accel.kernels.device import HAS_TRITON, INTERPRETED, launch, tl, triton

MAX_EXPERTS = 1024
BLOCK, CHUNK = 256, 32  # pairs of a program, and how many of them are compared with all others at once
SCANNED_BLOCKS, SCANNED_EXPERTS = 256, 8  # of a tile in the sum over blocks


class SortedPairs(NamedTuple):
    """What `sort_torch` makes of choices; its attributes are those of `LocalRouting` and `RowMap`.

    Attributes:
        pairs: [P] int64, flat index `row * K + choice` of each sorted pair.
        experts: [P] int16, local expert of each sorted pair.
        ends: [e] int32, where each expert's pairs end.
        sources: [P] int64, row of each sorted pair.
        copies: [P] int64, place of each pair in the sorted order, by row.
        starts: [R] int64, where each row's pairs begin in `copies`.
    """

    pairs: Tensor
    experts: Tensor
    ends: Tensor
    sources: Tensor
    copies: Tensor
    starts: Tensor


def sort_pairs(choices: Tensor, num_experts: int, num_pairs: int | None = None, fills: bool = False) -> SortedPairs:
    """Sort the pairs by expert, without any copy from the device to the host.

    Args:
        choices: [R,K] integer, local expert of each choice; -1 for one that is not computed here.
        num_experts: e.
        num_pairs: how many choices are not -1; None where all are. If it is more, what is [P] holds nothing of worth
            behind those that there are.
        fills: let `pairs` be R*K there, and `experts` and `sources` 0.
    """
    form = sort_triton if can_sort(choices, num_experts) else sort_torch
    return form(choices, num_experts, num_pairs, fills)


def sort_torch(choices: Tensor, num_experts: int, num_pairs: int | None = None, fills: bool = False) -> SortedPairs:
    """The definition of `sort_pairs`."""
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
    sources = pairs // max(top_k, 1)
    if fills:
        behind = keys >= num_experts
        pairs, sources = pairs.masked_fill(behind, flat.numel()), sources.masked_fill(behind, 0)
        keys = keys.masked_fill(behind, 0)
    return SortedPairs(pairs, keys, ends, sources, place, starts)


def can_sort(choices: Tensor, num_experts: int) -> bool:
    """Whether the kernels sort these: some choices, of 1024 experts at most, on a GPU (or anywhere, interpreted)."""
    fits = 0 < choices.numel() < 2**31 and 0 < num_experts <= MAX_EXPERTS
    return HAS_TRITON and fits and choices.dtype in (torch.int32, torch.int64) and (choices.is_cuda or INTERPRETED)


def sort_triton(choices: Tensor, num_experts: int, num_pairs: int | None = None, fills: bool = False) -> SortedPairs:
    """`sort_torch` as kernels, of what `can_sort` takes."""
    num_rows, top_k = choices.shape
    num_choices, drops = choices.numel(), num_pairs is not None
    num_kept = num_choices if num_pairs is None else num_pairs
    flat = choices.reshape(-1).contiguous()
    num_blocks = -(-num_choices // BLOCK)
    padded = padded_experts(num_experts, drops)
    counts = flat.new_empty(num_blocks, padded, dtype=torch.int32)
    totals = flat.new_empty(padded, dtype=torch.int32)
    pairs, sources, copies = (flat.new_empty(num_kept, dtype=torch.int64) for _ in range(3))
    experts = flat.new_empty(num_kept, dtype=torch.int16)
    if fills:
        pairs.fill_(num_choices)
        for each in (sources, experts):
            each.zero_()
    ends = flat.new_empty(num_experts, dtype=torch.int32)
    starts = flat.new_empty(num_rows, dtype=torch.int64)
    sizes = num_choices, num_experts
    launch(_count_kernel, (num_blocks,), flat, counts, *sizes, EXPERTS=padded, BLOCK=BLOCK)
    tile = {"EXPERTS": padded, "BLOCKS": SCANNED_BLOCKS, "TILE": SCANNED_EXPERTS}
    launch(_scan_kernel, (padded // SCANNED_EXPERTS,), counts, totals, num_blocks, **tile)
    out = pairs, experts, ends, sources, copies, starts
    constants = {"DROPS": drops, "EXPERTS": padded, "BLOCK": BLOCK, "CHUNK": CHUNK}
    launch(_place_kernel, (num_blocks,), flat, counts, totals, *out, *sizes, num_kept, top_k, **constants)
    return SortedPairs(*out)


def padded_experts(num_experts: int, drops: bool) -> int:
    """The E of the kernels: a power of two, 32 at least, with one more for what is not computed here."""
    return max(32, 1 << (num_experts + drops - 1).bit_length())


@triton.jit
def _keys(choices, at, num_choices, num_experts):
    """Experts of the pairs `at`; `num_experts` for those not computed here, and past the end."""
    key = tl.load(choices + at, mask=at < num_choices, other=-1)
    return tl.where((key >= 0) & (key < num_experts), key, num_experts).to(tl.int32)


@triton.jit
def _count_kernel(choices, counts, num_choices, num_experts, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """choices [R*K] -> counts [B,E]: pairs of each expert in a block."""
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    key = _keys(choices, at, num_choices, num_experts)
    count = tl.histogram(key, EXPERTS, mask=(at < num_choices) & (key < EXPERTS))
    tl.store(counts + block * EXPERTS + tl.arange(0, EXPERTS), count)


@triton.jit(do_not_specialize=["num_blocks"])
def _scan_kernel(counts, totals, num_blocks, EXPERTS: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr):
    """counts [B,E] -> the sum over the blocks before, in their place, and totals [E]."""
    expert = tl.program_id(0) * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.int32)
    start = 0
    while start < num_blocks:
        block = start + tl.arange(0, BLOCKS).to(tl.int64)
        at = counts + block[:, None] * EXPERTS + expert[None, :]
        within = (block < num_blocks)[:, None] & (expert < EXPERTS)[None, :]
        count = tl.load(at, mask=within, other=0)
        tl.store(at, total[None, :] + tl.cumsum(count, 0) - count, mask=within)
        total += tl.sum(count, 0)
        start += BLOCKS
    tl.store(totals + expert, total)


@triton.jit(do_not_specialize=["num_kept"])
def _place_kernel(
    choices,
    counts,
    totals,
    pairs,
    experts,
    ends,
    sources,
    copies,
    starts,
    num_choices,
    num_experts,
    num_kept,
    top_k,
    DROPS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write each pair of a block to its place: behind all of lower experts, and those before it of its own."""
    block = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    pair = block * BLOCK + lane
    key = _keys(choices, pair, num_choices, num_experts)
    rank = tl.zeros((BLOCK,), tl.int32)  # among the block's pairs of the same expert
    for start in range(0, BLOCK, CHUNK):
        other_lane = start + tl.arange(0, CHUNK)
        other = _keys(choices, block * BLOCK + other_lane, num_choices, num_experts)
        earlier = (other[None, :] == key[:, None]) & (other_lane[None, :] < lane[:, None])
        rank += tl.sum(earlier.to(tl.int32), 1)
    expert = tl.arange(0, EXPERTS)
    total = tl.load(totals + expert)
    end = tl.cumsum(total, 0)
    if block == 0:
        tl.store(ends + expert, end, mask=expert < num_experts)
    first = end - total + tl.load(counts + block * EXPERTS + expert)
    place = tl.gather(first, tl.minimum(key, EXPERTS - 1), 0) + rank
    slot = pair
    if DROPS:
        away = (key == num_experts).to(tl.int32)
        slot -= tl.load(counts + block * EXPERTS + num_experts) + tl.cumsum(away, 0) - away
    row = pair // top_k
    kept = (pair < num_choices) & (key < num_experts)
    placed = kept & (place < num_kept)
    tl.store(pairs + place, pair, mask=placed)
    tl.store(experts + place, key.to(tl.int16), mask=placed)
    tl.store(sources + place, row, mask=placed)
    tl.store(copies + slot, place.to(tl.int64), mask=kept & (slot < num_kept))
    tl.store(starts + row, slot, mask=(pair < num_choices) & (row * top_k == pair))
