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
LAUNCHES_COMPILED = getattr(triton, "__version__", "").startswith("3.6.") and not INTERPRETED
"""Whether compiled kernels are launched as Triton 3.6 does it itself; other versions launch them the ordinary way."""


def use_triton(values: Tensor) -> bool:
    """Whether kernels run on these values: 16- or 32-bit floats, some of them, on a GPU (or anywhere, interpreted)."""
    fits = values.dtype in (torch.bfloat16, torch.float16, torch.float32) and values.numel() > 0
    return HAS_TRITON and fits and (values.is_cuda or INTERPRETED)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first tensor, whichever is the current one.

    `args` are the first parameters of the kernel in their order, `constants` the rest by name.
    """
    first = next(each for each in args if isinstance(each, Tensor))
    elsewhere = first.is_cuda and first.device.index != torch.cuda.current_device()
    with torch.cuda.device(first.device) if elsewhere else nullcontext():
        if LAUNCHES_COMPILED and first.is_cuda:
            _launch_compiled(kernel, grid, first.device.index, args, constants)
        else:
            kernel[grid](*args, **constants)


def _launch_compiled(
    kernel: Any, grid: tuple[int, ...], device: int, args: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    """`kernel[grid](...)` in a third of the time: what Triton would find out about the arguments once more is kept.

    Triton compiles a kernel anew for other dtypes, for pointers and whole numbers that 16 divides or not, for the
    number 1 and for numbers of more than 32 bits. That is the key here.
    """
    values = [each.data_ptr() if isinstance(each, Tensor) else each for each in args]
    key = (kernel, device, *constants.values(), *map(_specialisation, args, values))
    known = _compiled.get(key)
    if known is None or triton.knobs.runtime.launch_enter_hook is not None:  # a profiler's: Triton calls it
        compiled = kernel[grid](*args, **constants)
        names = [name for name in kernel.arg_names if name in constants]
        if kernel.arg_names[len(args) :] == names:
            _compiled[key] = compiled, [constants[name] for name in names]
        return
    compiled, rest = known
    stream = torch._C._cuda_getCurrentRawStream(device)
    x, y, z = *grid, *(1,) * (3 - len(grid))
    compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *values, *rest)


_compiled: dict[Any, tuple[Any, list[Any]]] = {}


def _specialisation(argument: Any, value: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.dtype, value % 16
    if isinstance(argument, int) and not isinstance(argument, bool):
        return value == 1, value % 16, -(2**31) <= value < 2**31
    return type(argument), argument


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU, asked for once: torch takes 20 microseconds to say."""
    return torch.cuda.get_device_capability(device)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which autocast multiplies on a device; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def without_autocast(device: torch.device) -> Any:
    """A context in which products of a device are computed as they are; free where they are anyway."""
    is_on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if is_on else nullcontext()


def as_autocast(*operands: Tensor) -> tuple[Tensor, ...]:
    """Operands of a product as autocast would take them.

    For an autograd function, whose backward runs without autocast: cast before it, autograd sees the cast.
    """
    dtype = autocast_dtype(operands[0].device)
    return operands if dtype is None else tuple(each.to(dtype) for each in operands)
