"""The fused loss on a GPU, in bf16: as near to fp64 as torch's own, also where most labels are to be ignored.

run: pytest -m gpu tests/gpu
"""

import pytest
import torch
from torch.nn import functional

from moe_accel.kernels import cross_entropy

pytestmark = pytest.mark.gpu

NUM_ROWS, WIDTH, VOCABULARY = 1000, 256, 32_003
BF16_SLACK = 1.3
"""How much larger than native's our error against fp64 may be: both round to bf16 at about as many places."""


@pytest.mark.parametrize("share_ignored", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("chunk_bytes", [1 << 30, 300 * VOCABULARY * 2], ids=["one-chunk", "chunks"])
def test_bf16_is_about_as_close_to_fp64_as_native(share_ignored, chunk_bytes, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", chunk_bytes)
    generator = torch.Generator(device="cuda").manual_seed(0)
    made = {"device": "cuda", "generator": generator}
    hidden = torch.randn(NUM_ROWS, WIDTH, **made).bfloat16().requires_grad_()
    weight = (torch.randn(VOCABULARY, WIDTH, **made) / 16).bfloat16().requires_grad_()
    labels = torch.randint(VOCABULARY, (NUM_ROWS,), **made)
    labels[torch.rand(NUM_ROWS, **made) < share_ignored] = -100
    exact = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    truth = functional.cross_entropy(exact[0] @ exact[1].t(), labels)
    native = functional.cross_entropy((hidden @ weight.t()).float(), labels)
    ours = cross_entropy.linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-3, atol=0, equal_nan=True)
    expected = torch.autograd.grad(truth, exact)
    of_native, found = (torch.autograd.grad(loss, (hidden, weight)) for loss in (native, ours))
    for one, other, true in zip(found, of_native, expected, strict=True):
        if share_ignored == 1.0:
            assert not one.any()
            continue
        error, allowed = ((each.double() - true).norm() / true.norm() for each in (one, other))
        assert error <= BF16_SLACK * allowed, f"{error:.2e}, native {allowed:.2e}"
