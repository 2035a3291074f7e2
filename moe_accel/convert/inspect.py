"""What lies in a checkpoint: the experts of each prefix, how they are stored, the rest, the files. Headers only."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_accel.convert.detect import STACKED, Group, detect
from moe_accel.convert.headers import num_bytes
from moe_accel.convert.layout import Families, load_families
from moe_accel.convert.pieces import Piece, Pieces, Refused, pieces
from moe_accel.convert.regions import Tensor
from moe_accel.convert.shards import natural
from moe_accel.convert.source import Checkpoint, open_checkpoint

_ROLES = ("gate", "up", "down")


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
    tensors, families = checkpoint.tensors, load_families(family)
    alike: dict[tuple, list[int]] = {}
    of_experts: set[str] = set()
    for group in sorted(detect(tensors, families, checkpoint.model_type), key=lambda each: natural(each.layer)):
        prefix = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", group.layer)
        names = {tensor.name for tensor in group.tensors()}
        size = sum(_bytes(tensors[name]) for name in names)
        alike.setdefault((prefix, group.num_experts, *_described(group, families)), []).append(size)
        of_experts |= names
    experts = tuple(
        Experts(prefix, len(sizes), count, stored, roles, sum(sizes))
        for (prefix, count, stored, roles), sizes in alike.items()
    )
    dtypes = Counter[str]()
    for tensor in tensors.values():
        dtypes[tensor.dtype] += _bytes(tensor)
    others = [tensor for name, tensor in tensors.items() if name not in of_experts]
    sizes = {name: header.file_bytes for name, header in checkpoint.headers.items()}
    other_bytes = sum(_bytes(each) for each in others)
    return Contents(checkpoint, experts, dict(dtypes.most_common()), len(others), other_bytes, sizes)


def _bytes(tensor: Tensor) -> int:
    return num_bytes(tensor.dtype, tensor.shape)


def _described(group: Group, families: Families) -> tuple[str, tuple[str, ...]]:
    """How the experts of one layer are stored, and what each has, in words."""
    try:
        found = pieces(group, families)
    except Refused as reason:
        return f"{_of_layout(group)}, cannot move: {reason}", tuple(_as_named(group))
    return _stored(found, group), _roles(found)


def _of_layout(group: Group) -> str:
    return "per expert" if any(slot.per_expert for slot in group.layout.slots) else "stacked"


def _as_named(group: Group) -> Iterator[str]:
    """What the tensors of the first expert are called, or those of all, where nobody takes them apart."""
    for (slot, suffix, _), of in sorted(group.members.items(), key=lambda each: (_order(each[0][0].roles), each[0][1])):
        tensor = of.get(STACKED) or next(iter(of.values()))
        role = "_".join(group.roles(slot))
        yield f"{role}.{suffix} {tensor.dtype} {list(tensor.shape)}" if suffix else f"{role} {tensor.dtype}"


def _stored(found: Pieces, group: Group) -> str:
    """How the matrices of one layer lie in their tensors, in words."""
    weights = {role: of for (role, suffix), of in found.items() if not suffix}
    packed = {role: of for (role, suffix), of in found.items() if suffix and next(iter(of.values())).form == "packed"}
    matrices = [(role, piece) for role, of in (weights or packed).items() for piece in of.values()]
    roles_of: dict[str, set[str]] = {}
    for role, piece in matrices:
        roles_of.setdefault(piece.region.tensor, set()).add(role)
    words = [_of_layout(group)]
    regions = [piece.region for _, piece in matrices]
    if any({"gate", "up"} <= each for each in roles_of.values()):
        words.append("gate and up in one")
        if group.layout.order == "interleaved":
            words.append("interleaved")
    if any(each.row_stride < each.col_stride for each in regions if each.cols > 1):
        words.append("transposed")
    return ", ".join(words)


def _roles(found: Pieces) -> tuple[str, ...]:
    """What an expert has, role by role; twice where experts are of two sizes."""

    def kind(piece: Piece) -> str:
        return f"{piece.dtype} {list(piece.shape)}"

    by_role = sorted(found.items(), key=lambda each: (_order((each[0][0],)), each[0][1]))
    return tuple(
        f"{role}.{suffix} {shape}" if suffix else f"{role} {shape}"
        for (role, suffix), of in by_role
        for shape in dict.fromkeys(map(kind, of.values()))
    )


def _order(roles: tuple[str, ...]) -> int:
    return _ROLES.index(roles[0])
