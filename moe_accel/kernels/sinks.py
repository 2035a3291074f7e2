"""Attention with a sink: one more score in each head's softmax, which belongs to no token and has no value.

    s_ij  scores of token i;  l_i = log sum_j exp(s_ij), which flash attention gives along with its out_i
    L_i   = log(exp(l_i) + exp(sink))
    out_i = exp(l_i - L_i) * flash's out_i                      sum over j of exp(s_ij - L_i) v_j
Flash attention's backward takes out and l, and makes exp(s_ij - l_i) and dout_i . out_i of them. Told the new out and
L, it computes the gradients of attention with the sink, whose own is - sum over i of exp(sink - L_i) dout_i . out_i.

Sinks: Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (2024), learned as in GPT-OSS. Flash
attention: Dao, "FlashAttention-2" (2023); torch's own, by the operators that `varlen_attn` and sdpa call, whose public
forms do not let their backward be told anything. cuDNN's takes rows of one length without windows, and is faster.

Sizes: N tokens, B rows of T tokens, Q query heads, K heads of keys and values, D their width, V that of values.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_accel.kernels.device import launch, tl, triton

TOKENS = 64
"""Of a head that one program looks at."""

flash_forward = torch.ops.aten._flash_attention_forward
flash_backward = torch.ops.aten._flash_attention_backward
cudnn_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
cudnn_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward


@dataclass(frozen=True)
class Span:
    """What a token sees.

    Attributes:
        bounds: [S+1] int32, where each of S sequences begins among the N tokens; the last is N.
        longest: tokens of the longest sequence.
        window: how many tokens a token sees, itself among them; None: all before it.
        scale: of the scores.
    """

    bounds: Tensor
    longest: int
    window: int | None
    scale: float

    def options(self) -> dict[str, Any]:
        """The keywords of flash attention's operators."""
        left, right = (None, None) if self.window is None else (self.window - 1, 0)
        return {"scale": self.scale, "window_size_left": left, "window_size_right": right}


def attend(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, span: Span) -> Tensor:
    """Causal attention within each sequence, with sinks.

    Args:
        query: [N,Q,D] 16-bit floats on a GPU.
        key: [N,K,D]; K divides Q.
        value: [N,K,D].
        sinks: [Q], in any float dtype.
        span: what a token sees.

    Returns:
        [N,Q,D], contiguous; differentiable once, in all four.
    """
    return _Flash.apply(query, key, value, sinks, span)  # pyright: ignore[reportReturnType]


def attend_rows(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, scale: float) -> Tensor:
    """Causal attention within each row, with sinks, by cuDNN.

    Args:
        query: [B,Q,T,D] 16-bit floats on a GPU, for which sdpa would choose cuDNN.
        key: [B,K,T,D]; K divides Q.
        value: [B,K,T,V].
        sinks: [Q], in any float dtype.
        scale: of the scores.

    Returns:
        [B,T,Q,V], contiguous; differentiable once, in all four.
    """
    return _Cudnn.apply(query, key, value, sinks, scale)  # pyright: ignore[reportReturnType]


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, span: Span) -> Tensor:
        tensors = query, key, value
        out, sums, *more, _ = flash_forward(*tensors, *_varlen(span), 0.0, True, False, **span.options())
        out, sums = add_sinks(out.transpose(0, 1).unsqueeze(0), sums.unsqueeze(0), sinks)
        ctx.save_for_backward(*tensors, sinks, out, sums, *more)
        ctx.span = span
        return out[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, sums, *more = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        of_sinks = sinks_gradient(gradient[None], out, sums, sinks) if ctx.needs_input_grad[3] else None
        arguments = gradient, query, key, value, out[0], sums[0], *_varlen(ctx.span), 0.0, True, *more
        return *flash_backward(*arguments, **ctx.span.options()), of_sinks, None


def _varlen(span: Span) -> tuple[Tensor, Tensor, int, int]:
    return span.bounds, span.bounds, span.longest, span.longest


class _Cudnn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, scale: float) -> Tensor:
        tensors = query, key, value
        out, sums, _, _, _, _, seed, offset, _ = cudnn_forward(*tensors, None, True, 0.0, True, False, scale=scale)
        out, sums = add_sinks(out, sums.squeeze(-1), sinks)
        ctx.save_for_backward(*tensors, sinks, out, sums, seed, offset)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, sums, *state = ctx.saved_tensors
        gradient, length = gradients[0].contiguous(), query.shape[2]
        of_sinks = sinks_gradient(gradient, out, sums, sinks) if ctx.needs_input_grad[3] else None
        g, o = (each.transpose(1, 2) for each in (gradient, out))
        arguments = g, query, key, value, o, sums.unsqueeze(-1), *state, None, None, None, length, length, 0.0, True
        return *cudnn_backward(*arguments, scale=ctx.scale), of_sinks, None


def add_sinks_torch(out: Tensor, sums: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: out [B,T,Q,V] and L [B,Q,T] of attention with sinks, from out [B,Q,T,V] and l without."""
    with_sinks = torch.logaddexp(sums, sinks[:, None].to(sums.dtype))
    factor = (sums - with_sinks).exp().unsqueeze(-1)
    return (out * factor).to(out.dtype).transpose(1, 2).contiguous(), with_sinks


def sinks_gradient_torch(gradient: Tensor, out: Tensor, sums: Tensor, sinks: Tensor) -> Tensor:
    """The definition of the gradient of sinks [Q], from out [B,T,Q,V] and L [B,Q,T] with them."""
    parts = (gradient.to(sums.dtype) * out.to(sums.dtype)).sum(-1).transpose(1, 2)
    return -((sinks[:, None].to(sums.dtype) - sums).exp() * parts).sum((0, 2)).to(sinks.dtype)


def add_sinks(out: Tensor, sums: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """`add_sinks_torch` as a kernel: out in any strides, sums in fp32."""
    num_rows, num_heads, length, width = out.shape
    assert sums.shape == out.shape[:3], f"attention gave sums {tuple(sums.shape)}"
    new, sums = out.new_empty(num_rows, length, num_heads, width), sums.contiguous()
    new_sums = torch.empty_like(sums)
    tensors = out, sums, sinks.contiguous(), new, new_sums
    launch(_add_kernel, _grid(new), *tensors, length, *out.stride(), **_constants(num_heads, width))
    return new, new_sums


def sinks_gradient(gradient: Tensor, out: Tensor, sums: Tensor, sinks: Tensor) -> Tensor:
    """`sinks_gradient_torch` as a kernel, of tensors without gaps; always summed in the same order."""
    _, length, num_heads, width = out.shape
    grid = _grid(out)
    parts = sums.new_empty(num_heads, grid[2], grid[0])
    tensors = gradient, out, sums, sinks.contiguous(), parts
    launch(_gradient_kernel, grid, *tensors, length, grid[0], grid[2], **_constants(num_heads, width))
    return parts.sum((1, 2)).neg_().to(sinks.dtype)


def _grid(out: Tensor) -> tuple[int, int, int]:
    num_rows, length, num_heads, _ = out.shape
    return -(-length // TOKENS), num_heads, num_rows


def _constants(num_heads: int, width: int) -> dict[str, int]:
    return {"num_heads": num_heads, "width": width, "WIDTH": 1 << (width - 1).bit_length(), "TOKENS": TOKENS}


@triton.jit(do_not_specialize=["num_tokens"])
def _add_kernel(
    out,
    sums,
    sinks,
    new,
    new_sums,
    num_tokens,
    of_row,
    of_head,
    of_token,
    of_column,
    num_heads: tl.constexpr,
    width: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    real = token < num_tokens
    place = (row * num_heads + head) * num_tokens + token
    before = tl.load(sums + place, mask=real, other=0.0)
    sink = tl.load(sinks + head).to(tl.float32)
    top = tl.maximum(before, sink)
    after = top + tl.log(tl.exp(before - top) + tl.exp(sink - top))
    tl.store(new_sums + place, after, mask=real)
    column = tl.arange(0, WIDTH)[None, :]
    inside = real[:, None] & (column < width)
    source = out + row * of_row + head * of_head + token[:, None] * of_token + column * of_column
    values = tl.load(source, mask=inside, other=0.0).to(tl.float32) * tl.exp(before - after)[:, None]
    target = new + ((row * num_tokens + token[:, None]) * num_heads + head) * width + column
    tl.store(target, values.to(new.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "num_rows"])
def _gradient_kernel(
    gradient,
    out,
    sums,
    sinks,
    parts,
    num_tokens,
    num_blocks,
    num_rows,
    num_heads: tl.constexpr,
    width: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    block, head, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    token = block * TOKENS + tl.arange(0, TOKENS)
    real = token < num_tokens
    column = tl.arange(0, WIDTH)[None, :]
    inside = real[:, None] & (column < width)
    places = ((row * num_tokens + token[:, None]) * num_heads + head) * width + column
    g = tl.load(gradient + places, mask=inside, other=0.0).to(tl.float32)
    o = tl.load(out + places, mask=inside, other=0.0).to(tl.float32)
    total = tl.load(sums + (row * num_heads + head) * num_tokens + token, mask=real, other=float("inf"))
    sink = tl.load(sinks + head).to(tl.float32)
    part = tl.sum(tl.exp(sink - total) * tl.sum(g * o, 1), 0)
    tl.store(parts + (head * num_rows + row) * num_blocks + block, part)
