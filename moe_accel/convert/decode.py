"""The numbers behind quantised bytes: value times scale in fp32, rounded once to bf16, a few rows at a time.

torch is imported by what computes, not by this module: the converter starts without it.
"""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from moe_accel.convert.quantized import Quantized
from moe_accel.convert.regions import Tensor

if TYPE_CHECKING:
    import torch

CHUNK_ELEMENTS = 2 << 20
"""Elements at a time: 8 MB as fp32."""
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of E2M1 by its four bits."""

Read = Callable[[Tensor, int, int], bytearray]
"""Tensor, first byte and number of bytes -> these bytes of its data."""


def decoded(one: Quantized, read: Read) -> "Iterator[memoryview]":
    """The bytes of the result in bf16, in order, in pieces: some rows, or one matrix where it is turned."""
    import torch

    *lead, rows, cols = one.shape
    if math.prod(one.shape) == 0:
        return
    step = max(1, CHUNK_ELEMENTS // cols)
    for at in range(math.prod(lead)):
        scales = _scales(one, read, at)
        chunks = ((start, min(start + step, rows)) for start in range(0, rows, step))
        if not one.turned:
            for start, stop in chunks:
                yield _bytes(_rows(one, read, at, start, stop, scales))
            continue
        whole = torch.empty(cols, rows, dtype=torch.bfloat16)
        for start, stop in chunks:
            whole[:, start:stop] = _rows(one, read, at, start, stop, scales).T
        yield _bytes(whole)


def _bytes(values: "torch.Tensor") -> memoryview:
    import torch

    return values.contiguous().flatten().view(torch.uint8).numpy().data


def _rows(one: Quantized, read: Read, at: int, start: int, stop: int, scales: "torch.Tensor") -> "torch.Tensor":
    """Rows `start` to `stop` of matrix `at`, bf16."""
    import torch

    rows, cols = one.shape[-2:]
    row_bytes = cols if one.kind == "fp8" else cols // 2
    raw = torch.frombuffer(
        read(one.weight, (at * rows + start) * row_bytes, (stop - start) * row_bytes), dtype=torch.uint8
    )
    if one.kind == "fp8":
        dtype = torch.float8_e4m3fn if one.weight.dtype == "F8_E4M3" else torch.float8_e5m2
        values = raw.view(dtype).float()
    else:
        table = torch.tensor(FP4)
        values = torch.stack([table[(raw & 15).int()], table[(raw >> 4).int()]], dim=-1)
    block_rows, block_cols = one.block
    of_rows = scales[torch.arange(start, stop) // block_rows]
    of_cols = torch.arange(cols) // block_cols
    return values.view(stop - start, cols).mul_(of_rows[:, of_cols]).bfloat16()


def _scales(one: Quantized, read: Read, at: int) -> "torch.Tensor":
    """The scales of matrix `at`, fp32 [blocks of rows, blocks of columns]."""
    import torch

    rows, cols = one.shape[-2:]
    grid = math.ceil(rows / one.block[0]), math.ceil(cols / one.block[1])
    found = _numbers(one.scale, grid[0] * grid[1], at, read).view(grid)
    if one.scale_2 is not None:
        found = found * _numbers(one.scale_2, 1, at, read)
    return found.to(torch.float32)


def _numbers(tensor: Tensor, count: int, at: int, read: Read) -> "torch.Tensor":
    """The `count` numbers of matrix `at`, or of all where the tensor has no more, as fp32."""
    import torch

    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}
    dtype = dtypes.get(tensor.dtype, torch.uint8)
    size, at = dtype.itemsize, at if math.prod(tensor.shape) > count else 0
    found = torch.frombuffer(read(tensor, at * count * size, count * size), dtype=torch.uint8).view(dtype)
    return torch.pow(2.0, found.int() - 127) if dtype == torch.uint8 else found.float()
