"""Every dialect, made by hand of known factors, comes out as these factors; what is ambiguous is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from moe_accel.adapters.dialect import Options
from moe_accel.adapters.orient import contrast
from moe_accel.adapters.run import Request, convert_adapter
from moe_accel.errors import CheckpointError
from tests.unit.adapters_made import (
    EXPERTS_TARGETS,
    assert_same_deltas,
    auto,
    expected_deltas,
    factors,
    file_deltas,
    fused,
    per_expert,
    stacked,
    write,
)

RECORDED = Path(__file__).parent / "recorded_adapters"
E, R, H, I = 4, 3, 32, 24  # noqa: E741
EXPERTS = "model.layers.0.mlp.experts"
STEM = f"base_model.model.{EXPERTS}"
NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
GROUPED = {"lora_B_layout": "grouped_by_expert"}


def shared_a(gated: bool = True, inner: int = I, rank: int = R) -> dict:
    """Factors whose gate and up have the same A, as one stacked parameter has."""
    roles = factors(E, rank, H, inner, gated=gated)
    return roles | ({"up": (roles["gate"][0], roles["up"][1])} if gated else {})


def two_pairs(roles, swapped=False, grouped=False) -> dict[str, np.ndarray]:
    first = fused(roles) if "gate" in roles else roles["up"]
    pairs = (("base_layer.", first), ("", roles["down"]))
    return {
        f"{STEM}.{inner}{half}.weight": each
        for inner, pair in pairs
        for half, each in stacked(*pair, swapped, grouped).items()
    }


def three_dimensional(roles) -> dict[str, np.ndarray]:
    pairs = (("base_layer.", fused(roles)), ("", roles["down"]))
    found = {}
    for inner, (a, b) in pairs:
        found |= {f"{STEM}.{inner}lora_A.weight": a, f"{STEM}.{inner}lora_B.weight": b.transpose(1, 2, 0)}
    return found


def shared_outer(roles) -> dict[str, np.ndarray]:
    found = {}
    for role, leaf in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        a, b = roles[role]
        a, b = (a, b[:1]) if role == "down" else (a[:1], b)
        found |= {f"{STEM}.{leaf}.lora_A.weight": a, f"{STEM}.{leaf}.lora_B.weight": b}
    return found


def by_projection(roles) -> dict[str, np.ndarray]:
    found = {}
    for role, (a, b) in roles.items():
        found |= {f"{STEM}.{NAMES[role]}.lora_A": a, f"{STEM}.{NAMES[role]}.lora_B": b}
    return found


def nemo(roles) -> dict[str, np.ndarray]:
    found = {}
    for name, (a, b) in (("gate_and_up", fused(roles)), ("down", roles["down"])):
        found |= {f"{STEM}.lora_{name}_A": a.transpose(0, 2, 1), f"{STEM}.lora_{name}_B": b.transpose(0, 2, 1)}
    return found


def outer(roles) -> dict:
    """The same factors, with the outer ones alike for all experts."""
    found = {}
    for role, (a, b) in roles.items():
        a, b = (a, np.repeat(b[:1], E, axis=0)) if role == "down" else (np.repeat(a[:1], E, axis=0), b)
        found[role] = (a, b)
    return found


PEFT_CONFIG = {"target_parameters": EXPERTS_TARGETS}
DIALECTS = {
    "D1": (lambda roles: dict(per_expert(roles, EXPERTS, NAMES)), {}),
    "D2": (two_pairs, PEFT_CONFIG | {"peft_version": "0.19.1"}),
    "D3": (lambda roles: two_pairs(roles, swapped=True), PEFT_CONFIG | {"peft_version": "0.18.1"}),
    "D4": (lambda roles: two_pairs(roles, grouped=True), PEFT_CONFIG | GROUPED),
    "D5": (lambda roles: two_pairs(roles, swapped=True, grouped=True), GROUPED),
    "D6": (shared_outer, {}),
    "D7": (three_dimensional, {}),
    "D8": (by_projection, {}),
    "D9": (nemo, {}),
}


@pytest.mark.parametrize("to", ["per-expert", "peft"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_dialect_gives_the_factors_it_was_made_of(dialect, to, tmp_path):
    make, config = DIALECTS[dialect]
    roles = outer(shared_a()) if dialect == "D6" else shared_a()
    write(tmp_path / "in", make(roles), **config)
    done = convert_adapter(tmp_path / "in", tmp_path / "out", Request(to))
    assert done.found.dialects == [dialect]
    if to == "peft":
        again = convert_adapter(tmp_path / "out", tmp_path / "single", Request("per-expert"))
        assert again.found.dialects == ["D2"]
    assert_same_deltas(file_deltas(tmp_path / ("out" if to == "per-expert" else "single")), expected_deltas(roles, 2))


@pytest.mark.parametrize("dialect", ["D3", "D4", "D5", "D7", "D8", "D9"])
def test_it_becomes_bit_for_bit_what_peft_would_have_written(dialect, tmp_path):
    make, config = DIALECTS[dialect]
    roles = shared_a()
    write(tmp_path / "in", make(roles), **config)
    convert_adapter(tmp_path / "in", tmp_path / "out", Request("peft"))
    found, expected = load_file(tmp_path / "out" / "adapter_model.safetensors"), two_pairs(roles)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_parameters"] == EXPERTS_TARGETS
    assert config["peft_version"] == "0.19.1"
    assert "lora_B_layout" not in config


def test_an_old_file_says_afterwards_that_it_is_a_new_one(tmp_path):
    """Else the next reader would swap it again."""
    write(tmp_path / "in", two_pairs(shared_a(), swapped=True), **PEFT_CONFIG, peft_version="0.18.1")
    convert_adapter(tmp_path / "in", tmp_path / "out", Request("peft"))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_version"] == "0.19.1"


@pytest.mark.parametrize("recorded", sorted(RECORDED.iterdir()), ids=lambda folder: folder.name)
def test_files_that_old_versions_wrote_mean_what_these_versions_merged(recorded, tmp_path):
    """Written by PEFT 0.18.1 and 0.19.0 with transformers 5.17; `sums` are the row sums of what merging added."""
    done = convert_adapter(recorded, tmp_path / "out", Request("per-expert"))
    swapped = "gpt_oss" not in recorded.name or "0.19.0" in recorded.name
    assert done.found.dialects == ["D3" if swapped else "D2"]
    sums = dict(np.load(recorded / "sums.npz"))
    found = file_deltas(tmp_path / "out")
    assert len(found) == 8 * len(sums)
    for (layer, role, expert), delta in found.items():
        assert np.allclose(delta.sum(dim=1).numpy(), sums[f"{layer}.{role}"][expert], atol=1e-6)


def one_pair(leaf: str, roles, swapped: bool = False) -> dict[str, np.ndarray]:
    pair = roles["down"] if leaf == "down_proj" else fused(roles) if "gate" in roles else roles["up"]
    return {f"{STEM}.{half}.weight": each for half, each in stacked(*pair, swapped).items()}


ONE = {"target_parameters": ["mlp.experts.down_proj"]}
ATTENTION = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((R, H), np.float32),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": np.ones((H, R), np.float32),
}


@pytest.mark.parametrize("swapped", [False, True])
def test_one_parameter_alone_is_read_by_the_width_that_attention_shows(swapped, tmp_path):
    roles = shared_a()
    write(tmp_path / "in", one_pair("down_proj", roles, swapped) | ATTENTION, **ONE, lora_B_layout="rank_major")
    done = convert_adapter(tmp_path / "in", tmp_path / "out", Request("per-expert"))
    assert done.found.dialects == ["D3" if swapped else "D2"]
    assert_same_deltas(file_deltas(tmp_path / "out"), expected_deltas({"down": roles["down"]}, 2))


@pytest.mark.parametrize(
    ("version", "model_type", "swapped"),
    [
        ("0.21.2", "qwen3_moe", False),
        ("0.19.1", "gpt_oss", False),
        ("0.19.1", "llama4", True),
        ("0.19.0", "qwen3_moe", True),
        ("0.19.0", "gpt_oss", True),
        ("0.19.0", "llama4", False),
        ("0.18.1", "qwen3_moe", True),
        ("0.18.1", "gpt_oss", False),
        ("0.18.1", "llama4", False),
    ],
)
def test_one_parameter_alone_is_read_by_the_version_that_wrote_it(version, model_type, swapped, tmp_path):
    roles = shared_a()
    tensors = one_pair("down_proj", roles, swapped)
    if model_type == "llama4":
        tensors = {name.replace(".mlp.", ".feed_forward."): each for name, each in tensors.items()}
    config = {"target_parameters": ["experts.down_proj"], "peft_version": version, "auto_mapping": auto(model_type)}
    write(tmp_path / "in", tensors, **config)
    convert_adapter(tmp_path / "in", tmp_path / "out", Request("per-expert"))
    assert_same_deltas(file_deltas(tmp_path / "out"), expected_deltas({"down": roles["down"]}, 2))


@pytest.mark.parametrize("swapped", [False, True])
def test_twice_inner_equal_to_hidden_is_decided_by_the_sibling(swapped, tmp_path):
    """gate_up alone is square then (OLMoE, MiniMax-M2)."""
    roles = shared_a(inner=H // 2)
    write(tmp_path / "in", two_pairs(roles, swapped), **PEFT_CONFIG, lora_B_layout="rank_major")
    convert_adapter(tmp_path / "in", tmp_path / "out", Request("per-expert"))
    assert_same_deltas(file_deltas(tmp_path / "out"), expected_deltas(roles, 2))


@pytest.mark.parametrize("swapped", [False, True])
def test_without_a_sibling_it_is_refused_and_the_option_decides(swapped, tmp_path):
    roles = shared_a(inner=H // 2)
    write(tmp_path / "in", one_pair("gate_up_proj", roles, swapped), target_parameters=["mlp.experts.gate_up_proj"])
    request = Request("per-expert")
    with pytest.raises(CheckpointError, match=r"unclear whether A acts on inputs or outputs.*no peft_version") as error:
        convert_adapter(tmp_path / "in", tmp_path / "out", request)
    assert "--lora-order" in str(error.value.hint)
    said = Options(lora_order="swapped" if swapped else "standard", lora_b_layout="rank_major")
    convert_adapter(tmp_path / "in", tmp_path / "out", Request("per-expert", options=said))
    expected = {role: roles[role] for role in ("gate", "up")}
    assert_same_deltas(file_deltas(tmp_path / "out"), expected_deltas(expected, 2))


def test_width_and_version_that_disagree_are_refused(tmp_path):
    write(tmp_path / "in", one_pair("down_proj", shared_a(), swapped=True) | ATTENTION, **ONE, peft_version="0.21.2")
    with pytest.raises(CheckpointError, match=r"width of 32 says swapped; peft_version says standard"):
        convert_adapter(tmp_path / "in", tmp_path / "out", Request("per-expert"))


@pytest.mark.parametrize(("version", "swapped"), [("0.21.0", False), ("0.18.0", True)])
def test_experts_without_a_gate_go_by_the_version(version, swapped, tmp_path):
    roles = shared_a(gated=False)
    tensors = {name.replace(".mlp.", ".mixer."): each for name, each in two_pairs(roles, swapped).items()}
    targets = ["mixer.experts.up_proj", "mixer.experts.down_proj"]
    mapping = auto("nemotron_h")
    write(tmp_path / "in", tensors, target_parameters=targets, peft_version=version, auto_mapping=mapping)
    convert_adapter(tmp_path / "in", tmp_path / "out", Request("per-expert"))
    assert_same_deltas(file_deltas(tmp_path / "out"), expected_deltas(roles, 2))
    write(tmp_path / "mute", tensors, target_parameters=targets, auto_mapping=mapping)
    with pytest.raises(CheckpointError, match="shapes go both ways"):
        convert_adapter(tmp_path / "mute", tmp_path / "mute-out", Request("per-expert"))


def test_experts_that_differ_show_that_b_is_grouped_and_it_is_refused(tmp_path):
    """Experts are trained on different numbers of tokens, so their norms differ; without a mark it is not guessed."""
    roles = shared_a(rank=4)
    scales = np.array([0.01, 1, 30, 3], np.float32)[:, None, None]
    roles = {role: (a, b * scales) for role, (a, b) in roles.items()}
    write(tmp_path / "in", two_pairs(roles, grouped=True), **PEFT_CONFIG, r=4)
    with pytest.raises(CheckpointError, match=r"as if B were grouped by expert") as error:
        convert_adapter(tmp_path / "in", tmp_path / "out", Request("per-expert"))
    assert "--lora-b-layout" in str(error.value.hint)
    said = Request("per-expert", options=Options(lora_b_layout="grouped_by_expert"))
    convert_adapter(tmp_path / "in", tmp_path / "out", said)
    assert_same_deltas(file_deltas(tmp_path / "out"), expected_deltas(roles, 1.5))
    write(tmp_path / "right", two_pairs(roles), **PEFT_CONFIG, r=4)
    convert_adapter(tmp_path / "right", tmp_path / "right-out", Request("per-expert"))
    assert_same_deltas(file_deltas(tmp_path / "right-out"), expected_deltas(roles, 1.5))


@pytest.mark.parametrize("grouped", [False, True])
def test_a_swapped_file_that_names_no_version_is_refused_and_the_option_decides(grouped, tmp_path):
    """PEFT 0.17 and NeMo AutoModel wrote the one, Megatron-Bridge the other, with the same names and shapes."""
    roles = shared_a()
    write(tmp_path / "in", two_pairs(roles, swapped=True, grouped=grouped), **PEFT_CONFIG)
    with pytest.raises(CheckpointError, match=r"no peft_version: PEFT 0.17 .* Megatron-Bridge by expert") as error:
        convert_adapter(tmp_path / "in", tmp_path / "out", Request("per-expert"))
    assert "--lora-b-layout" in str(error.value.hint)
    said = Options(lora_b_layout="grouped_by_expert" if grouped else "rank_major")
    convert_adapter(tmp_path / "in", tmp_path / "out", Request("per-expert", options=said))
    assert_same_deltas(file_deltas(tmp_path / "out"), expected_deltas(roles, 2))


def test_an_unsloth_adapter_without_its_mark_is_refused(tmp_path):
    mapping = auto("qwen3_moe") | {"unsloth_fixed": True}
    write(tmp_path / "in", two_pairs(shared_a()), **PEFT_CONFIG, auto_mapping=mapping)
    with pytest.raises(CheckpointError, match="Unsloth, which grouped lora_B by expert until") as error:
        convert_adapter(tmp_path / "in", tmp_path / "out", Request("per-expert"))
    assert "--lora-b-layout" in str(error.value.hint)
    write(tmp_path / "marked", two_pairs(shared_a()), **PEFT_CONFIG, auto_mapping=mapping, lora_B_layout="rank_major")
    convert_adapter(tmp_path / "marked", tmp_path / "out", Request("per-expert"))


def test_experts_without_differences_do_not_look_grouped():
    rng = np.random.default_rng(0)
    ratios = [contrast(rng.standard_normal((16, 32), np.float32), 8) for _ in range(2000)]
    assert max(grouped / max(rank_major, 1) for rank_major, grouped in ratios) < 20  # refused at 40


@pytest.mark.parametrize("dialect", ["D1", "D2", "D8"])
def test_the_model_is_asked_for_where_the_file_does_not_name_it(dialect, tmp_path):
    make, config = DIALECTS[dialect]
    roles = shared_a()
    write(tmp_path / "in", make(roles), **config, auto_mapping=None, base_model_name_or_path="nobody/knows")
    with pytest.raises(CheckpointError, match=r"which model it is for.*nobody/knows.*is not on this machine") as error:
        convert_adapter(tmp_path / "in", tmp_path / "out", Request("per-expert"))
    assert "--model-type" in str(error.value.hint)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "qwen3_moe", "hidden_size": 32}')
    for out, request in (("a", {"base": tmp_path / "base"}), ("b", {"model_type": "qwen3_moe"})):
        convert_adapter(tmp_path / "in", tmp_path / out, Request("per-expert", **request))
        assert_same_deltas(file_deltas(tmp_path / out), expected_deltas(roles, 2))


def test_a_model_type_that_contradicts_the_base_is_refused(tmp_path):
    roles = shared_a()
    write(tmp_path / "in", two_pairs(roles), **PEFT_CONFIG, auto_mapping=None, base_model_name_or_path="nobody/knows")
    base = tmp_path / "base"
    base.mkdir()
    whole = {"model_type": "qwen3_vl_moe", "text_config": {"model_type": "qwen3_moe", "hidden_size": 32}}
    (base / "config.json").write_text(json.dumps(whole))
    said = rf"^--model-type mixtral contradicts {base}/config\.json, which says qwen3_vl_moe"
    with pytest.raises(CheckpointError, match=said):
        convert_adapter(tmp_path / "in", tmp_path / "out", Request("per-expert", base=base, model_type="mixtral"))
    assert not (tmp_path / "out").exists()
    convert_adapter(tmp_path / "in", tmp_path / "out", Request("per-expert", base=base, model_type="qwen3_moe"))
    assert_same_deltas(file_deltas(tmp_path / "out"), expected_deltas(roles, 2))


def test_a_base_in_the_cache_is_found(tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--nobody--knows" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "gpt_oss"}')
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    roles = shared_a()
    write(tmp_path / "in", two_pairs(roles), **PEFT_CONFIG, auto_mapping=None, base_model_name_or_path="nobody/knows")
    convert_adapter(tmp_path / "in", tmp_path / "out", Request("per-expert"))
    both = np.concatenate([roles["gate"][1], roles["up"][1]], axis=1)  # gpt_oss: gate and up row by row
    a = roles["gate"][0]
    expected = {"gate": (a, both[:, ::2]), "up": (a, both[:, 1::2]), "down": roles["down"]}
    assert_same_deltas(file_deltas(tmp_path / "out"), expected_deltas(expected, 2))


def test_gate_alone_becomes_a_parameter_with_zeros_for_up(tmp_path):
    roles = {"gate": factors(E, R, H, I)["gate"]}
    write(tmp_path / "in", dict(per_expert(roles, EXPERTS, NAMES)))
    done = convert_adapter(tmp_path / "in", tmp_path / "peft", Request("peft"))
    assert any("gate alone is adapted" in note for note in done.notes)
    convert_adapter(tmp_path / "peft", tmp_path / "out", Request("per-expert"))
    found = file_deltas(tmp_path / "out")
    assert_same_deltas({key: found[key] for key in found if key[1] == "gate"}, expected_deltas(roles, 2))
    assert not any(torch.count_nonzero(found[key]) for key in found if key[1] == "up")
