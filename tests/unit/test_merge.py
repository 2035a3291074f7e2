"""`moe-accel merge`: what PEFT's merge_and_unload gives, from and to any layout, and how much of it survives bf16."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_accel.adapters import merge_blocks, numbers
from moe_accel.adapters.merge import Options, execute, prepare
from moe_accel.adapters.numbers import add_delta, to_bits, to_floats
from moe_accel.adapters.run import Request, convert_adapter
from moe_accel.convert import run as converting
from moe_accel.convert.source import open_checkpoint
from moe_accel.convert.verify import compare
from moe_accel.errors import CheckpointError
from tests.unit.adapters_made import EXPERTS_TARGETS, add_adapter, build, expected_deltas, factors, per_expert, write

pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]
FAMILIES = {
    "qwen3_moe": {"target_modules": ["q_proj", "o_proj", "lm_head"]},
    "mixtral": {"target_parameters": [*EXPERTS_TARGETS, "mlp.gate.weight"], "target_modules": ["q_proj"]},
    "gpt_oss": {},
    "deepseek_v3": {"target_modules": ["q_a_proj", "o_proj"]},
    "granitemoe": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "nemotron_h": {
        "target_parameters": ["experts.up_proj", "experts.down_proj"],
        "target_modules": ["shared_experts.up_proj"],
    },
    "llama4": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each for file in folder.glob("*.safetensors") for name, each in load_file(file).items()}


def made(folder: Path, family: str, dtype: torch.dtype = torch.float32, scale: float = 0.1, **config) -> tuple:
    """Base and adapter on disk, and the model that PEFT merges."""
    model = build(family, dtype)
    model.save_pretrained(folder / "base")
    model.config.save_pretrained(folder / "base")
    peft_model = add_adapter(model, scale=scale, **{**FAMILIES[family], **config})
    peft_model.save_pretrained(folder / "adapter")
    return peft_model


def merge(folder: Path, out: str = "out", adapter: str = "adapter", base: str = "base", **options):
    return execute(prepare(folder / adapter, folder / base, folder / out, Options(**options)))


def loaded(family: str, folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What plain transformers makes of a directory; nothing may be missing or unexpected."""
    model, info = type(build(family)).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return dict(model.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_fp32_base_gets_what_peft_gives(family, tmp_path):
    """Both compute in fp32, in other orders: a sum of 6 products, and one of two terms."""
    expected = made(tmp_path, family).merge_and_unload().state_dict()
    report = merge(tmp_path)
    found = loaded(family, tmp_path / "out", torch.float32)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        bound = 16 * torch.finfo(torch.float32).eps * value.abs().max()
        assert (found[name] - value).abs().max() <= bound, name
    assert report.total.gain == pytest.approx(1, abs=1e-4)
    assert report.total.num_lost == report.total.num_zero == 0


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_a_bf16_base_is_rounded_once_from_fp32(family, tmp_path):
    """The same model in fp32, with the same bf16 base values, merged by PEFT and rounded: at most ties differ."""
    peft_model = made(tmp_path, family, torch.bfloat16, scale=0.03).float()
    expected = peft_model.merge_and_unload().state_dict()
    merge(tmp_path)
    found = loaded(family, tmp_path / "out", torch.bfloat16)
    num = different = 0
    for name, value in expected.items():
        rounded = value.to(found[name].dtype)  # routers that a model keeps in fp32 are rounded to nothing
        num, different = num + value.numel(), different + int((found[name] != rounded).sum())
        near = (found[name].float() - value).abs() <= (rounded.float() - value).abs() + 1e-5 * value.abs()
        assert near.all(), name
    assert different <= 1e-3 * num


@pytest.mark.parametrize("to", [None, "stacked", "per-expert", "nemo"])
@pytest.mark.parametrize("base", ["hub", "stacked"])
@pytest.mark.parametrize("dialect", ["peft", "per-expert"])
def test_every_pair_of_layouts_gives_the_same_checkpoint(dialect, base, to, tmp_path):
    made(tmp_path, "qwen3_moe", torch.bfloat16)
    convert_adapter(tmp_path / "adapter", tmp_path / "per-expert", Request("per-expert"))
    job = converting.prepare(tmp_path / "base", tmp_path / "stacked", converting.Options("stacked"))
    converting.execute(job)
    merge(tmp_path, "reference")
    folder = "base" if base == "hub" else "stacked"
    merge(tmp_path, adapter="adapter" if dialect == "peft" else dialect, base=folder, to=to)
    found = compare(tmp_path / "reference", tmp_path / "out")
    assert found.differences == ()
    assert found.num_parts == 48


def test_shared_experts_and_dense_layers_that_peft_cannot_target_are_merged(tmp_path):
    """PEFT 0.21 takes `gate_proj` of shared experts for the experts' own; adapters of before have it all."""
    base = build("deepseek_v3")
    base.save_pretrained(tmp_path / "base")
    roles, tensors = factors(8, 3, 32, 24), {}
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    for layer in range(2):
        tensors |= dict(per_expert(roles, f"model.layers.{layer}.mlp.experts", names))
    shared = base.state_dict()["model.layers.1.mlp.shared_experts.gate_proj.weight"]
    a, b = np.ones((3, shared.shape[1]), np.float32), np.ones((shared.shape[0], 3), np.float32)
    stem = "base_model.model.model.layers.1.mlp.shared_experts.gate_proj"
    tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    write(tmp_path / "adapter", tensors, target_modules=["gate_proj", "up_proj", "down_proj"])
    report = merge(tmp_path)
    assert report.total.num_matrices == 2 * 8 * 3 + 1
    before, after = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "out")
    name = "model.layers.1.mlp.shared_experts.gate_proj.weight"
    assert torch.equal(after[name], before[name] + 6)
    for (layer, role, expert), delta in (expected_deltas(roles, 2, "0") | expected_deltas(roles, 2, "1")).items():
        name = f"model.layers.{layer}.mlp.experts.{expert}.{role}_proj.weight"
        assert (after[name] - before[name] - delta).abs().max() < 1e-5
    convert_adapter(tmp_path / "adapter", tmp_path / "peft", Request("peft"))
    merge(tmp_path, "again", adapter="peft")
    again = tensors_of(tmp_path / "again")
    assert all((again[name] - each).abs().max() <= 1e-5 for name, each in after.items())


def test_several_files_have_an_index_and_the_same_bits(tmp_path):
    made(tmp_path, "qwen3_moe", torch.bfloat16)
    merge(tmp_path, "one")
    report = merge(tmp_path, "several", max_shard_bytes=20_000, threads=2)
    assert len(report.job.shards) > 3
    assert open_checkpoint(tmp_path / "several").index_metadata is not None
    assert compare(tmp_path / "one", tmp_path / "several").differences == ()
    assert (tmp_path / "several" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 3, "mlp.experts.down_proj": 2}, "alpha_pattern": {"mlp.experts.gate_up_proj": 30}},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
        {"target_modules": ["v_proj"], "target_parameters": None},
    ],
    ids=["rslora", "patterns", "embedding", "modules_to_save", "one-parameter", "no-experts"],
)
def test_scalings_patterns_and_whole_tensors_are_peft_s(config, tmp_path):
    model = made(tmp_path, "qwen3_moe", **config)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.add_(0.5)
    model.save_pretrained(tmp_path / "adapter")
    expected = model.merge_and_unload().state_dict()
    merge(tmp_path)
    found = loaded("qwen3_moe", tmp_path / "out", torch.float32)
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 16 * torch.finfo(torch.float32).eps * value.abs().max(), name


def test_what_survives_is_what_the_weights_say(tmp_path):
    """A small adapter is partly lost in bf16; gain and share are computed again here from the files, in fp64."""
    model = made(tmp_path, "qwen3_moe", torch.bfloat16, scale=0.005, target_modules=["q_proj"])
    report = merge(tmp_path, "stacked", to="stacked")
    job = converting.prepare(tmp_path / "base", tmp_path / "base-stacked", converting.Options("stacked"))
    converting.execute(job)
    before, after = tensors_of(tmp_path / "base-stacked"), tensors_of(tmp_path / "stacked")
    deltas = {}
    for layer in range(2):
        q = model.base_model.model.model.layers[layer].self_attn.q_proj
        a, b = q.lora_A["default"].weight.double(), q.lora_B["default"].weight.double()
        deltas[f"model.layers.{layer}.self_attn.q_proj.weight"] = 1.5 * b @ a
    effect = sum(((after[n].double() - before[n].double()) * d).sum() for n, d in deltas.items())
    delta = sum((d * d).sum() for d in deltas.values())
    changed = sum((after[n] != before[n]).sum() for n in deltas) / sum(d.numel() for d in deltas.values())
    found = report.roles["q_proj"]
    assert found.gain == pytest.approx((effect / delta).item(), rel=1e-4)
    assert found.changed == pytest.approx(changed.item())
    assert found.gain < 0.99
    assert found.changed < 0.9
    assert set(report.roles) == {"q_proj", "experts gate", "experts up", "experts down"}
    manifest = json.loads((tmp_path / "stacked" / "moe_accel_manifest.json").read_text())
    assert manifest["merged"]["total"]["gain"] == report.total.gain


# numbers


def test_bf16_is_rounded_to_the_nearest_and_ties_to_even_as_torch_does():
    bits = np.arange(0, 1 << 32, 40_503, dtype=np.uint32)  # every exponent, ties and neighbours of ties among them
    ties = (np.arange(0, 1 << 16, dtype=np.uint32) << 16) + 0x8000
    bits = np.concatenate([bits, ties, ties - 1, ties + 1])
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(to_bits(values, "BF16"), expected)
    assert np.array_equal(to_floats(expected, "BF16"), torch.from_numpy(values).bfloat16().float().numpy())


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("broken", ["weight", "overflow", "factor"])
def test_a_value_that_is_not_finite_stops_the_merge(dtype, broken):
    kind = np.float64 if dtype == "F64" else np.float32
    weight, a, b = np.ones((5, 4), kind), np.zeros((2, 4), kind), np.zeros((5, 2), kind)
    largest = torch.finfo(
        {"BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}.get(dtype, torch.float32)
    ).max
    if broken == "weight":
        weight[3, 2] = np.nan
    elif broken == "factor":
        a[1, 1] = np.inf
    else:
        weight[0, 0], a[0, 0], b[0, 0] = largest, 1, largest / 2
    with (
        np.errstate(all="ignore"),
        pytest.raises(CheckpointError, match="w: the merged weight has values"),
    ):
        add_delta(to_bits(weight, dtype), dtype, a, b, 1.0, "w")


def test_a_large_matrix_is_merged_in_pieces_with_the_same_bits(tmp_path, monkeypatch):
    made(tmp_path, "qwen3_moe", torch.bfloat16, target_modules=["q_proj", "embed_tokens"])
    merge(tmp_path, "whole")
    monkeypatch.setattr(merge_blocks, "CHUNK_ELEMENTS", 100)
    monkeypatch.setattr(numbers, "ROWS_ELEMENTS", 64)
    report = merge(tmp_path, "pieces")
    assert compare(tmp_path / "whole", tmp_path / "pieces").differences == ()
    assert report.roles["q_proj"].num_matrices == 2
    assert report.total.num_matrices == report.job.plan.num_factors


# what is refused


def refusal(folder: Path, **options) -> str:
    with pytest.raises(CheckpointError) as error:
        merge(folder, **options)
    assert not list((folder / "out").glob("*.safetensors")) if (folder / "out").exists() else True
    return str(error.value)


def edit_config(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


CONFIGS = {
    "use_dora": (True, "DoRA also rescales"),
    "lora_bias": (True, "biases of its own"),
    "fan_in_fan_out": (True, "(input, output) features"),
    "bias": ("all", "biases of the base model were trained"),
    "init_lora_weights": ("pissa_niter_4", "it changed the base weights before training"),
    "layer_replication": ([[0, 2]], "layers of the base model are repeated"),
    "peft_type": ("LOHA", "only LORA is understood"),
}


@pytest.mark.parametrize("key", CONFIGS)
def test_what_is_more_than_a_sum_is_refused(key, tmp_path):
    made(tmp_path, "qwen3_moe")
    value, message = CONFIGS[key]
    edit_config(tmp_path / "adapter" / "adapter_config.json", **{key: value})
    assert message in refusal(tmp_path)


def test_a_quantised_base_is_refused_with_what_to_do(tmp_path):
    made(tmp_path, "qwen3_moe")
    edit_config(tmp_path / "base" / "config.json", quantization_config={"quant_method": "fp8"})
    assert "is quantised (fp8)" in (said := refusal(tmp_path))
    assert "--dequantize bf16" in said


BASES = {
    "another width": (
        lambda name, value: value[..., :-2] if "q_proj" in name else value,
        "q_proj.weight BF16 [32, 30]",
    ),
    "an expert less": (lambda name, value: None if ".experts.7." in name else value, "the base has experts 0-6"),
    "no such layer": (lambda name, value: None if "layers.1." in name else value, "the base has no such experts"),
    "no such module": (
        lambda name, value: None if "1.self_attn.q_proj" in name else value,
        "the base has no model.layers",
    ),
    "fp8": (lambda name, value: value.to(torch.float8_e4m3fn) if "q_proj" in name else value, "F8_E4M3"),
}


@pytest.mark.parametrize("case", BASES)
def test_a_base_that_the_adapter_does_not_fit_is_refused_with_the_numbers(case, tmp_path):
    made(tmp_path, "qwen3_moe", torch.bfloat16)
    change, message = BASES[case]
    file = tmp_path / "base" / "model.safetensors"
    kept = {name: value for name, each in load_file(file).items() if (value := change(name, each)) is not None}
    save_file({name: each.contiguous() for name, each in kept.items()}, file)
    assert message in refusal(tmp_path)


def test_an_adapter_that_changes_nothing_is_refused(tmp_path):
    made(tmp_path, "qwen3_moe", torch.bfloat16, scale=1e-6, target_modules=["q_proj"])
    assert "the adapter changes no weight" in (said := refusal(tmp_path))
    assert "rounding lost all of it" in said
    assert {path.name for path in (tmp_path / "out").iterdir()}.isdisjoint(
        {"model.safetensors", "moe_accel_manifest.json"}
    )


def test_untrained_experts_are_counted_and_no_error(tmp_path):
    model = made(tmp_path, "qwen3_moe")
    for name, parameter in model.named_parameters():
        if "experts.lora_B" in name:  # down of expert 5 of 8, which is every 8th column
            parameter.data[:, 5::8] = 0
    model.save_pretrained(tmp_path / "adapter")
    report = merge(tmp_path)
    assert report.roles["experts down"].num_zero == 2
    assert report.total.num_zero == 2
    assert report.total.num_lost == 0


def test_a_tensor_that_is_no_factor_is_refused(tmp_path):
    made(tmp_path, "qwen3_moe")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file) | {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(32)
    }
    save_file(tensors, file)
    assert "q_proj.lora_magnitude_vector is no plain LoRA factor" in refusal(tmp_path)
    save_file({name: each for name, each in tensors.items() if not name.endswith("q_proj.lora_A.weight")}, file)
    assert "not a pair of lora_A and lora_B" in refusal(tmp_path)
    save_file({"base_model.model.score.weight": torch.ones(2, 32)}, file)
    assert "the base has no score.weight" in refusal(tmp_path)


def test_an_output_layer_tied_to_the_embedding_is_named(tmp_path):
    model = build("qwen3_moe", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    stem = "base_model.model.lm_head"
    tensors = {
        f"{stem}.lora_A.weight": np.ones((3, 32), np.float32),
        f"{stem}.lora_B.weight": np.ones((96, 3), np.float32),
    }
    write(tmp_path / "adapter", tensors)
    assert "lm_head.weight, as the output layer is tied to the embedding" in refusal(tmp_path)


def test_layers_that_are_called_otherwise_in_the_base_are_found(tmp_path):
    """Nemotron-H is published below `backbone`, Nemotron Omni below `language_model.backbone`."""
    made(tmp_path, "nemotron_h")
    merge(tmp_path, "reference")
    file = tmp_path / "base" / "model.safetensors"
    renamed = {name.replace("backbone.", "language_model.backbone.", 1): each for name, each in load_file(file).items()}
    save_file(renamed, file)
    report = merge(tmp_path)
    said = "model.layers of the adapter is language_model.backbone.layers of the base"
    assert any(said in note for note in report.job.plan.notes)
    expected, found = tensors_of(tmp_path / "reference"), tensors_of(tmp_path / "out")
    found = {name.replace("language_model.", "", 1): each for name, each in found.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_after_a_full_disk_the_same_merge_goes_on(tmp_path, monkeypatch):
    made(tmp_path, "qwen3_moe", torch.bfloat16)
    real, calls = merge_blocks.add_delta, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) > 20:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(merge_blocks, "add_delta", failing)
    with pytest.raises(CheckpointError, match="no space left while writing"):
        merge(tmp_path, max_shard_bytes=20_000)
    whole = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    monkeypatch.setattr(merge_blocks, "add_delta", real)
    report = merge(tmp_path, max_shard_bytes=20_000)
    assert set(report.kept) == whole != set()
    merge(tmp_path, "reference")
    assert compare(tmp_path / "reference", tmp_path / "out").differences == ()
