"""An adapter directory as it lies on disk: adapter_config.json, one safetensors file, and what lies beside them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_accel.adapters.config import CONFIG, WEIGHTS, AdapterConfig, read_config
from moe_accel.convert.copy import UNSIGNED
from moe_accel.convert.headers import DTYPE_BITS, Header, num_bytes, read_header
from moe_accel.convert.regions import Tensor
from moe_accel.convert.source import LOCK, MANIFEST, PICKLE_SUFFIXES, TEMPORARY, allowed_roots, confine
from moe_accel.errors import CheckpointError

FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Adapter:
    """A directory with one adapter. `others` are files to take along, by name."""

    folder: Path
    config: AdapterConfig
    header: Header
    others: tuple[str, ...]

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor by name."""
        return self.header.tensors

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """The bits of a tensor as unsigned integers, in its shape.

        Raises:
            CheckpointError: the file cannot be read, or is shorter than it was.
        """
        tensor = self.tensors[name]
        size = num_bytes(tensor.dtype, tensor.shape)
        try:
            with open(self.header.file, "rb") as stream:
                stream.seek(self.header.starts[name])
                data = stream.read(size)
        except OSError as error:
            raise CheckpointError(f"{self.header.file} cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise CheckpointError(
                f"{self.header.file} changed while it was read: {name} has {len(data)} of {size} bytes"
            )
        return np.frombuffer(data, UNSIGNED[DTYPE_BITS[tensor.dtype] // 8]).reshape(tensor.shape)


def is_adapter(folder: Path) -> bool:
    """Whether a directory holds an adapter rather than a model."""
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    models = [name for name in names if name.endswith(".safetensors") and not name.startswith("adapter")]
    return not models and any(name == CONFIG or name.startswith("adapter_model.") for name in names)


def open_adapter(folder: Path) -> Adapter:
    """Read config and header of an adapter.

    Raises:
        CheckpointError: it is no adapter, incomplete or damaged, or its weights are pickles.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a directory")
    config, roots = read_config(folder), allowed_roots(folder)
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    if WEIGHTS not in names:
        pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
        if pickles:
            raise CheckpointError(
                f"{folder} holds its adapter as pickle ({pickles[0]}), which can run code when it is read",
                "load it with PEFT and save it again: save_pretrained writes safetensors",
            )
        raise CheckpointError(f"{folder} has no {WEIGHTS}", "PEFT's save_pretrained writes it")
    header = read_header(confine(folder / WEIGHTS, roots))
    if not header.tensors:
        raise CheckpointError(f"{header.file} has no tensors")
    for tensor in header.tensors.values():
        if ".lora_" in tensor.name and tensor.dtype not in FLOATS:
            raise CheckpointError(f"{header.file}: {tensor.described}: a LoRA factor is one of {', '.join(FLOATS)}")
    left = (CONFIG, WEIGHTS, LOCK, MANIFEST)
    others = [
        name
        for name in names
        if name not in left and TEMPORARY not in name and not name.endswith(PICKLE_SUFFIXES) and name[0] != "."
    ]
    for name in others:
        confine(folder / name, roots)
    return Adapter(folder, config, header, tuple(others))
