"""The header of a safetensors file, read strictly: eight bytes of length, JSON, then the data, nothing else.

safetensors itself checks most of this too, but its messages name neither the file nor the numbers, and it lets a name
stand in a header twice. What is refused here is refused before a byte is copied.
"""

import json
import math
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from moe_accel.convert.regions import Tensor
from moe_accel.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 1_000_000
MAX_ELEMENTS = 2**63 - 1

# In safetensors' own order, which decides where a tensor stands in a file: last dtype first, then by name.
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
DTYPE_ORDER = {dtype: at for at, dtype in enumerate(DTYPE_BITS)}

AGAIN = "download or copy it again"
LFS_START = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True, slots=True)
class Header:
    """One safetensors file: its tensors, and for each the bytes it fills, counted from the start of the file."""

    file: Path
    tensors: dict[str, Tensor]
    starts: dict[str, int]
    metadata: dict[str, str] | None
    raw: bytes
    file_bytes: int
    mtime_ns: int


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor fills in a file; `dtype` is one of `DTYPE_BITS`."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def read_header(file: Path) -> Header:
    """Read and check the header of `file`; the data is not read.

    Raises:
        CheckpointError: the file is not a whole safetensors file, whatever the reason; the message names it.
    """
    try:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{file} is not a regular file")
        with open(file, "rb") as stream:
            raw = _read_raw(file, stream, status.st_size)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    entries, metadata = _parse(file, raw[8:])
    tensors, starts = _check_entries(file, entries, len(raw), status.st_size)
    return Header(file, tensors, starts, metadata, raw, status.st_size, status.st_mtime_ns)


def lfs_pointer(file: Path) -> CheckpointError:
    """The error of a file that git has not fetched."""
    return CheckpointError(f"{file} is a Git LFS pointer, not the file itself", "git lfs pull")


def _read_raw(file: Path, stream: Any, file_bytes: int) -> bytes:
    start = stream.read(len(LFS_START))
    if start == LFS_START:
        raise lfs_pointer(file)
    if file_bytes < 8:
        raise CheckpointError(
            f"{file} is cut short: needs 8 bytes for the length of its header, has {file_bytes}", AGAIN
        )
    (length,) = struct.unpack("<Q", start[:8])
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file} is not a safetensors file: its first 8 bytes, {start[:8]!r}, would be a header of {length} bytes; "
            f"{MAX_HEADER_BYTES} are allowed"
        )
    if length + 8 > file_bytes:
        raise CheckpointError(f"{file} is cut short: its header needs {length + 8} bytes, has {file_bytes}", AGAIN)
    stream.seek(0)
    raw = stream.read(length + 8)
    if len(raw) != length + 8:
        raise CheckpointError(f"{file} is cut short: its header needs {length + 8} bytes, has {len(raw)}", AGAIN)
    return raw


class _DuplicateKey(Exception):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKey(next(name for at, name in enumerate(names) if name in names[:at]))
    return found


def parse_json(file: Path, text: bytes, what: str) -> dict[str, Any]:
    """A JSON object in which no key stands twice.

    Raises:
        CheckpointError: `text` is something else; `what` says what part of `file` it is.
    """
    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except _DuplicateKey as error:
        raise CheckpointError(f"{file}: {what} has the key {str(error)!r} twice") from None
    except RecursionError:
        raise CheckpointError(f"{file}: {what} is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: {what} is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{file}: {what} must be a JSON object, not {type(parsed).__name__}")
    return parsed


def _parse(file: Path, text: bytes) -> tuple[dict[str, Any], dict[str, str] | None]:
    if not text.startswith(b"{"):
        raise CheckpointError(f"{file}: the header must start with '{{', not {text[:1]!r}")
    entries = parse_json(file, text, "the header")
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise CheckpointError(f"{file}: __metadata__ must map names to text, it is {str(metadata)[:80]}")
    try:
        "".join([*entries, *(metadata or {}), *(metadata or {}).values()]).encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{file}: a name in the header is not text that can be written again") from None
    if len(entries) > MAX_TENSORS:
        raise CheckpointError(f"{file} has {len(entries)} tensors, {MAX_TENSORS} are allowed")
    return entries, metadata


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_ELEMENTS


def _read_entry(file: Path, name: str, entry: Any) -> tuple[Tensor, int, int]:
    try:  # the usual case, as short as it can be: there may be a hundred thousand of them
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numel = 1
        for size in shape:
            if type(size) is not int or size < 0:
                return _check_entry(file, name, entry)
            numel *= size
        usual = type(shape) is list and type(begin) is int and type(end) is int and begin >= 0 and len(entry) == 3
        if usual and numel * DTYPE_BITS[dtype] == 8 * (end - begin) and max(end, numel) <= MAX_ELEMENTS:
            return Tensor(name, dtype, tuple(shape)), begin, end
    except (TypeError, ValueError, KeyError, IndexError):
        pass
    return _check_entry(file, name, entry)


def _check_entry(file: Path, name: str, entry: Any) -> tuple[Tensor, int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        found = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
        raise CheckpointError(f"{file}: tensor {name!r} must have dtype, shape and data_offsets, it has {found[:80]}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{file}: tensor {name!r} has the unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or not all(map(_is_count, shape)) or math.prod(shape) > MAX_ELEMENTS:
        raise CheckpointError(f"{file}: tensor {name!r} has the shape {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise CheckpointError(f"{file}: tensor {name!r} has the data_offsets {str(offsets)[:80]}")
    begin, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        raise CheckpointError(
            f"{file}: tensor {name!r} of dtype {dtype} and shape {shape} needs {bits / 8:.10g} bytes, "
            f"its data_offsets {offsets} are {end - begin}"
        )
    return Tensor(name, dtype, tuple(shape)), begin, end


def _check_entries(
    file: Path, entries: Mapping[str, Any], data_start: int, file_bytes: int
) -> tuple[dict[str, Tensor], dict[str, int]]:
    checked = [_read_entry(file, name, entry) for name, entry in entries.items()]
    checked.sort(key=itemgetter(1, 2))
    at, before = 0, ""
    for tensor, begin, end in checked:
        if begin != at:
            what = "a hole" if begin > at else "an overlap"
            raise CheckpointError(
                f"{file}: {what} of {abs(begin - at)} bytes before tensor {tensor.name!r}: it starts at {begin}, "
                f"{f'tensor {before!r} ends' if before else 'the data starts'} at {at}"
            )
        at, before = end, tensor.name
    if data_start + at > file_bytes:
        raise CheckpointError(f"{file} is cut short: needs {data_start + at} bytes, has {file_bytes}", AGAIN)
    if data_start + at < file_bytes:
        raise CheckpointError(
            f"{file} has {file_bytes - data_start - at} bytes too many: its header describes {data_start + at}, "
            f"it has {file_bytes}"
        )
    return (
        {tensor.name: tensor for tensor, _, _ in checked},
        {tensor.name: data_start + begin for tensor, begin, _ in checked},
    )


def file_order(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The order in which safetensors lays tensors into a file."""
    return sorted(tensors.values(), key=lambda tensor: (-DTYPE_ORDER[tensor.dtype], tensor.name))


def make_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file with these tensors, as safetensors writes them, and where each tensor's data starts."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at, starts = 0, {}
    for tensor in file_order(tensors):
        end = at + num_bytes(tensor.dtype, tensor.shape)
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, end]}
        starts[tensor.name], at = at, end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    raw = struct.pack("<Q", len(text)) + text
    return raw, {name: len(raw) + start for name, start in starts.items()}
