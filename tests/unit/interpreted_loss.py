"""The kernels of the fused loss equal their plain torch form, in fp32, on Triton's interpreter.

Run by `test_kernels.py`: the interpreter must be chosen before triton is imported, TRITON_INTERPRET=1.
"""

import pytest
import torch

from moe_accel.kernels import cross_entropy
from moe_accel.kernels.device import INTERPRETED
from tests import interpreter
from tests.unit.noise import EPSILON, values

assert INTERPRETED, "set TRITON_INTERPRET=1"
interpreter.read_bounds_of_loops()


@pytest.mark.parametrize("width", [3, 8192, 8200])
def test_softmax_gradient(width):
    logits, scale = 4 * values(5, width), torch.tensor([0.25])
    logits[2:4, : width // 2] = -float("inf")
    labels = torch.tensor([0, width - 1, width // 3 * 2, width - 2, width // 2])
    expected = logits.clone()
    of_rows = cross_entropy.softmax_gradient_torch_(expected, labels, scale)
    found = cross_entropy.softmax_gradient_(logits, labels, scale)
    # exp of values up to 30: their own rounding counts 30 times; sums of `width` of them in fp32
    torch.testing.assert_close(found, of_rows, rtol=64 * EPSILON, atol=64 * EPSILON)
    torch.testing.assert_close(logits, expected, rtol=128 * EPSILON, atol=EPSILON)


def test_a_loss_of_no_counting_rows_is_nan_and_its_gradients_are_zero():
    hidden, weight = values(3, 4).requires_grad_(), values(11, 4).requires_grad_()
    found = cross_entropy.linear_cross_entropy(hidden, weight, torch.full((3,), -100))
    assert found.isnan()
    for gradient in torch.autograd.grad(found, (hidden, weight)):
        assert not gradient.any()


def test_an_impossible_label_makes_the_loss_nan():
    hidden, weight = values(3, 4), values(11, 4)
    for label in (11, -1):
        assert cross_entropy.linear_cross_entropy(hidden, weight, torch.tensor([0, label, 1])).isnan()


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, cross_entropy.SCALED)])
@pytest.mark.parametrize("factor", [1.0, 0.3, 0.0, float("nan")])
def test_a_gradient_is_multiplied_in_place(shape, factor):
    gradient = values(*shape)
    expected = gradient * factor
    found = cross_entropy.scale_(gradient, torch.tensor(factor))
    assert found is gradient
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_a_graph_that_is_kept_gives_the_same_gradients_again():
    hidden, weight = (values(*shape).requires_grad_() for shape in ((5, 8), (11, 8)))
    loss = 3 * cross_entropy.linear_cross_entropy(hidden, weight, torch.arange(5))
    runs = [torch.autograd.grad(loss, (hidden, weight), retain_graph=run < 2) for run in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], run, strict=True))
