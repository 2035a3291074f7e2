"""What a dry run says of the directory is what the real run would say, and it leaves the directory as it is."""

import os
import shutil
import tempfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_accel import cli
from moe_accel.adapters import merge as merging
from moe_accel.adapters.run import Request, convert_adapter
from moe_accel.convert import run as converting
from moe_accel.convert.dequantize import Dequantization
from moe_accel.convert.target import Target
from moe_accel.errors import CheckpointError
from tests.unit.adapters_made import factors, per_expert, write
from tests.unit.convert_job import EXPERTS, HIDDEN, INNER, contents, job_of


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    tensors = per_expert(factors(EXPERTS, 3, HIDDEN, INNER), "model.layers.0.mlp.experts", names)
    return write(folder, dict(tensors), target_modules=list(names.values()))


def convert(source: Path, adapter: Path, target: Path, dry_run: bool) -> None:
    job = job_of(source, target)
    (converting.check_target if dry_run else converting.execute)(job)


def convert_an_adapter(source: Path, adapter: Path, target: Path, dry_run: bool) -> None:
    convert_adapter(adapter, target, Request("peft", base=source, dry_run=dry_run))


def merge(source: Path, adapter: Path, target: Path, dry_run: bool) -> None:
    job = merging.prepare(adapter, source, target, merging.Options())
    (merging.check_target if dry_run else merging.execute)(job)


def not_empty(target: Path, _monkeypatch) -> None:
    target.mkdir()
    (target / "model.safetensors").write_bytes(b"mine")


def of_another_conversion(target: Path, _monkeypatch) -> None:
    target.mkdir()
    (target / "moe_accel_manifest.json.tmp-0123").touch()


def a_file(target: Path, _monkeypatch) -> None:
    target.touch()


def below_a_file(target: Path, _monkeypatch) -> None:
    target.parent.touch()


def too_little_space(_target: Path, monkeypatch) -> None:
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 1000) if os.stat(folder) else None)


def locked(target: Path, _monkeypatch) -> None:
    other = Target(target, "other")
    other.lock()
    held.append(other)


held: list[Target] = []
REFUSALS = {
    not_empty: "is not empty: model.safetensors",
    of_another_conversion: "holds another conversion, from other files or with other options",
    a_file: "is a file, and must be a directory, new or empty",
    below_a_file: "Not a directory",
    too_little_space: "bytes, its file system has 1000 free",
    locked: "another process is writing to",
}


@pytest.mark.parametrize("situation", REFUSALS, ids=lambda each: each.__name__)
@pytest.mark.parametrize("command", [convert, convert_an_adapter, merge], ids=lambda each: each.__name__)
def test_a_dry_run_refuses_what_the_real_run_refuses(
    source, adapter, tmp_path, monkeypatch, command: Callable, situation: Callable
):
    target = tmp_path / "parent" / "out"
    if situation is not below_a_file:
        target.parent.mkdir()
    situation(target, monkeypatch)
    before = contents(tmp_path) | {str(path): b"" for path in tmp_path.rglob("*")}
    with pytest.raises(CheckpointError) as dry:
        command(source, adapter, target, dry_run=True)
    assert contents(tmp_path) | {str(path): b"" for path in tmp_path.rglob("*")} == before
    with pytest.raises(CheckpointError) as real:
        command(source, adapter, target, dry_run=False)
    while held:
        held.pop().unlock()
    assert str(dry.value) == str(real.value)
    assert REFUSALS[situation] in str(dry.value)


@pytest.mark.parametrize("command", [convert, convert_an_adapter, merge], ids=lambda each: each.__name__)
@pytest.mark.parametrize("exists", [False, True], ids=["new", "empty"])
def test_a_dry_run_of_what_can_be_done_changes_nothing(source, adapter, tmp_path, command: Callable, exists: bool):
    target = tmp_path / "new" / "out"
    if exists:
        target.mkdir(parents=True)
    command(source, adapter, target, dry_run=True)
    assert [path.name for path in tmp_path.rglob("*")] == (["new", "out"] if exists else [])


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs users")
@pytest.mark.parametrize("exists", [False, True], ids=["new", "empty"])
def test_a_directory_of_somebody_else_is_refused(exists):
    parent = Path(tempfile.mkdtemp(dir="/tmp"))
    target = Target(parent / "out", "id")
    try:
        if exists:
            target.folder.mkdir()
        for folder in parent.glob("out"), [parent]:
            for each in folder:
                each.chmod(0o555)
        if is_root := os.geteuid() == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(CheckpointError) as dry:
                target.check({}, overwrite=False)
            with pytest.raises(CheckpointError) as real:
                target.lock()
        finally:
            if is_root:
                os.seteuid(0)
    finally:
        parent.chmod(0o755)
        shutil.rmtree(parent)
    assert str(dry.value) == str(real.value) == f"cannot write {target.folder}: Permission denied"


def test_the_command_line_says_so(source, adapter, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    commands = [["convert", source, tmp_path / "out", "--to", "stacked"]]
    commands.append(["convert", adapter, tmp_path / "out", "--to", "peft", "--base", source])
    commands.append(["merge", adapter, "--base", source, "--out", tmp_path / "out"])
    for arguments in commands:
        monkeypatch.setattr("sys.argv", ["moe-accel", *map(str, arguments), "--dry-run"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        hint = "hint: take an empty directory, or --overwrite to write beside that"
        assert printed.err == f"error: {tmp_path / 'out'} is not empty: notes.txt\n{hint}\n"


def test_space_for_dequantized_weights_is_looked_at_too(tmp_path, monkeypatch):
    """What an earlier command for other files left there, the real run removes: it counts as free."""
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 100))
    monkeypatch.setattr(Dequantization, "_headers", lambda _self: {})
    lossy = Dequantization(None, None, tmp_path / ".out.dequantized-1", {})  # pyright: ignore[reportArgumentType]
    with pytest.raises(CheckpointError, match="and 160 for the result, its file system has 100 free"):
        lossy.check_space(160)
    left = tmp_path / ".out.dequantized-2"
    left.mkdir()
    (left / "model.safetensors").write_bytes(bytes(60))
    lossy.check_space(160)
    assert left.exists()
    lossy._make_folder(100)
    assert not left.exists()
