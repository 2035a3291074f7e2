"""Proof that two places hold the same bits: the copies of a conversion, or two directories in any layouts."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moe_accel.convert.copy import Files
from moe_accel.convert.digest import digest, digest_both_ways
from moe_accel.convert.headers import DTYPE_BITS, num_bytes
from moe_accel.convert.layout import load_families
from moe_accel.convert.lower import Place, is_plain, place
from moe_accel.convert.manifest import other_tensors, part_key
from moe_accel.convert.plan import parts
from moe_accel.convert.regions import BESIDE, Copy, Part, Region, Tensor, whole
from moe_accel.convert.shards import Shard, natural
from moe_accel.convert.source import Checkpoint, open_checkpoint
from moe_accel.convert.work import Progress, default_threads, in_batches, run_all, silent, workers
from moe_accel.errors import CheckpointError


class MismatchError(CheckpointError):
    """What was written is not what was read."""


class Due:
    """The copies of a shard in the order in which they are whole, when the file is written from its first byte on."""

    def __init__(self, shard: Shard) -> None:
        found = []
        for output in shard.outputs:
            start, bits = shard.starts[output.name], DTYPE_BITS[output.dtype]
            for copy in output.copies:
                to = copy.target
                last = to.offset + (to.rows - 1) * to.row_stride + (to.cols - 1) * to.col_stride
                found.append((start + ((last + 1) * bits + 7) // 8, copy))
        self._left = deque(sorted(found, key=lambda pair: pair[0]))

    def all(self) -> list[Copy]:
        """Every copy that was not handed out."""
        left = [copy for _, copy in self._left]
        self._left.clear()
        return left

    def until(self, end: int) -> list[Copy]:
        """The copies whose last byte lies before byte `end` of the file and that were not handed out."""
        found = []
        while self._left and self._left[0][0] <= end:
            found.append(self._left.popleft()[1])
        return found


def copy_bytes(copy: Copy) -> int:
    """About the bytes of a copy: its elements at two bytes each."""
    return copy.target.rows * copy.target.cols * 2


class Checker:
    """Digests copies on both sides. Keeps the digests by region, so that nothing is read a second time.

    `seen`: digests of places of the source that copying had in memory, in the order of the file.
    """

    def __init__(
        self,
        files: Files,
        checkpoint: Checkpoint,
        read: Callable[[int], None] = lambda num_bytes: None,
        seen: dict[Place, str] | None = None,
    ) -> None:
        self.files, self.checkpoint, self.read = files, checkpoint, read
        self.seen = {} if seen is None else seen
        self.sources: dict[Region, str] = {}
        self.targets: dict[Region, str] = {}
        self._lock = threading.Lock()

    def check_copies(self, pool: ThreadPoolExecutor, file: Path, shard: Shard) -> None:
        """Compare each copy of `shard`, written to `file`, with its source.

        Raises:
            MismatchError: they differ.
        """
        lists = in_batches(Due(shard).all(), copy_bytes)
        run_all(pool, self.files, (partial(self.check, each, file, shard) for each in lists))
        self.files.close(file)

    def check(self, copies: list[Copy], file: Path, shard: Shard) -> None:
        """Compare some copies of `shard`, as `check_copies`.

        They are compared in the order in which the source has them: what copying saw of it counts, all else is read.
        """
        tensors = {each.name: Tensor(each.name, each.dtype, each.shape) for each in shard.outputs}
        for copy in copies:
            before, name = self._source(copy.source), copy.target.tensor
            after = place(copy.target, tensors[name], file, shard.starts[name])
            source, past_cache = self.seen.pop(before.in_file_order, None), not is_plain(copy)
            if source is None:
                source = digest(self.files, before.in_file_order, self.read)
            else:
                self.read(before.num_bytes)
            if before.lies_turned:
                canonical, target = digest_both_ways(self.files, after, self.read, past_cache)
            else:
                canonical = target = digest(self.files, after, self.read, past_cache)
            if source != target:
                raise MismatchError(
                    f"{file}: tensor {copy.target.tensor!r} is not what was read from {copy.source.tensor!r}: "
                    f"{copy.target} has digest {target}, {copy.source} has {source}",
                    "the disk or the memory is at fault, or somebody wrote to one of the files; convert again",
                )
            with self._lock:  # equal in one order is equal in the other
                self.sources[copy.source] = self.targets[copy.target] = canonical

    def digest_source(self, region: Region) -> str:
        """The digest of a part of the checkpoint."""
        return digest(self.files, self._source(region), self.read)

    def _source(self, region: Region) -> Place:
        header = self.checkpoint.header_of(region.tensor)
        return place(region, header.tensors[region.tensor], header.file, header.starts[region.tensor])

    def _digest(self, region: Region, tensor: Tensor, file: Path, start: int) -> str:
        return digest(self.files, place(region, tensor, file, start), self.read)

    def all_digests(
        self, pool: ThreadPoolExecutor, folder: Path, shards: Iterable[Shard], found: list[Part]
    ) -> dict[Region, str]:
        """Digests of all parts and of all tensors that are no parts, of published files; most are known already."""
        tensors, where = {}, {}
        for shard in shards:
            for each in shard.outputs:
                tensors[each.name] = Tensor(each.name, each.dtype, each.shape)
                where[each.name] = (folder / shard.name, shard.starts[each.name])
        known = {_key(region): value for region, value in self.targets.items()}
        wanted = [part.region for part in found] + [whole(each) for each in other_tensors(tensors, found)]
        result = {region: known[_key(region)] for region in wanted if _key(region) in known}
        missing = [region for region in wanted if region not in result]

        def compute(regions: list[Region]) -> list[str]:
            return [self._digest(region, tensors[region.tensor], *where[region.tensor]) for region in regions]

        lists = in_batches(missing, lambda region: region.rows * region.cols * 2)
        values = run_all(pool, self.files, (partial(compute, each) for each in lists))
        return result | dict(zip(missing, (value for each in values for value in each), strict=True))

    def check_parts(self, sources: list[Part], targets: list[Part], digests: Mapping[Region, str]) -> None:
        """Compare what the layouts call one expert's matrix, before and after: the plan itself is under test here.

        Raises:
            MismatchError: an expert is another expert now, or is gone.
        """
        known = {_key(region): value for region, value in self.sources.items()}
        after = {part_key(part): digests[part.region] for part in targets}
        before = {part_key(part): known.get(_key(part.region)) for part in sources}
        for key in sorted(set(before) | set(after)):
            if key not in before or key not in after or before[key] not in (None, after[key]):
                raise MismatchError(
                    f"{_name(tuple(map(str, key)))} is not the same matrix in source and target: "
                    f"digest {before.get(key, 'missing')} and {after.get(key, 'missing')}"
                )


def _key(region: Region) -> tuple[str, int, int, int, int, int]:
    """Equal for regions that list the same elements in the same order."""
    rows, cols, row_stride, col_stride = region.rows, region.cols, region.row_stride, region.col_stride
    if cols == 1:
        rows, cols, row_stride, col_stride = 1, rows, 0, row_stride
    elif row_stride == cols * col_stride or rows == 1:
        rows, cols, row_stride = 1, rows * cols, 0
    return region.tensor, region.offset, rows, cols, row_stride, col_stride if cols > 1 else 1


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two directories, compared. `differences` are sentences, in natural order, all of them."""

    num_parts: int
    num_tensors: int
    num_bytes: int
    differences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Side:
    checkpoint: Checkpoint
    items: dict[tuple[str, ...], Region]

    def what(self, key: tuple[str, ...]) -> tuple[str, tuple[int, ...]]:
        region = self.items[key]
        tensor = self.checkpoint.tensors[region.tensor]
        return tensor.dtype, tensor.shape if len(key) == 1 else (region.rows, region.cols)


def compare(
    first: Path, second: Path, family: Path | None = None, threads: int | None = None, progress: Progress = silent
) -> Comparison:
    """Compare two checkpoints: experts by layer, number and role whatever their layout, all else by name.

    Raises:
        CheckpointError: one of them is damaged.
    """
    families = load_families(family)
    sides = []
    for folder in (first, second):
        checkpoint = open_checkpoint(folder)
        found = list(parts(checkpoint.tensors, families, checkpoint.model_type))
        items = {tuple(map(str, part_key(part))): part.region for part in found}
        items |= {(each.name,): whole(each) for each in other_tensors(checkpoint.tensors, found)}
        sides.append(_Side(checkpoint, items))
    a, b = sides
    differences: dict[tuple[str, ...], str] = {}
    same = []
    for key in a.items.keys() | b.items.keys():
        if key not in a.items or key not in b.items:
            differences[key] = f"{_name(key)}: only in {first if key in a.items else second}"
        elif a.what(key) != b.what(key):
            differences[key] = "{}: {} {} and {} {}".format(
                _name(key), *(x for s in sides for x in (s.what(key)[0], list(s.what(key)[1])))
            )
        else:
            same.append(key)
    differences |= _compare_bits(a, b, sorted(same), threads or default_threads(), progress)
    ordered = tuple(differences[key] for key in sorted(differences, key=lambda key: [natural(each) for each in key]))
    total = sum(num_bytes(each.dtype, each.shape) for each in a.checkpoint.tensors.values())
    num_parts = sum(len(key) > 1 and key[1] != str(BESIDE) for key in a.items)
    return Comparison(num_parts, len(a.items) - num_parts, total, ordered)


def _name(key: tuple[str, ...]) -> str:
    if len(key) == 1:
        return key[0]
    return f"{key[0]} {key[2]}" if key[1] == str(BESIDE) else f"{key[0]} expert {key[1]} {key[2]}"


def _compare_bits(
    a: _Side, b: _Side, keys: list[tuple[str, ...]], threads: int, progress: Progress
) -> dict[tuple[str, ...], str]:
    files = Files()
    checkers = [Checker(files, side.checkpoint, partial(progress, "check")) for side in (a, b)]

    def differing(some: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        sides = list(zip(checkers, (a, b), strict=True))
        return [key for key in some if len({checker.digest_source(side.items[key]) for checker, side in sides}) > 1]

    with workers(threads, files) as pool:
        lists = in_batches(keys, lambda key: a.items[key].rows * a.items[key].cols * 2)
        found = run_all(pool, files, (partial(differing, each) for each in lists))
    return {key: f"{_name(key)}: differs" for each in found for key in each}
