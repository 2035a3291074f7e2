"""TransformerEngine's DotProductAttention, causal, of rows or of packed sequences: by cuDNN, or flash attention.

Taken under `kernels: te` with `attention` among `te_parts`. Its modules have no parameters: one is kept for each kind
of heads (`attention/dot_product_attention/dot_product_attention.py`, 2.20.2).

Sizes: N tokens, B rows, T tokens of a row, Q query heads, K key/value heads, D their width, V that of values.
"""

import functools
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moe_accel.kernels import te

_TAKES = {"qkv_format", "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv", "window_size"}


def takes(query: Tensor, value: Tensor) -> bool:
    """Whether these are for TransformerEngine: 16-bit floats on a GPU, heads of whole 16 bytes and of at most 256."""
    widths = query.shape[-1], value.shape[-1]
    fits = query.dtype == value.dtype and query.dtype in te.DTYPES
    return fits and te.on_gpu(query) and all(width % 8 == 0 and width <= 256 for width in widths)


def suits(query: Tensor, key: Tensor, value: Tensor, scale: float, form: str, is_windowed: bool = False) -> bool:
    """Whether a fused kernel of it is for such heads [...,D], as rows (`bshd`) or packed (`thd`); asked once a kind.

    Where none is, it would make all scores [T,T], or stop.
    """
    sizes = query.shape[1], key.shape[1], query.shape[-1], value.shape[-1]
    return _suits(*sizes, scale, form, is_windowed, query.dtype, query.device)


@functools.cache
def _suits(
    num_heads: int,
    num_key_heads: int,
    width: int,
    value_width: int,
    scale: float,
    form: str,
    is_windowed: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> bool:
    shapes = (num_heads, width), (num_key_heads, width), (num_key_heads, value_width)
    query, key, value = (torch.zeros(1, heads, 64, each, dtype=dtype, device=device) for heads, each in shapes)
    bounds = torch.tensor([0, 24, 64], dtype=torch.int32, device=device)
    on_gpu = [device] if device.type == "cuda" else []
    # nothing is saved and no random number used up: a recompute does not ask again, and must see the same
    with torch.no_grad(), torch.random.fork_rng(devices=on_gpu):
        try:
            if form == "bshd":
                attend_rows(query, key, value, scale)
            else:
                q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
                attend_packed(q, k, v, bounds, 40, 8 if is_windowed else None, scale)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, AssertionError) as error:
            return _refused(num_heads, width, f"{type(error).__name__}: {str(error).splitlines()[0]}")
    chosen = getattr(te.load("transformer_engine.pytorch.attention.dot_product_attention"), "_attention_backends", {})
    if chosen.get("use_unfused_attention", False):
        return _refused(num_heads, width, "it would make all scores [T,T]")
    return True


def _refused(num_heads: int, width: int, why: str) -> bool:
    heads = f"{num_heads} heads of {width}"
    print(f"moe-accel: TransformerEngine has no fused attention for {heads}: {why}", file=sys.stderr, flush=True)
    return False


def attend_rows(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of rows: query [B,Q,T,D], key [B,K,T,D], value [B,K,T,V] -> [B,T,Q,V], contiguous."""
    # other strides would be read wrongly
    query, key, value = (each.transpose(1, 2).contiguous() for each in (query, key, value))
    module = _module(*_heads(query, key, value), scale, "bshd")
    return module(query, key, value).unflatten(-1, (query.shape[2], -1))


def attend_packed(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, window: int | None, scale: float
) -> Tensor:
    """Causal attention within packed sequences.

    Args:
        query: [N,Q,D].
        key: [N,K,D].
        value: [N,K,V].
        bounds: [sequences + 1] int32, on the device: where each begins, and N.
        longest: tokens of the longest sequence.
        window: how many tokens a token sees, itself among them; None: all before it.
        scale: of the scores.

    Returns:
        [N,Q,V].
    """
    module = _module(*_heads(query, key, value), scale, "thd")
    spans = {"cu_seqlens_q": bounds, "cu_seqlens_kv": bounds, "max_seqlen_q": longest, "max_seqlen_kv": longest}
    sizes = (-1 if window is None else window - 1, 0)
    out = module(*(each.contiguous() for each in (query, key, value)), **spans, window_size=sizes)
    return out.view(len(query), query.shape[1], value.shape[-1])


def _heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, int, int, int]:
    """Q, K, D and V of [...,heads,width]."""
    return query.shape[-2], key.shape[-2], query.shape[-1], value.shape[-1]


@functools.cache
def _module(num_heads: int, num_key_heads: int, width: int, value_width: int, scale: float, form: str) -> Any:
    how = {"qkv_format": form, "attn_mask_type": "causal" if form == "bshd" else "padding_causal"}
    return _kind()(num_heads, (width, value_width), num_gqa_groups=num_key_heads, softmax_scale=scale, **how)


@functools.cache
def _kind() -> Any:
    return te.load("transformer_engine.pytorch").DotProductAttention


def lookup() -> str | None:
    """What its attention of this version does not take; None where it takes all that it is given here."""
    return te.missing("DotProductAttention", _kind().forward, _TAKES)


def tried(device: torch.device) -> str | None:
    """What is wrong with one attention, and with one of packed sequences; None where both are right."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 16, 64, generator=generator) for heads in (4, 2, 2))
    query, key, value = (each.to(device, torch.bfloat16) for each in (query, key, value))

    def exact(part: slice) -> Tensor:
        q, k, v = (each[:, :, part].float() for each in (query, key, value))
        k, v = (each.repeat_interleave(2, 1) for each in (k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.125).transpose(1, 2)

    def compute() -> list[Tensor]:
        bounds = torch.tensor([0, 6, 16], dtype=torch.int32, device=device)
        q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
        return [attend_rows(query, key, value, 0.125), attend_packed(q, k, v, bounds, 10, None, 0.125)]

    both = torch.cat([exact(slice(0, 6)), exact(slice(6, 16))], 1)[0]
    return te.off("DotProductAttention", compute, [exact(slice(None)), both])
