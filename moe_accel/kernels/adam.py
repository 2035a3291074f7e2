"""A step of Adam or AdamW for one parameter, in one pass over it, its gradient and its two moments.

    m = beta1 * m + (1 - beta1) * g            g: the gradient, plus decay * p without decoupled weight decay
    v = beta2 * v + (1 - beta2) * g^2
    p = p * (1 - lr * decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Kingma and Ba, "Adam" (2015); Loshchilov and Hutter, "Decoupled weight decay regularization" (2019). The order of
operations is that of torch's fused kernel, which computes powers and products of every element in fp64; here the two
powers of a step are computed once, in fp64 too, and what is left is fp32. Each result is rounded once.

Sizes: n elements of a parameter, T parameters.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_accel.kernels.device import launch, tl, triton, use_triton

ELEMENTS, NUM_WARPS = 1024, 4
"""Of a program, whose threads read 16 bytes of bf16 at once. Seven sizes took 3.34 to 3.53 ms in bf16 and 6.47 to 6.72
in fp32 for 0.93 B elements; this one 3.40 and 6.47 (one H200, 2026-11-26)."""


class Adam(NamedTuple):
    """Of a group of parameters, as torch's optimizers name them.

    Attributes:
        lr, beta1, beta2, eps, weight_decay: see above.
        decoupled: whether weight decay is AdamW's.
        maximize: whether steps go up the gradient.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool = False


def corrections(steps: Sequence[Tensor], how: Adam) -> Tensor:
    """What a step's number makes of the moments: [T,2] fp32, `lr / (1 - beta1^t)` and `sqrt(1 - beta2^t)`.

    `steps`: t of each parameter, one value each on one device, 1 in the first step.
    """
    numbers = torch.stack([each.reshape(()) for each in steps]).double()
    first, second = 1 - how.beta1**numbers, 1 - how.beta2**numbers
    return torch.stack([how.lr / first, second.sqrt()], dim=1).float()


def step(parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, correction: Tensor, how: Adam) -> None:
    """Update a parameter and its moments in place: all of one shape, dtype and strides, without gaps.

    `first`, `second`: the moments m and v. `correction`: [2], of `corrections`.
    """
    if not use_triton(parameter):
        step_torch(parameter, gradient, first, second, correction, how)
        return
    num_elements = parameter.numel()
    decay = how.lr * how.weight_decay if how.decoupled else how.weight_decay
    numbers = how.beta1, 1 - how.beta1, how.beta2, 1 - how.beta2, how.eps, decay
    constants = {"DECOUPLED": how.decoupled, "DECAYS": how.weight_decay != 0, "MAXIMIZE": how.maximize}
    tensors = parameter, gradient, first, second, correction
    grid = (-(-num_elements // ELEMENTS),)
    launch(_step_kernel, grid, *tensors, num_elements, *numbers, **constants, ELEMENTS=ELEMENTS, num_warps=NUM_WARPS)


def step_torch(
    parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, correction: Tensor, how: Adam
) -> None:
    """The definition of `step`."""
    exact = torch.promote_types(parameter.dtype, torch.float32)
    p, g, m, v = (each.to(exact) for each in (parameter, gradient, first, second))
    g = -g if how.maximize else g
    if how.decoupled and how.weight_decay != 0:
        p = p - how.lr * how.weight_decay * p
    elif how.weight_decay != 0:
        g = g + how.weight_decay * p
    m = how.beta1 * m + (1 - how.beta1) * g
    v = how.beta2 * v + (1 - how.beta2) * g * g
    p = p - correction[0] * m / (v.sqrt() / correction[1] + how.eps)
    for kept, new in ((parameter, p), (first, m), (second, v)):
        kept.copy_(new)


@triton.jit
def _step_kernel(
    parameter,
    gradient,
    first,
    second,
    correction,
    num_elements,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    decay,
    DECOUPLED: tl.constexpr,
    DECAYS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = at < num_elements
    p = tl.load(parameter + at, mask=inside).to(tl.float32)
    g = tl.load(gradient + at, mask=inside).to(tl.float32)
    m = tl.load(first + at, mask=inside).to(tl.float32)
    v = tl.load(second + at, mask=inside).to(tl.float32)
    step_size, of_second = tl.load(correction), tl.load(correction + 1)
    if MAXIMIZE:
        g = -g
    if DECAYS:
        if DECOUPLED:
            p -= decay * p
        else:
            g += decay * p
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    p -= step_size * m / (tl.sqrt_rn(v) / of_second + eps)
    tl.store(parameter + at, p.to(parameter.dtype.element_ty), mask=inside)
    tl.store(first + at, m.to(first.dtype.element_ty), mask=inside)
    tl.store(second + at, v.to(second.dtype.element_ty), mask=inside)
