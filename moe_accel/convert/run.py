"""A conversion from first to last: read headers, plan, copy, check, publish.

prepare    headers -> plan -> shards -> operations on bytes; nothing is written, all that can be wrong is found
execute    claim the directory; each shard: copy, sync, check, rename; then manifest and index
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from moe_accel import garbage
from moe_accel.convert.copy import Copier, Files, Stopped
from moe_accel.convert.dequantize import plan_dequantization
from moe_accel.convert.digest import new_digest
from moe_accel.convert.headers import Header, read_header
from moe_accel.convert.job import Job, Options, Report, check_finished, index, is_finished, is_whole, manifest
from moe_accel.convert.layout import load_families
from moe_accel.convert.lower import Operation, Run, batches, coalesce, lower_output
from moe_accel.convert.plan import make_plan
from moe_accel.convert.plan import parts as parts_of
from moe_accel.convert.quantized import block_size
from moe_accel.convert.regions import Part, Plan, Region, Tensor
from moe_accel.convert.shards import INDEX, Shard, pack
from moe_accel.convert.source import MANIFEST, Checkpoint, open_checkpoint
from moe_accel.convert.target import Target, refuse_overlap, writing
from moe_accel.convert.verify import Checker, Due, MismatchError, copy_bytes
from moe_accel.convert.work import BATCH_BYTES, Progress, in_batches, in_order, silent, workers
from moe_accel.errors import CheckpointError
from moe_accel.version import VERSION


def prepare(source: Path, target: Path, options: Options) -> Job:
    """Plan a conversion down to the bytes. Reads headers only, writes nothing.

    Raises:
        CheckpointError: the checkpoint is damaged, or cannot take that layout exactly.
        ConfigError: an option or a family file is wrong.
    """
    refuse_overlap(source, target)
    # Planning makes a few objects a tensor and drops none: looking for garbage among them doubles the time.
    with garbage.left_alone():
        return _prepare(source, target, options)


def _prepare(source: Path, target: Path, options: Options) -> Job:
    checkpoint = open_checkpoint(source)
    lossy = plan_dequantization(checkpoint, target, options.dequantize) if options.dequantize else None
    checkpoint = lossy.checkpoint if lossy else checkpoint
    families = load_families(options.family)
    rows, _ = block_size(checkpoint.config) or (None, None)
    kind, count = checkpoint.model_type, checkpoint.num_experts
    plan = make_plan(checkpoint.tensors, options.to, families, kind, count, scale_rows=rows)

    def find_parts() -> tuple[list[Part], list[Part]]:
        written = {each.name: Tensor(each.name, each.dtype, each.shape) for each in plan.outputs}
        both = (checkpoint.tensors, written)
        with garbage.left_alone():
            before, after = (list(parts_of(tensors, families, checkpoint.model_type)) for tensors in both)
        return before, after

    return replace(make_job(checkpoint, target, options, plan, find_parts), dequantization=lossy)


def make_job(
    checkpoint: Checkpoint,
    target: Path,
    options: Options,
    plan: Plan,
    find_parts: Callable[[], tuple[list[Part], list[Part]]],
) -> Job:
    """A job of a plan: shards, operations on bytes, plan id.

    `find_parts` gives the parts of the source and of what will be written; it is called when they are checked.
    """
    shards = pack(plan.outputs, options.max_shard_bytes, checkpoint.metadata)
    lowered = {shard.name: lower_shard(checkpoint, shard) for shard in shards}
    name = plan_id(checkpoint, options.to, options.max_shard_bytes, options.family, shards)
    return Job(checkpoint, target, options, plan, shards, lowered, find_parts, name)


def locate(checkpoint: Checkpoint, tensor: str) -> tuple[Path, int]:
    """File and first byte of a tensor."""
    header = checkpoint.header_of(tensor)
    return header.file, header.starts[tensor]


def lower_shard(checkpoint: Checkpoint, shard: Shard) -> list[Operation]:
    """What writes the data of one file, in the order of its bytes."""
    sources, where = checkpoint.tensors, partial(locate, checkpoint)
    return coalesce(op for out in shard.outputs for op in lower_output(out, shard.starts[out.name], sources, where))


def plan_id(
    checkpoint: Checkpoint, to: str | None, max_shard_bytes: int, family: Path | None, shards: Iterable[Shard]
) -> str:
    """Equal for two runs that would write the same bytes from files that nobody touched in between."""
    state = hashlib.sha256(f"{VERSION} {to} {max_shard_bytes}".encode())
    checkpoint.identify(state)
    if family is not None:
        state.update(family.read_bytes())
    for shard in shards:
        state.update(shard.name.encode() + shard.header)
    return state.hexdigest()[:16]


def execute(job: Job, progress: Progress = silent) -> Report:
    """Write, check and publish what `job` says. After an error or a kill, the same job goes on from there.

    Raises:
        CheckpointError: the target cannot be written, or a source file changed meanwhile.
        MismatchError: what was written is not what was read.
    """
    start = time.perf_counter()
    target = Target(job.target, job.plan_id)
    target.lock()
    try:
        checkpoint, lossy, last = job.checkpoint, job.dequantization, index(job)
        names = file_sizes(checkpoint, job.shards, last)
        target.claim(names, job.options.overwrite)
        if lossy and is_finished(job):  # the bf16 files are gone: nothing else could be compared
            digests = check_finished(job, progress)
            lossy.remove()
            kept = tuple(shard.name for shard in job.shards)
            return Report(job, (), kept, len(digests), time.perf_counter() - start)
        if lossy:
            lossy.write(job.options.threads, job.options.verify == "full", _missing_bytes(job, names), progress)
        for name in checkpoint.others:
            target.copy_in(checkpoint.other(name), name)
        parts = job.find_parts() if job.options.verify == "full" else ([], [])
        kept, digests = _write_shards(job, target, parts, progress)
        target.write(MANIFEST, manifest(job, parts[1], digests))
        if last:
            target.write(INDEX, last)
        if lossy:
            lossy.remove()
    finally:
        target.unlock()
    written = tuple(shard.name for shard in job.shards if shard.name not in kept)
    return Report(job, written, tuple(kept), len(digests), time.perf_counter() - start)


def check_target(job: Job) -> None:
    """Refuse what `execute` would refuse before it writes, and change nothing: for a dry run.

    Raises:
        CheckpointError: as `execute` does.
    """
    names, lossy = file_sizes(job.checkpoint, job.shards, index(job)), job.dequantization
    Target(job.target, job.plan_id).check(names, job.options.overwrite)
    if lossy and not is_finished(job):
        lossy.check_space(_missing_bytes(job, names))


def file_sizes(checkpoint: Checkpoint, shards: Iterable[Shard], last: bytes | None) -> dict[str, int]:
    """Every file that is written but the manifest, and its bytes; `last` is the index, if there is to be one."""
    names = {shard.name: shard.file_bytes for shard in shards}
    names |= {name: _size(checkpoint.folder / name) for name in checkpoint.others}
    return names | ({INDEX: len(last)} if last else {})


def _missing_bytes(job: Job, names: Mapping[str, int]) -> int:
    return sum(size for name, size in names.items() if not (job.target / name).exists())


def _size(file: Path) -> int:
    with suppress(OSError):
        return file.stat().st_size
    return 0


def _write_shards(
    job: Job, target: Target, parts: tuple[list[Part], list[Part]], progress: Progress
) -> tuple[list[str], dict[Region, str]]:
    files = Files()
    copier = Copier(files, partial(progress, "copy"), new_digest if job.options.verify == "full" else None)
    checker = Checker(files, job.checkpoint, partial(progress, "check"), copier.seen)
    kept: list[str] = []
    unfinished: set[str] = set()
    finishing: list[Future[None]] = []
    try:
        with (
            workers(job.options.threads, files) as pool,
            ThreadPoolExecutor(1) as mover,
            ThreadPoolExecutor(1) as finisher,
        ):
            try:
                for shard in job.shards:
                    if is_whole(job.target / shard.name, shard):
                        kept.append(shard.name)
                        progress("copy", shard.file_bytes - len(shard.header))
                        _check_kept(pool, checker, job, shard)
                        continue
                    unfinished.add(shard.name)
                    checks = _copy_shard((mover, pool), copier, checker, job, target, shard)
                    finishing.append(finisher.submit(_finish, checks, checker, job, target, shard, unfinished))
                    _raise_first(finishing[:-1])
                _raise_first(finishing, wait=True)
                digests = _check_all(pool, checker, job, parts)
            except BaseException:
                files.stop.set()  # before the finisher is waited for
                raise
    except BaseException as error:
        for name in unfinished:
            with suppress(OSError):
                target.temporary(name).unlink()
        if isinstance(error, Stopped):
            _raise_first(finishing, wait=True)
        raise
    return kept, digests


def _check_kept(pool: ThreadPoolExecutor, checker: Checker, job: Job, shard: Shard) -> None:
    if job.options.verify != "full":
        return
    file = job.target / shard.name
    with checking_kept(file):
        checker.check_copies(pool, file, shard)


@contextmanager
def checking_kept(file: Path) -> Iterator[None]:
    """Say of a file of an earlier run that is not what was written what to do about it."""
    try:
        yield
    except MismatchError as error:
        hint = f"{file} was damaged after it was written: remove it and run the same command again"
        raise MismatchError(error.message, hint) from error


def _check_all(
    pool: ThreadPoolExecutor, checker: Checker, job: Job, parts: tuple[list[Part], list[Part]]
) -> dict[Region, str]:
    """What can be said only when everything is written; if it is not as it should be, nothing stays published."""
    try:
        check_unchanged(job.checkpoint.headers.values())
        if job.options.verify != "full":
            return {}
        digests = checker.all_digests(pool, job.target, job.shards, parts[1])
        checker.check_parts(*parts, digests)
        return digests
    except CheckpointError:
        for shard in job.shards:
            with suppress(OSError):
                (job.target / shard.name).unlink()
        raise


def _raise_first(futures: list[Future[None]], wait: bool = False) -> None:
    """Raise what went wrong in one of them, if something did; what stopped the others counts before their stopping."""
    failures = [error for each in futures if (wait or each.done()) and (error := each.exception())]
    for error in sorted(failures, key=lambda each: isinstance(each, Stopped)):
        raise error


def _copy_shard(
    pools: tuple[ThreadPoolExecutor, ThreadPoolExecutor],
    copier: Copier,
    checker: Checker,
    job: Job,
    target: Target,
    shard: Shard,
) -> list[Future[None]]:
    """Write one file under its temporary name; what is whole is checked meanwhile, by the tasks that are returned.

    `pools`: one thread for what the kernel copies, as it locks the file anyway; several for what passes through
    buffers, and for checks.
    """
    temporary = target.create(shard.name, shard.header, shard.file_bytes)

    def needed_bytes() -> int:
        done = sum(each.file_bytes for each in job.shards if (job.target / each.name).exists())
        return sum(each.file_bytes for each in job.shards) - done

    def execute_batch(batch: list[Operation], following: list[Operation]) -> int:
        copier.expect(following)
        with writing(temporary, needed_bytes):
            copier.execute(batch, temporary)
        return sum(op.num_bytes for op in batch)

    mover, pool = pools
    lists = batches(job.operations[shard.name], BATCH_BYTES)
    tasks = (partial(execute_batch, *both) for both in zip(lists, [*lists[1:], []], strict=True))
    only_runs = all(isinstance(op, Run) for op in job.operations[shard.name])
    copied = in_order(mover if only_runs else pool, copier.files, tasks, ahead=1 if only_runs else job.options.threads)
    due, end, checks = Due(shard), len(shard.header), []
    with target.sync_meanwhile(shard.name) if only_runs else nullcontext():
        for num_bytes in copied:
            end += num_bytes
            ready = due.until(end) if job.options.verify == "full" else []
            checks += [pool.submit(checker.check, each, temporary, shard) for each in in_batches(ready, copy_bytes)]
    if job.options.verify == "full":
        checks.append(pool.submit(checker.check, due.all(), temporary, shard))
    return checks


def _finish(
    checks: list[Future[None]], checker: Checker, job: Job, target: Target, shard: Shard, unfinished: set[str]
) -> None:
    """Sync and publish one file when its checks have ended well; the next is being copied meanwhile."""
    temporary = target.temporary(shard.name)
    try:
        if checker.files.stop.is_set():  # no waiting for the disk, if nothing is published
            raise Stopped
        target.sync(shard.name)
        if job.options.verify != "none" and read_header(temporary).raw != shard.header:
            raise CheckpointError(f"{temporary} does not have the header that was written to it")
        _raise_first(checks, wait=True)
    except BaseException:
        checker.files.stop.set()
        raise
    checker.files.close(temporary)
    target.publish(shard.name)
    unfinished.discard(shard.name)


def check_unchanged(headers: Iterable[Header]) -> None:
    """Refuse what was read from files that somebody wrote to meanwhile."""
    for header in headers:
        try:
            now = os.stat(header.file)
        except OSError as error:
            raise CheckpointError(f"{header.file} vanished while it was read: {error.strerror}") from error
        if (now.st_size, now.st_mtime_ns) != (header.file_bytes, header.mtime_ns):
            raise CheckpointError(
                f"{header.file} changed while it was read", "run the same command into an empty directory"
            )
