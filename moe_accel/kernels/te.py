"""TransformerEngine's grouped GEMM behind the contract of `grouped.py`; and `load`, the one way to the package.

Taken under `kernels: te` alone, as are the other `te_*.py`. Read in its source, 2.20.2
(`cpp_extensions/gemm.py`, `csrc/extensions/gemm.cpp`):

- `general_grouped_gemm` takes lists of matrices and computes, for each pair, B @ A.T in layout TN, B @ A in NN and
  B.T @ A in NT. It reads data pointers and shapes: a matrix that is not contiguous would be read as if it were.
- It wants the sizes of the groups as Python ints. `ends` may be on the host here: then who calls has waited for them
  once, in each forward of a layer and where that is recomputed with new routing. They are saved for backward like
  all other tensors, so that a recompute brings its own.
- Of an empty group it skips the product, and fills the gradient of its matrix with zeros.
- fp32 would be multiplied in TF32, so only 16-bit floats are given to it; all else goes the way of `grouped.py`.
- On Hopper, NVTE_USE_CUTLASS_GROUPED_GEMM=1 makes it one kernel where the size that is summed over is a multiple of 128
  in all groups, at twice the speed of its cuBLAS streams (557 and 283 TFLOP/s, see `grouped.py`). It is set here unless
  somebody set it.

Sizes: P rows, e experts, A inner, B outer.
"""

import ctypes
import functools
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Sequence, Set
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_accel.kernels.device import capability
from moe_accel.kernels.grouped import GroupedGemm, group_sizes, grouped_mm, grouped_mm_by_group, grouped_outer

CUTLASS = "NVTE_USE_CUTLASS_GROUPED_GEMM"
INSTALL = "pip install --no-build-isolation 'transformer-engine[pytorch]>=2.17'"
"""Without isolation: its extension is built against the torch that is here, not against the newest one."""

DTYPES = (torch.bfloat16, torch.float16)
"""That its parts are given here."""

_TAKES = {"A", "B", "out", "quantization_params", "out_dtype", "layout", "m_splits", "grad", "single_output"}


def wrong_device(device: torch.device, least: tuple[int, int] = (8, 0), what: str = "bf16") -> str | None:
    """Why the device is none for TransformerEngine; None where it is one."""
    if device.type != "cuda":
        return f"it needs a CUDA GPU, and this process computes on {device.type}"
    found = capability(device)
    if found < least:
        asked, has = (".".join(map(str, each)) for each in (least, found))
        return f"it needs a GPU with {what} (compute capability {asked} or more), and this one has {has}"
    return None


def lacks(look: Callable[[], str | None]) -> str | None:
    """Why what `look` asks for in the package is not there; None where it is."""
    if not is_installed():
        return "the package transformer_engine is not installed"
    try:
        return look()
    except (ImportError, OSError, AssertionError, RuntimeError) as error:
        return f"import transformer_engine.pytorch fails: {type(error).__name__}: {error or 'without a message'}"
    except AttributeError as error:
        return f"transformer_engine {version()} has no {error.name or error}"


def lookup() -> str | None:
    """What the grouped GEMM of this version does not take; None where it takes all that it is given here."""
    return missing("general_grouped_gemm", _gemm(), _TAKES)


def missing(name: str, function: Callable[..., Any], takes: Set[str]) -> str | None:
    """Which of these arguments a function of this version does not take; None where it takes all of them."""
    absent = sorted(takes - set(inspect.signature(function).parameters))
    return f"{name} of transformer_engine {version()} takes no {', '.join(absent)}" if absent else None


def on_gpu(values: Tensor) -> bool:
    """Whether these values are where the package computes."""
    return values.is_cuda


def is_installed() -> bool:
    """Whether there is a package of that name."""
    return importlib.util.find_spec("transformer_engine") is not None


def version() -> str:
    """Of the package; empty where it is not installed as one."""
    try:
        return metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:
        return ""


def multiply(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """`grouped.grouped_mm`: rows [P,A], matrices [e,A,B] -> [P,B], differentiable once in both."""
    if not _takes(rows, matrices.shape[2]):
        return grouped_mm(rows, matrices, ends)
    if torch.is_grad_enabled() and (rows.requires_grad or matrices.requires_grad):
        return _Multiply.apply(rows, matrices, ends)  # pyright: ignore[reportReturnType]
    return _multiply(rows, matrices, group_sizes(ends))


def outer(rows: Tensor, others: Tensor, ends: Tensor) -> Tensor:
    """`grouped.grouped_outer`: rows [P,A], others [P,B] -> [e,A,B]. Not differentiable."""
    if not _takes(rows, others.shape[1]):
        return grouped_outer(rows, others, ends)
    return _outer(rows, others, group_sizes(ends))


GEMM = GroupedGemm(multiply, outer)


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, matrices, ends)
        return _multiply(rows, matrices, group_sizes(ends))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (rows, matrices, ends), (gradient,) = ctx.saved_tensors, gradients
        sizes = group_sizes(ends)
        rows_grad = _multiply(gradient, matrices.transpose(1, 2), sizes) if ctx.needs_input_grad[0] else None
        matrices_grad = None
        if ctx.needs_input_grad[1]:  # in the strides of the matrices, so that nobody copies it
            straight = matrices.stride(-1) == 1
            pair = (rows, gradient) if straight else (gradient, rows)
            matrices_grad = _outer(*pair, sizes)
            matrices_grad = matrices_grad if straight else matrices_grad.transpose(1, 2)
        return rows_grad, matrices_grad, None


def _multiply(rows: Tensor, matrices: Tensor, sizes: list[int]) -> Tensor:
    out = rows.new_empty(rows.shape[0], matrices.shape[2])
    if rows.shape[0] == 0:
        return out
    turned = matrices.transpose(1, 2)
    if turned.is_contiguous():
        layout, stack = "TN", turned
    else:
        layout, stack = "NN", matrices.contiguous()
    _run(stack.unbind(), rows.contiguous().split(sizes), [out], layout, sizes, single_output=True)
    return out


def _outer(rows: Tensor, others: Tensor, sizes: list[int]) -> Tensor:
    out = rows.new_empty(len(sizes), rows.shape[1], others.shape[1])
    if rows.shape[0] == 0:
        return out.zero_()
    _run(others.contiguous().split(sizes), rows.contiguous().split(sizes), list(out.unbind()), "NT", sizes, grad=True)
    return out


def _run(a: Any, b: Any, out: list[Tensor], layout: str, sizes: list[int], **more: bool) -> None:
    quantizers = [None] * len(sizes)
    _gemm()(list(a), list(b), out, quantizers, out[0].dtype, layout=layout, m_splits=sizes, **more)


def _takes(rows: Tensor, width: int) -> bool:
    """Whether these are for TransformerEngine: 16-bit floats, rows of whole 16 bytes."""
    return rows.dtype in DTYPES and rows.shape[1] % 8 == 0 and width % 8 == 0


@functools.cache
def _gemm() -> Any:
    return load("transformer_engine.pytorch.cpp_extensions").general_grouped_gemm


def load(name: str) -> Any:
    """Import a module of the package."""
    os.environ.setdefault(CUTLASS, "1")
    if "transformer_engine" not in sys.modules:
        share_cudnn()
    importlib.import_module("transformer_engine.pytorch")  # loads the library that its extension needs
    return importlib.import_module(name)


def share_cudnn(maps: Path = Path("/proc/self/maps")) -> list[str]:
    """Let the package find the cuDNN that torch has, by the files in this process; returns those that were loaded.

    Its library asks for cuDNN's parts by name. Where the system has another version than torch brought, it would get
    parts of both: its import fails, or torch's own attention is no more by cuDNN (DeepSeek-V3's heads: 39 ms, not 5).
    Whoever imported it before has what he has.
    """
    lines = maps.read_text().splitlines() if maps.exists() else []
    folders = {Path(line.split()[-1]).parent for line in lines if "libcudnn" in line}
    found = (
        sorted(file for folder in folders for file in folder.glob("libcudnn*.so.*[0-9]")) if len(folders) == 1 else []
    )
    left, tries = found, len(found)
    while left and tries:  # one may want another that comes later
        left, tries = [file for file in left if not _loads(file)], tries - 1
    return [str(file) for file in found if file not in left]


def _loads(file: Path) -> bool:
    try:
        ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def tried(device: torch.device) -> str | None:
    """What is wrong with a product of two groups; None where it is right."""
    generator = torch.Generator().manual_seed(0)
    rows, matrices = (torch.randn(*shape, generator=generator) for shape in ((16, 128), (2, 128, 64)))
    rows, matrices = (each.to(device, torch.bfloat16) for each in (rows, matrices))
    ends = torch.tensor([5, 16], dtype=torch.int32, device=device)
    exact = [grouped_mm_by_group(rows.float(), matrices.float(), ends)]
    return off("general_grouped_gemm", lambda: [multiply(rows, matrices, ends)], exact)


def off(name: str, compute: Callable[[], Sequence[Tensor]], exact: Sequence[Tensor], most: float = 0.01) -> str | None:
    """What is wrong with a function of the package, by tensors that it should compute; None where it is right.

    Args:
        name: of the function.
        compute: computes by it.
        exact: the same in fp32.
        most: of the error, relative to the norm of each.
    """
    of_version = f"{name} of transformer_engine {version()}"
    try:
        pairs = zip(compute(), exact, strict=True)
        errors = [((found.float() - true).norm() / true.norm()).item() for found, true in pairs]
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError) as failure:
        return f"{of_version} fails: {type(failure).__name__}: {failure}"
    wrong = [error for error in errors if not error < most]  # NaN is
    return f"{of_version} is off by {wrong[0]:.0%}" if wrong else None
