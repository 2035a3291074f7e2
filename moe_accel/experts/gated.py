"""Experts with a SwiGLU and no biases as one autograd function: two grouped GEMMs and four passes over rows each way.

Between forward and backward it keeps x, the first projection's output and the routing, and nothing else of [P,H] or
[P,I]: gathered rows and the second projection's input are made again. The routing weights' gradient comes from the
second projection's input, so its output is not kept either (Guo et al., "SonicMoE", 2025).

Sizes: R rows, H hidden, K top-k, e local experts, P sorted pairs, I inner.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation
from transformers.integrations import moe

from moe_accel.experts.routing import LocalRouting
from moe_accel.experts.weights import has_post_norm
from moe_accel.kernels.device import as_autocast
from moe_accel.kernels.grouped import grouped_mm, grouped_outer
from moe_accel.kernels.rows import gather, sum_copies
from moe_accel.kernels.swiglu import swiglu, swiglu_backward


def why_not_gated(module: Any) -> str | None:
    """Why a module's experts are no plain SwiGLU; None where `gated_experts` computes them."""
    if not module.has_gate:
        return "no gate"
    if module.has_bias:
        return "biases"
    if has_post_norm(module):
        return "a norm after each expert"
    if type(module)._apply_gate is not moe._default_apply_gate:  # act(gate) * up, halves of one projection
        return "a gate of its own"
    if not isinstance(module.act_fn, nn.SiLU | SiLUActivation):
        return f"activation {type(module.act_fn).__name__}"
    return None


def gated_experts(x: Tensor, up: Tensor, down: Tensor, weight_p: Tensor, routing: LocalRouting) -> Tensor:
    """Weighted sum of each row's experts.

    Args:
        x: [R,H].
        up: [e,H,2I], gate then up; any strides.
        down: [e,I,H]; any strides.
        weight_p: [P], routing weights of the sorted pairs.
        routing: of the rows.

    Returns:
        [R,H] in the dtype of x, differentiable once in x, up, down and weight_p.
    """
    operands = as_autocast(x, up, down)
    with torch.autocast(x.device.type, enabled=False):
        y: Any = _Gated.apply(*operands, weight_p, routing.ends, *routing.rows)
    return y.to(x.dtype)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, up, down, weight_p, ends, sources, copies, starts) -> Tensor:
        u = grouped_mm(gather(x, sources), up, ends)
        y = grouped_mm(swiglu(u, weight_p), down, ends)
        ctx.save_for_backward(x, up, down, weight_p, u, ends, sources, copies, starts)
        return sum_copies(y, copies, starts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, weight_p, u, ends, sources, copies, starts = ctx.saved_tensors
        needs_x, needs_up, needs_down, needs_weight = ctx.needs_input_grad[:4]
        y_grad = gather(gradients[0], sources)
        u_grad, weight_grad, a = swiglu_backward(grouped_mm(y_grad, down.transpose(1, 2), ends), u, weight_p)
        down_grad = _like(down, a, y_grad, ends) if needs_down else None
        del a, y_grad
        up_grad = _like(up, gather(x, sources), u_grad, ends) if needs_up else None
        x_grad = None
        if needs_x:
            x_grad = sum_copies(grouped_mm(u_grad, up.transpose(1, 2), ends), copies, starts)
        return x_grad, up_grad, down_grad, weight_grad if needs_weight else None, None, None, None, None


def _like(matrices: Tensor, rows: Tensor, others: Tensor, ends: Tensor) -> Tensor:
    """The gradient `rows.T @ others` of each group, in the strides of `matrices`, so that nobody copies it."""
    if matrices.stride(-1) == 1:
        return grouped_outer(rows, others, ends)
    return grouped_outer(others, rows, ends).transpose(1, 2)
