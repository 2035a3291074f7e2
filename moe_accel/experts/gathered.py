"""Gated experts whose GEMMs gather their rows and do the gate on the way out: nothing of [P,H] is written but the two
results that are summed over experts.

The same function as in `gated.py`, of the same two halves, with the same things kept: x, the first projection's output
and the routing. For experts with SwiGLU, without biases and adapters, in the layout of Hugging Face, on sm_90 with
Triton 3.6. It pays where experts are small, so that what is around their products counts (`kernels/gathering.py`,
`kernels/gluon.py`): one H100, 16,384 tokens, forward and backward of all experts of a layer of qwen3-30b-a3b 7.74 to
6.63 ms (random routing), 8.08 to 6.94 (Zipf), a whole step of 8 layers 212.7 to 199.9 (2026-11-26). Kernels put one
after the other: mixtral-8x7b 56.8 to 55.4, deepseek-v3 57.4 to 57.1. QuACK 0.3.11, whose GEMMs gather too: 7.28 and
7.85 where these took 7.19 and 7.75, mixtral-8x7b 54.6.

Sizes: R rows, H hidden, e local experts, P sorted pairs, I inner.
"""

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_accel.dispatch import Arrival
from moe_accel.experts import later
from moe_accel.experts.routing import LocalRouting
from moe_accel.kernels.device import IS_TRITON_36, capability
from moe_accel.kernels.gathering import Tiles, down_glu_backward, find_tiles, fits, up_glu
from moe_accel.kernels.gluon import multiply
from moe_accel.kernels.gluon_outer import BLOCK_K as OUTER_ROWS
from moe_accel.kernels.gluon_outer import outer_of_gathered
from moe_accel.kernels.more import clear_behind
from moe_accel.kernels.rows import RowMap, sum_copies

IS_ON = os.environ.get("MOE_ACCEL_GATHERING") != "0"
"""Off with `MOE_ACCEL_GATHERING=0`: to compare, and a way out should a GPU ever need one."""
MOST_INNER, LEAST_PAIRS = 1024, 65_536
"""Where it pays: I at most, and P at least: the host takes 0.3 to 0.7 ms longer to start these kernels for a layer
both ways. Four H200, ep_size 4, 32,768 pairs a GPU, NO_WRAP, 2026-11-26: 278 and 293 ms a step with them, 258 and 260
without."""
PROGRAMS_BESIDE = 2
"""Of gradients that are computed while NCCL holds multiprocessors: 12 layers on four H200, 88.4 ms a step with one for
each, 86.6 with two, 87.1 with four (2026-11-27)."""


def suits(device: torch.device, hidden: int, inner: int) -> bool:
    """Whether experts of these sizes with SwiGLU are for the kernels here, on this device, given `LEAST_PAIRS`."""
    is_hopper = IS_ON and IS_TRITON_36 and device.type == "cuda" and capability(device)[0] == 9
    return is_hopper and inner <= MOST_INNER and fits(hidden, inner)


def gathers(x: Tensor, up: Tensor, down: Tensor, num_pairs: int | None) -> bool:
    """Whether these are for the kernels here, and gain: x [R,H] as it is multiplied, up [e,H,2I], down [e,I,H].

    num_pairs: P; None where nobody waits for the host.
    """
    inner, hidden = down.shape[1:]
    pays = (
        (num_pairs is None or num_pairs >= LEAST_PAIRS)
        and x.dtype == torch.bfloat16
        and not torch.compiler.is_compiling()
    )
    if not pays or not suits(x.device, hidden, inner):
        return False
    is_stacked = up.transpose(1, 2).is_contiguous() and down.transpose(1, 2).is_contiguous()
    is_aligned = not any(each.data_ptr() % 16 for each in (up, down))  # TMA wants it
    return is_stacked and is_aligned


def gathered_experts(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    weight_p: Tensor,
    routing: LocalRouting,
    lean: bool = False,
    arrival: Arrival | None = None,
) -> Tensor:
    """Weighted sum of each row's experts.

    Args:
        x: [R,H].
        up: [e,H,2I], the transposed view of a contiguous stack, gate rows first; in any dtype.
        down: [e,I,H], likewise.
        weight_p: [P], routing weights of the sorted pairs.
        routing: of the rows.
        lean: compute the first projection again in backward rather than keep its output.
        arrival: see `gated.gated_experts`.

    Returns:
        [R,H] in the dtype of x, differentiable once in x, up, down and weight_p.
    """
    sources = routing.rows.sources.int()
    tiles = find_tiles(routing.ends, len(sources))
    places = sources, routing.rows.copies, routing.rows.starts, routing.rows.stop, *tiles
    inner: Any = _Inner.apply
    a, carrier = inner(x.contiguous(), up, down, weight_p, *places, lean, arrival)
    outer: Any = _Outer.apply
    return outer(carrier, a, down, *places)


class _Inner(torch.autograd.Function):
    """x to the second projection's input [P,I], and all of backward: see `gated._Inner`."""

    @staticmethod
    def forward(ctx: Any, x, up, down, weight_p, sources, copies, starts, stop, *rest: Any) -> tuple[Tensor, Tensor]:
        *tiles, lean, arrival = rest
        ctx.set_materialize_grads(False)
        ctx.later, ctx.arrival = later.collected(), arrival
        u, a = up_glu(x, sources, up.to(x.dtype).transpose(1, 2), weight_p, Tiles(*tiles), keep=not lean)
        ctx.save_for_backward(x, up, down, weight_p, u, sources, copies, starts, stop, *tiles)
        ctx.mark_non_differentiable(a)
        return a, x.new_empty(1, 1).expand(len(x), down.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradients[1] is None:
            return (None,) * 14
        x, up, down, weight_p, u, sources, copies, starts, stop, *rest = ctx.saved_tensors
        tiles = Tiles(*rest)
        needs_x, needs_up, needs_down, needs_weight = ctx.needs_input_grad[:4]
        up_, down_ = (each.to(x.dtype).transpose(1, 2) for each in (up, down))
        u: Any = up_glu(x, sources, up_, weight_p, tiles)[0] if u is None else u
        if ctx.arrival is not None:
            ctx.arrival.wait()
        gradient = gradients[1].contiguous()
        u_grad, weight_grad, a = down_glu_backward(gradient, sources, down_, u, weight_p, tiles)
        del u
        if stop is not None:  # a tile's last rows may be behind, and are multiplied by zero
            clear_behind(a, stop, OUTER_ROWS)
            clear_behind(u_grad, stop, OUTER_ROWS)
        x_grad = up_grad = down_grad = None
        if needs_down:
            down_grad = _now_or_later(ctx.later, down, True, tiles, gradient, a, sources)
        del a
        if needs_x:
            x_grad = sum_copies(multiply(u_grad, up_, tiles), RowMap(sources, copies, starts, stop=stop))
        if needs_up:
            up_grad = _now_or_later(ctx.later, up, False, tiles, u_grad, x, sources)
        return x_grad, up_grad, down_grad, weight_grad if needs_weight else None, *(None,) * 10


def _now_or_later(
    products: later.Products | None, matrices: Tensor, is_left: bool, tiles: Tiles, left: Tensor, *others: Tensor
) -> Tensor | None:
    """The gradient of matrices, beside what goes on where nothing has to be cast."""
    compute, is_exact = partial(_gradient, matrices, is_left, *tiles), matrices.dtype == left.dtype
    return later.gradient(products, matrices, compute, left, *others, may_be_beside=is_exact)


def _gradient(matrices: Tensor, is_left: bool, *given: Tensor, out: Tensor | None = None) -> Tensor:
    """Of matrices in the dtype that they are kept in, and in their strides; see `outer_of_gathered`.

    out: like the matrices, where they are in the dtype of the products; for what is computed beside exchanges.
    """
    *tiles, left, right, sources = given
    into, programs = (None, 1) if out is None else (out.transpose(1, 2), PROGRAMS_BESIDE)
    found = outer_of_gathered(left, right, sources, Tiles(*tiles), is_left, programs, into).transpose(1, 2)
    return found.to(matrices.dtype) if out is None else out


class _Outer(torch.autograd.Function):
    """The second projection and the sum over experts: see `gated._Outer`."""

    @staticmethod
    def forward(ctx: Any, carrier, a, down, sources, copies, starts, stop, *tiles: Tensor) -> Tensor:
        y = multiply(a, down.to(a.dtype), Tiles(*tiles))
        return sum_copies(y, RowMap(sources, copies, starts, stop=stop))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], *(None,) * 10
