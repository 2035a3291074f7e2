"""Experts with a SwiGLU, or relu^2 without a gate, and no biases as one autograd function: two grouped GEMMs and four
passes over rows each way.

Between forward and backward it keeps x, the first projection's output and the routing, and nothing else of [P,H] or
[P,I]: gathered rows and the second projection's input are made again. The routing weights' gradient comes from the
second projection's input, so its output is not kept either (Guo et al., "SonicMoE", 2025).

A low-rank adapter of a projection is computed beside it, and the two are added in fp32 where they are read: in the
gate, and in the sum over experts. Of an adapter, the [P,r] between its factors is kept too. What is frozen gets no
gradient computed.

A `lean` module does not keep the first projection's output either, the largest thing by far: backward computes it once
more. Of a layer of Qwen3-30B-A3B that is a third of all its activations for a tenth of the time of a recompute.

Sizes: R rows, H hidden, K top-k, e local experts, P sorted pairs, I inner, r rank of an adapter.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import ReLUSquaredActivation, SiLUActivation
from transformers.integrations import moe

from moe_accel.experts.adapters import Factors
from moe_accel.experts.routing import LocalRouting
from moe_accel.experts.weights import has_post_norm
from moe_accel.kernels.device import as_autocast
from moe_accel.kernels.grouped import grouped_mm, grouped_outer
from moe_accel.kernels.rows import gather, sum_copies
from moe_accel.kernels.squared_relu import squared_relu, squared_relu_backward
from moe_accel.kernels.swiglu import swiglu, swiglu_backward
from moe_accel.swap import is_bare


def why_not_gated(module: Any) -> str | None:
    """Why a module's experts are none that `gated_experts` computes; None where they are."""
    if module.has_bias:
        return "biases"
    if has_post_norm(module):
        return "a norm after each expert"
    if module.has_gate and type(module)._apply_gate is not moe._default_apply_gate:
        return "a gate of its own"  # the default: act(gate) * up, halves of one projection
    if not is_bare(module.act_fn):
        return "a hook or a forward of its own on the activation"
    if not _has_activation(module):
        gated = "" if module.has_gate else " without a gate"
        return f"activation {getattr(module.act_fn, '__name__', type(module.act_fn).__name__)}{gated}"
    return None


def _has_activation(module: Any) -> bool:
    """Whether there is a kernel for the module's activation, with its gate or without."""
    if module.has_gate:
        return module.act_fn is nn.functional.silu or isinstance(module.act_fn, nn.SiLU | SiLUActivation)
    return isinstance(module.act_fn, ReLUSquaredActivation)


def gated_experts(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    weight_p: Tensor,
    routing: LocalRouting,
    up_factors: Factors | None = None,
    down_factors: Factors | None = None,
    has_gate: bool = True,
    lean: bool = False,
) -> Tensor:
    """Weighted sum of each row's experts.

    Args:
        x: [R,H].
        up: [e,H,2I], gate then up, or [e,H,I] without a gate; any strides.
        down: [e,I,H]; any strides.
        weight_p: [P], routing weights of the sorted pairs.
        routing: of the rows.
        up_factors: [e,H,r] and [e,r,2I], whose product is added to up; None: nothing is.
        down_factors: [e,I,r] and [e,r,H], likewise.
        has_gate: SwiGLU; otherwise relu^2.
        lean: compute the first projection again in backward rather than keep its output.

    Returns:
        [R,H] in the dtype of x, differentiable once in x, up, down, weight_p and the factors.
    """
    x_, up, down = as_autocast(x, up, down)
    factors = *(up_factors or (None, None)), *(down_factors or (None, None))
    with torch.autocast(x.device.type, enabled=False):
        y: Any = _Gated.apply(x_, up, down, weight_p, *factors, routing.ends, *routing.rows, has_gate, lean)
    return y.to(x.dtype)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x, up, down, weight_p, up_a, up_b, down_a, down_b, ends, sources, copies, starts, has_gate, lean
    ) -> Tensor:
        ctx.has_gate = has_gate
        rows = gather(x, sources)
        u = grouped_mm(rows, up, ends)
        up_low, u_more = _low_rank(rows, up_a, up_b, ends)
        del rows
        a = (swiglu if has_gate else squared_relu)(u, weight_p, u_more)
        del u_more
        y = grouped_mm(a, down, ends)
        down_low, y_more = _low_rank(a, down_a, down_b, ends)
        factors = up_a, up_b, up_low, down_a, down_b, down_low
        ctx.save_for_backward(x, up, down, weight_p, None if lean else u, *factors, ends, sources, copies, starts)
        return sum_copies(y, copies, starts, y_more)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, weight_p, u, up_a, up_b, up_low, down_a, down_b, down_low, ends, sources, copies, starts = (
            ctx.saved_tensors
        )
        needs_x, needs_up, needs_down, needs_weight, *needs_factors = ctx.needs_input_grad[:8]
        rows = None
        if u is None:
            rows = gather(x, sources)
            u = grouped_mm(rows, up, ends)
        y_grad = gather(gradients[0], sources)
        down_low_grad, a_grad_more = _low_rank(y_grad, _t(down_b), _t(down_a), ends)
        u_more = None if up_low is None else grouped_mm(up_low, up_b, ends)
        a_grad = grouped_mm(y_grad, _t(down), ends)
        activation_backward = swiglu_backward if ctx.has_gate else squared_relu_backward
        u_grad, weight_grad, a = activation_backward(a_grad, u, weight_p, a_grad_more, u_more)
        del a_grad, a_grad_more, u_more, u
        down_grad = _like(down, a, y_grad, ends) if needs_down else None
        down_factors_grad = (
            _like(down_a, a, down_low_grad, ends) if needs_factors[2] else None,
            _like(down_b, down_low, y_grad, ends) if needs_factors[3] else None,
        )
        del a, y_grad
        up_low_grad, x_grad_more = _low_rank(u_grad, _t(up_b), _t(up_a) if needs_x else None, ends)
        if rows is None and (needs_up or needs_factors[0]):
            rows = gather(x, sources)
        up_grad = _like(up, rows, u_grad, ends) if needs_up else None
        up_factors_grad = (
            _like(up_a, rows, up_low_grad, ends) if needs_factors[0] else None,
            _like(up_b, up_low, u_grad, ends) if needs_factors[1] else None,
        )
        del rows
        x_grad = sum_copies(grouped_mm(u_grad, _t(up), ends), copies, starts, x_grad_more) if needs_x else None
        found = x_grad, up_grad, down_grad, weight_grad if needs_weight else None
        return *found, *up_factors_grad, *down_factors_grad, *(None,) * 6


def _low_rank(rows: Any, a: Any, b: Any, ends: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """`rows @ a` and `rows @ a @ b` of each group; None for what has no matrix."""
    low = None if a is None else grouped_mm(rows, a, ends)
    return low, None if low is None or b is None else grouped_mm(low, b, ends)


def _t(matrices: Any) -> Any:
    return None if matrices is None else matrices.transpose(1, 2)


def _like(matrices: Tensor, rows: Any, others: Any, ends: Tensor) -> Tensor:
    """The gradient `rows.T @ others` of each group, in the strides of `matrices`, so that nobody copies it."""
    if matrices.stride(-1) == 1:
        return grouped_outer(rows, others, ends)
    return grouped_outer(others, rows, ends).transpose(1, 2)
