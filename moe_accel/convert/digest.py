"""Digests of regions: of a matrix in row-major order, so that every layout of it has the same one."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from moe_accel.convert.copy import BLOCK_BYTES, UNSIGNED, Files, assign, buffer, read_named, read_place
from moe_accel.convert.lower import Place

try:
    import xxhash

    ALGORITHM = "xxh3-128"
    new_digest: Callable[[], Any] = xxhash.xxh3_128
except ImportError:
    ALGORITHM = "blake2b-128"

    def new_digest() -> Any:
        """An empty digest."""
        return hashlib.blake2b(digest_size=16)


CHUNK_BYTES = 1 << 20
"""Read at a time where bytes are contiguous: stays in the second-level cache until it is digested."""


def digest(
    files: Files, place: Place, read: Callable[[int], None] = lambda num_bytes: None, direct: bool = False
) -> str:
    """The digest of a place's elements, row by row, in hexadecimal; `read` is told of bytes as they are read.

    `direct`: from the disk itself, past the page cache, where the system can and they lie together.
    """
    state = new_digest()
    if place.is_contiguous:
        chunk_bytes = BLOCK_BYTES if direct else CHUNK_BYTES
        for at in range(0, place.num_bytes, chunk_bytes):
            view = read_named(
                files, place.file, "source", place.at + at, min(chunk_bytes, place.num_bytes - at), direct
            )
            state.update(view)
            read(len(view))
        return state.hexdigest()
    widest = max(place.cols * place.item, place.row_step if place.row_step >= place.cols * place.col_step else 0)
    rows = max(1, BLOCK_BYTES // max(1, widest))
    for start in range(0, place.rows, rows):
        found = read_place(files, place, start, min(start + rows, place.rows), direct)
        _update(state, found, place.item)
        read(found.nbytes)
    return state.hexdigest()


def digest_both_ways(
    files: Files, place: Place, read: Callable[[int], None] = lambda num_bytes: None, direct: bool = False
) -> tuple[str, str]:
    """The digests of a place and of its transpose, read once where it fits into a buffer; otherwise as `digest`."""
    if place.num_bytes > BLOCK_BYTES:
        return digest(files, place, read, direct), digest(files, place.turned, direct=direct)
    found, states = read_place(files, place, 0, place.rows, direct), (new_digest(), new_digest())
    for state, each in zip(states, (found, found.T), strict=True):
        _update(state, each, place.item)
    read(found.nbytes)
    return states[0].hexdigest(), states[1].hexdigest()


def _update(state: Any, found: np.ndarray, item: int) -> None:
    """Add elements to a digest, row by row."""
    if not found.flags.c_contiguous:
        ordered = np.frombuffer(buffer("target", found.nbytes), UNSIGNED[item]).reshape(found.shape)
        assign(ordered, found)
        found = ordered
    state.update(found.data.cast("B"))
