"""TransformerEngine's router behind the contract of `router.py`: weights and experts of logits.

Taken under `kernels: te` with `router` among `te_parts`. Its `fused_topk_with_score_function` (`pytorch/router.py`,
2.20.2) computes in fp32 and rounds its weights to the dtype of the logits, so it is given fp32. What it returns is a
dense [N,E], from which the K are taken; a token's experts come in an order of its own. Sigmoids it divides by their sum
(plus 1e-20) in any case but K = 1, and the score of a group is the sum of its K / top_groups best; rules that differ
there stay ours.

Sizes: N tokens, E experts, K top-k.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from moe_accel.kernels import router as ours
from moe_accel.kernels import te
from moe_accel.kernels.router import Rule

_TAKES = {
    "logits",
    "topk",
    "use_pre_softmax",
    "num_groups",
    "group_topk",
    "scaling_factor",
    "score_function",
    "expert_bias",
    "topk_indices",
}
MOST_EPSILON = 1e-20
"""What a rule may add to the sum of its sigmoids: it matters where all of them are that small."""


def route(logits: Tensor, bias: Tensor | None, rule: Rule, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`router.route`: weights [N,K] in `dtype` and experts [N,K] int64, in the same order. Differentiable once."""
    if not takes(rule) or not len(logits) or logits.dtype == torch.float64:
        return ours.route(logits, bias, rule, dtype)
    experts = torch.empty(len(logits), rule.top_k, dtype=torch.int64, device=logits.device)
    weights, experts = _function()(
        logits=logits.float().contiguous(),
        topk=rule.top_k,
        use_pre_softmax=not (rule.sigmoid or rule.renormalise),
        num_groups=rule.num_groups if rule.limits else None,
        group_topk=rule.top_groups if rule.limits else None,
        scaling_factor=None if rule.scale == 1 else rule.scale,
        score_function="sigmoid" if rule.sigmoid else "softmax",
        expert_bias=None if bias is None else bias.float(),
        topk_indices=experts,
    )
    return weights.gather(1, experts).to(dtype), experts


def takes(rule: Rule) -> bool:
    """Whether TransformerEngine has this rule."""
    as_sums = not rule.sigmoid or (rule.renormalise and rule.top_k > 1 and rule.epsilon <= MOST_EPSILON)
    return as_sums and (not rule.limits or rule.top_k == 2 * rule.top_groups)


def lookup() -> str | None:
    """What the function of this version does not take; None where it takes all that it is given here."""
    return te.missing("fused_topk_with_score_function", _function(), _TAKES)


def tried(device: torch.device) -> str | None:
    """What is wrong with a softmax of the best, with sigmoids in groups, and their gradients; None if nothing is."""
    generator = torch.Generator().manual_seed(0)
    logits, bias, gradient = (torch.randn(*shape, generator=generator) for shape in ((8, 16), (16,), (8, 16)))
    cases: list[tuple[Rule, Tensor | None]] = [
        (Rule(4, renormalise=True), None),
        (Rule(4, sigmoid=True, renormalise=True, scale=2.5, epsilon=1e-20, num_groups=4, top_groups=2), bias),
    ]

    def dense(function: Any, of: torch.device) -> list[Tensor]:
        found = []
        for rule, added in cases:
            leaf = logits.to(of).requires_grad_()
            weights, experts = function(leaf, None if added is None else added.to(of), rule, torch.float32)
            whole = torch.zeros_like(leaf).scatter(1, experts, weights)
            found += [whole, *torch.autograd.grad(whole, leaf, gradient.to(of))]
        return [each.detach().to(device) for each in found]

    exact = dense(ours.route, torch.device("cpu"))
    return te.off("fused_topk_with_score_function", lambda: dense(route, device), exact)


@functools.cache
def _function() -> Any:
    return te.load("transformer_engine.pytorch.router").fused_topk_with_score_function
