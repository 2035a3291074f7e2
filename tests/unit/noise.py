"""The numbers that kernels and their definitions are tried on."""

import torch
from torch import Tensor

EPSILON = torch.finfo(torch.float32).eps


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise that depends on the shape alone."""
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))
