"""TransformerEngine's RMSNorm behind the contract of `rms_norm.py`: all in fp32, rounded once.

Taken under `kernels: te` with `norms` among `te_parts`. Its extension is called and not its module, which takes the
host longer (`ops/basic/rmsnorm.py`, 2.20.2).
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_accel.kernels import rms_norm as ours
from moe_accel.kernels import te


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """`rms_norm.rms_norm`: x [...,H], weight [H] -> [...,H]. Differentiable once. Not of fp32, nor of mixed dtypes."""
    if x.dtype != weight.dtype or x.dtype not in te.DTYPES:
        return ours.rms_norm(x, weight, eps, offset)
    return _RMSNorm.apply(x, weight, eps, offset)  # pyright: ignore[reportReturnType]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        extension, dtypes = _functions()
        y, _, inverse = extension.rmsnorm_fwd(rows, weight, eps, None, None, dtypes[x.dtype], 0, offset == 1.0)
        ctx.save_for_backward(rows, weight, inverse)
        ctx.is_centred = offset == 1.0
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, inverse = ctx.saved_tensors
        gradient = gradients[0].reshape(rows.shape).contiguous()
        x_grad, weight_grad = _functions()[0].rmsnorm_bwd(gradient, rows, inverse, weight, 0, ctx.is_centred)
        return x_grad.view(gradients[0].shape), weight_grad if ctx.needs_input_grad[1] else None, None, None


def lookup() -> str | None:
    """Look for the functions.

    Raises:
        AttributeError: they are not there.
    """
    extension = _functions()[0]
    _ = extension.rmsnorm_fwd, extension.rmsnorm_bwd
    return None


def tried(device: torch.device) -> str | None:
    """What is wrong with one norm and its gradients; None where it is right."""
    generator = torch.Generator().manual_seed(0)
    x, weight, gradient = (torch.randn(*shape, generator=generator) for shape in ((4, 128), (128,), (4, 128)))
    x, weight, gradient = (each.to(device, torch.bfloat16) for each in (x, weight, gradient))
    y, inverse = ours.normalise_torch(x.float(), weight.float(), 1e-6, 0.0)
    exact = ours.normalise_backward_torch(gradient.float(), x.float(), weight.float(), inverse, 0.0)
    leaves = x.requires_grad_(), weight.requires_grad_()

    def compute() -> list[Tensor]:
        found = rms_norm(*leaves, 1e-6)
        return [found, *torch.autograd.grad(found, leaves, gradient)]

    return te.off("rmsnorm_fwd", compute, [y, *exact])  # pyright: ignore[reportArgumentType]


@functools.cache
def _functions() -> tuple[Any, Any]:
    """Its extension, and its names of dtypes."""
    dtypes = te.load("transformer_engine.pytorch.constants").TE_DType
    return te.load("transformer_engine_torch"), dtypes
