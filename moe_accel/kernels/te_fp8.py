"""Linear layers in FP8, by TransformerEngine's quantisers and GEMMs with its recipe of current scaling.

Taken under `kernels: te` with `fp8` among `te_parts`. Values and weights are E4M3, gradients E5M2, each tensor with one
scale, made of its own largest value (Micikevicius et al., "FP8 Formats for Deep Learning", 2022). Nothing is remembered
from step to step, so a recompute gives the same numbers and a checkpoint holds no more than without; delayed scaling,
which is faster by a tenth, would remember. Its module is not used: the parameters stay those of the layer, whoever has
sharded them.

Between forward and backward the input is kept in FP8, for the weight's gradient; the weight is quantised once more.
Hopper multiplies FP8 along the last dimension of both matrices only, so that what is multiplied along the other is kept
transposed (`module/linear.py`, `cpp_extensions/gemm.py`, 2.20.2).

Sizes: N rows, I in, O out.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moe_accel.kernels import te

MULTIPLE = 16
"""Of which all sizes of an FP8 product are multiples."""
CAPABILITY = (8, 9)
"""The first with FP8."""
WORTH = 2**23
"""Weights of a layer from which on FP8 is faster than bf16: 1.2 to 1.8 times with 16,384 rows from 2048 x 4096 on,
where 4096 x 1024 is 0.99 and 1.08, and 2880 x 512 is 0.72 and 0.80 (H100 by TransformerEngine's module, H200:
tests/gpu/results/te_parts_*.json)."""


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether these are for an FP8 product: 16-bit floats on a GPU, some of them, and sizes that 16 divides."""
    fits = x.dtype == weight.dtype and x.dtype in te.DTYPES
    return fits and x.numel() > 0 and te.on_gpu(x) and not any(size % MULTIPLE for size in weight.shape)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`functional.linear` in FP8: x [...,I], weight [O,I], bias [O] -> [...,O] as x. Differentiable once."""
    rows = x.reshape(-1, x.shape[-1])
    num_rows = len(rows)
    left = -num_rows % MULTIPLE
    y: Any = _Linear.apply(functional.pad(rows, (0, 0, 0, left)) if left else rows, weight, bias)
    y = y[:num_rows] if left else y  # even of all rows a slice would cost a copy of the gradient
    return y.view(*x.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        kept = ctx.needs_input_grad[1]
        x8 = _quantiser("forward", x.device, by_columns=kept)(x.contiguous())
        weight8 = _quantiser("forward", x.device)(weight.contiguous())
        y = _functions().gemm(weight8, x8, out_dtype=x.dtype, layout="TN", bias=bias)[0]
        parts, x8s = [], []
        if kept:
            x8.update_usage(rowwise_usage=False)
            parts, x8s = _functions().prepare_for_saving(x8)
        ctx.save_for_backward(weight, *parts)
        ctx.x8s = x8s
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        weight, *parts = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        gemm: Any = functools.partial(
            _functions().gemm, out_dtype=gradient.dtype, use_split_accumulator=True, grad=True
        )
        x_grad = weight_grad = None
        gradient8 = None
        if needs_x or needs_weight:
            gradient8 = _quantiser("backward", gradient.device, by_columns=needs_weight)(gradient)
        if needs_x:
            weight8 = _quantiser("forward", gradient.device, by_columns=True)(weight.contiguous())
            x_grad = gemm(weight8, gradient8, layout="NN")[0]
        if needs_weight:
            (x8,) = _functions().restore_from_saved(ctx.x8s, parts)
            weight_grad = gemm(x8, gradient8, layout="NT")[0]
            x8.prepare_for_saving()  # it would hold the input as long as somebody holds the loss
        return x_grad, weight_grad, gradient.sum(0) if needs_bias else None


class _Functions:
    """What is called of the package."""

    def __init__(self) -> None:
        tensors = te.load("transformer_engine.pytorch.quantized_tensor")
        self.gemm = te.load("transformer_engine.pytorch.cpp_extensions").general_gemm
        self.quantiser = te.load("transformer_engine.pytorch.tensor.float8_tensor").Float8CurrentScalingQuantizer
        self.prepare_for_saving, self.restore_from_saved = tensors.prepare_for_saving, tensors.restore_from_saved
        dtypes = te.load("transformer_engine_torch").DType
        self.dtypes = {"forward": dtypes.kFloat8E4M3, "backward": dtypes.kFloat8E5M2}


@functools.cache
def _functions() -> _Functions:
    return _Functions()


@functools.cache
def _quantiser(direction: str, device: torch.device, by_columns: bool = False) -> Any:
    """Makes FP8 of a matrix, to be multiplied along its rows, and along its columns as well if asked for."""
    functions = _functions()
    made = functions.quantiser(functions.dtypes[direction], device, rowwise=True, columnwise=by_columns)
    made.internal = True  # bare storage, no tensor of its own around it
    return made


def lookup() -> str | None:
    """Look for the functions.

    Raises:
        AttributeError: they are not there.
    """
    _functions()
    return None


def tried(device: torch.device) -> str | None:
    """What is wrong with one product and its gradients; None where they are as near as FP8 comes."""
    generator = torch.Generator().manual_seed(0)
    shapes = (24, 128), (64, 128), (64,), (24, 64)
    x, weight, bias, gradient = (torch.randn(*shape, generator=generator) for shape in shapes)
    x, weight, bias, gradient = (each.to(device, torch.bfloat16) for each in (x, weight, bias, gradient))
    exact = [
        x.float() @ weight.float().t() + bias.float(),
        gradient.float() @ weight.float(),
        gradient.float().t() @ x.float(),
    ]
    leaves = x.requires_grad_(), weight.requires_grad_()

    def compute() -> list[Tensor]:
        found = linear(*leaves, bias)
        return [found, *torch.autograd.grad(found, leaves, gradient)]

    return te.off("general_gemm", compute, [each.detach() for each in exact], 0.2)


def is_worth(weight: Tensor) -> bool:
    """Whether a layer is so large that FP8 is faster, and its sizes are such that it can be."""
    return weight.numel() >= WORTH and not any(size % MULTIPLE for size in weight.shape)
