"""The gate of an experts module is found by its values, and sought again when another is put on it."""

import copy

import pytest
import torch
from torch import nn

from moe_accel import experts
from moe_accel.experts.gated import why_not_gated
from moe_accel.experts.gates import find_gate
from moe_accel.kernels.glu import GELU_TANH, SWIGLU, Gate
from tests.families import build_tiny, experts_modules


class Made:
    """As much of an experts module as a gate needs."""

    def __init__(self, gate, act_fn=None, **numbers):
        self.act_fn = act_fn
        self.apply = gate
        vars(self).update(numbers)

    def _apply_gate(self, u):
        return self.apply(self, u)


def halves(module, u):
    gate, up = u.chunk(2, -1)
    return module.act_fn(gate) * up


def clamped(module, u):
    gate, up = u[..., ::2].clamp(max=module.most), u[..., 1::2].clamp(-module.most, module.most)
    return gate * torch.sigmoid(module.steep * gate) * (up + 1)


def clamped_gate_alone(module, u):
    gate, up = u.chunk(2, -1)
    return nn.functional.silu(gate.clamp(max=module.most)) * up


FOUND = {
    "silu": (Made(halves, nn.SiLU()), SWIGLU),
    "silu, the function": (Made(halves, nn.functional.silu), SWIGLU),
    "gelu by tanh": (Made(halves, nn.GELU("tanh")), GELU_TANH),
    "quick gelu": (Made(halves, lambda x: x * torch.sigmoid(1.702 * x)), Gate(1.702)),
    "numbers by any name": (Made(clamped, most=3.5, steep=0.75, width=64), Gate(0.75, 0.0, 3.5, 1.0, True)),
    "a whole number": (Made(clamped, most=7, steep=2), Gate(2.0, 0.0, 7.0, 1.0, True)),
    "exact gelu": (Made(halves, nn.GELU()), None),
    "relu": (Made(halves, nn.ReLU()), None),
    "another clamp": (Made(clamped_gate_alone, most=3.5), None),
    "one that takes no fp64": (Made(halves, nn.Linear(4, 4)), None),
    "one of another width": (Made(lambda _, u: u), None),
}


@pytest.mark.parametrize(("module", "gate"), FOUND.values(), ids=FOUND)
def test_a_gate_is_found_by_its_values(module, gate):
    assert find_gate(module) == gate
    assert find_gate(module) == gate  # what is remembered


def test_another_gate_or_activation_is_seen():
    module = Made(halves, nn.SiLU())
    assert find_gate(module) == SWIGLU
    module.act_fn = nn.GELU("tanh")
    assert find_gate(module) == GELU_TANH
    module._apply_gate = lambda u: u[..., : u.shape[-1] // 2]
    assert find_gate(module) is None


def test_activations_of_a_class_with_other_numbers_are_told_apart():
    class Scaled(nn.Module):
        def __init__(self, slope):
            super().__init__()
            self.slope = slope

        def forward(self, x):
            return x * torch.sigmoid(self.slope * x)

    assert [find_gate(Made(halves, Scaled(slope))) for slope in (1.0, 1.702, 1.1)] == [SWIGLU, Gate(1.702), None]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_with_a_gate_of_their_own_are_those_of_transformers(family):
    experts.register()
    native = next(module for _, module in experts_modules(build_tiny(family)))
    native._apply_gate = lambda u: u[..., ::2].tanh() * u[..., 1::2]
    ours = copy.deepcopy(native)
    native.config._experts_implementation = "grouped_mm"
    experts.install(ours, experts.Settings("fused"))
    assert why_not_gated(ours) == "a gate of its own"
    width = native.down_proj.shape[2 if native.is_transposed else 1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, width, generator=generator)
    choices = torch.randn(9, native.num_experts, generator=generator).topk(2).indices
    weights = torch.rand(9, 2, generator=generator)
    found = []
    for module in (native, ours):
        leaves = {"x": x.clone().requires_grad_(), "weights": weights.clone().requires_grad_()}
        output = module(leaves["x"], choices, leaves["weights"])
        leaves |= dict(module.named_parameters())
        gradients = torch.autograd.grad(output, list(leaves.values()), output.detach().cos())
        found.append({"output": output, **dict(zip(leaves, gradients, strict=True))})
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-5)
