"""Batches without their padding: only the tokens that are there are computed, one sequence after the other.

So are batches that have none, where transformers has no fast attention for them: with sinks, or windows shorter than T.

batch.py       [B,T] becomes [1,N] before a forward, and what comes out [B,T] again
rows.py        which tokens those are
attention.py   attention within each sequence
twin.py        the proof that a model's numbers stay the same
"""

import sys
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_accel.padding import attention
from moe_accel.padding.batch import Flat, Proof, by_name, flatten
from moe_accel.padding.twin import implementation_of, prove
from moe_accel.report import Choice


def install(model: Any, asked: str | bool = "auto", compiled: bool = False) -> Choice:
    """Let a model leave out padding where that provably changes no number; returns what was chosen and why.

    Attention that has no sdpa, or windows shorter than a row, is ours in batches without padding, too.

    Args:
        model: of transformers, its experts swapped.
        asked: `padding_free` of `moe_config`; False is what yaml makes of `off`.
        compiled: whether torch.compile is to compile it.
    """
    if asked in ("off", False):
        return Choice("computed", "asked for: padding_free: off")
    why_not = "torch.compile wants batches of one shape" if compiled else _why_not(model)
    proof = why_not or prove(model)
    if isinstance(proof, str):
        return Choice("computed", proof)
    if not hasattr(model, "_moe_accel_padding"):
        model.register_forward_pre_hook(_before, with_kwargs=True)
        model.register_forward_hook(_after, always_call=True)
    model._moe_accel_padding = proof
    _attend_without_sdpa(model)
    if proof.why_not:
        return Choice("computed", proof.why_not)
    but = [name for name, held in (("rows padded on the left", proof.left), ("packed rows", proof.packed)) if not held]
    more = f"; {' and '.join(but)} stay as they are" if but else ""
    return Choice("left out", f"in training with labels, the same numbers in a small copy of the model{more}")


def told_of_attention(model: Any) -> list[str]:
    """Notes for the report: which attention is ours without padding, too."""
    proof: Proof | None = getattr(model, "_moe_accel_padding", None)
    if proof is None or proof.whole_beyond is None:
        return []
    if implementation_of(model) == attention.NO_SDPA:
        what, instead = "for which transformers has no sdpa", "all scores [T, T]"
    else:
        what, instead = f"in windows of {proof.whole_beyond} tokens", "a mask [T, T] of longer rows"
    return [f"attention {what} by flash attention, of 16-bit floats where no cache is asked for, instead of {instead}"]


def _attend_without_sdpa(model: Any) -> None:
    """Ours where a model has no sdpa; for anything but a `Packed`, it is the model's own eager attention still."""
    config = model.config.get_text_config()
    for each in {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}.values():
        if type(each) is type(config) and each._attn_implementation == "eager":
            each._attn_implementation = attention.NO_SDPA


def _is_as_proven(model: Any) -> bool:
    """Whether masks are still made as was proven: other attention, or a compiled model inside, knows no `Packed`."""
    if model.config.get_text_config()._attn_implementation not in attention.KNOWN:
        return False
    inner = [model, getattr(model, model.base_model_prefix, model), getattr(model, "language_model", model)]
    inner.append(getattr(inner[1], "language_model", model))
    return not any(each._compiled_call_impl or type(each).__name__ == "OptimizedModule" for each in inner)


def _why_not(model: Any) -> str | None:
    if not isinstance(model, PreTrainedModel):
        return "not a model of transformers"
    config = model.config.get_text_config()
    known = config._attn_implementation
    if known == "eager" and not model._supports_sdpa:
        if getattr(config, "output_attentions", False):
            return "attention weights are asked for"
    elif known not in attention.KNOWN:
        return f"attn_implementation is {known}, and must be sdpa"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "device_map spreads its layers"
    for name, module in model.named_modules():
        own: Any = vars(module).get("forward")
        of_trl = module is model and getattr(own, "__globals__", {}).get("__name__", "").startswith("trl.")
        if own is not None and not of_trl:
            return f"somebody else replaced the forward of {name or 'the model'}"
        if getattr(module, "lora_variant", None):
            return f"LoRA's variants may look at other tokens ({name})"
    return None


def _before(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Around a forward of the model, before."""
    attention.install()  # a model that was pickled may be in another process now
    attention.current.set(None)
    proof: Proof = model._moe_accel_padding
    named = by_name(model, args, kwargs) if not torch.compiler.is_compiling() and _is_as_proven(model) else None
    flat = None if named is None else flatten(model, named, proof)
    if isinstance(flat, str) and not hasattr(model, "_moe_accel_padding_told"):
        model._moe_accel_padding_told = True
        print(f"moe-accel: padding of a batch is computed: {flat}", file=sys.stderr, flush=True)
    if not isinstance(flat, Flat):
        return None
    attention.current.set(flat.rows)
    return (), flat.kwargs


def _after(model: Any, args: Any, output: Any) -> Any:
    """And after: outputs as of the padded batch."""
    rows = None if torch.compiler.is_compiling() else attention.current.get()
    if rows is None:
        return None
    attention.current.set(None)
    if output is None:  # an error is on its way
        return None
    for name, value in list(output.items()):
        setattr(output, name, rows.as_padded(value))
    return output
