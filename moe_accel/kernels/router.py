"""What a router does with its logits in one pass each way: scores, the K best experts, their weights.

forward    K rounds over the experts of a token, in registers: the best is taken, and left out of the next round.
           Numbers are compared that hold the score's bits and, below them, the expert's index: no two are equal.
backward   dense, every logit once; with u_k = scale * dw_k, over the K chosen (s their scores):
               softmax             dl = p * (u [0 where not chosen] - sum(u * s))
               ... renormalised    dl = s * (u - sum(u * s))
               sigmoid             dl = s * (1 - s) * u
               ... renormalised    dl = s * (1 - s) * (u - sum(u * s) / D) / D,  D = sum(s) + epsilon
A renormalised softmax is the softmax of the chosen logits alone; for those not chosen the gradient is 0 and not, as
autograd has it, what rounding left of 0. All in fp32, rounded once.

Equal scores: the lower index comes first. torch.topk promises no order there. NaN counts as the largest, as in torch.

Sizes: N tokens, E experts, K top-k, G groups of experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_accel.kernels.device import launch, tl, triton, use_triton

MAX_EXPERTS, MAX_TOP_K = 512, 32
TILE, MAX_ROWS = 2048, 64
"""Elements of a program's tile of whole rows, and rows at most: so that 16,384 tokens are 256 programs or more."""


@dataclass(frozen=True)
class Rule:
    """How experts are chosen and weighted.

    Attributes:
        top_k: K.
        sigmoid: scores are the sigmoids of the logits, each by itself; else their softmax.
        renormalise: the weights of a token are divided by their sum.
        scale: factor of all weights.
        epsilon: added to that sum; of sigmoids only.
        num_groups: groups of neighbouring experts, of sigmoids only; a group's score is the sum of its two best.
        top_groups: groups of a token whose experts it may choose.
    """

    top_k: int
    sigmoid: bool = False
    renormalise: bool = False
    scale: float = 1.0
    epsilon: float = 0.0
    num_groups: int = 1
    top_groups: int = 1

    def __str__(self) -> str:
        limit = f", {self.top_groups} of {self.num_groups} groups" if self.limits else ""
        return f"top {self.top_k} by {'sigmoid' if self.sigmoid else 'softmax'}{limit}"

    @property
    def limits(self) -> bool:
        """Whether some groups are out of reach."""
        return self.top_groups < self.num_groups


def fits(rule: Rule, num_experts: int) -> bool:
    """Whether the kernels have this rule for so many experts."""
    size = num_experts // rule.num_groups
    powers = not (num_experts & (num_experts - 1) or rule.num_groups & (rule.num_groups - 1))
    groups = not rule.limits or (rule.sigmoid and powers and size >= 2)
    return num_experts <= MAX_EXPERTS and 0 < rule.top_k <= min(num_experts, MAX_TOP_K) and groups


def route(logits: Tensor, bias: Tensor | None, rule: Rule, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights [N,K] in `dtype`, best first, and experts [N,K] int64. Differentiable once, in logits.

    Args:
        logits: [N,E].
        bias: [E] added to the scores where experts are chosen, not where they are weighted; of sigmoids only.
        rule: one that `fits`.
        dtype: of the weights.
    """
    return _Route.apply(logits, bias, rule, dtype)  # pyright: ignore[reportReturnType]


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, bias: Tensor | None, rule: Rule, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        form = route_triton if use_triton(logits) else route_torch
        weights, indices, scores = form(logits, bias, rule, dtype)
        ctx.save_for_backward(scores, indices, *([] if rule.sigmoid or rule.renormalise else [logits]))
        ctx.of_logits, ctx.rule = (logits.shape, logits.dtype), rule
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return weights, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        if gradient is None:
            return None, None, None, None
        scores, indices, *logits = ctx.saved_tensors
        form = route_backward_triton if use_triton(gradient) else route_backward_torch
        (_, num_experts), dtype = ctx.of_logits
        found = form(gradient, scores, indices, logits[0] if logits else None, ctx.rule, num_experts, dtype)
        return found, None, None, None


def route_torch(logits: Tensor, bias: Tensor | None, rule: Rule, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: weights [N,K] in `dtype`, experts [N,K] int64, scores [N,K] in fp32 at least."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    choice = exact
    if bias is not None or rule.limits:
        choice = exact.sigmoid() + (0 if bias is None else bias.to(exact.dtype))
    if rule.limits:
        of_group = choice.view(len(choice), rule.num_groups, -1).topk(2).values.sum(-1)
        best = _largest(of_group, rule.top_groups)
        near = torch.zeros_like(of_group, dtype=torch.bool).scatter_(1, best, True)
        near = near.repeat_interleave(choice.shape[1] // rule.num_groups, 1)
        choice = choice.masked_fill(~near, float("-inf"))
    indices = _largest(choice, rule.top_k)
    chosen = exact.gather(1, indices)
    if rule.sigmoid:
        scores = weights = chosen.sigmoid()
        if rule.renormalise:
            weights = scores / (scores.sum(1, keepdim=True) + rule.epsilon)
    else:
        scores = weights = chosen.softmax(1) if rule.renormalise else exact.softmax(1).gather(1, indices)
    return (weights * rule.scale).to(dtype), indices, scores


def _largest(values: Tensor, count: int) -> Tensor:
    """Indices of the largest, in order; of equal ones the lower index first."""
    return values.sort(dim=1, descending=True, stable=True).indices[:, :count].contiguous()


def route_backward_torch(
    gradient: Tensor,
    scores: Tensor,
    indices: Tensor,
    logits: Tensor | None,
    rule: Rule,
    num_experts: int,
    dtype: torch.dtype,
) -> Tensor:
    """The definition of the gradient of the logits [N,E] in `dtype`; `logits` where softmax is not renormalised."""
    u = gradient.to(scores.dtype) * rule.scale
    dense = scores.new_zeros(len(scores), num_experts)
    if rule.sigmoid:
        if rule.renormalise:
            total = scores.sum(1, keepdim=True) + rule.epsilon
            u = (u - (u * (scores / total)).sum(1, keepdim=True)) / total
        found = scores * (1 - scores) * u
    else:
        mean = (u * scores).sum(1, keepdim=True)
        found = scores * (u - mean)
        if logits is not None:
            dense = -logits.to(scores.dtype).softmax(1) * mean
    return dense.scatter(1, indices, found).to(dtype)


def route_triton(logits: Tensor, bias: Tensor | None, rule: Rule, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`route_torch` as a kernel."""
    num_rows, num_experts = logits.shape
    logits = logits.contiguous()
    weights = logits.new_empty(num_rows, rule.top_k, dtype=dtype)
    indices, scores = torch.empty_like(weights, dtype=torch.int64), torch.empty_like(weights, dtype=torch.float32)
    tensors = logits, logits if bias is None else bias.contiguous(), weights, indices, scores
    sizes = constants(rule, num_experts)
    grid = (-(-num_rows // sizes["ROWS"]),)
    launch(_forward_kernel, grid, *tensors, num_rows, **of_choice(rule, logits.dtype, bias is not None), **sizes)
    return weights, indices, scores


def route_backward_triton(
    gradient: Tensor,
    scores: Tensor,
    indices: Tensor,
    logits: Tensor | None,
    rule: Rule,
    num_experts: int,
    dtype: torch.dtype,
) -> Tensor:
    """`route_backward_torch` as a kernel."""
    num_rows = len(scores)
    found = scores.new_empty(num_rows, num_experts, dtype=dtype)
    tensors = gradient.contiguous(), scores, indices, found if logits is None else logits.contiguous(), found
    sizes = constants(rule, num_experts)
    launch(_backward_kernel, (-(-num_rows // sizes["ROWS"]),), *tensors, num_rows, **sizes)
    return found


def of_choice(rule: Rule, dtype: torch.dtype, biased: bool) -> dict[str, Any]:
    """What the forward kernel is compiled for besides, with logits in `dtype`."""
    narrow = dtype == torch.bfloat16 and not biased and not rule.limits
    groups = {"NUM_GROUPS": rule.num_groups, "TOP_GROUPS": rule.top_groups}
    return {"BIASED": biased, "NARROW": narrow, "LOWEST": -(2**31) if narrow else -(2**63), **groups}


def constants(rule: Rule, num_experts: int) -> dict[str, Any]:
    """What both kernels are compiled for."""
    columns = 1 << (num_experts - 1).bit_length()
    return {
        "SIGMOID": rule.sigmoid,
        "RENORMALISE": rule.renormalise,
        "scale": rule.scale,
        "epsilon": rule.epsilon,
        "num_experts": num_experts,
        "top_k": rule.top_k,
        "ROWS": min(MAX_ROWS, TILE // columns),
        "EXPERTS": columns,
        "CHOICES": 1 << (rule.top_k - 1).bit_length(),
    }


@triton.jit
def _ordered(value):
    """fp32 as int32 in the same order: NaN above all, -0 as 0."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(value != value, 0x7FFFFFFF, bits)


@triton.jit
def _packed(value, index, SIZE: tl.constexpr, NARROW: tl.constexpr):
    """Numbers in the order of `value`, of equal ones the lower index larger; the index is in the last bits.

    NARROW: `value` is bf16, whose 16 bits leave room for the index in 32.
    """
    order = _ordered(value)
    back = SIZE - 1 - index
    if NARROW:
        packed = (order & -0x10000) | back
    else:
        packed = (order.to(tl.int64) << 32) | back.to(tl.int64)
    return packed


@triton.jit
def _reachable(choice, EXPERTS: tl.constexpr, NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """`choice` [ROWS,E], with -inf outside of the groups that have the largest sums of their two best."""
    SIZE: tl.constexpr = EXPERTS // NUM_GROUPS
    grouped = tl.reshape(choice, (ROWS, NUM_GROUPS, SIZE))
    member = tl.arange(0, SIZE)[None, None, :]
    packed = _packed(grouped, member, SIZE, False)
    first = packed == tl.max(packed, 2, keep_dims=True)
    second = tl.where(first, -0x8000000000000000, packed)
    second = second == tl.max(second, 2, keep_dims=True)
    score = tl.sum(tl.where(first | second, grouped, 0.0), 2)
    group = tl.arange(0, NUM_GROUPS)[None, :]
    left = _packed(score, group, NUM_GROUPS, False)
    near = tl.zeros((ROWS, NUM_GROUPS), tl.int32)
    for _ in range(TOP_GROUPS):
        best = left == tl.max(left, 1, keep_dims=True)
        near = tl.where(best, 1, near)
        left = tl.where(best, -0x8000000000000000, left)
    grouped = tl.where(near[:, :, None] > 0, grouped, float("-inf"))
    return tl.reshape(grouped, (ROWS, EXPERTS))


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    logits,
    bias,
    weights,
    indices,
    scores,
    num_rows,
    BIASED: tl.constexpr,
    NARROW: tl.constexpr,
    LOWEST: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
    scale: tl.constexpr,
    epsilon: tl.constexpr,
    num_experts: tl.constexpr,
    top_k: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EXPERTS)[None, :]
    inside = (row < num_rows)[:, None] & (expert < num_experts)
    value = tl.load(logits + row[:, None] * num_experts + expert, mask=inside, other=float("-inf")).to(tl.float32)
    choice = value
    if BIASED or TOP_GROUPS < NUM_GROUPS:  # else logits are in the order of their scores
        choice = tl.sigmoid(value)
    if BIASED:
        choice += tl.load(bias + expert, mask=expert < num_experts, other=0.0).to(tl.float32)
    if TOP_GROUPS < NUM_GROUPS:
        choice = _reachable(choice, EXPERTS, NUM_GROUPS, TOP_GROUPS, ROWS)
    left = tl.where(expert < num_experts, _packed(choice, expert, EXPERTS, NARROW), LOWEST)
    place = tl.arange(0, CHOICES)[None, :]
    chosen = tl.zeros((ROWS, CHOICES), left.dtype)
    for number in range(top_k):
        best = tl.max(left, 1)[:, None]
        chosen = tl.where(place == number, best, chosen)
        left = tl.where(left == best, LOWEST, left)
    index = EXPERTS - 1 - (chosen & (EXPERTS - 1)).to(tl.int32)
    kept = (row < num_rows)[:, None] & (place < top_k)
    found = tl.load(logits + row[:, None] * num_experts + index, mask=kept, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        score = tl.sigmoid(found)
        weight = score
        if RENORMALISE:
            weight = score / (tl.sum(score, 1) + epsilon)[:, None]
    else:
        if RENORMALISE:
            score = tl.exp(found - tl.max(found, 1)[:, None])
            score = score / tl.sum(score, 1)[:, None]
        else:
            top = tl.max(value, 1)
            score = tl.exp(found - top[:, None]) / tl.sum(tl.exp(value - top[:, None]), 1)[:, None]
        weight = score
    at = row[:, None] * top_k + place
    tl.store(weights + at, (weight * scale).to(weights.dtype.element_ty), mask=kept)
    tl.store(scores + at, score, mask=kept)
    tl.store(indices + at, index.to(tl.int64), mask=kept)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    gradient,
    scores,
    indices,
    logits,
    found,
    num_rows,
    SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
    scale: tl.constexpr,
    epsilon: tl.constexpr,
    num_experts: tl.constexpr,
    top_k: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    within = row < num_rows
    expert = tl.arange(0, EXPERTS)[None, :]
    inside = within[:, None] & (expert < num_experts)
    place = tl.arange(0, CHOICES)[None, :]
    kept = within[:, None] & (place < top_k)
    at = row[:, None] * top_k + place
    u = tl.load(gradient + at, mask=kept, other=0.0).to(tl.float32) * scale
    score = tl.load(scores + at, mask=kept, other=0.0)
    mean, inverse = tl.zeros((ROWS,), tl.float32), tl.full((ROWS,), 1.0, tl.float32)
    if not SIGMOID:
        mean = tl.sum(u * score, 1)
    elif RENORMALISE:
        total = tl.sum(score, 1) + epsilon
        inverse = 1.0 / total
        mean = tl.sum(u * (score / total[:, None]), 1)
    dense = tl.zeros((ROWS, EXPERTS), tl.float32)
    if not SIGMOID and not RENORMALISE:
        value = tl.load(logits + row[:, None] * num_experts + expert, mask=inside, other=float("-inf")).to(tl.float32)
        value = tl.exp(value - tl.max(value, 1)[:, None])
        dense = -value / tl.sum(value, 1)[:, None] * mean[:, None]
    for number in tl.static_range(top_k):
        column = row * top_k + number
        s = tl.load(scores + column, mask=within, other=0.0)
        one = (tl.load(gradient + column, mask=within, other=0.0).to(tl.float32) * scale - mean) * inverse * s
        if SIGMOID:
            one *= 1.0 - s
        index = tl.load(indices + column, mask=within, other=0).to(tl.int32)
        dense = tl.where(expert == index[:, None], one[:, None], dense)
    tl.store(found + row[:, None] * num_experts + expert, dense.to(found.dtype.element_ty), mask=inside)
