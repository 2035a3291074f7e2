"""Families of expert layouts, read from the TOML of `converters/`: which tensors hold which matrices of which experts.

A family is a set of layouts of the same model: what is published, what transformers holds in memory, what other tools
read. A layout says which tensor holds which roles (`gate`, `up`, `down`; `gate_up` for both in one) and how they lie in
it. Names are patterns:

    {layer}   everything up to the layer's number: model.layers.3
    {moe}     {layer} and the layout's `block` below it: model.layers.3.mlp
    {e}       the number of the expert; without it the tensor is stacked
    {branch}  one of the layout's `branches`, in the order of the experts

`converters/README.md` explains every key of a table. Checked completely on reading: all problems are told at once.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from moe_accel.errors import ConfigError

TARGETS = ("stacked", "per-expert", "hub", "te-grouped", "nemo", "sonicmoe")
ROLES: Mapping[str, tuple[str, ...]] = {"gate_up": ("gate", "up"), "gate": ("gate",), "up": ("up",), "down": ("down",)}
ORDERS = ("gate-up", "up-gate", "interleaved")
_FAMILY_KEYS = {"family", "about", "model_types", "default", "hub", "partial_down", "layouts", "moves", "refuse"}
_FAMILY_KEYS |= {"peft"}
_LAYOUT_KEYS = {*ROLES, "block", "order", "transposed", "flat", "biased", "branches", "companions", "note"}
_PLACEHOLDERS = ("{layer}", "{moe}", "{e}", "{branch}")


@dataclass(frozen=True)
class Slot:
    """One kind of tensor of a layout: the pattern of its name and the roles it holds, in canonical order."""

    pattern: str
    roles: tuple[str, ...]

    @property
    def per_expert(self) -> bool:
        """Whether each expert has a tensor of its own."""
        return "{e}" in self.pattern


@dataclass(frozen=True, eq=False)
class ExpertLayout:
    """How one layout stores the experts of a layer.

    Attributes:
        blocks: names of the MoE module below the layer (`""`: the layer itself); None: whatever the source calls it.
        order: how gate and up share a tensor: `gate-up`, `up-gate` (halves) or `interleaved` (row by row).
        transposed: roles stored as (input, output) features.
        flat: name of the tensor whose first dimension is the number of experts, when experts are stacked as
            [E*rows, cols]; else None.
        biased: True where the experts have biases, False where not, None where either goes.
        branches: experts of several modules that share one index range, in its order.
        companions: canonical suffix to the suffix this layout uses (`weight_scale_inv` = "scale").
        note: what the user should know about a checkpoint in this layout.
    """

    family: str
    name: str
    slots: tuple[Slot, ...]
    blocks: tuple[str, ...] | None = ("mlp",)
    order: str = "gate-up"
    transposed: frozenset[str] = frozenset()
    flat: str | None = None
    biased: bool | None = None
    branches: tuple[str, ...] = ()
    companions: Mapping[str, str] | None = None
    note: str | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        """All roles, in the order of the slots."""
        return tuple(role for slot in self.slots for role in slot.roles)

    @property
    def physical(self) -> tuple[object, ...]:
        """Layouts with the same of these hold the same numbers at the same places under the same names."""
        return self.slots, self.order, self.transposed, self.flat, self.branches

    def companion(self, slot: Slot, suffix: str) -> str:
        """Pattern of what travels with a slot's weight: `...w1.weight` has `...w1.bias`, `...gate_up_proj` has
        `...gate_up_proj_bias`."""
        if not suffix:
            return slot.pattern
        spelled = (self.companions or {}).get(suffix, suffix)
        head, dot, leaf = slot.pattern.rpartition(".")
        if "weight" in leaf:
            return head + dot + leaf.replace("weight", spelled)
        return f"{slot.pattern}_{spelled.removeprefix('weight_')}"


@cache
def template_regex(layout: ExpertLayout, pattern: str) -> re.Pattern[str]:
    """Of a template: a name with every number that stands alone replaced by #."""
    layer = r"(?P<layer>(?:.+\.)?#)"
    if layout.blocks is None:
        block = r"(?:\.(?P<block>[^#]+?))?"
    else:
        names = "|".join(re.escape(name) for name in layout.blocks if name)
        block = rf"(?:\.(?P<block>{names}))" + ("?" if "" in layout.blocks else "") if names else "(?P<block>)"
    parts = {
        "{layer}": layer,
        "{moe}": layer + block,
        "{e}": "(?P<e>#)",
        "{branch}": f"(?P<branch>{'|'.join(map(re.escape, layout.branches))})",
    }
    return re.compile("".join(parts.get(piece, re.escape(piece)) for piece in re.split(r"(\{\w+\})", pattern)))


@dataclass(frozen=True, eq=False)
class Family:
    """Layouts of the same models.

    `moves` are other tensors whose name differs: layout name to pattern, one mapping a tensor. `peft` is "swapped"
    where PEFT takes stacked parameters for (output, input) features, which they are not.
    """

    name: str
    about: str
    model_types: frozenset[str]
    layouts: Mapping[str, ExpertLayout]
    hub: str
    default: bool = False
    partial_down: bool = False
    moves: tuple[Mapping[str, str], ...] = ()
    refuse: Mapping[str, str] | None = None
    peft: str | None = None
    user: bool = False


@dataclass(frozen=True, eq=False)
class Companion:
    """What travels with a weight.

    `rows` and `blocks` follow its rows, `scalar` is one number, `fixed` cannot move and says why.
    """

    suffix: str
    rule: str
    reason: str


@dataclass(frozen=True, eq=False)
class Families:
    """Everything known about layouts. `targets` are layouts any family can be written in."""

    families: tuple[Family, ...]
    targets: Mapping[str, ExpertLayout]
    companions: Mapping[str, Companion]

    def layouts(self) -> Iterator[tuple[Family, ExpertLayout]]:
        """Every layout with its family, the user's own family first."""
        for family in self.families:
            for layout in family.layouts.values():
                yield family, layout

    def of(self, model_type: str | None) -> Family | None:
        """The family that names this `model_type`."""
        return next((family for family in self.families if model_type in family.model_types), None)

    @property
    def default(self) -> Family:
        """The family that is meant when nothing decides."""
        return next(family for family in self.families if family.default)


def load_families(extra: Path | None = None) -> Families:
    """The families of `converters/`, and before them the one of the user's file.

    Raises:
        ConfigError: the file is missing, no TOML, or says something a family cannot say; lists every problem.
    """
    known = _builtin()
    if extra is None:
        return known
    try:
        text = extra.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{extra}: cannot be read: {error}") from error
    family = parse_family(text, str(extra), user=True)
    return Families((family, *(f for f in known.families if f.name != family.name)), known.targets, known.companions)


@cache
def _builtin() -> Families:
    families, targets, companions = [], {}, {}
    for file in sorted(resources.files("moe_accel.converters").iterdir(), key=lambda file: file.name):
        if not file.name.endswith(".toml"):
            continue
        text = file.read_text(encoding="utf-8")
        if file.name == "companions.toml":
            companions = {
                key: Companion(key, of["rule"], of.get("reason", "")) for key, of in tomllib.loads(text).items()
            }
        elif file.name == "targets.toml":
            targets = dict(parse_family(text, file.name).layouts)
        else:
            families.append(parse_family(text, file.name))
    return Families(tuple(families), targets, companions)


def parse_family(text: str, where: str, user: bool = False) -> Family:
    """One family from the text of its TOML.

    Args:
        text: the TOML.
        where: what to call it in errors.
        user: the family goes before all others that match.

    Raises:
        ConfigError: lists everything that is wrong with it.
    """
    hint = "converters/README.md describes the table of a family"
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: not TOML: {error}", hint) from error
    problems = [
        f"unknown key {key!r}; a family has {', '.join(sorted(_FAMILY_KEYS))}"
        for key in sorted(set(table) - _FAMILY_KEYS)
    ]
    name, given = table.get("family"), table.get("layouts")
    if not isinstance(name, str) or not name:
        problems.append("family must be the name of the family")
    if not isinstance(given, dict) or not given:
        raise ConfigError.collect(
            [*problems, "layouts must hold at least one table, [layouts.per-expert] for example"], where, hint
        )
    for key, kind, said in (
        ("about", str, "a sentence"),
        ("hub", str, "the name of a layout"),
        ("default", bool, "true or false"),
        ("partial_down", bool, "true or false"),
        ("peft", str, '"swapped"'),
    ):
        if key in table and (not isinstance(table[key], kind) or (key == "peft" and table[key] != "swapped")):
            problems.append(f"{key} must be {said}")
    if not _strings(table.get("model_types", [])):
        problems.append("model_types must be a list of names")
    for key in ("refuse",):
        if not isinstance(table.get(key, {}), dict) or not _strings(list(table.get(key, {}).values())):
            problems.append(f"{key} must map names of targets to the reason")
    moves = table.get("moves", [])
    if not isinstance(moves, list) or not all(
        isinstance(move, dict) and _strings(list(move.values())) for move in moves
    ):
        problems, moves = (
            [*problems, "moves must be a list of tables from a layout's name to the pattern of a tensor"],
            [],
        )
    for move in moves:
        problems += [f"moves: {key!r} is no layout of this family" for key in move if key not in given]
        problems += [
            f"moves: {pattern!r} must start with {{layer}} or {{moe}}"
            for pattern in move.values()
            if not _rooted(pattern)
        ]
    layouts = {key: _layout(str(name), key, of, problems) for key, of in given.items()}
    hub = table.get("hub", "per-expert" if "per-expert" in given else next(iter(given)))
    if hub not in given:
        problems.append(f"hub = {hub!r} is no layout of this family: {', '.join(given)}")
    if problems:
        raise ConfigError.collect(problems, where, hint)
    return Family(
        name=str(name),
        about=table.get("about", ""),
        model_types=frozenset(table.get("model_types", [])),
        layouts=layouts,
        hub=hub,
        default=table.get("default", False),
        partial_down=table.get("partial_down", False),
        moves=tuple(moves),
        refuse=table.get("refuse", {}),
        peft=table.get("peft"),
        user=user,
    )


def _layout(family: str, name: str, table: Any, problems: list[str]) -> ExpertLayout:
    """One layout; what is wrong with it goes to `problems`."""
    where = f"layouts.{name}"
    if not isinstance(table, dict):
        problems.append(f"{where} must be a table")
        return ExpertLayout(family, name, ())
    problems += [
        f"{where}: unknown key {key!r}; a layout has {', '.join(sorted(_LAYOUT_KEYS))}"
        for key in sorted(set(table) - _LAYOUT_KEYS)
    ]
    slots = []
    for key, roles in ROLES.items():
        if key in table:
            problems += [f"{where}.{key} {problem}" for problem in _pattern_problems(table[key])]
            slots.append(Slot(str(table[key]), roles))
    roles = [role for slot in slots for role in slot.roles]
    if sorted(roles) not in (["down", "gate", "up"], ["down", "up"]):
        problems.append(
            f"{where}: needs down and either gate_up, or gate and up, or up alone; has {', '.join(roles) or 'none'}"
        )
    order = table.get("order", "gate-up")
    if order not in ORDERS:
        problems.append(f"{where}.order must be one of {', '.join(ORDERS)}, not {order!r}")
    transposed = table.get("transposed", False)
    if isinstance(transposed, bool):
        transposed = roles if transposed else []
    elif not _strings(transposed) or not set(transposed) <= set(roles):
        problems, transposed = _add(problems, f"{where}.transposed must be true, false or a list of roles"), []
    block = table.get("block")
    blocks = [block] if isinstance(block, str) else block
    if blocks is not None and (not _strings(blocks) or not blocks):
        problems.append(f"{where}.block must be the name of the module below the layer, or a list of names")
        blocks = None
    branches = table.get("branches", [])
    if not _strings(branches):
        problems, branches = _add(problems, f"{where}.branches must be a list of names"), []
    if bool(branches) != any("{branch}" in slot.pattern for slot in slots):
        problems.append(f"{where}: branches and {{branch}} in the patterns go together")
    for key, kind in (("flat", str), ("biased", bool), ("companions", dict), ("note", str)):
        if key in table and not isinstance(table[key], kind):
            problems.append(f"{where}.{key} must be a {kind.__name__}")
    return ExpertLayout(
        family,
        name,
        tuple(slots),
        None if blocks is None else tuple(blocks),
        order,
        frozenset(transposed),
        table.get("flat"),
        table.get("biased"),
        tuple(branches),
        table.get("companions"),
        table.get("note"),
    )


def _pattern_problems(pattern: Any) -> list[str]:
    if not isinstance(pattern, str):
        return ["must be the pattern of a tensor's name"]
    unknown = [found for found in re.findall(r"\{[^}]*\}?", pattern) if found not in _PLACEHOLDERS]
    problems = [
        f"= {pattern!r}: unknown placeholder {found}; there are {', '.join(_PLACEHOLDERS)}" for found in unknown
    ]
    if not _rooted(pattern):
        problems.append(f"= {pattern!r} must start with {{layer}} or {{moe}}")
    if any(pattern.count(placeholder) > 1 for placeholder in _PLACEHOLDERS):
        problems.append(f"= {pattern!r}: a placeholder stands twice")
    return problems


def _rooted(pattern: str) -> bool:
    return pattern.startswith(("{layer}.", "{moe}."))


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _add(problems: list[str], problem: str) -> list[str]:
    problems.append(problem)
    return problems


def ranges(numbers: "range | list[int]") -> str:
    """3-7, 12 for 3, 4, 5, 6, 7, 12."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)
