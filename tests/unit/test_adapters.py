"""Adapters that PEFT wrote: to one pair of matrices an expert and back, bit for bit, and meaning the same."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from moe_accel.adapters.dialect import Options
from moe_accel.adapters.run import Request, convert_adapter
from tests.unit.adapters_made import (
    EXPERTS_TARGETS,
    add_adapter,
    assert_same_deltas,
    build,
    expected_deltas,
    factors,
    file_deltas,
    is_close,
    peft_deltas,
    per_expert,
    write,
)

# said of every pattern of a parameter, which PEFT applies all the same
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FAMILIES = {  # target_modules, target_parameters
    "qwen3_moe": (["q_proj", "o_proj"], EXPERTS_TARGETS),
    "mixtral": (["q_proj", "v_proj"], EXPERTS_TARGETS),
    "gpt_oss": (["q_proj", "o_proj"], EXPERTS_TARGETS),
    "deepseek_v3": (["q_a_proj", "o_proj"], EXPERTS_TARGETS),
    "granitemoe": (["q_proj"], ["block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"]),
    "nemotron_h": ([], ["mixer.experts.up_proj", "mixer.experts.down_proj"]),
    "llama4": (["q_proj"], ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]),
}
CASES = [
    *[(family, "both") for family in FAMILIES],
    ("qwen3_moe", "inner"),
    ("qwen3_moe", "down"),
    ("gpt_oss", "inner"),
    ("nemotron_h", "inner"),
    ("llama4", "down"),
]


def made(family: str, which: str = "both", **config):
    modules, parameters = FAMILIES[family]
    chosen = {"both": parameters, "inner": parameters[:1], "down": parameters[1:]}[which]
    return add_adapter(build(family), **{"target_modules": modules, "target_parameters": chosen} | config)


def same_files(first: Path, second: Path) -> bool:
    """The same bytes of weights; PEFT writes targets in the order of a set."""
    configs = [json.loads((folder / CONFIG).read_text()) for folder in (first, second)]
    for config in configs:
        config |= {key: sorted(config[key]) for key in ("target_modules", "target_parameters")}
    return configs[0] == configs[1] and (first / WEIGHTS).read_bytes() == (second / WEIGHTS).read_bytes()


@pytest.mark.parametrize(("family", "which"), CASES)
def test_to_per_expert_means_what_peft_computes_and_back_is_the_same_file(family, which, tmp_path):
    model = made(family, which)
    model.save_pretrained(tmp_path / "peft")
    convert_adapter(tmp_path / "peft", tmp_path / "single", Request("per-expert"))
    assert_same_deltas(file_deltas(tmp_path / "single"), peft_deltas(model))
    convert_adapter(tmp_path / "single", tmp_path / "back", Request("peft"))
    assert same_files(tmp_path / "peft", tmp_path / "back")


@pytest.mark.parametrize("r", [1, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_rank_and_dtype_comes_back_bit_for_bit(r, dtype, tmp_path):
    model = made("qwen3_moe", r=r).to(dtype)
    model.save_pretrained(tmp_path / "peft")
    convert_adapter(tmp_path / "peft", tmp_path / "single", Request("per-expert"))
    convert_adapter(tmp_path / "single", tmp_path / "back", Request("peft"))
    assert same_files(tmp_path / "peft", tmp_path / "back")
    assert load_file(tmp_path / "single" / WEIGHTS).popitem()[1].dtype == dtype


def test_names_and_shapes_are_those_that_vllm_and_sglang_look_for(tmp_path):
    """vLLM (lora_model.py, `_is_remote_expert_key`, `check_unexpected_modules`) and SGLang (lora.py) read a pair
    [r, in], [out, r] for `experts.{e}.{gate,up,down}_proj`, and SGLang wants a list of target_modules."""
    made("qwen3_moe").save_pretrained(tmp_path / "peft")
    convert_adapter(tmp_path / "peft", tmp_path / "single", Request("per-expert"))
    tensors = load_file(tmp_path / "single" / WEIGHTS)
    shapes = {"gate_proj": (32, 24), "up_proj": (32, 24), "down_proj": (24, 32)}
    expected = {}
    for layer in range(2):
        for expert in range(8):
            for leaf, (ins, outs) in shapes.items():
                name = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{leaf}"
                expected |= {f"{name}.lora_A.weight": (6, ins), f"{name}.lora_B.weight": (outs, 6)}
    assert {name: tuple(each.shape) for name, each in tensors.items() if "experts" in name} == expected
    assert sum("self_attn" in name for name in tensors) == 8
    config = json.loads((tmp_path / "single" / CONFIG).read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "o_proj", "q_proj", "up_proj"]
    assert (config["r"], config["lora_alpha"], config["target_parameters"]) == (6, 9, None)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})


def test_mixtral_is_called_what_the_hub_calls_it(tmp_path):
    made("mixtral").save_pretrained(tmp_path / "peft")
    convert_adapter(tmp_path / "peft", tmp_path / "single", Request("per-expert"))
    names = [name for name in load_file(tmp_path / "single" / WEIGHTS) if ".experts.3." in name and "layers.1" in name]
    prefix = "base_model.model.model.layers.1.block_sparse_moe.experts.3"
    assert sorted(names) == [f"{prefix}.{leaf}.lora_{half}.weight" for leaf in ("w1", "w2", "w3") for half in "AB"]


@pytest.mark.parametrize("rslora", [False, True])
def test_apart_to_together_doubles_the_rank_and_keeps_the_scaling(rslora, tmp_path):
    """Gate and up with an A each: block-diagonal, zeros in between; apart again they are the same file."""
    roles = factors(4, 3, 32, 24)
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    write(
        tmp_path / "single",
        dict(per_expert(roles, "model.layers.0.mlp.experts", names)),
        use_rslora=rslora,
        target_modules=["down_proj", "gate_proj", "up_proj"],
    )
    convert_adapter(tmp_path / "single", tmp_path / "peft", Request("peft"))
    config = json.loads((tmp_path / "peft" / CONFIG).read_text())
    assert config["rank_pattern"] == {r"experts\.gate_up_proj": 6}
    (alpha,) = config["alpha_pattern"].values()
    assert is_close(alpha, 6 * math.sqrt(2) if rslora else 12)
    assert (config["target_modules"], config["target_parameters"]) == ([], EXPERTS_TARGETS)
    b = load_file(tmp_path / "peft" / WEIGHTS)["base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight"]
    assert b.shape == (48, 24)
    assert (b == 0).sum() == b.numel() // 2
    convert_adapter(tmp_path / "peft", tmp_path / "back", Request("per-expert"))
    one, two = (load_file(tmp_path / folder / WEIGHTS) for folder in ("single", "back"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    back = json.loads((tmp_path / "back" / CONFIG).read_text())
    scaling = 6 / math.sqrt(3) if rslora else 2
    assert is_close(back["lora_alpha"] / back["r"], scaling)
    assert not back.get("use_rslora")
    assert (back["rank_pattern"], back["alpha_pattern"]) == ({}, {})


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "llama4"])
def test_peft_loads_what_is_written_and_computes_the_same(family, tmp_path):
    model = made(family).eval()
    model.save_pretrained(tmp_path / "peft")
    convert_adapter(tmp_path / "peft", tmp_path / "single", Request("per-expert"))
    convert_adapter(tmp_path / "single", tmp_path / "back", Request("peft"))
    again = PeftModel.from_pretrained(build(family), tmp_path / "back").eval()
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_an_adapter_apart_is_loaded_by_peft_with_the_block_diagonal_factors(tmp_path):
    roles = factors(8, 3, 32, 24)
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    tensors = {}
    for layer in range(2):
        tensors |= dict(per_expert(roles, f"model.layers.{layer}.mlp.experts", names))
    write(tmp_path / "single", tensors)
    convert_adapter(tmp_path / "single", tmp_path / "peft", Request("peft"))
    model = PeftModel.from_pretrained(build("qwen3_moe"), tmp_path / "peft")
    assert_same_deltas(peft_deltas(model), expected_deltas(roles, 2, "0") | expected_deltas(roles, 2, "1"))


def test_patterns_of_other_modules_stay_and_experts_get_their_own(tmp_path):
    model = made(
        "qwen3_moe",
        rank_pattern={"q_proj": 4, "mlp.experts.gate_up_proj": 10},
        alpha_pattern={"q_proj": 6, "gate_up_proj": 15},
    )
    model.save_pretrained(tmp_path / "peft")
    convert_adapter(tmp_path / "peft", tmp_path / "single", Request("per-expert"))
    assert_same_deltas(file_deltas(tmp_path / "single"), peft_deltas(model))
    config = json.loads((tmp_path / "single" / CONFIG).read_text())
    inside = r"experts\.\d+\."
    assert config["rank_pattern"] == {f"{inside}gate_proj": 10, f"{inside}up_proj": 10, "q_proj": 4}
    assert config["alpha_pattern"] == {f"{inside}gate_proj": 15, f"{inside}up_proj": 15, "q_proj": 6}
    convert_adapter(tmp_path / "single", tmp_path / "back", Request("peft"))
    again = PeftModel.from_pretrained(build("qwen3_moe"), tmp_path / "back")
    assert_same_deltas(peft_deltas(again), peft_deltas(model))
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (tmp_path / "peft" / WEIGHTS).read_bytes()


def test_options_have_nothing_to_say_about_what_shapes_decide(tmp_path):
    made("qwen3_moe").save_pretrained(tmp_path / "peft")
    with pytest.raises(ValueError, match="cannot be swapped"):
        convert_adapter(tmp_path / "peft", tmp_path / "x", Request("per-expert", options=Options(lora_order="swapped")))
    assert not (tmp_path / "x").exists()
