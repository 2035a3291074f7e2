"""Softmax cross-entropy of a linear layer's output that never holds all logits: value and gradients, chunk by chunk.

For every chunk of rows: logits = hidden @ weight.T; one kernel turns them, in place, into their gradient and adds up
the loss; two more GEMMs turn that into gradients of hidden and weight. What is alive is one chunk of logits in the
dtype of hidden; native holds all of them four times (bf16, fp32, log-softmax, gradient). Three GEMMs, as native has.
The idea: Hsu et al., "Liger Kernel" (2024), whose chunks are smaller: 256 rows at a vocabulary of 152 k.

Rows whose label is to be ignored (prompts, padding) are left out of all of that. For this the host waits for the
device once, to learn how many there are.

Sizes: N rows, H hidden, V vocabulary, C rows of a chunk.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_accel.kernels.device import launch, tl, triton, use_triton

CHUNK_BYTES = 1 << 30
"""Of a chunk's logits: 3,533 rows of 151,936 in bf16. GEMMs of fewer rows are slower, of more rows hardly faster."""
COLUMNS = 8192  # of a tile
SCALED = 8192
"""Elements that one program multiplies."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, divisor: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T`, summed over rows and divided.

    Args:
        hidden: [N,H]; in fp16 small gradients are lost before a GradScaler multiplies them, see `loss.py`.
        weight: [V,H], the dtype of hidden.
        labels: [N] int64; rows with `ignore_index` do not count.
        divisor: number to divide by; None: the number of rows that count, as `reduction="mean"`. Where that is none,
            the loss is NaN and its gradients are zero, as torch has it.
        ignore_index: label of a row that does not count.

    Returns:
        fp32 scalar (the dtype of hidden where that is wider), differentiable once in hidden and weight.
    """
    counts = labels != ignore_index
    num_counting = int(counts.sum())
    kept = None if num_counting == len(labels) else torch.nonzero_static(counts, size=num_counting)[:, 0]
    if divisor is None:
        divisor = torch.full((), num_counting, dtype=torch.float64, device=hidden.device)
    return _LinearCrossEntropy.apply(hidden, weight, labels, divisor, kept)  # pyright: ignore[reportReturnType]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, divisor: Tensor, kept: Any) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        total = len(hidden if kept is None else kept)
        new = torch.empty_like if kept is None else torch.zeros_like
        hidden_grad = new(hidden) if needs_hidden else None
        weight_grad = torch.zeros_like(weight) if needs_weight and total == 0 else None
        divisor = divisor.to(hidden.device, exact)
        scale = divisor.reciprocal().reshape(1)
        loss = torch.zeros((), dtype=exact, device=hidden.device)
        num_rows = max(1, min(total, CHUNK_BYTES // (weight.shape[0] * hidden.element_size())))
        for start in range(0, total, num_rows):
            chunk = slice(start, start + num_rows)
            of: Any = chunk if kept is None else kept[chunk]
            rows = hidden[of]
            logits = rows @ weight.t()
            loss += softmax_gradient_(logits, labels[of], scale).sum()
            if hidden_grad is not None and kept is None:
                torch.mm(logits, weight, out=hidden_grad[chunk])
            elif hidden_grad is not None:
                hidden_grad.index_copy_(0, of, logits @ weight)
            if needs_weight and weight_grad is None:
                weight_grad = logits.t() @ rows
            elif weight_grad is not None:
                weight_grad.addmm_(logits.t(), rows)
            del logits
        ctx.save_for_backward(*(each for each in (hidden_grad, weight_grad) if each is not None))
        ctx.needs = needs_hidden, needs_weight
        return loss / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved, factor, engine = iter(ctx.saved_tensors), gradients[0].to(torch.float32), cast(Any, torch._C)._autograd
        is_kept = engine._get_current_graph_task_keep_graph()  # retain_graph: there may be another backward
        scaled = torch.mul if is_kept else scale_
        found = [scaled(next(saved), factor) if needed else None for needed in ctx.needs]
        return *found, None, None, None


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply a gradient without gaps by a number on its device, in place; where that is 1, nothing is touched."""
    if not use_triton(gradient):
        return gradient.mul_(factor)
    num_elements = gradient.numel()
    grid = (-(-num_elements // SCALED),)
    launch(_scale_kernel, grid, gradient, factor, num_elements, ELEMENTS=SCALED, num_warps=8)
    return gradient


def softmax_gradient_(logits: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """Replace logits by the gradient of their loss.

    Args:
        logits: [C,V], contiguous; overwritten with `scale * (softmax(logits) - one_hot(labels))`.
        labels: [C] int64; one out of range makes the loss NaN.
        scale: [1].

    Returns:
        [C], loss of each row, not scaled, fp32 or wider.
    """
    if not use_triton(logits):
        return softmax_gradient_torch_(logits, labels, scale)
    num_rows, width = logits.shape
    loss = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    tensors = logits, labels.contiguous(), scale, loss
    launch(_softmax_gradient_kernel, (num_rows,), *tensors, width=width, COLUMNS=COLUMNS, num_warps=16)
    return loss


def softmax_gradient_torch_(logits: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """The definition of `softmax_gradient_`."""
    log_softmax = logits.to(scale.dtype).log_softmax(1)
    loss = -log_softmax.gather(1, labels[:, None])[:, 0]
    gradient = log_softmax.exp_()
    gradient.scatter_add_(1, labels[:, None], gradient.new_full((len(labels), 1), -1))
    logits.copy_(gradient * scale)
    return loss


@triton.jit
def _scale_kernel(gradient, factor, num_elements, ELEMENTS: tl.constexpr):
    by = tl.load(factor)
    if by != 1.0:
        at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
        values = tl.load(gradient + at, mask=at < num_elements, other=0.0).to(tl.float32) * by
        tl.store(gradient + at, values.to(gradient.dtype.element_ty), mask=at < num_elements)


@triton.jit
def _softmax_gradient_kernel(logits, labels, scale, loss, width: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    logits += row * width
    column = tl.arange(0, COLUMNS)
    known = (label >= 0) & (label < width)  # an impossible label makes the loss NaN
    # before anything is overwritten
    picked = tl.load(logits + label, mask=known, other=float("nan")).to(tl.float32)
    highest = tl.full((COLUMNS,), -1e38, tl.float32)  # finite: what is minus infinity may be subtracted from it
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, width, COLUMNS):  # every lane its own running maximum: one reduction at the end
        x = tl.load(logits + first + column, mask=first + column < width, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, x)
        total = total * tl.exp(highest - higher) + tl.exp(x - higher)
        highest = higher
    top = tl.max(highest, 0)
    of_all = tl.sum(total * tl.exp(highest - top), 0)
    tl.store(loss + row, top + tl.log(of_all) - picked)
    factor = tl.load(scale)
    shared = factor / of_all
    for first in range(0, width, COLUMNS):
        at = first + column
        x = tl.load(logits + at, mask=at < width, other=-float("inf")).to(tl.float32)
        value = tl.exp(x - top) * shared - tl.where(at == label, factor, 0.0)
        tl.store(logits + at, value.to(logits.dtype.element_ty), mask=at < width)
