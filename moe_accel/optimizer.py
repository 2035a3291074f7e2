"""`torch.optim.AdamW(fused=True)` and `Adam(fused=True)`, updated at the speed of memory where parameters are large.

The optimizer stays torch's: its class, its state, its hooks, what it saves. Of what it collects for a step, large
parameters are updated by `kernels/adam.py`, and what is left goes on to torch's own kernel. By that alone the optimizer
takes 33 of the 208 ms of a full step of 8 layers of Qwen3-30B-A3B, and 19 so (one H200, 2026-11-26).
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._guards import TracingContext
from torch.distributed.tensor import DTensor

from moe_accel.hooks import wrap
from moe_accel.kernels import adam
from moe_accel.kernels.device import HAS_TRITON, INTERPRETED, use_triton
from moe_accel.ranks import tell

LARGE = 1 << 20
"""Elements of this rank from which a parameter gets a kernel of its own; torch updates many small ones at once. So many
in bf16 are 4 microseconds of an H200's memory, about what a launch takes."""

_installed: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
"""Optimizers, and whether it was said that the kernel updates them."""


def install(optimizer: Any, device: torch.device) -> None:
    """Let large parameters of a fused Adam or AdamW of torch be updated by the kernel; any other is left alone.

    Rank 0 says so at the first step that does it.

    `device`: where the parameters are when it steps; they may not be there yet.
    """
    known = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and optimizer not in _installed
    if not known or not _has_kernels(device):
        return
    name = type(optimizer).__name__
    if any(group["fused"] for group in optimizer.param_groups):
        wrap(type(optimizer), "_init_group", _init_group)  # AdamW's is Adam's, until Dynamo gives it one of its own
        _installed[optimizer] = False
    else:
        tell(f"{name} reads and writes memory for every operation: {name}(..., fused=True) takes a quarter of the time")


def _has_kernels(device: torch.device) -> bool:
    return HAS_TRITON and (device.type == "cuda" or INTERPRETED)


def _init_group(original: Callable) -> Callable:
    """Around the method by which `step` collects a group's parameters, gradients, moments and step numbers."""

    def init_group(self: Any, group: dict[str, Any], *lists: list[Any]) -> bool:
        has_complex = original(self, group, *lists)
        if self in _installed and _can_step(self, group) and _step_large(group, *lists) and not _installed[self]:
            _installed[self] = True
            tell(f"{type(self).__name__} updates each large parameter in one pass")
        return has_complex

    return init_group


def _can_step(optimizer: Any, group: dict[str, Any]) -> bool:
    """Whether the group's step is one that the kernel computes: floats for numbers, no fp16 scaler that may skip it.

    And whether it is one: Dynamo runs this while it compiles a step, to see what there is.
    """
    scaled = any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf"))
    numbers = group["lr"], group["eps"], group["weight_decay"], *group["betas"]
    plain = not any(isinstance(each, Tensor) for each in numbers)
    ours = group["fused"] and not group["amsgrad"] and not group["differentiable"]
    traced = torch.compiler.is_compiling() or TracingContext.try_get() is not None  # torch 2.11 says the second alone
    return ours and plain and not scaled and not traced


def _step_large(
    group: dict[str, Any],
    parameters: list[Tensor],
    gradients: list[Tensor],
    firsts: list[Tensor],
    seconds: list[Tensor],
    largest: list[Tensor],
    steps: list[Tensor],
) -> bool:
    """Update large parameters, and take them from the lists; whether there are any. `largest` is empty here.

    What is left is left as this rank's parts: torch takes milliseconds to find those of some hundred DTensors.
    """
    taken: dict[torch.device, list[tuple[tuple[Tensor, ...], Tensor]]] = {}
    left: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None, Tensor]] = []
    for *each, number in zip(parameters, gradients, firsts, seconds, steps, strict=True):
        tensors = _local(tuple(each))
        if tensors is not None and _is_large(tensors):
            taken.setdefault(tensors[0].device, []).append((tensors, number))
        else:
            left.append((tuple(each), tensors, number))
    how = adam.Adam(
        *(float(each) for each in (group["lr"], *group["betas"], group["eps"], group["weight_decay"])),
        decoupled=group["decoupled_weight_decay"],
        maximize=group["maximize"],
    )
    for of_device in taken.values():
        numbers = [number for _, number in of_device]
        torch._foreach_add_(numbers, 1)  # pyright: ignore[reportPrivateImportUsage]
        for (tensors, _), correction in zip(of_device, adam.corrections(numbers, how), strict=True):
            parameter, gradient, first, second = tensors
            adam.step(parameter, gradient, first, second, correction, how)
    steps[:] = [number for *_, number in left]
    local = [tensors for _, tensors, _ in left if tensors is not None]
    rest = local if len(local) == len(left) else [tensors for tensors, _, _ in left]  # torch takes no mixture
    for at, values in enumerate((parameters, gradients, firsts, seconds)):
        values[:] = [tensors[at] for tensors in rest]
    return bool(taken)


def _local(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """This rank's part of a parameter, its gradient and moments; None where they are spread in different ways."""
    first = tensors[0]
    if not isinstance(first, DTensor):
        return None if any(isinstance(each, DTensor) for each in tensors) else tensors
    if not all(isinstance(each, DTensor) and each.placements == first.placements for each in tensors):
        return None
    return tuple(each.to_local() for each in tensors)  # pyright: ignore[reportAttributeAccessIssue]


def _is_large(tensors: tuple[Tensor, ...]) -> bool:
    """Whether a parameter, its gradient and moments are what the kernel updates."""
    first = tensors[0]
    if first.numel() < LARGE or not use_triton(first) or not _has_no_gaps(first):
        return False
    return all(
        type(each) in (Tensor, nn.Parameter)
        and (each.dtype, each.device, each.shape, each.stride())
        == (first.dtype, first.device, first.shape, first.stride())
        for each in tensors
    )


def _has_no_gaps(values: Tensor) -> bool:
    """Whether the elements fill their memory, in whichever order."""
    last = sum((size - 1) * stride for size, stride in zip(values.shape, values.stride(), strict=True))
    return last + 1 == values.numel()
