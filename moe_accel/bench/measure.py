"""Time and memory of steps on a device."""

import time
from collections.abc import Callable
from typing import Any

import torch

GIB = 2**30


def timed(step: Callable[[], Any], warmup: int, steps: int, device: torch.device) -> tuple[list[float], list[Any]]:
    """Run `warmup + steps` steps: the ms of the last `steps`, and what all of them returned.

    A GPU's own clock (events) on a GPU, the process's on a CPU. Peak memory counts from the first timed step.
    """
    returned, times_ms = [], []
    on_gpu = device.type == "cuda"
    for number in range(warmup + steps):
        if number == warmup and on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        if on_gpu:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            returned.append(step())
            end.record()
            torch.cuda.synchronize()
            times_ms.append(start.elapsed_time(end))
        else:
            begun = time.perf_counter()
            returned.append(step())
            times_ms.append((time.perf_counter() - begun) * 1e3)
    return times_ms[warmup:], returned


def peak_gib(device: torch.device) -> dict[str, float | None]:
    """Most memory since the first timed step: in tensors, and taken from the GPU; None on a CPU."""
    if device.type != "cuda":
        return {"peak_gib": None, "peak_reserved_gib": None}
    return {
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
    }


def kept_gib(forward: Callable[[], Any], device: torch.device) -> float | None:
    """Memory that lives between forward and backward, output included; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    output = forward()
    kept = torch.cuda.memory_allocated() - before
    del output
    return round(kept / GIB, 3)
