"""Where Triton kernels run: on a GPU that has Triton; each has a plain torch form for everywhere else.

`TRITON_INTERPRET=1` runs them on CPU tensors, element by element: how the tests see their arithmetic without a GPU.
"""

import os
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Absent:
        """Stands for a package that is not there; lets the kernels' decorators and annotations be read."""

        constexpr = int

        def jit(self, function: Any) -> Any:
            """The function itself."""
            return function

    triton: Any = _Absent()
    tl: Any = triton

HAS_TRITON = hasattr(triton, "compile")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Read once: Triton reads it when a kernel is defined."""


def use_triton(values: Tensor) -> bool:
    """Whether kernels run on these values: 16- or 32-bit floats, some of them, on a GPU (or anywhere, interpreted)."""
    fits = values.dtype in (torch.bfloat16, torch.float16, torch.float32) and values.numel() > 0
    return HAS_TRITON and fits and (values.is_cuda or INTERPRETED)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first tensor, whichever is the current one."""
    first = next(each for each in args if isinstance(each, Tensor))
    elsewhere = first.is_cuda and first.device.index != torch.cuda.current_device()
    with torch.cuda.device(first.device) if elsewhere else nullcontext():
        kernel[grid](*args, **constants)


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU, asked for once: torch takes 20 microseconds to say."""
    return torch.cuda.get_device_capability(device)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which autocast multiplies on a device; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def as_autocast(*operands: Tensor) -> tuple[Tensor, ...]:
    """Operands of a product as autocast would take them.

    For an autograd function, whose backward runs without autocast: cast before it, autograd sees the cast.
    """
    dtype = autocast_dtype(operands[0].device)
    return operands if dtype is None else tuple(each.to(dtype) for each in operands)
