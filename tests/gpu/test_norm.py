"""RMSNorm's kernels on a GPU, bf16 and fp32: as close to fp64 as one rounding, and twice the same bits.

run: pytest -m gpu tests/gpu
"""

import pytest
import torch

from moe_accel.kernels import device
from moe_accel.kernels import rms_norm as module
from moe_accel.kernels.rms_norm import normalise_torch, rms_norm

pytestmark = pytest.mark.gpu
SHAPES = [(1, 128), (70_001, 128), (5000, 24), (4099, 1024), (4099, 2048), (2, 1031, 2880), (4099, 7168), (37, 9000)]


def results(x, weight, gradient, offset, frozen=False):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)
    y = rms_norm(x, weight, 1e-6, offset)
    return y.detach(), *torch.autograd.grad(y, (x,) if frozen else (x, weight), gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_and_its_gradients_are_rounded_once(shape, dtype):
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    x, gradient = (torch.randn(shape, device="cuda", generator=generator).to(dtype) for _ in range(2))
    weight = torch.rand(shape[-1], device="cuda", generator=generator).add(0.5).to(dtype)
    for offset in (0.0, 1.0):
        found = results(x, weight, gradient, offset)
        exact_x, exact_weight = (each.double().requires_grad_() for each in (x, weight))
        y = normalise_torch(exact_x, exact_weight, 1e-6, offset)[0]
        exact = y, *torch.autograd.grad(y, (exact_x, exact_weight), gradient.double())
        for one, other in zip(found, exact, strict=True):
            assert one.dtype == dtype
            # the rounding of each value, and what sums in fp32 lose
            assert (one.double() - other).norm() <= (torch.finfo(dtype).eps / 2 + 2e-6) * other.norm()
        assert all(map(torch.equal, found, results(x, weight, gradient, offset)))
        assert all(map(torch.equal, found[:2], results(x, weight, gradient, offset, frozen=True)))


@pytest.mark.parametrize("width", [1024, 2880])
def test_rows_that_begin_between_16_bytes_have_the_same_norm(width):
    values = torch.randn(2, 257 * width + 1, device="cuda").bfloat16()
    x, gradient = values[:, 1:].view(2, 257, width)
    assert x.data_ptr() % 16 == 2
    weight = torch.ones(width, device="cuda", dtype=torch.bfloat16)
    aligned = results(x.clone(), weight, gradient.clone(), 0.0)
    for one, other in zip(results(x, weight, gradient, 0.0), aligned, strict=True):
        torch.testing.assert_close(one, other, rtol=2.0**-7, atol=2.0**-7)


@pytest.mark.skipif(not device.LAUNCHES_COMPILED, reason="of Triton 3.6")
def test_what_was_compiled_is_started_without_triton(monkeypatch):
    x, gradient = torch.randn(2, 300, 2048, device="cuda").bfloat16()
    weight = torch.ones(2048, device="cuda", dtype=torch.bfloat16)
    first = results(x, weight, gradient, 0.0)

    def refuse(*args, **kwargs):
        raise AssertionError("Triton looked at the arguments again")

    for kernel in (module._forward_kernel, module._backward_kernel, module._sum_kernel):
        monkeypatch.setattr(kernel, "run", refuse)
    assert all(map(torch.equal, first, results(x, weight, gradient, 0.0)))
