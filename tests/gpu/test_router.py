"""The router's kernels on a GPU: experts, weights and gradients of the plain torch form and of transformers' routers.

run: pytest -m gpu tests/gpu
"""

import copy

import pytest
import torch

from moe_accel.experts.router_proof import fuse_router
from moe_accel.kernels import router
from tests.gpu.router_speed import SHAPES, build
from tests.unit.router_rules import RULES, given

pytestmark = pytest.mark.gpu

CLOSE = 2e-6
"""exp of the GPU is right to 2 units in the last place, of an argument that is a product with log2(e)."""


@pytest.mark.parametrize("num_tokens", [1, 3, 1000, 16_384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", RULES)
def test_kernels_are_the_plain_form(name, dtype, num_tokens):
    rule, num_experts, _ = RULES[name]
    logits, bias, gradient = given(name, num_tokens, dtype, "cuda")
    weights, experts, scores = router.route_triton(logits, bias, rule, torch.float32)
    expected, chosen, _ = router.route_torch(logits.double(), bias, rule, torch.float64)
    assert experts.dtype == torch.int64
    assert experts.min() >= 0
    assert experts.max() < num_experts
    assert (experts.sort(1).values.diff() > 0).all()
    same = (experts == chosen).all(1)
    if bias is None and not rule.limits:
        assert same.all()
    assert same.float().mean() > 0.995  # two corrected scores may differ by less than a sigmoid is rounded
    assert float((weights - expected)[same].abs().max()) < CLOSE * max(1.0, rule.scale)
    dense = None if rule.sigmoid or rule.renormalise else logits
    found = router.route_backward_triton(gradient, scores, experts, dense, rule, num_experts, torch.float32)
    exact = logits.double().requires_grad_()
    of_weights = router.route(exact, bias, rule, torch.float64)[0]
    (truth,) = torch.autograd.grad(of_weights, exact, gradient.double())
    scale = max(1.0, float(truth.abs().max()))
    assert float((found - truth)[same].abs().max()) < 4 * CLOSE * scale
    for one, other in zip(
        router.route_triton(logits, bias, rule, torch.float32), (weights, experts, scores), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", RULES)
def test_equal_scores_nan_and_infinities(name):
    rule, num_experts, _ = RULES[name]
    logits, bias, _ = given(name, 64, torch.float32, "cuda")
    logits = logits.round()
    nan, inf = float("nan"), float("inf")
    for row, value in enumerate((nan, inf, -inf, 0.0, -nan)):
        logits[row, row % num_experts], logits[row + 8] = value, value
    logits[20, ::2], logits[21, ::2] = nan, -inf
    weights, experts, _ = router.route_triton(logits, bias, rule, torch.float32)
    # On the CPU: sorting on a GPU tells -0.0 from 0.0, and NaN from -NaN.
    of_cpu = logits.cpu(), None if bias is None else bias.cpu()
    expected, chosen, _ = (each.cuda() for each in router.route_torch(*of_cpu, rule, torch.float32))
    assert (experts.sort(1).values.diff() > 0).all()
    assert experts.min() >= 0
    assert experts.max() < num_experts
    same = (experts == chosen).all(1)
    if bias is None and not rule.limits:  # else sums of rounded sigmoids decide
        assert same.all()
    assert torch.equal(weights.isnan(), expected.isnan())
    torch.testing.assert_close(weights[same], expected[same], rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_fused_router_computes_what_it_did(shape, dtype, autocast, monkeypatch):
    own = build(shape, dtype)
    fused = copy.deepcopy(own)
    proof = fuse_router(fused)
    assert proof is not None
    calls = []
    route = router.route_triton
    monkeypatch.setattr(router, "route_triton", lambda *args: calls.append(args) or route(*args))
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(2000, own.weight.shape[1], device="cuda", dtype=dtype, generator=generator)
    results = []
    for module in (own, fused):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            logits, weights, experts = module(leaf)
        factors = torch.randn(logits.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        total = (weights.float() * factors.gather(1, experts)).sum() + 0.1 * (logits.float() ** 2).mean()
        gradients = torch.autograd.grad(total, (leaf, module.weight))
        results.append((logits, weights, experts, *gradients))
    assert len(calls) == proof.computes(torch.bfloat16 if autocast else None)
    for one, other in zip(*results, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
    (logits, weights, experts, *gradients), (our_logits, our_weights, our_experts, *our_gradients) = results
    assert torch.equal(logits, our_logits)
    (experts, order), (our_experts, our_order) = experts.sort(1), our_experts.sort(1)
    same = (experts == our_experts).all(1)
    assert same.float().mean() > (0.5 if logits.dtype == torch.bfloat16 else 0.995)  # bf16 has ties among the best
    rounding = torch.finfo(weights.dtype).eps
    of_both = weights.gather(1, order)[same], our_weights.gather(1, our_order)[same]
    torch.testing.assert_close(of_both[1], of_both[0], rtol=2 * rounding + 1e-5, atol=1e-6)
    rounding = max(torch.finfo(dtype).eps, torch.finfo(logits.dtype).eps)
    scale = float(gradients[0].abs().max())
    torch.testing.assert_close(our_gradients[0][same], gradients[0][same], rtol=0, atol=(4 * rounding + 1e-5) * scale)
