"""What an adapter file holds: names and shapes decide, then what adapter_config.json says; what is left is refused.

Several tools write LoRA of stacked experts under the same names with other meanings. Four questions, and who answers:

    which parameter    two tensors pairs: the inner (`base_layer`) is gate_up_proj; one: `target_parameters`
    how many experts   rows of A / rank
    which way round    `--lora-order`; a width known from elsewhere; gate_up beside down; `peft_version`
    B's columns        `--lora-b-layout`; `lora_B_layout`; Unsloth's mark; norms that contradict the usual reading
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from moe_accel.adapters.config import PREFIX
from moe_accel.adapters.factors import Array, Experts, Factors, check_shapes, unpack
from moe_accel.adapters.family import LEAVES, Model
from moe_accel.adapters.orient import Sides, b_layout, is_swapped
from moe_accel.adapters.source import Adapter
from moe_accel.convert.layout import Families, Family, ranges
from moe_accel.convert.regions import Tensor
from moe_accel.convert.shards import natural
from moe_accel.errors import CheckpointError

DIALECTS = {
    "D1": "one pair of matrices an expert",
    "D2": "stacked as PEFT >= 0.19.1 does",
    "D3": "stacked, A and B swapped (PEFT <= 0.19.0, NeMo AutoModel; Llama-4 always)",
    "D4": "stacked, B grouped by expert (Unsloth before 2026-09-17)",
    "D5": "stacked, swapped and grouped by expert (Megatron-Bridge)",
    "D6": "three dimensions, outer factors shared by all experts (Tinker, Megatron-Bridge)",
    "D7": "three dimensions, A by expert and B by rank (Megatron-Bridge)",
    "D8": "three dimensions by projection (VeOmni)",
    "D9": "three dimensions, (input, output) features (NeMo AutoModel)",
}
EXPERTS = re.compile(r"(?P<path>(?:.+\.)?experts)\.(?P<rest>.*lora_.*)")
_END = r"lora_(?P<half>[AB])(?:\.default)?(?:\.weight)?"
_FORMS: dict[str, re.Pattern[str]] = {
    "single": re.compile(r"(?P<expert>\d+)\.(?P<what>\w+)\." + _END),
    "stacked": re.compile(r"(?P<what>(?:base_layer\.)*)" + _END),
    "named": re.compile(r"(?P<what>[a-z]\w*)\." + _END),
    "nemo": re.compile(r"lora_(?P<what>gate_and_up|gate_up|up|down)_(?P<half>[AB])"),
}
_STACKED_LEAVES = ("gate_up_proj", "up_proj", "down_proj")
_PARAMETER_HINT = "target_parameters in adapter_config.json names them, as mlp.experts.down_proj"

Pairs = dict[tuple[str, int | None], dict[str, Tensor]]  # (what, expert) -> A and B


@dataclass(frozen=True)
class Options:
    """What the user said about an adapter. `lora_order`: standard, swapped; `lora_b_layout`: as Unsloth's marker."""

    lora_order: str | None = None
    lora_b_layout: str | None = None


NOTHING_SAID = Options()


@dataclass
class Found:
    """The adapted experts, the names of all other tensors, and what the user should know."""

    experts: list[Experts]
    others: list[str]
    notes: list[str] = field(default_factory=list)

    @property
    def dialects(self) -> list[str]:
        """Which dialects occur."""
        return sorted({each.dialect for each in self.experts})


@dataclass(frozen=True)
class _Context:
    adapter: Adapter
    model: Model
    family: Family | None
    options: Options
    width: int | None
    notes: list[str]


def read_experts(adapter: Adapter, model: Model, families: Families, options: Options = NOTHING_SAID) -> Found:
    """The adapted experts of every layer.

    Args:
        adapter: from `open_adapter`.
        model: from `find_model`; decides where names and shapes cannot.
        families: from `load_families`.
        options: what the user said.

    Raises:
        CheckpointError: experts or halves of a pair are missing, disagree with the rank of adapter_config.json or with
            one another, or could mean several things.
    """
    by_path: dict[str, dict[str, Pairs]] = {}
    others = []
    for name, tensor in adapter.tensors.items():
        match = EXPERTS.fullmatch(name.removeprefix(PREFIX))
        if match is None:
            others.append(name)
            continue
        form, what = next(
            ((form, of) for form, regex in _FORMS.items() if (of := regex.fullmatch(match["rest"]))), (None, None)
        )
        if form is None or what is None:
            raise CheckpointError(f"{name} is no LoRA factor of experts that is known: only lora_A and lora_B are")
        key = (what["what"], int(what["expert"]) if form == "single" else None)
        pair = by_path.setdefault(match["path"], {}).setdefault(form, {}).setdefault(key, {})
        if what["half"] in pair:
            raise CheckpointError(f"{name} and {pair[what['half']].name} are the same factor")
        pair[what["half"]] = tensor
    found = Found([], others)
    width = model.hidden or _width(adapter, others)
    context = _Context(adapter, model, families.of(model.model_type), options, width, found.notes)
    for path in sorted(by_path, key=natural):
        forms = by_path[path]
        if len(forms) > 1:
            names = [next(iter(next(iter(pairs.values())).values())).name for pairs in forms.values()]
            raise CheckpointError(f"{path} has two kinds of factors: {names[0]} and {names[1]}")
        form, pairs = next(iter(forms.items()))
        for pair in pairs.values():
            if len(pair) == 1:
                half, tensor = next(iter(pair.items()))
                raise CheckpointError(f"{tensor.name} is there and its lora_{'AB'[half == 'A']} is not")
        experts = _READERS[form](context, path, pairs)
        check_shapes(path, experts.factors)
        found.experts.append(experts)
    _same_number(found.experts)
    found.notes[:] = dict.fromkeys(found.notes)
    return found


def _same_number(experts: Iterable[Experts]) -> None:
    seen: dict[str, Experts] = {}
    for each in experts:
        first = seen.setdefault(re.sub(r"\d+", "*", each.path), each)
        if each.num_experts != first.num_experts:
            gone = ranges(range(*sorted((each.num_experts, first.num_experts))))
            raise CheckpointError(
                f"{each.path} has {each.num_experts} experts and {first.path} {first.num_experts}: {gone} missing"
            )


def _width(adapter: Adapter, others: Iterable[str]) -> int | None:
    """The model's width, if LoRA of attention shows it."""
    found = {adapter.tensors[name].shape[-1] for name in others if re.search(r"self_attn\.[qkv]_proj\.lora_A\.", name)}
    return found.pop() if len(found) == 1 else None


def _factors(
    context: _Context,
    path: str,
    roles: tuple[str, ...],
    leaf: str,
    tensors: tuple[Tensor, ...],
    sizes: Iterable[int],
    load: Callable[[], tuple[Array, Array]],
    order: str | None = None,
) -> Factors:
    """Checked against adapter_config.json; `sizes` are experts, rank, inputs and outputs."""
    num_experts, rank, inputs, outputs = sizes
    kinds = {tensor.dtype for tensor in tensors}
    if len(kinds) > 1:
        other = next(tensor for tensor in tensors if tensor.dtype != tensors[0].dtype)
        raise CheckpointError(f"dtypes differ inside a group: {tensors[0].described} and {other.described}")
    config, name = context.adapter.config, f"{path}.{leaf}"
    if rank != config.rank_of(name):
        raise CheckpointError(
            f"{tensors[0].described} has rank {rank}, adapter_config.json says r={config.rank_of(name)} for {name}",
            "r and rank_pattern must be those of the run that trained the adapter",
        )
    alpha = config.alpha_of(name)
    names = tuple(tensor.name for tensor in tensors)
    scaling = config.scaling(rank, alpha)
    return Factors(roles, num_experts, rank, inputs, outputs, alpha, scaling, tensors[0].dtype, names, load, order)


def _dims(tensor: Tensor, *allowed: int) -> None:
    if len(tensor.shape) not in allowed:
        raise CheckpointError(f"{tensor.described} must have {' or '.join(map(str, allowed))} dimensions")


def _read_single(context: _Context, path: str, pairs: Pairs) -> Experts:
    """D1."""
    num_experts = 1 + max(expert or 0 for _, expert in pairs)
    leaves = dict.fromkeys(what for what, _ in pairs)
    factors = []
    for leaf in leaves:
        if leaf not in LEAVES:
            raise CheckpointError(f"{path}.*.{leaf} is no projection of an expert that is known: {', '.join(LEAVES)}")
        of = {expert: pair for (what, expert), pair in pairs.items() if what == leaf and expert is not None}
        gone = [expert for expert in range(num_experts) if expert not in of]
        if gone:
            raise CheckpointError(f"{leaf} of experts {ranges(gone)} of {num_experts} missing in {path}")
        ordered = [of[expert] for expert in range(num_experts)]
        for pair in ordered:
            for half in "AB":
                _dims(pair[half], 2)
                if pair[half].shape != ordered[0][half].shape:
                    both = f"{ordered[0][half].described} and {pair[half].described}"
                    raise CheckpointError(f"shapes differ inside a group: {both}")
        a, b = ordered[0]["A"], ordered[0]["B"]
        if b.shape[1] != a.shape[0]:
            raise CheckpointError(f"{a.described} and {b.described} have different ranks")
        names = [pair[half].name for half in "AB" for pair in ordered]
        tensors = tuple(pair[half] for half in "AB" for pair in ordered)
        load = partial(_stack, context.adapter, names)
        roles, sizes = LEAVES[leaf], (num_experts, a.shape[0], a.shape[1], b.shape[0])
        factors.append(_factors(context, f"{path}.0", roles, leaf, tensors, sizes, load))
    return Experts(path, "D1", num_experts, tuple(factors))


def _stack(adapter: Adapter, names: list[str]) -> tuple[Array, Array]:
    half = len(names) // 2
    return np.stack([adapter.read(n) for n in names[:half]]), np.stack([adapter.read(n) for n in names[half:]])


def _read_stacked(context: _Context, path: str, pairs: Pairs) -> Experts:
    """D2 to D5, and D7."""
    levels = sorted((pair for pair in pairs.items()), key=lambda item: -len(item[0][0]))
    config = context.adapter.config
    targets = [leaf for leaf in _STACKED_LEAVES if _targets(config.target_parameters, f"{path}.{leaf}")]
    biases = [
        each
        for each in config.target_parameters
        if each.endswith("_bias") and _targets([each], f"{path}.{each.rpartition('.')[2]}")
    ]
    if biases or len(levels) > 2:
        raise CheckpointError(
            f"{path}: LoRA of {biases[0] if biases else 'more than two parameters'} cannot be converted"
        )
    depth = [len(what) // len("base_layer.") for (what, _), _ in levels]
    if depth not in ([1, 0], [0]):
        raise CheckpointError(f"{path} has {levels[0][1]['A'].name} and no factors outside of it")
    sides = [_side(context, path, pair) for _, pair in levels]
    if len(levels) == 1:
        if len(targets) != 1:
            said = ", ".join(targets) or "none of the experts' parameters"
            raise CheckpointError(
                f"{sides[0].a.name}: one pair of factors, and target_parameters names {said}", _PARAMETER_HINT
            )
        leaves = targets
    else:
        if targets and (len(targets) != 2 or "down_proj" not in targets):
            raise CheckpointError(
                f"{path} has two pairs of factors, and target_parameters names {', '.join(targets)}", _PARAMETER_HINT
            )
        (x, y), (u, v) = ((side.x, side.y) for side in sides)
        gated = (x == v and y == 2 * u) or (y == u and x == 2 * v)
        leaves = targets or [("gate_up_proj" if gated else "up_proj"), "down_proj"]
    counts = []
    for leaf, side in zip(leaves, sides, strict=True):
        rank = side.rank or config.rank_of(f"{path}.{leaf}")
        if side.rows % rank:
            raise CheckpointError(
                f"{side.a.described}: {side.rows} rows are no multiple of r={rank}, which adapter_config.json says",
                "r and rank_pattern must be those of the run that trained the adapter",
            )
        counts.append(side.rows // rank)
    if len(set(counts)) > 1:
        raise CheckpointError(
            f"{sides[0].a.described} would be {counts[0]} experts, {sides[1].a.described} {counts[1]}, by the ranks of adapter_config.json",  # noqa: E501
            "r and rank_pattern must be those of the run that trained the adapter",
        )
    by_leaf = dict(zip(leaves, sides, strict=True))
    swapped = is_swapped(path, by_leaf, config.version, context.family, context.width, context.options.lora_order)
    flat = [side for side in sides if side.rank is None]
    columns = [(side.b.name, counts[0]) for side in flat]
    grouped = bool(flat) and b_layout(context.adapter, columns, swapped, context.options.lora_b_layout, context.notes)
    factors = []
    for leaf, side in by_leaf.items():
        load = partial(_unstack, context.adapter, side.a.name, side.b.name, counts[0], grouped, swapped)
        sizes = (counts[0], side.rows // counts[0], *((side.y, side.x) if swapped else (side.x, side.y)))
        factors.append(_factors(context, path, LEAVES[leaf], leaf, (side.a, side.b), sizes, load))
    dialect = "D7" if not flat else {(0, 0): "D2", (1, 0): "D3", (0, 1): "D4", (1, 1): "D5"}[swapped, grouped]
    return Experts(path, dialect, counts[0], tuple(factors))


def _side(context: _Context, path: str, pair: dict[str, Tensor]) -> Sides:
    a, b = pair["A"], pair["B"]
    _dims(a, 2, 3)
    if len(a.shape) == 3:
        if len(b.shape) != 3 or (b.shape[2], b.shape[1]) != a.shape[:2]:
            raise CheckpointError(f"{a.described} and {b.described}: expected [experts, r, in] and [out, r, experts]")
        return Sides(a, b, a.shape[0] * a.shape[1], a.shape[2], b.shape[0], a.shape[1])
    _dims(b, 2)
    if a.shape[0] != b.shape[1]:
        raise CheckpointError(f"{a.described} and {b.described}: expected [experts * r, in] and [out, r * experts]")
    return Sides(a, b, a.shape[0], a.shape[1], b.shape[0], None)


def _unstack(adapter: Adapter, a: str, b: str, num_experts: int, grouped: bool, swapped: bool) -> tuple[Array, Array]:
    first, second = adapter.read(a), adapter.read(b)
    return unpack(
        first.reshape(-1, first.shape[-1]), second.reshape(second.shape[0], -1), num_experts, grouped, swapped
    )


def _targets(targets: Iterable[str], path: str) -> bool:
    return any(path == each or path.endswith(f".{each}") for each in targets)


def _read_named(context: _Context, path: str, pairs: Pairs) -> Experts:
    """D6 and D8: [E, r, in] and [E, out, r] by projection; 1 or no E where all experts share a factor."""
    leading = {tensor.shape[0] if len(tensor.shape) == 3 else 1 for pair in pairs.values() for tensor in pair.values()}
    num_experts = max(leading)
    if leading - {1, num_experts}:
        raise CheckpointError(f"{path}: factors of {', '.join(map(str, sorted(leading)))} experts")
    if num_experts == 1:
        raise CheckpointError(f"{path}: every factor is shared by all experts, so their number is not in the file")
    factors = []
    for (leaf, _), pair in pairs.items():
        a, b = pair["A"], pair["B"]
        if leaf not in LEAVES:
            raise CheckpointError(f"{a.name}: {leaf} is no projection of an expert that is known: {', '.join(LEAVES)}")
        _dims(a, 2, 3)
        _dims(b, 2, 3)
        if b.shape[-1] != a.shape[-2]:
            raise CheckpointError(f"{a.described} and {b.described} have different ranks")
        load = partial(_share, context.adapter, a.name, b.name, num_experts)
        sizes = (num_experts, a.shape[-2], a.shape[-1], b.shape[-2])
        factors.append(_factors(context, path, LEAVES[leaf], leaf, (a, b), sizes, load))
    shared = any(len(tensor.shape) == 3 and tensor.shape[0] == 1 for pair in pairs.values() for tensor in pair.values())
    return Experts(path, "D6" if shared else "D8", num_experts, tuple(factors))


def _share(adapter: Adapter, a: str, b: str, num_experts: int) -> tuple[Array, Array]:
    first, second = adapter.read(a), adapter.read(b)
    return tuple(np.broadcast_to(each, (num_experts, *each.shape[-2:])) for each in (first, second))  # type: ignore[return-value]


def _read_nemo(context: _Context, path: str, pairs: Pairs) -> Experts:
    """D9: [E, in, r] and [E, r, out]."""
    down = next((pair["A"] for (what, _), pair in pairs.items() if what == "down"), None)
    factors = []
    for (what, _), pair in pairs.items():
        a, b = pair["A"], pair["B"]
        _dims(a, 3)
        _dims(b, 3)
        if a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1]:
            raise CheckpointError(f"{a.described} and {b.described}: expected [experts, in, r] and [experts, r, out]")
        gateless = what == "up" or (down is not None and len(down.shape) == 3 and b.shape[2] == down.shape[1])
        leaf = "down_proj" if what == "down" else "up_proj" if gateless else "gate_up_proj"
        load = partial(_turn, context.adapter, a.name, b.name)
        sizes = (a.shape[0], a.shape[2], a.shape[1], b.shape[2])
        factors.append(_factors(context, path, LEAVES[leaf], leaf, (a, b), sizes, load, "gate-up"))
    counts = {each.num_experts for each in factors}
    if len(counts) > 1:
        raise CheckpointError(f"{path}: factors of {' and '.join(map(str, sorted(counts)))} experts")
    return Experts(path, "D9", counts.pop(), tuple(factors))


def _turn(adapter: Adapter, a: str, b: str) -> tuple[Array, Array]:
    return adapter.read(a).transpose(0, 2, 1), adapter.read(b).transpose(0, 2, 1)


_READERS: dict[str, Callable[[_Context, str, Pairs], Experts]] = {
    "single": _read_single,
    "stacked": _read_stacked,
    "named": _read_named,
    "nemo": _read_nemo,
}
