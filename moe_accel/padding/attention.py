"""Attention among the tokens of each sequence, where sequences stand one after the other, without a mask [N,N].

transformers makes a mask once a forward and hands it to every attention layer. Here that mask is a `Packed`, which says
where the sequences begin; recompute gets it too, as an argument of the layer. Nothing but our attention can compute
with it: a layer that does anything else with its mask stops, and does not attend where it should not.

transformers has no sdpa for some models, such as those with sinks (GPT-OSS and its like), whose attention makes all
scores [T,T] of every head. `NO_SDPA` is an implementation for them: their own eager function, and with a `Packed` the
attention here.

Sizes: N tokens, Q query heads, K key/value heads, D their width, V that of values.
"""

import inspect
import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend
from torch.nn.attention.varlen import varlen_attn
from transformers import masking_utils
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from moe_accel.errors import UnsupportedModelError
from moe_accel.kernels import sinks as sink_kernels
from moe_accel.kernels import te_attention
from moe_accel.kernels.device import HAS_TRITON, as_autocast, capability
from moe_accel.padding.rows import Rows, Slots

current: ContextVar[Rows | None] = ContextVar("current", default=None)
"""The tokens of the batch that a model computes now, while it makes its masks."""

windows: ContextVar[set[int | None] | None] = ContextVar("windows", default=None)
"""The windows of the masks that were made, where somebody wants to know."""

NO_SDPA = "moe_accel"
"""The name of an attention implementation, as in `config._attn_implementation`."""

KNOWN = ("sdpa", NO_SDPA)
"""The implementations that know a `Packed`."""

_MARK = "_moe_accel_packed"

BY_TE = "_moe_accel_te_attention"
"""Set on the attention modules whose attention TransformerEngine computes."""


@dataclass(frozen=True, eq=False)
class Packed:
    """Stands for the mask of one row of sequences: causal within each, nothing between two.

    Attributes:
        rows: the sequences.
        window: how many tokens a token sees, itself among them; None: all before it.
    """

    rows: Rows | Slots
    window: int | None

    @property
    def narrow_window(self) -> int | None:
        """The window where it leaves out a token of any sequence; else None."""
        return None if self.window is None or self.window >= self.rows.longest else self.window


def install() -> None:
    """Let transformers' `sdpa` attention know packed sequences, and add `NO_SDPA`; all else stays as it was."""
    for interface, around in ((AttentionMaskInterface, _mask), (AttentionInterface, _attention)):
        known = interface._global_mapping["sdpa"]
        if not hasattr(known, _MARK):
            interface.register("sdpa", around(known))
    if NO_SDPA not in AttentionInterface._global_mapping:
        if "paged|sdpa" in AttentionInterface._global_mapping:  # before 5.23 generate_batch asks for it by this name
            AttentionInterface.register(f"paged|{NO_SDPA}", AttentionInterface._global_mapping["paged|eager"])
        AttentionMaskInterface.register(NO_SDPA, _mask(masking_utils.eager_mask))
        AttentionInterface.register(NO_SDPA, _attention(_eager))


def eager_of(module: nn.Module) -> Callable | None:
    """The eager attention of the file of a module's class, or of one that this is derived from; None: it has none."""
    found = (
        getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None) for kind in type(module).__mro__
    )
    return next(filter(None, found), None)


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    eager = eager_of(module)
    assert eager is not None, f"{type(module).__name__} has no eager attention"  # models are proven beforehand
    return eager(module, *args, **kwargs)


def _mask(original: Callable) -> Callable:
    def packed_mask(*args: Any, **kwargs: Any) -> Any:
        rows = None if torch.compiler.is_compiling() else current.get()
        if rows is None:
            return original(*args, **kwargs)
        packed = Packed(rows, window_of(**kwargs))
        asked = windows.get()
        if asked is not None:
            asked.add(packed.window)
        return packed

    setattr(packed_mask, _MARK, True)
    return packed_mask


def _attention(original: Callable) -> Callable:
    def packed_attention_forward(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
    ) -> Any:
        by_te = getattr(module, BY_TE, False) and not torch.compiler.is_compiling()
        if not isinstance(attention_mask, Packed):
            if by_te and attention_mask is None and is_plain(module, query, key, **kwargs):
                done = _by_te(query, key, value, None, kwargs.get("scaling"))
                if done is not None:
                    return done, None
            return original(module, query, key, value, attention_mask, **kwargs)
        for name in ("dropout", "position_bias", "softcap"):
            given = kwargs.get(name)
            if isinstance(given, Tensor) or given:
                raise unsupported(f"attention with {name}")
        scale, sinks = kwargs.get("scaling"), kwargs.get("s_aux")
        by_te = by_te and sinks is None and isinstance(attention_mask.rows, Rows)  # of slots nobody has tried it
        done = _by_te(query, key, value, attention_mask, scale) if by_te else None
        return attend(query, key, value, attention_mask, scale, sinks) if done is None else done, None

    setattr(packed_attention_forward, _MARK, True)
    return packed_attention_forward


def let_te_attend(model: nn.Module) -> int:
    """Let TransformerEngine compute the causal attention of a model under `sdpa`; returns of how many layers."""
    install()
    found = [module for module in model.modules() if getattr(module, "is_causal", False)]
    for module in found:
        setattr(module, BY_TE, True)
    return len(found)


def is_plain(
    module: Any, query: Tensor, key: Tensor, dropout: float = 0.0, is_causal: bool | None = None, **rest: Any
) -> bool:
    """Whether sdpa without a mask would be causal attention and nothing else: of all tokens, each to those before."""
    asked = module.is_causal if is_causal is None else is_causal
    others = [each for name in ("position_bias", "softcap", "s_aux") if (each := rest.get(name)) is not None]
    return bool(asked) and query.shape[2] == key.shape[2] > 1 and not dropout and not others


def _by_te(query: Tensor, key: Tensor, value: Tensor, mask: Packed | None, scale: float | None) -> Tensor | None:
    """Causal attention by TransformerEngine, of rows or of packed sequences: [B,T,Q,V]; None where it takes none."""
    query, key, value = as_autocast(query, key, value)
    if not te_attention.takes(query, value):
        return None
    scale = scale_of(query, scale)
    with torch.autocast(query.device.type, enabled=False):
        if mask is None:
            if not te_attention.suits(query, key, value, scale, "bshd"):
                return None
            return te_attention.attend_rows(query, key, value, scale)
        window = mask.narrow_window
        if not te_attention.suits(query, key, value, scale, "thd", window is not None):
            return None
        q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
        return te_attention.attend_packed(q, k, v, mask.rows.bounds, mask.rows.longest, window, scale).unsqueeze(0)


def window_of(mask_function: Any = None, local_size: int | None = None, **rest: Any) -> int | None:
    """The window of a causal mask that transformers asks for; None: there is no window.

    Raises:
        UnsupportedModelError: it asks for another mask.
    """
    causal = masking_utils.causal_mask_function
    if local_size is not None:
        causal = masking_utils.sliding_window_causal_mask_function(local_size)
    if rest.get("use_vmap") or not _same(mask_function, causal):
        raise unsupported("a mask that is neither causal nor a sliding window")
    if rest.get("q_length") != rest.get("kv_length") or rest.get("q_offset", 0) or rest.get("kv_offset", 0):
        raise unsupported("keys and values of earlier tokens")
    return local_size


def _same(one: Any, other: Any) -> bool:
    """Whether two functions have the same code, and in their closures the same numbers and functions."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if not (inspect.isfunction(one) and inspect.isfunction(other)):
        return type(one) is type(other) is int and one == other
    closures = [tuple(cell.cell_contents for cell in each.__closure__ or ()) for each in (one, other)]
    return one.__code__ is other.__code__ and _same(*closures)


def unsupported(what: str) -> UnsupportedModelError:
    """The error of something that is not computed without padding."""
    return UnsupportedModelError(f"{what} cannot be computed without padding", "moe_config: {padding_free: off}")


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Packed, scale: float | None, sinks: Tensor | None = None
) -> Tensor:
    """Attention of packed sequences.

    Args:
        query: [1,Q,N,D].
        key: [1,K,N,D]; K divides Q.
        value: [1,K,N,V].
        mask: where the sequences are.
        scale: of the scores; None: D to the power of -1/2.
        sinks: [Q], one more score of each head, without a value; None: there is none.

    Returns:
        [1,N,Q,V], contiguous.

    Raises:
        RuntimeError: the sequences are in slots, and one kernel cannot compute them all.
    """
    query, key, value = as_autocast(query, key, value)
    scale = scale_of(query, scale)
    with torch.autocast(query.device.type, enabled=False):
        if not fits_kernel(query, value) or (sinks is not None and not HAS_TRITON):
            if query.is_cuda and isinstance(mask.rows, Slots):
                raise RuntimeError("sequences of other lengths every time, not by flash attention")
            return by_sequence(query, key, value, mask, scale, sinks)
        if mask.window is None and mask.rows.are_alike:
            done = by_row(query, key, value, mask, scale, sinks)
            if done is not None:
                return done
        return by_kernel(query, key, value, mask, scale, sinks)


def scale_of(query: Tensor, scale: float | None) -> float:
    """The scale of the scores of queries [...,D]; None: D to the power of -1/2."""
    return cast(float, query.shape[-1] ** -0.5 if scale is None else scale)


def fits_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether torch's flash attention takes these: 16-bit floats on a GPU, heads of at most 256."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16) or query.dtype != value.dtype:
        return False
    width = query.shape[-1]
    return width % 8 == 0 and value.shape[-1] <= width <= 256 and capability(query.device) >= (8, 0)


@cache
def _knows_groups() -> bool:
    """torch 2.11 wants as many heads of keys as of queries; later ones take fewer."""
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def by_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: Packed, scale: float, sinks: Tensor | None = None
) -> Tensor:
    """`attend` by one kernel for all sequences."""
    width = value.shape[-1]
    if width < query.shape[-1]:
        value = functional.pad(value, (0, query.shape[-1] - width))
    groups = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {"enable_gqa": True} if groups > 1 and _knows_groups() else {}
    if groups > 1 and not options and sinks is None:
        key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
    bounds, longest, window = mask.rows.bounds, mask.rows.longest, mask.narrow_window
    if sinks is not None:
        span = sink_kernels.Span(bounds, longest, window, scale)
        out = sink_kernels.attend(query, key, value, sinks, span)
    else:
        sizes = (-1 if window is None else window - 1, 0)
        out: Any = varlen_attn(
            query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=sizes, **options
        )
    return out[..., :width].contiguous().unsqueeze(0)


def by_row(
    query: Tensor, key: Tensor, value: Tensor, mask: Packed, scale: float, sinks: Tensor | None = None
) -> Tensor | None:
    """`attend` of sequences of one length without windows, by the kernel that sdpa chooses for them as rows.

    cuDNN is faster than `by_kernel`. None where sdpa has no kernel for them, or with sinks another one than cuDNN.
    """
    num_rows = len(mask.rows.lengths)
    q, k, v = (each[0].unflatten(1, (num_rows, -1)).transpose(0, 1) for each in (query, key, value))
    chosen = sdpa_choice(q, k, v, scale)
    if chosen == SDPBackend.MATH or (sinks is not None and chosen != SDPBackend.CUDNN_ATTENTION):
        return None
    if sinks is None:
        has_groups = q.shape[1] != k.shape[1]
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=has_groups)
        out = out.transpose(1, 2)
    else:
        out = sink_kernels.attend_rows(q, k, v, sinks, scale)
    return out.flatten(0, 1).contiguous().unsqueeze(0)


def sdpa_choice(query: Tensor, key: Tensor, value: Tensor, scale: float) -> SDPBackend:
    """The kernels that sdpa would compute causal rows [B,Q,T,D] with."""
    has_groups = query.shape[1] != key.shape[1]
    choice: Any = torch
    chosen = choice._fused_sdp_choice(query, key, value, None, 0.0, True, scale=scale, enable_gqa=has_groups)
    return next((each for each in SDPBackend.__members__.values() if each.value == chosen), SDPBackend.MATH)


def by_sequence(
    query: Tensor, key: Tensor, value: Tensor, mask: Packed, scale: float, sinks: Tensor | None = None
) -> Tensor:
    """`attend` one sequence after the other: the definition."""
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, 1) if groups > 1 else each for each in (key, value))
    done = []
    for q, k, v in zip(*(each.split(mask.rows.lengths, 2) for each in (query, key, value)), strict=True):
        length = q.shape[2]
        seen = None
        if mask.window is not None and mask.window < length:
            at = torch.arange(length, device=query.device)
            distance = at[:, None] - at
            seen = (distance >= 0) & (distance < mask.window)
        if not length:
            continue
        if sinks is None:
            how = {"attn_mask": seen, "is_causal": seen is None, "scale": scale}
            done.append(functional.scaled_dot_product_attention(q, k, v, **how))
        else:
            done.append(_with_sinks(q, k, v, seen, scale, sinks))
    return torch.cat(done, 2).transpose(1, 2).contiguous()


def _with_sinks(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scale: float, sinks: Tensor) -> Tensor:
    """One sequence: [1,Q,L,D] and [1,Q,L,V] -> [1,Q,L,V], of scores [L,L] in fp32 or more."""
    scores = (query @ key.transpose(-1, -2) * scale).to(torch.promote_types(query.dtype, torch.float32))
    if seen is None:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~seen, -torch.inf)
    sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    return weights.to(value.dtype) @ value
