"""Experts under autocast: weights stay in fp32, products are in bf16, as with transformers' own experts."""

import copy

import pytest
import torch

from moe_accel import experts
from tests.families import build_tiny, experts_modules

NUM_TOKENS, TOP_K = 40, 2


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
