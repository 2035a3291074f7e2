"""Proof of equality: across layouts, down to a bit, and on the models of transformers."""

import json
import shutil
from pathlib import Path

import pytest

from moe_accel.convert.headers import num_bytes
from moe_accel.convert.run import Options, execute, prepare
from moe_accel.convert.source import open_checkpoint
from moe_accel.convert.verify import MismatchError, compare
from tests.families import available_families, build_tiny
from tests.unit.convert_job import write_source

LAYOUTS = ["stacked", "per-expert", "te-grouped", "nemo", "sonicmoe"]
FAMILIES = available_families()
QUICK = ["mixtral", "qwen3_vl_moe", "gpt_oss", "llama4"]


def convert(source: Path, target: Path, to: str, **options) -> Path:
    execute(prepare(source, target, Options(to, **options)))
    return target


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "model"
    write_source(folder)
    return folder


@pytest.fixture(scope="module")
def layouts(source, tmp_path_factory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("layouts")
    return {to: convert(source, parent / to, to, max_shard_bytes=9_000) for to in LAYOUTS}


@pytest.mark.parametrize("to", LAYOUTS)
def test_a_conversion_equals_its_source_and_comes_back_the_same(source, layouts, to, tmp_path):
    found = compare(source, layouts[to])
    assert (found.differences, found.num_parts, found.num_tensors) == ((), 54, 8)
    back = convert(layouts[to], tmp_path / "back", "per-expert", max_shard_bytes=1 << 30)
    direct = convert(source, tmp_path / "direct", "per-expert", max_shard_bytes=1 << 30)
    assert (back / "model.safetensors").read_bytes() == (direct / "model.safetensors").read_bytes()


def test_manifests_of_all_layouts_have_the_same_digests(layouts):
    manifests = [json.loads((folder / "moe_accel_manifest.json").read_text()) for folder in layouts.values()]
    first = manifests[0]
    assert first["digest"] == "xxh3-128"
    assert sum(len(each["digests"]) for roles in first["experts"].values() for each in roles.values()) == 54
    assert len(first["tensors"]) == 8
    for each in manifests[1:]:
        assert (each["experts"], each["tensors"]) == (first["experts"], first["tensors"])


@pytest.mark.parametrize("to", LAYOUTS)
def test_one_flipped_bit_in_any_tensor_is_found(source, layouts, to, tmp_path):
    """One bit of each tensor at once: digests know nothing of one another, so each must be found by itself."""
    folder = tmp_path / "flipped"
    shutil.copytree(layouts[to], folder)
    checkpoint = open_checkpoint(folder)
    for at, (name, tensor) in enumerate(sorted(checkpoint.tensors.items())):
        header = checkpoint.headers[checkpoint.file_of[name]]
        with open(header.file, "r+b") as stream:
            byte = header.starts[name] + at * 7919 % num_bytes(tensor.dtype, tensor.shape)
            stream.seek(byte)
            old = stream.read(1)[0]
            stream.seek(byte)
            stream.write(bytes([old ^ 1 << at % 8]))
    found = compare(source, folder)
    assert len(found.differences) == len(checkpoint.tensors)
    assert all(each.endswith(": differs") for each in found.differences)


def test_what_is_missing_or_of_another_shape_is_named(source, tmp_path):
    other = tmp_path / "other"
    write_source(other)
    holder = next(each for each in other.glob("*.safetensors") if b'"step"' in each.read_bytes())
    holder.write_bytes(holder.read_bytes().replace(b'"step"', b'"stop"'))
    index = other / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"step"', '"stop"'))
    assert compare(source, other).differences == (f"step: only in {source}", f"stop: only in {other}")


@pytest.mark.parametrize("level", ["none", "header", "full"])
def test_the_level_of_checking_changes_nothing_but_the_checking(source, tmp_path, level):
    convert(source, tmp_path / "out", "stacked", verify=level)
    assert compare(source, tmp_path / "out").differences == ()
    manifest = json.loads((tmp_path / "out" / "moe_accel_manifest.json").read_text())
    assert ("experts" in manifest) == (level == "full")


def test_a_mismatch_is_no_bad_input(source):
    assert issubclass(MismatchError, ValueError)


@pytest.mark.parametrize(
    "family", [pytest.param(each, marks=[] if each in QUICK else pytest.mark.slow) for each in FAMILIES]
)
def test_a_model_of_transformers_goes_to_stacked_and_back(family, tmp_path):
    import torch

    build_tiny(family, torch.bfloat16).save_pretrained(tmp_path / "hub", max_shard_size="40KB")
    stacked = convert(tmp_path / "hub", tmp_path / "stacked", "stacked", max_shard_bytes=50_000)
    back = convert(stacked, tmp_path / "back", "hub")
    for folder in (stacked, back):
        found = compare(tmp_path / "hub", folder)
        assert found.differences == ()
        assert found.num_parts > 0
    again = convert(back, tmp_path / "again", "stacked")
    assert open_checkpoint(again).tensors == open_checkpoint(stacked).tensors
