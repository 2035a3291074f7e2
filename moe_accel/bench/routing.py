"""Which experts the tokens go to: the router's own choice, or the same fixed one for every arm.

    random      the router's own, of random weights: about even
    balanced    every expert gets the same number of tokens
    zipf        expert e is wanted with probability ~ 1 / (e + 1): the first gets about a tenth of all of 128 experts
    hot         one expert is among every token's choices, the rest is random

A fixed choice replaces the router's in the arguments of the experts, outside of whatever an arm does with them; the
routing weights stay the router's, and so does its gradient: the heaviest weight goes to the first of the given experts.
Where two weights are near each other, rounding decides which is the heavier, and elements of that gradient are noise.

Sizes: N tokens, E experts, K top-k.
"""

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

HOT = 3
"""The expert that every token wants."""


def experts_children(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Every MoE block with what it calls for its experts: the experts module, or PEFT's wrapper around it."""
    for module in model.modules():
        for name, child in module.named_children():
            if name == "experts":
                yield module, child


def install(model: nn.Module, kind: str, num_tokens: int, top_k: int, num_experts: int) -> None:
    """Send the tokens of every block of `model` where `kind` says; nothing for `random`."""
    if kind == "random":
        return
    for number, (_, experts) in enumerate(experts_children(model)):
        device = next(experts.parameters()).device
        index = choices(kind, num_tokens, num_experts, top_k, seed=number).to(device)
        experts.register_forward_pre_hook(_Fixed(index))


def choices(kind: str, num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> Tensor:
    """[N,K] int64, K different experts for each token, most wanted first; made on the CPU, the same everywhere."""
    generator = torch.Generator().manual_seed(zlib.crc32(kind.encode()) + seed)
    if kind == "balanced":
        pairs = torch.arange(num_tokens * top_k).view(num_tokens, top_k) % num_experts
        return pairs[torch.randperm(num_tokens, generator=generator)]
    scores = -torch.empty(num_tokens, num_experts).exponential_(generator=generator).log()  # Gumbel noise
    if kind == "zipf":
        scores -= torch.arange(1, num_experts + 1).log()
    if kind == "hot":
        scores[:, HOT % num_experts] = torch.inf
    return scores.topk(top_k).indices


class _Fixed:
    """Forward pre-hook: the choice of experts among the arguments becomes `index`."""

    def __init__(self, index: Tensor):
        self.index = index

    def __call__(self, module: nn.Module, args: Any) -> Any:
        x, index, *rest = args
        return (x, self.index[: x.shape[0]].to(index.dtype), *rest)
