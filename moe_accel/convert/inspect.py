"""What lies in a checkpoint: the experts of each prefix, how they are stored, the rest, the files. Headers only."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from moe_accel.convert.headers import num_bytes
from moe_accel.convert.layout import load_families
from moe_accel.convert.manifest import other_tensors
from moe_accel.convert.plan import parts
from moe_accel.convert.regions import Part, Tensor
from moe_accel.convert.shards import natural
from moe_accel.convert.source import Checkpoint, open_checkpoint

_ROLE_ORDER = {"gate": "0", "up": "1", "down": "2"}


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of one prefix, layers taken together where they are alike; `*` stands for the layer."""

    prefix: str
    num_layers: int
    num_experts: int
    stored: str
    roles: tuple[str, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Contents:
    """A checkpoint directory, described."""

    checkpoint: Checkpoint
    experts: tuple[Experts, ...]
    dtypes: dict[str, int]
    num_other_tensors: int
    other_bytes: int
    file_bytes: dict[str, int]


def inspect(folder: Path, family: Path | None = None) -> Contents:
    """Describe a checkpoint.

    Raises:
        CheckpointError: it is damaged.
        ConfigError: the family file is wrong.
    """
    checkpoint = open_checkpoint(folder)
    tensors = checkpoint.tensors
    found = list(parts(tensors, load_families(family), checkpoint.model_type))
    by_layer: dict[str, list[Part]] = {}
    for part in found:
        by_layer.setdefault(part.layer, []).append(part)
    alike: dict[tuple, list[int]] = {}
    for layer in sorted(by_layer, key=natural):
        some = by_layer[layer]
        prefix = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer)
        experts = len({part.expert for part in some})
        key = (prefix, experts, _stored(some, tensors), _roles(some, tensors))
        size = sum(_bytes(tensors[name]) for name in {part.region.tensor for part in some})
        alike.setdefault(key, []).append(size)
    experts = tuple(
        Experts(prefix, len(sizes), count, stored, roles, sum(sizes))
        for (prefix, count, stored, roles), sizes in alike.items()
    )
    dtypes = Counter[str]()
    for tensor in tensors.values():
        dtypes[tensor.dtype] += _bytes(tensor)
    others = other_tensors(tensors, found)
    sizes = {name: header.file_bytes for name, header in checkpoint.headers.items()}
    other_bytes = sum(_bytes(each) for each in others)
    return Contents(checkpoint, experts, dict(dtypes.most_common()), len(others), other_bytes, sizes)


def _bytes(tensor: Tensor) -> int:
    return num_bytes(tensor.dtype, tensor.shape)


def _stored(some: list[Part], tensors: dict[str, Tensor]) -> str:
    """How the matrices of one layer lie in their tensors, in words."""
    matrices = [part for part in some if "." not in part.role] or some
    experts_of: dict[str, set[int]] = {}
    roles_of: dict[str, set[str]] = {}
    for part in matrices:
        experts_of.setdefault(part.region.tensor, set()).add(part.expert)
        roles_of.setdefault(part.region.tensor, set()).add(part.role)
    total = len({part.expert for part in matrices})
    words = ["stacked" if total > 1 and any(len(each) > 1 for each in experts_of.values()) else "per expert"]
    if any({"gate", "up"} <= each for each in roles_of.values()):
        words.append("gate and up in one")
    if any(part.region.row_stride == 2 * part.region.cols * part.region.col_stride for part in matrices) or any(
        part.region.row_stride == 2 for part in matrices
    ):
        words.append("interleaved")
    if any(part.region.row_stride < part.region.col_stride for part in matrices if part.region.cols > 1):
        words.append("transposed")
    return ", ".join(words)


def _roles(some: list[Part], tensors: dict[str, Tensor]) -> tuple[str, ...]:
    first = min(part.expert for part in some)
    return tuple(
        f"{part.role} {tensors[part.region.tensor].dtype} [{part.region.rows}, {part.region.cols}]"
        for part in sorted(some, key=lambda each: _ROLE_ORDER.get(each.role, each.role))
        if part.expert == first
    )
