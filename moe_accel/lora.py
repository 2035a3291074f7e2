"""LoRA of PEFT on linear layers as one autograd function: two products added into the layer's own output.

PEFT computes `result + lora_B(lora_A(dropout(x))) * scaling`, six operations of which three pass over the whole output,
and as many gradients. Here the second product is accumulated into the first (`addmm`), forward and backward. Switches,
parameters and names stay PEFT's; whatever is more than one plain adapter on an `nn.Linear` stays with PEFT.

PEFT makes the adapters of a bf16 model fp32 (`autocast_adapter_dtype`), and without autocast multiplies them in fp32,
by a copy of x in fp32. Here they are multiplied in bf16, as under autocast; their gradients and updates stay fp32.

Sizes: N rows, r rank.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.modules.module import _has_any_global_hook

from moe_accel.kernels.device import as_autocast
from moe_accel.swap import become, is_bare


def install(model: nn.Module, autocasts: bool = False) -> tuple[int, dict[str, int]]:
    """Let PEFT's LoRA layers around `nn.Linear` compute with `lora_linear` where they can.

    Args:
        model: with adapters or without.
        autocasts: whether it is trained under autocast, which makes all dtypes one.

    Returns:
        How many layers do so in training as they are now; and how many stay with PEFT there, by the reason.
    """
    layers: list[Any] = [each for each in model.modules() if _is_lora_linear(each)]
    reasons: dict[str, int] = {}
    for layer in layers:
        become(layer, _Fused)
        if reason := _why_with_peft(layer, autocasts):
            reasons[reason] = reasons.get(reason, 0) + 1
    return len(layers) - sum(reasons.values()), reasons


def num_rounded(model: nn.Module) -> int:
    """How many layers multiply fp32 adapters in bf16 where there is no autocast."""
    layers: list[Any] = [each for each in model.modules() if isinstance(each, _Fused)]
    dtypes = [_dtypes(each, *_active(each)) for each in layers if _why_with_peft(each, False) is None]
    return sum(_rounds(weight, a) for weight, a, _ in dtypes)


def _why_with_peft(layer: Any, autocasts: bool) -> str | None:
    """What a user has chosen that `lora_linear` does not compute in training; None: it computes the layer."""
    active = _active(layer)
    if len(active) != 1:
        return f"{len(active)} active adapters"
    name = active[0]
    if name in layer.lora_variant:
        return type(layer.lora_variant[name]).__name__
    if getattr(layer.lora_dropout[name], "p", 0) > 0:
        return "lora_dropout"
    if layer.lora_B[name].bias is not None:
        return "lora_bias"
    weight, a, b = _dtypes(layer, name)
    if autocasts or _computes(weight, a, b):
        return None
    return f"adapters in {_said(a, b)} on weights in {_said(weight)}"


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _dtypes(layer: Any, name: str) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Of the weight, of A and of B."""
    return layer.base_layer.weight.dtype, layer.lora_A[name].weight.dtype, layer.lora_B[name].weight.dtype


def _computes(weight: torch.dtype, a: torch.dtype, b: torch.dtype) -> bool:
    """Whether `lora_linear` takes these dtypes: all alike, or adapters that it rounds."""
    return a == b and (a == weight or _rounds(weight, a))


def _rounds(weight: torch.dtype, adapter: torch.dtype) -> bool:
    """Whether these are fp32 adapters on a bf16 weight."""
    return (weight, adapter) == (torch.bfloat16, torch.float32)


def _said(*dtypes: torch.dtype) -> str:
    return " and ".join(sorted({str(each).removeprefix("torch.") for each in dtypes}))


def _is_lora_linear(module: nn.Module) -> bool:
    kind = type(module)
    if (kind.__module__, kind.__name__) != ("peft.tuners.lora.layer", "Linear"):
        return False
    return "forward" not in vars(module) and type(module.base_layer) is nn.Linear


class _Fused(nn.Module):
    """What a LoRA layer of PEFT does instead."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """One product with the other in it, where it is one plain adapter; else PEFT's own."""
        name = None if args or kwargs or torch.compiler.is_compiling() else _plain_adapter(self)
        if name is None:
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        operands = x, base.weight, self.lora_A[name].weight, self.lora_B[name].weight
        x_, weight, a, b = as_autocast(*operands)
        takes = x_.dtype == weight.dtype and _computes(weight.dtype, a.dtype, b.dtype)
        if not takes or any(isinstance(each, DTensor) for each in operands):
            return super().forward(x)
        a, b = a.to(x_.dtype), b.to(x_.dtype)
        return lora_linear(x_, weight, base.bias, a, b, self.scaling[name])


def _plain_adapter(layer: Any) -> str | None:
    """The one adapter that is active, if it is LoRA and nothing else."""
    if layer.disable_adapters or layer.merged:
        return None
    active = _active(layer)
    if len(active) != 1 or active[0] in layer.lora_variant:
        return None
    name = active[0]
    dropout = layer.lora_dropout[name]
    drops = not isinstance(dropout, nn.Identity) and dropout.training and getattr(dropout, "p", 1) > 0
    parts = layer.lora_A[name], layer.lora_B[name], layer.base_layer
    bare = all(map(is_bare, (*parts, dropout))) and not _has_any_global_hook()
    plain = all(type(part) is nn.Linear for part in parts)
    biased = any(part.bias is not None for part in parts[:2])
    return None if drops or biased or not (bare and plain) else name


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """`x @ weight.T + bias + scaling * x @ a.T @ b.T`.

    Args:
        x: [...,in].
        weight: [out,in].
        bias: [out] or None.
        a: [r,in].
        b: [out,r]; all of one dtype.
        scaling: of the adapter.

    Returns:
        [...,out], differentiable once in every tensor.
    """
    with torch.autocast(x.device.type, enabled=False):
        rows: Any = _LoraLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias, a, b, scaling)
    return rows.view(*x.shape[:-1], weight.shape[0])


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Any, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        low = x @ a.t()
        out = functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
        out.addmm_(low, b.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scaling, ctx.bias_dtype = scaling, None if bias is None else bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        (gradient,) = gradients
        needs_x, needs_weight, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:5]
        low_grad = torch.addmm(low, gradient, b, beta=0, alpha=ctx.scaling)
        x_grad = None
        if needs_x:
            x_grad = gradient @ weight
            x_grad.addmm_(low_grad, a)
        b_grad = torch.addmm(b, gradient.t(), low, beta=0, alpha=ctx.scaling) if needs_b else None
        return (
            x_grad,
            gradient.t() @ x if needs_weight else None,
            gradient.sum(0).to(ctx.bias_dtype) if needs_bias else None,
            low_grad.t() @ x if needs_a else None,
            b_grad,
            None,
        )
