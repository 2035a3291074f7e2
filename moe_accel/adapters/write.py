"""Tensors made one at a time go into a file as everything here does: temporary name, sync, read back, rename."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_accel.adapters.config import CONFIG, WEIGHTS
from moe_accel.adapters.convert import Written
from moe_accel.adapters.source import Adapter
from moe_accel.convert.copy import Files, write_all
from moe_accel.convert.digest import digest, new_digest
from moe_accel.convert.headers import make_header, num_bytes
from moe_accel.convert.lower import place
from moe_accel.convert.regions import Tensor, whole
from moe_accel.convert.target import Target, refuse_overlap, writing
from moe_accel.convert.verify import MismatchError
from moe_accel.errors import CheckpointError
from moe_accel.version import VERSION


def write_adapter(
    adapter: Adapter,
    folder: Path,
    tensors: Iterable[Written],
    config: Mapping[str, Any],
    overwrite: bool,
    dry_run: bool = False,
) -> int:
    """Write an adapter directory, or only look whether it could be; its config comes last.

    Returns:
        The bytes of its weights.

    Raises:
        CheckpointError: the directory cannot be written, or is not empty.
        MismatchError: what was written is not what is read back.
    """
    refuse_overlap(adapter.folder, folder)
    by_name = {each.name: each for each in tensors}
    shapes = {each.name: Tensor(each.name, each.dtype, each.shape) for each in by_name.values()}
    header, starts = make_header(shapes, adapter.header.metadata or {"format": "pt"})
    size = len(header) + sum(num_bytes(each.dtype, each.shape) for each in shapes.values())
    text = json.dumps(dict(config), indent=2, sort_keys=True).encode()  # as PEFT, to the byte
    state = hashlib.sha256(VERSION.encode() + header + text + adapter.header.raw)
    state.update(f"{adapter.header.file_bytes} {adapter.header.mtime_ns}".encode())
    target = Target(folder, state.hexdigest()[:16])
    names = {name: (adapter.folder / name).stat().st_size for name in adapter.others}
    names |= {WEIGHTS: size, CONFIG: len(text)}
    if dry_run:
        target.check(names, overwrite)
        return size
    target.lock()
    try:
        target.claim(names, overwrite)
        for name in adapter.others:
            target.copy_in(adapter.folder / name, name)
        temporary = target.create(WEIGHTS, header, size)
        digests = _write_all(temporary, starts, by_name)
        target.sync(WEIGHTS)
        _check(temporary, starts, shapes, digests)
        target.publish(WEIGHTS)
        target.write(CONFIG, text)
        target.remove_temporaries()
    finally:
        target.unlock()
    return size


def _write_all(temporary: Path, starts: Mapping[str, int], tensors: Mapping[str, Written]) -> dict[str, str]:
    digests = {}
    with writing(temporary):
        fd = os.open(temporary, os.O_WRONLY | getattr(os, "O_BINARY", 0))
        try:
            for name, start in starts.items():
                bits = np.ascontiguousarray(tensors[name].make())
                if bits.shape != tensors[name].shape:
                    raise CheckpointError(f"{name} is {list(bits.shape)}, planned was {list(tensors[name].shape)}")
                view = bits.reshape(-1).data.cast("B")
                state = new_digest()
                state.update(view)
                digests[name] = state.hexdigest()
                write_all(fd, view, start)
        finally:
            os.close(fd)
    return digests


def _check(file: Path, starts: Mapping[str, int], tensors: Mapping[str, Tensor], digests: Mapping[str, str]) -> None:
    files = Files()
    try:
        for name, tensor in tensors.items():
            if digest(files, place(whole(tensor), tensor, file, starts[name])) != digests[name]:
                raise MismatchError(
                    f"{file}: tensor {name!r} is not what was written", "the disk or the memory is at fault"
                )
    finally:
        files.close()
