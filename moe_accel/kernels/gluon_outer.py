"""Gradients of the experts' matrices for sm_90 in Gluon, one side gathered while it is multiplied: see `gluon.py`.

Sizes: N rows, P sorted pairs, e experts, A and B columns of the two sides.
"""

# a kernel is no Python to a type checker
# pyright: reportInvalidTypeForm=false, reportAttributeAccessIssue=false

from typing import Any

from torch import Tensor

from moe_accel.kernels.device import ABSENT, IS_TRITON_36, launch_described, num_multiprocessors
from moe_accel.kernels.gathering import Tiles
from moe_accel.kernels.gluon import BLOCK_K, BLOCK_M, BLOCK_N, CONSTANTS, described, place, release, ring, runs
from moe_accel.kernels.grouped import grouped_outer

if IS_TRITON_36:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        async_copy,
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
else:
    gluon: Any = ABSENT
    gl: Any = ABSENT
    async_copy = fence_async_shared = mbarrier = tma = warpgroup_mma = warpgroup_mma_wait = ABSENT


def outer_of_gathered(
    left: Tensor,
    right: Tensor,
    sources: Tensor,
    tiles: Tiles,
    is_left: bool,
    programs: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """For each expert's pairs `left.T @ right`, of which one side is gathered by `sources`. Not differentiable.

    Args:
        left: [P,A], or [N,A] where it is gathered; contiguous.
        right: [P,B], or [N,B] where it is gathered; contiguous.
        sources: [P] int32, row of each sorted pair.
        tiles: of the pairs.
        is_left: whether left is gathered, rather than right.
        programs: for each multiprocessor, of which one has room for one. More where other kernels hold some: the work
            is dealt out among programs beforehand, and those that come last then have less of it.
        out: [e,A,B], contiguous, in the dtype of left: where the result goes; None: memory of its own.

    Returns:
        [e,A,B]; zeros for an expert without pairs. The last rows of a tile are the next expert's on the side in order,
        and zeros on the other: infinities among them become NaN.
    """
    if not runs(left):
        left, right = (left.index_select(0, sources), right) if is_left else (left, right.index_select(0, sources))
        found = grouped_outer(left, right, tiles.ends)
        return found if out is None else out.copy_(found)
    num_experts, rows, columns = len(tiles.ends), left.shape[1], right.shape[1]
    out = left.new_empty(num_experts, rows, columns) if out is None else out
    in_order = described(right, [BLOCK_K, BLOCK_N]) if is_left else described(left, [BLOCK_K, BLOCK_M])
    tensors = left if is_left else right, in_order, described(out.view(-1, columns), [BLOCK_M, BLOCK_N])
    step = programs * num_multiprocessors(left.device)
    constants = {"M": rows, "N": columns, "STEP": step, "IS_LEFT": is_left, **CONSTANTS}
    launch_described(_outer_kernel, (step,), *tensors, sources, tiles.ends, tiles.order, num_experts, **constants)
    return out


@gluon.jit(do_not_specialize=["num_experts"])
def _outer_kernel(
    gathered,
    in_order,
    out_described,
    sources,
    ends,
    order,
    num_experts,
    M: gl.constexpr,
    N: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    GROUP: gl.constexpr,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
    IS_LEFT: gl.constexpr,
    WARPS: gl.constexpr,
):
    of_left: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, BM], gl.bfloat16)
    of_right: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, BN], gl.bfloat16)
    left = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BK, BM], of_left)
    right = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BK, BN], of_right)
    leaving = gl.allocate_shared_memory(gl.bfloat16, [BM, BN], out_described.layout)
    full, empty = ring(STAGES, 1 + 128)  # what TMA brings, and each thread's part of the gathered rows
    gl.warp_specialize(
        [
            (
                _outer_products,
                (
                    out_described,
                    leaving,
                    ends,
                    order,
                    left,
                    right,
                    full,
                    empty,
                    num_experts,
                    M,
                    N,
                    BM,
                    BN,
                    BK,
                    GROUP,
                    STEP,
                    STAGES,
                    WARPS,
                ),
            ),
            (
                _load_gathered,
                (
                    in_order,
                    gathered,
                    sources,
                    ends,
                    order,
                    left,
                    right,
                    full,
                    empty,
                    num_experts,
                    M,
                    N,
                    BM,
                    BN,
                    BK,
                    GROUP,
                    STEP,
                    STAGES,
                    IS_LEFT,
                ),
            ),
        ],
        [4],
        [96],
    )


@gluon.jit
def _load_gathered(
    in_order,
    gathered,
    sources,
    ends,
    order,
    left,
    right,
    full,
    empty,
    num_experts,
    M: gl.constexpr,
    N: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    GROUP: gl.constexpr,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
    IS_LEFT: gl.constexpr,
):
    """Indices are read a tile ahead of the rows they are of."""
    width: gl.constexpr = BM if IS_LEFT else BN
    row_width: gl.constexpr = M if IS_LEFT else N
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])
    num_m: gl.constexpr = M // BM
    num_n: gl.constexpr = N // BN
    per_expert: gl.constexpr = num_m * num_n
    step = 0
    for tile in range(gl.program_id(0), num_experts * per_expert, STEP):
        expert = gl.load(order + tile // per_expert)
        m, n = place(tile % per_expert, num_m, num_n, GROUP)
        end = gl.load(ends + expert)
        start = gl.load(ends + expert - 1, mask=expert > 0, other=0)
        first = m * BM if IS_LEFT else n * BN
        columns = first + gl.arange(0, width, gl.SliceLayout(0, layout))
        lane = gl.arange(0, BK, gl.SliceLayout(1, layout))
        source = gl.load(sources + start + lane, mask=start + lane < end, other=-1)
        for k in range(start, end, BK):
            ahead = k + BK + lane
            following = gl.load(sources + ahead, mask=ahead < end, other=-1)
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            is_full = full.index(stage)
            at = gathered + source.to(gl.int64)[:, None] * row_width + columns[None, :]
            mask = (source >= 0)[:, None]
            if IS_LEFT:
                mbarrier.expect(is_full, BN * BK * 2)
                tma.async_copy_global_to_shared(in_order, [k, n * BN], is_full, right.index(stage))
                async_copy.async_copy_global_to_shared(left.index(stage), at, mask=mask)
            else:
                mbarrier.expect(is_full, BM * BK * 2)
                tma.async_copy_global_to_shared(in_order, [k, m * BM], is_full, left.index(stage))
                async_copy.async_copy_global_to_shared(right.index(stage), at, mask=mask)
            async_copy.mbarrier_arrive(is_full, increment_count=False)
            source = following
            step += 1


@gluon.jit
def _outer_products(
    out_described,
    leaving,
    ends,
    order,
    left,
    right,
    full,
    empty,
    num_experts,
    M: gl.constexpr,
    N: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    GROUP: gl.constexpr,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    num_m: gl.constexpr = M // BM
    num_n: gl.constexpr = N // BN
    per_expert: gl.constexpr = num_m * num_n
    step = 0
    for tile in range(gl.program_id(0), num_experts * per_expert, STEP):
        expert = gl.load(order + tile // per_expert)
        m, n = place(tile % per_expert, num_m, num_n, GROUP)
        end = gl.load(ends + expert)
        start = gl.load(ends + expert - 1, mask=expert > 0, other=0)
        found = gl.zeros((BM, BN), gl.float32, layout)
        for k in range(start, end, BK):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            fence_async_shared()  # of what cp.async wrote
            found = warpgroup_mma(left.index(stage).permute((1, 0)), right.index(stage), found, is_async=True)
            found = warpgroup_mma_wait(1, deps=(found,))
            if k > start:
                release(empty, step, STAGES)
            step += 1
        found = warpgroup_mma_wait(0, deps=(found,))
        if end > start:
            release(empty, step, STAGES)
        tma.store_wait(0)
        leaving.store(found.to(gl.bfloat16))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_described, [expert * M + m * BM, n * BN], leaving)
    tma.store_wait(0)
