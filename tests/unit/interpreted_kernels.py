"""Every Triton kernel equals its plain torch form, in fp32, on Triton's interpreter: run by `test_kernels.py`.

The interpreter computes bf16 wrongly, and must be chosen before triton is imported: TRITON_INTERPRET=1.
"""

import pytest
import torch

from moe_accel.kernels import cross_entropy, glu, rms_norm, rope, rows, squared_relu
from moe_accel.kernels.device import INTERPRETED
from tests.unit.test_kernels import GATES

assert INTERPRETED, "set TRITON_INTERPRET=1"
EPSILON = torch.finfo(torch.float32).eps


def values(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("width", [1, 24, 1024, 1030])
@pytest.mark.parametrize("counts", [[1, 1], [0, 3, 0], [8, 8], [9, 0, 17], [0]], ids=str)
def test_sum_of_copies(counts, width):
    total = sum(counts)
    copies = torch.randperm(total, generator=torch.Generator().manual_seed(1))
    starts = torch.tensor(counts).cumsum(0) - torch.tensor(counts)
    x = values(max(total, 1), width)[:total]
    if total == 0:
        assert not rows.sum_copies(x, copies, starts).any()
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


@pytest.mark.parametrize(("num_rows", "width"), [(1, 1), (5, 24), (70, 128), (3, 1032)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_and_its_backward(num_rows, width, offset, monkeypatch):
    monkeypatch.setattr(rms_norm, "NUM_PROGRAMS", 2)  # so that a program has several tiles
    x, gradient, weight = values(num_rows, width), values(num_rows, width + 1)[:, :width], values(width)
    y, inverse = rms_norm.normalise(x, weight, 1e-6, offset)
    expected, expected_inverse = rms_norm.normalise_torch(x, weight, 1e-6, offset)
    torch.testing.assert_close(inverse, expected_inverse, rtol=8 * EPSILON, atol=0)
    torch.testing.assert_close(y, expected, rtol=16 * EPSILON, atol=EPSILON)
    found = rms_norm.normalise_backward(gradient, x, weight, inverse, offset)
    expected = rms_norm.normalise_backward_torch(gradient, x, weight, expected_inverse, offset)
    for one, other in zip(found, expected, strict=True):
        scale = float(other.abs().max())
        # differences of sums of `width` products, and sums over rows, in another order
        torch.testing.assert_close(one, other, rtol=0, atol=64 * EPSILON * max(1.0, scale))


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("batches_of_angles", [1, 2])
def test_rotation_and_its_backward(strided, batches_of_angles):
    x = values(2, 5, 3, 24).transpose(1, 2) if strided else values(2, 3, 5, 24)  # [2,3,5,24]
    cos, sin = values(batches_of_angles, 5, 24), values(batches_of_angles, 5, 24).flip(1)
    expected_input = x.clone().requires_grad_()
    expected = rope.rotate_torch(expected_input, cos, sin)
    found = rope.rotate_triton(x, cos, sin, backward=False)
    assert found.stride() == x.stride()
    torch.testing.assert_close(found, expected, rtol=4 * EPSILON, atol=4 * EPSILON)
    gradient = values(2, 3, 5, 24).flip(0)
    expected.backward(gradient)
    found = rope.rotate_triton(gradient, cos, sin, backward=True)
    torch.testing.assert_close(found, expected_input.grad, rtol=4 * EPSILON, atol=4 * EPSILON)


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
