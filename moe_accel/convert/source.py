"""A checkpoint directory as it lies on disk: which files hold which tensors, checked before anything is read from them.

Symbolic links are followed as far as the directory itself or, in a Hugging Face cache, the `blobs` beside `snapshots`.
"""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_accel.convert.headers import LFS_START, Header, lfs_pointer, parse_json, read_header
from moe_accel.convert.regions import Tensor
from moe_accel.errors import CheckpointError

INDEX_SUFFIX = ".safetensors.index.json"
MANIFEST = "moe_accel_manifest.json"
LOCK = ".moe-accel.lock"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
OTHER_WEIGHTS = (".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack", ".npz", ".tflite", ".ot")
MAX_INDEX_BYTES = 200_000_000
TEMPORARY = ".tmp-"
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_NUMBERED = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")


@dataclass(frozen=True)
class Checkpoint:
    """A directory of safetensors files and what lies beside them.

    `others` are the files to take along, relative to `folder`; `left_out` are weights in formats that are not read;
    `rewritten` says where one of `others` lies that is not taken as it is.
    """

    folder: Path
    headers: dict[str, Header]
    file_of: dict[str, str]
    config: dict[str, Any]
    index_metadata: dict[str, Any] | None
    others: tuple[str, ...] = ()
    left_out: tuple[str, ...] = field(default=())
    rewritten: dict[str, Path] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        return {name: tensor for header in self.headers.values() for name, tensor in header.tensors.items()}

    def header_of(self, tensor: str) -> Header:
        """Header of the file that holds a tensor."""
        return self.headers[self.file_of[tensor]]

    def identify(self, state: Any) -> None:
        """Add to a hash what the files are: equal for files that nobody touched in between."""
        for name, header in sorted(self.headers.items()):
            state.update(os.fsencode(f"\0{name} {header.file_bytes} {header.mtime_ns}") + header.raw)

    def other(self, name: str) -> Path:
        """Where one of `others` lies."""
        return self.rewritten.get(name, self.folder / name)

    @property
    def model_type(self) -> str | None:
        """What config.json says the model is."""
        found = self.config.get("model_type")
        return found if isinstance(found, str) else None

    @property
    def num_experts(self) -> int | None:
        """How many experts config.json says a layer has: the largest number it names, one of several counts summed."""
        return max(_expert_counts(self.config), default=None)

    @property
    def metadata(self) -> dict[str, str] | None:
        """`__metadata__` of the files: what any of them says, the first file's word where they differ."""
        merged: dict[str, str] = {}
        for header in self.headers.values():
            merged = {**(header.metadata or {}), **merged}
        return merged or None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read every header and the index of a checkpoint directory.

    Raises:
        CheckpointError: there is no checkpoint, it is incomplete or damaged, or it reaches out of its directory.
    """
    if not folder.is_dir():
        hint = "give the directory the file lies in" if folder.is_file() else None
        if not folder.exists() and _REPOSITORY.fullmatch(str(folder)):
            hint = f"a model of the hub is downloaded first: hf download {folder} prints its directory"
        raise CheckpointError(f"{folder} is not a directory", hint)
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from error
    roots = allowed_roots(folder)
    found = [name for name in names if name.endswith(".safetensors")]
    _refuse_what_is_no_checkpoint(folder, names, found)
    weight_map, index_metadata = _read_index(folder, names, found, roots)
    headers = {name: read_header(confine(folder / name, roots)) for name in found}
    file_of = _locate(folder, headers, weight_map)
    if not weight_map:
        _check_numbers(folder, found)
    config = {}
    if "config.json" in names:
        file = confine(folder / "config.json", roots)
        config = parse_json(file, _read_small(file), "the config")
    others, left_out = _others(folder, roots)
    return Checkpoint(folder, headers, file_of, config, index_metadata, others, left_out)


def _expert_counts(config: dict[str, Any]) -> Iterator[int]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _expert_counts(value)
        elif key in EXPERT_COUNTS:
            counts = value if isinstance(value, list) else [value]
            if counts and all(type(each) is int for each in counts):
                yield sum(counts)


def allowed_roots(folder: Path) -> tuple[Path, ...]:
    """The directories that files of `folder` may really lie in."""
    real = folder.resolve()
    if real.parent.name == "snapshots":
        return real, real.parent.parent / "blobs"
    return (real,)


def confine(file: Path, roots: tuple[Path, ...]) -> Path:
    """`file`, if it really lies under one of `roots`.

    Raises:
        CheckpointError: it is a link that leads elsewhere, or leads nowhere.
    """
    real = Path(os.path.realpath(file))
    if not any(real.is_relative_to(root) for root in roots):
        raise CheckpointError(f"{file} is a link that leads out of the checkpoint, to {real}")
    if not real.exists():
        raise CheckpointError(f"{file} is a link to {real}, which is missing", "download the checkpoint again")
    return file


def _refuse_what_is_no_checkpoint(folder: Path, names: list[str], found: list[str]) -> None:
    if found and "adapter_config.json" in names and all(name.startswith("adapter") for name in found):
        raise CheckpointError(
            f"{folder} holds an adapter, not a model", "moe-accel merge ADAPTER --base MODEL adds it to its base model"
        )
    if found:
        return
    if any(name.endswith(INDEX_SUFFIX) for name in names):
        raise CheckpointError(f"{folder} has an index and none of its .safetensors files")
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise CheckpointError(
            f"{folder} holds its weights as pickle ({', '.join(pickles[:3])}), which can run code when it is read",
            "save the model as safetensors first: model.save_pretrained(..., safe_serialization=True)",
        )
    others = [name for name in names if name.endswith(OTHER_WEIGHTS)]
    beside = f", only {', '.join(others[:3])}" if others else ""
    hint = "convert it to safetensors with the tools of that format" if others else "give the directory of a model"
    raise CheckpointError(f"{folder} has no .safetensors files{beside}", hint)


def _read_small(file: Path) -> bytes:
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{file} is not a regular file")
        if status.st_size > MAX_INDEX_BYTES:
            raise CheckpointError(f"{file} has {status.st_size} bytes, {MAX_INDEX_BYTES} are allowed")
        text = file.read_bytes()
        if text.startswith(LFS_START):
            raise lfs_pointer(file)
        return text
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error


def _read_index(
    folder: Path, names: list[str], found: list[str], roots: tuple[Path, ...]
) -> tuple[dict[str, str], dict[str, Any] | None]:
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if len(indexes) > 1:
        raise CheckpointError(f"{folder} has {len(indexes)} indexes: {', '.join(indexes[:4])}", "keep one of them")
    if not indexes:
        return {}, None
    file = confine(folder / indexes[0], roots)
    index = parse_json(file, _read_small(file), "the index")
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file}: weight_map must map tensors to files, it is {str(weight_map)[:80]}")
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{file}: metadata must be a JSON object, it is {str(metadata)[:80]}")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain(name):
            raise CheckpointError(f"{file}: {tensor!r} is said to lie in {str(name)[:80]!r}, not a plain file name")
    named = set(weight_map.values())
    missing = sorted(named - set(found))
    if missing:
        raise CheckpointError(
            f"{file} names {len(named)} files, {len(missing)} of them missing: {', '.join(missing[:4])}",
            "download the checkpoint again",
        )
    strangers = sorted(set(found) - named)
    if strangers:
        raise CheckpointError(
            f"{folder} has {len(strangers)} files that {file.name} does not name: {', '.join(strangers[:4])}",
            "move them out of the directory if they do not belong to the model",
        )
    return weight_map, metadata


def _is_plain(name: str) -> bool:
    return (
        name not in ("", ".", "..") and not any(c in name for c in "/\\\0") and ":" not in name and name.isprintable()
    )


def _locate(folder: Path, headers: dict[str, Header], weight_map: dict[str, str]) -> dict[str, str]:
    file_of: dict[str, str] = {}
    for file_name, header in headers.items():
        if not file_of.keys().isdisjoint(header.tensors):
            tensor = next(tensor for tensor in header.tensors if tensor in file_of)
            raise CheckpointError(f"{folder}: {tensor!r} is in two files, {file_of[tensor]} and {file_name}")
        file_of |= dict.fromkeys(header.tensors, file_name)
    if weight_map and weight_map != file_of:
        for tensor, file_name in weight_map.items():
            if file_of.get(tensor) != file_name:
                instead = f"; it is in {file_of[tensor]}" if tensor in file_of else ""
                raise CheckpointError(f"{folder / file_name} lacks {tensor!r}, which the index says it has{instead}")
        extra = sorted(set(file_of) - set(weight_map))
        raise CheckpointError(
            f"{folder / file_of[extra[0]]} has {len(extra)} tensors that the index does not name: {extra[0]!r}"
        )
    if not file_of:
        raise CheckpointError(f"{folder} has .safetensors files and no tensor in them")
    return file_of


def _check_numbers(folder: Path, found: list[str]) -> None:
    """Without an index, the names of the files still tell how many there must be."""
    groups: dict[tuple[str, int], set[int]] = {}
    for name in found:
        if match := _NUMBERED.search(name):
            groups.setdefault((name[: match.start()], int(match[2])), set()).add(int(match[1]))
    for (stem, total), numbers in groups.items():
        absent = sorted(set(range(1, min(total, 99999) + 1)) - numbers)
        if absent and 0 not in numbers:
            raise CheckpointError(
                f"{folder} has {len(numbers)} of {total} files, first missing: "
                f"{stem}-{absent[0]:05d}-of-{total:05d}.safetensors"
            )


def _others(folder: Path, roots: tuple[Path, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    others, left_out = [], []
    for name in _walk(folder, ""):
        if name.endswith(INDEX_SUFFIX) and "/" not in name:
            continue
        if name.endswith((*PICKLE_SUFFIXES, *OTHER_WEIGHTS, ".safetensors", INDEX_SUFFIX)):
            if "/" in name or not name.endswith(".safetensors"):
                left_out.append(name)
        elif name not in (MANIFEST, LOCK) and TEMPORARY not in name:
            _refuse_pointer(confine(folder / name, roots))
            others.append(name)
    return tuple(others), tuple(left_out)


def _refuse_pointer(file: Path) -> None:
    with suppress(OSError), open(file, "rb") as stream:  # what cannot be read is told when it is copied
        if stream.read(len(LFS_START)) == LFS_START:
            raise lfs_pointer(file)


def _walk(folder: Path, prefix: str) -> Iterator[str]:
    for entry in sorted(os.scandir(folder / prefix), key=lambda each: each.name):
        name = prefix + entry.name
        if entry.name.startswith((".", "__pycache__")):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(folder, name + "/")
        elif entry.is_file() or entry.is_symlink():
            yield name
