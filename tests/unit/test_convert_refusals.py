"""Out of space, aimed at the wrong place, or with a fault on the way: a clear error, and nothing is published."""

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import time

import pytest

from moe_accel.convert import run
from moe_accel.convert.headers import make_header
from moe_accel.convert.regions import Tensor
from moe_accel.convert.run import Options, execute
from moe_accel.convert.target import Target
from moe_accel.convert.verify import MismatchError
from moe_accel.errors import CheckpointError
from tests.unit.convert_job import (
    HIDDEN,
    INNER,
    check_nothing_unfinished_is_published,
    contents,
    job_of,
    killed_at,
    write_source,
)


def fail_after(monkeypatch, num_calls: int, error: int) -> None:
    """Every write fails from the `num_calls`-th on."""
    calls = [0]
    for name in ("copy_file_range", "pwrite", "sendfile"):
        real = getattr(os, name)

        def limited(*arguments, real=real):
            calls[0] += 1
            if calls[0] > num_calls:
                raise OSError(error, os.strerror(error))
            return real(*arguments)

        monkeypatch.setattr(os, name, limited)


def test_a_disk_that_fills_up_is_told_with_the_bytes_still_needed(source, tmp_path, monkeypatch, reference):
    target = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_after(patch, 60, errno.ENOSPC)
        with pytest.raises(CheckpointError, match=r"no space left while writing .*safetensors.tmp-\w+: \d+ bytes"):
            execute(job_of(source, target))
    check_nothing_unfinished_is_published(target, reference)
    assert [name for name in contents(target) if "safetensors.tmp" in name] == [], "the space is given back"
    execute(job_of(source, target))
    assert contents(target) == reference


def test_space_is_checked_before_anything_is_written(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    job = job_of(source, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=job.num_bytes // 2))
    with pytest.raises(CheckpointError, match=r"needs \d+ bytes, its file system has \d+ free: \d+ bytes are missing"):
        execute(job)
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize("limit", ["before", "during"])
def test_a_small_file_system(source, tmp_path, monkeypatch, limit):
    mounted = tmp_path / "small"
    mounted.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", mounted], capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs")
    try:
        if limit == "during":
            usage = shutil.disk_usage(tmp_path)
            monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
        message = "bytes are missing" if limit == "before" else "no space left while writing"
        with pytest.raises(CheckpointError, match=message):
            execute(job_of(source, mounted / "out"))
        assert not list((mounted / "out").glob("*.index.json"))
        subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
        with pytest.raises(CheckpointError, match=r"cannot write .*: Read-only file system"):
            execute(job_of(source, mounted / "other"))
    finally:
        subprocess.run(["umount", mounted], check=True)


def test_a_target_that_may_not_be_written_is_told(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*/file/out: Not a directory"):
        execute(job_of(source, tmp_path / "file" / "out"))
    real = os.open

    def refuse(path, flags, *rest, **keywords):
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, *rest, **keywords)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match=r"cannot write .*out: Read-only file system"):
        execute(job_of(source, tmp_path / "out"))


# ---- the wrong place


def test_source_and_target_may_not_be_the_same_or_nested(source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    for target in (source, tmp_path / "link", source / "out", source.parent, tmp_path / "link" / "deep" / "out"):
        with pytest.raises(CheckpointError, match=r"same directory|inside one another"):
            run.prepare(source, target, Options("stacked"))


def test_files_of_others_are_not_touched_without_overwrite(source, tmp_path, reference):
    target = tmp_path / "out"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    (target / "old.safetensors").write_text("old")
    (target / "model.safetensors.index.json").write_text("{}")
    before = contents(target)
    with pytest.raises(
        CheckpointError, match=r"is not empty: model.safetensors.index.json, notes.txt, old.safetensors"
    ):
        execute(job_of(source, target))
    assert contents(target) == before
    execute(job_of(source, target, overwrite=True))
    assert contents(target) == reference | {"notes.txt": b"mine"}


def test_another_plan_in_the_target_is_an_error_without_overwrite(source, tmp_path, reference):
    target = tmp_path / "out"
    assert killed_at(100, job_of(source, target, max_shard_bytes=30_000)) == signal.SIGKILL
    with pytest.raises(CheckpointError, match="holds another conversion, from other files or with other options"):
        execute(job_of(source, target))
    execute(job_of(source, target, overwrite=True))
    assert contents(target) == reference


def test_a_source_file_that_was_touched_makes_another_plan(tmp_path):
    write_source(tmp_path / "model")
    first = job_of(tmp_path / "model", tmp_path / "out").plan_id
    assert job_of(tmp_path / "model", tmp_path / "elsewhere", threads=1, verify="none").plan_id == first
    os.utime(tmp_path / "model" / "model-00001-of-00003.safetensors", ns=(1, 1))
    assert job_of(tmp_path / "model", tmp_path / "out").plan_id != first


def test_a_source_that_changes_meanwhile_is_an_error(tmp_path):
    write_source(tmp_path / "model")
    job = job_of(tmp_path / "model", tmp_path / "out")
    os.utime(tmp_path / "model" / "model-00001-of-00003.safetensors", ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"00001-of-00003.safetensors changed while it was read"):
        execute(job)
    assert list((tmp_path / "out").glob("*.safetensors*")) == []


def test_two_at_a_time_are_one_too_many(source, tmp_path):
    other = Target(tmp_path / "out", "0")
    other.lock()
    with pytest.raises(CheckpointError, match="another process is writing to"):
        execute(job_of(source, tmp_path / "out"))
    other.unlock()
    execute(job_of(source, tmp_path / "out"))


def test_a_byte_that_goes_wrong_on_the_way_is_never_published(source, tmp_path, monkeypatch):
    real = os.pwrite

    def wrong(fd, data, at):
        return (
            real(fd, bytes(data[:-1]) + bytes([data[-1] ^ 1]), at)
            if len(data) == INNER * HIDDEN * 2
            else real(fd, data, at)
        )

    monkeypatch.setattr(os, "pwrite", wrong)
    with pytest.raises(MismatchError, match=r"down_proj' is not what was read from"):
        execute(job_of(source, tmp_path / "out", max_shard_bytes=1 << 30))
    assert list((tmp_path / "out").glob("*.safetensors")) == []


def test_a_plan_that_swaps_two_experts_is_caught(source, tmp_path):
    job = job_of(source, tmp_path / "out")
    before, (first, second, *rest) = job.find_parts()
    swapped = [first._replace(role=second.role), second._replace(role=first.role), *rest]
    with pytest.raises(MismatchError, match="is not the same matrix in source and target"):
        execute(dataclasses.replace(job, find_parts=lambda: (before, swapped)))
    assert list((tmp_path / "out").glob("*.safetensors*")) == []


def test_100_000_tensors_are_planned_in_seconds(tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{role}_proj.weight"
        for layer in range(65)
        for expert in range(512)
        for role in ("gate", "up", "down")
    ]
    for at in range(10):
        some = {name: Tensor(name, "BF16", (3, 2) if "down" in name else (2, 3)) for name in names[at::10]}
        header, _ = make_header(some, None)
        (source / f"part-{at}.safetensors").write_bytes(header + b"\0" * 12 * len(some))
    (source / "config.json").write_text('{"model_type": "qwen3_moe"}')
    start = time.process_time()  # of the processor: the machine may be busy
    job = run.prepare(source, tmp_path / "out", Options("stacked"))
    assert (len(names), len(job.plan.outputs)) == (99_840, 130)
    assert time.process_time() - start < 5, "1.4 s on a quiet machine, 3.1 on a busy one"
