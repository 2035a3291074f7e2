"""A LoRA adapter added to its base, file by file: what is not adapted is copied, the rest passes once through fp32.

At most `threads` matrices are in memory, and the factors of a few layers. Files get their names when they are whole and
read back, the index comes last, as in a conversion. Before a file gets its name, a note beside it says what was
computed for it (digests, and what survived): a merge that was stopped goes on from there, and checks what it keeps.
"""

import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from moe_accel.adapters.dialect import NOTHING_SAID
from moe_accel.adapters.dialect import Options as AdapterOptions
from moe_accel.adapters.merge_blocks import Sources, blocks_of, merge_block
from moe_accel.adapters.merge_plan import MergePlan, plan_merge
from moe_accel.adapters.numbers import Survival
from moe_accel.adapters.source import Adapter, open_adapter
from moe_accel.convert.copy import Copier, Files
from moe_accel.convert.digest import digest
from moe_accel.convert.headers import parse_json, read_header
from moe_accel.convert.job import is_whole
from moe_accel.convert.layout import load_families
from moe_accel.convert.lower import Place, batches, coalesce, lower_output
from moe_accel.convert.regions import Output
from moe_accel.convert.run import check_unchanged, checking_kept, file_sizes, locate, plan_id
from moe_accel.convert.shards import INDEX, Shard, make_index, pack
from moe_accel.convert.source import MANIFEST, Checkpoint, open_checkpoint
from moe_accel.convert.target import Target, refuse_overlap, writing
from moe_accel.convert.verify import Checker, MismatchError, copy_bytes
from moe_accel.convert.work import BATCH_BYTES, Progress, default_threads, in_batches, run_all, silent, workers
from moe_accel.errors import CheckpointError

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
    """What was done, and what an earlier run had done. `roles`: how much of the adapter survived rounding, by role.

    `total`: of all.
    """

    job: Job
    written: tuple[str, ...]
    kept: tuple[str, ...]
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
    same = plan_id(checkpoint, options.to, options.max_shard_bytes, options.family, shards)
    state = hashlib.sha256(f"merge {same} {options.adapter}".encode())
    state.update(opened.header.raw + f"{opened.header.file_bytes} {opened.header.mtime_ns}".encode())
    state.update(json.dumps(opened.config.raw, sort_keys=True).encode())
    return Job(checkpoint, opened, target, options, plan, shards, state.hexdigest()[:16])


def execute(job: Job, progress: Progress = silent) -> Report:
    """Write the merged checkpoint. After an error or a kill, the same job goes on from the files that are whole.

    Raises:
        CheckpointError: the target cannot be written, or a merged value is not finite; or a source changed meanwhile,
            or the whole adapter was lost to rounding: then no file of weights stays.
        MismatchError: what is read back is not what was written.
    """
    start = time.perf_counter()
    target, checkpoint, index = Target(job.target, job.plan_id), job.checkpoint, _index(job)
    target.lock()
    try:
        target.claim(file_sizes(checkpoint, job.shards, index), job.options.overwrite)
        for name in checkpoint.others:
            target.copy_in(checkpoint.other(name), name)
        kept, done = _write(job, target, progress)
        try:
            roles, total = _sum(job, done)
            check_unchanged([*checkpoint.headers.values(), job.adapter.header])
        except CheckpointError:
            for shard in job.shards:
                (job.target / shard.name).unlink(missing_ok=True)
            raise
        target.write(MANIFEST, _manifest(job, roles, total, done))
        if index:
            target.write(INDEX, index)
        target.remove_temporaries()
    finally:
        target.unlock()
    written = tuple(shard.name for shard in job.shards if shard.name not in kept)
    return Report(job, written, tuple(kept), roles, total, time.perf_counter() - start)


def check_target(job: Job) -> None:
    """Refuse what `execute` would refuse before it writes, and change nothing: for a dry run.

    Raises:
        CheckpointError: as `execute` does.
    """
    sizes = file_sizes(job.checkpoint, job.shards, _index(job))
    Target(job.target, job.plan_id).check(sizes, job.options.overwrite)


def _index(job: Job) -> bytes | None:
    return make_index(job.shards, job.checkpoint.index_metadata) if len(job.shards) > 1 else None


@dataclass
class _Done:
    """What was computed for a file: first byte, number and digest of every block, and what survived by matrix."""

    blocks: list[tuple[int, int, str]] = field(default_factory=list)
    matrices: dict[str, tuple[str, Survival]] = field(default_factory=dict)

    @property
    def record(self) -> dict[str, Any]:
        """For a note and the manifest."""
        matrices = {name: [role, list(vars(found).values())] for name, (role, found) in self.matrices.items()}
        return {"blocks": self.blocks, "matrices": matrices}

    @staticmethod
    def of(record: dict[str, Any]) -> "_Done":
        """The other way."""
        blocks = [(int(at), int(size), str(found)) for at, size, found in record["blocks"]]
        return _Done(blocks, {name: (role, Survival(*sums)) for name, (role, sums) in record["matrices"].items()})


def _known(job: Job, target: Target, shard: Shard) -> _Done | None:
    """What an earlier run of the same plan computed for a file that is whole; None where it has to be written."""
    if not is_whole(job.target / shard.name, shard):
        return None
    note, manifest = target.temporary(_note_of(shard)), job.target / MANIFEST
    with suppress(CheckpointError, OSError, LookupError, TypeError, ValueError):
        if note.exists():
            return _Done.of(parse_json(note, note.read_bytes(), "the note"))
        found = parse_json(manifest, manifest.read_bytes(), "the manifest")
        return _Done.of(found["written"][shard.name]) if found["plan_id"] == job.plan_id else None
    return None


def _note_of(shard: Shard) -> str:
    return f"{shard.name}.merged"


def _sum(job: Job, done: dict[str, _Done]) -> tuple[dict[str, Survival], Survival]:
    """By role and of all; every planned matrix must have been merged."""
    matrices = {name: found for each in done.values() for name, found in each.matrices.items()}
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


def _manifest(job: Job, roles: dict[str, Survival], total: Survival, done: dict[str, _Done]) -> bytes:
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
        "written": {name: each.record for name, each in done.items()},
    }
    return (json.dumps(record, indent=1) + "\n").encode()


def _write(job: Job, target: Target, progress: Progress) -> tuple[list[str], dict[str, _Done]]:
    """Every file that is not there; returns the names of those that were, and what was computed for each."""
    files = Files()
    checker = Checker(files, job.checkpoint, partial(progress, "check"))
    copier = Copier(files, partial(progress, "copy"))
    kept, done = list[str](), dict[str, _Done]()
    with workers(job.options.threads, files) as pool:
        for shard in job.shards:
            file, found = job.target / shard.name, _known(job, target, shard)
            if found is not None:
                with checking_kept(file):
                    _check(job, pool, checker, shard, found, file)
                progress("copy", shard.file_bytes - len(shard.header))
                kept.append(shard.name)
            else:
                try:
                    found = _write_shard(job, pool, copier, checker, target, shard, progress)
                except BaseException:
                    with suppress(OSError):
                        target.temporary(shard.name).unlink()
                    raise
            done[shard.name] = found
    return kept, done


def _copied(job: Job, shard: Shard) -> list[Output]:
    return [each for each in shard.outputs if each.name not in {*job.plan.merged, *job.plan.replaced}]


def _write_shard(
    job: Job,
    pool: ThreadPoolExecutor,
    copier: Copier,
    checker: Checker,
    target: Target,
    shard: Shard,
    progress: Progress,
) -> _Done:
    """Write, check and publish one file."""
    files, tensors, where = copier.files, job.checkpoint.tensors, partial(locate, job.checkpoint)
    temporary = target.create(shard.name, shard.header, shard.file_bytes)
    lowered = (lower_output(each, shard.starts[each.name], tensors, where) for each in _copied(job, shard))
    operations = coalesce(op for of in lowered for op in of)
    blocks = [block for each in shard.outputs for block in blocks_of(job.plan, each)]
    with writing(temporary), target.sync_meanwhile(shard.name):
        run_all(pool, files, [partial(copier.execute, each, temporary) for each in batches(operations, BATCH_BYTES)])
        sources = Sources(job.checkpoint, job.adapter)
        merging = (partial(merge_block, sources, files, block, temporary, shard, progress) for block in blocks)
        merged = run_all(pool, files, merging)
    target.sync(shard.name)
    done = _Done([block for block, _ in merged])
    for name, role, survival in (each for _, found in merged for each in found):
        done.matrices.setdefault(name, (role, Survival()))[1].add(survival)
    _check(job, pool, checker, shard, done, temporary)
    if read_header(temporary).raw != shard.header:
        raise CheckpointError(f"{temporary} does not have the header that was written to it")
    target.note(_note_of(shard), json.dumps(done.record).encode())
    target.publish(shard.name)
    return done


def _check(job: Job, pool: ThreadPoolExecutor, checker: Checker, shard: Shard, done: _Done, file: Path) -> None:
    """Compare a file with the base where it is a copy, and elsewhere with what was computed."""
    copies = [copy for each in _copied(job, shard) for copy in each.copies]
    lists = in_batches(copies, copy_bytes)
    run_all(pool, checker.files, (partial(checker.check, each, file, shard) for each in lists))
    run_all(pool, checker.files, (partial(_check_block, checker, file, *block) for block in done.blocks))
    checker.files.close(file)


def _check_block(checker: Checker, file: Path, at: int, num_bytes: int, written: str) -> None:
    if digest(checker.files, Place(file, at, 1, num_bytes, num_bytes, 1, 1), checker.read) != written:
        raise MismatchError(
            f"{file}: {num_bytes} bytes at {at} are not what was written", "the disk or the memory is at fault"
        )
