"""Experts under autocast: weights stay in fp32, products are in bf16, as with transformers' own experts."""

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from moe_accel import MoEConfig, experts
from moe_accel.experts.adapters import Factors
from moe_accel.experts.gated import gated_experts, why_not_gated
from moe_accel.experts.routing import sort_by_expert
from tests.families import build_tiny, experts_modules, tiny_inputs, tiny_loss

NUM_TOKENS, TOP_K = 40, 2


pytestmark = pytest.mark.usefixtures("new_accelerate_state")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "nemotron_h"])
def test_under_autocast_values_and_gradients_are_those_of_transformers_within_bf16(family):
    experts.register()
    native = next(module for _, module in experts_modules(build_tiny(family, torch.float32)))
    native.config._experts_implementation = "eager"
    ours = copy.deepcopy(native)
    experts.install(ours, experts.Settings("fused"))
    generator = torch.Generator().manual_seed(0)
    width = native.down_proj.shape[2 if native.is_transposed else 1]
    choices = torch.randn(NUM_TOKENS, native.num_experts, generator=generator).topk(TOP_K).indices
    found = []
    for module in (native, ours):
        x = torch.randn(NUM_TOKENS, width, generator=generator.manual_seed(1)).requires_grad_()
        weights = torch.rand(NUM_TOKENS, TOP_K, generator=generator).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = module(x, choices, weights)
        gradient = torch.randn(output.shape, generator=generator).to(output.dtype)
        leaves = {"x": x, "weights": weights, **dict(module.named_parameters())}
        of_leaves = torch.autograd.grad(output, list(leaves.values()), gradient)
        found.append({"output": output.float(), **dict(zip(leaves, of_leaves, strict=True))})
    for name, expected in found[0].items():
        assert found[1][name].dtype == expected.dtype, name
        # a handful of roundings to bf16 (2^-9 each), at other places in the two
        assert (found[1][name] - expected).norm() <= 8 * 2**-9 * expected.norm(), name


@pytest.mark.parametrize("as_setting", [False, True], ids=["autocast", "of-settings"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_no_copy_of_weights_in_the_dtype_they_are_computed_in_is_kept_for_backward(family, as_setting):
    experts.register()
    module: Any = next(module for _, module in experts_modules(build_tiny(family, torch.float32)))
    experts.install(module, experts.Settings("fused", dtype=torch.bfloat16 if as_setting else None))
    width = module.down_proj.shape[2 if module.is_transposed else 1]
    x, kept = torch.randn(NUM_TOKENS, width), []
    choices = torch.randn(NUM_TOKENS, module.num_experts).topk(TOP_K).indices
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=not as_setting):
        output = module(x, choices, torch.rand(NUM_TOKENS, TOP_K))
    assert output.dtype == torch.float32
    stacks = [each for each in kept if each.ndim == 3]
    assert len(stacks) == 2
    assert {each.dtype for each in stacks} == {torch.float32}
    assert {each.data_ptr() for each in stacks} <= {each.data_ptr() for each in module.parameters()}
    output.sum().backward()
    assert {each.grad.dtype for each in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_h"])
def test_experts_that_get_a_hook_later_compute_in_the_dtype_of_their_settings_too(family):
    experts.register()
    module: Any = next(module for _, module in experts_modules(build_tiny(family, torch.float32)))
    experts.install(module, experts.Settings("fused", dtype=torch.bfloat16))
    width = module.down_proj.shape[2 if module.is_transposed else 1]
    x, weights = torch.randn(NUM_TOKENS, width), torch.rand(NUM_TOKENS, TOP_K)
    choices = torch.randn(NUM_TOKENS, module.num_experts).topk(TOP_K).indices
    expected = module(x, choices, weights)
    module.act_fn.register_forward_hook(lambda *_: None)
    assert why_not_gated(module)
    found = module(x, choices, weights)
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 8 * 2**-9 * expected.norm()
    found.sum().backward()
    assert {each.grad.dtype for each in module.parameters()} == {torch.float32}


def test_settings_are_pickled_with_all_that_they_say():
    settings = experts.Settings("reference", ep_size=2, ep_rank=1, lean=True, dtype=torch.bfloat16)
    for twin in (pickle.loads(pickle.dumps(settings)), copy.deepcopy(settings)):
        assert dataclasses.replace(twin, records=settings.records) == settings


@pytest.mark.parametrize("adapted", [False, True], ids=["", "adapted"])
def test_lean_experts_keep_no_projection_and_give_the_same_bits(adapted):
    torch.manual_seed(0)
    num_experts, width, inner, rank = 4, 8, 16, 8
    x = torch.randn(NUM_TOKENS, width, requires_grad=True)
    up, down = torch.randn(num_experts, width, 2 * inner), torch.randn(num_experts, inner, width)
    weight_p = torch.rand(NUM_TOKENS * TOP_K, requires_grad=True)
    routing = sort_by_expert(torch.randn(NUM_TOKENS, num_experts).topk(TOP_K).indices, num_experts)
    shapes = (width, rank), (rank, 2 * inner), (inner, rank), (rank, width)
    factors = [torch.randn(num_experts, *shape, requires_grad=True) for shape in shapes] if adapted else []
    leaves = [x, weight_p, *factors] if adapted else [x, weight_p, up.requires_grad_(), down.requires_grad_()]
    found, sizes = [], []
    for lean in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda each, kept=kept: kept.append(each) or each, lambda each: each
        ):
            of_up, of_down = (Factors(*factors[:2]), Factors(*factors[2:])) if adapted else (None, None)
            y = gated_experts(x, up, down, weight_p, routing, of_up, of_down, lean=lean)
        found.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
        sizes.append(sum(each.nbytes for each in kept))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert sizes[0] - sizes[1] == NUM_TOKENS * TOP_K * 2 * inner * x.itemsize


def doubled(act_fn, how):
    """Let an activation give twice what it gives."""
    if how == "hook":
        act_fn.register_forward_hook(lambda _module, _inputs, output: output * 2)
    else:
        forward = act_fn.forward
        act_fn.forward = lambda x: forward(x) * 2


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["hook", "forward"])
@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_h"])
def test_a_hook_on_the_activation_is_called_and_said(family, how, when, capsys):
    native = build_tiny(family)
    ours = copy.deepcopy(native)
    inputs = tiny_inputs(family, 1, 5)
    plain = tiny_loss(native, inputs)
    if when == "after":
        ours = Accelerator(cpu=True, parallelism_config=MoEConfig()).prepare(ours)
    for model in (native, ours):
        _, module = next(experts_modules(model))
        doubled(module.act_fn, how)
    if when == "before":
        ours = Accelerator(cpu=True, parallelism_config=MoEConfig()).prepare(ours)
        num = len(list(experts_modules(ours)))
        assert f"note        experts of 1 of {num} layers as separate operations" in capsys.readouterr().err
    expected = tiny_loss(native, inputs)
    torch.testing.assert_close(tiny_loss(ours, inputs), expected, rtol=1e-5, atol=1e-6)
    assert (expected - plain).abs() > 1e-4


def test_kept_layers_are_lean_where_the_others_are_checkpointed():
    model = build_tiny("qwen3_moe")
    model.gradient_checkpointing_enable()
    inputs = tiny_inputs("qwen3_moe", 1, 2)
    expected = tiny_loss(model, inputs)
    accelerator = Accelerator(cpu=True, parallelism_config=MoEConfig(kept_layers=1))
    model = accelerator.prepare(model)
    assert [experts.settings_of(module).lean for _, module in experts_modules(model)] == [False, True]
    torch.testing.assert_close(tiny_loss(model, inputs), expected)
