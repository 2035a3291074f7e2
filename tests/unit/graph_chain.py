"""Layers that are called as attention is, small, and recorded with what stands for graphs."""

import copy
import weakref
from typing import ClassVar

import torch
from torch import nn

from moe_accel import graphs
from tests.pretended_graphs import Pretended

WRONG = "what was recorded is not what the module computes"


class Attends(nn.Module):
    """As attention is called, small; what it gives is what its last operation keeps for backward."""

    is_causal = True

    def __init__(self):
        super().__init__()
        self.inner, self.dropout = nn.Linear(8, 8), 0.0

    def forward(self, x, mask=None, **kwargs):
        return self.inner(x).tanh(), mask


class Seen(torch.autograd.Function):
    """x; whoever holds the part of autograd's graph that leads here holds its `ctx`."""

    contexts: ClassVar[list] = []

    @staticmethod
    def forward(ctx, x):
        Seen.contexts.append(weakref.ref(ctx))
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class AttendsByFunctions(Attends):
    """Both of its last operations are made in Python."""

    def forward(self, x, mask=None, **kwargs):
        return Seen.apply(Seen.apply(self.inner(x))), mask


def chain(num_layers=2, recorder=None):
    torch.manual_seed(0)
    layers = nn.ModuleList(Attends() for _ in range(num_layers))
    twin = copy.deepcopy(layers)
    graphs.record_attention(layers, recorder or Pretended())
    return layers, twin


def gradients(layers, order, x):
    layers.zero_grad()
    for at in order:
        x = layers[at](x)[0]
    x.square().sum().backward()
    return [each.grad.clone() for each in layers.parameters()]


def assert_trains_alike(one, other, order, x):
    """Both have the same gradients, bit for bit."""
    assert all(map(torch.equal, gradients(one, order, x), gradients(other, order, x)))


def assert_same_gradients(one, other):
    """After a backward of both: bit for bit, and where there are some."""
    for mine, others in zip(one.parameters(), other.parameters(), strict=True):
        assert (mine.grad is None) is (others.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, others.grad)


def rows(seed, length=3):
    return torch.randn(length, 8, generator=torch.Generator().manual_seed(seed)).requires_grad_()
