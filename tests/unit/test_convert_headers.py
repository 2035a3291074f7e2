"""Damaged and hostile checkpoints: always a CheckpointError that names the file, before anything is written."""

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_accel.convert import run
from moe_accel.convert.headers import MAX_HEADER_BYTES, read_header
from moe_accel.convert.source import open_checkpoint
from moe_accel.errors import CheckpointError

DATA = {"a": ("BF16", [2, 3], 12), "b": ("F32", [], 4), "c": ("U8", [5], 5)}


def entries(**changes: Any) -> dict[str, Any]:
    found, at = {}, 0
    for name, (dtype, shape, size) in DATA.items():
        found[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    for key, value in changes.items():
        tensor, _, field = key.partition("__")
        if field:
            found[tensor][field] = value
        else:
            found[tensor] = value
    return found


def pack(header: Any, data: bytes = bytes(range(21)), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


GOOD = pack(entries())
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"

HEADERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is cut short: needs 8 bytes for the length of its header, has 0"),
    "seven bytes": (b"1234567", "is cut short: needs 8 bytes"),
    "length of more than the file": (struct.pack("<Q", 900) + b"{}", "its header needs 908 bytes, has 10"),
    "length of 2^63": (struct.pack("<Q", 2**63) + b"{}", f"a header of {2**63} bytes; {MAX_HEADER_BYTES} are allowed"),
    "a pickle": (b"PK\x03\x04\x00\x00\x08\x08" + bytes(100), "is not a safetensors file"),
    "a web page": (b"<!DOCTYPE html><html>", "is not a safetensors file"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
    "not json": (pack(b"{nonsense"), "the header is not JSON"),
    "not utf-8": (pack(b'{"\xff": 1}'), "the header is not JSON"),
    "a list": (pack([1]), "must start with '{'"),
    "a space first": (pack(b" {}", b""), "must start with '{'"),
    "deep": (pack(b'{"a":' * 20_000), "nested too deeply|not JSON"),
    "huge number": (pack(b'{"a":' + b"1" * 5000 + b"}"), "not JSON"),
    "truncated": (GOOD[:-1], rf"is cut short: needs {len(GOOD)} bytes, has {len(GOOD) - 1}"),
    "one byte more": (GOOD + b"x", "has 1 bytes too many"),
    "twice": (pack(b'{"a":1,"a":2}'), "has the key 'a' twice"),
    "field twice": (pack(b'{"a":{"dtype":"U8","dtype":"I8"}}'), "has the key 'dtype' twice"),
    "surrogate": (pack(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b""), "not text that can be"),
    "metadata of numbers": (pack({"__metadata__": {"a": 1}} | entries()), "__metadata__ must map names to text"),
    "metadata a list": (pack({"__metadata__": []} | entries()), "__metadata__ must map names to text"),
    "entry a number": (pack(entries(a=1)), "tensor 'a' must have dtype, shape and data_offsets, it has int"),
    "field missing": (pack(entries(a={"dtype": "U8"})), "tensor 'a' must have dtype, shape"),
    "field too many": (pack(entries(a__more=1)), "tensor 'a' must have dtype, shape"),
    "unknown dtype": (pack(entries(a__dtype="BF17")), "tensor 'a' has the unknown dtype 'BF17'"),
    "dtype a list": (pack(entries(a__dtype=[])), "tensor 'a' has the unknown dtype"),
    "shape a number": (pack(entries(a__shape=6)), "tensor 'a' has the shape 6"),
    "negative": (pack(entries(a__shape=[-2, -3])), "tensor 'a' has the shape"),
    "fraction": (pack(entries(a__shape=[2.0, 3])), "tensor 'a' has the shape"),
    "true": (pack(entries(c__shape=[True, 5])), "tensor 'c' has the shape"),
    "overflow": (pack(entries(a__shape=[2**62, 2**62])), "tensor 'a' has the shape"),
    "wrong shape": (pack(entries(a__shape=[2, 4])), r"'a' of dtype BF16 and shape \[2, 4\] needs 16 bytes, .* 12"),
    "half a byte": (pack(entries(c__dtype="F4")), r"needs 2.5 bytes"),
    "three offsets": (pack(entries(a__data_offsets=[0, 6, 12])), "tensor 'a' has the data_offsets"),
    "negative offset": (pack(entries(a__data_offsets=[-12, 0])), "tensor 'a' has the data_offsets"),
    "backwards": (pack(entries(a__data_offsets=[12, 0])), "tensor 'a' of dtype BF16"),
    "hole": (pack(entries(c__data_offsets=[17, 22]), bytes(22)), "a hole of 1 bytes before tensor 'c'"),
    "hole at start": (pack({"c": entries()["c"]}), "a hole of 16 bytes before tensor 'c': .* the data starts at 0"),
    "overlap": (pack(entries(b__data_offsets=[8, 12])), "an overlap of"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, name):
    data, message = HEADERS[name]
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as raised:
        read_header(file)
    assert str(file) in str(raised.value)


def test_a_whole_file_is_read(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    header = read_header(tmp_path / "model.safetensors")
    assert {name: (each.dtype, list(each.shape)) for name, each in header.tensors.items()} == {
        name: (dtype, shape) for name, (dtype, shape, _) in DATA.items()
    }
    start = len(GOOD) - 21
    assert header.starts == {"a": start, "b": start + 12, "c": start + 16}


def write_checkpoint(folder: Path) -> dict[str, Any]:
    """Two files and an index."""
    folder.mkdir()
    first = {"x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}
    (folder / "model-00001-of-00002.safetensors").write_bytes(GOOD)
    (folder / "model-00002-of-00002.safetensors").write_bytes(pack(first, b"1234"))
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"}')
    weight_map = dict.fromkeys("abc", "model-00001-of-00002.safetensors") | {"x": "model-00002-of-00002.safetensors"}
    index = {"metadata": {"total_size": 25}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def refuse(folder: Path, target: Path, message: str) -> None:
    """The checkpoint is refused with that message, in which its directory stands, and nothing is written."""
    with pytest.raises(CheckpointError, match=message) as raised:
        run.prepare(folder, target, run.Options("stacked"))
    assert str(folder) in str(raised.value)
    assert not target.exists()


def map_to(name: Any) -> Callable[[dict], dict]:
    return lambda index: index | {"weight_map": index["weight_map"] | {"x": name}}


INDEXES: dict[str, tuple[Callable[[dict], Any], str]] = {
    "absolute": (map_to("/etc/passwd"), "not a plain file name"),
    "parent": (map_to("../model-00002-of-00002.safetensors"), "not a plain file name"),
    "folder": (map_to("sub/model.safetensors"), "not a plain file name"),
    "backslash": (map_to("..\\model.safetensors"), "not a plain file name"),
    "nul": (map_to("a\0.safetensors"), "not a plain file name"),
    "drive": (map_to("C:model.safetensors"), "not a plain file name"),
    "dots": (map_to(".."), "not a plain file name"),
    "nothing": (map_to(""), "not a plain file name"),
    "number": (map_to(3), "not a plain file name"),
    "missing file": (map_to("model-00003-of-00003.safetensors"), "names 2 files, 1 of them missing|does not name"),
    "wrong file": (map_to("model-00001-of-00002.safetensors"), "does not name"),
    "no map": (lambda index: {"metadata": {}}, "weight_map must map tensors to files"),
    "map a list": (lambda index: {"weight_map": ["a"]}, "weight_map must map tensors to files"),
    "metadata a list": (lambda index: index | {"metadata": []}, "metadata must be a JSON object"),
    "a list": (lambda index: [index], "must be a JSON object, not list"),
    "more tensors": (
        lambda index: index | {"weight_map": index["weight_map"] | {"y": "model-00002-of-00002.safetensors"}},
        "00002-of-00002.safetensors lacks 'y', which the index says it has",
    ),
    "swapped": (
        lambda index: index | {"weight_map": index["weight_map"] | {"a": "model-00002-of-00002.safetensors"}},
        "lacks 'a', which the index says it has; it is in model-00001-of-00002.safetensors",
    ),
    "fewer tensors": (
        lambda index: index | {"weight_map": {k: v for k, v in index["weight_map"].items() if k != "b"}},
        "has 1 tensors that the index does not name: 'b'",
    ),
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_is_not_true_is_refused(tmp_path, name):
    change, message = INDEXES[name]
    index = write_checkpoint(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(change(index)))
    refuse(tmp_path / "model", tmp_path / "out", message)


def duplicate(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00002-of-00002.safetensors").write_bytes(GOOD)


def only_pickle(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def leads_out(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    file.rename(folder.parent / "elsewhere")
    file.symlink_to(folder.parent / "elsewhere")


def adapter(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(GOOD)


def one_of_two(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()


def dangling(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()
    (folder / "model-00002-of-00002.safetensors").symlink_to(folder / "gone")


def no_files(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()


DIRECTORIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a name in two files": (duplicate, "'a' is in two files, model-00001-of-00002.safetensors and"),
    "pickle only": (only_pickle, r"holds its weights as pickle \(pytorch_model.bin\)"),
    "a link that leads out": (leads_out, "is a link that leads out of the checkpoint"),
    "an adapter": (adapter, "holds an adapter, not a model"),
    "a file missing without index": (one_of_two, "has 1 of 2 files, first missing: model-00002-of-00002"),
    "a link to nothing": (dangling, "is a link to .* which is missing"),
    "an index alone": (no_files, "has an index and none of its"),
    "two indexes": (lambda f: (f / "other.safetensors.index.json").write_text("{}"), "has 2 indexes"),
    "a folder of that name": (lambda f: (f / "x.safetensors").mkdir(), "does not name: x.safetensors"),
    "an unnamed file": (lambda f: (f / "extra.safetensors").write_bytes(GOOD), "does not name: extra.safetensors"),
    "a damaged config": (lambda f: (f / "config.json").write_text("{"), "config.json: the config is not JSON"),
    "a pointer for an index": (
        lambda f: (f / "model.safetensors.index.json").write_bytes(POINTER),
        "index.json is a Git LFS pointer",
    ),
    "a pointer for a tokenizer": (lambda f: (f / "tokenizer.json").write_bytes(POINTER), "tokenizer.json is a Git LFS"),
    "a pipe for a config": (
        lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")),
        "config.json is not a regular file",
    ),
    "a config that leads out": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").symlink_to("/etc/hostname")),
        "leads out",
    ),
}


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_that_is_no_whole_checkpoint_is_refused(tmp_path, name):
    change, message = DIRECTORIES[name]
    write_checkpoint(tmp_path / "model")
    change(tmp_path / "model")
    refuse(tmp_path / "model", tmp_path / "out", message)


def test_the_links_of_a_hub_cache_are_followed(tmp_path):
    repository = tmp_path / "models--org--name"
    (repository / "snapshots").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123abcd"
    write_checkpoint(snapshot)
    (repository / "blobs").mkdir()
    for file in list(snapshot.iterdir()):
        file.rename(repository / "blobs" / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    assert set(open_checkpoint(snapshot).tensors) == {"a", "b", "c", "x"}


def mutants(seed: int) -> Iterator[bytes]:
    """Changes of a good file that keep it from being one: cut, grown, or a structural byte replaced."""
    chooser = random.Random(seed)
    start = 8 + len(json.dumps(entries()))
    while True:
        kind = chooser.randrange(4)
        data = bytearray(GOOD)
        if kind == 0:
            yield bytes(data[: chooser.randrange(len(data))])
        elif kind == 1:
            yield bytes(data) + chooser.randbytes(chooser.randrange(1, 40))
        elif kind == 2:
            data[chooser.randrange(8)] ^= 1 << chooser.randrange(8)
            yield bytes(data)
        else:
            at = chooser.choice([i for i in range(8, start) if chr(data[i]) in '{}[]",:0123456789'])
            data[at] = chooser.choice([new for new in b'{}[]",:x\x00\xff-' if new != data[at]])
            yield bytes(data)


def index_mutants(text: str, seed: int) -> Iterator[bytes]:
    """The same for an index; no change of it leaves it true, since every byte of it counts."""
    chooser = random.Random(seed)
    data = text.encode()
    first = data.index(b"weight_map")
    while True:
        at = chooser.randrange(first, len(data))
        if data[at : at + 1].isspace():
            continue
        if chooser.random() < 0.3:
            yield data[:at]
        else:
            new = chooser.choice(b'{}[]",:x/\\.\x00\xff5')
            if new != data[at]:
                yield data[:at] + bytes([new]) + data[at + 1 :]


@pytest.mark.parametrize("seed", range(10))
def test_500_mutants_of_files_and_indexes_are_refused(tmp_path, seed):
    folder = tmp_path / "model"
    index = json.dumps(write_checkpoint(folder))
    file, index_file = folder / "model-00001-of-00002.safetensors", folder / "model.safetensors.index.json"
    for _, data in zip(range(25), mutants(seed), strict=False):
        file.write_bytes(data)
        refuse(folder, tmp_path / "out", "model-00001-of-00002.safetensors")
    file.write_bytes(GOOD)
    for _, data in zip(range(25), index_mutants(index, seed), strict=False):
        index_file.write_bytes(data)
        refuse(folder, tmp_path / "out", "model")
    index_file.write_text(index)
    assert set(open_checkpoint(folder).tensors) == {"a", "b", "c", "x"}
