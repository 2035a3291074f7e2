"""From a plan to operations on bytes: runs, which the kernel copies, and gathers, which pass through a buffer.

A copy has at most two axes. Where both sides are contiguous it is a run, and runs that touch on both sides become one.
Otherwise the copies whose targets lie in one another (gate and up rows interleaved; gate and up columns side by side)
form one gather, whose target is contiguous again: it is written in blocks of whole rows, each of them once. Exactly
once is checked here, whatever the planner said.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_accel.convert.headers import DTYPE_BITS, num_bytes
from moe_accel.convert.regions import Copy, Output, Region, Tensor
from moe_accel.errors import CheckpointError


class Place(NamedTuple):
    """A region in a file, in bytes: element (r, c) of `item` bytes lies at `at + r * row_step + c * col_step`."""

    file: Path
    at: int
    rows: int
    cols: int
    row_step: int
    col_step: int
    item: int

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements, row by row, are one run of bytes."""
        return (self.cols == 1 or self.col_step == self.item) and (
            self.rows == 1 or self.row_step == self.cols * self.item
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return self.rows * self.cols * self.item

    @property
    def lies_turned(self) -> bool:
        """Whether the file has column after column."""
        return self.rows > 1 and self.cols > 1 and self.row_step < self.col_step

    @property
    def turned(self) -> "Place":
        """Its transpose: the same elements, column after column."""
        return self._replace(rows=self.cols, cols=self.rows, row_step=self.col_step, col_step=self.row_step)

    @property
    def in_file_order(self) -> "Place":
        """The same elements in the order in which the file has them."""
        return self.turned if self.lies_turned else self


class Run(NamedTuple):
    """`num_bytes` bytes from one file to another."""

    file: Path
    source_at: int
    target_at: int
    num_bytes: int


class Piece(NamedTuple):
    """One copy of a gather. Row r of the block takes `cols` elements: from `at + r * row_step + c * col_step` in the
    source to `target_at + c * target_step` in the row, all in bytes."""

    file: Path
    at: int
    cols: int
    row_step: int
    col_step: int
    target_at: int
    target_step: int


class Gather(NamedTuple):
    """`rows` rows of `row_bytes` contiguous bytes at `target_at`, made of `pieces`."""

    target_at: int
    rows: int
    row_bytes: int
    item: int
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes it writes."""
        return self.rows * self.row_bytes

    def source(self, piece: Piece) -> Place:
        """Where one of its pieces lies."""
        return Place(piece.file, piece.at, self.rows, piece.cols, piece.row_step, piece.col_step, self.item)

    def part(self, start: int, stop: int) -> "Gather":
        """Its rows from `start` up to `stop`."""
        pieces = tuple(piece._replace(at=piece.at + start * piece.row_step) for piece in self.pieces)
        return self._replace(target_at=self.target_at + start * self.row_bytes, rows=stop - start, pieces=pieces)


Operation = Run | Gather


def place(region: Region, tensor: Tensor, file: Path, start: int) -> Place:
    """Where `region` of `tensor` lies in `file`, given the byte at which the tensor starts.

    Raises:
        CheckpointError: the region leaves the tensor, or takes apart elements smaller than a byte.
    """
    numel = math.prod(tensor.shape)
    last = region.offset + (region.rows - 1) * region.row_stride + (region.cols - 1) * region.col_stride
    if min(region.offset, region.rows, region.cols, region.row_stride, region.col_stride) < 0 or (
        last >= numel and region.rows * region.cols > 0
    ):
        raise CheckpointError(f"{region} leaves tensor {tensor.name!r} of shape {list(tensor.shape)}")
    bits = DTYPE_BITS[tensor.dtype]
    if bits % 8 == 0:
        item = bits // 8
        steps = region.row_stride * item, region.col_stride * item
        return Place(file, start + region.offset * item, region.rows, region.cols, *steps, item)
    whole = Place(file, 0, region.rows, region.cols, region.row_stride, region.col_stride, 1)
    if not whole.is_contiguous or region.offset * bits % 8 or region.rows * region.cols * bits % 8:
        raise CheckpointError(f"tensor {tensor.name!r}: elements of {bits} bits ({tensor.dtype}) cannot be taken apart")
    size = region.rows * region.cols * bits // 8
    return Place(file, start + region.offset * bits // 8, 1, size, size, 1, 1)


class _Axes(NamedTuple):
    """A copy whose target axes are ordered, outer first; `at` in bytes of the target."""

    at: int
    end: int
    piece: Piece
    rows: int
    row_target_step: int
    item: int

    @property
    def is_run(self) -> bool:
        return self.rows == 1 and self.piece.col_step == self.piece.target_step == self.item


def _axes(source: Place, target: Place) -> _Axes:
    pairs = [(source.rows, source.row_step, target.row_step), (source.cols, source.col_step, target.col_step)]
    pairs = sorted((pair for pair in pairs if pair[0] != 1), key=lambda pair: -pair[2])
    item = source.item
    if len(pairs) == 2:
        (n_outer, s_outer, t_outer), (n_inner, s_inner, t_inner) = pairs
        if s_outer == n_inner * s_inner and t_outer == n_inner * t_inner:
            pairs = [(n_outer * n_inner, s_inner, t_inner)]
    if len(pairs) == 1 and pairs[0][2] != item:
        pairs.append((1, item, item))
    while len(pairs) < 2:
        pairs.insert(0, (1, 0, 0)) if pairs else pairs.append((1, item, item))
    (n_outer, s_outer, t_outer), (n_inner, s_inner, t_inner) = pairs
    end = target.at + (n_outer - 1) * t_outer + (n_inner - 1) * t_inner + item
    piece = Piece(source.file, source.at, n_inner, s_outer, s_inner, target.at, t_inner)
    return _Axes(target.at, end, piece, n_outer, t_outer, item)


@cache
def _tiles(row_elements: int, columns: tuple[tuple[int, int, int], ...]) -> bool:
    """Whether these (first, count, step) cover the elements of a row exactly once."""
    covered = np.zeros(row_elements, np.uint8)
    for first, count, step in columns:
        if first < 0 or first + (count - 1) * step >= row_elements or (step == 0 and count > 1):
            return False
        covered[first : first + (count - 1) * step + 1 : step or 1] += 1
    return bool((covered == 1).all())


def _gather(name: str, group: list[_Axes]) -> Gather:
    first = group[0]
    start, end, item = first.at, max(axes.end for axes in group), first.item
    row_bytes = first.row_target_step if first.rows > 1 else end - start
    pieces = tuple(axes.piece._replace(target_at=axes.piece.target_at - start) for axes in group)
    columns = tuple((piece.target_at // item, piece.cols, piece.target_step // item) for piece in pieces)
    alike = all((axes.rows, axes.row_target_step) == (first.rows, first.row_target_step) for axes in group)
    if not alike or first.rows * row_bytes != end - start or not _tiles(row_bytes // item, columns):
        raise CheckpointError(
            f"the plan for tensor {name!r} does not write every element exactly once: "
            f"{len(group)} copies into bytes {start} to {end}"
        )
    return Gather(start, first.rows, row_bytes, item, pieces)


def lower_output(
    output: Output, start: int, sources: Mapping[str, Tensor], locate: Callable[[str], tuple[Path, int]]
) -> Iterator[Operation]:
    """The operations that write `output` into a file where its data starts at byte `start`.

    Args:
        output: what to write.
        start: of its data in the file.
        sources: the source tensors by name.
        locate: name of a source tensor -> file and first byte.

    Raises:
        CheckpointError: the copies do not write every element exactly once, or change the dtype.
    """
    target = Tensor(output.name, output.dtype, output.shape)
    end = start + num_bytes(output.dtype, output.shape)
    if all(is_plain(copy) for copy in output.copies):
        yield from _runs(target, start, end, output.copies, sources, locate)
        return
    found = [_axes(*both) for copy in output.copies if (both := _both(copy, target, start, sources, locate))]
    found.sort(key=lambda axes: axes.at)
    at, group, reach = start, [], start
    for axes in [*found, None]:
        if axes is not None and group and axes.at < reach:
            group.append(axes)
            reach = max(reach, axes.end)
            continue
        if group:
            if len(group) == 1 and group[0].is_run:
                run = Run(group[0].piece.file, group[0].piece.at, group[0].at, group[0].end - group[0].at)
                yield run
                at = run.target_at + run.num_bytes
            else:
                gather = _gather(output.name, group)
                yield gather
                at = gather.target_at + gather.num_bytes
        if (axes.at if axes is not None else end) != at:
            raise CheckpointError(
                f"the plan for tensor {output.name!r} does not write every element exactly once: byte {at - start}"
            )
        group, reach = ([axes], axes.end) if axes is not None else ([], end)


def is_plain(copy: Copy) -> bool:
    """Whether both sides are contiguous."""
    source, target = copy
    return (
        source.col_stride == target.col_stride == 1
        and (source.row_stride == source.cols or source.rows == 1)
        and (target.row_stride == target.cols or target.rows == 1)
    )


def _runs(
    target: Tensor, start: int, end: int, copies: Iterable[Copy], sources: Mapping[str, Tensor], locate
) -> Iterator[Run]:
    """The short way for the usual case, contiguous on both sides: there can be a hundred thousand of them."""
    bits, at, dtype = DTYPE_BITS[target.dtype], start, target.dtype
    for copy in sorted(copies, key=lambda each: each.target.offset):
        region, to = copy
        source, offset, rows, cols = sources[region.tensor], region.offset, region.rows, region.cols
        file, first = locate(region.tensor)
        count = rows * cols
        if source.dtype != dtype or rows != to.rows or cols != to.cols:
            _both(copy, target, start, sources, locate)  # says what is wrong
        if offset < 0 or offset + count > math.prod(source.shape) or (offset | count) * bits % 8:
            place(region, source, file, first)
            raise CheckpointError(f"{region} leaves tensor {source.name!r} of shape {list(source.shape)}")
        size = count * bits // 8
        if start + to.offset * bits // 8 != at or at + size > end:
            break
        yield Run(file, first + offset * bits // 8, at, size)
        at += size
    if at != end:
        raise CheckpointError(
            f"the plan for tensor {target.name!r} does not write every element exactly once: byte {at - start}"
        )


def _both(copy: Copy, target: Tensor, start: int, sources: Mapping[str, Tensor], locate) -> tuple[Place, Place] | None:
    source, region = sources[copy.source.tensor], copy.target
    if source.dtype != target.dtype or (copy.source.rows, copy.source.cols) != (region.rows, region.cols):
        raise CheckpointError(
            f"the plan copies {source.dtype} [{copy.source.rows}, {copy.source.cols}] of {source.name!r} to "
            f"{target.dtype} [{region.rows}, {region.cols}] of {target.name!r}"
        )
    if region.rows * region.cols == 0:
        return None
    return place(copy.source, source, *locate(source.name)), place(region, target, Path(), start)


def coalesce(operations: Iterable[Operation]) -> list[Operation]:
    """The same operations with neighbouring runs joined where they touch in both files."""
    joined: list[Operation] = []
    for op in operations:
        last = joined[-1] if joined else None
        if (
            isinstance(op, Run)
            and isinstance(last, Run)
            and last.source_at + last.num_bytes == op.source_at  # before the files, which take longer to compare
            and last.target_at + last.num_bytes == op.target_at
            and last.file == op.file
        ):
            joined[-1] = last._replace(num_bytes=last.num_bytes + op.num_bytes)
        elif op.num_bytes:
            joined.append(op)
    return joined


def batches(operations: Iterable[Operation], batch_bytes: int) -> list[list[Operation]]:
    """Split operations into lists of about `batch_bytes` each, for threads to take in turn."""
    done, at, pieces = [], 0, []
    for op in operations:
        for piece in _split(op, batch_bytes):
            pieces.append((at // batch_bytes, piece))
            at += piece.num_bytes
    for _, group in groupby(pieces, key=lambda pair: pair[0]):
        done.append([piece for _, piece in group])
    return done


def _split(op: Operation, batch_bytes: int) -> Iterator[Operation]:
    if isinstance(op, Run):
        for at in range(0, op.num_bytes, batch_bytes):
            yield Run(op.file, op.source_at + at, op.target_at + at, min(batch_bytes, op.num_bytes - at))
        return
    rows = max(1, batch_bytes // op.row_bytes)
    for start in range(0, op.rows, rows):
        yield op.part(start, min(start + rows, op.rows))
