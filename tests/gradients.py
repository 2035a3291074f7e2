"""A function's output and gradients, and how far tensors are from exact ones."""

import torch


def both_ways(function, leaves, gradient):
    """What a function of these gives, and its gradients in them."""
    leaves = [each.detach().requires_grad_() for each in leaves]
    output = function(*leaves)
    return [output, *torch.autograd.grad(output, leaves, gradient.to(output.dtype))]


def relative_error(found, exact):
    """Of all values together, in fp64."""
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()
