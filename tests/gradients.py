"""A function's output and gradients, a router's by expert, and how far tensors are from exact ones."""

import torch


def both_ways(function, leaves, gradient):
    """What a function of these gives, and its gradients in them."""
    leaves = [each.detach().requires_grad_() for each in leaves]
    output = function(*leaves)
    return [output, *torch.autograd.grad(output, leaves, gradient.to(output.dtype))]


def by_expert(function, logits, bias, rule, gradient):
    """What a function of the contract of `router.route` gives, in the dtype of the gradient [N,E]: the weights [N,E],
    zeros where a token does not go, and the gradient in the logits."""
    leaf = logits.clone().requires_grad_()
    weights, chosen = function(leaf, bias if rule.sigmoid else None, rule, gradient.dtype)
    assert (weights.dtype, chosen.dtype) == (gradient.dtype, torch.int64)
    assert weights.shape == chosen.shape == (len(logits), rule.top_k)
    whole = torch.zeros_like(gradient).scatter(1, chosen, weights)
    return whole, *torch.autograd.grad(whole, leaf, gradient)


def relative_error(found, exact):
    """Of all values together, in fp64."""
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()
