"""Which blocks have a shared expert whose call may be moved; one that does otherwise computes what it says."""

import pytest
import torch
from torch import nn

from moe_accel.experts.beside import Awaited
from moe_accel.experts.find_beside import find
from tests.families import build_tiny
from tests.unit.recorded_transport import EARLY, spread


class Block(nn.Module):
    """A block with experts and a shared expert that tests put together as they like."""

    def __init__(self, how):
        super().__init__()
        model = build_tiny(EARLY, torch.float64, num_hidden_layers=1)
        block = model.model.layers[0].mlp
        self.gate, self.experts, self.shared = block.gate, block.experts, block.shared_expert
        self.norm = nn.LayerNorm(model.config.hidden_size, dtype=torch.float64)
        self.how = how

    def forward(self, x):
        x = x.view(-1, x.shape[-1])
        return self.how(self, x)

    def routed(self, x):
        _, weights, choices = self.gate(x)
        return self.experts(x, choices, weights)


def late(block, x):
    return block.routed(x) + block.shared(x)


def early(block, x):
    shared = block.shared(x)
    return block.routed(x) + shared


def early_and_used(block, x):
    shared = block.shared(x) * 2
    return block.routed(x) + shared


def early_and_jittered(block, x):
    shared = block.shared(x)
    x = x.mul_(1.5) if block.training else x
    return block.routed(x) + shared


def early_and_given_on(block, x):
    shared = block.shared(x)
    return block.routed(x) + block.norm(shared)


def late_with_another_tensor(block, x):
    return block.routed(x) + block.shared(x + 1)


def late_with_the_routed(block, x):
    return block.shared(block.routed(x))


def late_twice(block, x):
    return block.routed(x) + block.shared(x) + block.shared(x)


def late_and_jittered(block, x):
    routed = block.routed(x)
    return routed + block.shared(x.mul_(1.5))


NOT_MOVED = {
    early_and_used: "its output is used before the experts",
    early_and_jittered: "training and evaluation differ",
    early_and_given_on: "its output is used before the experts",
    late_with_another_tensor: None,
    late_with_the_routed: None,
    late_twice: None,
    late_and_jittered: "it is called with another tensor",
}


@pytest.mark.parametrize("how", [late, early])
def test_a_block_is_proven_by_what_it_does(how):
    block = Block(how).eval()
    classes = type(block), type(block.shared)
    found = find(block, "experts", block.experts)
    assert (found.shared, found.sees) == ("shared", "gate" if how is late else None)
    assert (type(block), type(block.shared), block.training, block.gate.training) == (*classes, False, False)
    assert not block.gate._forward_pre_hooks


@pytest.mark.parametrize("how", NOT_MOVED, ids=lambda how: how.__name__)
def test_a_block_that_does_otherwise_stays_as_it_is(how):
    block = Block(how)
    assert find(block, "experts", block.experts) == NOT_MOVED[how]


@pytest.mark.parametrize(("proven", "does"), [(late, each) for each in NOT_MOVED] + [(early, early_and_used)])
def test_a_block_that_later_does_otherwise_computes_what_it_says(proven, does):
    """As code may that looks at values or at the step."""
    outputs = []
    for moved in (True, False):
        torch.manual_seed(0)
        block = Block(proven)
        spread(block, moved)
        block.how = does
        x = torch.randn(1, 5, block.norm.normalized_shape[0], dtype=torch.float64)
        outputs.append(block(x))
    assert torch.equal(*outputs)


def test_an_input_that_is_changed_under_a_call_to_come_is_an_error():
    block = Block(early)
    spread(block)
    block.how = early_and_jittered
    with pytest.raises(
        RuntimeError, match=r"^the input of Qwen2MoeMLP was changed in place before its output was used$"
    ):
        block(torch.randn(1, 5, block.norm.normalized_shape[0], dtype=torch.float64))


def test_an_output_to_come_has_its_value_for_whoever_uses_it():
    block = Block(early)
    spread(block)
    kept = []
    block.how = lambda block, x: kept.append(block.shared(x)) or x
    x = torch.randn(1, 5, block.norm.normalized_shape[0], dtype=torch.float64)
    block(x)
    (awaited,) = kept
    assert isinstance(awaited, Awaited)
    assert not awaited.is_computed
    truth = block.shared(x.view(5, -1))
    assert awaited.shape == truth.shape
    assert torch.equal(torch.stack([awaited, awaited]), torch.stack([truth, truth]))
    assert awaited.requires_grad
