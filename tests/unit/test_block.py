"""Norms and rotations are replaced where they are the usual ones, and only there."""

import types

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.glm4_moe import modeling_glm4_moe
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.qwen3_moe import modeling_qwen3_moe
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from moe_accel import block


class LayerNormInDisguise(nn.Module):
    """Has the name and the parameters of an RMSNorm."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x):
        return nn.functional.layer_norm(x, (8,), self.weight, eps=self.eps)


NORMS = {
    "qwen3": (modeling_qwen3_moe.Qwen3MoeRMSNorm(8), 0.0),
    "gemma": (Gemma3RMSNorm(8), 1.0),
    "torch": (nn.RMSNorm(8, eps=1e-6), 0.0),
    "gated": (Qwen3NextRMSNormGated(8), None),
    "layer norm": (LayerNormInDisguise(), None),
    "linear": (nn.Linear(8, 8, bias=False), None),
}


@pytest.mark.parametrize(("module", "offset"), NORMS.values(), ids=NORMS)
def test_a_norm_is_known_by_what_it_computes(module, offset):
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    assert block.offset_of(module) == offset
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name])


def test_a_fused_norm_computes_the_same():
    module, x = modeling_qwen3_moe.Qwen3MoeRMSNorm(8), torch.randn(3, 8)
    expected = module(x)
    assert block.fuse_norm(module)
    torch.testing.assert_close(module(x), expected)


def rotation_of(function):
    return types.SimpleNamespace(apply_rotary_pos_emb=function)


def interleaved(q, k, cos, sin, unsqueeze_dim=1):
    def turn(x):
        return x * cos[:, None] + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin[:, None]

    return turn(q), turn(k)


@pytest.mark.parametrize(
    ("module", "usual"),
    [(modeling_qwen3_moe, True), (modeling_gpt_oss, False), (rotation_of(interleaved), False), (nn, False)],
    ids=["qwen3", "gpt-oss", "interleaved", "none"],
)
def test_a_rotation_is_known_by_what_it_computes(module, usual, monkeypatch):
    if hasattr(module, block.ROTATION):  # put back what the test replaces
        monkeypatch.setattr(module, block.ROTATION, getattr(module, block.ROTATION))
    q, k, cos, sin = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8), torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    expected = module.apply_rotary_pos_emb(q, k, cos, sin) if usual else None
    assert block.fuse_rotation(module) == usual
    if expected:
        for one, other in zip(module.apply_rotary_pos_emb(q, k, cos, sin), expected, strict=True):
            assert torch.equal(one, other)


def test_a_partial_rotation_stays_with_its_own_function(monkeypatch):
    function = modeling_glm4_moe.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_glm4_moe, block.ROTATION, function)
    q, k, cos, sin = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8), torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    expected = function(q, k, cos, sin)
    block.fuse_rotation(modeling_glm4_moe)
    for one, other in zip(modeling_glm4_moe.apply_rotary_pos_emb(q, k, cos, sin), expected, strict=True):
        assert torch.equal(one, other)
