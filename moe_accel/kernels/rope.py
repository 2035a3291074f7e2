"""Rotary position embedding in one pass: pairs (i, i + D/2) of every head are turned by the angle of their position.

    y1 = x1 * cos1 - x2 * sin1        backward: dx1 = dy1 * cos1 + dy2 * sin2
    y2 = x2 * cos2 + x1 * sin2                  dx2 = dy2 * cos2 - dy1 * sin1
where x1, x2 are the halves of the last dimension. Su et al., "RoFormer" (2021), in the half-split form of Llama. Native
takes five passes over q and k forward and as many backward. GPT-OSS gives D/2
angles, by which both halves turn.

Sizes: B batch, A attention heads, S sequence, D head dimension, W width of the angles: D or D/2.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_accel.kernels.device import launch, tl, triton


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [B,A,S,D] by cos and sin [B or 1,S,W], in the strides of x. Differentiable once, in x."""
    return _Rotate.apply(x, cos, sin)  # pyright: ignore[reportReturnType]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate_triton(x, cos, sin, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return rotate_triton(gradients[0], *ctx.saved_tensors, backward=True), None, None


def rotate_torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition; differentiable."""
    x1, x2 = x.chunk(2, -1)
    if cos.shape[-1] < x.shape[-1]:
        cos, sin = (torch.cat([each, each], -1) for each in (cos, sin))
    return x * cos[:, None] + torch.cat([-x2, x1], -1) * sin[:, None]


def rotate_triton(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    """`rotate_torch`, or its gradient, as a kernel: one program a token."""
    num_batches, num_heads, length, width = x.shape
    y = torch.empty_like(x)
    cos, sin = cos.contiguous(), sin.contiguous()
    of_batch = cos.stride(0) if cos.shape[0] > 1 else 0
    sizes = {"num_heads": num_heads, "half": width // 2, "angles": cos.shape[-1]}
    blocks = {key: 1 << (size - 1).bit_length() for key, size in (("HEADS", num_heads), ("HALF", width // 2))}
    strides = (*x.stride(), *y.stride())
    grid = length, num_batches
    launch(_rotate_kernel, grid, x, cos, sin, y, of_batch, *strides, BACKWARD=backward, **sizes, **blocks)
    return y


@triton.jit
def _rotate_kernel(
    x,
    cos,
    sin,
    y,
    of_batch,
    x_batch,
    x_head,
    x_token,
    x_column,
    y_batch,
    y_head,
    y_token,
    y_column,
    BACKWARD: tl.constexpr,
    num_heads: tl.constexpr,
    half: tl.constexpr,
    angles: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    turn = batch * of_batch + token * angles + column
    second = angles - half  # where the angles of the second half begin
    narrow = column < half
    cos1 = tl.load(cos + turn, mask=narrow, other=0.0).to(tl.float32)
    cos2 = tl.load(cos + turn + second, mask=narrow, other=0.0).to(tl.float32)
    sin1 = tl.load(sin + turn, mask=narrow, other=0.0).to(tl.float32)
    sin2 = tl.load(sin + turn + second, mask=narrow, other=0.0).to(tl.float32)
    inside = narrow & (head < num_heads)
    source = x + batch * x_batch + token * x_token + head * x_head + column * x_column
    x1 = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(source + half * x_column, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        y1, y2 = x1 * cos1 + x2 * sin2, x2 * cos2 - x1 * sin1
    else:
        y1, y2 = x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2
    target = y + batch * y_batch + token * y_token + head * y_head + column * y_column
    tl.store(target, y1.to(y.dtype.element_ty), mask=inside)
    tl.store(target + half * y_column, y2.to(y.dtype.element_ty), mask=inside)
