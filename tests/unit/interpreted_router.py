"""The router's kernels equal their plain torch form, in fp32, on Triton's interpreter: run by `test_kernels.py`."""

import pytest
import torch

from moe_accel.kernels import router
from moe_accel.kernels.device import INTERPRETED
from tests.unit.noise import EPSILON
from tests.unit.router_rules import RULES, given

assert INTERPRETED, "set TRITON_INTERPRET=1"
# rows past the end of a batch are read as -inf or 0; numpy warns of what comes of them, and nothing is written
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def assert_same(name, logits, bias, gradient):
    rule, num_experts, _ = RULES[name]
    weights, experts, scores = router.route_triton(logits, bias, rule, torch.float32)
    expected, chosen, of_torch = router.route_torch(logits, bias, rule, torch.float32)
    assert experts.dtype == torch.int64
    assert torch.equal(experts, chosen)
    # a sum of exponentials, each of them rounded, and a quotient
    close = {"rtol": 32 * EPSILON, "atol": EPSILON, "equal_nan": True}
    torch.testing.assert_close(scores, of_torch, **close)
    torch.testing.assert_close(weights, expected, **close)
    dense = None if rule.sigmoid or rule.renormalise else logits
    how = dense, rule, num_experts, torch.float32
    found = router.route_backward_triton(gradient, of_torch, chosen, *how)
    expected = router.route_backward_torch(gradient, of_torch, chosen, *how)
    scale = max(1.0, float(expected.nan_to_num(0).abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=32 * EPSILON * scale, equal_nan=True)


@pytest.mark.parametrize("name", RULES)
def test_routes_and_their_gradients(name):
    assert_same(name, *given(name))


@pytest.mark.parametrize("name", ["qwen3", "deepseek-v3", "sigmoid alone"])
def test_one_token_and_rows_that_are_not_contiguous(name):
    logits, bias, gradient = given(name, num_tokens=1)
    assert_same(name, logits, bias, gradient)
    logits, bias, gradient = given(name)
    assert_same(name, logits.t().contiguous().t(), bias, gradient.t().contiguous().t())


@pytest.mark.parametrize("name", ["qwen3", "olmoe", "deepseek-v3", "groups alone", "sigmoid alone", "all of three"])
def test_equal_scores_nan_and_infinities(name):
    logits, bias, gradient = given(name, num_tokens=12)
    logits = logits.round()
    nan, inf = float("nan"), float("inf")
    for row, value in enumerate((nan, inf, -inf, 0.0)):
        logits[row, row % logits.shape[1]] = value
        logits[row + 4] = value
    logits[8, ::2], logits[9, ::2] = nan, -inf
    logits[10] = torch.tensor([0.0, -0.0]).repeat(logits.shape[1])[: logits.shape[1]]
    assert_same(name, logits, bias, gradient)
    assert_same(name, torch.full_like(logits, -nan), bias, gradient)


def test_narrow_logits_are_told_apart_by_all_of_their_bits():
    logits = torch.arange(-256, 256)[None] / 32  # all of them distinct in bf16
    logits = torch.cat([logits, -logits, 2.0**100 * logits, 2.0**-100 * logits])
    logits = torch.stack([row[torch.randperm(512, generator=torch.Generator().manual_seed(0))] for row in logits])
    rule = router.Rule(32)
    _, expected, _ = router.route_torch(logits, None, rule, torch.float32)
    _, experts, _ = router.route_triton(logits.bfloat16(), None, rule, torch.float32)
    assert torch.equal(experts, expected)


def test_autograd_goes_through_the_kernels(monkeypatch):
    for name in ("route_torch", "route_backward_torch"):
        monkeypatch.setattr(router, name, None)
    rule, num_experts, _ = RULES["olmoe"]
    logits, _, gradient = given("olmoe")
    logits.requires_grad_()
    weights, experts = router.route(logits, None, rule, torch.float32)
    assert not experts.requires_grad
    expected = torch.autograd.grad(logits.softmax(1).gather(1, experts), logits, gradient)
    torch.testing.assert_close(torch.autograd.grad(weights, logits, gradient), expected, rtol=0, atol=32 * EPSILON)
    assert num_experts == logits.shape[1]
