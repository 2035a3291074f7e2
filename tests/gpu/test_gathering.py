"""GEMMs that gather their rows, on a GPU: each kernel beside torch's products, and all of them in a layer of experts.

run: python3 -m pytest -q -m gpu tests/gpu/test_gathering.py -c /dev/null --rootdir .
"""

import pytest
import torch

from moe_accel.experts import gathered
from moe_accel.experts.gated import gated_experts
from moe_accel.experts.gathered import gathered_experts
from moe_accel.experts.routing import sort_by_expert
from moe_accel.kernels import gathering, gluon
from moe_accel.kernels.device import IS_TRITON_36
from moe_accel.kernels.glu import glu, glu_backward
from moe_accel.kernels.gluon_outer import outer_of_gathered
from moe_accel.kernels.grouped import grouped_mm, grouped_outer
from tests.gradients import both_ways, relative_error

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16 = torch.bfloat16

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not (IS_HOPPER and IS_TRITON_36), reason="needs sm_90, Triton 3.6")]

SIZES = {  # rows, choices, experts, hidden, inner
    "qwen3": (4096, 8, 128, 2048, 768),
    "few rows": (100, 2, 8, 512, 256),
    "one tile and a row": (129, 1, 3, 256, 512),
    "large experts": (2048, 2, 8, 1024, 2048),
}
ROUTINGS = ("random", "skewed", "one expert", "one without rows", "some elsewhere")


def made(sizes, routing):
    num_rows, top_k, num_experts, hidden, inner = sizes
    torch.manual_seed(0)
    scores = torch.randn(num_rows, num_experts, device=DEVICE)
    if routing == "skewed":
        scores = scores - 2 * torch.arange(1, num_experts + 1, device=DEVICE).log()
    if routing == "one expert":
        scores[:, 1] += 100
    if routing == "one without rows":
        scores[:, num_experts // 2] -= 100
    choices = scores.topk(top_k).indices
    if routing == "some elsewhere":  # as under expert parallelism: some rows have fewer experts here, one has none
        choices = choices.masked_fill(torch.rand(choices.shape, device=DEVICE) < 0.4, -1)
        choices[0] = -1
        routes = sort_by_expert(choices, num_experts, int((choices >= 0).sum()))
    else:
        routes = sort_by_expert(choices, num_experts)
    up = (torch.randn(num_experts, 2 * inner, hidden, device=DEVICE) * 0.02).to(BF16)
    down = (torch.randn(num_experts, hidden, inner, device=DEVICE) * 0.02).to(BF16)
    x, gradient = (torch.randn(num_rows, hidden, device=DEVICE).to(BF16) for _ in range(2))
    return x, up, down, gradient, torch.rand(len(routes.pairs), device=DEVICE), routes


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_each_kernel_has_the_numbers_of_torchs_products(sizes, routing):
    x, up, down, gradient, weight, routes = made(sizes, routing)
    sources, ends = routes.rows.sources.int(), routes.ends
    tiles = gathering.find_tiles(ends, len(sources))
    u_exact = grouped_mm(x[sources], up.transpose(1, 2), ends)
    a_exact = glu(u_exact, weight)
    u, a = gathering.up_glu(x, sources, up, weight, tiles)
    lean, again = gathering.up_glu(x, sources, up, weight, tiles, keep=False)
    assert relative_error(u, u_exact) < 1e-3
    assert relative_error(a, a_exact) < 1e-3
    assert lean is None
    assert torch.equal(again, a)
    exact = glu_backward(grouped_mm(gradient[sources], down, ends), u_exact, weight)
    found = gathering.down_glu_backward(gradient, sources, down, u_exact, weight, tiles)
    assert all(relative_error(one, other) < 5e-3 for one, other in zip(found, exact, strict=True))
    repeated = gathering.down_glu_backward(gradient, sources, down, u_exact, weight, tiles)
    assert all(torch.equal(one, other) for one, other in zip(found, repeated, strict=True))
    u_grad = exact[0]
    pairs = {
        "down": (gluon.multiply(a_exact, down.transpose(1, 2), tiles), grouped_mm(a_exact, down.transpose(1, 2), ends)),
        "dX": (gluon.multiply(u_grad, up, tiles), grouped_mm(u_grad, up, ends)),
        "up": (outer_of_gathered(u_grad, x, sources, tiles, False), grouped_outer(u_grad, x[sources], ends)),
        "up, twice the programs": (
            outer_of_gathered(u_grad, x, sources, tiles, False, 2),
            outer_of_gathered(u_grad, x, sources, tiles, False),
        ),
        "of down": (
            outer_of_gathered(gradient, a_exact, sources, tiles, True),
            grouped_outer(gradient[sources], a_exact, ends),
        ),
    }
    for name, (one, other) in pairs.items():
        assert one.shape == other.shape, name
        assert relative_error(one, other) < 1e-3, name


@pytest.mark.parametrize("lean", [False, True], ids=["", "lean"])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_layer_is_as_near_to_exact_as_with_products_of_their_own(sizes, routing, lean, monkeypatch):
    x, up, down, gradient, weight, routes = made(sizes, routing)
    turned = up.transpose(1, 2), down.transpose(1, 2)

    monkeypatch.setattr(gathered, "IS_ON", False)
    leaves = x, *turned, weight
    own = both_ways(lambda *given: gated_experts(*given, routes, lean=lean), leaves, gradient)
    found = both_ways(lambda *given: gathered_experts(*given, routes, lean=lean), leaves, gradient)
    exact = both_ways(lambda *given: gated_experts(*given, routes), [each.double() for each in leaves], gradient)
    for one, other, true in zip(found, own, exact, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert relative_error(one, true) <= 1.05 * relative_error(other, true) + 1e-5
