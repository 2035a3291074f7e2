"""Where the values of a tensor come from, and how to read a part of it without reading the rest.

A `Source` is a small tree: files at the leaves, and above them what transformers does to the tensors of a checkpoint
on the way into a model. To read a part, the tree hands the part down: of a stack of experts it goes to the experts
that it touches, of a transposed matrix to the other axis, and at a leaf it has become ranges of bytes. What cannot be
handed down (`Call`: arithmetic, reshapes) is computed from whole inputs, one at a time.

A part is one (start, stop) per dim. Bytes go straight to where they belong if that is contiguous CPU memory of the
same dtype, and through a small buffer otherwise.
"""

import math
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_accel.convert.dtypes import TORCH_DTYPES
from moe_accel.convert.headers import read_header
from moe_accel.errors import CheckpointError

Part = tuple[tuple[int, int], ...]

BLOCK_BYTES = 16 << 20
"""Of the buffer that a thread reads through; a read is at most this long."""

SHORT_RUN_BYTES = 64 << 10
"""Runs shorter than this are read together with what lies between them."""

FEW_BYTES = 1 << 20
"""Less than this is read without threads."""

NUM_THREADS = 8


class Job(NamedTuple):
    """One piece of work: fill `out`, which is `part` of `source` (a leaf or a call), rounded to `casts` in turn."""

    source: Any
    part: Part
    out: Tensor
    casts: tuple[torch.dtype, ...]


class OpenFile:
    """A file, open as long as anything is still to be read from it, whatever stands at its path meanwhile."""

    def __init__(self, path: Path):
        self.path, self.descriptor = path, os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        weakref.finalize(self, os.close, self.descriptor)

    def __deepcopy__(self, memo: dict[int, Any]) -> "OpenFile":
        return self


@dataclass(frozen=True, eq=False, slots=True)
class Leaf:
    """A tensor in a safetensors file, from byte `start` on."""

    file: OpenFile
    name: str
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def jobs(self, part: Part, out: Tensor, casts: tuple[torch.dtype, ...]) -> Iterator[Job]:
        """The work that fills `out` with `part`, rounded to `casts` in turn."""
        yield Job(self, part, out, casts)

    def fill(self, part: Part, out: Tensor, casts: tuple[torch.dtype, ...]) -> None:
        """Fill `out` with `part`, rounded to `casts` in turn."""
        direct = out.device.type == "cpu" and out.dtype == self.dtype and not any(each != self.dtype for each in casts)
        pin = out.device.type == "cuda"
        sizes, inner = [stop - start for start, stop in part], _first_inner(self.shape, part, self.dtype.itemsize)
        row_elements = math.prod(self.shape[inner + 1 :])
        strides = [math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]
        for outer in _indices(part[:inner]):
            at = tuple(index - start for index, (start, _) in zip(outer, part, strict=False))
            first = sum(index * stride for index, stride in zip(outer, strides, strict=False))
            target = out[at] if at else out
            if not part:  # a scalar
                _copy(self._read(first, 1, pin).reshape(()), target, casts)
                continue
            start, stop = part[inner]
            if direct and target.is_contiguous() and sizes[inner + 1 :] == list(self.shape[inner + 1 :]):
                self._read_into(first + start * row_elements, target)
                continue
            step = max(1, BLOCK_BYTES // max(1, row_elements * self.dtype.itemsize))
            for row in range(start, stop, step):
                rows = min(step, stop - row)
                block = self._read(first + row * row_elements, rows * row_elements, pin)
                block = block.view(rows, *self.shape[inner + 1 :])
                for dim, (low, high) in enumerate(part[inner + 1 :], start=1):
                    block = block.narrow(dim, low, high - low)
                _copy(block, target.narrow(0, row - start, rows), casts)

    def _read(self, first: int, numel: int, pin: bool) -> Tensor:
        block = torch.empty(numel, dtype=self.dtype, pin_memory=pin)  # torch keeps it until a copy to a GPU is done
        self._read_into(first, block)
        return block

    def _read_into(self, first: int, out: Tensor) -> None:
        """Read elements from number `first` on into contiguous CPU memory."""
        if not out.numel():
            return
        array: Any = out.detach().reshape(-1).view(torch.uint8).numpy()
        memory = memoryview(array)
        descriptor, position, done = self.file.descriptor, self.start + first * self.dtype.itemsize, 0
        while done < len(memory):
            try:
                count = os.preadv(descriptor, [memory[done : done + BLOCK_BYTES]], position + done)
            except OSError as error:
                raise CheckpointError(f"{self.file.path} cannot be read: {error.strerror or error}") from error
            if count == 0:
                raise CheckpointError(
                    f"{self.file.path} is cut short: tensor {self.name!r} needs {position + len(memory)} bytes, "
                    f"the file has {position + done}",
                    "the file changed after it was opened: copy the checkpoint again",
                )
            done += count


@dataclass(frozen=True, eq=False, slots=True)
class Joined:
    """Sources of one dtype, stacked along a new `dim` or concatenated along `dim`."""

    children: tuple[Any, ...]
    dim: int
    is_stack: bool
    shape: tuple[int, ...]
    dtype: torch.dtype

    def jobs(self, part: Part, out: Tensor, casts: tuple[torch.dtype, ...]) -> Iterator[Job]:
        """The work that fills `out` with `part`, rounded to `casts` in turn."""
        dim, (start, stop) = self.dim, part[self.dim]
        if self.is_stack:
            for index in range(start, stop):
                yield from self.children[index].jobs(
                    part[:dim] + part[dim + 1 :], out.select(dim, index - start), casts
                )
            return
        offset = 0
        for child in self.children:
            low, high = max(start, offset), min(stop, offset + child.shape[dim])
            if low < high:
                of_child = (*part[:dim], (low - offset, high - offset), *part[dim + 1 :])
                yield from child.jobs(of_child, out.narrow(dim, low - start, high - low), casts)
            offset += child.shape[dim]


@dataclass(frozen=True, eq=False, slots=True)
class Cut:
    """`child` from index `start` on along `dim`, as far as `shape` goes."""

    child: Any
    dim: int
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def jobs(self, part: Part, out: Tensor, casts: tuple[torch.dtype, ...]) -> Iterator[Job]:
        """The work that fills `out` with `part`, rounded to `casts` in turn."""
        low, high = part[self.dim]
        moved = (*part[: self.dim], (low + self.start, high + self.start), *part[self.dim + 1 :])
        yield from self.child.jobs(moved, out, casts)


@dataclass(frozen=True, eq=False, slots=True)
class Transposed:
    """`child` with two dims exchanged."""

    child: Any
    dim0: int
    dim1: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def jobs(self, part: Part, out: Tensor, casts: tuple[torch.dtype, ...]) -> Iterator[Job]:
        """The work that fills `out` with `part`, rounded to `casts` in turn."""
        exchanged = list(part)
        exchanged[self.dim0], exchanged[self.dim1] = part[self.dim1], part[self.dim0]
        yield from self.child.jobs(tuple(exchanged), out.transpose(self.dim0, self.dim1), casts)


@dataclass(frozen=True, eq=False, slots=True)
class Cast:
    """`child` rounded to another dtype."""

    child: Any
    shape: tuple[int, ...]
    dtype: torch.dtype

    def jobs(self, part: Part, out: Tensor, casts: tuple[torch.dtype, ...]) -> Iterator[Job]:
        """The work that fills `out` with `part`, rounded to `casts` in turn."""
        yield from self.child.jobs(part, out, (self.dtype, *casts))


@dataclass(frozen=True, eq=False, slots=True)
class Call:
    """What `compute()` returns: something no part of which can be read by itself."""

    compute: Callable[[], Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype

    def jobs(self, part: Part, out: Tensor, casts: tuple[torch.dtype, ...]) -> Iterator[Job]:
        """The work that fills `out` with `part`, rounded to `casts` in turn."""
        yield Job(self, part, out, casts)

    def fill(self, part: Part, out: Tensor, casts: tuple[torch.dtype, ...]) -> None:
        """Fill `out` with `part`, rounded to `casts` in turn."""
        whole = self.compute()
        for dim, (start, stop) in enumerate(part):
            whole = whole.narrow(dim, start, stop - start)
        _copy(whole, out, casts)


Source = Leaf | Joined | Cut | Transposed | Cast | Call


def open_sources(files: Iterable[str | Path]) -> dict[str, Leaf]:
    """Every tensor of these safetensors files, by name; the headers are read and checked, the data is not.

    Raises:
        CheckpointError: a file is missing, cut short or not a safetensors file, or has a dtype that torch lacks.
    """
    found: dict[str, Leaf] = {}
    for file in map(Path, files):
        header = read_header(file)
        opened = OpenFile(file)
        if os.fstat(opened.descriptor).st_size != header.file_bytes:
            raise CheckpointError(f"{file} changed while it was opened")
        for name, tensor in header.tensors.items():
            if tensor.dtype not in TORCH_DTYPES:
                raise CheckpointError(f"{file}: tensor {name!r} has the dtype {tensor.dtype}, which is not supported")
            found[name] = Leaf(opened, name, header.starts[name], tensor.shape, TORCH_DTYPES[tensor.dtype])
    return found


def read_whole(source: Source, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
    """All of `source`, as a new tensor."""
    out = torch.empty(source.shape, dtype=dtype or source.dtype, device=device)
    fill(whole_jobs(source, out))
    return out


def whole_jobs(source: Source, out: Tensor) -> Iterator[Job]:
    """The work that fills `out` with all of `source`."""
    return part_jobs(source, tuple((0, size) for size in source.shape), out)


def part_jobs(source: Source, part: Part, out: Tensor) -> Iterator[Job]:
    """The work that fills `out` with a part of `source`."""
    if any(start >= stop for start, stop in part):
        return iter(())
    return source.jobs(part, out.detach(), ())


def fill(jobs: Iterable[Job], done: Callable[[int], Any] | None = None) -> None:
    """Do the work, on several threads; `done` is told the bytes of each job that is finished.

    Raises:
        CheckpointError: a file cannot be read, or has become shorter since it was opened.
    """
    all_jobs = list(jobs)
    reads = [job for job in all_jobs if not isinstance(job.source, Call)]
    if sum(map(num_bytes_of, reads)) > FEW_BYTES:
        with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="moe_accel_read") as threads:
            for num_bytes in threads.map(_do, reads):
                if done is not None:
                    done(num_bytes)
        all_jobs = [job for job in all_jobs if isinstance(job.source, Call)]
    for job in all_jobs:
        num_bytes = _do(job)
        if done is not None:
            done(num_bytes)


@torch.no_grad()
def _do(job: Job) -> int:
    job.source.fill(job.part, job.out, job.casts)
    return num_bytes_of(job)


def num_bytes_of(job: Job) -> int:
    """Bytes of the file that a piece of work stands for, whatever dtype they become."""
    return job.out.numel() * job.source.dtype.itemsize


def _copy(block: Tensor, out: Tensor, casts: Sequence[torch.dtype]) -> None:
    """Copy a block to where it belongs; a GPU gets it as it lies in the file and does the rest."""
    if out.device.type != "cpu":
        block = block.to(out.device, non_blocking=True)
    for dtype in casts:
        block = block.to(dtype)
    out.copy_(block)


def _first_inner(shape: tuple[int, ...], part: Part, itemsize: int) -> int:
    """The dim from which on one read takes all: those behind it are read whole, those before it one by one."""
    inner = max(0, len(shape) - 1)
    while inner > 0 and part[inner] == (0, shape[inner]):
        inner -= 1
    while inner > 0 and (part[inner][1] - part[inner][0]) * math.prod(shape[inner + 1 :]) * itemsize < SHORT_RUN_BYTES:
        inner -= 1
    return inner


def _indices(part: Part) -> Iterator[tuple[int, ...]]:
    if not part:
        yield ()
        return
    for first in range(*part[0]):
        for rest in _indices(part[1:]):
            yield (first, *rest)


def cast(source: Source, dtype: torch.dtype) -> Source:
    """`source` rounded to `dtype`, which is itself where it has that dtype."""
    return source if source.dtype == dtype else Cast(source, source.shape, dtype)
