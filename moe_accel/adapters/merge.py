"""A LoRA adapter added to its base, file by file: what is not adapted is copied, the rest passes once through fp32.

At most `threads` matrices are in memory, and the factors of a few layers. Files get their names when they are whole and
read back, the index comes last, as in a conversion; a merge that was stopped begins again.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from moe_accel.adapters.dialect import NOTHING_SAID
from moe_accel.adapters.dialect import Options as AdapterOptions
from moe_accel.adapters.merge_plan import Item, MergePlan, plan_merge
from moe_accel.adapters.numbers import Survival, add_delta, to_bits, to_floats
from moe_accel.adapters.source import Adapter, open_adapter
from moe_accel.convert.copy import UNSIGNED, Copier, Files, assign, read_place, write_all
from moe_accel.convert.digest import digest, new_digest
from moe_accel.convert.headers import DTYPE_BITS, read_header
from moe_accel.convert.layout import load_families
from moe_accel.convert.lower import Place, batches, coalesce, lower_output, place
from moe_accel.convert.regions import Output
from moe_accel.convert.run import check_unchanged, locate
from moe_accel.convert.shards import INDEX, Shard, make_index, pack
from moe_accel.convert.source import MANIFEST, Checkpoint, open_checkpoint
from moe_accel.convert.target import Target, refuse_overlap, writing
from moe_accel.convert.verify import Checker, MismatchError
from moe_accel.convert.work import BATCH_BYTES, Progress, default_threads, in_batches, run_all, silent, workers
from moe_accel.errors import CheckpointError
from moe_accel.version import VERSION

CHUNK_ELEMENTS = 16 << 20
"""Elements of a matrix outside of the experts that are merged at a time: an embedding is taken in pieces."""
SCHEMA = 1


@dataclass(frozen=True)
class Options:
    """What the user may choose. `to`: layout of the result, None: as the base is."""

    to: str | None = None
    family: Path | None = None
    adapter: AdapterOptions = NOTHING_SAID
    max_shard_bytes: int = 5_000_000_000
    overwrite: bool = False
    threads: int = field(default_factory=default_threads)


@dataclass(frozen=True)
class Job:
    """A merge that can begin."""

    checkpoint: Checkpoint
    adapter: Adapter
    target: Path
    options: Options
    plan: MergePlan
    shards: list[Shard]
    plan_id: str

    @property
    def num_bytes(self) -> int:
        """Bytes of tensors to write."""
        return sum(shard.file_bytes - len(shard.header) for shard in self.shards)


@dataclass(frozen=True)
class Report:
    """What was done. `roles`: how much of the adapter survived rounding, by role; `total`: of all."""

    job: Job
    roles: dict[str, Survival]
    total: Survival
    seconds: float


def prepare(adapter: Path, base: Path, target: Path, options: Options) -> Job:
    """Match an adapter with its base, down to the bytes. Writes nothing.

    Raises:
        CheckpointError: they do not belong together, or one of them is damaged or of a kind that cannot be merged.
    """
    for folder in (base, adapter):
        refuse_overlap(folder, target)
    checkpoint, opened = open_checkpoint(base), open_adapter(adapter)
    plan = plan_merge(checkpoint, opened, options.to, load_families(options.family), options.adapter)
    tokenizer = [name for name in opened.others if name.startswith(("tokenizer", "vocab", "merges", "chat_template"))]
    if tokenizer:
        plan.notes.append(f"{', '.join(tokenizer)} beside the adapter not taken: all other files are the base's")
    shards = pack(plan.plan.outputs, options.max_shard_bytes, checkpoint.metadata)
    state = hashlib.sha256(f"merge {VERSION} {options}".encode())
    checkpoint.identify(state)
    state.update(opened.header.raw + f"{opened.header.file_bytes} {opened.header.mtime_ns}".encode())
    state.update(json.dumps(opened.config.raw, sort_keys=True).encode())
    return Job(checkpoint, opened, target, options, plan, shards, state.hexdigest()[:16])


def execute(job: Job, progress: Progress = silent) -> Report:
    """Write the merged checkpoint.

    Raises:
        CheckpointError: the target cannot be written, a source changed meanwhile, a merged value is not finite, or the
            whole adapter was lost to rounding; then nothing is published that could be taken for the result.
        MismatchError: what is read back is not what was written.
    """
    start = time.perf_counter()
    target, checkpoint = Target(job.target, job.plan_id), job.checkpoint
    target.lock()
    try:
        sizes = {shard.name: shard.file_bytes for shard in job.shards}
        index = make_index(job.shards, checkpoint.index_metadata) if len(job.shards) > 1 else None
        sizes |= {name: checkpoint.other(name).stat().st_size for name in checkpoint.others}
        target.claim(sizes | ({INDEX: len(index)} if index else {}), job.options.overwrite)
        for name in checkpoint.others:
            target.copy_in(checkpoint.other(name), name)
        try:
            matrices = _write(job, target, progress)
            roles, total = _sum(job, matrices)
            check_unchanged(checkpoint)
        except BaseException:
            for shard in job.shards:
                for file in (target.temporary(shard.name), job.target / shard.name):
                    file.unlink(missing_ok=True)
            raise
        target.write(MANIFEST, _manifest(job, roles, total))
        if index:
            target.write(INDEX, index)
    finally:
        target.unlock()
    return Report(job, roles, total, time.perf_counter() - start)


def _sum(job: Job, matrices: dict[str, tuple[str, Survival]]) -> tuple[dict[str, Survival], Survival]:
    """By role and of all; every planned matrix must have been merged."""
    if len(matrices) != job.plan.num_factors:
        raise CheckpointError(f"{job.plan.num_factors} matrices are adapted, {len(matrices)} were merged")
    roles, total = dict[str, Survival](), Survival()
    for role, found in matrices.values():
        roles.setdefault(role, Survival()).add(found.as_matrix())
        total.add(found.as_matrix())
    if total.num_matrices and not total.num_changed and not job.plan.replaced:
        why = "its B is zero everywhere, it was not trained" if total.delta_delta == 0 else "rounding lost all of it"
        raise CheckpointError(f"the adapter changes no weight of {total.num_weights}: {why}")
    return roles, total


def record_of(found: Survival) -> dict[str, Any]:
    """For `--json` and the manifest."""
    return {**vars(found), "gain": found.gain, "changed": found.changed}


def _manifest(job: Job, roles: dict[str, Survival], total: Survival) -> bytes:
    record = {
        "schema": SCHEMA,
        "plan_id": job.plan_id,
        "layout": job.options.to or "as the base",
        "files": {shard.name: shard.file_bytes for shard in job.shards},
        "merged": {
            "base": str(job.checkpoint.folder),
            "adapter": str(job.adapter.folder),
            "roles": {role: record_of(found) for role, found in roles.items()},
            "total": record_of(total),
        },
    }
    return (json.dumps(record, indent=1) + "\n").encode()


def _write(job: Job, target: Target, progress: Progress) -> dict[str, tuple[str, Survival]]:
    """Every file; returns what survived by matrix."""
    files = Files()
    checker = Checker(files, job.checkpoint, partial(progress, "check"))
    copier = Copier(files, partial(progress, "copy"))
    matrices: dict[str, tuple[str, Survival]] = {}
    with workers(job.options.threads, files) as pool:
        for shard in job.shards:
            temporary = target.create(shard.name, shard.header, shard.file_bytes)
            copied = [each for each in shard.outputs if each.name not in {*job.plan.merged, *job.plan.replaced}]
            where = partial(locate, job.checkpoint)
            operations = coalesce(
                op
                for each in copied
                for op in lower_output(each, shard.starts[each.name], job.checkpoint.tensors, where)
            )
            blocks = [block for each in shard.outputs for block in _blocks(job, each)]
            with writing(temporary), target.sync_meanwhile(shard.name):
                tasks = [partial(copier.execute, each, temporary) for each in batches(operations, BATCH_BYTES)]
                run_all(pool, files, tasks)
                merging = (partial(_merge_block, job, files, block, temporary, shard, progress) for block in blocks)
                written = run_all(pool, files, merging)
            target.sync(shard.name)
            copies = [copy for each in copied for copy in each.copies]
            lists = in_batches(copies, lambda copy: copy.target.rows * copy.target.cols * 2)
            run_all(pool, files, (partial(checker.check, each, temporary, shard) for each in lists))
            run_all(pool, files, (partial(_check_block, files, temporary, *each[:2], progress) for each in written))
            for _, _, found in written:
                for name, role, survival in found:
                    matrices.setdefault(name, (role, Survival()))[1].add(survival)
            if read_header(temporary).raw != shard.header:
                raise CheckpointError(f"{temporary} does not have the header that was written to it")
            files.close(temporary)
            target.publish(shard.name)
    return matrices


@dataclass(frozen=True)
class _Block:
    """A contiguous part of an output that is computed at once: the matrices of one expert, or rows of one matrix."""

    output: Output
    start: int
    size: int
    items: tuple[Item, ...]
    rows: tuple[int, int] | None = None
    replaced: str | None = None


def _blocks(job: Job, output: Output) -> Iterator[_Block]:
    name = output.name
    if name in job.plan.replaced:
        size = int(np.prod(output.shape))
        items = tuple(job.plan.merged.get(name, ()))
        yield _Block(output, 0, size, items, replaced=job.plan.replaced[name])
        return
    by_expert: dict[int, list[Item]] = {}
    for item in job.plan.merged.get(name, ()):
        by_expert.setdefault(item.expert, []).append(item)
    for items in by_expert.values():
        target = items[0].target
        start, size = min(item.target.offset for item in items), sum(i.target.rows * i.target.cols for i in items)
        if len(items) == 1 and target.row_stride == target.cols and size > CHUNK_ELEMENTS:
            step = max(1, CHUNK_ELEMENTS // target.cols)
            for low in range(0, target.rows, step):
                high = min(low + step, target.rows)
                yield _Block(output, start + low * target.cols, (high - low) * target.cols, tuple(items), (low, high))
            continue
        last = max(
            i.target.offset + (i.target.rows - 1) * i.target.row_stride + (i.target.cols - 1) * i.target.col_stride
            for i in items
        )
        if last - start + 1 != size:
            raise CheckpointError(f"{name}: the matrices of expert {items[0].expert} do not lie together")
        yield _Block(output, start, size, tuple(items))


Found = list[tuple[str, str, Survival]]


def _merge_block(
    job: Job, files: Files, block: _Block, temporary: Path, shard: Shard, progress: Progress
) -> tuple[Place, str, Found]:
    """Compute and write a block; returns where it lies, its digest, and what survived by matrix."""
    output, found = block.output, Found()
    item_bytes = DTYPE_BITS[output.dtype] // 8
    data = np.empty(block.size, UNSIGNED[item_bytes])
    saved = _replacement(job, block) if block.replaced else None
    if saved is not None and not block.items:
        data[...] = saved.reshape(-1)
    for item in block.items:
        low, high = block.rows or (0, item.target.rows)
        source = job.checkpoint.tensors[item.source.tensor]
        lies = place(item.source, source, *locate(job.checkpoint, source.name))
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
    return Place(temporary, at, 1, len(view), len(view), 1, 1), state.hexdigest(), found


def _replacement(job: Job, block: _Block) -> np.ndarray[Any, Any]:
    """A whole tensor of the adapter, in the base's dtype."""
    assert block.replaced is not None
    mine, bits = job.adapter.tensors[block.replaced], job.adapter.read(block.replaced)
    if mine.dtype == block.output.dtype:
        return bits
    values = to_floats(bits, mine.dtype)
    result = to_bits(values, block.output.dtype)
    if not np.isfinite(to_floats(result, block.output.dtype)).all():
        raise CheckpointError(f"{mine.name} has values that are not finite in {block.output.dtype}")
    return result


def _check_block(files: Files, temporary: Path, lies: Place, written: str, progress: Callable[..., None]) -> None:
    if digest(files, lies, partial(progress, "check")) != written:
        raise MismatchError(
            f"{temporary}: {lies.num_bytes} bytes at {lies.at} are not what was written",
            "the disk or the memory is at fault",
        )
