"""From safetensors headers to a plan: which strided copies turn one layout of the experts into another.

Any layout to any other is one step: every matrix of every expert is located in the source (`pieces`), then in the
target (`_write`). What cannot be exact is refused with its reason; what is no expert passes through untouched. What is
equal for all experts of a layer is found once: a loop over experts only makes their regions.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, count, pairwise

from moe_accel.convert.detect import PACKED, Group, chunks, detect
from moe_accel.convert.layout import TARGETS, ExpertLayout, Families, Family, Slot
from moe_accel.convert.pieces import At, Piece, Pieces, Refused, pieces, placed
from moe_accel.convert.quantized import USUAL_BLOCKS
from moe_accel.convert.regions import BESIDE, Copy, Layout, Output, Part, Plan, Region, Tensor, whole, whole_output
from moe_accel.errors import CheckpointError

_DO = {True: "do", False: "do not"}
_SUB_BYTE = frozenset({"F4", "F6_E2M3", "F6_E3M2"})


def make_plan(
    tensors: Mapping[str, Tensor],
    target: str,
    families: Families,
    model_type: str | None = None,
    num_experts: int | None = None,
    scale_rows: int | None = None,
) -> Plan:
    """What to write so that the experts of a checkpoint come in the layout `target`.

    Args:
        tensors: every tensor of the checkpoint, by name.
        target: one of `TARGETS`: `stacked` is what transformers holds in memory, `hub` what the family publishes.
        families: from `load_families`.
        model_type: from config.json; decides between families that names and shapes cannot tell apart.
        num_experts: the largest number in config.json, which what is found must reach.
        scale_rows: rows of a scale's block, from config.json; None: inferred from shapes.

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
    refused, notes, moved, stems = [], [], {}, set()
    layouts: dict[tuple[str, str, str, int], int] = {}
    for group in groups:
        family, to = _target(group, target, families, model_type, notes)
        if to is None:
            refused.append(_refusal(group, family, target))
            continue
        key = (group.prefix, group.layout.name, to.name, group.num_experts)
        layouts[key] = layouts.get(key, 0) + 1
        if to is group.layout:
            notes.append(f"{group.prefix}: already {target} ({family.name} {to.name}); left as it is")
            continue
        moved.update(_moves(group, family, to, tensors))
        try:
            written = tuple(_write(group, to, pieces(group, families), scale_rows))
        except Refused as reason:
            refused.append(f"{group.moe} to {target}: {reason}")
            continue
        notes += [f"{group.prefix}: {to.note}"] if to.note else []
        names = [tensor.name for tensor in group.tensors()]
        stems.update(name.removesuffix(".weight") for name in names)
        consumed.update(dict.fromkeys(names, ()))
        consumed[names[0]] = written
    refused += _strays(tensors, consumed, stems)
    if refused:
        said = "\n".join(f"  - {one}" for one in _unique(refused)[:10])
        raise CheckpointError(f"cannot be converted exactly:\n{said}")
    passed = []
    for name, tensor in tensors.items():
        written = consumed.get(name)
        if written is None:
            passed.append(name)
            written = (whole_output(tensor, moved.get(name, name)),)
        for output in written:
            if output.name in outputs:
                raise CheckpointError(f"two tensors would be written as {output.name}: the checkpoint already has one")
            outputs[output.name] = output
    for old, new in list(moved.items())[:1]:
        notes.append(f"{len(moved)} tensors beside the experts are renamed with them, {old} to {new}")
    found = tuple(Layout(*key[:3], num_experts=key[3], num_layers=count) for key, count in layouts.items())
    return Plan(tuple(outputs.values()), found, tuple(passed), tuple(_unique(notes)))


def parts(tensors: Mapping[str, Tensor], families: Families, model_type: str | None = None) -> Iterator[Part]:
    """Every matrix of every expert under a name that does not depend on the layout.

    Tensors that are renamed with the experts come too, as expert `BESIDE`. Tensors that no part names (packed formats,
    everything that is no expert) are the same in all layouts and are compared by name.

    Raises:
        CheckpointError: damaged or undecidable experts.
    """
    for group in detect(tensors, families, model_type):
        try:
            found = pieces(group, families)
        except Refused:
            continue
        for (role, suffix), of in found.items():
            layer, name = group.layer, f"{role}.{suffix}" if suffix else role
            for expert, piece in of.items():
                yield Part(layer, expert, name, piece.region)
        for move in group.family.moves:
            for name in dict.fromkeys(_moved_names(group, move)):
                if name in tensors:
                    yield Part(group.layer, BESIDE, next(iter(move.values())).partition("}.")[2], whole(tensors[name]))
                    break


def aliases(tensors: Mapping[str, Tensor], families: Families, model_type: str | None = None) -> dict[str, str]:
    """Names that tensors beside the experts have in the family's other layouts -> what they are called here."""
    found = {}
    for group in detect(tensors, families, model_type):
        for move in group.family.moves:
            names = list(_moved_names(group, move))
            here = next((name for name in names if name in tensors), None)
            found |= {name: here for name in names if here is not None and name != here}
    return found


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
            said = f"model_type {model_type!r} names no family" if model_type else "there is no model_type"
            notes.append(f"{group.prefix}: taken for {family.name} ({family.about}), as {said}")
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


def _name(pattern: str, layer: str, block: str, branch: str = "") -> str:
    moe = f"{layer}.{block}" if block else layer
    return pattern.replace("{moe}", moe).replace("{layer}", layer).replace("{branch}", branch)


def _block(group: Group, to: ExpertLayout) -> str:
    return group.block if to.blocks is None or group.block in to.blocks else to.blocks[0]


def _moves(group: Group, family: Family, to: ExpertLayout, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Old and new name of tensors beside the experts. Other tools' layouts leave them what they are called."""
    for move in family.moves:
        if to.name in move and family is group.family:
            new = _name(move[to.name], group.layer, _block(group, to))
            old = next((name for name in _moved_names(group, move) if name in tensors), new)
            if old != new:
                yield old, new


def _write(group: Group, to: ExpertLayout, found: Pieces, scale_rows: int | None) -> Iterator[Output]:
    """The tensors of the target, each with its copies."""
    biased = any(suffix == "bias" for _, suffix in found)
    if to.biased is not None and biased != to.biased:
        raise Refused(f"{to.family} {to.name} has {'' if to.biased else 'no '}biases, these experts {_DO[biased]}")
    for slot in to.slots:
        roles = tuple(role for role in slot.roles if any(role == other for other, _ in found))
        if not roles:
            raise Refused(f"{to.name} keeps {' and '.join(slot.roles)}, which these experts do not have")
        if len(roles) < len(slot.roles) and (to.order == "interleaved" or to.blocks is not None):
            raise Refused(f"{to.name} needs a gate, and these experts have none")
        for suffix in dict.fromkeys(suffix for role, suffix in found if role in roles):
            of = [found.get((role, suffix), {}) for role in roles]
            _exact(group, to, slot, roles, suffix, of, found, scale_rows)
            block, pattern = _block(group, to), to.companion(slot, suffix)
            if slot.per_expert:
                name = _name(pattern, group.layer, block)
                alone = ((name.replace("{e}", str(expert)), [(one[expert],) for one in of]) for expert in sorted(of[0]))
                yield from _outputs(to, slot, roles, alone)
                continue
            ends = chunks(group) if to.branches else [0, group.num_experts]
            for branch, (low, high) in enumerate(pairwise(ends)):
                experts = [expert for expert in range(low, high) if expert in of[0]]
                by_role = [[one[expert] for expert in experts] for one in of]
                shapes = list(dict.fromkeys(piece.shape for piece in by_role[0]))
                if len(shapes) > 1:
                    sizes = f"{list(shapes[0])} and {list(shapes[1])}"
                    raise Refused(
                        f"experts of different sizes, {sizes}, cannot share one tensor; --to te-grouped or per-expert can"  # noqa: E501
                    )
                name = _name(pattern, group.layer, block, branch=to.branches[branch] if to.branches else "")
                yield from _outputs(to, slot, roles, [(name, by_role)])
    extra = sorted({role for role, _ in found} - set(to.roles))
    if extra:
        raise Refused(f"{to.name} has no place for {' and '.join(extra)}")


def _outputs(
    to: ExpertLayout, slot: Slot, roles: tuple[str, ...], tensors: Iterable[tuple[str, Sequence[Sequence[Piece]]]]
) -> Iterator[Output]:
    """One tensor for each name and its pieces, which are given by role and expert."""
    known: dict[tuple[str, tuple[int, ...]], tuple[tuple[int, ...], list[At]]] = {}  # equal for most experts
    for name, by_role in tensors:
        (region, dtype, form, alone), num = by_role[0][0], len(by_role[0])
        rows, cols = region.rows, region.cols
        if (form, alone) not in known:
            ats = [placed(to, roles, role, rows, cols, form) for role in roles]
            known[form, alone] = _together(to, slot, len(roles), by_role[0][0]), ats
        shape, ats = known[form, alone]
        if to.flat:
            shape = (num * max(shape[:1]), *shape[1:])
        elif not slot.per_expert:
            shape = (num, *shape)
        size = len(roles) * rows * cols
        copies = [
            [
                Copy(piece.region, Region(name, at, rows, cols, down, right))
                for at, piece in zip(count(offset, size), pieces, strict=False)
            ]
            for (offset, down, right), pieces in zip(ats, by_role, strict=True)
        ]
        yield Output(name, dtype, shape, tuple(chain.from_iterable(zip(*copies, strict=True))))


def _together(to: ExpertLayout, slot: Slot, num: int, piece: Piece) -> tuple[int, ...]:
    """The shape of `num` roles of one expert, all like `piece`, in one tensor."""
    (_, _, rows, cols, _, _), _, form, shape = piece
    if form == "matrix":
        return (cols, num * rows) if slot.roles[-1] in to.transposed else (num * rows, cols)
    return (num * rows, *shape[1:]) if num > 1 or form != "number" else ()


def _exact(group, to, slot, roles, suffix, of, found, scale_rows) -> None:
    """Refuses what would need arithmetic, or would no longer mean the same."""
    if any(one.keys() != of[0].keys() for one in of):
        raise Refused(f"{suffix or 'weight'} of {' and '.join(roles)} is not there for the same experts")
    one = next(iter(of[0].values()))
    for other in (next(iter(more.values())) for more in of[1:]):
        if (other.dtype, other.shape) != (one.dtype, one.shape):
            raise Refused(
                f"{one.region.tensor} {one.dtype} {list(one.shape)} and {other.region.tensor} {other.dtype} {list(other.shape)} differ"  # noqa: E501
            )
    if to.flat and (suffix or one.form != "matrix"):
        raise Refused(f"{to.name} of {to.family} has no place for {suffix}")
    if one.form == "packed" and to.blocks is None:
        raise Refused(f"{one.region.tensor} holds packed numbers, and {to.name} defines no place for them")
    if one.dtype in _SUB_BYTE:
        raise Refused(f"{one.region.tensor} is {one.dtype}, whose numbers are no whole bytes")
    role = roles[-1]
    turned = (role in to.transposed) != (role in group.layout.transposed)
    if turned and not suffix and one.dtype in PACKED:
        raise Refused(f"{one.region.tensor} is {one.dtype}, packed numbers that cannot be turned without unpacking")
    source = next(s for s in group.layout.slots if role in s.roles)
    shared = len(roles) > 1 or len(group.roles(source)) > 1
    if not suffix or suffix == "bias" or not shared or one.form == "number":
        return
    weight = next(iter(found[role, ""].values())).region.rows if (role, "") in found else one.region.rows
    rows = one.region.rows
    if rows == weight or (rows == 1 and one.form == "one"):
        return
    usual = (scale_rows,) if scale_rows else USUAL_BLOCKS
    size = next((size for size in usual if math.ceil(weight / size) == rows), None)
    if size is None or weight % size:
        raise Refused(
            f"{suffix}: gate and up have {weight} rows and {rows} rows of scales, so blocks of {size or 'no usual size'} would "  # noqa: E501
            f"span both; {weight} must be divisible by {size or 128}"
        )
    if "interleaved" in (
        to.order if len(roles) > 1 else "",
        group.layout.order if len(group.roles(source)) > 1 else "",
    ):
        raise Refused(f"{suffix}: a scale for {size} rows cannot be interleaved row by row")


def _strays(tensors: Iterable[str], consumed: Mapping[str, object], stems: set[str]) -> Iterator[str]:
    """What stays behind while the weight moves to whose name it adds something: it would lose its meaning."""
    found = [
        name
        for name in tensors
        if name not in consumed and any(name[: at.start()] in stems for at in re.finditer("[._]", name))
    ]
    if found:
        more = f" and {len(found) - 1} more like it" if len(found) > 1 else ""
        yield f"{found[0]}{more}: it belongs to the weight of an expert, and how it would move is not known"


def _unique(items: list[str]) -> list[str]:
    return list(dict.fromkeys(items))
