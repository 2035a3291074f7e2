"""Time of one call: by the GPU's clock, kept busy beforehand, and of the host while nothing is waited for."""

import time
from collections.abc import Callable
from typing import Any

import torch

BUSY_CYCLES = 4_000_000  # about 2 ms: longer than the host takes to start what is timed
Way = Callable[[], Any]


def device_ms(way: Way) -> float:
    """Between two events around one call, starting its kernels not in it. Without a GPU: by the host's clock."""
    if not torch.cuda.is_available():
        return host_us(way) / 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(BUSY_CYCLES)
    start.record()
    way()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def host_us(way: Way) -> float:
    """Until the call returns, on a GPU that has nothing else to do."""
    wait()
    start = time.perf_counter()
    way()
    took = time.perf_counter() - start
    wait()
    return took * 1e6


def wait() -> None:
    """For the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
