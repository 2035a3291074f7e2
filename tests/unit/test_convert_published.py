"""Checkpoints as they are published, in forms that transformers does not write: converted, they load in plain
transformers with nothing missing and nothing left over, and give the logits of the model they came from.

Each form is made here by hand from the model's own tensors, with torch, independent of the converter's tables.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_accel.convert.run import Options, execute, prepare
from moe_accel.convert.verify import compare
from moe_accel.errors import CheckpointError
from tests.families import build_tiny, model_class, tiny_inputs

Tensors = dict[str, torch.Tensor]
GATE_UP = re.compile(r"(?P<moe>.*)\.experts\.gate_up_proj")


def per_expert(tensors: Tensors, only: str = "") -> Tensors:
    """`gate_proj`, `up_proj` and `down_proj` of every expert."""
    found = dict(tensors)
    for name in tensors:
        if (match := GATE_UP.fullmatch(name)) and only in name:
            both, down = found.pop(name), found.pop(f"{match['moe']}.experts.down_proj")
            for e in range(len(both)):
                gate, up = both[e].chunk(2)
                for role, value in (("gate", gate), ("up", up), ("down", down[e])):
                    found[f"{match['moe']}.experts.{e}.{role}_proj.weight"] = value
    return found


def renamed(tensors: Tensors, **new: str) -> Tensors:
    found = {}
    for name, value in tensors.items():
        for old, to in new.items():
            name = re.sub(old.replace("__", r"\."), to, name)
        found[name] = value
    return found


def block_sparse_moe(tensors: Tensors) -> Tensors:
    of_experts = {name.partition(".mlp.")[0] for name in tensors if ".mlp.experts." in name}
    named = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    found = {}
    for name, value in per_expert(tensors).items():
        if ".experts." in name:
            for old, new in named.items():
                name = name.replace(old, new)
        found[name.replace(".mlp.", ".block_sparse_moe.") if name.partition(".mlp.")[0] in of_experts else name] = value
    return found


def with_mtp(tensors: Tensors) -> Tensors:
    """Main model stacked, its predicting layer one matrix an expert."""
    one = {name: value for name, value in tensors.items() if name.startswith("model.layers.1.mlp.")}
    return tensors | per_expert({name.replace("model.layers.1", "mtp.layers.0"): value for name, value in one.items()})


def turned(tensors: Tensors) -> Tensors:
    return {name: value.mT if name.endswith(("experts.gate_up_proj", "experts.down_proj")) else value
            for name, value in tensors.items()}  # fmt: skip


def up_before_gate(tensors: Tensors) -> Tensors:
    found = {name: value for name, value in tensors.items() if ".experts." not in name}
    for name, both in tensors.items():
        if match := GATE_UP.fullmatch(name):
            for e in range(len(both)):
                found[f"{match['moe']}.experts.{e}.gate_and_up_proj.weight"] = torch.cat(both[e].chunk(2)[::-1])
                found[f"{match['moe']}.experts.{e}.down_proj.weight"] = tensors[f"{match['moe']}.experts.down_proj"][e]
    return found


def linears(tensors: Tensors) -> Tensors:
    named = {r"experts\.gate_up_proj": "input_linear.weight", r"experts\.down_proj": "output_linear.weight"}
    return renamed(tensors, **named, **{r"block_sparse_moe\.router\.weight": "block_sparse_moe.router.layer.weight"})


PUBLISHED: dict[str, tuple[str, str | None, Callable[[Tensors], Tensors]]] = {
    "Qwen3.5, main stacked and MTP per-expert": ("qwen3_5_moe", None, with_mtp),
    "Qwen3-VL, transposed": ("qwen3_vl_moe", None, turned),
    "Hunyuan-Large, up before gate": ("hunyuan_v1_moe", "hunyuan", up_before_gate),
    "Mixtral, w1 w3 w2": ("mixtral", None, block_sparse_moe),
    "MiniMax-M2, w1 w3 w2": ("minimax_m2", None, block_sparse_moe),
    "Kimi-Linear, w1 w3 w2": ("kimi_linear", None, block_sparse_moe),
    "Granite, input_linear and output_linear": ("granitemoe", None, linears),
    "Qwen3, per-expert": ("qwen3_moe", None, per_expert),
}
HELD_AS_PUBLISHED = ("gpt_oss", "llama4", "dbrx", "hy_v4", "zaya", "jetmoe", "qwen3_vl_moe")


def read(folder: Path) -> Tensors:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def write(folder: Path, tensors: Tensors, config: dict) -> Path:
    """In two files, split anywhere."""
    folder.mkdir()
    names = sorted(tensors)
    for at in (0, 1):
        some = {name: tensors[name].contiguous().clone() for name in names[at::2]}
        save_file(some, folder / f"model-0000{at + 1}-of-00002.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def saved(family: str, folder: Path) -> tuple[Path, dict]:
    """A tiny model as transformers holds it, and its config."""
    build_tiny(family, dtype=torch.bfloat16).save_pretrained(folder, save_original_format=False)
    return folder, json.loads((folder / "config.json").read_text())


def logits(family: str, folder: Path) -> tuple[torch.Tensor, dict[str, list[str]]]:
    """Of a directory that plain transformers loads; and what it found missing or left over."""
    model, info = model_class(family).from_pretrained(folder, output_loading_info=True)
    inputs = {name: value for name, value in tiny_inputs(family).items() if name != "labels"}
    with torch.no_grad():
        found = model.eval()(**inputs).logits
    return found, {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}


def convert(source: Path, target: Path, to: str) -> Path:
    execute(prepare(source, target, Options(to, threads=2, max_shard_bytes=60_000)))
    return target


@pytest.mark.parametrize("form", PUBLISHED)
def test_a_published_form_loads_when_converted_and_gives_the_same_logits(form: str, tmp_path: Path) -> None:
    family, model_type, publish = PUBLISHED[form]
    memory, config = saved(family, tmp_path / "memory")
    expected = logits(family, memory)
    named = config if model_type is None else config | {"model_type": model_type}
    published = write(tmp_path / "published", publish(read(memory)), named)
    stacked = convert(published, tmp_path / "stacked", "stacked")
    (stacked / "config.json").write_text(json.dumps(config))
    found = logits(family, stacked)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]
    if model_type is None:
        assert not compare(published, stacked).differences


@pytest.mark.parametrize("family", ["nemotron_h", "ernie4_5_vl_moe"])
def test_a_form_with_more_renaming_around_the_experts_loads_too(family: str, tmp_path: Path) -> None:
    memory, _ = saved(family, tmp_path / "memory")
    model = build_tiny(family, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "hub", save_original_format=True)
    names = read(tmp_path / "hub").keys()
    assert any("backbone." in name or "gate.weight_1" in name for name in names), "the published names"
    stacked = convert(tmp_path / "hub", tmp_path / "stacked", "stacked")
    assert any(name.endswith("experts.down_proj") for name in read(stacked))
    expected, found = logits(family, memory), logits(family, stacked)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]
    back = convert(stacked, tmp_path / "back", "hub")
    assert read(back).keys() == names
    assert torch.equal(logits(family, back)[0], expected[0])


@pytest.mark.parametrize("family", HELD_AS_PUBLISHED)
def test_what_is_published_as_it_is_held_comes_back_from_one_matrix_an_expert(family: str, tmp_path: Path) -> None:
    memory, _ = saved(family, tmp_path / "memory")
    alone = convert(memory, tmp_path / "alone", "per-expert")
    assert any(re.search(r"experts\.(mlp\.)?0\.", name) for name in read(alone))
    back = convert(alone, tmp_path / "back", "hub" if family != "qwen3_vl_moe" else "stacked")
    expected, found = logits(family, memory), logits(family, back)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]
    if family != "zaya":  # its biases for balancing are set anew by transformers when it loads
        assert not any(expected[1].values())


def linear(family: str, tensors: Tensors, e: int) -> dict[str, torch.Tensor]:
    """Matrices (output, input) of expert `e` of the first layer, by formulas from the modeling files."""

    def one(end: str) -> torch.Tensor:
        return next(value for name, value in sorted(tensors.items()) if name.endswith(end))

    if family == "dbrx":
        num = one("router.layer.weight").shape[0]
        w1, v1, w2 = (one(f"mlp.{name}").unflatten(0, (num, -1))[e] for name in ("w1", "v1", "w2"))
        return {"gate": w1, "up": v1, "down": w2.T}
    both, down = one("experts.gate_up_proj")[e].T, one("experts.down_proj")[e].T
    gate, up = (both[0::2], both[1::2]) if family == "gpt_oss" else both.chunk(2)
    return {"gate": gate, "up": up, "down": down}


@pytest.mark.parametrize("family", ["gpt_oss", "llama4", "dbrx"])
def test_one_matrix_an_expert_is_what_a_linear_layer_multiplies_with(family: str, tmp_path: Path) -> None:
    memory, _ = saved(family, tmp_path / "memory")
    held, alone = read(memory), read(convert(memory, tmp_path / "alone", "per-expert"))
    names = (
        {"gate": "w1", "up": "v1", "down": "w2"}
        if family == "dbrx"
        else {r: f"{r}_proj" for r in ("gate", "up", "down")}
    )
    for e in (0, 5):
        for role, value in linear(family, held, e).items():
            found = next(alone[name] for name in sorted(alone) if name.endswith(f".{e}.{names[role]}.weight"))
            assert torch.equal(found, value), (role, e)


# ---- what is refused, and why


@pytest.mark.parametrize(
    ("family", "to", "said"),
    [
        ("nllb_moe", "stacked", "keeps the experts of nllb-moe as modules of their own and loads no stacked"),
        ("switch_transformers", "stacked", "keeps the experts of switch_transformers as modules of their own"),
        ("doge", "stacked", "no experts found among"),
        ("ernie4_5_vl_moe", "nemo", "cannot share one tensor; --to te-grouped or per-expert can"),
        ("nemotron_h", "sonicmoe", "sonicmoe needs a gate, and these experts have none"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason_and_nothing_is_written(family, to, said, tmp_path) -> None:
    memory, _ = saved(family, tmp_path / "memory")
    with pytest.raises(CheckpointError, match=re.escape(said)):
        convert(memory, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["nllb_moe", "switch_transformers"])
@pytest.mark.parametrize("to", ["te-grouped", "nemo"])
def test_experts_without_a_stacked_form_still_go_to_other_tools_and_back(family: str, to: str, tmp_path: Path) -> None:
    memory, _ = saved(family, tmp_path / "memory")
    there = convert(memory, tmp_path / "there", to)
    assert not compare(memory, there).differences
    expected, back = read(memory), read(convert(there, tmp_path / "back", "hub"))
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], expected[name]) for name in back)


def test_jetmoe_moves_its_mlp_experts_and_leaves_those_of_its_attention(tmp_path: Path) -> None:
    memory, _ = saved("jetmoe", tmp_path / "memory")
    held, alone = read(memory), read(convert(memory, tmp_path / "alone", "per-expert"))
    name = "model.layers.0.mlp.experts.3.gate_proj.weight"
    assert torch.equal(alone[name], held["model.layers.0.mlp.input_linear.weight"][3].chunk(2)[0])
    attention = [name for name in held if "self_attention.experts" in name]
    assert len(attention) == 8
    assert all(torch.equal(alone[name], held[name]) for name in attention)
