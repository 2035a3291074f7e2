"""The files of a checkpoint directory: found, checked to be whole, opened; nothing is copied into memory.

A save that was cut short leaves an index that names files which are not there, or a file shorter than its header says.
Every function here finds that before a weight of the model is touched, and its CheckpointError names the file.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors import safe_open
from torch.distributed.checkpoint.filesystem import FileSystemReader

from moe_accel.errors import CheckpointError

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
RESUME_HINT = "the save was cut short or the copy is incomplete: copy it again, or resume from an older checkpoint"


def open_weights(folder: str | Path) -> dict[str, Any] | None:
    """The weights of a Hugging Face checkpoint, not read yet: name -> object that `[...]` turns into a tensor.

    Like `from_pretrained`, prefers a single file over an index, and safetensors over pickle.

    Returns:
        None where `folder` holds no model weights at all.

    Raises:
        CheckpointError: a file is missing, cut short, or lacks weights that the index says it has.
    """
    folder = Path(folder)
    for name in SINGLE_FILES:
        if (folder / name).is_file():
            return open_file(folder / name)
    for name in INDEX_FILES:
        if (folder / name).is_file():
            return _open_indexed(folder / name)
    return None


def open_file(file: Path) -> dict[str, Any]:
    """One safetensors or torch file, memory-mapped: name -> object that `[...]` turns into a tensor.

    Raises:
        CheckpointError: the file cannot be read, or is shorter than its header says.
    """
    try:
        if file.suffix == ".safetensors":
            opened = safe_open(file, framework="pt", device="cpu")
            return {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 not a dict
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{file} is damaged or cut short: {_first_line(error)}", RESUME_HINT) from error


def _open_indexed(index_file: Path) -> dict[str, Any]:
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, Mapping):
        raise CheckpointError(f"{index_file} has no weight_map", RESUME_HINT)
    files = sorted(set(weight_map.values()))
    missing = [name for name in files if not (index_file.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index_file} names {len(files)} files, {len(missing)} of them missing: {shorten(missing)}", RESUME_HINT
        )
    opened = {name: open_file(index_file.parent / name) for name in files}
    absent = [weight for weight, name in weight_map.items() if weight not in opened[name]]
    if absent:
        raise CheckpointError(
            f"{index_file.parent / weight_map[absent[0]]} lacks {len(absent)} weights that {index_file.name} "
            f"says it has: {shorten(absent)}",
            RESUME_HINT,
        )
    return {weight: opened[name][weight] for weight, name in weight_map.items()}


def check_sharded(folder: Path) -> set[str]:
    """Check a folder that torch.distributed.checkpoint wrote.

    Returns:
        The names saved in it.

    Raises:
        CheckpointError: the metadata or a file of tensors is missing or shorter than the metadata says.
    """
    try:
        metadata = FileSystemReader(folder).read_metadata()
    except Exception as error:
        raise CheckpointError(f"{folder / '.metadata'} cannot be read: {_first_line(error)}", RESUME_HINT) from error
    needed_bytes: dict[str, int] = {}
    for stored in (metadata.storage_data or {}).values():
        name = stored.relative_path
        needed_bytes[name] = max(needed_bytes.get(name, 0), stored.offset + stored.length)
    for name, needed in sorted(needed_bytes.items()):
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, its metadata names {len(needed_bytes)} files", RESUME_HINT)
        if file.stat().st_size < needed:
            raise CheckpointError(f"{file} has {file.stat().st_size} of {needed} bytes", RESUME_HINT)
    return set(metadata.state_dict_metadata)


def fsdp_path(folder: Path, stem: str, index: int, full: bool) -> Path:
    """Where accelerate puts the state of model or optimizer number `index`: one torch file, or a folder of shards."""
    if not full:
        return folder / f"{stem}_{index}"
    return folder / (f"{stem}.bin" if index == 0 else f"{stem}_{index}.bin")


def has_fsdp_model(folder: Path) -> bool:
    """Whether accelerate saved a model under FSDP in `folder`, in either state dict type."""
    return (folder / f"{FSDP_MODEL_NAME}.bin").is_file() or any(
        each.is_dir() and FSDP_MODEL_NAME in each.name for each in folder.iterdir()
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is cut short or holds something else.
    """
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged or cut short: {_first_line(error)}", RESUME_HINT) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not {type(loaded).__name__}", RESUME_HINT)
    return loaded


def shorten(names: Iterable[str], shown: int = 4) -> str:
    """The first `shown` names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
