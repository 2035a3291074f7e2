"""Write a sharded model in hub layout, every rank its own part: nothing is gathered, memory stays as it was.

    plan      who converts and writes which rows of which weights (`Unit`); every rank makes the same plan, from shapes
    move      rows that their writer does not hold are sent to it, one unit of every writer at a time
    write     each writer streams its units into safetensors files of its own, under temporary names
    publish   rank 0 gives them their names, the index last                                                files.py

An expert is written by a rank that holds it, so that experts stay where they are. Other weights, and expert stacks that
stay stacked, go to the writers in turn, a slice at a time. Of HSDP replicas only the first one writes.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moe_accel.checkpoint.revert import Group, Shapes
from moe_accel.convert.copy import write_all
from moe_accel.convert.dtypes import SAFETENSORS_DTYPES
from moe_accel.convert.headers import make_header
from moe_accel.convert.regions import Tensor as Described
from moe_accel.ranks import gather

UNIT_BYTES = 64 * 2**20
"""What a writer converts at a time, where it can be cut so: little memory, and few messages."""

ONE_FILE_BYTES = 256 * 2**20
"""Up to this size rank 0 writes one file, as `save_pretrained` would: nothing is gained by more."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of the part of a weight that a rank holds."""


@dataclass(frozen=True)
class Unit:
    """Rows of the sources of a group that one rank converts and writes at once; all of them if `rows` is None."""

    group: Group
    rows: tuple[int, int] | None
    writer: int

    def names(self) -> list[str]:
        """The weights of the checkpoint that it holds, in whole or in part."""
        if self.rows is None or not self.group.templates:
            return list(self.group.targets)
        return [template.format(e=row) for row in range(*self.rows) for template in self.group.templates]


@dataclass
class File:
    """A safetensors file to be: where each weight lies in it."""

    path: Path
    weights: Shapes = field(default_factory=dict)
    num_bytes: int = 0
    offsets: dict[str, int] = field(default_factory=dict)

    def header(self) -> bytes:
        """The safetensors header; settles the offsets. Wide dtypes come first, so that each weight is aligned."""
        tensors = {
            name: Described(name, SAFETENSORS_DTYPES[dtype], shape) for name, (shape, dtype) in self.weights.items()
        }
        raw, self.offsets = make_header(tensors, {"format": "pt"})
        return raw


def boxes_of(state: Mapping[str, Tensor]) -> list[dict[str, Box]]:
    """What every rank holds, by rank and name; of copies only the first rank's. A collective call."""
    mine: dict[str, Box] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, DTensor):
            if dist.get_rank() == 0:
                mine[name] = ((0,) * tensor.ndim, tuple(tensor.shape))
            continue
        coordinate = tensor.device_mesh.get_coordinate() or []
        copies = [at for at, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_replicate()]
        sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        if not any(copies) and all(sizes):
            mine[name] = (tuple(offsets), tuple(sizes))
    return gather(mine)


def plan(groups: list[Group], shapes: Shapes, boxes: list[dict[str, Box]], writers: list[int]) -> list[Unit]:
    """Who writes what. The same on every rank."""
    load = dict.fromkeys(writers, 0)
    units, shared = [], []
    for group in groups:
        if group.num_rows is not None and group.templates:
            units += _where_they_are(group, shapes, boxes, load)
        else:
            shared.append(group)
    for group in shared:
        writer = min(load, key=lambda rank: (load[rank], rank))
        num_bytes = sum(map(_num_bytes, group.targets.values()))
        load[writer] += num_bytes
        rows = [None]
        if group.num_rows and num_bytes > UNIT_BYTES:
            rows = _cut((0, group.num_rows), num_bytes // group.num_rows)
        units += [Unit(group, each, writer) for each in rows]
    order = {group.key: at for at, group in enumerate(groups)}
    return sorted(units, key=lambda unit: (order[unit.group.key], unit.rows or (0, 0)))


def _where_they_are(group: Group, shapes: Shapes, boxes: list[dict[str, Box]], load: dict[int, int]) -> Iterator[Unit]:
    """Units of experts, each written by a rank that holds it; by the writers in turn where no writer does."""
    name = group.sources[0][0]
    holders: dict[tuple[int, int], list[int]] = {}
    for rank, held in enumerate(boxes):
        if name in held:
            offsets, sizes = held[name]
            holders.setdefault((offsets[0], offsets[0] + sizes[0]), []).append(rank)
    row_bytes = sum(math.prod(shapes[each][0][1:]) * shapes[each][1].itemsize for each, _ in group.sources)
    for (start, stop), ranks in sorted(holders.items()):
        near = [rank for rank in ranks if rank in load] or sorted(load, key=lambda rank: load[rank])[:1]
        for at, writer in enumerate(near):
            mine = start + (stop - start) * at // len(near), start + (stop - start) * (at + 1) // len(near)
            load[writer] += (mine[1] - mine[0]) * row_bytes
            yield from (Unit(group, rows, writer) for rows in _cut(mine, row_bytes))


def _cut(rows: tuple[int, int], row_bytes: int) -> list[tuple[int, int]]:
    step = max(1, UNIT_BYTES // max(1, row_bytes))
    return [(start, min(start + step, rows[1])) for start in range(*rows, step)]


def files_of(units: list[Unit], writer: int, folder: Path, max_shard_bytes: int) -> list[File]:
    """The files of one writer, none above the limit unless a single weight is."""
    files: list[File] = []
    seen = set()
    for unit in units:
        for name in unit.names() if unit.writer == writer else ():
            if name in seen:  # rows of a weight that has begun
                continue
            seen.add(name)
            num_bytes = _num_bytes(unit.group.targets[name])
            if not files or files[-1].num_bytes + num_bytes > max_shard_bytes:
                files.append(File(folder / f"{writer}-{len(files)}.safetensors"))
            files[-1].weights[name] = unit.group.targets[name]
            files[-1].num_bytes += num_bytes
    return files


def write(
    model: nn.Module,
    state: Mapping[str, Tensor],
    shapes: Shapes,
    units: list[Unit],
    boxes: list[dict[str, Box]],
    files: list[File],
    device: torch.device,
) -> None:
    """Move, convert and write all units; a collective call. `files` are this rank's, whole and on the disk afterwards.

    Raises:
        OSError: a file cannot be written; only after the last unit, since other ranks wait for what this one sends.
    """
    opened: dict[Path, int] = {}
    place: dict[str, tuple[int, int]] = {}
    problem: OSError | None = None
    try:
        for file in files:
            opened[file.path] = os.open(file.path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o666)
            write_all(opened[file.path], memoryview(file.header()), 0)
            place |= {name: (opened[file.path], offset) for name, offset in file.offsets.items()}
    except OSError as error:
        problem = error
    for together in _rounds(units):
        mine, tensors = _move(together, state, shapes, boxes, device)
        if mine is not None and problem is None:
            try:
                _write_unit(model, mine, tensors, place)
            except OSError as error:
                problem = error
    for descriptor in opened.values():
        try:
            os.fsync(descriptor)
        except OSError as error:
            problem = problem or error
        os.close(descriptor)
    if problem is not None:
        raise problem


def _rounds(units: list[Unit]) -> Iterator[list[Unit]]:
    """One unit of every writer at a time."""
    queues: dict[int, list[Unit]] = {}
    for unit in units:
        queues.setdefault(unit.writer, []).append(unit)
    for at in range(max(map(len, queues.values()), default=0)):
        yield [queue[at] for queue in queues.values() if at < len(queue)]


@torch.no_grad()
def _move(
    units: list[Unit], state: Mapping[str, Tensor], shapes: Shapes, boxes: list[dict[str, Box]], device: torch.device
) -> tuple[Unit | None, dict[str, Tensor]]:
    """Exchange what the writers of `units` lack; this rank's unit, if any, and its sources."""
    me = dist.get_rank()
    mine, tensors, operations, landed = None, {}, [], []
    for unit in units:
        writes = unit.writer == me
        mine = unit if writes else mine
        for name, _ in unit.group.sources:
            shape, dtype = shapes[name]
            rows = unit.rows or (0, shape[0] if shape else 1)
            parts = [(rank, part) for rank, held in enumerate(boxes) if (part := _overlap(held.get(name), rows))]
            if writes and [rank for rank, _ in parts] == [me]:
                tensors[name] = _local_rows(state[name], boxes[me][name], parts[0][1])
                continue
            if writes:
                tensors[name] = torch.empty((rows[1] - rows[0], *shape[1:]) if shape else (), dtype=dtype)
            for rank, part in parts:
                box = boxes[rank][name]
                if rank == me and writes:
                    _region(tensors[name], rows[0], part, box).copy_(_local_rows(state[name], box, part))
                elif rank == me:
                    sent = _local_rows(state[name], box, part).to(device).contiguous()
                    operations.append(dist.P2POp(dist.isend, _as_bytes(sent), unit.writer))
                elif writes:
                    landing = torch.empty((part[1] - part[0], *box[1][1:]) if shape else (), dtype=dtype, device=device)
                    operations.append(dist.P2POp(dist.irecv, _as_bytes(landing), rank))
                    landed.append((_region(tensors[name], rows[0], part, box), landing))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    for region, landing in landed:
        region.copy_(landing)
    return mine, tensors


def _overlap(box: Box | None, rows: tuple[int, int]) -> tuple[int, int] | None:
    """The rows among `rows` that a rank has a part of."""
    if box is None:
        return None
    offsets, sizes = box
    if not sizes:
        return rows
    start, stop = max(rows[0], offsets[0]), min(rows[1], offsets[0] + sizes[0])
    return (start, stop) if start < stop else None


def _local_rows(tensor: Tensor, box: Box, part: tuple[int, int]) -> Tensor:
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
    return local[part[0] - box[0][0] : part[1] - box[0][0]] if local.ndim else local


def _region(whole: Tensor, first_row: int, part: tuple[int, int], box: Box) -> Tensor:
    """The part of a tensor that begins at row `first_row` which a rank's box fills."""
    if not whole.ndim:
        return whole
    beside = [slice(offset, offset + size) for offset, size in zip(box[0][1:], box[1][1:], strict=True)]
    return whole[(slice(part[0] - first_row, part[1] - first_row), *beside)]


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _write_unit(
    model: nn.Module, unit: Unit, tensors: Mapping[str, Tensor], place: Mapping[str, tuple[int, int]]
) -> None:
    start = unit.rows[0] if unit.rows else 0
    for name, tensor in unit.group.convert(model, tensors, start).items():
        shape, dtype = unit.group.targets[name]
        is_slice = unit.rows is not None and not unit.group.templates
        expected = (unit.rows[1] - start, *shape[1:]) if is_slice and unit.rows else tuple(shape)
        assert (tuple(tensor.shape), tensor.dtype) == (expected, dtype), (name, tensor.shape, expected)
        descriptor, offset = place[name]
        skipped = start * math.prod(shape[1:]) * dtype.itemsize if is_slice else 0
        content = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        buffer: Any = content.numpy()
        write_all(descriptor, memoryview(buffer), offset + skipped)


def _num_bytes(described: tuple[torch.Size, torch.dtype]) -> int:
    shape, dtype = described
    return shape.numel() * dtype.itemsize
