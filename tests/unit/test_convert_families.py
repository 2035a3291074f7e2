"""Every family, both ways, against transformers' own conversion: the same bits, and a directory that it loads with
nothing left over."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_accel.convert.layout import load_families
from moe_accel.convert.plan import make_plan, parts
from moe_accel.convert.regions import Plan, Region, Tensor
from moe_accel.errors import CheckpointError
from tests.families import build_tiny, decorated_classes, model_class
from tests.family_data import FAMILIES

DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64", torch.float16: "F16", torch.bool: "BOOL"}
FAST = (
    "qwen3_moe",
    "mixtral",
    "phimoe",
    "nemotron_h",
    "gpt_oss",
    "qwen3_vl_moe",
    "granitemoe",
    "deepseek_v4",
    "lfm2_moe",
    "ernie4_5_vl_moe",
)
NO_STACKED = ("nllb_moe", "switch_transformers")  # transformers itself stacks nothing
NO_EXPERTS = ("doge",)  # rows of an embedding


def installed(family: str) -> bool:
    folder = FAMILIES[family].folder or family
    return folder in decorated_classes() or Path(model_file(folder)).exists()


def model_file(folder: str) -> str:
    import transformers

    return str(Path(transformers.__path__[0], "models", folder, f"modeling_{folder}.py"))


CASES = [
    pytest.param(family, marks=[] if family in FAST else [pytest.mark.slow])
    for family in FAMILIES
    if installed(family) and family not in NO_EXPERTS
]


def headers(tensors: Mapping[str, torch.Tensor]) -> dict[str, Tensor]:
    return {name: Tensor(name, DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def view(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    return tensor.view(-1).as_strided(
        (region.rows, region.cols), (region.row_stride, region.col_stride), tensor.storage_offset() + region.offset
    )


def execute(plan: Plan, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the plan says, checking that every element of every output is written once."""
    written = {}
    for output in plan.outputs:
        dtype = next((tensors[copy.source.tensor].dtype for copy in output.copies), torch.float32)
        result = torch.empty(output.shape, dtype=dtype)
        times = torch.zeros(output.shape, dtype=torch.uint8)
        for copy in output.copies:
            view(result, copy.target).copy_(view(tensors[copy.source.tensor], copy.source))
            view(times, copy.target).add_(1)
        assert bool((times == 1).all()), output.name
        written[output.name] = result
    return written


def convert(tensors: Mapping[str, torch.Tensor], target: str, model_type: str) -> dict[str, torch.Tensor]:
    return execute(make_plan(headers(tensors), target, load_families(), model_type), tensors)


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def load(family: str, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    model, info = model_class(family).from_pretrained(folder, output_loading_info=True)
    return model.state_dict(), {
        key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }


def write(tensors: dict[str, torch.Tensor], config_from: Path, folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(config_from / "config.json", folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def bits_equal(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype, name
        assert torch.equal(one[name], two[name]), name


def saved(family: str, folder: Path) -> tuple[Path, Path | None, str]:
    """In-memory and hub form as transformers writes them; None where it fails to write the hub form of a model this
    small."""
    model = build_tiny(family, dtype=torch.bfloat16)
    memory, hub = folder / "memory", folder / "hub"
    model.save_pretrained(memory, save_original_format=False)
    try:
        model.save_pretrained(hub, save_original_format=True)
    except RuntimeError:  # inkling2: pads the vocabulary to 200,058
        hub = None
    return memory, hub, json.loads((memory / "config.json").read_text())["model_type"]


@pytest.mark.parametrize("family", CASES)
def test_both_forms_convert_as_transformers_converts_them(family: str, tmp_path: Path) -> None:
    memory, hub, model_type = saved(family, tmp_path)
    expected, expected_info = load(family, memory)
    stacks = family not in NO_STACKED and already(read(memory), "stacked", model_type)  # aria does from 5.23 on
    if hub is not None and stacks:
        source = read(hub)
        stacked = convert(source, "stacked", model_type)
        state, info = load(family, write(stacked, memory, tmp_path / "stacked"))
        assert info == expected_info
        bits_equal(state, expected)
        bits_equal(convert(stacked, "stacked", model_type), stacked)
        if already(source, "hub", model_type):  # not where transformers' own form is not what is published
            bits_equal(convert(stacked, "hub", model_type), source)
    source = read(memory)
    published = convert(source, "hub", model_type)
    if stacks and family != "mistral_large4":  # comes back without "mlp.", which transformers adds on loading
        bits_equal(convert(published, "stacked", model_type), source)
    if hub is not None and knows_hub(family, hub):
        state, info = load(family, write(published, memory, tmp_path / "published"))
        assert info == expected_info
        bits_equal(state, expected)


def already(tensors: Mapping[str, torch.Tensor], target: str, model_type: str) -> bool:
    try:
        plan = make_plan(headers(tensors), target, load_families(), model_type)
    except CheckpointError:
        return False
    return all(layout.source == layout.target for layout in plan.layouts)


def knows_hub(family: str, hub: Path) -> bool:
    """Whether transformers converts this class at all: text towers alone have no conversion of their own."""
    return any("experts.0." in name or "input_linear" in name for name in read(hub)) or family == "qwen3_vl_moe"


@pytest.mark.parametrize("family", CASES)
def test_every_target_and_back_is_the_identity(family: str, tmp_path: Path) -> None:
    model = build_tiny(family, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, save_original_format=False)
    source, model_type, families = read(tmp_path), model.config.model_type, load_families()
    home = "stacked" if already(source, "stacked", model_type) else "hub"
    plan = make_plan(headers(source), home, families, model_type)
    assert {output.name for output in plan.outputs} == source.keys()
    canonical = digest(source, model_type)
    for target in ("hub", "per-expert", "te-grouped", "nemo", "sonicmoe"):
        try:
            there = convert(source, target, model_type)
        except CheckpointError as error:
            said = "needs a gate" if target == "sonicmoe" and family != "ernie4_5_vl_moe" else "different sizes"
            assert said in str(error)  # noqa: PT017
            continue
        assert digest(there, model_type) == canonical, target
        if family != "mistral_large4":  # as above
            bits_equal(convert(there, home, model_type), source)


def digest(tensors: Mapping[str, torch.Tensor], model_type: str) -> dict[tuple[str, int, str], bytes]:
    """The canonical matrices of a checkpoint, whatever its layout."""
    return {
        (part.layer, part.expert, part.role): view(tensors[part.region.tensor], part.region)
        .contiguous()
        .view(torch.uint8)
        .numpy()
        .tobytes()
        for part in parts(headers(tensors), load_families(), model_type)
    }
