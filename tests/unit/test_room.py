"""Experts with room for more pairs than there are: all sizes known, whatever was chosen, and the same numbers.

What is behind the pairs holds NaN where nothing was written, so that nobody reads it unseen.
"""

import pytest
import torch

from moe_accel.experts import later
from moe_accel.experts.adapters import Factors
from moe_accel.experts.gated import gated_experts
from moe_accel.experts.gathered import gathered_experts
from moe_accel.experts.routing import pick, sort_by_expert, sort_with_room
from moe_accel.kernels.glu import SWIGLU, Gate

NUM_ROWS, TOP_K, NUM_EXPERTS, WIDTH, INNER, RANK = 30, 3, 5, 8, 16, 8
GPT_OSS = Gate(1.702, 0.0, 7.0, 1.0, True)
CASES = {
    "swiglu": (SWIGLU, False, False),
    "squared relu": (None, False, False),
    "biases": (GPT_OSS, True, False),
    "adapters": (SWIGLU, False, True),
}
OF_CHOICES = {"some": 0.4, "all": 0.0, "none": 1.0}
"""Share of the choices that is not of this rank's experts."""


def choices(share):
    generator = torch.Generator().manual_seed(0)
    found = torch.rand(NUM_ROWS, NUM_EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
    return found.masked_fill(torch.rand(found.shape, generator=generator) < share, -1).int()


@pytest.mark.parametrize("share", OF_CHOICES.values(), ids=OF_CHOICES)
def test_pairs_are_the_same_and_what_is_behind_them_is_nobodys(share):
    given = choices(share)
    count = int((given >= 0).sum())
    exact, roomy = sort_by_expert(given, NUM_EXPERTS, count), sort_with_room(given, NUM_EXPERTS)
    assert len(roomy.pairs) == NUM_ROWS * TOP_K
    assert int(roomy.rows.stop) == count
    assert torch.equal(roomy.ends, exact.ends)
    assert torch.equal(roomy.rows.starts, exact.rows.starts)
    assert torch.equal(roomy.pairs[:count], exact.pairs)
    assert torch.equal(roomy.experts[:count], exact.experts)
    assert all(map(torch.equal, (each[:count] for each in roomy.rows[:2]), exact.rows[:2]))
    assert (roomy.pairs[count:] == given.numel()).all()
    assert not roomy.experts[count:].any()
    assert not roomy.rows.sources[count:].any()


def test_experts_that_are_fewer_than_choices_bound_the_room():
    assert len(sort_with_room(torch.tensor([[0, -1, -1]] * 4), 1).pairs) == 4


@pytest.mark.parametrize("lean", [False, True], ids=["", "lean"])
@pytest.mark.parametrize("share", OF_CHOICES.values(), ids=OF_CHOICES)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_same(case, share, lean):
    gate, has_bias, adapted = CASES[case]
    torch.manual_seed(0)
    given = choices(share)
    twice = 1 if gate is None else 2
    x, weights = torch.randn(NUM_ROWS, WIDTH), torch.rand(NUM_ROWS, TOP_K)
    matrices = [torch.randn(NUM_EXPERTS, WIDTH, twice * INNER), torch.randn(NUM_EXPERTS, INNER, WIDTH)]
    shapes = (WIDTH, RANK), (RANK, twice * INNER), (INNER, RANK), (RANK, WIDTH)
    factors = [torch.randn(NUM_EXPERTS, *shape) for shape in shapes] if adapted else []
    biases = [torch.randn(NUM_EXPERTS, each.shape[2]) for each in matrices] if has_bias else []
    leaves = [each.requires_grad_() for each in (x, weights, *matrices, *factors, *biases)]
    of_up, of_down = (Factors(*factors[:2]), Factors(*factors[2:])) if adapted else (None, None)
    upstream, found = torch.randn(NUM_ROWS, WIDTH), []
    for routing in (
        sort_by_expert(given, NUM_EXPERTS, int((given >= 0).sum())),
        sort_with_room(given, NUM_EXPERTS),
    ):
        both = tuple(biases) if has_bias else (None, None)
        y = gated_experts(x, *matrices, pick(weights, routing), routing, of_up, of_down, gate, both, lean)
        found.append([y, *torch.autograd.grad(y, leaves, upstream)])
    for exact, roomy in zip(*found, strict=True):
        # the same products, of which some begin elsewhere in memory; of a bias, a sum as a product
        torch.testing.assert_close(roomy, exact, rtol=1e-6, atol=1e-5)
    assert share == 1 or all(each.abs().max() > 0 for each in found[1])


@pytest.mark.parametrize("share", OF_CHOICES.values(), ids=OF_CHOICES)
def test_those_that_gather_their_rows_too(share):
    torch.manual_seed(0)
    given = choices(share)
    x, weights = torch.randn(NUM_ROWS, WIDTH), torch.rand(NUM_ROWS, TOP_K)
    stacks = torch.randn(NUM_EXPERTS, 2 * INNER, WIDTH), torch.randn(NUM_EXPERTS, WIDTH, INNER)
    leaves = [each.requires_grad_() for each in (x, weights, *stacks)]
    upstream, found = torch.randn(NUM_ROWS, WIDTH), []
    for routing in (sort_by_expert(given, NUM_EXPERTS, int((given >= 0).sum())), sort_with_room(given, NUM_EXPERTS)):
        y = gathered_experts(x, *(each.transpose(1, 2) for each in stacks), pick(weights, routing), routing, lean=True)
        found.append([y, *torch.autograd.grad(y, leaves, upstream)])
    for exact, roomy in zip(*found, strict=True):
        torch.testing.assert_close(roomy, exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("function", [gated_experts, gathered_experts])
def test_gradients_of_weights_may_be_left_to_be_computed(function):
    torch.manual_seed(0)
    x, routing = torch.randn(NUM_ROWS, WIDTH), sort_with_room(choices(0.4), NUM_EXPERTS)
    stacks = [torch.randn(NUM_EXPERTS, 2 * INNER, WIDTH), torch.randn(NUM_EXPERTS, WIDTH, INNER)]
    leaves = [each.requires_grad_() for each in (x, *stacks)]
    weight_p, found, left = torch.rand(len(routing.pairs)), [], later.Products()
    for products in (None, left):
        with later.collecting(products):
            y = function(x, *(each.transpose(1, 2) for each in stacks), weight_p, routing, lean=True)
        found.append(torch.autograd.grad(y.sum(), leaves, allow_unused=True))
    assert [each is None for each in found[1]] == [False, True, True]
    assert torch.equal(found[0][0], found[1][0])
    assert {each.matrices.data_ptr() for each in left} == {each.data_ptr() for each in stacks}
    for each in left:
        at = [stack.data_ptr() for stack in stacks].index(each.matrices.data_ptr())
        assert torch.equal(each.compute(*each.operands).transpose(1, 2), found[0][1 + at])
        assert each.may_be_beside == (function is gathered_experts)
        if each.may_be_beside:
            out = torch.empty_like(each.matrices).fill_(torch.nan)
            assert each.compute(*each.operands, out=out) is out
            assert torch.equal(out.transpose(1, 2), found[0][1 + at])
