"""Digests of regions: of a matrix in row-major order, so that every layout of it has the same one."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from moe_accel.convert.copy import BLOCK_BYTES, UNSIGNED, Files, assign, buffer, read_into, read_place
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


def digest(files: Files, place: Place, read: Callable[[int], None] = lambda num_bytes: None) -> str:
    """The digest of a place's elements, row by row, in hexadecimal; `read` is told of bytes as they are read."""
    state = new_digest()
    if place.is_contiguous:
        chunk = buffer("source", min(CHUNK_BYTES, place.num_bytes))
        for at in range(0, place.num_bytes, CHUNK_BYTES):
            view = chunk[: place.num_bytes - at]
            read_into(place.file, files.fd(place.file), view, place.at + at)
            state.update(view)
            read(len(view))
        return state.hexdigest()
    widest = max(place.cols * place.item, place.row_step if place.row_step >= place.cols * place.col_step else 0)
    rows = max(1, BLOCK_BYTES // max(1, widest))
    for start in range(0, place.rows, rows):
        found = read_place(files, place, start, min(start + rows, place.rows))
        if not found.flags.c_contiguous:
            ordered = np.frombuffer(buffer("target", found.nbytes), UNSIGNED[place.item]).reshape(found.shape)
            assign(ordered, found)
            found = ordered
        state.update(found.data.cast("B"))
        read(found.nbytes)
    return state.hexdigest()
