"""The experts as two grouped GEMMs over rows sorted by expert: the default.

Against transformers' own grouped_mm: no sentinel masks, no scatter with atomics in any backward, no copy to the host,
and the routing weights multiply the [P,I] input of the second GEMM rather than its larger [P,H] output, which then need
not be kept for backward. Almost all experts take the shorter way of `gated.py`; this is the
general one.

Sizes: R rows, H hidden, K top-k, e local experts, P sorted pairs, U up rows, I inner.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_accel.dispatch import Arrival
from moe_accel.experts.adapters import Factors
from moe_accel.experts.gated import gated_experts, sum_of_experts, why_not_gated
from moe_accel.experts.gates import find_gate
from moe_accel.experts.routing import LocalRouting, pick
from moe_accel.experts.weights import activate, down_weight, has_post_norm, post_norm, up_weight
from moe_accel.kernels.grouped import TORCH, GroupedGemm
from moe_accel.kernels.rows import gather_rows, sum_rows


def fused_experts(
    module: Any,
    x: Tensor,
    routing: LocalRouting,
    weights: Tensor,
    norm_scale: float = 1.0,
    adapters: tuple[Factors | None, Factors | None] = (None, None),
    lean: bool = False,
    gemm: GroupedGemm = TORCH,
    dtype: torch.dtype | None = None,
    arrival: Arrival | None = None,
) -> Tensor:
    """Weighted sum of each row's experts: x [R,H], weights [R,K] -> [R,H] in the dtype of x.

    `norm_scale`: see `weights.post_norm`. `adapters`: of the two projections, see `adapters.factors`. `lean`: keep less
    for backward, where `gated.py` can. `gemm`: who multiplies, and in `gated.py` brings rows. `dtype`: of the products;
    None: as they come. `arrival`: of the gradient, awaited by `gated.py`.
    """
    (up, up_bias), (down, down_bias) = up_weight(module), down_weight(module)
    weight_p = pick(weights, routing)
    if why_not_gated(module) is None:
        gate = find_gate(module) if module.has_gate else None
        biases = up_bias, down_bias
        return gated_experts(x, up, down, weight_p, routing, *adapters, gate, biases, lean, gemm, dtype, arrival)
    of_output = x.dtype
    if dtype is not None:
        x, up, down = x.to(dtype), up.to(dtype), down.to(dtype)
        up_bias, down_bias = (None if each is None else each.to(dtype) for each in (up_bias, down_bias))
    h_ph = gather_rows(x, routing.rows)  # here by our own kernels in any case: so few models come this way
    u_pu = _add_bias(gemm.multiply(h_ph, up, routing.ends), up_bias, routing)
    a_pi = activate(module, _add(u_pu, _low_rank(gemm, h_ph, adapters[0], routing))).to(u_pu.dtype)
    if has_post_norm(module):  # of the unweighted output
        y_ph = _add_bias(gemm.multiply(a_pi, down, routing.ends), down_bias, routing)
        y_ph = _add(y_ph, _low_rank(gemm, a_pi, adapters[1], routing)).to(y_ph.dtype)
        y_ph: Any = _Weigh.apply(post_norm(module, y_ph, norm_scale), weight_p)
        return sum_rows(y_ph, routing.rows).to(of_output)
    a_pi = _Weigh.apply(a_pi, weight_p)
    y_ph = gemm.multiply(a_pi, down, routing.ends)  # pyright: ignore[reportArgumentType]
    y_ph = _add_bias(y_ph, down_bias, routing, weight_p)
    return sum_rows(y_ph, routing.rows, _low_rank(gemm, a_pi, adapters[1], routing)).to(of_output)


def _low_rank(gemm: GroupedGemm, rows: Any, factors: Factors | None, routing: LocalRouting) -> Tensor | None:
    """What an adapter adds to a projection of [P,in]: [P,out], apart from it, so that it is not rounded away."""
    if factors is None:
        return None
    a, b = factors[:2]
    return gemm.multiply(gemm.multiply(rows.to(a.dtype), a, routing.ends), b, routing.ends)


def _add(rows: Tensor, more: Tensor | None) -> Tensor:
    """rows + more, in fp32 at least; rows themselves without more."""
    return rows if more is None else rows.to(torch.promote_types(rows.dtype, torch.float32)) + more


def _add_bias(rows: Tensor, bias: Tensor | None, routing: LocalRouting, weight_p: Any = None) -> Tensor:
    if bias is None:
        return rows
    added = _ExpertRows.apply(bias, routing.experts)
    return rows + (added if weight_p is None else _Weigh.apply(added, weight_p))


class _Weigh(torch.autograd.Function):
    """rows [P,C] times weights [P], in the dtype of rows; the weights' gradient sums over C in fp32 at least."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights)
        return _product(rows, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (rows, weights), (gradient,) = ctx.saved_tensors, gradients
        rows_grad = _product(gradient, weights) if ctx.needs_input_grad[0] else None
        weights_grad = None
        if ctx.needs_input_grad[1]:
            accumulate = torch.promote_types(weights.dtype, torch.float32)
            weights_grad = (gradient * rows).sum(1, dtype=accumulate).to(weights.dtype)
        return rows_grad, weights_grad


def _product(rows: Tensor, weights: Tensor) -> Tensor:
    return torch.mul(rows, weights[:, None], out=torch.empty_like(rows))


class _ExpertRows(torch.autograd.Function):
    """bias [e,C] -> [P,C], the row of each pair's expert; backward is one small GEMM instead of a scatter."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, experts: Tensor) -> Tensor:
        ctx.save_for_backward(experts)
        ctx.num_experts = bias.shape[0]
        return bias.index_select(0, experts.int())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (experts,), (gradient,) = ctx.saved_tensors, gradients
        return sum_of_experts(gradient, ctx.num_experts, experts), None
