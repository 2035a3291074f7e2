"""What of an output is computed at once, and how: read from the base, added to in fp32, rounded, written, digested."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from moe_accel.adapters.merge_plan import Item, MergePlan
from moe_accel.adapters.numbers import Survival, add_delta, to_bits, to_floats
from moe_accel.adapters.source import Adapter
from moe_accel.convert.copy import UNSIGNED, Files, assign, read_place, write_all
from moe_accel.convert.digest import new_digest
from moe_accel.convert.headers import DTYPE_BITS
from moe_accel.convert.lower import place
from moe_accel.convert.regions import Output
from moe_accel.convert.run import locate
from moe_accel.convert.shards import Shard
from moe_accel.convert.source import Checkpoint
from moe_accel.convert.work import Progress
from moe_accel.errors import CheckpointError

CHUNK_ELEMENTS = 16 << 20
"""Elements of a matrix outside of the experts that are merged at a time: an embedding is taken in pieces."""
Found = list[tuple[str, str, Survival]]
"""Name, role and what survived, of every matrix that something was added to."""


class Sources(NamedTuple):
    """What is merged."""

    checkpoint: Checkpoint
    adapter: Adapter


@dataclass(frozen=True)
class Block:
    """A contiguous part of an output that is computed at once: the matrices of one expert, or rows of one matrix."""

    output: Output
    start: int
    size: int
    items: tuple[Item, ...]
    rows: tuple[int, int] | None = None
    replaced: str | None = None


def blocks_of(plan: MergePlan, output: Output) -> Iterator[Block]:
    """The parts of an output that are computed; none where it is copied.

    Raises:
        CheckpointError: the matrices of an expert do not lie together.
    """
    name = output.name
    if name in plan.replaced:
        size = int(np.prod(output.shape))
        items = tuple(plan.merged.get(name, ()))
        yield Block(output, 0, size, items, replaced=plan.replaced[name])
        return
    by_expert: dict[int, list[Item]] = {}
    for item in plan.merged.get(name, ()):
        by_expert.setdefault(item.expert, []).append(item)
    for items in by_expert.values():
        target = items[0].target
        start, size = min(item.target.offset for item in items), sum(i.target.rows * i.target.cols for i in items)
        if len(items) == 1 and target.row_stride == target.cols and size > CHUNK_ELEMENTS:
            step = max(1, CHUNK_ELEMENTS // target.cols)
            for low in range(0, target.rows, step):
                high = min(low + step, target.rows)
                yield Block(output, start + low * target.cols, (high - low) * target.cols, tuple(items), (low, high))
            continue
        last = max(
            i.target.offset + (i.target.rows - 1) * i.target.row_stride + (i.target.cols - 1) * i.target.col_stride
            for i in items
        )
        if last - start + 1 != size:
            raise CheckpointError(f"{name}: the matrices of expert {items[0].expert} do not lie together")
        yield Block(output, start, size, tuple(items))


def merge_block(
    sources: Sources, files: Files, block: Block, temporary: Path, shard: Shard, progress: Progress
) -> tuple[tuple[int, int, str], Found]:
    """Compute and write a block; returns its first byte, number of bytes and digest, and what survived by matrix."""
    output, found = block.output, Found()
    item_bytes = DTYPE_BITS[output.dtype] // 8
    data = np.empty(block.size, UNSIGNED[item_bytes])
    saved = _replacement(sources.adapter, block) if block.replaced else None
    if saved is not None and not block.items:
        data[...] = saved.reshape(-1)
    for item in block.items:
        low, high = block.rows or (0, item.target.rows)
        source = sources.checkpoint.tensors[item.source.tensor]
        lies = place(item.source, source, *locate(sources.checkpoint, source.name))
        weight = saved if saved is not None else read_place(files, lies, low, high)
        into = as_strided(
            data[item.target.offset + low * item.target.row_stride - block.start :],
            (high - low, item.target.cols),
            (item.target.row_stride * item_bytes, item.target.col_stride * item_bytes),
        )
        if item.addition is None:
            assign(into, weight)
            continue
        add = item.addition
        a, b = add.factors()
        merged, survival = add_delta(weight, output.dtype, a, b[low:high], add.scaling, add.name)
        assign(into, merged)
        found.append((add.name, add.role, survival))
    at = shard.starts[output.name] + block.start * item_bytes
    view = data.data.cast("B")
    state = new_digest()
    state.update(view)
    fd = os.open(temporary, os.O_WRONLY | getattr(os, "O_BINARY", 0))
    try:
        write_all(fd, view, at)
    finally:
        os.close(fd)
    progress("copy", len(view))
    return (at, len(view), state.hexdigest()), found


def _replacement(adapter: Adapter, block: Block) -> np.ndarray[Any, Any]:
    """A whole tensor of the adapter, in the base's dtype."""
    assert block.replaced is not None
    mine, bits = adapter.tensors[block.replaced], adapter.read(block.replaced)
    if mine.dtype == block.output.dtype:
        return bits
    values = to_floats(bits, mine.dtype)
    result = to_bits(values, block.output.dtype)
    if not np.isfinite(to_floats(result, block.output.dtype)).all():
        raise CheckpointError(f"{mine.name} has values that are not finite in {block.output.dtype}")
    return result
