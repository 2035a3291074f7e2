"""Norms and rotations are replaced where they are the usual ones, and only there."""

import copy
import sys
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
from moe_accel.kernels.rope import rotate_torch
from tests.families import build_tiny


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


def test_a_fused_norm_takes_the_name_that_its_class_has_for_its_input():
    module, x = modeling_qwen3_moe.Qwen3MoeRMSNorm(8), torch.randn(3, 8)
    expected = module(hidden_states=x)
    assert block.fuse_norm(module)
    torch.testing.assert_close(module(hidden_states=x), expected)
    with pytest.raises(TypeError):
        module(x=x)


def rotation_of(function):
    return types.SimpleNamespace(apply_rotary_pos_emb=function)


def interleaved(q, k, cos, sin, unsqueeze_dim=1):
    def turn(x):
        return x * cos[:, None] + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin[:, None]

    return turn(q), turn(k)


def of_one(q, k, cos, sin):
    return (rotate_torch(q, cos, sin),)


def of_three(q, k, cos, sin):
    return rotate_torch(q, cos, sin), rotate_torch(k, cos, sin), cos


def of_positions(q, k, cos, sin, positions=None):
    return {"q": q, "k": k}[positions]


ROTATIONS = {
    "qwen3": (modeling_qwen3_moe, True),
    "gpt-oss": (modeling_gpt_oss, True),
    "interleaved": (rotation_of(interleaved), False),
    "one output": (rotation_of(of_one), False),
    "three outputs": (rotation_of(of_three), False),
    "no output": (rotation_of(lambda q, k, cos, sin: None), False),
    "needs more": (rotation_of(of_positions), False),
    "none": (nn, False),
}


@pytest.mark.parametrize(("module", "usual"), ROTATIONS.values(), ids=ROTATIONS)
def test_a_rotation_is_known_by_what_it_computes(module, usual, monkeypatch):
    if hasattr(module, block.ROTATION):  # put back what the test replaces
        monkeypatch.setattr(module, block.ROTATION, getattr(module, block.ROTATION))
    width = 4 if module is modeling_gpt_oss else 8
    q, k, cos, sin = (
        torch.randn(1, 2, 3, 8),
        torch.randn(1, 1, 3, 8),
        torch.randn(1, 3, width),
        torch.randn(1, 3, width),
    )
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


@pytest.fixture
def rotated(monkeypatch):
    """The queries that our kernel rotated, here by its definition; the modeling file is put back afterwards."""
    for file in (modeling_qwen3_moe, modeling_gpt_oss):
        monkeypatch.setattr(file, block.ROTATION, file.apply_rotary_pos_emb)
    seen = []

    def rotate(x, cos, sin):
        seen.append(x)
        return rotate_torch(x, cos, sin)

    monkeypatch.setattr(block, "use_triton", lambda values: True)
    monkeypatch.setattr(block, "rotate", rotate)
    return seen


TOKENS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))


def prepared(family="qwen3_moe"):
    model = build_tiny(family, num_hidden_layers=2)
    model.set_experts_implementation("eager")
    block.fuse_rotations(model)
    return model


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_only_models_that_were_prepared_rotate_with_the_kernel(rotated, family):
    other = build_tiny(family, num_hidden_layers=2)
    expected = other(TOKENS).logits
    model = prepared(family)
    assert torch.equal(other(TOKENS).logits, expected)
    assert rotated == []
    torch.testing.assert_close(model(TOKENS).logits, expected)
    assert len(rotated) == 2 * 2  # q and k of two layers
    assert torch.equal(other(TOKENS).logits, expected)
    assert len(rotated) == 2 * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute_rotates_with_the_kernel_too(rotated, reentrant):
    model = prepared()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(TOKENS).logits.sum().backward()
    assert len(rotated) == 2 * 2 * 2
    build_tiny("qwen3_moe", num_hidden_layers=2)(TOKENS)  # recompute may stop by an exception, and left nothing on
    assert len(rotated) == 2 * 2 * 2


def test_an_error_in_forward_leaves_other_models_alone(rotated, monkeypatch):
    model, other = prepared(), build_tiny("qwen3_moe", num_hidden_layers=2)
    with monkeypatch.context() as patch:
        patch.setattr(block, "rotate", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(TOKENS)
    other(TOKENS)
    assert rotated == []


def test_a_copy_of_a_prepared_model_computes_with_its_own_weights(rotated):
    model = prepared()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].self_attn.v_proj.weight.zero_()
    assert not torch.allclose(other(TOKENS).logits, model(TOKENS).logits)
    assert len(rotated) == 2 * 2 * 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks for it
def test_compiled_attention_has_its_own_rotation_and_no_graph_break(rotated):
    model = prepared()
    expected = model(TOKENS).logits
    del rotated[:]
    found = torch.compile(model.model.layers[0].self_attn, backend="eager", fullgraph=True)
    model.model.layers[0].self_attn = found
    torch.testing.assert_close(model(TOKENS).logits, expected)
    assert len(rotated) == 2


def test_modules_of_classes_made_on_the_fly_are_no_obstacle(rotated, monkeypatch):
    model = prepared()
    made = type("Made", (nn.Identity,), {"__module__": "made.on.the.fly"})
    assert "made.on.the.fly" not in sys.modules
    model.extra = made()
    assert block.fuse_rotations(model)


def test_a_norm_with_a_forward_of_its_own_keeps_it():
    norm = build_tiny("qwen3_moe").model.norm
    norm.forward = lambda x: 2 * x
    assert not block.fuse_norm(norm)
    assert torch.equal(norm(torch.ones(32)), 2 * torch.ones(32))
