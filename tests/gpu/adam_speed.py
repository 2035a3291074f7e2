"""A step of AdamW: torch's fused and foreach kernels, its compiled step, and `moe_accel/kernels/adam.py`.

usage      python -m tests.gpu.adam_speed [--rounds 20]
prints     one JSON line for each way and dtype: ms between two CUDA events around a step (median of the rounds, all
           ways by turns), TB/s of the 7 values that each element of a parameter needs (read: it, its gradient, two
           moments; written: it and the moments), host microseconds, and the largest difference from torch's fused
           kernel after 12 steps: of parameters, in units of the dtype's precision

Shapes of one layer of Qwen3-30B-A3B with its experts, and of its embedding: 0.93 B elements. `compiled` needs lr in a
tensor and `capturable=True`.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moe_accel import optimizer
from tests.gpu.timing import device_ms, host_us

SHAPES = [(128, 1536, 2048), (128, 2048, 768), (4096, 2048), (2048, 4096), (512, 2048), (512, 2048), (151_936, 2048)]
CHECKED, LR = 12, 1e-3
VALUES = 7


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    for dtype in (torch.bfloat16, torch.float32):
        ways = {name: make(dtype) for name, make in WAYS.items()}
        for _, step in ways.values():
            for _ in range(CHECKED):
                step()
        truth = ways["torch fused"][0]
        apart = {name: max(map(difference, parameters, truth)) for name, (parameters, _) in ways.items()}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, (_, step) in ways.items():
                found[name].append((device_ms(step), host_us(step)))
        num_bytes = VALUES * dtype.itemsize * sum(each.numel() for each in truth)
        for name, times in found.items():
            ms, us = (statistics.median(each) for each in zip(*times, strict=True))
            row = {"way": name, "dtype": str(dtype), "gpu": torch.cuda.get_device_name(), "ms": round(ms, 3)}
            row |= {"tb_s": round(num_bytes / ms / 1e9, 2), "host_us": round(us), "apart": round(apart[name], 2)}
            print(json.dumps(row), flush=True)


def difference(ours: nn.Parameter, theirs: nn.Parameter) -> float:
    """Largest of any element, in units of the dtype's precision at the size of that element (or at 1e-3)."""
    apart = (ours.detach().float() - theirs.detach().float()).abs()
    return float((apart / theirs.detach().float().abs().clamp(min=1e-3)).max() / torch.finfo(ours.dtype).eps)


def parameters_of(dtype: torch.dtype) -> list[nn.Parameter]:
    """With gradients, the same for every way."""
    generator = torch.Generator("cuda").manual_seed(0)
    made = []
    for shape in SHAPES:
        values = torch.randn(2, *shape, device="cuda", generator=generator)
        made.append(nn.Parameter(values[0].mul(0.02).to(dtype)))
        made[-1].grad = values[1].mul(1e-3).to(dtype)
    return made


def with_torch(dtype: torch.dtype, **options: Any) -> tuple[list[nn.Parameter], Callable[[], Any]]:
    """Parameters, and a step by torch's kernels."""
    parameters = parameters_of(dtype)
    return parameters, torch.optim.AdamW(parameters, **{"lr": LR, "weight_decay": 0.1} | options).step


def with_ours(dtype: torch.dtype) -> tuple[list[nn.Parameter], Callable[[], Any]]:
    """Parameters, and a step of a fused AdamW by our kernel."""
    parameters = parameters_of(dtype)
    adamw = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.1, fused=True)
    optimizer.install(adamw, torch.device("cuda"))
    return parameters, adamw.step


def compiled(dtype: torch.dtype) -> tuple[list[nn.Parameter], Callable[[], Any]]:
    """Parameters, and a step compiled by torch."""
    lr = torch.tensor(LR, device="cuda")
    parameters, step = with_torch(dtype, lr=lr, foreach=True, capturable=True)
    return parameters, torch.compile(step)


WAYS = {
    "torch fused": lambda dtype: with_torch(dtype, fused=True),
    "torch foreach": lambda dtype: with_torch(dtype, foreach=True),
    "torch compiled": compiled,
    "moe_accel": with_ours,
}

if __name__ == "__main__":
    main()
