"""Moving bytes: the kernel moves runs, a pair of buffers of 8 MiB a thread moves everything else.

What moves in a buffer moves as unsigned integers of the element's size, never as floats: NaN payloads, fp8 and whatever
comes next keep their bits. All calls release the GIL, so threads add up to what the disk gives.
"""

import errno
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from moe_accel.convert.buffers import BLOCK_BYTES, buffer
from moe_accel.convert.lower import Gather, Operation, Piece, Place, Run
from moe_accel.errors import CheckpointError

KERNEL_BYTES = 32 << 20
"""Most that one call of the kernel moves: how soon Ctrl-C counts, and how often progress is told."""

FALL_BACK = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ETXTBSY, errno.EBADF, errno.EPERM}
UNIT, UNIT_DTYPE, STRIP, GAP = 16, np.dtype("V16"), 32, 8
"""Bytes that a transpose moves at a time, how many rows of them, and how many of them lie between two rows: rows whose
lengths are powers of two would push one another out of the cache."""
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Stopped(Exception):
    """Another thread failed, or the user pressed Ctrl-C."""


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn what the file system objects to into an error that names `file`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error


class Files:
    """Open source files by path, and a word to stop by. Safe to share between threads."""

    def __init__(self) -> None:
        self._open: dict[tuple[Path, bool], int] = {}
        self._lock = threading.Lock()
        self.stop = threading.Event()

    def fd(self, file: Path) -> int:
        """A descriptor to read `file` with."""
        return self._get(file, False)

    def direct(self, file: Path) -> int:
        """A descriptor to read `file` with past the page cache; -1 where the file system has none."""
        return self._get(file, True) if hasattr(os, "O_DIRECT") else -1

    def _get(self, file: Path, direct: bool) -> int:
        if self.stop.is_set():
            raise Stopped
        found = self._open.get((file, direct))
        if found is None:
            with self._lock:
                found = self._open.get((file, direct))
                if found is None:
                    found = self._open[file, direct] = _open_to_read(file, direct)
        return found

    def close(self, file: Path | None = None) -> None:
        """Close `file`, or all of them."""
        with self._lock:
            for key in [key for key in self._open if file in (None, key[0])]:
                if (fd := self._open.pop(key)) >= 0:
                    os.close(fd)


def _open_to_read(file: Path, direct: bool) -> int:
    with reading(file):
        if not direct:
            return os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        with suppress(OSError):
            return os.open(file, os.O_RDONLY | os.O_DIRECT)
        return -1


_kept = threading.local()


def read_into(file: Path, fd: int, view: memoryview, at: int) -> None:
    """Fill `view` from byte `at` of a file.

    Raises:
        CheckpointError: the file ends before, or cannot be read.
    """
    done = 0
    while done < len(view):
        with reading(file):
            if hasattr(os, "preadv"):
                got = os.preadv(fd, [view[done:]], at + done)
            else:
                data = os.pread(fd, len(view) - done, at + done)
                view[done : done + len(data)] = data
                got = len(data)
        if got == 0:
            raise CheckpointError(f"{file} changed while it was read: no byte {at + done}")
        done += got


def read_named(files: Files, file: Path, name: str, at: int, num_bytes: int, direct: bool = False) -> memoryview:
    """Bytes of a file, in this thread's buffer `name`; with `direct`, from the disk itself where the system can.

    Raises:
        CheckpointError: the file ends before, or cannot be read.
    """
    if direct and (fd := files.direct(file)) >= 0:
        page = mmap.PAGESIZE
        before, done = at % page, 0
        view = buffer(name, -(-(before + num_bytes) // page) * page)
        with suppress(OSError):  # what is wrong with the file, the other way of reading tells
            while (
                done % page == 0
                and done < before + num_bytes
                and (got := os.preadv(fd, [view[done:]], at - before + done))
            ):
                done += got
            if done >= before + num_bytes:
                return view[before : before + num_bytes]
    view = buffer(name, num_bytes)
    read_into(file, files.fd(file), view, at)
    return view


def write_all(fd: int, view: memoryview, at: int) -> None:
    """Write all of `view` at byte `at`."""
    while len(view):
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done


class Writer:
    """Writes blocks into a file past the page cache where the file system can (`O_DIRECT`).

    The kernel then need not find pages, copy into them and write them out later.
    Measured, 2.4 GB of transposes, 2 cores, virtual disk, 2026-11: 0.9 s of system time, 3.4 to 5.4 through the cache.
    """

    def __init__(self, file: Path) -> None:
        self._direct = -1
        self.fd = os.open(file, os.O_WRONLY | getattr(os, "O_BINARY", 0))
        """Descriptor to write with through the cache."""
        if hasattr(os, "O_DIRECT"):
            with suppress(OSError):
                self._direct = os.open(file, os.O_WRONLY | os.O_DIRECT)

    def block(self, num_bytes: int, at: int) -> memoryview:
        """Memory for a block that `write` will put at byte `at`: pages of it lie over pages of the file."""
        offset = at % mmap.PAGESIZE
        return buffer("target", offset + num_bytes)[offset:]

    def write(self, block: memoryview, at: int) -> None:
        """Write a block; its whole pages directly, what it has of its first and last page through the cache."""
        start = min(len(block), -at % mmap.PAGESIZE)
        stop = len(block) - (len(block) - start) % mmap.PAGESIZE
        if self._direct < 0 or start >= stop:
            return write_all(self.fd, block, at)
        write_all(self.fd, block[:start], at)
        write_all(self.fd, block[stop:], at + stop)
        try:
            write_all(self._direct, block[start:stop], at + start)
        except OSError as error:
            if error.errno not in FALL_BACK:
                raise
            os.close(self._direct)
            self._direct = -1
            write_all(self.fd, block[start:stop], at + start)
        return None

    def close(self) -> None:
        """Close the file."""
        for fd in (self.fd, self._direct):
            if fd >= 0:
                os.close(fd)


def _kernel_copy(source: int, source_at: int, target: int, target_at: int, count: int) -> int:
    return os.copy_file_range(source, target, count, source_at, target_at)


def _kernel_send(source: int, source_at: int, target: int, target_at: int, count: int) -> int:
    os.lseek(target, target_at, os.SEEK_SET)
    return os.sendfile(target, source, source_at, count)


class Copier:
    """Executes operations, `threads` at a time if called so; learns which call the two file systems support.

    With `new_digest`, what passes through the buffers is digested there: `seen` has the digest of each place that was
    read from its first byte to its last, in the order of the file, so that a check need not read it again.
    """

    def __init__(
        self,
        files: Files,
        moved: Callable[[int], None] = lambda num_bytes: None,
        new_digest: Callable[[], Any] | None = None,
    ) -> None:
        self.files, self.moved, self.new_digest = files, moved, new_digest
        self.seen: dict[Place, str] = {}
        self._writing = threading.Lock()  # one at a time: the kernel locks the file anyway, and spins while it waits
        self.kernel = [
            call for call, name in ((_kernel_copy, "copy_file_range"), (_kernel_send, "sendfile")) if hasattr(os, name)
        ]

    def execute(self, operations: list[Operation], target: Path) -> None:
        """Write the results of `operations` into the file `target`, which exists."""
        writer = Writer(target)
        try:
            for op in operations:
                if isinstance(op, Run):
                    self._run(op, writer.fd)
                else:
                    self._gather(op, writer)
        finally:
            writer.close()

    def expect(self, operations: list[Operation]) -> None:
        """Tell the kernel what `execute` will read next: source ranges lie anywhere, where reading ahead finds none."""
        if not hasattr(os, "posix_fadvise"):
            return
        for op in operations:
            if isinstance(op, Run):
                with suppress(OSError):
                    os.posix_fadvise(self.files.fd(op.file), op.source_at, op.num_bytes, os.POSIX_FADV_WILLNEED)

    def _run(self, run: Run, fd: int) -> None:
        done = 0
        while done < run.num_bytes:
            source, count = self.files.fd(run.file), min(KERNEL_BYTES, run.num_bytes - done)
            with self._writing:
                got = self._kernel(source, run.source_at + done, fd, run.target_at + done, count)
            if got == 0:  # not supported here, or the file is shorter than it was
                got = min(count, BLOCK_BYTES)
                view = buffer("source", got)
                read_into(run.file, source, view, run.source_at + done)
                write_all(fd, view, run.target_at + done)
            done += got
            self.moved(got)

    def _kernel(self, source: int, source_at: int, target: int, target_at: int, count: int) -> int:
        for call in list(self.kernel):
            try:
                if got := call(source, source_at, target, target_at, count):
                    return got
            except OSError as error:
                if error.errno not in FALL_BACK:
                    raise
                if call in self.kernel:
                    self.kernel.remove(call)
        return 0

    def _gather(self, op: Gather, writer: Writer) -> None:
        widest = max([op.row_bytes, *(p.row_step for p in op.pieces if p.row_step >= p.cols * p.col_step)])
        rows = max(1, BLOCK_BYTES // widest)
        states = [self._digesting(piece, op.rows <= rows) for piece in op.pieces]
        for start in range(0, op.rows, rows):
            block = op.part(start, min(start + rows, op.rows))
            view = writer.block(block.num_bytes, block.target_at)
            whole = np.frombuffer(view, UNSIGNED[op.item])
            for piece, state in zip(block.pieces, states, strict=True):
                shape = block.rows, piece.cols
                read = read_place(self.files, block.source(piece), 0, block.rows)
                if state is not None:
                    update_in_order(state, read if piece.row_step >= piece.col_step else read.T)
                into = as_strided(whole[piece.target_at // op.item :], shape, (op.row_bytes, piece.target_step))
                assign(into, read)
            writer.write(view, block.target_at)
            self.moved(block.num_bytes)
        for piece, state in zip(op.pieces, states, strict=True):
            if state is not None:
                self.seen[op.source(piece).in_file_order] = state.hexdigest()

    def _digesting(self, piece: Piece, in_one_block: bool) -> Any:
        """A digest for what is read of a piece; None if it is not read in the order of the file."""
        in_order = in_one_block or piece.row_step >= piece.col_step
        return self.new_digest() if self.new_digest is not None and in_order else None


def update_in_order(state: Any, read: np.ndarray) -> None:
    """Add the elements of `read`, row by row, to a digest."""
    if read.flags.c_contiguous:
        return state.update(read.data.cast("B"))
    rows = max(1, (1 << 18) // (read.shape[1] * read.itemsize))
    for start in range(0, read.shape[0], rows):
        state.update(np.ascontiguousarray(read[start : start + rows]).data.cast("B"))
    return None


def read_strided(
    files: Files, file: Path, at: int, shape: tuple[int, int], steps: tuple[int, int], item: int, direct: bool = False
) -> np.ndarray:
    """Elements of `item` bytes at `at + r * steps[0] + c * steps[1]`, as unsigned integers of shape `shape`.

    The result lies in this thread's buffer and is good until the next call. `direct`: as in `read_named`.
    """
    dtype = UNSIGNED[item]
    span = (shape[0] - 1) * steps[0] + (shape[1] - 1) * steps[1] + item
    if span <= max(BLOCK_BYTES, item) and span <= 8 * shape[0] * shape[1] * item:
        view = read_named(files, file, "source", at, span, direct)
        return as_strided(np.frombuffer(view, dtype), shape, steps)
    fd = files.fd(file)
    outer = 0 if steps[0] >= steps[1] else 1
    inner = 1 - outer
    line = (shape[inner] - 1) * steps[inner] + item
    compact = np.frombuffer(buffer("source", shape[0] * shape[1] * item), dtype).reshape(shape[outer], shape[inner])
    direct = steps[inner] == item
    view = memoryview(compact.data).cast("B") if direct else buffer("line", line)
    for row in range(shape[outer]):
        into = view[row * line : (row + 1) * line] if direct else view
        read_into(file, fd, into, at + row * steps[outer])
        if not direct:
            compact[row] = as_strided(np.frombuffer(view, dtype), (shape[inner],), (steps[inner],))
    return compact if outer == 0 else compact.T


def assign(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`, in an order that stays in the cache where one of them is the other's transpose.

    Measured on [768, 2048] of 2 bytes into columns of [2048, 1536], one core, 2026-11: 5.0 s/GB plain, 0.59 in strips
    of 32 rows, 0.49 with 4 rows woven into units of 8 bytes first, 0.42 with 8 rows into 16, 0.32 with a gap between
    the woven rows; 0.47 with torch. Slower: units of 32 and 64 bytes (0.47, 0.83), blocks of 256 columns (0.65),
    weaving with shifts of wider integers (0.48 to 0.57).
    """
    if (
        target.shape[0] < 8
        or target.shape[1] < 8
        or (source.strides[0] >= source.strides[1]) == (target.strides[0] >= target.strides[1])
    ):
        target[...] = source
        return
    if source.strides[0] < source.strides[1]:
        target, source = target.T, source.T  # now source has long rows, target has long columns
    weave = UNIT // source.itemsize
    rows = source.shape[0] // weave * weave
    if weave == 1 or target.strides[0] != target.itemsize:
        rows = 0
    elif rows:
        units = target[:rows].T.view(UNIT_DTYPE).T
        for start in range(0, rows // weave, STRIP):
            strip = source[start * weave : min((start + STRIP) * weave, rows)]
            shape = strip.shape[0] // weave, strip.shape[1] + GAP, weave
            woven = np.frombuffer(buffer("woven", math.prod(shape) * source.itemsize), source.dtype).reshape(shape)
            for row in range(weave):
                woven[:, :-GAP, row] = strip[row::weave]
            units[start : start + STRIP] = woven.view(UNIT_DTYPE)[:, :-GAP, 0]
    for start in range(rows, source.shape[0], 32):
        target[start : start + 32] = source[start : start + 32]


def read_place(files: Files, place: Place, start: int, stop: int, direct: bool = False) -> np.ndarray:
    """Rows `start` to `stop` of a place, as unsigned integers; good until the next call of this thread.

    What lies between them is read with them and kept: gate and up are often columns of one another's rows, and the one
    is asked for after the other. `direct`: as in `read_named`.
    """
    at, shape, steps = place.at + start * place.row_step, (stop - start, place.cols), (place.row_step, place.col_step)
    span = (shape[0] - 1) * steps[0] + (shape[1] - 1) * steps[1] + place.item
    kept = getattr(_kept, "last", None)
    if kept is None or kept[:2] != (files, place.file) or not kept[2] <= at <= at + span <= kept[2] + len(kept[3]):
        outer = 0 if steps[0] >= steps[1] else 1
        rows_bytes = shape[outer] * steps[outer]
        if not span < rows_bytes <= min(2 * BLOCK_BYTES, 8 * shape[0] * shape[1] * place.item):
            return read_strided(files, place.file, at, shape, steps, place.item, direct)
        num_bytes = max(span, min(rows_bytes, os.fstat(files.fd(place.file)).st_size - at))
        view = read_named(files, place.file, "kept", at, num_bytes, direct)
        kept = _kept.last = files, place.file, at, view
    return as_strided(np.frombuffer(kept[3][at - kept[2] :][:span], UNSIGNED[place.item]), shape, steps)
