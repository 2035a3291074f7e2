"""`convert --dequantize bf16`: the numbers are transformers' own, nothing quantised is left, and the result loads."""

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moe_accel.convert import decode, dequantize
from moe_accel.convert.commands import convert
from moe_accel.convert.quantized import find_quantized
from moe_accel.convert.regions import Tensor
from moe_accel.convert.run import Options, execute, prepare
from moe_accel.convert.verify import MismatchError
from moe_accel.errors import CheckpointError
from tests.unit.convert_job import at_call, check_nothing_unfinished_is_published, killed_at

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def many_pieces(monkeypatch):
    """Each matrix is taken in several pieces, the last of them smaller."""
    monkeypatch.setattr(decode, "CHUNK_ELEMENTS", 500)


def write(folder: Path, tensors: Tensors, config: dict) -> Path:
    """A checkpoint in two files; scales often lie in another file than their weight."""
    folder.mkdir()
    names = sorted(tensors)
    for at, some in enumerate((names[::2], names[1::2]), 1):
        save_file({name: tensors[name].contiguous() for name in some}, folder / f"model-0000{at}-of-00002.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hf_quant_config.json").write_text("{}")
    return folder


def read(folder: Path) -> Tensors:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    return found


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


def to_fp8(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in fp8 and its fp32 scales, one a block; the last blocks may be smaller."""
    rows, cols = weight.shape
    grid = (-(-rows // block[0]), -(-cols // block[1]))
    scale = torch.rand(grid) * 0.01 + 1e-3
    spread = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :cols]
    return (weight.float() / spread).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def one_pass(source: Path, target: Path, **options) -> Tensors:
    execute(prepare(source, target, Options("stacked", threads=2, dequantize="bf16", **options)))
    return read(target)


BLOCK = (8, 16)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory) -> Path:
    """A tiny qwen3_moe of which attention and experts are fp8 in blocks, as the hub has it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}
    config = Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2)
    folder = tmp_path_factory.mktemp("fp8")
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "plain")
    tensors = read(folder / "plain")
    for name in [name for name in tensors if "_proj.weight" in name]:
        tensors[name], tensors[name + "_scale_inv"] = to_fp8(tensors[name], BLOCK)
    written = json.loads((folder / "plain" / "config.json").read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}
    return write(folder / "quantized", tensors, written | {"quantization_config": quantization})


def reference(source: Path) -> Tensors:
    """The weights of `source` as transformers dequantises them."""
    tensors, found = read(source), {}
    for name, tensor in tensors.items():
        if name + "_scale_inv" in tensors:
            pair = (tensor, tensors[name + "_scale_inv"])
            found[name] = Fp8Dequantize(None)._dequantize_one(*pair, output_dtype=torch.bfloat16)
        elif not name.endswith("_scale_inv"):
            found[name] = tensor
    return found


def test_fp8_blocks_become_what_transformers_makes_of_them_and_the_model_loads(fp8, tmp_path):
    expected = reference(fp8)
    job = prepare(fp8, tmp_path / "out", Options("per-expert", threads=1, dequantize="bf16"))
    execute(job)
    found = read(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert [name for name in found if not same(found[name], expected[name])] == []
    assert not job.dequantization.folder.exists()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    manifest = json.loads((tmp_path / "out" / "moe_accel_manifest.json").read_text())["dequantized"]
    assert (manifest["to"], manifest["lossy"]) == ("bf16", True)
    assert len(manifest["weights"]) == len(manifest["consumed"]) == 2 * (4 + 4 * 3)


def test_the_stacked_result_gives_the_same_logits(fp8, tmp_path):
    one_pass(fp8, tmp_path / "stacked")
    shutil.copytree(fp8, tmp_path / "by_hand")
    shutil.copy(tmp_path / "stacked" / "config.json", tmp_path / "by_hand" / "config.json")
    for file in (tmp_path / "by_hand").glob("*.safetensors"):
        file.unlink()
    save_file(reference(fp8), tmp_path / "by_hand" / "model.safetensors", {"format": "pt"})
    tokens, logits = torch.arange(12)[None], []
    for folder in ("stacked", "by_hand"):
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert model.dtype == torch.bfloat16
        logits.append(model(tokens).logits)
    assert torch.equal(*logits)


def test_mxfp4_blocks_become_what_transformers_makes_of_them(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64, "head_dim": 16}
    config = GptOssConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=3)
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    expected = read(tmp_path / "plain")
    tensors = dict(expected)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, cols, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, cols // 32, 16), dtype=torch.uint8)
        scales = torch.randint(0, 256, (experts, rows, cols // 32), dtype=torch.uint8)  # overflow and nan as well
        scales[0] = torch.randint(110, 130, scales[0].shape)
        tensors |= {name + "_blocks": blocks, name + "_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales)
    written = json.loads((tmp_path / "plain" / "config.json").read_text())
    source = write(tmp_path / "source", tensors, written | {"quantization_config": {"quant_method": "mxfp4"}})
    found = one_pass(source, tmp_path / "out")
    assert found.keys() == expected.keys()
    assert [name for name in found if not same(found[name], expected[name])] == []
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def expand(scale: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    return torch.stack([torch.stack([scale[r * len(scale) // rows, c * scale.shape[1] // cols] for c in range(cols)])
                        for r in range(rows)])  # fmt: skip


def unpacked(raw: torch.Tensor) -> torch.Tensor:
    pairs = [[(FP4[byte & 15], FP4[byte >> 4]) for byte in row] for row in raw.view(torch.uint8).tolist()]
    return torch.tensor(pairs).flatten(1)


R, C = 40, 64
EXACT = torch.arange(R * C).remainder(256).to(torch.uint8).view(R, C)


@pytest.mark.parametrize("kind", ["tensor", "one", "channel", "column", "e8m0", "bf16-blocks", "nvfp4", "mxfp4-rows"])
def test_every_kind_of_scale_is_value_times_scale_rounded_once(kind):
    raw = EXACT.clone()
    weight, values, dtype = raw, raw.view(torch.float8_e4m3fn).float(), "F8_E4M3"
    if kind in ("nvfp4", "mxfp4-rows"):
        weight, dtype = raw[:, : C // 2], "U8" if kind == "nvfp4" else "I8"
        values = unpacked(weight)
    torch.manual_seed(1)
    scales = {
        "tensor": torch.tensor(0.37),
        "one": torch.tensor([0.37]),
        "channel": torch.rand(R),
        "column": torch.rand(R, 1),
        "e8m0": torch.randint(100, 140, (5, 4), dtype=torch.uint8),
        "bf16-blocks": torch.rand(5, 4).bfloat16(),
        "nvfp4": (torch.rand(R, C // 16) * 8).to(torch.float8_e4m3fn),
        "mxfp4-rows": torch.randint(100, 140, (R, C // 32), dtype=torch.uint8),
    }[kind]
    numbers = (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()
    of_scales = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "F8_E8M0", torch.float8_e4m3fn: "F8_E4M3"}
    data = {"w.weight": weight, "w.weight_scale": scales}
    names = {"w.weight": dtype, "w.weight_scale": of_scales[scales.dtype]}
    if kind == "nvfp4":
        data["w.weight_scale_2"], names["w.weight_scale_2"] = torch.tensor(0.013), "F32"
        numbers = numbers * data["w.weight_scale_2"]
    grid = numbers.view(-1, 1) if numbers.dim() < 2 else numbers
    tensors = {name: Tensor(name, names[name], tuple(data[name].shape)) for name in data}
    config = {"quantization_config": {"weight_block_size": [8, 16]}} if kind in ("e8m0", "bf16-blocks") else {}
    (one,) = find_quantized(tensors, config)

    def bytes_of(tensor: Tensor, at: int, num_bytes: int) -> bytearray:
        raw = data[tensor.name].contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return bytearray(raw[at : at + num_bytes])

    found = b"".join(decode.decoded(one, bytes_of))
    result = torch.frombuffer(bytearray(found), dtype=torch.bfloat16).view(R, C)
    assert same(result, (values * expand(grid, R, C)).bfloat16())


def test_blocks_that_do_not_divide_the_rows_end_early():
    torch.manual_seed(0)
    weight, scale = to_fp8(torch.randn(21, 30), (8, 16))
    data = {"w.weight": weight, "w.weight_scale_inv": scale}
    tensors = {n: Tensor(n, d, tuple(data[n].shape)) for n, d in zip(data, ("F8_E4M3", "F32"), strict=True)}
    (one,) = find_quantized(tensors, {"quantization_config": {"weight_block_size": [8, 16]}})
    raw = {name: each.contiguous().flatten().view(torch.uint8).numpy().tobytes() for name, each in data.items()}
    found = b"".join(decode.decoded(one, lambda tensor, at, num: bytearray(raw[tensor.name][at : at + num])))
    spread = scale.repeat_interleave(8, 0)[:21].repeat_interleave(16, 1)[:, :30]
    result = torch.frombuffer(bytearray(found), dtype=torch.bfloat16).view(21, 30)
    assert same(result, (weight.float() * spread).bfloat16())


def test_config_json_decides_the_block_size_and_shapes_must_agree():
    tensors = {
        "w.weight": Tensor("w.weight", "F8_E4M3", (256, 256)),
        "w.weight_scale_inv": Tensor("w.weight_scale_inv", "F32", (2, 2)),
    }
    assert find_quantized(tensors, {})[0].block == (128, 128)
    with pytest.raises(CheckpointError, match=r"blocks of 64 x 64, as config\.json says"):
        find_quantized(tensors, {"quantization_config": {"weight_block_size": [64, 64]}})


@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("m.experts.0.w1.qweight", "I32", "AWQ and GPTQ"),
        ("m.experts.0.w1.weight_packed", "I32", "compressed-tensors"),
        ("m.experts.0.w1.weight.absmax", "F32", "bitsandbytes"),
        ("m.experts.0.w1.weight", "F8_E4M3", "has no scale beside it"),
        ("m.experts.0.w1.weight", "BF16", "nothing is quantised"),
    ],
)
def test_what_has_no_known_formula_is_refused_with_the_reason(name, dtype, reason):
    with pytest.raises(CheckpointError, match=reason) as refused:
        find_quantized({name: Tensor(name, dtype, (8, 8))}, {})
    assert refused.value.hint


def test_a_dry_run_says_that_it_is_lossy_and_writes_nothing(fp8, tmp_path, capsys):
    options = Options("stacked", dequantize="bf16")
    assert convert(fp8, tmp_path / "out", options, dry_run=True, as_json=True) == 0
    said = capsys.readouterr()
    assert "lossy" in said.err
    record = json.loads(said.out)["dequantized"]
    assert record["lossy"]
    assert list(record["schemes"].values()) == [2 * (4 + 4 * 3)]
    assert convert(fp8, tmp_path / "out", options, dry_run=True, as_json=False) == 0
    assert "lossy: 32 weights dequantised to bf16" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_without_the_option_the_scales_stay(fp8, tmp_path):
    execute(prepare(fp8, tmp_path / "out", Options("stacked", threads=1)))
    found = read(tmp_path / "out")
    assert found["model.layers.0.mlp.experts.gate_up_proj"].dtype == torch.float8_e4m3fn
    assert found["model.layers.0.mlp.experts.gate_up_proj_scale_inv"].shape == (4, 8, 2)
    assert "quantization_config" in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("fails_in", ["dequantising", "the conversion", "removing"])
def test_what_was_interrupted_goes_on_and_gives_the_same_files(fp8, tmp_path, monkeypatch, fails_in):
    expected = one_pass(fp8, tmp_path / "whole")

    def fail(*arguments, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if fails_in == "dequantising":
            calls, digest = iter(range(100)), dequantize.digest
            patched.setattr(dequantize, "digest", lambda *some: fail() if next(calls) > 20 else digest(*some))
        elif fails_in == "the conversion":
            patched.setattr("moe_accel.convert.run._write_shards", fail)
        else:
            patched.setattr(dequantize.Dequantization, "remove", fail)
        with pytest.raises(KeyboardInterrupt):
            one_pass(fp8, tmp_path / "out")
    left = list(tmp_path.glob(".out.dequantized-*"))
    assert len(left) == 1
    if fails_in == "removing":
        next(left[0].glob("*.safetensors")).unlink()  # killed while it removed
    found = one_pass(fp8, tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(same(found[name], expected[name]) for name in found)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out", "whole"]


def test_a_wrong_byte_in_the_bf16_files_is_found(fp8, tmp_path, monkeypatch):
    real = dequantize.write_all

    def damaged(fd, view, at):
        real(fd, memoryview(bytes([view[0] ^ 1]) + bytes(view[1:])), at)

    monkeypatch.setattr(dequantize, "write_all", damaged)
    with pytest.raises(MismatchError, match="is not what was computed from"):
        one_pass(fp8, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir()}


def test_a_finished_directory_is_checked_and_nothing_is_dequantised_again(fp8, tmp_path, monkeypatch):
    one_pass(fp8, tmp_path / "out", max_shard_bytes=9_000)
    expected = bytes_of(tmp_path / "out")
    assert "model.safetensors.index.json" in expected
    monkeypatch.setattr(dequantize, "decoded", None)  # cannot be called
    for verify in ("full", "header"):
        options = Options("stacked", threads=2, dequantize="bf16", max_shard_bytes=9_000, verify=verify)
        report = execute(prepare(fp8, tmp_path / "out", options))
        assert (report.written, len(report.kept)) == ((), len(expected) - 3)
        assert (report.num_digests > 0) == (verify == "full")
        assert bytes_of(tmp_path / "out") == expected
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_a_finished_directory_that_was_damaged_is_told(fp8, tmp_path):
    one_pass(fp8, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(MismatchError, match="is not what was written") as caught:
        one_pass(fp8, tmp_path / "out")
    assert caught.value.hint is not None
    assert f"remove {tmp_path / 'out'}" in caught.value.hint


@pytest.mark.slow
def test_killed_at_random_points_a_second_run_gives_the_same_directory(fp8, tmp_path):
    torch.set_num_threads(1)  # a process that was forked has none of the others

    def job(name: str):
        options = Options("stacked", threads=2, dequantize="bf16", max_shard_bytes=9_000)
        return prepare(fp8, tmp_path / name, options)

    with at_call(0, lambda: None) as count:
        execute(job("counted"))
    expected, chooser = bytes_of(tmp_path / "counted"), random.Random(0)
    kills, upper = 0, count[0]  # how many calls there are depends on the disk: it is synced again and again
    for _ in range(40):
        number = chooser.randrange(1, upper)
        if killed_at(number, job("out")) == signal.SIGKILL:
            kills += 1
        else:
            upper = max(2, number)
        check_nothing_unfinished_is_published(tmp_path / "out", expected)
        if number % 3 == 0:  # and once more while it recovers
            killed_at(chooser.randrange(1, number), job("out"))
            check_nothing_unfinished_is_published(tmp_path / "out", expected)
        execute(job("out"))
        assert bytes_of(tmp_path / "out") == expected
        assert sorted(each.name for each in tmp_path.iterdir()) == ["counted", "out"]
        shutil.rmtree(tmp_path / "out")
        if kills == 10:
            return
    pytest.fail(f"{kills} of 40 runs were killed")
