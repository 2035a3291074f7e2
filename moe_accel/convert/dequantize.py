"""`--dequantize`: quantised weights become bf16 files beside the target, and from these the conversion goes on exactly.

    plan   the checkpoint as it will look: bf16 weights in files yet to be written, all else where it lies, scales gone
    write  one file for each source file with quantised weights, under a temporary name, checked, synced, renamed
    remove when the target is whole

The directory of these files, `.DST.dequantized-<id>`, is named after what the source files are. After a kill, the same
command finds its files there and goes on; a command for other files removes it.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from moe_accel.convert.copy import Files, Stopped, read_into, write_all
from moe_accel.convert.decode import decoded
from moe_accel.convert.digest import digest, new_digest
from moe_accel.convert.headers import Header, make_header, num_bytes, read_header
from moe_accel.convert.lower import place
from moe_accel.convert.quantized import Quantized, find_quantized, without_quantization
from moe_accel.convert.regions import Tensor, whole
from moe_accel.convert.source import Checkpoint
from moe_accel.convert.target import Target, check_writable, nearest, writing
from moe_accel.convert.verify import MismatchError
from moe_accel.convert.work import Progress, run_all, workers
from moe_accel.errors import CheckpointError, ConfigError
from moe_accel.version import VERSION

DTYPES = ("bf16",)
LEFT_BEHIND = ("hf_quant_config.json",)
"""Files that describe a quantisation which is no more."""


@dataclass(frozen=True)
class Dequantization:
    """What turns the quantised weights of `source` into bf16.

    `checkpoint` is `source` as the conversion shall see it: weights of `files` lie in `folder`, by source file.
    """

    source: Checkpoint
    checkpoint: Checkpoint
    folder: Path
    files: dict[str, list[Quantized]]

    @property
    def num_bytes(self) -> int:
        """Bytes of bf16 weights."""
        return sum(header.file_bytes - len(header.raw) for header in self._headers().values())

    @property
    def schemes(self) -> dict[str, int]:
        """How many weights were stored how."""
        return dict(Counter(one.scheme for of in self.files.values() for one in of).most_common())

    @property
    def record(self) -> dict[str, Any]:
        """For the manifest and `--json`."""
        gone = sorted({name for of in self.files.values() for one in of for name in one.gone})
        weights = {one.name: one.scheme for of in self.files.values() for one in of}
        return {"to": "bf16", "lossy": True, "schemes": self.schemes, "weights": weights, "consumed": gone}

    def _headers(self) -> dict[str, Header]:
        return {name: self.checkpoint.headers[_key(name)] for name in self.files}

    def write(self, threads: int, verify: bool, then_bytes: int, progress: Progress) -> None:
        """Write what an earlier run has not written.

        Args:
            threads: tensors at a time.
            verify: compute each again and compare it with what is read back.
            then_bytes: what will be written to the same disk after this.
            progress: told of bf16 bytes, kind `dequantize`.

        Raises:
            CheckpointError: the directory cannot be written, or the disk is too small.
            MismatchError: what was written is not what was computed.
        """
        self._make_folder(then_bytes)
        for name, header in self._headers().items():
            if _is_whole(header):
                progress("dequantize", header.file_bytes - len(header.raw))
                continue
            target = Target(self.folder, "part")
            temporary = target.create(name, header.raw, header.file_bytes)
            files = Files()
            with workers(threads, files) as pool:
                tasks = (partial(self._write_one, files, one, header, temporary, progress) for one in self.files[name])
                run_all(pool, files, tasks)
                target.sync(name)
                if verify:
                    run_all(pool, files, (partial(self._check, files, x, header, temporary) for x in self.files[name]))
            with writing(temporary):
                os.utime(temporary, ns=(header.mtime_ns, header.mtime_ns))
            target.publish(name)
        config = json.dumps(without_quantization(self.source.config), indent=2) + "\n"
        Target(self.folder, "part").write("config.json", config.encode())

    def remove(self) -> None:
        """Remove the bf16 files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def check_space(self, then_bytes: int) -> None:
        """Refuse what `write` would refuse before it writes, and change nothing: for a dry run.

        Raises:
            CheckpointError: as `write` does.
        """
        check_writable(self.folder)
        self._check_space(then_bytes, sum(_used(other) for other in self._of_other_commands()))

    def _of_other_commands(self) -> list[Path]:
        stem = self.folder.name.rpartition("-")[0]
        beside = self.folder.parent.iterdir() if self.folder.parent.exists() else ()
        return [other for other in beside if other.name.startswith(stem + "-") and other != self.folder]

    def _make_folder(self, then_bytes: int) -> None:
        for other in self._of_other_commands():
            shutil.rmtree(other, ignore_errors=True)
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
        self._check_space(then_bytes, 0)

    def _check_space(self, then_bytes: int, freed_bytes: int) -> None:
        with writing(self.folder):
            free = shutil.disk_usage(nearest(self.folder)).free + freed_bytes
        needed = sum(each.file_bytes for each in self._headers().values() if not _is_whole(each))
        if free < needed + then_bytes:
            raise CheckpointError(
                f"{self.folder.parent} needs {needed} bytes for dequantised weights until the conversion ends and "
                f"{then_bytes} for the result, its file system has {free} free",
                "make room, or take a directory on another disk",
            )

    def _read(self, files: Files, tensor: Tensor, at: int, num_bytes: int) -> bytearray:
        header = self.source.header_of(tensor.name)
        found = bytearray(num_bytes)
        read_into(header.file, files.fd(header.file), memoryview(found), header.starts[tensor.name] + at)
        return found

    def _pieces(self, files: Files, one: Quantized) -> Iterator[memoryview]:
        for piece in decoded(one, partial(self._read, files)):
            if files.stop.is_set():
                raise Stopped
            yield piece

    def _write_one(self, files: Files, one: Quantized, header: Header, temporary: Path, progress: Progress) -> None:
        at = header.starts[one.name]
        with writing(temporary, lambda: header.file_bytes):
            fd = os.open(temporary, os.O_WRONLY | getattr(os, "O_BINARY", 0))
            try:
                for piece in self._pieces(files, one):
                    write_all(fd, piece, at)
                    at += len(piece)
                    progress("dequantize", len(piece))
            finally:
                os.close(fd)

    def _check(self, files: Files, one: Quantized, header: Header, temporary: Path) -> None:
        state = new_digest()
        for piece in self._pieces(files, one):
            state.update(piece)
        written = digest(files, place(whole(one.result), one.result, temporary, header.starts[one.name]))
        if written != state.hexdigest():
            raise MismatchError(
                f"{temporary}: tensor {one.name!r} is not what was computed from {one.weight.name!r}: "
                f"it has digest {written}, computed again {state.hexdigest()}",
                "the disk or the memory is at fault, or somebody wrote to one of the files; convert again",
            )


def plan_dequantization(source: Checkpoint, target: Path, dtype: str) -> Dequantization:
    """What `--dequantize` does to a checkpoint. Reads headers only, writes nothing.

    Raises:
        CheckpointError: nothing is quantised, or something in a way that is not known.
        ConfigError: no such dtype.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dequantize={dtype!r} must be one of {', '.join(DTYPES)}")
    found = find_quantized(source.tensors, source.config)
    gone = {name for one in found for name in (one.weight.name, *one.gone)}
    clash = next((one.name for one in found if one.name in source.tensors and one.name not in gone), None)
    if clash is not None:
        raise CheckpointError(f"{clash} is there quantised and not quantised")
    files: dict[str, list[Quantized]] = {}
    for one in found:
        files.setdefault(source.file_of[one.weight.name], []).append(one)
    state = hashlib.sha256(VERSION.encode())
    source.identify(state)
    real = Path(os.path.realpath(target))
    folder = real.parent / f".{real.name}.dequantized-{state.hexdigest()[:16]}"
    headers = {name: _without(header, gone) for name, header in source.headers.items()}
    newest = max(header.mtime_ns for header in headers.values()) // 10**9 * 10**9
    for name, of in files.items():
        tensors = {one.name: one.result for one in of}
        raw, starts = make_header(tensors, None)
        size = len(raw) + sum(num_bytes(each.dtype, each.shape) for each in tensors.values())
        headers[_key(name)] = Header(folder / name, tensors, starts, None, raw, size, newest)
    file_of = {tensor: name for name, header in headers.items() for tensor in header.tensors}
    others = tuple(name for name in source.others if name not in LEFT_BEHIND)
    rewritten = {"config.json": folder / "config.json"} if "config.json" in others else {}
    seen = replace(source, headers=headers, file_of=file_of, others=others, rewritten=rewritten)
    return Dequantization(source, seen, folder, files)


def _used(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _key(name: str) -> str:
    return f"dequantized/{name}"


def _without(header: Header, gone: set[str]) -> Header:
    tensors = {name: each for name, each in header.tensors.items() if name not in gone}
    return replace(header, tensors=tensors, starts={name: header.starts[name] for name in tensors})


def _is_whole(header: Header) -> bool:
    with suppress(CheckpointError):
        found = read_header(header.file)
        return found.raw == header.raw and found.mtime_ns == header.mtime_ns
    return False
