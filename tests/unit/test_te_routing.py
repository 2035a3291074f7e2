"""`te_parts: [router, permutation]`: the numbers of ours, through TransformerEngine's calling contract."""

import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_accel import block, experts
from moe_accel.experts import router as fused_router
from moe_accel.experts.adapters import Factors
from moe_accel.experts.gated import gated_experts
from moe_accel.experts.routing import sort_by_expert
from moe_accel.kernels import router, rows, te_parts, te_router, te_rows
from moe_accel.kernels.grouped import TORCH
from moe_accel.kernels.router import Rule
from tests.fake_transformer_engine import CALLS
from tests.families import build_tiny, experts_modules
from tests.gradients import both_ways, by_expert, relative_error

BF16 = torch.bfloat16
GROUPS = {"num_groups": 4, "top_groups": 2}
RULES = {
    "softmax of the best": Rule(4, renormalise=True),
    "best of the softmax": Rule(4, scale=0.5),
    "sigmoid": Rule(4, sigmoid=True, renormalise=True, scale=2.5, epsilon=1e-20),
    "sigmoid in groups": Rule(4, sigmoid=True, renormalise=True, scale=2.5, epsilon=1e-20, **GROUPS),
    "the one best": Rule(1, renormalise=True),
}
OTHERS = {
    "sigmoid, not divided": Rule(4, sigmoid=True),
    "one sigmoid": Rule(1, sigmoid=True, renormalise=True),
    "epsilon": Rule(4, sigmoid=True, renormalise=True, epsilon=1e-6),
    "three of a group": Rule(6, sigmoid=True, renormalise=True, **GROUPS),
}


# ---- router


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_router_gives_each_expert_what_ours_gives(package, rule, dtype):
    torch.manual_seed(0)
    logits, bias = torch.randn(20, 16).to(dtype), torch.rand(16)
    given = logits, bias, rule, torch.linspace(-1, 1, logits.numel()).view(logits.shape)
    weights, gradient = by_expert(te_router.route, *given)
    expected, expected_gradient = by_expert(router.route, *given)
    assert sum(CALLS.values()) == 1
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)  # in fp32, whatever the logits
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-2 if dtype == BF16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", OTHERS.values(), ids=OTHERS)
def test_rules_that_it_does_not_have_stay_ours(package, rule):
    torch.manual_seed(0)
    logits, bias = torch.randn(20, 16), torch.rand(16)
    for one, other in zip(
        te_router.route(logits, bias, rule, BF16), router.route(logits, bias, rule, BF16), strict=True
    ):
        assert torch.equal(one, other)
    assert not CALLS


def test_no_tokens_and_fp64_stay_ours(package):
    rule = RULES["softmax of the best"]
    weights, chosen = te_router.route(torch.randn(0, 16), None, rule, BF16)
    assert (weights.shape, chosen.shape) == ((0, 4), (0, 4))
    logits = torch.randn(3, 16, dtype=torch.float64)
    assert torch.equal(
        te_router.route(logits, None, rule, torch.float64)[0], router.route(logits, None, rule, torch.float64)[0]
    )
    assert not CALLS


@pytest.mark.parametrize(("family", "kind"), [("qwen3_moe", "softmax"), ("deepseek_v3", "sigmoid")])
def test_a_models_routers_compute_by_the_function_they_are_given(package, family, kind):
    torch.manual_seed(0)
    model, index = build_tiny(family, torch.float32), torch.arange(32).view(2, 16)
    expected = model(index, labels=index).loss
    package.setattr(fused_router, "use_triton", lambda x: True)
    num_routed, said = block.fuse_routers(model, None, by_te=True)
    taken = f": {num_routed} of them by TransformerEngine"
    assert said.startswith(f"{num_routed} of {num_routed} routers")
    found = model(index, labels=index).loss
    assert CALLS[kind] == num_routed > 0
    assert taken in said
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert block.fuse_routers(model, None)[0] == num_routed
    model(index)
    assert CALLS[kind] == num_routed, "asked for ours again, it is ours"


# ---- permutation


CHOICES = {
    "random": lambda: torch.randn(20, 6).topk(3).indices,
    "some elsewhere": lambda: torch.randn(20, 6).topk(3).indices.masked_fill(torch.rand(20, 3) < 0.5, -1),
    "one expert": lambda: torch.full((20, 1), 4),
    "an expert twice": lambda: torch.tensor([[1, 1], [2, 0]]),
    "none at the end": lambda: torch.tensor([[1, 2], [-1, -1]]),
}


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_rows_are_copied_and_summed_as_by_ours(package, choices):
    torch.manual_seed(0)
    given = choices()
    routing = sort_by_expert(given, 6, int((given >= 0).sum()))
    moving, of_rows = te_rows.moving(TORCH), te_rows.with_places(routing.rows, given.shape[1])
    x = torch.randn(len(given), 8, dtype=BF16)
    copies = moving.gather(x, of_rows)
    assert torch.equal(copies, rows.gather(x, routing.rows))
    summed = moving.sum_copies(copies, of_rows)
    assert torch.equal(summed, rows.sum_copies(copies.float(), routing.rows).to(BF16))
    assert CALLS == {"permute": 1, "unpermute": 1}


def test_what_is_not_for_it_goes_the_usual_way_and_no_rows_are_nothing_special(package):
    torch.manual_seed(0)
    routing, moving = sort_by_expert(CHOICES["random"](), 6), te_rows.moving(TORCH)
    x, of_rows = torch.randn(20, 8, dtype=BF16), te_rows.with_places(routing.rows, 3)
    assert torch.equal(moving.gather(x.float(), of_rows), rows.gather(x.float(), of_rows))
    assert moving.gather(x, of_rows, 4).shape == (60, 12)
    assert torch.equal(moving.gather(x, routing.rows), rows.gather(x, of_rows))
    copies = rows.gather(x, of_rows)
    for values, more in ((copies.float(), None), (copies, copies.float())):
        assert torch.equal(moving.sum_copies(values, of_rows, more), rows.sum_copies(values, of_rows, more))
    for num_rows in (0, 4):
        of_none = te_rows.with_places(sort_by_expert(torch.full((num_rows, 2), -1), 6, 0).rows, 2)
        copies = moving.gather(x[:num_rows], of_none)
        assert copies.shape == (0, 8)
        assert not moving.sum_copies(copies, of_none).any()
    assert not CALLS


@pytest.mark.parametrize("lean", [False, True], ids=["", "lean"])
@pytest.mark.parametrize("adapted", [False, True], ids=["", "adapted"])
def test_experts_with_it_are_those_without(package, adapted, lean):
    torch.manual_seed(0)
    routing = sort_by_expert(CHOICES["random"](), 6)
    x, up, down = (torch.randn(*shape, dtype=BF16) for shape in ((20, 8), (6, 8, 32), (6, 16, 8)))
    leaves = [x, up, down, torch.rand(60)]
    leaves += [torch.randn(6, *shape, dtype=BF16) / 4 for shape in ((8, 4), (4, 32), (16, 4), (4, 8)) if adapted]

    def way(gemm):
        given = replace(routing, rows=te_rows.with_places(routing.rows, 3))

        def compute(x, up, down, weight_p, *factors):
            how = (Factors(*factors[:2]), Factors(*factors[2:])) if adapted else (None, None)
            return gated_experts(x, up, down, weight_p, given, *how, lean=lean, gemm=gemm)

        return both_ways(compute, leaves, torch.ones(20, 8, dtype=BF16))

    found, expected = way(te_rows.moving(TORCH)), way(TORCH)
    assert (CALLS["permute"], CALLS["unpermute"]) == (3, 0 if adapted else 2)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 5e-3


@pytest.mark.parametrize(("of_te", "called"), [(("permutation",), {"permute"}), (("experts",), {"TN"})])
def test_a_module_has_the_parts_that_were_asked_for(package, of_te, called):
    experts.register()
    module = next(module for _, module in experts_modules(build_tiny("qwen3_moe", BF16)))
    experts.install(module, experts.Settings("te", of_te=of_te))
    x = torch.randn(12, module.down_proj.shape[1], dtype=BF16)
    module(x, torch.randn(12, module.num_experts).topk(2).indices, torch.rand(12, 2)).sum().backward()
    assert called < set(CALLS)
    assert not set(CALLS) & ({"permute", "TN"} - called)


@pytest.mark.parametrize(
    ("kind", "of_te"),
    [
        ("one function", ("permutation",)),
        ("one function", ("experts",)),
        ("one function", ("experts", "permutation")),
        ("general path", ("experts",)),
    ],
    ids=str,
)
def test_backward_is_that_of_the_routing_that_recompute_finds(package, kind, of_te):
    """A near-tie may fall the other way in recompute; saved tensors are of that then, so all else must be, too."""
    experts.register()
    module = next(module for _, module in experts_modules(build_tiny("qwen3_moe", BF16)))
    if kind == "general path":  # experts as operations of their own, each with its own saved tensors
        module.act_fn = torch.nn.Mish()
    torch.manual_seed(0)
    x = torch.randn(64, module.down_proj.shape[1], dtype=BF16)
    first = torch.randn(64, module.num_experts).topk(2).indices
    then = first.clone()
    then[5, 0] = next(each for each in range(module.num_experts) if each not in first[5].tolist())
    weights, gradient = torch.rand(64, 2), torch.randn_like(x)

    def gradients(kernels, *choices):
        experts.install(module, experts.Settings(kernels, of_te=of_te))
        given, left = x.clone().requires_grad_(), list(choices)
        output = checkpoint(lambda each: module(each, left.pop(0), weights), given, use_reentrant=False)
        return torch.autograd.grad(output, [given, *module.parameters()], gradient)

    for one, other in zip(gradients("te", first, then), gradients("fused", then, then), strict=True):
        assert relative_error(one, other) < 5e-3


@pytest.mark.parametrize(
    ("name", "module", "function"),
    [
        ("router", "router", "fused_topk_with_score_function"),
        ("permutation", "triton.permutation", "permute_with_mask_map"),
    ],
)
def test_a_version_with_other_arguments_is_named(package, name, module, function):
    package.setattr(sys.modules[f"transformer_engine.pytorch.{module}"], function, lambda inp, logits: None)
    te_router._function.cache_clear()
    te_rows._functions.cache_clear()
    said = te_parts.problem(torch.device("cuda", 0), name)
    assert said is not None
    assert said.startswith(f"{function} of transformer_engine 2.20.2 takes no ")
