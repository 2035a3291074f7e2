"""Beside the experts' weights: scales and biases that move with them, routers that are renamed, what is refused."""

from collections.abc import Mapping

import pytest
import torch

from moe_accel.convert.plan import make_plan, parts
from moe_accel.convert.regions import Tensor
from tests.unit.test_convert_layouts import (
    FAMILIES,
    MXFP4,
    L,
    convert,
    execute,
    header,
    per_expert,
    refusal,
    values,
    view,
    with_companion,
)


def same(one: Mapping, two: Mapping) -> None:
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("suffix", "shape", "down", "stacked_name", "stacked_shape"),
    [
        ("weight_scale_inv", (2, 3), (3, 2), "gate_up_proj_scale_inv", (4, 4, 3)),
        ("weight_scale", (256, 1), (384, 1), "gate_up_proj_scale", (4, 512, 1)),
        ("weight_scale_2", (), (), "gate_up_proj_scale_2", (4, 2)),
        ("input_scale", (1,), (1,), "gate_up_proj_input_scale", (4, 2)),
    ],
)
def test_companions_move_with_their_weights(suffix, shape, down, stacked_name, stacked_shape) -> None:
    tensors = with_companion(suffix, shape, down, rows=256, cols=384)
    there, found = convert(tensors, "stacked", "qwen3_moe")
    assert there[f"{L}.mlp.experts.{stacked_name}"].shape == stacked_shape
    back = execute(make_plan(there, "per-expert", FAMILIES, "qwen3_moe"), found)
    same(back, values(tensors))


def canonical(
    headers: Mapping[str, Tensor], held: Mapping[str, torch.Tensor], model_type: str
) -> dict[tuple[str, int, str], torch.Tensor]:
    named = parts(headers, FAMILIES, model_type)
    return {(p.layer, p.expert, p.role): view(held[p.region.tensor], p.region) for p in named}


@pytest.mark.parametrize("target", ["stacked", "te-grouped", "nemo"])
@pytest.mark.parametrize(
    ("suffix", "shape", "down"),
    [
        ("weight_scale_inv", (2, 3), (3, 2)),
        ("weight_scale", (32, 1), (48, 1)),
        ("weight_scale_2", (), ()),
        ("input_scale", (1,), (1,)),
        ("bias", (32,), (48,)),
    ],
)
def test_parts_name_the_same_matrices_in_every_layout(target, suffix, shape, down) -> None:
    tensors = with_companion(suffix, shape, down, rows=32, cols=48, num=11)
    if (suffix, target) == ("bias", "stacked"):
        assert "per_expert stacked has no biases, these experts do" in refusal(tensors)
        return
    there, moved = convert(tensors, target, "qwen3_moe")
    same(canonical(there, moved, "qwen3_moe"), canonical(tensors, values(tensors), "qwen3_moe"))
    assert (L, 10, f"gate.{suffix}") in canonical(there, moved, "qwen3_moe")
    back = execute(make_plan(there, "per-expert", FAMILIES, "qwen3_moe"), moved)
    same(back, values(tensors))


def test_mxfp4_blocks_go_to_one_matrix_an_expert_and_back() -> None:
    """Rows of gate and up alternate, each output feature a row of blocks: transformers' own reading of the names."""
    found = values(MXFP4)
    there, moved = convert(MXFP4, "per-expert", "gpt_oss")
    for suffix in ("blocks", "scales"):
        both, down = (found[f"{L}.mlp.experts.{name}_proj_{suffix}"] for name in ("gate_up", "down"))
        for e in range(4):
            for role, value in (("gate", both[e, 0::2]), ("up", both[e, 1::2]), ("down", down[e])):
                assert torch.equal(moved[f"{L}.mlp.experts.{e}.{role}_proj.weight_{suffix}"], value)
    same(canonical(there, moved, "gpt_oss"), canonical(MXFP4, found, "gpt_oss"))
    back = execute(make_plan(there, "hub", FAMILIES, "gpt_oss"), moved)
    same(back, found)


def test_a_router_gets_its_name_whatever_way_the_experts_came() -> None:
    mixtral = {
        name.replace(".mlp.", ".block_sparse_moe.").replace(*pair): Tensor("", tensor.dtype, tensor.shape)
        for name, tensor in per_expert().items()
        for pair in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
        if pair[0] in name
    } | header({f"{L}.block_sparse_moe.gate.weight": (4, 8)})
    mixtral = {name: tensor._replace(name=name) for name, tensor in mixtral.items()}
    granite = header(
        {
            f"{L}.block_sparse_moe.input_linear.weight": (4, 12, 8),
            f"{L}.block_sparse_moe.output_linear.weight": (4, 8, 6),
        }
    ) | header({f"{L}.block_sparse_moe.router.layer.weight": (4, 8)})
    for source, model_type in ((mixtral, "mixtral"), (granite, "granitemoe")):
        _, values_direct = convert(source, "stacked", model_type)
        for way in ("per-expert", "te-grouped", "nemo", "sonicmoe"):
            there, moved = convert(source, way, model_type)
            plan = make_plan(there, "stacked", FAMILIES, model_type)
            again = execute(plan, moved)
            same(again, values_direct)


@pytest.mark.parametrize(
    "name", ["gate_proj.weight_zp", "down_proj.meta", "up_proj.weight.quant_map", "gate_proj.qstate.x"]
)
def test_what_would_stay_behind_while_its_weight_moves_is_refused(name: str) -> None:
    stray = f"{L}.mlp.experts.2.{name}"
    tensors = per_expert() | header({stray: (4,), f"{L}.mlp.experts.router_gate.weight": (4,)})
    said = refusal(tensors)
    assert f"{stray}: it belongs to the weight of an expert, and how it would move is not known" in said
    assert make_plan(tensors, "per-expert", FAMILIES, "qwen3_moe").passed_through == tuple(tensors)
    stacked_too = header({f"{L}.mlp.experts.gate_up_proj": (4, 12, 8), f"{L}.mlp.experts.down_proj": (4, 8, 6)})
    stacked_too |= header({f"{L}.mlp.experts.gate_up_proj_zp": (4,)})
    assert "gate_up_proj_zp: it belongs to" in refusal(stacked_too, "per-expert")


@pytest.mark.parametrize(("suffix", "said"), [("SCB", "bitsandbytes"), ("weight.absmax", "bitsandbytes")])
def test_bitsandbytes_is_refused_by_name(suffix: str, said: str) -> None:
    assert said in refusal(with_companion(suffix, (6,), (8,)))
