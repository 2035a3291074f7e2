"""Killed or interrupted at any point: nothing unfinished is ever published, and a second run makes it good."""

import errno
import json
import os
import signal
import threading
import time
from functools import partial

import numpy as np
import pytest

from moe_accel.convert import commands, run
from moe_accel.convert.headers import read_header
from moe_accel.convert.run import execute
from moe_accel.convert.source import open_checkpoint
from moe_accel.convert.target import _syncing, sync
from moe_accel.convert.verify import MismatchError
from moe_accel.errors import CheckpointError
from tests.unit.convert_job import (
    EXPERTS,
    LAYERS,
    at_call,
    check_nothing_unfinished_is_published,
    contents,
    job_of,
    kill_and_resume,
    tensor_of,
)


def test_the_directory_holds_every_tensor_once_and_the_other_files(source, tmp_path):
    target = tmp_path / "out"
    report = execute(job_of(source, target))
    assert len(report.written) == len(report.job.shards) > 6
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.mlp.experts"
        for expert in range(EXPERTS):
            gate, up, down = (
                tensor_of(source, f"{prefix}.{expert}.{role}_proj.weight") for role in ("gate", "up", "down")
            )
            stacked = tensor_of(target, f"{prefix}.gate_up_proj")[expert]
            np.testing.assert_array_equal(stacked, np.concatenate([gate, up]))
            np.testing.assert_array_equal(tensor_of(target, f"{prefix}.down_proj")[expert], down.T)
    np.testing.assert_array_equal(tensor_of(target, "step"), tensor_of(source, "step"))
    index = json.loads((target / "model.safetensors.index.json").read_text())
    data = sum(read_header(file).file_bytes - len(read_header(file).raw) for file in target.glob("*.safetensors"))
    assert index["metadata"] == {"total_size": data, "total_parameters": 7}
    names = set(contents(target)) - set(report.written)
    assert names == {
        "config.json", "chat_template.jinja", "original/params.json", "moe_accel_manifest.json",
        "model.safetensors.index.json",
    }  # fmt: skip
    assert {read_header(file).metadata["format"] for file in target.glob("*.safetensors")} == {"pt"}
    assert open_checkpoint(source).left_out == ("training_args.bin",)


def test_files_get_the_permissions_that_the_umask_allows(source, tmp_path):
    old = os.umask(0o027)
    try:
        execute(job_of(source, tmp_path / "out"))
    finally:
        os.umask(old)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert modes == {0o640}


def test_one_file_is_called_model_and_has_no_index(source, tmp_path):
    execute(job_of(source, tmp_path / "out", max_shard_bytes=1 << 30))
    assert sorted(path.name for path in (tmp_path / "out").glob("model*")) == ["model.safetensors"]


def test_safetensors_reads_what_was_written_and_writes_the_same_bytes(source, tmp_path):
    from safetensors.torch import load_file, save_file

    execute(job_of(source, tmp_path / "out", max_shard_bytes=1 << 30))
    save_file(load_file(tmp_path / "out" / "model.safetensors"), tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "theirs").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


# ---- killed at any point


def test_killed_at_20_random_points_a_second_run_gives_the_same_directory(source, tmp_path, reference):
    kill_and_resume(partial(job_of, source), tmp_path, reference, 20, seed=0)


@pytest.mark.slow
def test_killed_at_50_more_points(source, tmp_path, reference):
    kill_and_resume(partial(job_of, source), tmp_path, reference, 50, seed=1)


def test_a_finished_directory_is_left_as_it_is(source, tmp_path, reference):
    target = tmp_path / "out"
    execute(job_of(source, target))
    times = {file: file.stat().st_mtime_ns for file in target.glob("*.safetensors")}
    assert execute(job_of(source, target)).written == ()
    assert {file: file.stat().st_mtime_ns for file in target.glob("*.safetensors")} == times
    assert contents(target) == reference


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_whole_file_of_an_earlier_run_is_kept_only_after_a_check(source, tmp_path, reference, damage):
    target = tmp_path / "out"
    execute(job_of(source, target))
    file = target / "model-00002-of-00012.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(data[:-1])
        assert execute(job_of(source, target)).written == (file.name,)
        assert contents(target) == reference
    else:
        data[-1] ^= 1
        file.write_bytes(data)
        with pytest.raises(MismatchError, match="was damaged after it was written: remove it"):
            execute(job_of(source, target))
        file.unlink()
        assert execute(job_of(source, target)).written == (file.name,)
        assert contents(target) == reference


def test_a_write_lost_while_copying_is_told_though_the_sync_at_the_end_succeeds(tmp_path, monkeypatch):
    file, lost = tmp_path / "out", threading.Event()
    file.write_bytes(b"data")

    def lose(_fd):
        lost.set()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", lose)
    with pytest.raises(CheckpointError, match=f"cannot write {file}: Input/output error"), _syncing(file):
        assert lost.wait(60)
    sync(file)


def test_ctrl_c_leaves_temporaries_and_says_how_to_go_on(source, tmp_path, reference, monkeypatch):
    target = tmp_path / "out"
    job = job_of(source, target)
    monkeypatch.setattr(run, "prepare", lambda *_arguments: job)
    told = tmp_path / "stderr"
    child = os.fork()
    if child == 0:
        status = 99
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT), 2)
            import sys

            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115

            def interrupt() -> None:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)

            with at_call(80, interrupt):
                status = commands.convert(source, target, job.options, dry_run=False, as_json=False)
            sys.stderr.flush()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert told.read_text() == (
        "interrupted: no unfinished file has its final name, and there is no index\n"
        "hint: run the same command again to go on\n"
    )
    check_nothing_unfinished_is_published(target, reference)
    assert not (target / "model.safetensors.index.json").exists()
    execute(job_of(source, target))
    assert contents(target) == reference
