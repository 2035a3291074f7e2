"""Moving bytes: the kernel moves runs, a pair of buffers of 8 MiB a thread moves everything else.

What moves in a buffer moves as unsigned integers of the element's size, never as floats: NaN payloads, fp8 and whatever
comes next keep their bits. All calls release the GIL, so threads add up to what the disk gives.
"""

import errno
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import as_strided

from moe_accel.convert.lower import Gather, Operation, Place, Run
from moe_accel.errors import CheckpointError

BLOCK_BYTES = 8 << 20
"""Size of a buffer; a thread has one for what it reads and one for what it writes."""
KERNEL_BYTES = 32 << 20
"""Most that one call of the kernel moves: how soon Ctrl-C counts, and how often progress is told."""

FALL_BACK = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ETXTBSY, errno.EBADF, errno.EPERM}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Stopped(Exception):
    """Another thread failed, or the user pressed Ctrl-C."""


class Files:
    """Open source files by path, and a word to stop by. Safe to share between threads."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()
        self.stop = threading.Event()

    def fd(self, file: Path) -> int:
        """A descriptor to read `file` with."""
        if self.stop.is_set():
            raise Stopped
        found = self._open.get(file)
        if found is None:
            with self._lock:
                found = self._open.get(file)
                if found is None:
                    found = self._open[file] = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        return found

    def close(self, file: Path | None = None) -> None:
        """Close `file`, or all of them."""
        with self._lock:
            for each in [file] if file is not None else list(self._open):
                if each in self._open:
                    os.close(self._open.pop(each))


_local = threading.local()


def buffer(name: str, num_bytes: int) -> memoryview:
    """This thread's buffer of that name, at least `num_bytes` long."""
    found = getattr(_local, name, None)
    if found is None or len(found) < num_bytes:
        found = memoryview(bytearray(max(num_bytes, min(BLOCK_BYTES, 2 * num_bytes))))
        setattr(_local, name, found)
    return found[:num_bytes]


def read_into(file: Path, fd: int, view: memoryview, at: int) -> None:
    """Fill `view` from byte `at` of a file.

    Raises:
        CheckpointError: the file ends before.
    """
    done = 0
    while done < len(view):
        if hasattr(os, "preadv"):
            got = os.preadv(fd, [view[done:]], at + done)
        else:
            data = os.pread(fd, len(view) - done, at + done)
            view[done : done + len(data)] = data
            got = len(data)
        if got == 0:
            raise CheckpointError(f"{file} changed while it was read: no byte {at + done}")
        done += got


def write_all(fd: int, view: memoryview, at: int) -> None:
    """Write all of `view` at byte `at`."""
    while len(view):
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done


def _kernel_copy(source: int, source_at: int, target: int, target_at: int, count: int) -> int:
    return os.copy_file_range(source, target, count, source_at, target_at)


def _kernel_send(source: int, source_at: int, target: int, target_at: int, count: int) -> int:
    os.lseek(target, target_at, os.SEEK_SET)
    return os.sendfile(target, source, source_at, count)


class Copier:
    """Executes operations, `threads` at a time if called so; learns which call the two file systems support."""

    def __init__(self, files: Files, moved: Callable[[int], None] = lambda num_bytes: None) -> None:
        self.files, self.moved = files, moved
        self._writing = threading.Lock()  # one at a time: the kernel locks the file anyway, and spins while it waits
        self.kernel = [
            call for call, name in ((_kernel_copy, "copy_file_range"), (_kernel_send, "sendfile")) if hasattr(os, name)
        ]

    def execute(self, operations: list[Operation], target: Path) -> None:
        """Write the results of `operations` into the file `target`, which exists."""
        fd = os.open(target, os.O_WRONLY | getattr(os, "O_BINARY", 0))
        try:
            for op in operations:
                if isinstance(op, Run):
                    self._run(op, fd)
                else:
                    self._gather(op, fd)
        finally:
            os.close(fd)

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

    def _gather(self, op: Gather, fd: int) -> None:
        widest = max([op.row_bytes, *(p.row_step for p in op.pieces if p.row_step >= p.cols * p.col_step)])
        rows = max(1, BLOCK_BYTES // widest)
        for start in range(0, op.rows, rows):
            block = op.part(start, min(start + rows, op.rows))
            view = buffer("target", block.num_bytes)
            whole = np.frombuffer(view, UNSIGNED[op.item])
            for piece in block.pieces:
                source = self.files.fd(piece.file)
                shape, steps = (block.rows, piece.cols), (piece.row_step, piece.col_step)
                read = read_strided(piece.file, source, piece.at, shape, steps, op.item)
                into = as_strided(whole[piece.target_at // op.item :], shape, (op.row_bytes, piece.target_step))
                assign(into, read)
            with self._writing:
                write_all(fd, view, block.target_at)
            self.moved(block.num_bytes)


def read_strided(file: Path, fd: int, at: int, shape: tuple[int, int], steps: tuple[int, int], item: int) -> np.ndarray:
    """Elements of `item` bytes at `at + r * steps[0] + c * steps[1]`, as unsigned integers of shape `shape`.

    The result lies in this thread's buffer and is good until the next call.
    """
    dtype = UNSIGNED[item]
    span = (shape[0] - 1) * steps[0] + (shape[1] - 1) * steps[1] + item
    if span <= max(BLOCK_BYTES, item) and span <= 8 * shape[0] * shape[1] * item:
        view = buffer("source", span)
        read_into(file, fd, view, at)
        return as_strided(np.frombuffer(view, dtype), shape, steps)
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

    Measured on [768, 2048] of 2 bytes, one core of a busy machine, 2026-11: 5.0 s/GB plain, 0.59 in strips of 32 rows,
    0.41 with 4 rows woven into 8-byte units first, 0.47 with torch.
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
    weave = 8 // source.itemsize
    rows = source.shape[0] // weave * weave
    if weave == 1 or target.strides[0] != target.itemsize or not _aligned(target):
        rows = 0
    elif rows:
        units = target[:rows].T.view(np.uint64).T
        for start in range(0, rows // weave, 16):
            strip = source[start * weave : min((start + 16) * weave, rows)]
            woven = np.empty((strip.shape[0] // weave, strip.shape[1], weave), source.dtype)
            for row in range(weave):
                woven[:, :, row] = strip[row::weave]
            units[start : start + 16] = woven.view(np.uint64)[:, :, 0]
    for start in range(rows, source.shape[0], 32):
        target[start : start + 32] = source[start : start + 32]


def _aligned(target: np.ndarray) -> bool:
    return target.ctypes.data % 8 == 0 and target.strides[1] % 8 == 0


def read_place(files: Files, place: Place, start: int, stop: int) -> np.ndarray:
    """Rows `start` to `stop` of a place, as unsigned integers; good until the next call of this thread."""
    at, steps = place.at + start * place.row_step, (place.row_step, place.col_step)
    return read_strided(place.file, files.fd(place.file), at, (stop - start, place.cols), steps, place.item)
