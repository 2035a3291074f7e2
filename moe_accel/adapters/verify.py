"""Proof that two adapters hold the same factors, whatever their dialects: compared as one pair an expert."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_accel.adapters.convert import Written, to_per_expert
from moe_accel.adapters.rewrite import others_of
from moe_accel.adapters.run import Request, read
from moe_accel.convert.headers import num_bytes
from moe_accel.convert.shards import natural
from moe_accel.convert.verify import Comparison


@dataclass(frozen=True)
class _Side:
    tensors: dict[str, Written]
    scalings: dict[str, float]
    num_others: int


def compare_adapters(first: Path, second: Path, request: Request) -> Comparison:
    """Compare two adapters: factors by layer, expert and role, scalings by module, all other tensors by name.

    Raises:
        CheckpointError: one of them is damaged or ambiguous.
    """
    a, b = (_side(folder, request) for folder in (first, second))
    differences: dict[str, str] = {}
    for mine, theirs, folder in ((a, b, first), (b, a, second)):
        differences |= {name: f"{name}: only in {folder}" for name in mine.tensors.keys() - theirs.tensors.keys()}
    for name in a.tensors.keys() & b.tensors.keys():
        one, two = a.tensors[name], b.tensors[name]
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            differences[name] = f"{name}: {one.dtype} {list(one.shape)} and {two.dtype} {list(two.shape)}"
    for path in a.scalings.keys() & b.scalings.keys():
        one, two = a.scalings[path], b.scalings[path]
        if abs(one - two) > 1e-9 * abs(one):
            differences[path] = f"{path}: scaling {one:g} and {two:g}"
    for name in sorted(a.tensors.keys() & b.tensors.keys(), key=natural):  # by layer: factors are loaded once
        if name not in differences and not np.array_equal(a.tensors[name].make(), b.tensors[name].make()):
            differences[name] = f"{name}: differs"
    size = sum(num_bytes(each.dtype, each.shape) for each in a.tensors.values())
    ordered = tuple(differences[key] for key in sorted(differences, key=natural))
    return Comparison(len(a.tensors) - a.num_others, a.num_others, size, ordered)


def _side(folder: Path, request: Request) -> _Side:
    adapter, _, found, naming = read(folder, request)
    config = adapter.config
    scalings = {path: config.scaling(config.rank_of(path), config.alpha_of(path)) for path in others_of(found.others)}
    if naming is None:
        tensors = {n: Written(n, t.dtype, t.shape, lambda n=n: adapter.read(n)) for n, t in adapter.tensors.items()}
        return _Side(tensors, scalings, len(tensors))
    done = to_per_expert(adapter, found, naming)
    scalings |= {f"{each.path}.*.{each.leaf}": config.scaling(each.rank, each.alpha) for each in done.modules}
    return _Side({each.name: each for each in done.tensors}, scalings, len(found.others))
