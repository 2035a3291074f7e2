"""Tiny models with adapters on their experts, and how their training is compared."""

import copy

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model

from moe_accel import MoEConfig, expert_lora_config
from tests.families import build_tiny, randomise, tiny_inputs, tiny_loss

TOLERANCE = 90 * torch.finfo(torch.float32).eps  # see tests/dist/parity.py
RANK = 3  # no multiple of 8: padded where kernels want whole 16 bytes


def adapted(family="qwen3_moe", dtype=torch.float32, build=None, **options):
    """A tiny model with noise for adapters, in PEFT's hands."""
    model = build_tiny(family, dtype, **(build or {}))
    config = expert_lora_config(model, r=RANK, **options)
    model = get_peft_model(model, config)
    randomise(model, seed=7, only="lora_")
    return model


def prepared(model, **options):
    model = copy.deepcopy(model)
    return Accelerator(parallelism_config=MoEConfig(**options)).prepare(model)


def noting(product, found):
    """`Projection.product` that tells `found`, where the projection has an adapter, whether one GEMM did both."""

    def noted(self, rows, low, ends):
        if self.a is not None:
            found.append(self.whole is not None)
        return product(self, rows, low, ends)

    return noted


def training(model, family):
    """Loss, and gradient of every parameter that has one."""
    loss = tiny_loss(model, tiny_inputs(family))
    loss.backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return loss.item(), gradients


def assert_same(found, expected, tolerance=TOLERANCE):
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = max(gradient.abs().max().item(), 1e-30)
        assert (found[1][name] - gradient).abs().max().item() <= tolerance * scale, name
