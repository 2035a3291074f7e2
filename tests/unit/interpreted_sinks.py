"""The kernels around flash attention with sinks equal their plain torch form, in fp32, on Triton's interpreter.

Run by `test_kernels.py`: the interpreter must be chosen before triton is imported, TRITON_INTERPRET=1.
"""

import pytest
import torch

from moe_accel.kernels import sinks
from moe_accel.kernels.device import INTERPRETED
from tests.unit.noise import EPSILON, values

assert INTERPRETED, "set TRITON_INTERPRET=1"


@pytest.mark.parametrize("num_tokens", [1, 64, 131])
@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize(("num_heads", "width"), [(1, 1), (3, 8), (2, 24)])
def test_sinks_in_out_and_sums_and_their_gradient(num_tokens, num_rows, num_heads, width):
    by_head = values(num_rows, num_heads, num_tokens, width)
    by_token = values(num_rows, num_tokens, num_heads, width).transpose(1, 2)
    sums, of_heads = 3 * values(num_rows, num_heads, num_tokens), torch.linspace(-4, 6, num_heads)
    for out in (by_head, by_token):
        expected = sinks.add_sinks_torch(out, sums, of_heads)
        for one, other in zip(sinks.add_sinks(out, sums, of_heads), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=16 * EPSILON, atol=16 * EPSILON)
            assert one.is_contiguous()
        gradient = values(*expected[0].shape)
        found = sinks.sinks_gradient(gradient, *expected, of_heads)
        exact = sinks.sinks_gradient_torch(gradient, *expected, of_heads)
        # sums of as many products, in another order
        torch.testing.assert_close(found, exact, rtol=0, atol=64 * EPSILON * max(1.0, float(exact.abs().max())))
