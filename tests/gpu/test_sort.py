"""The kernels that sort pairs by expert, on a GPU: every tensor is that of torch, and twice the same bits.

run: pytest -m gpu tests/gpu
"""

import pytest
import torch

from moe_accel.kernels.sort import can_sort, sort_torch, sort_triton

pytestmark = pytest.mark.gpu


def chosen(num_rows, top_k, num_experts, skew, lowest=0):
    """[R,K] experts at random, low ones the more often the larger `skew` is."""
    generator = torch.Generator("cuda").manual_seed(num_rows + num_experts)
    uniform = torch.rand(num_rows, top_k, device="cuda", generator=generator)
    return (uniform**skew * (num_experts - lowest)).long() + lowest


def assert_same_order(choices, num_experts, num_pairs=None):
    assert can_sort(choices, num_experts)
    found = sort_triton(choices, num_experts, num_pairs)
    expected = sort_torch(choices, num_experts, num_pairs)
    for name, one, other in zip(found._fields, found, expected, strict=True):
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name
    for name, one, other in zip(found._fields, found, sort_triton(choices, num_experts, num_pairs), strict=True):
        assert torch.equal(one, other), f"{name} differs from run to run"


@pytest.mark.parametrize("skew", [1, 8, 100])
@pytest.mark.parametrize(
    ("num_rows", "top_k", "num_experts"),
    [
        (65_536, 8, 128),
        (131_072, 8, 128),
        (8192, 8, 128),
        (16_384, 2, 8),
        (16_384, 4, 32),
        (16_384, 6, 128),
        (4096, 22, 512),
        (5000, 10, 1024),
        (1001, 1, 3),
        (1, 8, 128),
        (1, 1, 1),
    ],
)
def test_pairs_are_sorted_as_torch_sorts_them(num_rows, top_k, num_experts, skew):
    assert_same_order(chosen(num_rows, top_k, num_experts, skew), num_experts)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_experts", [1, 16, 31, 32, 64, 128])
@pytest.mark.parametrize("skew", [0.1, 1, 8])
def test_what_is_computed_elsewhere_is_left_out(dtype, num_experts, skew):
    choices = chosen(20_000, 8, num_experts, skew, lowest=-1).to(dtype)
    assert_same_order(choices, num_experts, int((choices >= 0).sum()))


def test_no_pair_is_computed_here():
    assert_same_order(torch.full((300, 8), -1, device="cuda"), 16, 0)
