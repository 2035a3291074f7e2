"""Which experts a checkpoint holds, and how: tensor names matched with the families' layouts, confirmed by shapes.

A `Group` is the experts of one layer in one layout. Names decide which layouts are possible, the model_type which
family is meant, shapes which way round the matrices lie; what is still undecided is an error, never a guess.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import NamedTuple

from moe_accel.convert.layout import ExpertLayout, Families, Family, Slot, ranges, template_regex
from moe_accel.convert.regions import Tensor
from moe_accel.errors import CheckpointError

_COMPANIONS = r"weight(?:_scale(?:_inv|_2)?|_packed|_shape)?|bias|input_scale|activation_scale"
_NUMBER = re.compile(rf"(.*expert_|{_COMPANIONS}|)(\d+)")  # of a word: what stands between the dots of a name
PACKED = frozenset({"U8", "I8", "I32", "F4", "F6_E2M3", "F6_E3M2"})  # several numbers, or a part of one, in an element
MOST_EXPERTS = 1_000_000  # of a layer; a name with a larger number is damaged
STACKED = -1  # the expert of a tensor that holds all
MODEL_TYPE_HINT = "model_type in config.json names the family; --family FILE describes one of your own"

Key = tuple[Slot, str, int]  # slot, suffix of the companion ("" the weight itself), branch


@dataclass(eq=False)
class Group:
    """The experts of one layer in one layout.

    `members`: tensors by what they are, then by expert (`STACKED`: all experts in one).
    """

    family: Family
    layout: ExpertLayout
    layer: str
    block: str
    members: dict[Key, dict[int, Tensor]] = field(default_factory=dict)
    num_experts: int = 0
    gated: bool = True

    @property
    def moe(self) -> str:
        """Path of the MoE module: layer and block."""
        return f"{self.layer}.{self.block}" if self.block else self.layer

    @property
    def prefix(self) -> str:
        """The same for all layers of a tower: model.layers.*.mlp."""
        return self.moe.replace(self.layer, re.sub(r"\d+$", "*", self.layer), 1)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of the group."""
        for of in self.members.values():
            yield from of.values()

    def roles(self, slot: Slot) -> tuple[str, ...]:
        """The roles a slot holds here: a family without a gate has up alone in a target's gate_up."""
        return slot.roles if self.gated else tuple(role for role in slot.roles if role != "gate")


Candidates = dict[ExpertLayout, Group]  # of one layer
Pattern = tuple[Family, ExpertLayout, Slot, str, str]  # the last: of names, as in a table


@dataclass(frozen=True)
class _Hit:
    family: Family
    layout: ExpertLayout
    slot: Slot
    suffix: str
    branch: int
    block: str
    layer_words: int  # how many words of the name are the layer's
    expert_at: int | None  # which word holds the number of the expert


class _Words(dict[str, str]):
    """The words of names, each with # for its number and looked at once; `digits` are the numbers by word."""

    def __init__(self) -> None:
        self.digits: dict[str, str] = {}

    def __missing__(self, word: str) -> str:
        match = _NUMBER.fullmatch(word)
        if match:
            self.digits[word] = match[2]
        self[word] = template = match[1] + "#" if match else word
        return template


class _Place(NamedTuple):
    """Hits of one template that read a name the same way. `members`: by layer, where each hit keeps its tensors."""

    layer_words: int
    expert_at: int | None
    hits: list[_Hit]
    members: dict[str, list[dict[int, Tensor]]]


def detect(
    tensors: Mapping[str, Tensor], families: Families, model_type: str | None, num_experts: int | None = None
) -> list[Group]:
    """The experts of every layer, in the order in which they appear.

    Raises:
        CheckpointError: experts are missing, disagree, lie in two layouts at once, or in one of several layouts that
            names and shapes cannot tell apart. Lists the first ten problems.
    """
    layers = _match(tensors, families, model_type)
    problems: list[str] = []
    groups = []
    for candidates in layers.values():
        group = _choose(candidates, tensors, model_type, problems)
        if group is not None:
            groups.append(group)
    most: dict[str, int] = {}
    for group in groups:
        most[group.prefix] = max(most.get(group.prefix, 0), group.num_experts)
    for group in groups:
        expected = most[group.prefix]
        if group.num_experts < expected:
            gone = ranges(range(group.num_experts, expected))
            problems.append(f"experts {gone} of {expected} missing in {group.moe}, which other layers have")
    found = max(most.values(), default=0)
    if num_experts is not None and 0 < found < num_experts:
        gone = ranges(range(found, num_experts))
        problems.append(f"experts {gone} of {num_experts}, as config.json says, missing in every layer")
    if problems:
        shown = problems[:10] + ([f"and {len(problems) - 10} more problems"] if len(problems) > 10 else [])
        raise CheckpointError("experts cannot be converted:\n" + "\n".join(f"  - {problem}" for problem in shown))
    return groups


def _match(tensors: Mapping[str, Tensor], families: Families, model_type: str | None) -> dict[str, Candidates]:
    """By layer, every layout that names allow."""
    patterns = list(_patterns(families, model_type))
    templates = _Words()
    known: dict[str, list[_Place]] = {}
    layers: dict[str, Candidates] = {}
    for name, tensor in tensors.items():
        if "#" in name:
            continue
        words = name.split(".")
        template = ".".join([templates[word] for word in words])
        places = known.get(template)
        if places is None:
            hits = _hits(template, patterns, model_type)
            by_place = groupby(hits, key=lambda hit: (hit.layer_words, hit.expert_at))
            places = known[template] = [_Place(*place, list(of), {}) for place, of in by_place]
        for place in places:
            expert = STACKED
            if place.expert_at is not None:
                digits = templates.digits[words[place.expert_at]]
                expert = int(digits)
                if str(expert) != digits:  # 007 is not how layouts write the number of an expert
                    continue
            layer = ".".join(words[: place.layer_words])
            members = place.members.get(layer)
            if members is None:
                members = place.members[layer] = [
                    _members(hit, layer, layers.setdefault(layer, {})) for hit in place.hits
                ]
            for of in members:
                of[expert] = tensor
    return layers


def _members(hit: _Hit, layer: str, candidates: Candidates) -> dict[int, Tensor]:
    """Where the group of a hit keeps the tensors of its kind."""
    group = candidates.setdefault(hit.layout, Group(hit.family, hit.layout, layer, hit.block))
    return group.members.setdefault((hit.slot, hit.suffix, hit.branch), {})


def _patterns(families: Families, model_type: str | None) -> Iterator[Pattern]:
    """Every pattern of a name, the most wanted family first: the user's, the model_type's, the default, the others."""

    def rank(family: Family) -> int:
        wanted = (family.user, model_type in family.model_types, family.default)
        return wanted.index(True) if any(wanted) else len(wanted)

    layouts = sorted(families.layouts(), key=lambda pair: rank(pair[0]))
    named = next((family for family, _ in layouts if rank(family) < 2), families.default)
    layouts += [(named, layout) for layout in families.targets.values()]
    for family, layout in layouts:
        for slot in layout.slots:
            named = {layout.companion(slot, suffix): suffix for suffix in reversed(("", *families.companions))}
            for pattern, suffix in named.items():  # of two that a layout calls the same, the first
                yield family, layout, slot, suffix, pattern


def _hits(template: str, patterns: list[Pattern], model_type: str | None) -> list[_Hit]:
    found: dict[tuple[object, ...], _Hit] = {}
    wanted = False
    for family, layout, slot, suffix, pattern in patterns:
        ours = family.user or model_type in family.model_types
        if wanted and not ours:
            break
        if not template.endswith(pattern.rpartition("}")[2]):  # compiling all of them takes a quarter of a second
            continue
        match = template_regex(layout, pattern).fullmatch(template)
        if match is None:
            continue
        wanted = wanted or ours
        of = match.groupdict()
        hit = _Hit(
            family,
            layout,
            slot,
            suffix,
            layout.branches.index(of["branch"]) if of.get("branch") else 0,
            of.get("block") or "",
            of["layer"].count(".") + 1,
            template[: match.start("e")].count(".") if "e" in of else None,
        )
        found.setdefault((*layout.physical, layout.biased, slot, suffix), hit)
    return list(found.values())


def _choose(
    candidates: Mapping[ExpertLayout, Group], tensors: Mapping[str, Tensor], model_type: str | None, problems: list[str]
) -> Group | None:
    """The one layout that names and shapes leave; None, with the reason in `problems`, where there is none or more."""
    names = {layout: {tensor.name for tensor in group.tensors()} for layout, group in candidates.items()}
    left = [group for layout, group in candidates.items() if not any(names[layout] < other for other in names.values())]
    found = [(group, check(group, tensors)) for group in left]
    fit = [group for group, wrong in found if not wrong]
    if not fit:
        problems += min((wrong for _, wrong in found), key=len)
        return None
    first = fit[0]
    for other in fit[1:]:
        if names[other.layout] != names[first.layout]:
            both = [sorted(names[group.layout])[0] for group in (first, other)]
            problems.append(f"{first.layer} has its experts twice, as {both[0]} and as {both[1]}")
            return None
        if other.layout.physical != first.layout.physical:
            kinds = " or ".join(f"{group.family.name} {group.layout.name}" for group in fit)
            said = f"model_type {model_type!r} does not decide" if model_type else "there is no model_type to decide"
            problems.append(f"{first.moe}: its experts could be {kinds}, and {said}; hint: {MODEL_TYPE_HINT}")
            return None
    return first


def check(group: Group, tensors: Mapping[str, Tensor]) -> list[str]:
    """What keeps this group from being read in its layout; also counts its experts."""
    layout, slots = group.layout, {slot for slot, _, _ in group.members}
    have = {role for slot in slots for role in slot.roles}
    lacking = [role for role in layout.roles if role not in have]
    if lacking:
        there = ", ".join(role for role in layout.roles if role in have)
        return [f"{there} without {' and '.join(lacking)} in {group.moe}"]
    biased = any(suffix == "bias" for _, suffix, _ in group.members)
    if layout.biased is not None and biased != layout.biased:
        return [
            f"{group.moe}: {group.family.name} {layout.name} has {'' if layout.biased else 'no '}biases, "
            f"these experts {'do' if biased else 'do not'}"
        ]
    counted = _count(group, tensors)
    group.gated = _gated(group)
    return counted or _uniform(group) or _fits(group)


def _count(group: Group, tensors: Mapping[str, Tensor]) -> list[str]:
    """Sets `num_experts`; says which experts are missing."""
    seen = {key: set(of) for key, of in group.members.items()}
    if group.layout.flat:
        name = group.layout.flat.replace("{moe}", group.moe).replace("{layer}", group.layer)
        if name not in tensors or not tensors[name].shape:
            return [f"{group.moe}: {name} is missing, which tells the number of experts"]
        group.num_experts = tensors[name].shape[0]
        return []
    if all(of == {STACKED} for of in seen.values()):
        sizes = {branch: 0 for _, _, branch in group.members}
        for (_, _, branch), of in group.members.items():
            shape = of[STACKED].shape
            sizes[branch] = max(sizes[branch], shape[0] if shape else 0)
        missing = [name for index, name in enumerate(group.layout.branches) if index not in sizes]
        group.num_experts = sum(sizes.values())
        return [f"{' and '.join(missing)} missing in {group.moe}"] if missing else []
    group.num_experts = 1 + max(max(of) for of in seen.values())
    if group.num_experts > MOST_EXPERTS:
        return [f"{group.moe}: expert {group.num_experts - 1}, and a layer can have {MOST_EXPERTS}"]
    everyone = set(range(group.num_experts))
    gone = {key: sorted(everyone - of) for key, of in seen.items() if everyone - of}
    if group.family.partial_down:
        gone = {key: of for key, of in gone.items() if key[0].roles != ("down",) or max(seen[key]) > of[0]}
    if not gone:
        return []
    if len(gone) == len(seen) and len({tuple(of) for of in gone.values()}) == 1:
        return [f"experts {ranges(next(iter(gone.values())))} of {group.num_experts} missing in {group.moe}"]
    said = []
    for (slot, suffix, _), of in gone.items():
        leaf = group.layout.companion(slot, suffix).rpartition("{e}.")[2]
        said.append(f"{leaf} of experts {ranges(of)} of {group.num_experts} missing in {group.moe}")
    return said


def chunks(group: Group) -> list[int]:
    """First expert of each branch, and the number of experts: [0, E] where the family has no branches."""
    num = max((len(layout.branches) for layout in group.family.layouts.values()), default=0) or 1
    if group.layout.branches:
        ends, key = [0], next(slot for slot in group.layout.slots)
        for index in range(len(group.layout.branches)):
            ends.append(ends[-1] + group.members[key, "", index][STACKED].shape[0])
        return ends
    size = -(-group.num_experts // num)
    return [min(index * size, group.num_experts) for index in range(num + 1)]


def _uniform(group: Group) -> list[str]:
    """Experts of a group must agree in dtype and shape."""
    if any(of.keys() == {STACKED} for of in group.members.values()):
        return []
    said = []
    for of in group.members.values():
        for low, high in pairwise(chunks(group)):
            several = [of[e] for e in range(low, high) if e in of]
            if len({tensor[1:] for tensor in several}) > 1:  # dtype and shape
                other = next(t for t in several if t[1:] != several[0][1:])
                what = "dtypes" if other.dtype != several[0].dtype else "shapes"
                said.append(f"{what} differ inside a group: {several[0].described} and {other.described}")
    return said


def _fits(group: Group) -> list[str]:
    """The shapes of gate, up and down must belong together when read in this layout."""
    mains: dict[int, dict[str, tuple[tuple[int, int], Tensor]]] = {}
    starts, read_as = chunks(group)[:-1], f"{group.family.name} {group.layout.name}"
    for (slot, suffix, branch), of in group.members.items():
        if suffix:
            continue
        firsts = [(branch, of[STACKED])] if STACKED in of else [(i, of[e]) for i, e in enumerate(starts) if e in of]
        for at, tensor in firsts:
            size = sizes(group, slot, tensor)
            if size is None:
                return [f"{group.moe}: {tensor.described} cannot be {read_as}: {_form(group, slot)}"]
            mains.setdefault(at, {}).update({role: (size, tensor) for role in group.roles(slot)})
    for found in mains.values():
        tensors = [tensor for _, tensor in found.values()]
        if "gate" in found and "up" in found:
            (one, gate), (two, up) = found["gate"], found["up"]
            if gate.dtype != up.dtype:
                return [f"dtypes differ inside a group: {gate.described} and {up.described}"]
            if one != two:
                return [f"shapes differ inside a group: {gate.described} and {up.described}"]
        if "up" in found and "down" in found and not any(tensor.dtype in PACKED for tensor in tensors):
            (one, up), (two, down) = found["up"], found["down"]
            if one != two[::-1]:
                return [f"{group.moe}: {up.described} and {down.described} do not fit together as {read_as}"]
        counts = {tensor.shape[0] for tensor in tensors if tensor.shape} if not group.family.partial_down else set()
        if len(counts) > 1 and not group.layout.flat and not any(slot.per_expert for slot in group.layout.slots):
            return [
                f"{group.moe}: {tensors[0].described} and {tensors[-1].described} hold different numbers of experts"
            ]
    return []


def _gated(group: Group) -> bool:
    """Whether there is a gate: without one, another tool's layout has as many rows of up as columns of down."""
    if "gate" not in group.layout.roles or group.layout.blocks is not None:
        return "gate" in group.layout.roles
    whole = []
    for slot in group.layout.slots:
        of = group.members.get((slot, "", 0), {})
        whole.append(size_of(group, slot, next(iter(of.values())), 1) if of else None)
    return None in whole or whole[0] != whole[1][::-1]


def sizes(group: Group, slot: Slot, tensor: Tensor) -> tuple[int, int] | None:
    """(rows, columns) of one matrix in a weight's tensor; None where the shape is impossible."""
    return size_of(group, slot, tensor, len(group.roles(slot)))


def size_of(group: Group, slot: Slot, tensor: Tensor, num: int) -> tuple[int, int] | None:
    """As `sizes`, for a tensor that holds `num` roles."""
    shape = tensor.shape
    if group.layout.flat:
        if len(shape) != 2 or shape[0] % group.num_experts:
            return None
        shape = (shape[0] // group.num_experts, shape[1])
    elif not slot.per_expert:
        shape = shape[1:]
    if len(shape) != 2:
        return None
    rows, cols = reversed(shape) if slot.roles[-1] in group.layout.transposed else shape
    return None if rows % num else (rows // num, cols)


def _form(group: Group, slot: Slot) -> str:
    dims = "rows, columns" if slot.roles[-1] not in group.layout.transposed else "columns, rows"
    return f"expected [{'' if slot.per_expert or group.layout.flat else 'experts, '}{dims}]" + (
        ", rows even" if len(slot.roles) == 2 else ""
    )
