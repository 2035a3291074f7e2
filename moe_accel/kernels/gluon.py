"""Grouped GEMMs for sm_90 in Gluon, of Triton 3.6: some warps load, the others multiply, results leave meanwhile.

A program holds a ring of tiles in shared memory. One warp fills it by TMA (four where rows are gathered, by cp.async
through their index: `gluon_outer.py`); eight warps empty it with WGMMA. What they find goes to shared memory and from
there by TMA, while the next tile is loaded and multiplied.

Results had the bits of torch's grouped_mm wherever the two were compared (one H100). 16,384 tokens, 8 of 128 experts,
hidden 2048, inner 768, beside grouped_mm and what is gathered for it: down 0.67 ms and 0.82, dX 1.35 and 1.55,
gradients of up 1.38 and 1.69, of down 0.68 and 0.99. Gluon changes with Triton's versions, and has no interpreter:
elsewhere it is torch's products.

Sizes: N rows, P sorted pairs, e experts, A inner, B outer.
"""

# a kernel is no Python to a type checker
# pyright: reportInvalidTypeForm=false, reportAttributeAccessIssue=false

from typing import Any

from torch import Tensor

from moe_accel.kernels.device import ABSENT, IS_TRITON_36, launch_described, num_multiprocessors
from moe_accel.kernels.gathering import GROUP, Tiles
from moe_accel.kernels.grouped import grouped_mm

if IS_TRITON_36:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
else:
    gluon: Any = ABSENT
    gl: Any = ABSENT
    fence_async_shared = mbarrier = tma = warpgroup_mma = warpgroup_mma_wait = ABSENT
    TensorDescriptor: Any = ABSENT

BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 64
STAGES = 3  # with the tile on its way out: 208 KiB
WARPS = 8  # that multiply
CONSTANTS = {
    "BM": BLOCK_M,
    "BN": BLOCK_N,
    "BK": BLOCK_K,
    "GROUP": GROUP,
    "STAGES": STAGES,
    "WARPS": WARPS,
    "num_warps": WARPS,
}


def multiply(rows: Tensor, matrices: Tensor, tiles: Tiles) -> Tensor:
    """Rows of each expert times its matrix. Not differentiable.

    Args:
        rows: [P,A], sorted by expert, contiguous.
        matrices: [e,A,B], contiguous, or a transposed view of such.
        tiles: of the rows.

    Returns:
        [P,B]. Neither A nor B has parts of a tile.
    """
    if not runs(rows):
        return grouped_mm(rows, matrices, tiles.ends)
    (_, inner, outer), is_turned = matrices.shape, matrices.stride(1) == 1
    out = rows.new_empty(len(rows), outer)
    stack = matrices.transpose(1, 2) if is_turned else matrices
    block = [BLOCK_N, BLOCK_K] if is_turned else [BLOCK_K, BLOCK_N]
    tensors = out, described(rows, [BLOCK_M, BLOCK_K]), described(stack.reshape(-1, stack.shape[2]), block)
    more = described(out, [BLOCK_M, BLOCK_N]), tiles.places, tiles.total, tiles.places.shape[1]
    programs = num_multiprocessors(rows.device)
    constants = {"A": inner, "B": outer, "STEP": programs, "TRANSPOSED": is_turned, **CONSTANTS}
    launch_described(_multiply_kernel, (programs,), *tensors, *more, **constants)
    return out


def runs(values: Tensor) -> bool:
    """Whether the kernels run where these are: sm_90 is for the caller to see."""
    return IS_TRITON_36 and values.is_cuda


def described(tensor: Tensor, block: list[int]) -> Any:
    """A tensor [A,B] for TMA, in blocks of two sizes."""
    return TensorDescriptor.from_tensor(tensor, block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16))


@gluon.jit
def place(tile, num_m, num_n: gl.constexpr, GROUP: gl.constexpr):
    """Tile -> (m, n): GROUP tiles of rows at a time, rows fastest."""
    per_group = GROUP * num_n
    group = tile // per_group
    first = group * GROUP
    size = gl.minimum(num_m - first, GROUP)
    within = tile - group * per_group
    return first + within % size, within // size


@gluon.jit
def ring(STAGES: gl.constexpr, ARRIVALS: gl.constexpr):
    """Barriers of a ring's tiles: that so many have filled one, and that it is multiplied."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=ARRIVALS)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    return full, empty


@gluon.jit
def release(empty, step, STAGES: gl.constexpr):
    """The tiles of the step before this one are multiplied."""
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)


@gluon.jit(do_not_specialize=["max_tiles"])
def _multiply_kernel(
    out,
    rows,
    matrices,
    out_described,
    places,
    total,
    max_tiles,
    A: gl.constexpr,
    B: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    GROUP: gl.constexpr,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    WARPS: gl.constexpr,
):
    left = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, BK], rows.layout)
    if TRANSPOSED:
        right = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, BK], matrices.layout)
    else:
        right = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BK, BN], matrices.layout)
    leaving = gl.allocate_shared_memory(gl.bfloat16, [BM, BN], out_described.layout)
    full, empty = ring(STAGES, 1)
    gl.warp_specialize(
        [
            (
                _products,
                (
                    out_described,
                    out,
                    leaving,
                    places,
                    total,
                    max_tiles,
                    left,
                    right,
                    full,
                    empty,
                    A,
                    B,
                    BM,
                    BN,
                    BK,
                    GROUP,
                    STEP,
                    STAGES,
                    TRANSPOSED,
                    WARPS,
                ),
            ),
            (
                _load,
                (
                    rows,
                    matrices,
                    places,
                    total,
                    max_tiles,
                    left,
                    right,
                    full,
                    empty,
                    A,
                    B,
                    BM,
                    BN,
                    BK,
                    GROUP,
                    STEP,
                    STAGES,
                    TRANSPOSED,
                ),
            ),
        ],
        [1],
        [40],
    )


@gluon.jit
def _load(
    rows,
    matrices,
    places,
    total,
    max_tiles,
    left,
    right,
    full,
    empty,
    A: gl.constexpr,
    B: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    GROUP: gl.constexpr,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
    TRANSPOSED: gl.constexpr,
):
    num_n: gl.constexpr = B // BN
    num_m = gl.load(total)
    step = 0
    for tile in range(gl.program_id(0), num_m * num_n, STEP):
        m, n = place(tile, num_m, num_n, GROUP)
        expert = gl.load(places + m)
        row = gl.load(places + max_tiles + m)
        for k in range(0, A, BK):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            is_full = full.index(stage)
            mbarrier.expect(is_full, (BM + BN) * BK * 2)
            tma.async_copy_global_to_shared(rows, [row, k], is_full, left.index(stage))
            if TRANSPOSED:
                tma.async_copy_global_to_shared(matrices, [expert * B + n * BN, k], is_full, right.index(stage))
            else:
                tma.async_copy_global_to_shared(matrices, [expert * A + k, n * BN], is_full, right.index(stage))
            step += 1


@gluon.jit
def _products(
    out_described,
    out,
    leaving,
    places,
    total,
    max_tiles,
    left,
    right,
    full,
    empty,
    A: gl.constexpr,
    B: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    GROUP: gl.constexpr,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    WARPS: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    num_n: gl.constexpr = B // BN
    num_k: gl.constexpr = A // BK
    num_m = gl.load(total)
    step = 0
    for tile in range(gl.program_id(0), num_m * num_n, STEP):
        m, n = place(tile, num_m, num_n, GROUP)
        row = gl.load(places + max_tiles + m)
        end = gl.load(places + 2 * max_tiles + m)
        found = gl.zeros((BM, BN), gl.float32, layout)
        for k in range(num_k):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            if TRANSPOSED:
                found = warpgroup_mma(left.index(stage), right.index(stage).permute((1, 0)), found, is_async=True)
            else:
                found = warpgroup_mma(left.index(stage), right.index(stage), found, is_async=True)
            found = warpgroup_mma_wait(1, deps=(found,))
            if k > 0:
                release(empty, step, STAGES)
            step += 1
        found = warpgroup_mma_wait(0, deps=(found,))
        release(empty, step, STAGES)
        tma.store_wait(0)
        _leave(out_described, out, leaving, found.to(out.dtype.element_ty), row, end, n * BN, B, BM, BN, WARPS)
    tma.store_wait(0)


@gluon.jit
def _leave(
    described,
    out,
    leaving,
    value,
    row,
    end,
    column,
    WIDTH: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    WARPS: gl.constexpr,
):
    """A tile by way of shared memory to rows from `row` on, before `end`; whole ones by TMA, which nobody waits for."""
    leaving.store(value)
    if row + ROWS <= end:
        fence_async_shared()
        tma.async_copy_shared_to_global(described, [row, column], leaving)
    else:
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // COLUMNS, COLUMNS // 8], [WARPS, 1], [1, 0])
        at = row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        columns = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
        place = out + at.to(gl.int64)[:, None] * WIDTH + columns[None, :]
        gl.store(place, leaving.load(layout), mask=(at < end)[:, None])
