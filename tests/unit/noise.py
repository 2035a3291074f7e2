"""The numbers that kernels and their definitions are tried on."""

import torch
from torch import Tensor

EPSILON = torch.finfo(torch.float32).eps


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise that depends on the shape alone."""
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def chosen(num_rows, top_k, num_experts, skew, lowest=0):
    """[R,K] experts at random, low ones the more often the larger `skew` is."""
    uniform = torch.rand(num_rows, top_k, generator=torch.Generator().manual_seed(num_rows + num_experts))
    return (uniform**skew * (num_experts - lowest)).long() + lowest
