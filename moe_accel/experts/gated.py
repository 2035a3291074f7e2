"""Experts with a gated linear unit, or relu^2 without a gate, as one autograd function (in two halves): two grouped
GEMMs and four passes over rows each way.

Between forward and backward it keeps x, the first projection's output and the routing, and nothing else of [P,H] or
[P,I]: gathered rows and the second projection's input are made again. The routing weights' gradient comes from the
second projection's input, so its output is not kept either (Guo et al., "SonicMoE", 2025).

A low-rank adapter of a projection is computed in the same GEMM where their matrices are joined (`joined.py`), else
beside it, and the two are added in fp32 where they are read: in the gate, and in the sum over experts. Of an adapter,
the [P,r] between its factors is kept too. What is frozen gets no gradient computed.

The first projection's bias is added in the gate. The second's is summed over a row's experts, with their routing
weights, by a product of its own: a row has K experts of e, and [R,e] of weights times [e,H] costs next to nothing.

Weights kept in another dtype than they are computed in (fp32 under bf16 autocast) are cast where they are used, in
forward and once more in backward: no copy of them is kept between.

A `lean` module does not keep the first projection's output either, the largest thing by far: backward computes it once
more. Of a layer of Qwen3-30B-A3B that is a third of all its activations for a tenth of the time of a recompute.

Sizes: R rows, H hidden, K top-k, e local experts, P sorted pairs, I inner, r rank of an adapter.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.activations import ReLUSquaredActivation

from moe_accel.dispatch import Arrival
from moe_accel.experts import later
from moe_accel.experts.adapters import Factors
from moe_accel.experts.gates import find_gate
from moe_accel.experts.gathered import gathered_experts, gathers, suits
from moe_accel.experts.joined import Projection
from moe_accel.experts.routing import LocalRouting
from moe_accel.experts.weights import has_post_norm
from moe_accel.kernels.device import autocast_dtype, without_autocast
from moe_accel.kernels.glu import SWIGLU, ExpertBias, Gate, glu, glu_backward
from moe_accel.kernels.grouped import TORCH, GroupedGemm
from moe_accel.kernels.rows import RowMap
from moe_accel.kernels.squared_relu import squared_relu, squared_relu_backward
from moe_accel.swap import is_bare


def why_not_gated(module: Any) -> str | None:
    """Why a module's experts are none that `gated_experts` computes; None where they are."""
    if has_post_norm(module):
        return "a norm after each expert"
    act_fn = getattr(module, "act_fn", None)
    if not is_bare(act_fn):
        return "a hook or a forward of its own on the activation"
    if module.has_gate:
        return None if find_gate(module) is not None else "a gate of its own"
    if module.has_bias:
        return "biases without a gate"
    if not isinstance(act_fn, ReLUSquaredActivation):
        return f"activation {getattr(act_fn, '__name__', type(act_fn).__name__)} without a gate"
    return None


def may_gather(module: Any, device: torch.device) -> bool:
    """Whether `gathered.py` computes a module's experts where there are many rows; not with adapters."""
    if why_not_gated(module) is not None or not module.has_gate or module.has_bias or find_gate(module) != SWIGLU:
        return False
    _, hidden, inner = module.down_proj.shape
    return not module.is_transposed and suits(device, hidden, inner)


def gated_experts(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    weight_p: Tensor,
    routing: LocalRouting,
    up_factors: Factors | None = None,
    down_factors: Factors | None = None,
    gate: Gate | None = SWIGLU,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    lean: bool = False,
    gemm: GroupedGemm = TORCH,
    dtype: torch.dtype | None = None,
    arrival: Arrival | None = None,
) -> Tensor:
    """Weighted sum of each row's experts.

    Args:
        x: [R,H].
        up: [e,H,2I], gate and up as `gate` has them, or [e,H,I] without a gate; any strides.
        down: [e,I,H]; any strides.
        weight_p: [P], routing weights of the sorted pairs.
        routing: of the rows.
        up_factors: [e,H,r] and [e,r,2I], whose product is added to up, and where they are joined; None: nothing is.
        down_factors: [e,I,r] and [e,r,H], likewise.
        gate: between the two projections; None: relu^2.
        biases: [e,2I], of a projection with a gate, and [e,H], in their own dtypes.
        lean: compute the first projection again in backward rather than keep its output.
        gemm: who multiplies, and brings rows to experts and back.
        dtype: of the products; None: as autocast says, else that of x.
        arrival: of the gradient in backward, which computes the first projection while that is under way.

    Returns:
        [R,H] in the dtype of x, differentiable once in x, up, down, weight_p, the factors and the biases.
    """
    x_ = x.to(dtype or autocast_dtype(x.device) or x.dtype)
    if arrival is not None:
        arrival.is_awaited = lean and x_.dtype == x.dtype  # else the gradient is cast before it comes here
    plain = all(each is None for each in (up_factors, down_factors, *biases)) and gate == SWIGLU and gemm is TORCH
    if plain and gathers(x_, up, down, len(weight_p) if routing.rows.stop is None else None):
        with without_autocast(x.device):
            return gathered_experts(x_, up, down, weight_p, routing, lean, arrival).to(x.dtype)
    pairs, joined = [], []
    for given in (up_factors, down_factors):
        a, b, place, source = given or (None, None, None, None)
        pairs.append((a, b))
        joined.append(None if place is None else (place, source))
    places = routing.ends, routing.experts, *routing.rows
    with without_autocast(x.device):
        inner: Any = _Inner.apply
        a, down_low, carrier = inner(
            x_, up, down, weight_p, *pairs[0], *pairs[1], *biases, *places, tuple(joined), gate, lean, gemm, arrival
        )
        outer: Any = _Outer.apply
        y = outer(carrier, a, down_low, down, weight_p, *pairs[1], biases[1], *places, joined[1], gemm)
    return y.to(x.dtype)


class _Inner(torch.autograd.Function):
    """x to the second projection's input [P,I]. All that backward needs is kept here, and all of backward is here: the
    gradient of what `_Outer` makes of that input comes back by way of `carrier`, an output of [R,H] that holds nothing.

    So recompute under activation checkpointing ends here where nothing behind the experts keeps anything: without the
    second projection and the sum over experts, and in expert parallelism without sending rows home.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x,
        up,
        down,
        weight_p,
        up_a,
        up_b,
        down_a,
        down_b,
        up_bias,
        down_bias,
        ends,
        experts,
        sources,
        copies,
        starts,
        row_places,
        stop,
        joined,
        gate,
        lean,
        gemm,
        arrival,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.joined, ctx.gate, ctx.gemm, ctx.later, ctx.arrival = joined, gate, gemm, later.collected(), arrival
        # `down` is not multiplied by here: its shape says what there is room for
        to_u, to_y = _projections(up.to(x.dtype), down, (up_a, up_b), (down_a, down_b), joined, gemm)
        rows = gemm.gather(x, RowMap(sources, copies, starts, row_places, stop), to_u.tail)
        up_low = to_u.low(rows, ends)
        u, u_more = to_u.product(rows, up_low, ends)
        del rows
        a = _activate(u, weight_p, u_more, gate, up_bias, experts, to_y.tail, stop)
        del u_more
        down_low = to_y.low(a, ends)
        up_a, up_b = (up_a, up_b) if joined[0] is None else (None, None)  # in backward as in `_projections`
        down_a, down_b = (down_a, down_b) if joined[1] is None else (None, None)
        factors = up_a, up_b, up_low, down_a, down_b, down_low
        places = ends, experts, sources, copies, starts, row_places, stop
        ctx.save_for_backward(x, up, down, weight_p, None if lean else u, *factors, up_bias, down_bias, *places)
        ctx.mark_non_differentiable(*(each for each in (a, down_low) if each is not None))
        return a, down_low, x.new_empty(1, 1).expand(len(x), down.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient = gradients[2]
        if gradient is None:
            return (None,) * 22
        x, up, down, weight_p, u, up_a, up_b, up_low, down_a, down_b, down_low, *rest = ctx.saved_tensors
        up_bias, down_bias, ends, experts, *of_rows = rest
        places = RowMap(*of_rows)
        needs_x, needs_up, needs_down, needs_weight, *needs_factors = ctx.needs_input_grad[:8]
        needs_up_bias, needs_down_bias = ctx.needs_input_grad[8:10]
        gemm: GroupedGemm = ctx.gemm
        matrices = up.to(x.dtype), down.to(x.dtype)
        to_u, to_y = _projections(*matrices, (up_a, up_b), (down_a, down_b), ctx.joined, gemm)
        del matrices
        factors: Any = to_u.a, to_u.b, to_y.a, to_y.b
        up_a, up_b, down_a, down_b = factors
        of_u, of_y = to_u.transposed(), to_y.transposed()
        rows: Any = None
        if u is None:
            rows = gemm.gather(x, places, to_u.tail)
            if to_u.tail:
                rows[:, up.shape[1] :] = up_low
            u = to_u.product(rows, None, ends)[0]
        u_more = None if up_low is None or to_u.tail else gemm.multiply(up_low, up_b, ends)
        if ctx.arrival is not None:
            ctx.arrival.wait()
        y_grad = gemm.gather(gradient, places, of_y.tail)
        down_low_grad = of_y.low(y_grad, ends)
        a_grad, a_grad_more = of_y.product(y_grad, down_low_grad, ends)
        of_a = a_grad, u, weight_p, a_grad_more, u_more
        u_grad, weight_grad, a = _activate_backward(*of_a, ctx.gate, up_bias, experts, of_u.tail, places.stop)
        del of_a
        del a_grad, a_grad_more, u_more, u
        y_grad = y_grad[:, : down.shape[2]]
        down_grad = up_grad = None
        if needs_down:
            down_grad = later.gradient(ctx.later, down, partial(_like_in_dtype, gemm, down), a, y_grad, ends)
        down_factors_grad = (
            _like(gemm, down_a, a, down_low_grad, ends) if needs_factors[2] else None,
            _like(gemm, down_b, down_low, y_grad, ends) if needs_factors[3] else None,
        )
        del a, y_grad
        up_low_grad = of_u.low(u_grad, ends)
        x_grad = None
        if needs_x:
            pair_grad, pair_grad_more = of_u.product(u_grad, up_low_grad, ends)
            x_grad = gemm.sum_copies(pair_grad, places, pair_grad_more)
            del pair_grad, pair_grad_more
        u_grad = u_grad[:, : up.shape[2]]
        if rows is None and (needs_up or needs_factors[0]):
            rows = gemm.gather(x, places)
        rows = None if rows is None else rows[:, : up.shape[1]]
        if needs_up:
            up_grad = later.gradient(ctx.later, up, partial(_like_in_dtype, gemm, up), rows, u_grad, ends)
        up_factors_grad = (
            _like(gemm, up_a, rows, up_low_grad, ends) if needs_factors[0] else None,
            _like(gemm, up_b, up_low, u_grad, ends) if needs_factors[1] else None,
        )
        del rows
        up_bias_grad = None
        if needs_up_bias:
            of_experts = (
                sum_of_experts(u_grad, len(up_bias), experts) if places.stop is None else _sum(gemm, u_grad, ends)
            )
            up_bias_grad = of_experts.to(up_bias.dtype)
        down_bias_grad = None
        if needs_down_bias:
            weights = _weight_of_experts(weight_p, gradient, down_bias, experts, places.sources)
            down_bias_grad = (weights.t() @ gradient).to(down_bias.dtype)
        if needs_weight and down_bias is not None:
            of_all = (gradient @ down_bias.to(gradient.dtype).t()).reshape(-1)  # [R*e]
            of_pairs = of_all.index_select(0, places.sources * len(down_bias) + experts)
            weight_grad = weight_grad + of_pairs.to(weight_grad.dtype)
        found = x_grad, up_grad, down_grad, weight_grad if needs_weight else None
        return *found, *up_factors_grad, *down_factors_grad, up_bias_grad, down_bias_grad, *(None,) * 12


class _Outer(torch.autograd.Function):
    """The second projection and the sum over experts: [P,I] to [R,H]. Keeps nothing; backward is that of `_Inner`."""

    @staticmethod
    def forward(
        ctx: Any,
        carrier,
        a,
        down_low,
        down,
        weight_p,
        down_a,
        down_b,
        down_bias,
        ends,
        experts,
        sources,
        copies,
        starts,
        row_places,
        stop,
        joined,
        gemm,
    ) -> Tensor:
        whole = None if joined is None else joined[0].whole
        y, y_more = Projection(gemm, down.to(a.dtype), down_a, down_b, whole).product(a, down_low, ends)
        y = gemm.sum_copies(y, RowMap(sources, copies, starts, row_places, stop), y_more)
        if down_bias is None:
            return y
        return torch.addmm(y, _weight_of_experts(weight_p, carrier, down_bias, experts, sources), down_bias.to(y.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], *(None,) * 16


def _projections(
    up: Tensor, down: Tensor, of_up: tuple[Any, Any], of_down: tuple[Any, Any], joined: Any, gemm: GroupedGemm
) -> tuple[Projection, Projection]:
    """The two projections, with their adapters in their places."""
    found = []
    for matrix, (a, b), within in zip((up, down), (of_up, of_down), joined, strict=True):
        if within is None:
            found.append(Projection(gemm, matrix, a, b))
            continue
        place, source = within
        place.hold(source)
        found.append(Projection(gemm, matrix, place.a, place.b, place.whole))
    return found[0], found[1]


def _activate(
    u: Tensor, weight_p: Tensor, u_more: Any, gate: Gate | None, bias: Any, experts: Tensor, tail: int, stop: Any
) -> Tensor:
    """[P,I+tail], the first I times the routing weights."""
    if gate is None:
        return squared_relu(u, weight_p, u_more, tail, stop)
    return glu(u, weight_p, u_more, gate, None if bias is None else ExpertBias(bias, experts), tail, stop)


def _activate_backward(
    a_grad: Tensor,
    u: Tensor,
    weight_p: Tensor,
    a_grad_more: Any,
    u_more: Any,
    gate: Gate | None,
    bias: Any,
    experts: Tensor,
    tail: int,
    stop: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u, `tail` columns behind it, and of the routing weights, and what `_activate` gave."""
    if gate is None:
        return squared_relu_backward(a_grad, u, weight_p, a_grad_more, u_more, tail, stop)
    of_experts = None if bias is None else ExpertBias(bias, experts)
    return glu_backward(a_grad, u, weight_p, a_grad_more, u_more, gate, of_experts, tail, stop)


def _weight_of_experts(weight_p: Tensor, x: Tensor, bias: Tensor, experts: Tensor, sources: Tensor) -> Tensor:
    """[R,e] in the dtype of x: the routing weight of each row's experts, zero of all others."""
    exact = torch.promote_types(weight_p.dtype, torch.float32)
    weights = torch.zeros(len(x) * len(bias), dtype=exact, device=x.device)
    weights.index_add_(0, sources * len(bias) + experts, weight_p.to(exact))  # one pair a place: no sum, so no order
    return weights.view(len(x), len(bias)).to(x.dtype)


def sum_of_experts(rows: Tensor, num_experts: int, experts: Tensor) -> Tensor:
    """Rows [P,C] summed by expert [P], one thin GEMM instead of a scatter: [e,C]."""
    of_expert = torch.arange(num_experts, device=experts.device, dtype=experts.dtype)[:, None] == experts
    return of_expert.to(rows.dtype) @ rows


def _sum(gemm: GroupedGemm, rows: Tensor, ends: Tensor) -> Tensor:
    """The same where not all rows hold anything: [e,C]."""
    return gemm.outer(rows.new_ones(len(rows), 8), rows.contiguous(), ends)[:, 0].contiguous()


def _like_in_dtype(gemm: GroupedGemm, matrices: Tensor, rows: Any, others: Any, ends: Tensor) -> Tensor:
    return _like(gemm, matrices, rows, others, ends).to(matrices.dtype)


def _like(gemm: GroupedGemm, matrices: Tensor, rows: Any, others: Any, ends: Tensor) -> Tensor:
    """The gradient `rows.T @ others` of each group, in the strides of `matrices`, so that nobody copies it."""
    if matrices.stride(-1) == 1:
        return gemm.outer(rows, others, ends)
    return gemm.outer(others, rows, ends).transpose(1, 2)
