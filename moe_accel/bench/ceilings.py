"""What this device can do at most: a large matrix product, and torch's grouped one of the shape, in the same call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moe_accel.bench.measure import timed

MATMUL = {"cuda": 8192, "cpu": 512}
"""Rows, columns and inner size of the large product: 1.1 TFLOP on a GPU."""


def matmul_tflop_s(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a square product, median of 20."""
    size = MATMUL[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return _rate(2 * size**3, lambda: a @ b, device)


def grouped_tflop_s(tokens: int, experts: Any, top_k: int, device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of torch's grouped_mm of an experts module's first projection, forward, balanced; median of 20."""
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    weight: Tensor = getattr(experts, name).detach()
    weight = weight if experts.is_transposed else weight.transpose(1, 2)
    num_rows = tokens * top_k
    rows = torch.randn(num_rows, weight.shape[1], device=device, dtype=dtype)
    ends = torch.arange(1, experts.num_experts + 1, device=device) * num_rows // experts.num_experts
    ends = ends.to(torch.int32)
    return _rate(2 * num_rows * weight[0].numel(), lambda: functional.grouped_mm(rows, weight, offs=ends), device)


def _rate(flops: float, call: Callable[[], Any], device: torch.device) -> float:
    times_ms, _ = timed(call, 5, 20, device)
    return flops / sorted(times_ms)[len(times_ms) // 2] / 1e9
