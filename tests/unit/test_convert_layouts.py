"""Planning on headers: layouts nobody saves here, quantised companions, and every reason for a refusal."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_accel.convert.layout import load_families, parse_family
from moe_accel.convert.plan import make_plan
from moe_accel.convert.regions import Output, Plan, Region, Tensor
from moe_accel.errors import CheckpointError, ConfigError

FAMILIES = load_families()
L = "model.layers.0"


def header(shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> dict[str, Tensor]:
    return {name: Tensor(name, dtype, tuple(shape)) for name, shape in shapes.items()}


def per_expert(num: int = 4, rows: int = 6, cols: int = 8, dtype: str = "BF16", layer: str = L) -> dict[str, Tensor]:
    shapes = {}
    for e in range(num):
        for role, shape in (("gate_proj", (rows, cols)), ("up_proj", (rows, cols)), ("down_proj", (cols, rows))):
            shapes[f"{layer}.mlp.experts.{e}.{role}.weight"] = shape
    return header(shapes, dtype)


def values(tensors: Mapping[str, Tensor]) -> dict[str, torch.Tensor]:
    """Every element a number of its own."""
    start, found = 0, {}
    for name, tensor in tensors.items():
        size = torch.Size(tensor.shape).numel()
        found[name] = torch.arange(start, start + size).reshape(tensor.shape)
        start += size
    return found


def view(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    return tensor.view(-1).as_strided(
        (region.rows, region.cols), (region.row_stride, region.col_stride), tensor.storage_offset() + region.offset
    )


def execute(plan: Plan, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    def one(output: Output) -> torch.Tensor:
        result = torch.full(output.shape, -1)
        for copy in output.copies:
            assert bool((view(result, copy.target) == -1).all()), output.name
            view(result, copy.target).copy_(view(found[copy.source.tensor], copy.source))
        assert bool((result >= 0).all()), output.name
        return result

    return {output.name: one(output) for output in plan.outputs}


def convert(
    tensors: Mapping[str, Tensor], target: str, model_type: str | None = None
) -> tuple[dict[str, Tensor], dict[str, torch.Tensor]]:
    plan = make_plan(tensors, target, FAMILIES, model_type)
    return {o.name: Tensor(o.name, o.dtype, o.shape) for o in plan.outputs}, execute(plan, values(tensors))


def refusal(
    tensors: Mapping[str, Tensor], target: str = "stacked", model_type: str | None = "qwen3_moe", **more: int
) -> str:
    with pytest.raises(CheckpointError) as caught:
        make_plan(tensors, target, FAMILIES, model_type, **more)
    return str(caught.value)


def stacked(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{L}.mlp.experts.gate_up_proj": torch.cat([gate, up], 1), f"{L}.mlp.experts.down_proj": down}


HUB = {
    "step": (
        "step3p5",
        "moe",
        lambda g, u, d: {"moe.gate_proj.weight": g, "moe.up_proj.weight": u, "moe.down_proj.weight": d},
    ),
    "inkling": (
        "inkling_mm_model",
        "mlp",
        lambda g, u, d: {"mlp.experts.w13_weight": torch.stack([g, u], 2).flatten(1, 2), "mlp.experts.w2_weight": d},
    ),
    "hunyuan_large": (
        "hunyuan",
        "mlp",
        lambda g, u, d: {
            f"mlp.experts.{e}.{name}.weight": value
            for e in range(len(g))
            for name, value in (("gate_and_up_proj", torch.cat([u[e], g[e]])), ("down_proj", d[e]))
        },
    ),
    "qwen3_vl_moe": (
        "qwen3_vl_moe",
        "mlp",
        lambda g, u, d: {"mlp.experts.gate_up_proj": torch.cat([g, u], 1).mT, "mlp.experts.down_proj": d.mT},
    ),
    "nemo": (
        "qwen3_moe",
        "mlp",
        lambda g, u, d: {"mlp.experts.gate_and_up_projs": torch.cat([g, u], 1).mT, "mlp.experts.down_projs": d.mT},
    ),
    "sonicmoe": (
        "qwen3_moe",
        "mlp",
        lambda g, u, d: {
            "mlp.experts.c_fc.weight": torch.stack([g, u], 2).flatten(1, 2),
            "mlp.experts.c_proj.weight": d,
        },
    ),
}


@pytest.mark.parametrize("name", HUB)
@settings(max_examples=15, deadline=None)
@given(num=st.integers(1, 7), rows=st.integers(1, 9), cols=st.integers(1, 9))
def test_published_layouts_become_stacked_and_come_back(name: str, num: int, rows: int, cols: int) -> None:
    model_type, _, make = HUB[name]
    gate = torch.arange(num * rows * cols).reshape(num, rows, cols)
    up, down = gate + gate.numel(), (gate + 2 * gate.numel()).reshape(num, cols, rows)
    source = {f"{L}.{key}": value.contiguous() for key, value in make(gate, up, down).items()}
    shapes = header({key: tuple(value.shape) for key, value in source.items()})
    plan = make_plan(shapes, "stacked", FAMILIES, model_type)
    there = execute(plan, source)
    expected = stacked(gate, up, down)
    assert there.keys() == expected.keys()
    assert all(torch.equal(there[key], expected[key]) for key in expected)
    back = execute(
        make_plan(
            header({k: tuple(v.shape) for k, v in there.items()}),
            name if name in FAMILIES.targets else "hub",
            FAMILIES,
            model_type,
        ),
        there,
    )
    assert back.keys() == source.keys()
    assert all(torch.equal(back[key], source[key]) for key in source)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_order_of_names_gives_the_same_and_comes_back(data: st.DataObject) -> None:
    num, rows, cols = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    dtype = data.draw(st.sampled_from(["BF16", "F32", "F8_E4M3", "U8", "I32"]))
    tensors = per_expert(num, rows, cols, dtype) | header({"model.norm.weight": (cols,), "scalar": ()})
    shuffled = {name: tensors[name] for name in data.draw(st.permutations(sorted(tensors)))}
    there, found = convert(shuffled, "stacked")
    assert there[f"{L}.mlp.experts.gate_up_proj"].shape == (num, 2 * rows, cols)
    back = execute(make_plan(there, "per-expert", FAMILIES, "qwen3_moe"), found)
    expected = values(shuffled)
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], expected[name]) for name in expected)


def test_mixed_checkpoint_stacked_main_and_per_expert_mtp() -> None:
    mixed = header({f"{L}.mlp.experts.gate_up_proj": (4, 12, 8), f"{L}.mlp.experts.down_proj": (4, 8, 6)})
    mixed |= per_expert(layer="mtp.layers.0")
    plan = make_plan(mixed, "stacked", FAMILIES, "qwen3_5_moe")
    assert {o.name for o in plan.outputs} == {
        f"{layer}.mlp.experts.{leaf}" for layer in (L, "mtp.layers.0") for leaf in ("gate_up_proj", "down_proj")
    }
    assert any("left as it is" in note for note in plan.notes)
    assert [(one.prefix, one.source) for one in plan.layouts] == [
        ("model.layers.*.mlp", "stacked"),
        ("mtp.layers.*.mlp", "per-expert"),
    ]


def with_companion(
    suffix: str, shape: tuple[int, ...], down: tuple[int, ...] | None = None, dtype: str = "F32", **sizes: int
) -> dict[str, Tensor]:
    tensors = per_expert(dtype="F8_E4M3", **sizes)
    for name in list(tensors):
        of = (down if down is not None else shape[::-1]) if "down" in name else shape
        other = name.replace("weight", suffix)
        tensors[other] = Tensor(other, dtype, of)
    return tensors


def without(tensors: dict[str, Tensor], *words: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not any(word in name for word in words)}


def changed(tensors: dict[str, Tensor], name: str, **to: object) -> dict[str, Tensor]:
    old = tensors[name]
    return tensors | {name: Tensor(name, str(to.get("dtype", old.dtype)), tuple(to.get("shape", old.shape)))}


MXFP4 = header(
    {
        f"{L}.mlp.experts.{n}_{s}": (4, 8, 1, 16)[: 4 if s == "blocks" else 3]
        for n in ("gate_up_proj", "down_proj")
        for s in ("blocks", "scales")
    },
    "U8",
)
MXFP4 |= header({f"{L}.mlp.experts.gate_up_proj_bias": (4, 8), f"{L}.mlp.experts.down_proj_bias": (4, 8)})
GPT_OSS = header(
    {
        f"{L}.mlp.experts.gate_up_proj": (4, 8, 12),
        f"{L}.mlp.experts.gate_up_proj_bias": (4, 12),
        f"{L}.mlp.experts.down_proj": (4, 6, 8),
        f"{L}.mlp.experts.down_proj_bias": (4, 8),
    }
)
NEMOTRON = header(
    {f"{L}.mixer.experts.{e}.{n}_proj.weight": s for e in range(4) for n, s in (("up", (6, 8)), ("down", (8, 6)))}
)
AWQ = {
    name.replace("weight", "qweight"): Tensor(name.replace("weight", "qweight"), "I32", t.shape)
    for name, t in per_expert().items()
}

REFUSALS = {
    "missing ranges": (
        without(per_expert(14), *(f"experts.{e}." for e in (3, 4, 5, 12))),
        "stacked",
        "qwen3_moe",
        "experts 3-5, 12 of 14 missing in model.layers.0.mlp",
    ),
    "missing at the end": (
        per_expert(4) | per_expert(3, layer="model.layers.1"),
        "stacked",
        "qwen3_moe",
        "experts 3 of 4 missing in model.layers.1.mlp",
    ),
    "one matrix missing": (
        without(per_expert(), "experts.2.down_proj"),
        "stacked",
        "qwen3_moe",
        "down_proj.weight of experts 2 of 4 missing",
    ),
    "gate without up": (
        without(per_expert(), "up_proj"),
        "stacked",
        "qwen3_moe",
        "gate, down without up in model.layers.0.mlp",
    ),
    "shape": (
        changed(per_expert(), f"{L}.mlp.experts.2.up_proj.weight", shape=(7, 8)),
        "stacked",
        "qwen3_moe",
        "shapes differ inside a group: model.layers.0.mlp.experts.0.up_proj.weight BF16 [6, 8] and model.layers.0.mlp.experts.2.up_proj.weight BF16 [7, 8]",  # noqa: E501
    ),
    "dtype": (
        changed(per_expert(), f"{L}.mlp.experts.3.up_proj.weight", dtype="F32"),
        "stacked",
        "qwen3_moe",
        "dtypes differ inside a group",
    ),
    "twice": (
        per_expert() | header({f"{L}.mlp.experts.gate_up_proj": (4, 12, 8), f"{L}.mlp.experts.down_proj": (4, 8, 6)}),
        "stacked",
        "qwen3_moe",
        "has its experts twice",
    ),
    "ambiguous": (GPT_OSS, "per-expert", None, "its experts could be gpt_oss stacked or openai_privacy_filter stacked"),
    "fp8 blocks": (
        with_companion("weight_scale_inv", (2, 3), rows=192, cols=384),
        "stacked",
        "qwen3_moe",
        "192 must be divisible by 128",
    ),
    "mxfp4": (MXFP4, "nemo", "gpt_oss", "gate_up_proj_blocks holds packed numbers, and nemo defines no place"),
    "awq": (AWQ, "stacked", "qwen3_moe", "AWQ and GPTQ pack several numbers"),
    "packed transpose": (per_expert(dtype="U8"), "nemo", "qwen3_moe", "cannot be turned without unpacking"),
    "no gate": (NEMOTRON, "sonicmoe", "nemotron_h", "sonicmoe needs a gate"),
    "no experts": (header({"model.norm.weight": (8,)}), "stacked", None, "no experts found among 1 tensors"),
    "target": (per_expert(), "gguf", None, "no layout is called 'gguf'"),
    "shared scale": (
        header({f"{L}.mlp.experts.gate_up_proj": (4, 12, 8), f"{L}.mlp.experts.down_proj": (4, 8, 6)}, "F8_E4M3")
        | header({f"{L}.mlp.experts.gate_up_proj_scale_inv": (4, 1, 1)}, "F32"),
        "per-expert",
        "mistral4",
        "holds one scale for gate and up together",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_say_what_and_where(case: str) -> None:
    tensors, target, model_type, said = REFUSALS[case]
    assert said in refusal(tensors, target, model_type)


def test_number_of_experts_must_be_the_config_s() -> None:
    assert "experts 4-7 of 8, as config.json says, missing in every layer" in refusal(per_expert(), num_experts=8)


def test_mxfp4_already_stacked_passes_through() -> None:
    plan = make_plan(MXFP4, "stacked", FAMILIES, "gpt_oss")
    assert set(plan.passed_through) == set(MXFP4)
    assert "left as it is" in plan.notes[0]


def test_own_family_goes_first(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('family = "mine"\n[layouts.per-expert]\nblock = "sparse"\ngate = "{moe}.e{e}"\n')
    with pytest.raises(ConfigError, match="needs down"):
        load_families(file)
    own = 'family = "mine"\n[layouts.per-expert]\nblock = "sparse"\ngate = "{moe}.x.{e}.a"\nup = "{moe}.x.{e}.b"\ndown = "{moe}.x.{e}.c"\n'  # noqa: E501
    file.write_text(own + '[layouts.stacked]\nblock = "sparse"\ngate_up = "{moe}.x.ab"\ndown = "{moe}.x.c"\n')
    tensors = header({f"{L}.sparse.x.{e}.{r}": (8, 6) if r == "c" else (6, 8) for e in range(3) for r in "abc"})
    plan = make_plan(tensors, "stacked", load_families(file))
    assert {o.name: o.shape for o in plan.outputs} == {f"{L}.sparse.x.ab": (3, 12, 8), f"{L}.sparse.x.c": (3, 8, 6)}


def test_all_mistakes_of_a_table_are_told_at_once() -> None:
    text = 'famly = "x"\nhub = "gone"\n[layouts.stacked]\norder = "mixed"\ngate = "{mo}.gate"\ndown = "down"\ntransposed = 3\n'  # noqa: E501
    with pytest.raises(ConfigError) as caught:
        parse_family(text, "x.toml")
    for said in (
        "unknown key 'famly'",
        "family must be",
        "hub = 'gone'",
        "order must be one of",
        "unknown placeholder {mo}",
        "must start with",
        "needs down and",
        "transposed must be",
    ):
        assert said in str(caught.value)


def test_no_model_type_belongs_to_two_families() -> None:
    named = [model_type for family in FAMILIES.families for model_type in family.model_types]
    assert sorted(set(named)) == sorted(named)
    assert [family.name for family in FAMILIES.families if family.default] == ["per_expert"]
