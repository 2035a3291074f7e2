"""Adapters from any dialect to PEFT's stacked form and to one pair of matrices an expert, bit for bit.

    gate and up apart -> together   A the same bits for both: kept once. Else A = [A_g; A_u], B block-diagonal with
                                    zeros, rank 2r; alpha doubles (rsLoRA: times sqrt 2), so that the scaling stays
    together -> apart               B block-diagonal: the halves, rank r / 2. Else A is written for both

Whether gate and up share A is decided for the entire adapter, as its rank stands once in adapter_config.json.
"""

import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from moe_accel.adapters.config import PREFIX
from moe_accel.adapters.dialect import Found
from moe_accel.adapters.factors import Array, Experts, Factors, pack, rows_of
from moe_accel.adapters.family import Naming
from moe_accel.adapters.source import Adapter
from moe_accel.errors import CheckpointError

TARGETS = ("peft", "per-expert")


@dataclass(frozen=True)
class Written:
    """A tensor to write: `make` gives its bits."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Array]


@dataclass(frozen=True)
class Module:
    """What adapter_config.json must say of one adapted parameter or kind of module: rank and alpha at `path`."""

    path: str
    leaf: str
    rank: int
    alpha: float


@dataclass(frozen=True)
class Conversion:
    """What to write: tensors, and what the config must say of the experts."""

    tensors: tuple[Written, ...]
    modules: tuple[Module, ...]
    notes: tuple[str, ...]


class Cache:
    """The factors used last, loaded. Safe to share between threads."""

    def __init__(self, size: int = 4) -> None:
        self._size, self._kept = size, dict[int, tuple[Factors, Array, Array]]()
        self._lock = threading.RLock()  # what is loaded may be made of what has to be loaded

    def load(self, factors: Factors) -> tuple[Array, Array]:
        """A [E, r, in] and B [E, out, r]."""
        with self._lock:
            found = self._kept.pop(id(factors), None) or (factors, *factors.load())
            self._kept[id(factors)] = found
            while len(self._kept) > self._size:
                self._kept.pop(next(iter(self._kept)))
        return found[1:]


def passed_through(adapter: Adapter, names: Iterable[str]) -> list[Written]:
    """Tensors that are no factors of experts, as they are."""
    found = (adapter.tensors[name] for name in names)
    return [Written(each.name, each.dtype, each.shape, partial(adapter.read, each.name)) for each in found]


def to_per_expert(adapter: Adapter, found: Found, naming: Naming) -> Conversion:
    """D1: what vLLM, SGLang and llama.cpp read.

    Raises:
        CheckpointError: two tensors would have the same name.
    """
    cache, tensors, modules, notes = Cache(), passed_through(adapter, found.others), [], list(found.notes)
    fused = [each for experts in found.experts for each in experts.factors if len(each.roles) == 2]
    compact = bool(fused) and all(_block_diagonal(each, cache, naming.order) for each in fused)
    if compact:
        notes.append("B of gate and up is block-diagonal: written apart, each with half the rank")
    elif fused:
        notes.append("gate and up share A: written for both")
    for experts in found.experts:
        for factors in experts.factors:
            order = factors.order or naming.order
            for role in factors.roles:
                halves = compact and len(factors.roles) == 2
                rank, alpha = (_halved(adapter, factors)) if halves else (factors.rank, factors.alpha)
                part = partial(_role, cache, factors, role, order, rank)
                rows = factors.out_features // len(factors.roles)
                leaf = ""
                for expert in range(experts.num_experts):
                    name = naming.expert(experts.layer, experts.block, role, expert)
                    leaf = name.rpartition(".")[2]
                    for half, shape in (("A", (rank, factors.in_features)), ("B", (rows, rank))):
                        make = partial(_one, part, half, expert)
                        tensors.append(Written(f"{PREFIX}{name}.lora_{half}.weight", factors.dtype, shape, make))
                path = naming.expert(experts.layer, experts.block, role, 0).rpartition(".0.")[0]
                modules.append(Module(path, leaf, rank, alpha))
    return Conversion(_once(tensors), tuple(modules), tuple(dict.fromkeys(notes)))


def _one(part: Callable[[], tuple[Array, Array]], half: str, expert: int) -> Array:
    return part()["AB".index(half)][expert]


def _role(cache: Cache, factors: Factors, role: str, order: str, rank: int) -> tuple[Array, Array]:
    a, b = cache.load(factors)
    b = rows_of(b, factors.roles, role, order)
    if rank != factors.rank:
        columns = slice(0, rank) if role == factors.roles[0] else slice(rank, None)
        a, b = a[:, columns], b[:, :, columns]
    return a, b


def _halved(adapter: Adapter, factors: Factors) -> tuple[int, float]:
    """Rank and alpha of gate or up alone: the scaling stays."""
    return factors.rank // 2, tidy(factors.alpha / (math.sqrt(2) if adapter.config.rslora else 2))


def tidy(alpha: float) -> float:
    """`alpha` as a whole number where only rounding kept it from being one."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _block_diagonal(factors: Factors, cache: Cache, order: str) -> bool:
    """Whether the first half of the ranks serves gate alone and the second up alone."""
    if factors.rank % 2:
        return False
    _, b = cache.load(factors)
    half = factors.rank // 2
    gate, up = (rows_of(b, factors.roles, role, factors.order or order) for role in factors.roles)
    return not gate[:, :, half:].any() and not up[:, :, :half].any()


def to_peft(adapter: Adapter, found: Found, naming: Naming) -> Conversion:
    """D2, the layout that PEFT >= 0.19.1 writes; of Llama-4 its own swapped form.

    Raises:
        CheckpointError: gate and up have different ranks, scalings or dtypes.
    """
    cache, tensors, modules, notes = Cache(), passed_through(adapter, found.others), [], list(found.notes)
    apart = [
        each for each in found.experts if {"gate", "up"} <= {f.roles[0] for f in each.factors if len(f.roles) == 1}
    ]
    shared = bool(apart) and all(_same_a(each, cache) for each in apart)
    if apart:
        notes.append(
            "A of gate and up is the same: kept once"
            if shared
            else "gate and up become one: A one below the other, B block-diagonal, twice the rank, the same scaling"
        )
    for experts in found.experts:
        joined = [_slot(adapter, experts, slot.roles, naming, shared, cache, notes) for slot in naming.stacked.slots]
        written = [each for each in joined if each is not None]
        path = naming.experts(experts.layer, experts.block)
        for at, (leaf, factors) in enumerate(written):
            levels = len(written) - 1 - at
            make = partial(_packed, cache, factors, naming.swapped)
            rows = factors.num_experts * factors.rank
            ins, outs = factors.in_features, factors.out_features
            shapes = ((rows, outs), (ins, rows)) if naming.swapped else ((rows, ins), (outs, rows))
            for half, shape in zip("AB", shapes, strict=True):
                name = f"{PREFIX}{path}.{'base_layer.' * levels}lora_{half}.weight"
                tensors.append(Written(name, factors.dtype, shape, partial(_half, make, half)))
            modules.append(Module(path, leaf, factors.rank, factors.alpha))
    return Conversion(_once(tensors), tuple(modules), tuple(dict.fromkeys(notes)))


def _half(make: Callable[[], tuple[Array, Array]], half: str) -> Array:
    return make()["AB".index(half)]


def _packed(cache: Cache, factors: Factors, swapped: bool) -> tuple[Array, Array]:
    return pack(*cache.load(factors), swapped)


def _same_a(experts: Experts, cache: Cache) -> bool:
    by_role = {each.roles[0]: each for each in experts.factors}
    gate, up = by_role["gate"], by_role["up"]
    if (gate.rank, gate.alpha, gate.dtype) != (up.rank, up.alpha, up.dtype):
        return False
    return np.array_equal(cache.load(gate)[0], cache.load(up)[0])


def _slot(
    adapter: Adapter,
    experts: Experts,
    roles: tuple[str, ...],
    naming: Naming,
    shared: bool,
    cache: Cache,
    notes: list[str],
) -> tuple[str, Factors] | None:
    """Leaf and factors of one stacked parameter; None where it is not adapted."""
    leaf = next(slot.pattern for slot in naming.stacked.slots if slot.roles == roles).rpartition(".")[2]
    of = [each for each in experts.factors if set(each.roles) & set(roles)]
    extra = {role for each in of for role in each.roles} - set(roles)
    if extra:
        raise CheckpointError(
            f"{experts.path}: the model has no {' and '.join(sorted(extra))}", "--model-type names it"
        )
    if not of:
        return None
    if len(roles) == 1:
        return leaf, of[0]
    order = naming.order
    if len(of) == 1 and of[0].roles == roles:
        load = partial(_reordered, cache, of[0], order)
        return leaf, of[0] if (of[0].order or order) == order else replace(of[0], load=load, order=order)
    by_role = {each.roles[0]: each for each in of}
    first = of[0]
    if len(of) == 1:
        notes.append(f"{first.roles[0]} alone is adapted: the other half of {leaf} gets zeros")
    elif len({(each.rank, each.scaling, each.dtype) for each in of}) > 1:
        said = ", ".join(f"{each.roles[0]} {each.dtype} r={each.rank} alpha={each.alpha:g}" for each in of)
        raise CheckpointError(f"{experts.path}: gate and up must agree to become one: {said}")
    rank = first.rank * (2 if len(of) == 2 and not shared else 1)
    alpha = first.alpha
    if rank != first.rank:
        alpha = tidy(alpha * (math.sqrt(2) if adapter.config.rslora else 2))
    load = partial(_join, [by_role.get(role) for role in roles], cache, rank, order)
    tensors = tuple(name for each in of for name in each.tensors)
    joined = replace(
        first, roles=roles, rank=rank, out_features=2 * first.out_features, alpha=alpha, tensors=tensors, load=load
    )
    return leaf, joined


def _join(parts: list[Factors | None], cache: Cache, rank: int, order: str) -> tuple[Array, Array]:
    """Gate and up in one: B holds each in its rows and, where A is not shared, in its half of the columns."""
    roles, loaded = ("gate", "up"), [cache.load(each) if each else None for each in parts]
    one = next(each for each in loaded if each is not None)
    num_experts, own, _ = one[0].shape
    rows = one[1].shape[1]
    b = np.zeros((num_experts, 2 * rows, rank), one[1].dtype)
    for at, each in enumerate(loaded):
        if each is not None:
            start = at * own if rank != own else 0
            rows_of(b, roles, roles[at], order)[:, :, start : start + own] = each[1]
    a = np.concatenate([each[0] for each in loaded if each is not None], axis=1) if rank != own else one[0]
    return a, b


def _reordered(cache: Cache, factors: Factors, order: str) -> tuple[Array, Array]:
    """The same factors with the rows of gate and up as the model's parameter has them."""
    a, b = cache.load(factors)
    new = np.empty_like(b)
    for role in factors.roles:
        rows_of(new, factors.roles, role, order)[...] = rows_of(b, factors.roles, role, factors.order or order)
    return a, new


def _once(tensors: list[Written]) -> tuple[Written, ...]:
    seen: set[str] = set()
    for each in tensors:
        if each.name in seen:
            raise CheckpointError(f"two tensors would be written as {each.name}")
        seen.add(each.name)
    return tuple(tensors)
