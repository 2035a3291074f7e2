"""A merge that was killed goes on from its whole files and ends with the same bytes; other arguments it refuses."""

import json
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from moe_accel.adapters.merge import Job, Options, execute, prepare
from moe_accel.convert.headers import read_header
from moe_accel.convert.verify import MismatchError
from moe_accel.errors import CheckpointError
from tests.unit.adapters_made import factors, per_expert, write
from tests.unit.convert_job import (
    EXPERTS,
    HIDDEN,
    INNER,
    LAYERS,
    contents,
    kill_and_resume,
    killed_at,
    write_source,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Noise without its largest exponents, so that all of it is finite."""
    folder = tmp_path_factory.mktemp("source") / "model"
    write_source(folder)
    for file in folder.glob("*.safetensors"):
        data = np.frombuffer(file.read_bytes(), np.uint8).copy()
        data[len(read_header(file).raw) :] &= 0xBF
        file.write_bytes(data.tobytes())
    return folder


@pytest.fixture(scope="module")
def adapter(source, tmp_path_factory) -> Path:
    """For every expert of the first half of the layers: files without adapted tensors are there too."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    tensors = {}
    for layer in range(LAYERS // 2):
        roles = factors(EXPERTS, 3, HIDDEN, INNER, seed=layer)
        tensors |= dict(per_expert(roles, f"model.layers.{layer}.mlp.experts", names))
    write(folder, tensors, target_modules=list(names.values()))
    return folder


def merge_of(source: Path, adapter: Path, target: Path, **options) -> Job:
    return prepare(adapter, source, target, Options(**{"max_shard_bytes": 12_000, "threads": 2} | options))


@pytest.fixture(scope="module")
def merged(source, adapter, tmp_path_factory) -> dict[str, bytes]:
    """What a merge that nothing disturbs writes."""
    folder = tmp_path_factory.mktemp("merged") / "out"
    report = execute(merge_of(source, adapter, folder))
    assert len(report.written) > 4
    assert report.kept == ()
    return contents(folder)


def test_killed_at_5_random_points_a_second_run_gives_the_same_directory(source, adapter, tmp_path, merged):
    kill_and_resume(partial(merge_of, source, adapter), tmp_path, merged, 5, seed=0, execute=execute)


@pytest.mark.slow
def test_killed_at_50_more_points(source, adapter, tmp_path, merged):
    kill_and_resume(partial(merge_of, source, adapter), tmp_path, merged, 50, seed=1, execute=execute)


@pytest.fixture
def half(source, adapter, tmp_path) -> Path:
    """A directory that a merge was killed in when half of its files were whole."""
    target = tmp_path / "out"
    number = 100
    while killed_at(number, merge_of(source, adapter, target), execute) == signal.SIGKILL:
        if len(list(target.glob("*.safetensors"))) >= 4:
            return target
        number += 50
    raise AssertionError("it came to its end")


def test_threads_are_no_other_arguments(source, adapter, half, merged):
    whole = len(list(half.glob("*.safetensors")))
    assert len(execute(merge_of(source, adapter, half, threads=1)).kept) == whole
    assert contents(half) == merged


@pytest.mark.parametrize("options", [{"to": "stacked"}, {"max_shard_bytes": 13_000}], ids=str)
def test_other_arguments_are_refused_and_overwrite_begins_again(source, adapter, half, options, tmp_path):
    before = {name: data for name, data in contents(half).items() if name != ".moe-accel.lock"}
    refusal = "holds another conversion, from other files or with other options: "
    with pytest.raises(CheckpointError, match=refusal) as said:
        execute(merge_of(source, adapter, half, **options))
    assert said.value.hint == "take an empty directory, or --overwrite to replace the checkpoint in it"
    assert contents(half) == before
    assert execute(merge_of(source, adapter, half, overwrite=True, **options)).kept == ()
    execute(merge_of(source, adapter, tmp_path / "fresh", **options))
    assert contents(half) == contents(tmp_path / "fresh")


def test_an_adapter_that_changed_is_another_merge(source, adapter, half):
    config = adapter / "adapter_config.json"
    before = config.read_text()
    config.write_text(json.dumps(json.loads(before) | {"lora_alpha": 99}))
    try:
        with pytest.raises(CheckpointError, match="holds another conversion"):
            execute(merge_of(source, adapter, half))
    finally:
        config.write_text(before)


@pytest.mark.parametrize("where", ["merged", "copied"])
def test_a_whole_file_of_an_earlier_run_is_kept_only_after_a_check(source, adapter, tmp_path, merged, where):
    target = tmp_path / "out"
    job = merge_of(source, adapter, target)
    execute(job)
    adapted = {shard.name for shard in job.shards if any(each.name in job.plan.merged for each in shard.outputs)}
    names = adapted if where == "merged" else {shard.name for shard in job.shards} - adapted
    file = target / min(names)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(MismatchError, match="not what was") as said:
        execute(merge_of(source, adapter, target))
    assert said.value.hint == f"{file} was damaged after it was written: remove it and run the same command again"
    file.unlink()
    assert execute(merge_of(source, adapter, target)).written == (file.name,)
    assert contents(target) == merged


def test_a_finished_directory_is_left_as_it_is(source, adapter, tmp_path, merged):
    target = tmp_path / "out"
    first = execute(merge_of(source, adapter, target))
    times = {file: file.stat().st_mtime_ns for file in target.glob("*.safetensors")}
    again = execute(merge_of(source, adapter, target))
    assert (again.written, again.total, again.roles) == ((), first.total, first.roles)
    assert {file: file.stat().st_mtime_ns for file in target.glob("*.safetensors")} == times
    assert contents(target) == merged


def test_a_damaged_note_costs_its_file_and_nothing_else(source, adapter, half, merged):
    notes = sorted(half.glob("*.merged.tmp-*"))
    whole = {file.name for file in half.glob("*.safetensors")}
    notes[0].write_text("{")
    report = execute(merge_of(source, adapter, half))
    assert set(report.kept) == whole - {notes[0].name.partition(".merged")[0]}
    assert contents(half) == merged
