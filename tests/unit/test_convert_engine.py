"""Copying: what lands in the target is what numpy says, whatever the strides; and it lands in bounded memory."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_accel.convert import copy as copying
from moe_accel.convert.copy import Copier, Files, assign
from moe_accel.convert.digest import digest
from moe_accel.convert.headers import DTYPE_BITS, make_header, num_bytes, read_header
from moe_accel.convert.lower import Gather, Run, batches, coalesce, lower_output, place
from moe_accel.convert.regions import Copy, Output, Region, Tensor
from moe_accel.convert.shards import natural, pack, parse_size
from moe_accel.errors import CheckpointError, ConfigError

DTYPES = {1: "F8_E4M3", 2: "BF16", 4: "F32", 8: "I64"}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def random_file(file: Path, sizes: dict[str, int], item: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A file of flat tensors full of noise, and what is in it."""
    tensors = {name: Tensor(name, DTYPES[item], (size,)) for name, size in sizes.items()}
    header, starts = make_header(tensors, None)
    noise = np.random.default_rng(seed)
    arrays = {name: noise.integers(0, 256, size * item, np.uint8).view(UNSIGNED[item]) for name, size in sizes.items()}
    file.write_bytes(header + b"".join(arrays[name].tobytes() for name in starts))
    return arrays


def view(flat: np.ndarray, region: Region) -> np.ndarray:
    """A region by the definition in `regions.py`."""
    rows, cols = np.arange(region.rows)[:, None], np.arange(region.cols)[None]
    return flat[region.offset + rows * region.row_stride + cols * region.col_stride]


def stored(kind: str, tensor: str, offset: int, rows: int, cols: int) -> tuple[list[Region], int]:
    """Two matrices [rows, cols] the way a layout stores them in one tensor, and the elements they fill."""
    size = rows * cols
    both = {
        "behind": [(0, cols, 1), (size, cols, 1)],
        "interleaved": [(0, 2 * cols, 1), (cols, 2 * cols, 1)],
        "transposed": [(0, 1, rows), (size, 1, rows)],
        "transposed beside": [(0, 1, 2 * rows), (rows, 1, 2 * rows)],
        "transposed interleaved": [(0, 2, 2 * rows), (1, 2, 2 * rows)],
        "columns beside": [(0, 2 * cols, 1), (cols, 2 * cols, 1)],
        "elements interleaved": [(0, 2 * cols, 2), (1, 2 * cols, 2)],
    }[kind]
    return [Region(tensor, offset + at, rows, cols, row, col) for at, row, col in both], 2 * size


KINDS = [
    "behind",
    "interleaved",
    "transposed",
    "transposed beside",
    "transposed interleaved",
    "columns beside",
    "elements interleaved",
]


def run_plan(tmp_path: Path, copies: list[Copy], total: int, item: int, arrays: dict[str, np.ndarray]) -> np.ndarray:
    source = tmp_path / "source.safetensors"
    header = read_header(source)
    output = Output("out", DTYPES[item], (total,), tuple(copies))
    operations = coalesce(lower_output(output, 0, header.tensors, lambda name: (source, header.starts[name])))
    target = tmp_path / "target"
    target.write_bytes(b"\xaa" * total * item)
    files = Files()
    copier = Copier(files)
    for batch in batches(operations, 1000):
        copier.execute(batch, target)
    files.close()
    return np.frombuffer(target.read_bytes(), UNSIGNED[item])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    source_kind=st.sampled_from(KINDS),
    target_kind=st.sampled_from(KINDS),
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4),
    item=st.sampled_from([1, 2, 4, 8]),
    block=st.sampled_from([256, 1024, 8 << 20]),
    order=st.randoms(use_true_random=False),
)
def test_any_layout_to_any_other_is_what_numpy_says(
    tmp_path, monkeypatch, source_kind, target_kind, shapes, item, block, order
):
    monkeypatch.setattr(copying, "BLOCK_BYTES", block)
    copies, at = [], 0
    for rows, cols in shapes:
        sources, size = stored(source_kind, "in", at, rows, cols)
        targets, _ = stored(target_kind, "out", at, rows, cols)
        copies += [Copy(*pair) for pair in zip(sources, targets, strict=True)]
        at += size
    order.shuffle(copies)
    arrays = random_file(tmp_path / "source.safetensors", {"in": at}, item)
    written = run_plan(tmp_path, copies, at, item, arrays)
    for copy in copies:
        np.testing.assert_array_equal(view(written, copy.target), view(arrays["in"], copy.source))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    rows=st.integers(1, 50),
    cols=st.integers(1, 50),
    item=st.sampled_from([1, 2, 4, 8]),
    block=st.sampled_from([64, 1024, 8 << 20]),
)
def test_a_matrix_has_one_digest_in_every_layout(tmp_path, monkeypatch, kinds, rows, cols, item, block):
    monkeypatch.setattr(copying, "BLOCK_BYTES", block)
    found = []
    for kind in kinds:
        file = tmp_path / "source.safetensors"
        regions, size = stored(kind, "in", 0, rows, cols)
        arrays = random_file(file, {"in": size}, item)
        matrix = np.arange(rows * cols, dtype=UNSIGNED[item]).reshape(rows, cols)
        flat = arrays["in"].copy()
        region = regions[1]
        index = np.arange(rows)[:, None] * region.row_stride + np.arange(cols) * region.col_stride + region.offset
        flat[index] = matrix
        header = read_header(file)
        file.write_bytes(header.raw + flat.tobytes())
        files = Files()
        found.append(digest(files, place(region, header.tensors["in"], file, header.starts["in"])))
        files.close()
    assert found[0] == found[1]


@pytest.mark.parametrize("item", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(8, 8), (9, 31), (130, 67), (64, 200), (1, 50)])
@pytest.mark.parametrize("offset", [0, 1])
def test_transposing_moves_every_element(item, shape, offset):
    noise = np.random.default_rng(1).integers(0, 256, (shape[0] * shape[1] + offset) * item, np.uint8)
    source = noise.view(UNSIGNED[item])[offset:].reshape(shape)
    for make in (
        lambda: np.zeros(shape[::-1], source.dtype).T,
        lambda: np.zeros((shape[0], 2 * shape[1]), source.dtype),
    ):
        for each in (source, np.ascontiguousarray(source.T).T):
            target = make()[:, : shape[1]]
            assign(target, each)
            np.testing.assert_array_equal(target, source)


def two(rows: int = 4, cols: int = 4) -> Output:
    regions, size = stored("interleaved", "out", 0, rows, cols)
    sources, _ = stored("behind", "in", 0, rows, cols)
    return Output("out", "F32", (size,), tuple(Copy(*pair) for pair in zip(sources, regions, strict=True)))


def lower(output: Output, dtype: str = "F32", size: int = 32) -> list:
    sources = {"in": Tensor("in", dtype, (size,))}
    return list(lower_output(output, 0, sources, lambda name: (Path("in"), 0)))


def changed(output: Output, at: int, **fields) -> Output:
    copies = list(output.copies)
    copies[at] = Copy(copies[at].source, copies[at].target._replace(**fields))
    return output._replace(copies=tuple(copies))


def test_copies_that_lie_in_one_another_are_written_together():
    (gather,) = lower(two())
    assert isinstance(gather, Gather)
    assert (gather.rows, gather.row_bytes, len(gather.pieces)) == (4, 32, 2)


@pytest.mark.parametrize(
    "output",
    [
        changed(two(), 1, offset=0),
        changed(two(), 1, offset=5),
        changed(two(), 1, row_stride=4),
        Output("out", "F32", (32,), two().copies[:1]),
        Output("out", "F32", (33,), two().copies),
        Output("out", "F32", (32,), (*two().copies, two().copies[0])),
        Output("out", "F32", (8,), (Copy(Region("in", 0, 1, 4, 4, 1), Region("out", 4, 1, 4, 4, 1)),)),
        Output("out", "F32", (8,), ()),
    ],
    ids=["overlap", "shifted", "other-stride", "hole", "short", "twice", "hole-at-start", "nothing"],
)
def test_a_plan_that_does_not_write_each_element_once_is_refused(output):
    with pytest.raises(CheckpointError, match=r"'out' does not write every element exactly once|leaves tensor 'out'"):
        lower(output)


def test_a_plan_that_changes_the_dtype_or_leaves_the_source_is_refused():
    with pytest.raises(CheckpointError, match="the plan copies BF16"):
        lower(two(), dtype="BF16")
    with pytest.raises(CheckpointError, match="leaves tensor 'in'"):
        lower(two(), size=31)


def test_elements_smaller_than_a_byte_move_only_whole():
    tensor = Tensor("x", "F4", (4, 6))
    assert place(Region("x", 0, 4, 6, 6, 1), tensor, Path("f"), 100).num_bytes == 12
    for region in (Region("x", 0, 6, 4, 1, 6), Region("x", 1, 1, 4, 4, 1), Region("x", 0, 1, 3, 3, 1)):
        with pytest.raises(CheckpointError, match="cannot be taken apart"):
            place(region, tensor, Path("f"), 100)


def test_neighbouring_runs_are_one():
    runs = [Run(Path("a"), 100, 0, 10), Run(Path("a"), 110, 10, 5), Run(Path("b"), 115, 15, 5)]
    assert coalesce(runs) == [Run(Path("a"), 100, 0, 15), Run(Path("b"), 115, 15, 5)]


@pytest.mark.parametrize("failing", [("copy_file_range",), ("copy_file_range", "sendfile")])
@pytest.mark.parametrize("how", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ETXTBSY, 0])
def test_without_the_kernels_help_the_bytes_are_the_same(tmp_path, monkeypatch, failing, how):
    def refuse(*_arguments):
        if how:
            raise OSError(how, os.strerror(how))
        return 0

    for name in failing:
        monkeypatch.setattr(os, name, refuse)
    arrays = random_file(tmp_path / "source.safetensors", {"in": 100_000}, 2)
    copies = [Copy(Region("in", 0, 1, 100_000, 100_000, 1), Region("out", 0, 1, 100_000, 100_000, 1))]
    np.testing.assert_array_equal(run_plan(tmp_path, copies, 100_000, 2, arrays), arrays["in"])


def test_a_source_that_shrinks_is_an_error_and_not_a_loop(tmp_path):
    file = tmp_path / "source"
    file.write_bytes(b"1234")
    (tmp_path / "target").write_bytes(b"")
    with pytest.raises(CheckpointError, match="source changed while it was read: no byte 4"):
        Copier(Files()).execute([Run(file, 0, 0, 8)], tmp_path / "target")


def test_an_error_of_the_disk_is_not_taken_for_a_missing_call(tmp_path, monkeypatch):
    def fail(*_arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "copy_file_range", fail)
    file = tmp_path / "source"
    file.write_bytes(b"1234")
    (tmp_path / "target").write_bytes(b"")
    with pytest.raises(OSError, match="Input/output"):
        Copier(Files()).execute([Run(file, 0, 0, 4)], tmp_path / "target")


def test_a_header_is_the_one_that_safetensors_writes(tmp_path):
    import torch
    from safetensors.torch import save_file

    torch_of = {
        "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
        "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "U32": "uint32",
        "F32": "float32", "C64": "complex64", "F64": "float64", "I64": "int64", "U64": "uint64",
    }  # fmt: skip
    assert set(DTYPE_BITS) - set(torch_of) == {"F4", "F6_E2M3", "F6_E3M2"}
    stored = {}
    for at, dtype in enumerate(torch_of.values()):
        size = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
        stored[f"t{at}.\u00fc"] = torch.zeros(3 * size, dtype=torch.uint8).view(getattr(torch, dtype))
        stored[f"a{at}"] = torch.zeros(2, size, dtype=torch.uint8).view(getattr(torch, dtype))
    stored["scalar"] = torch.tensor(1.5)
    save_file(stored, tmp_path / "theirs.safetensors", {"format": "pt"})
    header = read_header(tmp_path / "theirs.safetensors")
    assert make_header(header.tensors, header.metadata) == (header.raw, header.starts)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5_000_000_000), ("4GiB", 4 << 30), ("800 mb", 800_000_000), ("1.5K", 1500), ("7000", 7000)],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-5GB", "0", "5 G B", "nan", "1e9", "5"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="max_shard_size"):
        parse_size(text)


def outputs(*sizes: int) -> list[Output]:
    return [Output(f"layers.{at}", "U8", (size,), ()) for at, size in enumerate(sizes)]


def test_a_shard_ends_where_the_next_tensor_would_not_fit_in_natural_order():
    shards = pack(list(reversed(outputs(*[4] * 12))), 16, {"format": "pt"})
    assert [shard.name for shard in shards] == [f"model-0000{at}-of-00003.safetensors" for at in (1, 2, 3)]
    order = [sorted((each.name for each in shard.outputs), key=natural) for shard in shards]
    assert order == [[f"layers.{at}" for at in range(start, start + 4)] for start in (0, 4, 8)]
    assert [len(shard.header) % 8 for shard in shards] == [0, 0, 0]


def test_a_tensor_larger_than_a_shard_gets_its_own_and_one_shard_has_the_plain_name():
    assert [len(shard.outputs) for shard in pack(outputs(1, 50, 1), 10, None)] == [1, 1, 1]
    (single,) = pack(outputs(1, 2), 10, None)
    assert single.name == "model.safetensors"
    assert "__metadata__" not in json.loads(single.header[8:])
    assert single.file_bytes == len(single.header) + 3
    assert num_bytes("U8", (3,)) == 3
