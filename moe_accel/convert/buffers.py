"""Memory that a thread copies and digests through: made once, used for one block after another."""

import mmap
import threading
from contextlib import suppress

BLOCK_BYTES = 8 << 20
"""Size of a buffer; a thread has one for what it reads and one for what it writes."""

_local = threading.local()


def buffer(name: str, num_bytes: int) -> memoryview:
    """This thread's buffer of that name, `num_bytes` long; it starts where a page of memory starts."""
    found = getattr(_local, name, None)
    if found is None or len(found) < num_bytes:
        found = memoryview(_memory(max(num_bytes, min(BLOCK_BYTES, 2 * num_bytes), 1)))
        setattr(_local, name, found)
    return found[:num_bytes]


def _memory(num_bytes: int) -> mmap.mmap:
    """Pages of this process alone, large ones where there are some."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, num_bytes)
    found = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            found.madvise(mmap.MADV_HUGEPAGE)
    return found
