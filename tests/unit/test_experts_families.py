"""The experts function gives every family's numbers: its experts alone, and its whole model, against transformers.

The truth is the eager forward that transformers ships with each experts class, in fp64.

Sizes: N tokens, H hidden, I expert inner, E experts, K top-k.
"""

import copy
from functools import cache

import pytest
import torch

from moe_accel import experts
from tests.families import available_families, build_tiny, experts_modules, tiny_inputs, tiny_loss

KERNELS = ["reference", "fused"]
NUM_TOKENS = 37

FP32_TOLERANCE = 30 * torch.finfo(torch.float32).eps
"""Largest error, as a share of a tensor's largest value. A value is a chain of sums of about 100 rounded products
(H=32, I=24..48, N*K=111): the error walks sqrt(100)*eps = 10*eps; the worst of some thousand values is 3 times that."""

MODEL_TOLERANCE = 3 * FP32_TOLERANCE
"""The same through two layers, their attention and the loss."""

BF16_SLACK = 2.0
"""How much larger than native's our error against fp64 may be: both round to bf16 at about as many places."""


@pytest.fixture(autouse=True, scope="module")
def _registered():
    experts.register()


@cache
def _tiny(family, dtype):
    return build_tiny(family, dtype)


def experts_of(family, dtype=torch.float32):
    """A copy of one experts module of every kind in the family's model (most families have one kind)."""
    kinds = {}
    for _, module in experts_modules(_tiny(family, dtype)):
        shapes = tuple(tuple(parameter.shape) for parameter in module.parameters())
        kinds.setdefault((type(module), shapes), module)
    return [copy.deepcopy(module) for module in kinds.values()]


def routing(module, case, dtype):
    """Tokens [N,H], expert of each choice [N,K] int64 and its weight [N,K], for a named case."""
    generator = torch.Generator().manual_seed(len(case))
    num_tokens, num_experts = (0 if case == "no-tokens" else NUM_TOKENS), module.num_experts
    num_hidden = module.down_proj.shape[2 if module.is_transposed else 1]
    top_k = {"top-1": 1, "one-expert-takes-all": 1, "all-experts": num_experts}.get(case, 3)
    choice = torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)
    if case == "empty-experts":
        choice = choice[choice < num_experts - 4].view(num_tokens, -1) + 2  # of 8: none takes 0, 1, 6 or 7
    if case == "one-expert-takes-all":
        choice = torch.full((num_tokens, 1), 3)
    if case == "an-expert-twice":
        choice[:, 1] = choice[:, 0]
    hidden = 3.0 * torch.randn(num_tokens, num_hidden, generator=generator)  # 3: into the clamps of those that clamp
    weights = torch.rand(num_tokens, top_k, generator=generator)
    inputs = hidden.to(dtype), choice[:, :top_k].contiguous(), weights
    return [value.T.contiguous().T for value in inputs] if case == "strided" else inputs


def computed(module, forward, hidden, choice, weights):
    """Output, and gradients of hidden states, routing weights and every parameter, for one fixed upstream gradient."""
    hidden, weights = hidden.detach().requires_grad_(), weights.detach().requires_grad_()
    output = forward(module, hidden, choice, weights)
    output.backward(upstream_gradient(output, hidden))
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"output": output.detach(), "hidden_states": hidden.grad, "top_k_weights": weights.grad, **gradients}


def upstream_gradient(output, hidden):
    """Fixed noise like the output; strided where the hidden states are."""
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return noise if hidden.is_contiguous() else noise.T.contiguous().T


def by_truth(module, *inputs):
    """`computed` by the class's own eager forward in fp64."""
    doubled = [value.double() if value.is_floating_point() else value for value in inputs]
    return computed(copy.deepcopy(module).double(), type(module).forward.__wrapped__, *doubled)


def by_native(module, *inputs):
    module = copy.deepcopy(module)
    module.config._experts_implementation = "grouped_mm"
    return computed(module, type(module).__call__, *inputs)


def by_us(module, kernels, *inputs):
    module = copy.deepcopy(module)
    experts.install(module, experts.Settings(kernels))
    return computed(module, type(module).__call__, *inputs)


def largest_error(values, truth):
    """Largest error as a share of the largest true value; 0 for empty tensors."""
    if truth.numel() == 0:
        return 0.0
    return ((values.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-30)).item()


def relative_error(values, truth):
    """Norm of the error over the norm of the truth."""
    return ((values.double() - truth).norm() / truth.norm()).item()


CASES = ["uneven", "top-1", "empty-experts", "one-expert-takes-all", "an-expert-twice", "all-experts", "strided"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("family", available_families())
def test_values_and_gradients_are_the_eager_forwards_in_fp32(family, kernels, case):
    for module in experts_of(family):
        inputs = routing(module, case, torch.float32)
        truth = by_truth(module, *inputs)
        ours = by_us(module, kernels, *inputs)
        assert ours.keys() == truth.keys()
        for name, values in ours.items():
            assert values.dtype == torch.float32, name
            assert largest_error(values, truth[name]) < FP32_TOLERANCE, name


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("family", available_families())
def test_no_tokens_give_an_empty_output_and_gradients_of_zeros(family, kernels):
    for module in experts_of(family):
        ours = by_us(module, kernels, *routing(module, "no-tokens", torch.float32))
        assert ours["output"].shape == ours["hidden_states"].shape == (0, ours["output"].shape[1])
        for name, parameter in module.named_parameters():
            assert ours[name] is not None, name
            assert torch.equal(ours[name], torch.zeros_like(parameter)), name


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16], ids=["fp32-weights", "bf16-weights"])
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("family", available_families())
def test_bf16_is_about_as_close_to_the_truth_as_native(family, kernels, weights_dtype):
    for module in experts_of(family, torch.bfloat16):
        hidden, choice, weights = routing(module, "uneven", torch.bfloat16)
        inputs = hidden, choice, weights.to(weights_dtype)
        truth, native, ours = by_truth(module, *inputs), by_native(module, *inputs), by_us(module, kernels, *inputs)
        for name, values in ours.items():
            assert values.dtype == native[name].dtype, name
            allowed = BF16_SLACK * relative_error(native[name], truth[name])
            assert relative_error(values, truth[name]) <= allowed, name


@pytest.mark.parametrize("family", available_families())
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(family):
    for module in experts_of(family):
        hidden, choice, weights = routing(module, "uneven", torch.float32)
        truth = by_truth(module, hidden, choice, weights)
        for frozen in ("hidden_states", "top_k_weights", *dict(module.named_parameters())):
            tried = copy.deepcopy(module)
            tried.config._experts_implementation = "moe_accel"
            trained = {"hidden_states": hidden.clone(), "top_k_weights": weights.clone()}
            trained.update(tried.named_parameters())
            for name, tensor in trained.items():
                tensor.requires_grad_(name != frozen)
            output = tried(trained["hidden_states"], choice, trained["top_k_weights"])
            output.backward(upstream_gradient(output, hidden))
            assert trained[frozen].grad is None
            for name in trained.keys() - {frozen}:
                assert largest_error(trained[name].grad, truth[name]) < FP32_TOLERANCE, f"{name} with {frozen} frozen"


def loss_and_gradients(family, implementation):
    model = build_tiny(family)
    model.set_experts_implementation(implementation)
    loss = tiny_loss(model, tiny_inputs(family))
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", available_families())
def test_a_whole_models_loss_and_gradients_are_those_of_native_transformers(family):
    native_loss, native = loss_and_gradients(family, "grouped_mm")
    our_loss, ours = loss_and_gradients(family, "moe_accel")
    assert our_loss == pytest.approx(native_loss, rel=MODEL_TOLERANCE)
    rounding = MODEL_TOLERANCE * max(gradient.abs().max() for gradient in native.values() if gradient is not None)
    for name, gradient in ours.items():
        assert (gradient is None) == (native[name] is None), name
        if gradient is not None:
            assert (gradient - native[name]).abs().max() < rounding, name
