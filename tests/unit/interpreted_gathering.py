"""Experts whose GEMMs gather their rows equal their plain torch form, in fp32, on Triton's interpreter.

Run by `test_kernels.py`: the interpreter must be chosen before triton is imported, TRITON_INTERPRET=1.
"""

import pytest
import torch
from torch.nn import functional

from moe_accel.experts.routing import sort_by_expert
from moe_accel.kernels import gathering
from moe_accel.kernels.device import INTERPRETED
from moe_accel.kernels.glu import glu_backward_torch, glu_torch
from moe_accel.kernels.grouped import grouped_mm_by_group
from tests import interpreter
from tests.unit.noise import values

assert INTERPRETED, "set TRITON_INTERPRET=1"
interpreter.read_bounds_of_loops()

NUM_ROWS, HIDDEN, INNER, NUM_EXPERTS = 150, 256, 256, 5
CHOICES = {
    "two of five, one without rows": lambda: torch.tensor([0, 1, 3, 4])[torch.rand(NUM_ROWS, 4).argsort(1)[:, :2]],
    "one for all": lambda: torch.full((NUM_ROWS, 1), 3),
    "whole tiles": lambda: torch.arange(256)[:, None] // 128 * 4,
}


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_both_kernels_and_the_tiles(choices):
    torch.manual_seed(0)
    routing = sort_by_expert(choices(), NUM_EXPERTS)
    sources, num_pairs = routing.rows.sources.int(), len(routing.pairs)
    tiles = gathering.find_tiles(routing.ends, num_pairs)
    total, sizes = tiles.total.item(), routing.counts().tolist()
    expert, start, end = tiles.places[:, :total].tolist()
    stops = routing.ends.tolist()
    expected = [
        (each, first, stops[each])
        for each, size in enumerate(sizes)
        for first in range(stops[each] - size, stops[each], gathering.BLOCK_M)
    ]
    assert list(zip(expert, start, end, strict=True)) == expected
    assert [sizes[each] for each in tiles.order.tolist()] == sorted(sizes, reverse=True)

    x, gradient = values(NUM_ROWS, HIDDEN), values(NUM_ROWS, HIDDEN).cos()
    if num_pairs == 256:
        x, gradient = values(256, HIDDEN), values(256, HIDDEN).cos()
    up, down = values(NUM_EXPERTS, 2 * INNER, HIDDEN) / 16, values(NUM_EXPERTS, HIDDEN, INNER).sin() / 16
    weight = torch.rand(num_pairs)
    u_exact = grouped_mm_by_group(x[sources], up.transpose(1, 2), routing.ends)
    a_exact = glu_torch(u_exact, weight)
    near = {"rtol": 0, "atol": 1e-4}
    u, a = gathering.up_glu(x, sources, up, weight, tiles)
    torch.testing.assert_close(u, u_exact, **near)
    torch.testing.assert_close(a, a_exact, **near)
    assert gathering.up_glu(x, sources, up, weight, tiles, keep=False)[0] is None
    assert torch.equal(gathering.up_glu(x, sources, up, weight, tiles, keep=False)[1], a)
    a_grad = grouped_mm_by_group(gradient[sources], down, routing.ends)
    exact = glu_backward_torch(a_grad, u_exact, weight)
    found = gathering.down_glu_backward(gradient, sources, down, u_exact, weight, tiles)
    for one, other in zip(found, exact, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    assert functional.cosine_similarity(found[1], exact[1], dim=0) > 0.999999
