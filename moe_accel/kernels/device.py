"""Where Triton kernels run: on a GPU that has Triton; each has a plain torch form for everywhere else.

How many rows, pairs or blocks there are is data. Triton would compile a kernel once more where 16 divides one of them,
whenever that comes up, while all other ranks wait: kernels say `do_not_specialize` of them, which makes the same code.
Not of numbers of choices, K a row: where 16 divides them they are read 16 bytes at once, and both forms come up at the
start.

`TRITON_INTERPRET=1` runs them on CPU tensors, element by element: how the tests see their arithmetic without a GPU.
"""

import os
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor


class _Absent:
    """Stands for a package that is not there; lets the kernels' decorators and annotations be read."""

    constexpr = int

    def jit(self, function: Any = None, **_: Any) -> Any:
        """The function itself; called with options, what gives it."""
        return (lambda itself: itself) if function is None else function


ABSENT: Any = _Absent()

try:
    import triton
    import triton.language as tl
except ImportError:
    triton: Any = ABSENT
    tl: Any = ABSENT

HAS_TRITON = hasattr(triton, "compile")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Read once: Triton reads it when a kernel is defined."""
IS_TRITON_36 = getattr(triton, "__version__", "").startswith("3.6.") and not INTERPRETED
LAUNCHES_COMPILED = IS_TRITON_36 and os.environ.get("MOE_ACCEL_DIRECT_LAUNCH") != "0"
"""Whether compiled kernels are started as Triton 3.6 does it itself, and nothing else that it does: a tenth of a step
where the host takes longest (two H200, one sequence of 4096 a GPU, 2026-11-26). Other versions start them the ordinary
way, and so does this one with MOE_ACCEL_DIRECT_LAUNCH=0."""


def use_triton(values: Tensor) -> bool:
    """Whether kernels run on these values: 16- or 32-bit floats, some of them, on a GPU (or anywhere, interpreted)."""
    fits = values.dtype in (torch.bfloat16, torch.float16, torch.float32) and values.numel() > 0
    return HAS_TRITON and fits and (values.is_cuda or INTERPRETED)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first argument, a tensor, whichever is the current one.

    `args` are the first parameters of the kernel in their order, `constants` the rest by name.
    """
    first = args[0]
    if not first.is_cuda:
        kernel[grid](*args, **constants)
        return
    past_triton = LAUNCHES_COMPILED and not torch.compiler.is_compiling()  # Dynamo knows Triton's own launch
    start, device = _launch_compiled if past_triton else _launch, first.get_device()
    if device == torch._C._cuda_getDevice():
        start(kernel, grid, device, args, constants)
    else:
        with torch.cuda.device(device):
            start(kernel, grid, device, args, constants)


def launch_described(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """`launch` of a kernel that some tensors are described to, for TMA: by Triton, which makes the descriptors."""
    with on_device_of(args[0]):
        kernel[grid](*args, **constants)


def on_device_of(values: Tensor) -> Any:
    """A block in which their GPU is the current one, which of a model on several it need not be."""
    return torch.cuda.device(values.get_device()) if values.is_cuda else nullcontext()


def _launch(kernel: Any, grid: tuple[int, ...], device: int, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    kernel[grid](*args, **constants)


def _launch_compiled(
    kernel: Any, grid: tuple[int, ...], device: int, args: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    """`kernel[grid](...)` in a fraction of the time: what Triton would find out about the arguments once more is kept.

    Triton compiles a kernel anew for other dtypes, for pointers and whole numbers that 16 divides or not, for the
    number 1 and for numbers of more than 32 bits, and any float is one of 32 bits. That is the key here.
    """
    key, values = [id(kernel), device, *constants.values()], []
    for each in args:
        if isinstance(each, Tensor):
            value = each.data_ptr()
            key += each.dtype, value % 16 == 0, each.is_cuda
        else:
            value = each
            key.append(_kind_of(each))
        values.append(value)
    key = tuple(key)
    known = _compiled.get(key)
    hooks = triton.knobs.runtime
    if known is None or hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:  # a profiler's: Triton's to call
        compiled = kernel[grid](*args, **constants)
        names = [name for name in kernel.arg_names if name in constants]
        if kernel.arg_names[len(args) :] == names:
            _compiled[key] = compiled, [constants[name] for name in names], kernel
        return
    compiled, rest, _ = known
    stream = torch._C._cuda_getCurrentRawStream(device)
    x, y, z = *grid, *(1,) * (3 - len(grid))
    compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *values, *rest)


_compiled: dict[Any, tuple[Any, list[Any], Any]] = {}
"""By kernel (its id, for its hash takes a microsecond; it is held here, so that no other gets the id) and arguments."""


def _kind_of(argument: Any) -> Any:
    """What a kernel is compiled for of a number, or of what is neither a number nor a tensor."""
    kind = type(argument)
    if kind is int:  # small numbers, made and compared at once
        return 1 if argument == 1 else 2 + (argument % 16 == 0) + 2 * (-(2**31) <= argument < 2**31)
    return kind if kind is float else (kind, argument)


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 of a CPU, where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


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
