"""A transport in one process that has all experts, writing down what happens, and tiny models in fp64 that use it."""

from types import SimpleNamespace

import pytest
import torch

from moe_accel.dispatch.halves import travel
from moe_accel.experts import Settings, compute_beside, find_experts, install, register
from moe_accel.experts.scale import scale_gradient
from tests.dist.parity import largest_error
from tests.families import build_tiny, tiny_inputs, tiny_loss

LATE, EARLY = "deepseek_v3", "qwen2_moe"
"""Families whose blocks call the shared expert after the experts, and before."""

TOLERANCE = 100 * torch.finfo(torch.float64).eps
"""Gradients of one tensor are summed in another order: relative to its largest."""


class Carried:
    """A transfer that takes its time."""

    needs = False, False

    def __init__(self, events):
        self.events, self.under_way = events, []

    def send(self, *rows):
        self.under_way = [each.clone() for each in rows]

    def receive(self):
        found, self.under_way = self.under_way, []
        assert found, "nothing is under way"
        return tuple(found)

    def launch(self, x, weights):
        self.events.append("launch")
        self.send(x, weights)

    def arrive(self):
        self.events.append("arrive")
        return self.receive()

    def launch_back(self, x_grad, weights_grad):
        assert x_grad.isfinite().all()
        self.events.append("back: launch")
        self.send(x_grad, weights_grad)

    def arrive_back(self):
        self.events.append("back: arrive")
        return self.receive()


class Transport:
    name, rank = "recorded", 0

    def __init__(self):
        self.events = []

    def dispatch(self, x, choices, weights, handle=None, beside=None, scale=1.0):
        x_r, weights_r = travel(x, weights, Carried(self.events), beside, scale)
        handle = handle or SimpleNamespace(choices=choices.int(), num_pairs=choices.numel())
        return x_r, handle.choices, weights_r, handle

    def combine(self, y, handle, scale=1.0, keep=None):
        self.events.append("combine")
        combined = scale_gradient(y, scale).clone()
        if combined.grad_fn is not None:
            combined.grad_fn.metadata["keep"] = keep
        return combined


def shared_of(model):
    return [
        each for name, each in model.named_modules() if name.rpartition(".")[2] in ("shared_expert", "shared_experts")
    ]


def built(family, moved=True, **overrides):
    """A tiny model in fp64 with a transport, its events, and what the report says."""
    model = build_tiny(family, torch.float64, **overrides)
    return model, *spread(model, moved)


def spread(model, moved=True):
    events, said = transported(model, moved)
    for shared in shared_of(model):
        shared.down_proj.register_forward_hook(noting(events, "shared"))
        shared.gate_proj.register_full_backward_pre_hook(noting(events, "back: shared"))
    return events, said


def transported(model, moved):
    register()
    transport, found = Transport(), find_experts(model)
    for _, module in found:
        install(module, Settings("reference", transport))
    return transport.events, compute_beside(found, model) if moved else []


def noting(events, what):
    def note(*_):
        events.append(what)

    return note


def trained(family, model):
    loss = tiny_loss(model, tiny_inputs(family))
    loss.backward()
    return loss.item(), {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def assert_same(found, truth):
    assert found[0] == pytest.approx(truth[0], rel=TOLERANCE)
    assert found[1].keys() == truth[1].keys()
    errors = {name: largest_error(found[1][name], each, each.abs().max()) for name, each in truth[1].items()}
    assert {name: error for name, error in errors.items() if not error <= 100 * TOLERANCE} == {}
