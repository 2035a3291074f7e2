"""Every Triton kernel equals its plain torch form, in fp32, on Triton's interpreter: run by `test_kernels.py`.

The interpreter computes bf16 wrongly, and must be chosen before triton is imported: TRITON_INTERPRET=1.
"""

from contextlib import nullcontext

import pytest
import torch

from moe_accel.dispatch import message, plan
from moe_accel.experts import routing
from moe_accel.kernels import adam, glu, rms_norm, rope, rows, sort, squared_relu
from moe_accel.kernels.device import INTERPRETED
from tests import interpreter
from tests.unit.noise import EPSILON, values
from tests.unit.test_kernels import GATES

assert INTERPRETED, "set TRITON_INTERPRET=1"
interpreter.read_bounds_of_loops()


@pytest.mark.parametrize("width", [1, 24, 1024, 1030])
@pytest.mark.parametrize("counts", [[1, 1], [0, 3, 0], [8, 8], [9, 0, 17], [0]], ids=str)
def test_sum_of_copies(counts, width):
    total = sum(counts)
    copies = torch.randperm(total, generator=torch.Generator().manual_seed(1))
    starts = torch.tensor(counts).cumsum(0) - torch.tensor(counts)
    x = values(max(total, 1), width)[:total]
    if total == 0:
        assert not rows.sum_copies(x, rows.RowMap(copies, copies, starts)).any()
        return
    for more in (None, x.cos()):
        found, expected = rows.sum_triton(x, copies, starts, more), rows.sum_torch(x, copies, starts, more)
        # sums of up to 17 values near 1, in another order: 17 roundings
        torch.testing.assert_close(found, expected, rtol=0, atol=17 * 4 * EPSILON)


@pytest.mark.parametrize("width", [1, 24, 1024, 1030])
@pytest.mark.parametrize("counts", [[1, 1], [0, 3, 0], [8, 8], [9, 0, 17], [0]], ids=str)
def test_gather_and_its_room(counts, width):
    sizes = torch.tensor(counts)
    copies = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1))
    sources = torch.empty_like(copies)
    sources[copies] = torch.arange(len(counts)).repeat_interleave(sizes)
    x, places = values(len(counts), width), rows.RowMap(sources, copies, sizes.cumsum(0) - sizes)
    for tail in (0, 8):
        found = rows.gather(x, places, tail)
        assert found.shape == (sum(counts), width + tail)
        assert torch.equal(found[:, :width], x[sources])


def test_rows_may_lie_apart():
    apart = values(7, 40)[:, :24]
    copies, starts = torch.tensor([2, 0, 6, 1, 3, 5, 4]), torch.tensor([0, 3, 3, 5])
    sources = torch.empty_like(copies)
    sources[copies] = torch.tensor([0, 0, 0, 2, 2, 3, 3])
    places = rows.RowMap(sources, copies, starts)
    assert torch.equal(rows.sum_copies(apart, places), rows.sum_copies(apart.contiguous(), places))
    assert torch.equal(rows.gather(apart[:4], places, 8)[:, :24], apart[sources])


SENT = {
    "one": (1, 1, 2, 1),
    "few": (5, 3, 2, 4),
    "many": (150, 8, 8, 16),
    "odd": (70, 6, 3, 5),
    "of 40": (33, 4, 40, 2),
}
"""Tokens, top-k, ranks, experts of each."""


@pytest.mark.parametrize("of", SENT)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_what_is_sent_and_in_which_order(of, dtype):
    num_tokens, top_k, num_ranks, num_local = SENT[of]
    choices = chosen(num_tokens, top_k, num_ranks * num_local, skew=2).to(dtype)
    found, expected = (each(choices, num_ranks, num_local) for each in (plan.count, plan.count_torch))
    assert [each.dtype for each in found] == [each.dtype for each in expected]
    assert all(map(torch.equal, found, expected))
    num_rows, most = int(found.counts[:, 0].sum()), num_tokens * min(num_ranks, top_k)
    (ours, ranks), truth = plan.order(found), sort.sort_torch(expected.ranks, num_ranks, most)
    assert torch.equal(ranks[:num_rows].int(), truth.experts[:num_rows].int())
    assert all(map(torch.equal, plan.cut(ours, num_rows)[:3], plan.cut(rows.RowMap(*truth[3:]), num_rows)[:3]))
    row_ranks = [row for row in range(num_ranks) for _ in range(int(found.counts[row, 0]))]
    assert ranks[:num_rows].tolist() == row_ranks
    for row, (source, rank) in enumerate(zip(ours.sources[:num_rows].tolist(), row_ranks, strict=True)):
        assert rank in (choices[source] // num_local).tolist(), row


@pytest.mark.parametrize(("wrong_of", "num_local"), [(1008, 7), (1001, 8)])
def test_a_count_that_is_compiled_wrong_is_noticed_and_not_used(monkeypatch, wrong_of, num_local):
    """Of sizes that no other test has: what was found once is remembered."""

    def wrong(choices, *sizes):
        expected = plan.count_torch(choices, *sizes)
        return expected.ranks, expected.counts.roll(int(len(choices) == wrong_of), 0)

    monkeypatch.setattr(plan, "count_triton", wrong)
    choices = chosen(9, 3, 11 * num_local, skew=1)
    for warns in (pytest.warns(RuntimeWarning, match="of 11 ranks and top 3"), nullcontext()):
        with warns:
            found = plan.count(choices, 11, num_local)
        assert all(map(torch.equal, found, plan.count_torch(choices, 11, num_local)))


@pytest.mark.parametrize("of", SENT)
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("has_choices", [True, False])
def test_what_travels_behind_a_row(of, weights_dtype, has_choices):
    num_tokens, top_k, num_ranks, num_local = SENT[of]
    choices = chosen(num_tokens, top_k, num_ranks * num_local, skew=2)
    counted = plan.count(choices, num_ranks, num_local)
    where, ranks = plan.order(counted)
    num_rows = int(counted.counts[:, 0].sum())
    where, ranks = plan.cut(where, num_rows), ranks[:num_rows]
    x, weights = values(num_tokens, 12), values(num_tokens, top_k).to(weights_dtype)
    given = choices if has_choices else None
    packed, layout = message.pack(x, weights, given, where, ranks, num_local)
    assert packed.shape[1] % 16 == 0
    written = packed.clone()
    message.write_torch(written, layout, weights, given, where.sources, ranks, num_local)
    found, expected = message.unpack(packed, layout), message.unpack(written, layout)
    assert torch.equal(found[0], x[where.sources])
    assert torch.equal(found[1], weights[where.sources])
    assert torch.equal(expected[1], found[1])
    assert (found[2] is None) is not has_choices
    if has_choices:
        assert torch.equal(found[2], expected[2])
        whose = found[2] + (ranks.long() * num_local)[:, None]
        assert torch.equal(whose[found[2] >= 0], choices[where.sources][found[2] >= 0])
        assert int((found[2] >= 0).sum()) == choices.numel()


@pytest.mark.parametrize(
    "weights",
    [values(1, 5).half()[:, 1:], values(3, 5)[:, 2:3], values(1, 3).t()],
    ids=["of one token, with a stride of 5", "one a token, apart", "one a token, with two strides of 1"],
)
def test_weights_may_lie_anyhow(weights):
    (num_tokens, top_k), (num_ranks, num_local) = weights.shape, (2, 4)
    choices = chosen(num_tokens, top_k, num_ranks * num_local, skew=1)
    counted = plan.count(choices, num_ranks, num_local)
    where, ranks = plan.order(counted)
    num_rows = int(counted.counts[:, 0].sum())
    where, x = plan.cut(where, num_rows), values(num_tokens, 12)
    packed, layout = message.pack(x, weights, choices, where, ranks[:num_rows], num_local)
    assert torch.equal(message.unpack(packed, layout)[1], weights[where.sources])
    packed, layout = message.pack_gradients(x, weights)
    assert torch.equal(message.unpack(packed, layout)[1], weights)


def test_activations_leave_room():
    u, gradient, weight = values(5, 80), values(5, 40), values(5)
    for activation, backward, x in (
        (glu.glu, glu.glu_backward, u),
        (squared_relu.squared_relu, squared_relu.squared_relu_backward, u[:, :40].contiguous()),
    ):
        out = activation(x, weight, tail=8)
        assert out.shape == (5, 48)
        assert torch.equal(out[:, :40], activation(x, weight))
        u_grad, *rest = backward(gradient, x, weight, tail=8)
        expected, *others = backward(gradient, x, weight)
        assert u_grad.shape == (5, x.shape[1] + 8)
        assert torch.equal(u_grad[:, :-8], expected)
        assert all(map(torch.equal, rest, others))


def assert_same_order(choices, num_experts, num_pairs=None):
    """Every tensor of the kernels' routing is that of torch: values and dtype."""
    assert sort.can_sort(choices, num_experts)
    found = sort.sort_triton(choices, num_experts, num_pairs)
    expected = sort.sort_torch(choices, num_experts, num_pairs)
    for name, one, other in zip(found._fields, found, expected, strict=True):
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name


def chosen(num_rows, top_k, num_experts, skew, lowest=0):
    """[R,K] experts at random, low ones the more often the larger `skew` is."""
    uniform = torch.rand(num_rows, top_k, generator=torch.Generator().manual_seed(num_rows + num_experts))
    return (uniform**skew * (num_experts - lowest)).long() + lowest


SORTED = [(1, 1), (32, 8), (47, 22)]


@pytest.mark.parametrize("skew", [1, 8])
@pytest.mark.parametrize("num_experts", [3, 128])
@pytest.mark.parametrize(("num_rows", "top_k"), SORTED)
def test_sort_of_pairs(num_rows, top_k, num_experts, skew):
    assert_same_order(chosen(num_rows, top_k, num_experts, skew), num_experts)


@pytest.mark.parametrize("skew", [1, 8])
@pytest.mark.parametrize("num_experts", [1, 32])
@pytest.mark.parametrize(("num_rows", "top_k"), SORTED)
def test_sort_of_pairs_some_of_which_are_computed_elsewhere(num_rows, top_k, num_experts, skew):
    choices = chosen(num_rows, top_k, num_experts, skew, lowest=-1).int()
    assert_same_order(choices, num_experts, int((choices >= 0).sum()))


@pytest.mark.parametrize("given", [0, -1, 127])
def test_sort_of_pairs_that_are_all_alike(given):
    choices = torch.full((90, 4), given)
    assert_same_order(choices, 128, None if given >= 0 else 0)


def test_sort_of_many_blocks(monkeypatch):
    for name, size in {"BLOCK": 16, "CHUNK": 4, "SCANNED_BLOCKS": 4}.items():
        monkeypatch.setattr(sort, name, size)
    assert_same_order(chosen(41, 8, 6, skew=2), 6)
    choices = chosen(41, 8, 6, skew=2, lowest=-1)
    assert_same_order(choices, 6, int((choices >= 0).sum()))


def test_sort_of_choices_that_are_not_contiguous():
    assert_same_order(chosen(8, 60, 5, skew=1).t(), 5)


def test_what_the_kernels_sort_and_that_an_empty_batch_is_not(monkeypatch):
    calls, by_kernels = [], sort.sort_triton
    monkeypatch.setattr(sort, "sort_triton", lambda *given: calls.append(given) or by_kernels(*given))
    assert routing.sort_by_expert(torch.tensor([[1, 0], [0, 1]]), 2).pairs.tolist() == [1, 2, 0, 3]
    assert len(calls) == 1
    for empty in (torch.zeros(0, 2, dtype=torch.int64), torch.zeros(3, 0, dtype=torch.int64)):
        assert routing.sort_by_expert(empty, 2).ends.tolist() == [0, 0]
    assert routing.sort_by_expert(torch.tensor([[1024, 0]]), 1025).pairs.tolist() == [1, 0]
    assert len(calls) == 1


@pytest.mark.parametrize("inner", [1, 40, 1024, 1032])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("of_two", [False, True])
@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_glu_and_its_backward(gate, inner, weight_dtype, of_two):
    u, gradient, weight = values(5, 2 * inner), values(5, inner), values(5).to(weight_dtype)
    more, gradient_more, bias = None, None, None
    if of_two:
        more, gradient_more = u.cos(), gradient.cos()
        bias = glu.ExpertBias(values(3, 2 * inner), torch.tensor([2, 0, 0, 1, 2], dtype=torch.int16))
    expected = glu.glu_torch(u, weight, more, gate, bias)
    torch.testing.assert_close(glu.glu(u, weight, more, gate, bias), expected, rtol=16 * EPSILON, atol=4 * EPSILON)
    found = glu.glu_backward(gradient, u, weight, gradient_more, more, gate, bias)
    expected = glu.glu_backward_torch(gradient, u, weight, gradient_more, more, gate, bias)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        # sums over `inner` products near 1: as many roundings at worst, their square root in fact
        rounding = torch.finfo(one.dtype).eps
        torch.testing.assert_close(one, other, rtol=16 * rounding, atol=16 * rounding * inner**0.5)


def test_glu_keeps_a_nan_within_its_clamps():
    u = torch.tensor([[float("nan"), 1.0, 1.0, float("nan")]])
    assert glu.glu(u, torch.ones(1), gate=glu.Gate(limit=0.5)).isnan().all()


@pytest.mark.parametrize("inner", [1, 40, 1024, 1032])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("of_two", [False, True])
def test_squared_relu_and_its_backward(inner, weight_dtype, of_two):
    u, gradient, weight = values(5, inner), values(5, inner + 1)[:, :inner], values(5).to(weight_dtype)
    more, gradient_more = (u.cos(), gradient.cos()) if of_two else (None, None)
    expected = squared_relu.squared_relu_torch(u, weight, more)
    torch.testing.assert_close(squared_relu.squared_relu(u, weight, more), expected, rtol=8 * EPSILON, atol=2 * EPSILON)
    found = squared_relu.squared_relu_backward(gradient, u, weight, gradient_more, more)
    expected = squared_relu.squared_relu_backward_torch(gradient, u, weight, gradient_more, more)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        # sums over `inner` products of up to 20: as many roundings at worst, their square root in fact
        rounding = torch.finfo(one.dtype).eps
        torch.testing.assert_close(one, other, rtol=8 * rounding, atol=32 * rounding * inner**0.5)


def test_squared_relu_keeps_a_nan():
    u = torch.tensor([[1.0, float("nan"), -2.0]])
    found = squared_relu.squared_relu(u, torch.ones(1))
    torch.testing.assert_close(found, torch.tensor([[1.0, float("nan"), 0.0]]), equal_nan=True)


TILES = {
    "one-program": rms_norm.Tile(1, 4, 1, 3),
    "programs-of-two-tiles": rms_norm.Tile(2, 4, 2, 2),
    "a-program-for-each-tile": rms_norm.Tile(4, 4, None, 1),
}
NORMS = {
    **{f"chosen-{rows}-{width}": (rows, width, None) for rows, width in ((1, 1), (5, 24), (70, 128), (3, 1032))},
    **{
        f"{name}-{rows}-{width}": (rows, width, tile)
        for name, tile in TILES.items()
        for rows, width in ((1, 3), (9, 20))
    },
}


@pytest.mark.parametrize(("num_rows", "width", "tile"), NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_and_its_backward(num_rows, width, tile, offset):
    x, gradient, weight = values(num_rows, width), values(num_rows, width + 1)[:, :width], values(width)
    y, inverse = rms_norm.normalise(x, weight, 1e-6, offset, tile)
    expected, expected_inverse = rms_norm.normalise_torch(x, weight, 1e-6, offset)
    torch.testing.assert_close(inverse, expected_inverse, rtol=8 * EPSILON, atol=0)
    torch.testing.assert_close(y, expected, rtol=16 * EPSILON, atol=EPSILON)
    found = rms_norm.normalise_backward(gradient, x, weight, inverse, offset, tile=tile)
    expected = rms_norm.normalise_backward_torch(gradient, x, weight, expected_inverse, offset)
    for one, other in zip(found, expected, strict=True):
        scale = float(other.abs().max())
        # differences of sums of `width` products, and sums over rows, in another order
        torch.testing.assert_close(one, other, rtol=0, atol=64 * EPSILON * max(1.0, scale))
    frozen, none = rms_norm.normalise_backward(gradient, x, weight, inverse, offset, of_weight=False)
    assert torch.equal(frozen, found[0])
    assert none is None


def test_sums_of_more_programs_than_are_added_at_once():
    sums = values(rms_norm.SUMMED_ROWS + 3, rms_norm.SUMMED_COLUMNS + 1)
    found = rms_norm.sum_rows(sums, torch.float16)
    expected = sums.double().sum(0).half()
    torch.testing.assert_close(found, expected, rtol=2**-10, atol=2**-13)  # of rounding to fp16; sums are exact to 1e-5


@pytest.mark.parametrize("trained", ["x", "weight", "both"])
def test_rms_norm_of_a_batch_gives_the_gradients_that_are_wanted(trained):
    x, weight, gradient = values(2, 3, 24), values(24), values(2, 3, 24).cos()
    expected, inverse = rms_norm.normalise_torch(x, weight, 1e-6, 1.0)
    expected_gradients = rms_norm.normalise_backward_torch(gradient, x, weight, inverse, 1.0)
    x.requires_grad_(trained != "weight")
    weight.requires_grad_(trained != "x")
    found = rms_norm.rms_norm(x, weight, 1e-6, 1.0)
    torch.testing.assert_close(found, expected, rtol=16 * EPSILON, atol=EPSILON)
    found.backward(gradient)
    for leaf, other in zip((x, weight), expected_gradients, strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, other, rtol=0, atol=64 * EPSILON * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("batches_of_angles", [1, 2])
@pytest.mark.parametrize("width", [24, 12])
def test_rotation_and_its_backward(strided, batches_of_angles, width):
    x = values(2, 5, 3, 24).transpose(1, 2) if strided else values(2, 3, 5, 24)  # [2,3,5,24]
    cos, sin = values(batches_of_angles, 5, width), values(batches_of_angles, 5, width).flip(1)
    expected_input = x.clone().requires_grad_()
    expected = rope.rotate_torch(expected_input, cos, sin)
    found = rope.rotate_triton(x, cos, sin, backward=False)
    assert found.stride() == x.stride()
    torch.testing.assert_close(found, expected, rtol=4 * EPSILON, atol=4 * EPSILON)
    gradient = values(2, 3, 5, 24).flip(0)
    expected.backward(gradient)
    found = rope.rotate_triton(gradient, cos, sin, backward=True)
    torch.testing.assert_close(found, expected_input.grad, rtol=4 * EPSILON, atol=4 * EPSILON)


def test_rms_norm_of_strided_rows_and_its_backward():
    x, weight, gradient = values(7, 48)[:, ::2], values(24), values(24, 7).T
    assert not x.is_contiguous()
    expected, inverse = rms_norm.normalise_torch(x, weight, 1e-6, 0.0)
    expected_gradients = rms_norm.normalise_backward_torch(gradient, x, weight, inverse, 0.0)
    leaves = x.detach().requires_grad_(), weight.requires_grad_()
    found = rms_norm.rms_norm(*leaves, 1e-6)
    torch.testing.assert_close(found, expected, rtol=16 * EPSILON, atol=EPSILON)
    for one, other in zip(torch.autograd.grad(found, leaves, gradient), expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=64 * EPSILON * max(1.0, float(other.abs().max())))
    weight.requires_grad_(False)  # as with LoRA
    x_grad = torch.autograd.grad(rms_norm.rms_norm(leaves[0], weight, 1e-6), leaves[0], gradient)[0]
    torch.testing.assert_close(x_grad, expected_gradients[0], rtol=0, atol=64 * EPSILON * float(x_grad.abs().max()))


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("decoupled", "weight_decay"), [(True, 0.0), (True, 0.1), (False, 0.0), (False, 0.1)])
@pytest.mark.parametrize("shape", [(1,), (3, 1024), (2, 700, 3)], ids=str)
def test_step_of_adam(shape, decoupled, weight_decay, maximize):
    how = adam.Adam(1e-2, 0.9, 0.999, 1e-3, weight_decay, decoupled, maximize)
    parameter, gradient = values(*shape), values(*shape).sin()
    found = [each.clone() for each in (parameter, gradient, gradient / 7, gradient.square())]
    expected = [each.clone() for each in found]
    for number in (1.0, 2.0):
        correction = adam.corrections([torch.tensor(number)], how)[0]
        adam.step(*found, correction, how)
        adam.step_torch(*expected, correction, how)
    assert torch.equal(found[1], gradient)
    assert not torch.equal(found[0], parameter)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=4 * EPSILON, atol=4 * EPSILON)
