"""Where a checkpoint holds every matrix of every expert: strided regions, by role, by what travels with it, by expert.

What is equal for all experts of a layer is found once: a loop over experts only makes their regions.
"""

import math
from typing import NamedTuple

from moe_accel.convert.detect import STACKED, Group, chunks
from moe_accel.convert.layout import ExpertLayout, Families, Slot
from moe_accel.convert.regions import Region, Tensor


class Piece(NamedTuple):
    """One matrix where it lies.

    `form`: how a file of its own would hold it, `matrix`, `vector`, `one` ([1]), `number` ([]) or `packed` (rows of
    whatever dimensions, never turned); `shape`: as what.
    """

    region: Region
    dtype: str
    form: str
    shape: tuple[int, ...]


At = tuple[int, int, int]  # offset, row stride and column stride
Pieces = dict[tuple[str, str], dict[int, Piece]]  # by (role, suffix) and expert


class _Inside(NamedTuple):
    """How the matrices of `num` experts lie in tensors of one kind and shape, `size` elements an expert.

    `ats`: by role, the pieces found so far, then offset, row stride and column stride of the first expert.
    """

    num: int
    size: int
    rows: int
    cols: int
    form: str
    shape: tuple[int, ...]
    ats: list[tuple[dict[int, Piece], int, int, int]]


class Refused(Exception):
    """Why a group cannot be written exactly."""


def placed(layout: ExpertLayout, roles: tuple[str, ...], role: str, rows: int, cols: int, form: str) -> At:
    """Where one role's matrix lies in the tensor of its expert."""
    index, num = roles.index(role), len(roles)
    if num > 1 and layout.order == "up-gate":
        index = num - 1 - index
    interleaved = num > 1 and layout.order == "interleaved"
    if role in layout.transposed and form == "matrix":
        return (index, num, num * rows) if interleaved else (index * rows, 1, num * rows)
    return (index * cols, num * cols, 1) if interleaved else (index * rows * cols, cols, 1)


def pieces(group: Group, families: Families) -> Pieces:
    """Where the source holds every matrix.

    Raises:
        Refused: something cannot be taken apart exactly.
    """
    found: Pieces = {}
    rules = {suffix: families.companions[suffix].rule for _, suffix, _ in group.members if suffix}
    for suffix, rule in rules.items():
        if rule == "fixed":
            raise Refused(f"{suffix}: {families.companions[suffix].reason}")
    starts = chunks(group)
    for (slot, suffix, branch), of in sorted(group.members.items(), key=lambda item: item[0][0].roles != ("down",)):
        roles, stacked = group.roles(slot), STACKED in of
        known: dict[tuple[int, ...], _Inside] = {}
        for expert in sorted(of):
            name, dtype, shape = of[expert]
            if shape not in known:
                known[shape] = _inside(group, slot, roles, suffix, rules.get(suffix) == "packed", of[expert], found)
            num, size, rows, cols, form, alone, ats = known[shape]
            first = starts[branch] if stacked else expert
            for role_pieces, offset, down, right in ats:
                for local in range(num):
                    region = Region(name, offset + local * size, rows, cols, down, right)
                    role_pieces[first + local] = Piece(region, dtype, form, alone)
    return found


def _inside(
    group: Group, slot: Slot, roles: tuple[str, ...], suffix: str, packed: bool, tensor: Tensor, found: Pieces
) -> _Inside:
    """How the matrices lie in `tensor`, and in every other of its kind and shape."""
    shape, flat = tensor.shape, group.layout.flat
    num = 1 if slot.per_expert else group.num_experts if flat else shape[0]
    tail = shape if slot.per_expert else (shape[0] // num, *shape[1:]) if flat else shape[1:]
    if packed:
        if not tail or tail[0] % len(roles):
            raise Refused(f"{tensor.described} has no row for each output of {' and '.join(roles)}")
        rows, cols, form = tail[0] // len(roles), math.prod(tail[1:]), "packed"
    else:
        rows, cols, form = _tail(group, slot, roles, suffix, tail, tensor, found)
    shapes = {"matrix": (rows, cols), "vector": (rows,), "one": (1,), "number": (), "packed": (rows, *tail[1:])}
    alone = shapes[form]
    ats = [
        (found.setdefault((role, suffix), {}), *placed(group.layout, roles, role, rows, cols, form))
        for role in (roles if num else ())
    ]
    return _Inside(num, len(roles) * rows * cols, rows, cols, form, alone, ats)


def _tail(group, slot, roles, suffix, tail, tensor, found) -> tuple[int, int, str]:
    """Rows, columns and form of one role's part of a tensor of shape `tail`."""
    num = len(roles)
    if len(tail) > 2:
        raise Refused(f"{tensor.name} {list(tensor.shape)} has more dimensions than a matrix")
    if not tail:
        if num > 1:
            raise Refused(f"{tensor.name} is one number for gate and up together")
        return 1, 1, "number"
    rows, cols = (tail[0], 1) if len(tail) == 1 else reversed(tail) if roles[-1] in group.layout.transposed else tail
    if rows % num:
        raise Refused(f"{tensor.name} {list(tensor.shape)} holds one scale for gate and up together")
    rows //= num
    if len(tail) == 2:
        return rows, cols, "matrix"
    if suffix and suffix != "bias" and rows == 1:
        of_down = next(iter(found.get(("down", suffix), {}).values()), None)
        return 1, 1, "one" if num == 1 or (of_down is not None and of_down.form == "one") else "number"
    return rows, cols, "vector"
