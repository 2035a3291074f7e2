"""The gradient scale of expert parallelism, as an autograd identity.

The ranks of an `ep` group send their tokens to one set of experts, so an expert's gradient is already the sum over the
group; FSDP2 then averages over the `efsdp` ranks only. Dense gradients are averaged over all ranks. So the experts'
must be divided by `ep` once more. Scaling the gradient of what leaves the experts by 1/ep and of what enters them by
ep does just that, whatever torch version, backend or shard group (torch's own `set_gradient_divide_factor` divides
twice where the shard group has one rank). The dispatcher does it to what it carries; here is the rest, a function
around a tensor.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself; its gradient times `factor`, in its own dtype: exact where the factor is a power of two."""
    return x if factor == 1 else _ScaleGradient.apply(x, factor)  # pyright: ignore[reportReturnType]


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None
