"""Past the page cache: the same bytes at any offset, and the same errors where the file system has no such thing."""

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from moe_accel.convert import copy as copying
from moe_accel.convert import digest as digesting
from moe_accel.convert import run
from moe_accel.convert.copy import Copier, Files, Stopped, Writer, read_into
from moe_accel.convert.digest import digest
from moe_accel.convert.headers import read_header
from moe_accel.convert.lower import Gather, Piece, place
from moe_accel.convert.regions import Region
from moe_accel.convert.verify import Checker, MismatchError
from moe_accel.errors import CheckpointError
from tests.unit.convert_job import contents, job_of
from tests.unit.test_convert_engine import random_file, view

ROWS, COLS = 300, 500
O_DIRECT = getattr(os, "O_DIRECT", 0)


def can_write_directly(folder) -> bool:
    """Whether its file system knows O_DIRECT."""
    try:
        os.close(os.open(folder / "probe", os.O_WRONLY | os.O_CREAT | O_DIRECT))
    except OSError:
        return False
    return O_DIRECT != 0


@pytest.fixture
def written(monkeypatch):
    """How each write went: ("direct" or "cached", bytes)."""
    calls: list[tuple[str, int]] = []
    opened: dict[int, bool] = {}
    real_open, real_write = os.open, os.pwrite

    def tracked_open(path, flags, *rest):
        fd = real_open(path, flags, *rest)
        opened[fd] = bool(flags & O_DIRECT)
        return fd

    def tracked_write(fd, data, at):
        calls.append(("direct" if opened.get(fd) else "cached", len(data)))
        return real_write(fd, data, at)

    monkeypatch.setattr(os, "open", tracked_open)
    monkeypatch.setattr(os, "pwrite", tracked_write)
    return calls


def transpose(tmp_path, offset: int) -> tuple[np.ndarray, bytes]:
    """A matrix in a file, and the file in which its transpose begins at byte `offset`."""
    matrix = np.random.default_rng(0).integers(0, 1 << 16, (ROWS, COLS), np.uint16)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(matrix.tobytes())
    target.write_bytes(b"\xaa" * (offset + matrix.nbytes + 5))
    op = Gather(offset, COLS, 2 * ROWS, 2, (Piece(source, 0, ROWS, 2, 2 * COLS, 0, 2),))
    files = Files()
    Copier(files).execute([op.part(0, 7), op.part(7, COLS)], target)
    files.close()
    return matrix, target.read_bytes()


@pytest.mark.parametrize("offset", [0, 8, 4096, 5000, 4095 * 8])
def test_a_block_anywhere_in_a_file_is_written_whole_and_nothing_beside_it(tmp_path, written, offset):
    matrix, found = transpose(tmp_path, offset)
    assert found == b"\xaa" * offset + matrix.T.tobytes() + b"\xaa" * 5
    if can_write_directly(tmp_path):
        assert sum(size for how, size in written if how == "direct") > 0.9 * matrix.nbytes
        assert all(size < 8192 for how, size in written if how == "cached")


@pytest.mark.parametrize("refused", ["at open", "at write", "unknown here"])
def test_without_direct_writes_the_bytes_are_the_same(tmp_path, monkeypatch, refused):
    real_open, real_write, direct = os.open, os.pwrite, set()

    def refuse_open(path, flags, *rest):
        if flags & O_DIRECT and refused == "at open":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fd = real_open(path, flags, *rest)
        direct.discard(fd)
        if flags & O_DIRECT:
            direct.add(fd)
        return fd

    def refuse_write(fd, data, at):
        if fd in direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_write(fd, data, at)

    if refused == "unknown here":
        monkeypatch.delattr(os, "O_DIRECT")
    else:
        monkeypatch.setattr(os, "open", refuse_open)
        monkeypatch.setattr(os, "pwrite", refuse_write)
    matrix, found = transpose(tmp_path, 5000)
    assert found == b"\xaa" * 5000 + matrix.T.tobytes() + b"\xaa" * 5


def test_a_full_disk_is_not_taken_for_a_missing_call(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(b"")
    writer = Writer(file)

    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        writer.write(writer.block(1 << 16, 0), 0)
    writer.close()


def test_a_source_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def fail(*_arguments):
        raise OSError(errno.EIO, "Input/output error")

    file = tmp_path / "source"
    file.write_bytes(b"1234")
    files = Files()
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match="source cannot be read: Input/output error"):
        read_into(file, files.fd(file), memoryview(bytearray(4)), 0)
    with pytest.raises(CheckpointError, match="absent cannot be read: No such file"):
        files.fd(tmp_path / "absent")


def test_gate_and_up_beside_each_other_are_read_once_to_be_digested(tmp_path, monkeypatch):
    file = tmp_path / "source.safetensors"
    arrays = random_file(file, {"in": 2 * ROWS * COLS, "behind": 100}, 2)
    header = read_header(file)
    gate, up = (Region("in", at, ROWS, COLS, 1, 2 * ROWS) for at in (0, ROWS))
    read: list[int] = []
    real = copying.read_into
    monkeypatch.setattr(copying, "read_into", lambda *args: (read.append(len(args[2])), real(*args))[1])
    files = Files()
    found = [digest(files, place(each, header.tensors["in"], file, header.starts["in"])) for each in (gate, up)]
    assert sum(read) == arrays["in"].nbytes
    plain = tmp_path / "plain.safetensors"
    for region, value in zip((gate, up), found, strict=True):
        random_file(plain, {"in": ROWS * COLS}, 2)
        of = read_header(plain)
        plain.write_bytes(of.raw + view(arrays["in"], region).tobytes())
        assert value == digest(
            Files(), place(Region("in", 0, ROWS, COLS, COLS, 1), of.tensors["in"], plain, len(of.raw))
        )


def test_a_file_that_became_short_is_an_error_and_not_what_lies_behind_it(tmp_path):
    file = tmp_path / "source.safetensors"
    random_file(file, {"in": 2 * ROWS * COLS}, 2)
    header = read_header(file)
    with open(file, "r+b") as stream:
        stream.truncate(len(header.raw) + 100)
    where = place(Region("in", 0, ROWS, COLS, 1, 2 * ROWS), header.tensors["in"], file, header.starts["in"])
    with pytest.raises(CheckpointError, match="changed while it was read"):
        digest(Files(), where)


def test_what_is_kept_of_a_file_is_not_taken_for_a_later_run_of_it(tmp_path):
    file = tmp_path / "source.safetensors"
    region = Region("in", 0, ROWS, COLS, 1, 2 * ROWS)

    def digest_now() -> str:
        header = read_header(file)
        return digest(Files(), place(region, header.tensors["in"], file, header.starts["in"]))

    random_file(file, {"in": 2 * ROWS * COLS}, 2, seed=0)
    first = digest_now()
    random_file(file, {"in": 2 * ROWS * COLS}, 2, seed=1)
    assert digest_now() != first


def test_after_a_failed_check_no_other_file_is_waited_for_or_published(source, tmp_path, monkeypatch):
    target, synced = tmp_path / "out", []
    job = job_of(source, target)
    first = job.shards[0].name
    real_check, real_sync = Checker.check, run.Target.sync

    def check(self, copies, file, shard):
        if shard.name == first:
            raise MismatchError("differs")
        return real_check(self, copies, file, shard)

    monkeypatch.setattr(Checker, "check", check)
    monkeypatch.setattr(run.Target, "sync", lambda self, name: (synced.append(name), real_sync(self, name))[1])
    with pytest.raises(MismatchError, match="differs"):
        run.execute(job)
    assert synced == [first]
    assert not [name for name in contents(target) if name.endswith(".safetensors")]


def test_a_finish_that_was_queued_when_the_others_stopped_does_nothing(source, tmp_path):
    job = job_of(source, tmp_path / "out")
    files = Files()
    files.stop.set()
    checker, unfinished = Checker(files, job.checkpoint), {job.shards[0].name}
    with ThreadPoolExecutor(1) as pool, pytest.raises(Stopped):
        # without a file to sync: it would raise another error
        pool.submit(run._finish, [], checker, job, run.Target(job.target, "id"), job.shards[0], unfinished).result()
    assert unfinished == {job.shards[0].name}


@pytest.fixture
def source_bytes_read(monkeypatch):
    """Bytes that `preadv` read, by file."""
    read: dict[str, int] = {}
    opened: dict[int, str] = {}
    real_open, real_read = os.open, os.preadv

    def tracked_open(path, *rest, **keywords):
        fd = real_open(path, *rest, **keywords)
        opened[fd] = str(path)
        return fd

    def tracked_read(fd, views, at):
        got = real_read(fd, views, at)
        read[opened[fd]] = read.get(opened[fd], 0) + got
        return got

    monkeypatch.setattr(os, "open", tracked_open)
    monkeypatch.setattr(os, "preadv", tracked_read)
    return read


def convert(source, target, to: str) -> run.Report:
    return run.execute(run.prepare(source, target, run.Options(to, threads=2)))


@pytest.mark.parametrize("to", ["nemo", "sonicmoe", "per-expert"])
def test_a_full_check_reads_the_source_once(source, tmp_path, source_bytes_read, to):
    if to == "per-expert":  # from transposed matrices
        convert(source, tmp_path / "first", "nemo")
        source = tmp_path / "first"
    source_bytes_read.clear()
    convert(source, tmp_path / "out", to)
    headers = [read_header(file) for file in source.glob("*.safetensors")]
    expected = {str(each.file): each.file_bytes - len(each.raw) for each in headers}
    assert {file: size for file, size in source_bytes_read.items() if file in expected} == expected


@pytest.mark.parametrize("first", ["per-expert", "nemo"])
def test_a_matrix_that_was_turned_wrongly_is_never_published(source, tmp_path, monkeypatch, first):
    if first == "nemo":
        convert(source, tmp_path / "first", "nemo")
        source = tmp_path / "first"
    real = copying.assign

    def wrong(target, read):
        real(target, read)
        target[-1, -1] ^= 1

    monkeypatch.setattr(copying, "assign", wrong)  # for what copies, not for what checks
    with pytest.raises(MismatchError, match="is not what was read from"):
        convert(source, tmp_path / "out", "nemo" if first == "per-expert" else "per-expert")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_the_digests_of_a_manifest_do_not_depend_on_the_way_a_matrix_lies(source, tmp_path):
    manifests = []
    for at, to in enumerate(("nemo", "sonicmoe", "stacked", "nemo", "per-expert")):
        target = tmp_path / str(at)
        convert(source, target, to)
        manifests.append(json.loads((target / "moe_accel_manifest.json").read_text()))
        source = target
    assert len({json.dumps([each["experts"], each["tensors"]]) for each in manifests}) == 1


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("at", [0, 5, 4096, 9000])
def test_bytes_from_the_disk_itself_are_the_bytes_of_the_file(tmp_path, direct, at):
    file, data = tmp_path / "file", np.random.default_rng(0).bytes(10_001)
    file.write_bytes(data)
    files = Files()
    for size in (1, 1001, 10_001 - at):
        assert bytes(copying.read_named(files, file, "source", at, min(size, 10_001 - at), direct)) == data[at:][:size]
    with pytest.raises(CheckpointError, match="changed while it was read: no byte 10001"):
        copying.read_named(files, file, "source", at, 10_002 - at, direct)
    files.close(file)


def test_what_was_written_directly_is_read_back_directly(source, tmp_path, monkeypatch):
    if not can_write_directly(tmp_path):
        pytest.skip("no O_DIRECT here")
    opened, real = [], os.open
    monkeypatch.setattr(
        os, "open", lambda path, flags, *rest: (opened.append((str(path), flags)), real(path, flags, *rest))[1]
    )
    convert(source, tmp_path / "out", "nemo")
    assert {
        path.rpartition("/")[2].partition(".tmp")[0] for path, flags in opened if flags & 3 == 0 and flags & O_DIRECT
    } == {"model.safetensors"}


@pytest.mark.parametrize("block_bytes", [1 << 23, 1000])
def test_both_digests_are_those_of_the_matrix_and_of_its_transpose(tmp_path, monkeypatch, block_bytes):
    file = tmp_path / "source.safetensors"
    random_file(file, {"in": ROWS * COLS}, 2)
    header = read_header(file)
    where = place(Region("in", 0, ROWS, COLS, COLS, 1), header.tensors["in"], file, header.starts["in"])
    expected = digest(Files(), where), digest(Files(), where.turned)
    assert len(set(expected)) == 2
    monkeypatch.setattr(digesting, "BLOCK_BYTES", block_bytes)
    assert digesting.digest_both_ways(Files(), where) == expected
    assert digesting.digest_both_ways(Files(), where.turned) == expected[::-1]
