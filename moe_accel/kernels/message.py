"""What expert parallelism sends and receives, in a kernel each: how many rows go where; rows with what travels behind
them, written, taken apart, and summed when their gradients come home.

In torch these are some sixty small operations a layer, and starting those takes the host longer than the device needs
for a whole layer of a small batch. The definitions are in `plan.py` and `message.py` of `moe_accel/dispatch/`.

Sizes: N tokens, K top-k, G ranks, e experts of each rank, S rows sent, R rows of any message, H hidden, W columns of a
message, B blocks of choices, E ranks padded to a power of two.
"""

import torch
from torch import Tensor

from moe_accel.kernels.device import HAS_TRITON, INTERPRETED, launch, tl, triton
from moe_accel.kernels.rows import COLUMNS, COPIES, RowMap
from moe_accel.kernels.sort import BLOCK, padded_experts

ROWS = 64  # of a program that takes tails apart


def can_prepare(values: Tensor) -> bool:
    """Whether the kernels take these: something on a GPU (or anywhere, interpreted)."""
    return HAS_TRITON and values.numel() > 0 and (values.is_cuda or INTERPRETED)


def count_triton(choices: Tensor, num_ranks: int, num_local_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which rank each choice goes to, once for each of a token's ranks, and how much goes to a rank.

    Args:
        choices: [N,K] integer, expert of each choice, counted over all ranks.
        num_ranks: G.
        num_local_experts: e.

    Returns:
        [G,2] int32, the rows and the pairs (choices) of each rank; [N,K] int32, rank of each choice, -1 where an
        earlier choice of the token has it; and [B,E] int32, the rows of each rank in every block of `sort.BLOCK`
        choices, with those that are -1 in column G: what `sort.place` wants.
    """
    num_tokens, top_k = choices.shape
    choices = choices.contiguous()
    ranks = choices.new_empty(num_tokens, top_k, dtype=torch.int32)
    counts = choices.new_zeros(num_ranks, 2, dtype=torch.int32)
    blocks = choices.new_empty(-(-choices.numel() // BLOCK), padded_experts(num_ranks, True), dtype=torch.int32)
    constants = {"TOP_K": top_k, "RANKS": blocks.shape[1], "CHOICES": BLOCK}
    sizes = choices.numel(), num_ranks, num_local_experts
    launch(_count_kernel, (len(blocks),), choices, ranks, counts, blocks, *sizes, **constants)
    return counts, ranks, blocks


def pack_triton(
    x: Tensor,
    weights: Tensor,
    choices: Tensor | None,
    rows: RowMap,
    ends: Tensor,
    ranks: Tensor,
    num_local: int,
    tail: int,
) -> Tensor:
    """Tokens and what travels behind them, by row: [S,W] of x [N,H], W = H + tail.

    Args:
        x: [N,H]; its rows may lie apart.
        weights: [N,K], K of them in whole 4 bytes, as are the H values of x.
        choices: [N,K] integer, expert of each choice; written as int32 counted by the receiver, -1 where it is not of
            the row's rank. Or None.
        rows: which token each row is. There may be room for more rows than there are, whose places hold nothing.
        ends: [G] int32, where the rows of each rank end.
        ranks: [S], rank that each row goes to.
        num_local: e.
        tail: columns behind the hidden states.
    """
    packed, words = x.new_empty(len(rows.sources), x.shape[1] + tail), _words(weights)
    experts = words if choices is None else choices.contiguous()
    where = rows.copies, rows.starts, ends, ranks, len(ends), num_local
    _write(x, packed, words, experts, *where, COPIED=True, HAS_CHOICES=choices is not None)
    return packed


def join_triton(x: Tensor, weights: Tensor, tail: int) -> Tensor:
    """Rows x [R,H] and weights [R,K] behind them: [R,H + tail]."""
    packed, words = x.new_empty(len(x), x.shape[1] + tail), _words(weights)
    nowhere = *(words,) * 4, 0, 0
    _write(x, packed, words, words, *nowhere, COPIED=False, HAS_CHOICES=False)
    return packed


def _write(x: Tensor, packed: Tensor, words: Tensor, experts: Tensor, *where: Tensor | int, **constants: bool) -> None:
    (num_rows, width), num_words, top_k = x.shape, words.shape[1], experts.shape[1]
    sizes = num_rows, width, x.stride(0), packed.shape[1], num_words
    tile = {"TOP_K": top_k, "PADDED": triton.next_power_of_2(max(num_words, top_k)), "COPIES": COPIES}
    tensors = x, packed, packed.view(torch.int32), words, experts
    grid = num_rows, -(-width // COLUMNS)
    launch(_write_kernel, grid, *tensors, *where, *sizes, **constants, **tile, COLUMNS=COLUMNS)


def _words(weights: Tensor) -> Tensor:
    """As whole 4 bytes."""
    weights = weights.contiguous()
    return (weights.clone() if weights.data_ptr() % 4 else weights).view(torch.int32)


def take_triton(packed: Tensor, hidden: int, weights: Tensor, choices: Tensor | None) -> None:
    """Read what is behind the hidden states of a message [R,W]: into weights [R,K] and choices [R,K] int32, or none.

    H values and K weights are whole 4 bytes.
    """
    words = weights.view(torch.int32)
    first, num_words = hidden * packed.element_size() // 4, words.shape[1]
    top_k = 0 if choices is None else choices.shape[1]
    rows = packed.view(torch.int32)
    tensors = rows, words, words if choices is None else choices
    sizes = len(rows), rows.shape[1], first, num_words, top_k
    tile = {"PADDED": triton.next_power_of_2(max(num_words, top_k)), "ROWS": ROWS}
    launch(_take_kernel, (-(-len(rows) // ROWS),), *tensors, *sizes, HAS_CHOICES=choices is not None, **tile)


def sum_triton(packed: Tensor, hidden: int, top_k: int, rows: RowMap, scale: float) -> tuple[Tensor, Tensor]:
    """The sums by token of a message's rows and of the fp32 weights behind them, times `scale`: [N,H] and [N,K].

    Args:
        packed: [S,W].
        hidden: H values, in whole 4 bytes.
        top_k: K.
        rows: which token each row is.
        scale: a number; sums are rounded after it.
    """
    num_rows = len(rows.starts)
    x, weights = packed.new_empty(num_rows, hidden), packed.new_empty(num_rows, top_k, dtype=torch.float32)
    sizes = num_rows, len(packed), hidden, packed.shape[1], top_k
    constants = {"PADDED": triton.next_power_of_2(top_k), "COPIES": COPIES, "COLUMNS": COLUMNS}
    tensors = packed, packed.view(torch.float32), rows.copies, rows.starts, x, weights
    launch(_sum_kernel, (num_rows, -(-hidden // COLUMNS)), *tensors, *sizes, scale, **constants)
    return x, weights


@triton.jit
def _count_kernel(
    choices,
    ranks,
    counts,
    blocks,
    num_choices,
    num_ranks,
    num_local,
    TOP_K: tl.constexpr,
    RANKS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    """One dimension throughout: on a GPU, Triton 3.6 applies a histogram's mask after a reshape to other values."""
    block = tl.program_id(0).to(tl.int64)
    at = block * CHOICES + tl.arange(0, CHOICES)
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
    rows = tl.histogram(tl.where(again > 0, num_ranks, rank), RANKS, mask=inside)
    each = tl.arange(0, RANKS)
    tl.store(blocks + block * RANKS + each, rows)
    tl.atomic_add(counts + each * 2, rows, mask=(each < num_ranks) & (rows > 0))
    tl.atomic_add(counts + each * 2 + 1, pairs, mask=(each < num_ranks) & (pairs > 0))


@triton.jit(do_not_specialize=["num_rows"])
def _write_kernel(
    x,
    out,
    out_words,
    words,
    experts,
    copies,
    starts,
    ends,
    ranks,
    num_ranks,
    num_local,
    num_rows,
    width,
    step,
    out_width,
    num_words,
    COPIED: tl.constexpr,
    HAS_CHOICES: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED: tl.constexpr,
    COPIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program for some columns of a token: all its copies, and with the first columns what travels behind each."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = part * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    value = tl.load(x + row * step + columns, mask=inside)
    lane = tl.arange(0, PADDED)
    is_word, is_choice = (lane < num_words) & (part == 0), (lane < TOP_K) & (part == 0)
    word = tl.load(words + row * num_words + lane, mask=is_word, other=0)
    per_word: tl.constexpr = 32 // out.dtype.element_ty.primitive_bitwidth
    row_words, first = out_width // per_word, width // per_word
    if COPIED:
        start = tl.load(starts + row)
        is_last = row + 1 == num_rows
        end = tl.load(starts + row + 1, mask=row + 1 < num_rows, other=0)
        end = tl.where(is_last, tl.load(ends + num_ranks - 1).to(tl.int64), end)
        while start < end:
            at = start + tl.arange(0, COPIES)
            within = at < end
            copy = tl.load(copies + at, mask=within, other=0)
            tile = tl.broadcast_to(value[None, :], (COPIES, COLUMNS))
            tl.store(out + copy[:, None] * out_width + columns[None, :], tile, mask=within[:, None] & inside[None, :])
            behind = out_words + copy[:, None] * row_words + first + lane[None, :]
            tile = tl.broadcast_to(word[None, :], (COPIES, PADDED))
            tl.store(behind, tile, mask=within[:, None] & is_word[None, :])
            if HAS_CHOICES:
                expert = tl.load(experts + row * TOP_K + lane, mask=is_choice, other=0).to(tl.int64)
                rank = tl.load(ranks + copy, mask=within, other=0).to(tl.int64)
                local = expert[None, :] - (rank * num_local)[:, None]
                here = (local >= 0) & (local < num_local)
                mask = within[:, None] & is_choice[None, :]
                tl.store(behind + num_words, tl.where(here, local, -1).to(tl.int32), mask=mask)
            start += COPIES
    else:
        tl.store(out + row * out_width + columns, value, mask=inside)
        tl.store(out_words + row * row_words + first + lane, word, mask=is_word)


@triton.jit(do_not_specialize=["num_rows"])
def _take_kernel(
    rows,
    words,
    choices,
    num_rows,
    row_words,
    first,
    num_words,
    top_k,
    HAS_CHOICES: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, PADDED)
    behind = rows + row[:, None] * row_words + first + lane[None, :]
    inside = (row < num_rows)[:, None] & (lane < num_words)[None, :]
    tl.store(words + row[:, None] * num_words + lane[None, :], tl.load(behind, mask=inside, other=0), mask=inside)
    if HAS_CHOICES:
        inside = (row < num_rows)[:, None] & (lane < top_k)[None, :]
        choice = tl.load(behind + num_words, mask=inside, other=0)
        tl.store(choices + row[:, None] * top_k + lane[None, :], choice, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_copies"])
def _sum_kernel(
    packed,
    packed_floats,
    copies,
    starts,
    x,
    weights,
    num_rows,
    num_copies,
    width,
    step,
    top_k,
    scale,
    PADDED: tl.constexpr,
    COPIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program for some columns of a token: the sum of its copies in their order, in fp32."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns, lane = part * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, PADDED)
    inside, is_weight = columns < width, (lane < top_k) & (part == 0)
    per_float: tl.constexpr = 32 // packed.dtype.element_ty.primitive_bitwidth
    start = tl.load(starts + row)
    end = tl.load(starts + row + 1, mask=row + 1 < num_rows, other=num_copies)
    total, total_weight = tl.zeros((COLUMNS,), tl.float32), tl.zeros((PADDED,), tl.float32)
    while start < end:
        at = start + tl.arange(0, COPIES)
        within = at < end
        copy = tl.load(copies + at, mask=within, other=0)
        value = packed + copy[:, None] * step + columns[None, :]
        total += tl.sum(tl.load(value, mask=within[:, None] & inside[None, :], other=0.0).to(tl.float32), 0)
        weight = packed_floats + (copy[:, None] * step + width) // per_float + lane[None, :]
        total_weight += tl.sum(tl.load(weight, mask=within[:, None] & is_weight[None, :], other=0.0), 0)
        start += COPIES
    tl.store(x + row * width + columns, (total * scale).to(x.dtype.element_ty), mask=inside)
    tl.store(weights + row * top_k + lane, total_weight * scale, mask=is_weight)
