"""What a conversion is: the choices, the plan down to the bytes, what was done; whether a directory has it already."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from moe_accel.convert.copy import Files
from moe_accel.convert.dequantize import Dequantization
from moe_accel.convert.headers import parse_json, read_header
from moe_accel.convert.lower import Operation
from moe_accel.convert.manifest import make_manifest
from moe_accel.convert.regions import Part, Plan, Region, Tensor
from moe_accel.convert.shards import INDEX, Shard, make_index
from moe_accel.convert.source import MANIFEST, Checkpoint
from moe_accel.convert.verify import Checker, MismatchError
from moe_accel.convert.work import Progress, default_threads, workers
from moe_accel.errors import CheckpointError, ConfigError

VERIFY_LEVELS = ("none", "header", "full")


@dataclass(frozen=True)
class Options:
    """What the user may choose."""

    to: str
    family: Path | None = None
    max_shard_bytes: int = 5_000_000_000
    verify: str = "full"
    overwrite: bool = False
    threads: int = field(default_factory=default_threads)
    dequantize: str | None = None

    def __post_init__(self) -> None:
        if self.verify not in VERIFY_LEVELS:
            raise ConfigError(f"verify={self.verify!r} must be one of {', '.join(VERIFY_LEVELS)}")
        if self.threads < 1:
            raise ConfigError(f"threads={self.threads} must be at least 1")


@dataclass(frozen=True)
class Job:
    """A conversion that can begin."""

    checkpoint: Checkpoint
    target: Path
    options: Options
    plan: Plan
    shards: list[Shard]
    operations: dict[str, list[Operation]]
    find_parts: Callable[[], tuple[list[Part], list[Part]]]
    plan_id: str
    dequantization: Dequantization | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of tensors to write."""
        return sum(shard.file_bytes - len(shard.header) for shard in self.shards)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What will be written, by name."""
        return {each.name: Tensor(each.name, each.dtype, each.shape) for each in self.plan.outputs}


@dataclass(frozen=True)
class Report:
    """What was done."""

    job: Job
    written: tuple[str, ...]
    kept: tuple[str, ...]
    num_digests: int
    seconds: float


def is_whole(file: Path, shard: Shard) -> bool:
    """Whether a file is one of the plan, to the last byte; what the bytes are, nobody looked."""
    if not file.exists():
        return False
    with suppress(CheckpointError):
        return read_header(file).raw == shard.header and file.stat().st_size == shard.file_bytes
    return False


def manifest(job: Job, found: list[Part], digests: dict[Region, str]) -> bytes:
    """The manifest of what was written."""
    files = {shard.name: shard.file_bytes for shard in job.shards}
    said = job.dequantization.record if job.dequantization else None
    return make_manifest(job.plan_id, job.options.to, files, job.tensors, found, digests, said)


def index(job: Job) -> bytes | None:
    """The index; None where there is one file."""
    return make_index(job.shards, job.checkpoint.index_metadata) if len(job.shards) > 1 else None


def is_finished(job: Job) -> bool:
    """Whether an earlier run of this very job came to its end, and left the digests that a full check needs."""
    names = {MANIFEST, *job.checkpoint.others} | ({INDEX} if index(job) else set())
    if not all((job.target / name).is_file() for name in names):
        return False
    with suppress(CheckpointError, OSError):
        found = parse_json(job.target / MANIFEST, (job.target / MANIFEST).read_bytes(), "the manifest")
        enough = "digest" in found or job.options.verify != "full"
        return (
            found.get("plan_id") == job.plan_id and enough and all(is_whole(job.target / x.name, x) for x in job.shards)
        )
    return False


def check_finished(job: Job, progress: Progress) -> dict[Region, str]:
    """Compare a finished directory with the digests in its manifest, where a full check is wanted.

    Raises:
        MismatchError: it is not what was written.
    """
    if job.options.verify != "full":
        return {}
    files = Files()
    checker, found = Checker(files, job.checkpoint, partial(progress, "check")), job.find_parts()[1]
    with workers(job.options.threads, files) as pool:
        digests = checker.all_digests(pool, job.target, job.shards, found)
    if manifest(job, found, digests) != (job.target / MANIFEST).read_bytes():
        raise MismatchError(
            f"{job.target} is not what was written: its tensors do not have the digests of {MANIFEST}",
            f"it was damaged after it was written: remove {job.target} and run the same command again",
        )
    return digests
