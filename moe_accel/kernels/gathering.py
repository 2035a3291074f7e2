"""The first projection of gathered rows with SwiGLU on the way out, and the backward of the second with its own: sm_90.

forward     u = x[sources] @ up.T, a = silu(gate) * up * weight      nothing of [P,H] is written, u is not read again
backward    of the second projection: gradient[sources] @ down, and with it all that `glu_backward` gives

Rows are gathered by cp.async through their index, matrices come by TMA; tl.dot is WGMMA. Tiles of rows are listed on
the device, so the host never learns how many rows an expert has. The gradient of the routing weights is summed from one
part a tile of columns, in order: the same bits in every run. u and a have the bits of torch's grouped_mm and `glu`; the
backward is nearer to exact than with a product of its own, whose result is rounded (one H100).

One H100, 16,384 tokens, 8 of 128 experts, hidden 2048, inner 768: forward 1.52 ms, apart 1.83; backward 1.00, apart
1.33. Larger experts have nothing to gain: their products take all the time (mixtral-8x7b 12.7 and 12.5, 7.64 and 7.62).

Sizes: N rows, P sorted pairs, e experts, H hidden, I inner, T tiles.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_accel.kernels.device import HAS_TRITON, INTERPRETED, launch, launch_described, tl, triton, use_triton
from moe_accel.kernels.glu import glu, glu_backward
from moe_accel.kernels.grouped import grouped_mm

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor
else:
    TensorDescriptor: Any = None

BLOCK_M, BLOCK_K = 128, 64
GATE_COLUMNS = 128  # of gate, and as many of up, in one tile of the first projection
COLUMNS = 256  # of any other tile
GROUP = 8  # tiles of rows that share matrices in L2
OPTIONS = {"BM": BLOCK_M, "BK": BLOCK_K, "GROUP": GROUP, "num_warps": 8, "num_stages": 4}


class Tiles(NamedTuple):
    """The sorted pairs in tiles of `BLOCK_M` rows, none of two experts. All int32.

    Attributes:
        ends: [e], where each expert's pairs end.
        places: [3,T]: expert, first row and end of the expert's rows, of each tile; T is what there may be.
        total: [1], how many tiles there are.
        order: [e], experts by their number of rows, the largest first.
    """

    ends: Tensor
    places: Tensor
    total: Tensor
    order: Tensor


def fits(hidden: int, inner: int) -> bool:
    """Whether H and I are whole tiles."""
    return hidden % COLUMNS == 0 and inner % COLUMNS == 0


def find_tiles(ends: Tensor, num_pairs: int) -> Tiles:
    """ends [e] int32, where each expert's pairs end."""
    num_experts, max_tiles = len(ends), -(-num_pairs // BLOCK_M) + len(ends)
    places, total, order = ends.new_empty(3, max_tiles), ends.new_empty(1), torch.empty_like(ends)
    if ends.is_cuda or INTERPRETED:
        constants = {"BLOCK_M": BLOCK_M, "EXPERTS": max(32, 1 << (num_experts - 1).bit_length()), "num_warps": 1}
        launch(_tiles_kernel, (num_experts,), ends, places, total, order, num_experts, max_tiles, **constants)
    return Tiles(ends, places, total, order)


def up_glu(
    x: Tensor, sources: Tensor, up: Tensor, weight: Tensor, tiles: Tiles, keep: bool = True
) -> tuple[Tensor | None, Tensor]:
    """First projection of gathered rows, SwiGLU and the routing weight. Not differentiable.

    Args:
        x: [N,H], contiguous.
        sources: [P] int32, row of each sorted pair.
        up: [e,2I,H], gate rows first, contiguous.
        weight: [P], routing weights of the sorted pairs.
        tiles: of the pairs.
        keep: whether u is wanted.

    Returns:
        u [P,2I], None if not `keep`, and a [P,I], in the dtype of x.
    """
    if not use_triton(x):
        u = grouped_mm(x.index_select(0, sources), up.transpose(1, 2), tiles.ends)
        return u if keep else None, glu(u, weight)
    (num_experts, both, hidden), num_pairs = up.shape, len(sources)
    inner = both // 2
    u, a = x.new_empty(num_pairs, both) if keep else None, x.new_empty(num_pairs, inner)
    matrices = TensorDescriptor.from_tensor(up.view(2 * num_experts, inner, hidden), [2, GATE_COLUMNS, BLOCK_K])
    max_tiles = tiles.places.shape[1]
    tensors = x, matrices, sources, weight.contiguous(), a if u is None else u, a, tiles.places, tiles.total
    sizes = {"HIDDEN": hidden, "INNER": inner, "BN": GATE_COLUMNS, "KEEP": keep}
    launch_described(_up_kernel, (max_tiles * (inner // GATE_COLUMNS),), *tensors, max_tiles, **sizes, **OPTIONS)
    return u, a


def down_glu_backward(
    gradient: Tensor, sources: Tensor, down: Tensor, u: Tensor, weight: Tensor, tiles: Tiles
) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient of the experts' weighted sum, what `glu_backward` gives.

    Args:
        gradient: [N,H], contiguous.
        sources: [P] int32, row of each sorted pair.
        down: [e,H,I], contiguous.
        u: [P,2I], of `up_glu`.
        weight: [P].
        tiles: of the pairs.

    Returns:
        gradient of u [P,2I], gradient of weight [P] in its dtype, and a [P,I].
    """
    if not use_triton(gradient):
        return glu_backward(grouped_mm(gradient.index_select(0, sources), down, tiles.ends), u, weight)
    (num_experts, hidden, inner), num_pairs = down.shape, len(sources)
    u_grad, a, weight_grad = torch.empty_like(u), u.new_empty(num_pairs, inner), torch.empty_like(weight)
    parts = torch.empty(inner // COLUMNS, num_pairs, device=u.device, dtype=torch.float32)
    matrices = TensorDescriptor.from_tensor(down.view(num_experts * hidden, inner), [BLOCK_K, COLUMNS])
    max_tiles = tiles.places.shape[1]
    tensors = gradient, matrices, sources, weight.contiguous(), u, u_grad, a, parts, tiles.places, tiles.total
    sizes = {"HIDDEN": hidden, "INNER": inner, "BN": COLUMNS}
    grid = (max_tiles * (inner // COLUMNS),)
    launch_described(_down_backward_kernel, grid, *tensors, max_tiles, num_pairs, **sizes, **OPTIONS)
    launch(_sum_parts_kernel, (-(-num_pairs // 1024),), parts, weight_grad, num_pairs, PARTS=len(parts), BLOCK=1024)
    return u_grad, weight_grad, a


@triton.jit(do_not_specialize=["num_experts", "max_tiles"])
def _tiles_kernel(ends, places, total, order, num_experts, max_tiles, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """Each program lists the tiles of one expert, behind those of the experts before it."""
    expert = tl.program_id(0)
    other = tl.arange(0, EXPERTS)
    end = tl.load(ends + other, mask=other < num_experts, other=0)
    start = tl.load(ends + other - 1, mask=(other > 0) & (other < num_experts), other=0)
    size = tl.where(other < num_experts, end - start, 0)
    num_tiles = (size + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(other < expert, num_tiles, 0), 0)
    mine = tl.sum(tl.where(other == expert, num_tiles, 0), 0)
    my_size = tl.sum(tl.where(other == expert, size, 0), 0)
    my_end = tl.sum(tl.where(other == expert, end, 0), 0)
    larger = (size > my_size) | ((size == my_size) & (other < expert))
    tl.store(order + tl.sum((larger & (other < num_experts)).to(tl.int32), 0), expert)
    if expert == 0:
        tl.store(total, tl.sum(num_tiles, 0))
    at = 0
    while at < mine:
        tile = at + tl.arange(0, 128)
        slot, inside = first + tile, tile < mine
        tl.store(places + slot, tl.zeros((128,), tl.int32) + expert, mask=inside)
        tl.store(places + max_tiles + slot, my_end - my_size + tile * BLOCK_M, mask=inside)
        tl.store(places + 2 * max_tiles + slot, tl.zeros((128,), tl.int32) + my_end, mask=inside)
        at += 128


@triton.jit
def _place(tile, num_m, num_n: tl.constexpr, GROUP: tl.constexpr):
    """Tile -> (m, n): GROUP tiles of rows at a time, rows fastest."""
    group = tile // (GROUP * num_n)
    within = tile - group * (GROUP * num_n)
    size = tl.minimum(num_m - group * GROUP, GROUP)
    return group * GROUP + within % size, within // size


@triton.jit
def _tile(
    values,
    sources,
    places,
    num_m,
    max_tiles,
    num_n: tl.constexpr,
    HIDDEN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Of this program: n, its expert, its rows among the pairs, whether they are there, and where they are gathered."""
    m, n = _place(tl.program_id(0), num_m, num_n, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    expert = tl.load(places + m)
    row = tl.load(places + max_tiles + m) + tl.arange(0, BM)
    inside = row < tl.load(places + 2 * max_tiles + m)
    source = tl.load(sources + row, mask=inside, other=0).to(tl.int64)
    left = values + source[:, None] * HIDDEN + tl.arange(0, BK)[None, :]
    return n, expert, row, inside, left


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Left and right half: registers stay where they are, for a thread has both."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=["max_tiles"])
def _up_kernel(
    x,
    matrices,
    sources,
    weight,
    u,
    a,
    places,
    total,
    max_tiles,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Each program computes one tile of gate and the same columns of up, in one product of 2*BN columns."""
    num_m = tl.load(total)
    if tl.program_id(0) >= num_m * (INNER // BN):
        return
    n, expert, row, inside, left = _tile(  # pyright: ignore[reportGeneralTypeIssues]
        x, sources, places, num_m, max_tiles, INNER // BN, HIDDEN, BM, BK, GROUP
    )
    total_of_both = tl.zeros((BM, 2 * BN), tl.float32)
    for k in range(0, HIDDEN, BK):
        both = tl.reshape(matrices.load([2 * expert, n * BN, k]), (2 * BN, BK))
        total_of_both = tl.dot(tl.load(left + k), both.T, total_of_both)
    gate, up = _halves(total_of_both, BM, 2 * BN)
    gate, up = gate.to(u.dtype.element_ty), up.to(u.dtype.element_ty)
    row = row.to(tl.int64)[:, None]
    column = n * BN + tl.arange(0, BN)[None, :]
    if KEEP:
        tl.store(u + row * (2 * INNER) + column, gate, mask=inside[:, None])
        tl.store(u + row * (2 * INNER) + INNER + column, up, mask=inside[:, None])
    gate, up = gate.to(tl.float32), up.to(tl.float32)  # of what is kept, as backward has it
    value = gate * tl.sigmoid(gate) * up * tl.load(weight + row, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(a + row * INNER + column, value.to(a.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["max_tiles", "num_pairs"])
def _down_backward_kernel(
    gradient,
    matrices,
    sources,
    weight,
    u,
    u_grad,
    a,
    parts,
    places,
    total,
    max_tiles,
    num_pairs,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Each program computes one tile; what comes after the product by quarters of its columns, else registers spill."""
    num_m = tl.load(total)
    if tl.program_id(0) >= num_m * (INNER // BN):
        return
    n, expert, row, inside, left = _tile(  # pyright: ignore[reportGeneralTypeIssues]
        gradient, sources, places, num_m, max_tiles, INNER // BN, HIDDEN, BM, BK, GROUP
    )
    a_grad = tl.zeros((BM, BN), tl.float32)
    for k in range(0, HIDDEN, BK):
        a_grad = tl.dot(tl.load(left + k), matrices.load([expert * HIDDEN + k, n * BN]), a_grad)
    scale = tl.load(weight + row, mask=inside, other=0.0).to(tl.float32)
    row = row.to(tl.int64)
    first, second = _halves(a_grad, BM, BN)
    one, two = _halves(first, BM, BN // 2)
    three, four = _halves(second, BM, BN // 2)
    part = _glu_backward(one, scale, u, u_grad, a, row, inside, n * BN, INNER, BN // 4)
    part += _glu_backward(two, scale, u, u_grad, a, row, inside, n * BN + BN // 4, INNER, BN // 4)
    part += _glu_backward(three, scale, u, u_grad, a, row, inside, n * BN + BN // 2, INNER, BN // 4)
    part += _glu_backward(four, scale, u, u_grad, a, row, inside, n * BN + 3 * BN // 4, INNER, BN // 4)
    tl.store(parts + n * num_pairs.to(tl.int64) + row, part, mask=inside)


@triton.jit
def _glu_backward(a_grad, scale, u, u_grad, a, row, inside, first, INNER: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes some columns of the gradient of u and of a; gives their part of the gradient of the routing weights."""
    column = first + tl.arange(0, COLUMNS)[None, :]
    within, place = inside[:, None], row[:, None] * (2 * INNER) + column
    gate = tl.load(u + place, mask=within, other=0.0).to(tl.float32)
    up = tl.load(u + place + INNER, mask=within, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    act = gate * sigmoid
    both = act * up
    part = tl.sum(a_grad * both, 1)
    weighted = a_grad * scale[:, None]
    of_gate = weighted * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(u_grad + place, of_gate.to(u_grad.dtype.element_ty), mask=within)
    tl.store(u_grad + place + INNER, (weighted * act).to(u_grad.dtype.element_ty), mask=within)
    tl.store(a + row[:, None] * INNER + column, (both * scale[:, None]).to(a.dtype.element_ty), mask=within)
    return part


@triton.jit(do_not_specialize=["num_pairs"])
def _sum_parts_kernel(parts, out, num_pairs, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """parts [PARTS,P] -> [P]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_pairs
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(PARTS):
        total += tl.load(parts + part * num_pairs.to(tl.int64) + at, mask=inside, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
