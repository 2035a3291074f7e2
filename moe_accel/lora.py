"""LoRA of PEFT on linear layers as one autograd function: two products added into the layer's own output.

PEFT computes `result + lora_B(lora_A(dropout(x))) * scaling`, six operations of which three pass over the whole output,
and as many gradients. Here the second product is accumulated into the first (`addmm`), forward and backward. Switches,
parameters and names stay PEFT's; whatever is more than one plain adapter on an `nn.Linear` stays with PEFT.

Layers that are called with the same x, as q, k and v, are one function (`siblings.py` says which): one product by all
their A, and one gradient of x, where autograd would add three in two passes over all of it.

PEFT makes the adapters of a bf16 model fp32 (`autocast_adapter_dtype`), and without autocast multiplies them in fp32,
by a copy of x in fp32. Here they are multiplied in bf16, as under autocast; their gradients and updates stay fp32.

Sizes: N rows, r rank.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.modules.module import _has_any_global_hook

from moe_accel.kernels.device import autocast_dtype, without_autocast
from moe_accel.siblings import ATTRIBUTE, Siblings, introduce
from moe_accel.swap import become, is_bare, own_class


def install(model: nn.Module, autocasts: bool = False) -> tuple[int, dict[str, int]]:
    """Let PEFT's LoRA layers around `nn.Linear` compute with `lora_linears` where they can.

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
    introduce(model, _Fused)
    return len(layers) - sum(reasons.values()), reasons


def num_rounded(model: nn.Module) -> int:
    """How many layers multiply fp32 adapters in bf16 where there is no autocast."""
    layers: list[Any] = [each for each in model.modules() if isinstance(each, _Fused)]
    dtypes = [_dtypes(each, *_active(each)) for each in layers if _why_with_peft(each, False) is None]
    return sum(_rounds(weight, a) for weight, a, _ in dtypes)


def _why_with_peft(layer: Any, autocasts: bool) -> str | None:
    """What a user has chosen that `lora_linears` does not compute in training; None: it computes the layer."""
    active = _active(layer)
    if type(layer.base_layer) is not nn.Linear:
        return "a base layer with a way of its own, as in FP8"
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
    """Whether `lora_linears` takes these dtypes: all alike, or adapters that it rounds."""
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
    return "forward" not in vars(module) and own_class(module.base_layer) is nn.Linear


class Part(NamedTuple):
    """A linear layer and its adapter.

    Attributes:
        weight: [out,in].
        bias: [out] or None.
        a: [r,in].
        b: [out,r].
        scaling: of the adapter.
    """

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scaling: float


class _Fused(nn.Module):
    """What a LoRA layer of PEFT does instead."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """One product with the other in it, where it is one plain adapter; else PEFT's own."""
        part = None if args or kwargs or torch.compiler.is_compiling() else _plain_part(self)
        if part is None:
            return super().forward(x, *args, **kwargs)
        dtype = autocast_dtype(x.device)
        if not _takes(x, part, dtype):
            return super().forward(x)
        siblings: Siblings | None = self.__dict__.get(ATTRIBUTE)
        if siblings is None or not torch.is_grad_enabled() or x.is_inference() or not is_bare(self):
            return lora_linears(x, [part], dtype)[0]
        made = siblings.made(self, x, (*part, dtype))
        if made is not None:
            return made
        layers, parts = [self], [part]
        for each in siblings.together(self, x):
            other = _plain_part(each) if is_bare(each) else None
            if other is not None and _takes(x, other, dtype):
                layers.append(each)
                parts.append(other)
        output, *others = lora_linears(x, parts, dtype)
        if others:
            siblings.keep(x, layers[1:], others, [(*other, dtype) for other in parts[1:]])
        return output


def _plain_part(layer: Any) -> Part | None:
    """The layer with the one adapter that is active, if it is LoRA and nothing else.

    Modules and parameters are looked up where `nn.Module` has them: its own lookup takes as long as a launch.
    """
    if layer.disable_adapters or layer.merged or _has_any_global_hook():
        return None
    modules = layer._modules
    of_a = modules["lora_A"]._modules
    active = [name for name in layer.active_adapters if name in of_a]
    if len(active) != 1 or active[0] in layer.lora_variant:
        return None
    name = active[0]
    base, a, b = modules["base_layer"], of_a[name], modules["lora_B"]._modules[name]
    dropout = modules["lora_dropout"]._modules[name]
    if not (type(base) is type(a) is type(b) is nn.Linear):
        return None
    if dropout.training and type(dropout) is not nn.Identity and getattr(dropout, "p", 1) > 0:
        return None
    if not (is_bare(base) and is_bare(a) and is_bare(b) and is_bare(dropout)):
        return None
    of_base, of_a, of_b = base._parameters, a._parameters, b._parameters
    if of_a["bias"] is not None or of_b["bias"] is not None:
        return None
    return Part(of_base["weight"], of_base["bias"], of_a["weight"], of_b["weight"], layer.scaling[name])


def _takes(x: Tensor, part: Part, autocast: torch.dtype | None) -> bool:
    """Whether `lora_linears` takes these dtypes, and whole tensors."""
    weight, _, a, b, _ = part
    if isinstance(x, DTensor) or isinstance(weight, DTensor) or isinstance(a, DTensor) or isinstance(b, DTensor):
        return False
    return autocast is not None or (x.dtype == weight.dtype and _computes(weight.dtype, a.dtype, b.dtype))


def lora_linears(x: Tensor, parts: Sequence[Part], autocast: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """`x @ weight.T + bias + scaling * x @ a.T @ b.T` of each part, as one function with one gradient of x.

    Args:
        x: [...,in].
        parts: one at least, all of the same `in`; weights of the dtype of x, biases and adapters of any.
        autocast: what x and the weights are cast to, as autocast would; None: they are multiplied as they are.

    Returns:
        [...,out] of each part, differentiable once in every tensor.
    """
    if autocast is not None:
        x = x.to(autocast)
        parts = [part._replace(weight=part.weight.to(autocast)) for part in parts]
    with without_autocast(x.device):
        function: Any = _LoraLinears.apply
        scalings = [part.scaling for part in parts]
        return function(x, scalings, *(each for part in parts for each in part[:4]))


class _LoraLinears(torch.autograd.Function):
    """The parts' A lie below each other, so that `low` [N,r of all parts], what its gradient adds to that of x, and the
    gradients of all A are one product each. Gradients of x are summed in their products, not in passes of their own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scalings: list[float], *given: Any) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        weights, biases, a_parts, b_parts = given[::4], given[1::4], given[2::4], given[3::4]
        a = (a_parts[0] if len(a_parts) == 1 else torch.cat(a_parts)).to(x.dtype)
        b_parts = [each.to(x.dtype) for each in b_parts]
        low = x.reshape(-1, x.shape[-1]) @ a.t()
        ctx.ranks, outputs = [len(each) for each in a_parts], []
        for weight, bias, b, scaling, part in zip(
            weights, biases, b_parts, scalings, _columns(low, ctx.ranks), strict=True
        ):
            output = functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
            output.view(-1, len(weight)).addmm_(part, b.t(), alpha=scaling)
            outputs.append(output)
        ctx.scalings, ctx.dtypes = scalings, [None if each is None else each.dtype for each in given]
        ctx.save_for_backward(x, a, low, *weights, *b_parts)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, a, low, *rest = ctx.saved_tensors
        num_parts, needs_x = len(ctx.ranks), ctx.needs_input_grad[0]
        weights, b_parts = rest[:num_parts], rest[num_parts:]
        whole = all(each is not None for each in gradients)
        low_grad = torch.empty_like(low) if whole else torch.zeros_like(low)
        x_rows, x_grad = x.reshape(-1, x.shape[-1]), None
        found: list[Tensor | None] = [None] * (4 * num_parts)
        columns = zip(_columns(low, ctx.ranks), _columns(low_grad, ctx.ranks), strict=True)
        for at, (part, part_grad) in enumerate(columns):
            gradient, weight, b, scaling = gradients[at], weights[at], b_parts[at], ctx.scalings[at]
            if gradient is None:
                continue
            needs_weight, needs_bias, _, needs_b = ctx.needs_input_grad[2 + 4 * at : 6 + 4 * at]
            rows = gradient.reshape(-1, len(weight))
            torch.addmm(part, rows, b, beta=0, alpha=scaling, out=part_grad)
            if needs_x:
                x_grad = rows @ weight if x_grad is None else x_grad.addmm_(rows, weight)
            found[4 * at] = rows.t() @ x_rows if needs_weight else None
            found[4 * at + 1] = rows.sum(0) if needs_bias else None
            found[4 * at + 3] = torch.addmm(b, rows.t(), part, beta=0, alpha=scaling) if needs_b else None
        if x_grad is not None:
            x_grad = x_grad.addmm_(low_grad, a).view(x.shape)
        if any(ctx.needs_input_grad[4::4]):
            a_grad, start = low_grad.t() @ x_rows, 0
            for at, rank in enumerate(ctx.ranks):
                found[4 * at + 2] = None if gradients[at] is None else a_grad[start : start + rank]
                start += rank
        dtypes = zip(found, ctx.dtypes, strict=True)
        return x_grad, None, *(None if each is None else each.to(dtype) for each, dtype in dtypes)


def _columns(low: Tensor, ranks: list[int]) -> tuple[Tensor, ...]:
    """Each part's columns of `low`."""
    return (low,) if len(ranks) == 1 else low.split(ranks, 1)
