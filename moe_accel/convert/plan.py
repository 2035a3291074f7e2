"""From safetensors headers to a plan: which strided copies turn one layout of the experts into another.

Any layout to any other is one step: every matrix of every expert is located in the source (`pieces`), then in the
target (`_write`). What
cannot be exact is refused with its reason; what is no expert passes through untouched.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from moe_accel.convert.detect import PACKED, STACKED, Group, chunks, detect
from moe_accel.convert.layout import TARGETS, ExpertLayout, Families, Family, Slot
from moe_accel.convert.regions import Copy, Layout, Output, Part, Plan, Region, Tensor
from moe_accel.errors import CheckpointError

_BLOCKS = (128, 32, 16, 64, 256, 512)  # rows of a scale's block, the usual ones first
_SUB_BYTE = frozenset({"F4", "F6_E2M3", "F6_E3M2"})


@dataclass(frozen=True, slots=True)
class Piece:
    """One matrix where it lies. `form`: how a file of its own would hold it: `matrix`, `vector`, `one` ([1]) or
    `number` ([])."""

    region: Region
    dtype: str
    form: str

    @property
    def shape(self) -> tuple[int, ...]:
        """As a tensor of its own."""
        rows, cols = self.region.rows, self.region.cols
        return {"matrix": (rows, cols), "vector": (rows,), "one": (1,), "number": ()}[self.form]


class _Refused(Exception):
    """Why a group cannot be written exactly."""


def make_plan(
    tensors: Mapping[str, Tensor],
    target: str,
    families: Families,
    model_type: str | None = None,
    num_experts: int | None = None,
) -> Plan:
    """What to write so that the experts of a checkpoint come in the layout `target`.

    Args:
        tensors: every tensor of the checkpoint, by name.
        target: one of `TARGETS`: `stacked` is what transformers holds in memory, `hub` what the family publishes.
        families: from `load_families`.
        model_type: from config.json; decides between families that names and shapes cannot tell apart.
        num_experts: from config.json, to be compared with what is found.

    Raises:
        CheckpointError: no experts, damaged or undecidable ones, or a target that cannot be exact.
    """
    if target not in TARGETS:
        raise CheckpointError(f"no layout is called {target!r}", f"--to takes {', '.join(TARGETS)}")
    groups = detect(tensors, families, model_type, num_experts)
    if not groups:
        raise CheckpointError(
            f"no experts found among {len(tensors)} tensors",
            "--family FILE describes a layout of your own: converters/README.md",
        )
    outputs: dict[str, Output] = {}
    consumed: dict[str, tuple[Output, ...]] = {}
    refused, notes, moved = [], [], {}
    layouts: dict[tuple[str, str, str, int], int] = {}
    for group in groups:
        family, to = _target(group, target, families, model_type, notes)
        if to is None:
            refused.append(_refusal(group, family, target))
            continue
        key = (group.prefix, group.layout.name, to.name, group.num_experts)
        layouts[key] = layouts.get(key, 0) + 1
        moved.update(_moves(group, family, to, tensors))
        if to is group.layout:
            notes.append(f"{group.prefix}: already {target} ({family.name} {to.name}); left as it is")
            continue
        try:
            written = tuple(_write(group, to, pieces(group, families), families))
        except _Refused as reason:
            refused.append(f"{group.moe} to {target}: {reason}")
            continue
        notes += [f"{group.prefix}: {to.note}"] if to.note else []
        names = [tensor.name for tensor in group.tensors()]
        consumed.update(dict.fromkeys(names, ()))
        consumed[names[0]] = written
    if refused:
        raise CheckpointError(
            "cannot be converted exactly:\n" + "\n".join(f"  - {one}" for one in _unique(refused)[:10])
        )
    passed = []
    for name, tensor in tensors.items():
        if name not in consumed:
            passed.append(name)
        for output in consumed.get(name, (_whole(tensor, moved.get(name, name)),)):
            if output.name in outputs:
                raise CheckpointError(f"two tensors would be written as {output.name}: the checkpoint already has one")
            outputs[output.name] = output
    notes += [
        f"{len(moved)} tensors beside the experts are renamed with them, {old} to {new}"
        for old, new in list(moved.items())[:1]
    ]
    found = tuple(Layout(*key[:3], num_experts=key[3], num_layers=count) for key, count in layouts.items())
    return Plan(tuple(outputs.values()), found, tuple(passed), tuple(_unique(notes)))


def parts(tensors: Mapping[str, Tensor], families: Families, model_type: str | None = None) -> Iterator[Part]:
    """Every matrix of every expert under a name that does not depend on the layout.

    Tensors that are renamed with the experts come too, as expert -1. Tensors that no part names (packed formats,
    everything that is no
    expert) are the same in all layouts and are compared by name.

    Raises:
        CheckpointError: damaged or undecidable experts.
    """
    for group in detect(tensors, families, model_type):
        try:
            found = pieces(group, families)
        except _Refused:
            continue
        for (role, suffix), of in found.items():
            for expert, piece in of.items():
                yield Part(group.layer, expert, f"{role}.{suffix}" if suffix else role, piece.region)
        for move in group.family.moves:
            for name in dict.fromkeys(_moved_names(group, move)):
                if name in tensors:
                    yield Part(group.layer, -1, next(iter(move.values())), _flat(tensors[name]))
                    break


def _moved_names(group: Group, move: Mapping[str, str]) -> Iterator[str]:
    """What a tensor beside the experts may be called."""
    for layout, pattern in move.items():
        for block in group.family.layouts[layout].blocks or (group.block,):
            yield _name(pattern, group.layer, block)


def _target(
    group: Group, target: str, families: Families, model_type: str | None, notes: list[str]
) -> tuple[Family, ExpertLayout | None]:
    """The family that gives the names, and its layout; None where the family has no such layout."""
    family = group.family
    if not family.user and model_type not in family.model_types:
        named = families.of(model_type)
        if named is not None and _same_roles(group, named):
            family = named
        elif target not in families.targets:
            notes.append(
                f"{group.prefix}: taken for {family.name} ({family.about}), as model_type {model_type!r} names no family"  # noqa: E501
            )
    if target in families.targets:
        return family, families.targets[target]
    if target == "hub":
        return family, family.layouts[family.hub]
    return family, None if target in (family.refuse or {}) else family.layouts.get(target)


def _same_roles(group: Group, family: Family) -> bool:
    return any(("gate" in layout.roles) == group.gated for layout in family.layouts.values())


def _refusal(group: Group, family: Family, target: str) -> str:
    reason = (family.refuse or {}).get(target)
    return f"{group.prefix} to {target}: " + (
        reason or f"the family {family.name} has no such layout, only {', '.join(family.layouts)}"
    )


def _name(pattern: str, layer: str, block: str, expert: int | None = None, branch: str = "") -> str:
    name = (
        pattern.replace("{moe}", f"{layer}.{block}" if block else layer)
        .replace("{layer}", layer)
        .replace("{branch}", branch)
    )
    return name if expert is None else name.replace("{e}", str(expert))


def _block(group: Group, to: ExpertLayout) -> str:
    return group.block if to.blocks is None or group.block in to.blocks else to.blocks[0]


def _moves(group: Group, family: Family, to: ExpertLayout, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Old and new name of tensors beside the experts."""
    for move in family.moves:
        if group.layout.name in move and to.name in move and family is group.family:
            old = _name(move[group.layout.name], group.layer, group.block)
            new = _name(move[to.name], group.layer, _block(group, to))
            if old in tensors and old != new:
                yield old, new


def _at(
    layout: ExpertLayout, slot: Slot, roles: tuple[str, ...], role: str, rows: int, cols: int, start: int, vector: bool
) -> tuple[int, int, int]:
    """Offset, row stride and column stride of one role's matrix in a tensor whose expert begins at `start`."""
    index, num = roles.index(role), len(roles)
    if num > 1 and layout.order == "up-gate":
        index = num - 1 - index
    interleaved = num > 1 and layout.order == "interleaved"
    if role in layout.transposed and not vector:
        return (start + index, num, num * rows) if interleaved else (start + index * rows, 1, num * rows)
    return (start + index * cols, num * cols, 1) if interleaved else (start + index * rows * cols, cols, 1)


def pieces(group: Group, families: Families) -> dict[tuple[str, str], dict[int, Piece]]:
    """Where the source holds every matrix, by (role, suffix) and expert."""
    found: dict[tuple[str, str], dict[int, Piece]] = {}
    fixed = next(
        (suffix for _, suffix, _ in group.members if suffix and families.companions[suffix].rule == "fixed"), None
    )
    if fixed is not None:
        raise _Refused(f"{fixed}: {families.companions[fixed].reason}")
    starts = chunks(group)
    for (slot, suffix, branch), of in sorted(group.members.items(), key=lambda item: item[0][0].roles != ("down",)):
        roles = group.roles(slot)
        for expert, tensor in sorted(of.items()):
            stacked = expert == STACKED
            count = (group.num_experts if group.layout.flat else tensor.shape[0]) if stacked else 1
            tail = (
                tensor.shape
                if not stacked
                else (tensor.shape[0] // count, *tensor.shape[1:])
                if group.layout.flat
                else tensor.shape[1:]
            )
            rows, cols, form = _tail(group, slot, roles, suffix, tail, tensor, found)
            for local in range(count):
                start = local * len(roles) * rows * cols
                for role in roles:
                    offset, down, right = _at(group.layout, slot, roles, role, rows, cols, start, form != "matrix")
                    region = Region(tensor.name, offset, rows, cols, down, right)
                    found.setdefault((role, suffix), {})[starts[branch] + local if stacked else expert] = Piece(
                        region, tensor.dtype, form
                    )
    return found


def _tail(group, slot, roles, suffix, tail, tensor, found) -> tuple[int, int, str]:
    """Rows, columns and form of one role's part of a tensor of shape `tail`."""
    num = len(roles)
    if len(tail) > 2:
        raise _Refused(f"{tensor.name} {list(tensor.shape)} has more dimensions than a matrix")
    if not tail:
        if num > 1:
            raise _Refused(f"{tensor.name} is one number for gate and up together")
        return 1, 1, "number"
    rows, cols = (tail[0], 1) if len(tail) == 1 else reversed(tail) if roles[-1] in group.layout.transposed else tail
    if rows % num:
        raise _Refused(f"{tensor.name} {list(tensor.shape)} holds one scale for gate and up together")
    rows //= num
    if len(tail) == 2:
        return rows, cols, "matrix"
    if suffix and suffix != "bias" and rows == 1:
        of_down = next(iter(found.get(("down", suffix), {}).values()), None)
        return 1, 1, "one" if num == 1 or (of_down is not None and of_down.form == "one") else "number"
    return rows, cols, "vector"


def _write(
    group: Group, to: ExpertLayout, found: dict[tuple[str, str], dict[int, Piece]], families: Families
) -> Iterator[Output]:
    """The tensors of the target, each with its copies."""
    for slot in to.slots:
        roles = tuple(role for role in slot.roles if (role, "") in found)
        if not roles:
            raise _Refused(f"{to.name} keeps {' and '.join(slot.roles)}, which these experts do not have")
        if len(roles) < len(slot.roles) and (to.order == "interleaved" or to.blocks is not None):
            raise _Refused(f"{to.name} needs a gate, and these experts have none")
        for suffix in dict.fromkeys(suffix for role, suffix in found if role in roles):
            of = [found.get((role, suffix), {}) for role in roles]
            _exact(group, to, slot, roles, suffix, of, found)
            block = _block(group, to)
            pattern = to.companion(slot, suffix)
            if slot.per_expert:
                for expert in sorted(of[0]):
                    yield _output(
                        _name(pattern, group.layer, block, expert),
                        to,
                        slot,
                        roles,
                        [[one[expert] for one in of]],
                        stacked=False,
                    )
                continue
            ends = chunks(group) if to.branches else [0, group.num_experts]
            for branch, (low, high) in enumerate(pairwise(ends)):
                rows = [[one[expert] for one in of] for expert in range(low, high) if expert in of[0]]
                other = next((one[0] for one in rows if one[0].shape != rows[0][0].shape), None)
                if other is not None:
                    sizes = f"{list(rows[0][0].shape)} and {list(other.shape)}"
                    raise _Refused(
                        f"experts of different sizes, {sizes}, cannot share one tensor; --to te-grouped or per-expert can"  # noqa: E501
                    )
                name = _name(pattern, group.layer, block, branch=to.branches[branch] if to.branches else "")
                yield _output(name, to, slot, roles, rows, stacked=True)
    extra = sorted({role for role, _ in found} - set(to.roles))
    if extra:
        raise _Refused(f"{to.name} has no place for {' and '.join(extra)}")


def _output(
    name: str, to: ExpertLayout, slot: Slot, roles: tuple[str, ...], experts: list[list[Piece]], stacked: bool
) -> Output:
    first, num = experts[0][0], len(roles)
    rows, cols, copies = first.region.rows, first.region.cols, []
    for local, of in enumerate(experts):
        for role, piece in zip(roles, of, strict=True):
            at = _at(to, slot, roles, role, rows, cols, local * num * rows * cols, first.form != "matrix")
            copies.append(Copy(piece.region, Region(name, at[0], rows, cols, at[1], at[2])))
    if first.form == "matrix":
        shape: tuple[int, ...] = (cols, num * rows) if slot.roles[-1] in to.transposed else (num * rows, cols)
    else:
        shape = (num * rows,) if num > 1 or first.form != "number" else ()
    if to.flat:
        shape = (len(experts) * max(shape[:1]), *shape[1:])
    elif stacked:
        shape = (len(experts), *shape)
    return Output(name, first.dtype, shape, tuple(copies))


def _exact(group, to, slot, roles, suffix, of, found) -> None:
    """Refuses what would need arithmetic, or would no longer mean the same."""
    if any(one.keys() != of[0].keys() for one in of):
        raise _Refused(f"{suffix or 'weight'} of {' and '.join(roles)} is not there for the same experts")
    one = next(iter(of[0].values()))
    for other in (next(iter(more.values())) for more in of[1:]):
        if (other.dtype, other.shape) != (one.dtype, one.shape):
            raise _Refused(
                f"{one.region.tensor} {one.dtype} {list(one.shape)} and {other.region.tensor} {other.dtype} {list(other.shape)} differ"  # noqa: E501
            )
    if to.flat and (suffix or one.form != "matrix"):
        raise _Refused(f"{to.name} of {to.family} has no place for {suffix}")
    if one.dtype in _SUB_BYTE:
        raise _Refused(f"{one.region.tensor} is {one.dtype}, whose numbers are no whole bytes")
    role = roles[-1]
    turned = (role in to.transposed) != (role in group.layout.transposed)
    if turned and not suffix and one.dtype in PACKED:
        raise _Refused(f"{one.region.tensor} is {one.dtype}, packed numbers that cannot be turned without unpacking")
    source = next(s for s in group.layout.slots if role in s.roles)
    shared = len(roles) > 1 or len(group.roles(source)) > 1
    if not suffix or suffix == "bias" or not shared or one.form == "number":
        return
    weight = next(iter(found[role, ""].values())).region.rows if (role, "") in found else one.region.rows
    rows = one.region.rows
    if rows == weight or (rows == 1 and one.form == "one"):
        return
    size = next((size for size in _BLOCKS if math.ceil(weight / size) == rows), None)
    if size is None or weight % size:
        raise _Refused(
            f"{suffix}: gate and up have {weight} rows and {rows} rows of scales, so blocks of {size or 'no usual size'} would "  # noqa: E501
            f"span both; {weight} must be divisible by {size or 128}"
        )
    if "interleaved" in (
        to.order if len(roles) > 1 else "",
        group.layout.order if len(group.roles(source)) > 1 else "",
    ):
        raise _Refused(f"{suffix}: a scale for {size} rows cannot be interleaved row by row")


def _whole(tensor: Tensor, name: str) -> Output:
    region = _flat(tensor)
    target = Region(name, 0, 1, region.cols, region.cols, 1)
    return Output(name, tensor.dtype, tensor.shape, (Copy(region, target),) if region.cols else ())


def _flat(tensor: Tensor) -> Region:
    size = math.prod(tensor.shape)
    return Region(tensor.name, 0, 1, size, size, 1)


def _unique(items: list[str]) -> list[str]:
    return list(dict.fromkeys(items))
