"""Ranks write what they hold, and the folder is what plain transformers would write of the whole model."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from moe_accel.convert.commands import verify
from tests.dist.ranks import run_alone, run_ranks, with_moe_config
from tests.families import build_tiny, model_class

FAMILIES = (
    "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "nemotron_h", "granitemoe", "qwen3_5_moe", "qwen3_vl_moe",
    "jamba", "glm4_moe", "olmoe", "ernie4_5_vl_moe", "deepseek_v4", "openai_privacy_filter", "phimoe",
)  # fmt: skip
QUICK = ("qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v3")
RENAMED = ("nemotron_h", "ernie4_5_vl_moe", "deepseek_v4")
"""Whose hub names are others than those in memory, which is what `stacked` writes; `verify` compares by name."""


def before_fork(family: str = "qwen3_moe", **_: Any) -> None:
    model_class(family)


def write_plainly(family: str, folder: Path, stacked: bool, config: tuple = ()) -> None:
    """What transformers writes in one process, without moe-accel."""
    build_tiny(family, **dict(config)).save_pretrained(folder, save_original_format=not stacked)


def write_on_ranks(family: str, folder: Path, config: tuple = (), max_shard_size: str = "20KB") -> list[str]:
    """Let ranks save the same model; the names of the weights that this rank wrote."""
    from accelerate import Accelerator

    written = watch_writing()
    accelerator = Accelerator()
    model = build_tiny(family, **dict(config))
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.save_model(model, folder, max_shard_size=max_shard_size)
    return written


def watch_writing() -> list[str]:
    """A list that takes down which weights this rank writes from now on; lets tiny models be cut as large ones are."""
    from moe_accel.checkpoint import save, sharded

    save.ONE_FILE_BYTES = 0
    sharded.UNIT_BYTES = 3000
    written: list[str] = []
    write_unit = sharded._write_unit

    def watched(model: Any, unit: Any, tensors: Any, place: Any) -> None:
        written.extend(unit.names())
        write_unit(model, unit, tensors, place)

    sharded._write_unit = watched
    return written


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight of a folder, each in one file only, as the index says."""
    found: dict[str, torch.Tensor] = {}
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"] if index.exists() else None
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 not a dict
                assert name not in found
                assert weight_map is None or weight_map[name] == file.name
                found[name] = opened.get_tensor(name)
    assert weight_map is None or weight_map.keys() == found.keys()
    return found


def assert_same_checkpoint(folder: Path, plain: Path) -> None:
    ours, theirs = contents(folder), contents(plain)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if ours[name].dtype != theirs[name].dtype]
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    names = {file.name for file in folder.iterdir() if not file.name.startswith("model")}
    assert names == {file.name for file in plain.iterdir() if not file.name.startswith("model")}
    for name in names:
        assert json.loads((folder / name).read_text()) == json.loads((plain / name).read_text()), name


@pytest.fixture(scope="module")
def plainly(tmp_path_factory):
    """The folder of a family by plain transformers; each is written once."""

    @functools.cache
    def folder(family: str, stacked: bool, config: tuple = ()) -> Path:
        folder = tmp_path_factory.mktemp("plain")
        run_alone(write_plainly, family=family, folder=folder, stacked=stacked, config=config)
        return folder

    return folder


SPREADS = [(2, 2, {}), (4, 1, {}), (4, 2, {}), (4, 4, {}), (4, 2, {"dp_replicate_size": 2})]
CASES = [
    pytest.param(
        family, layout, ranks, ep, more,
        id=f"{family}-{layout}-ep{ep}on{ranks}{'-hsdp' if more else ''}",
        marks=() if (family in QUICK and ranks == 4 and ep == 2 and (layout == "per-expert" or family == QUICK[0]))
        or (family == QUICK[0] and layout == "per-expert") else pytest.mark.slow,
    )
    for family in FAMILIES
    for layout in ("per-expert", "stacked")
    for ranks, ep, more in SPREADS
]  # fmt: skip


@pytest.mark.parametrize(("family", "layout", "ranks", "ep", "more"), CASES)
def test_the_files_are_those_of_plain_save_pretrained(plainly, tmp_path, family, layout, ranks, ep, more):
    environment = with_moe_config(ep_size=ep, save_layout=layout, **more)
    written = run_ranks(write_on_ranks, ranks, environment, family=family, folder=tmp_path / "out")
    num_writers = ranks // more.get("dp_replicate_size", 1)
    assert all(written[:num_writers]), "every rank of the first replica writes"
    assert not any(written[num_writers:]), "no other does"
    names = [name for of_rank in written for name in set(of_rank)]
    assert len(names) == len(set(names)), "no weight is written by two ranks"
    assert_same_checkpoint(tmp_path / "out", plainly(family, layout == "stacked"))
    files = [load_file(file) for file in (tmp_path / "out").glob("*.safetensors")]
    assert len(files) > num_writers, "or the limit would not count"
    for weights in files:
        assert sum(each.nbytes for each in weights.values()) <= 20_000 or len(weights) == 1


def load_and_write(family: str, source: Path, folder: Path) -> None:
    """Let ranks load a checkpoint and save it again."""
    from accelerate import Accelerator

    watch_writing()
    accelerator = Accelerator()
    model = model_class(family).from_pretrained(source)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.save_model(model, folder, max_shard_size="20KB")


@pytest.mark.parametrize(
    ("family", "layout", "ep"),
    [
        pytest.param(
            family, layout, ep,
            id=f"{family}-{layout}-ep{ep}",
            marks=() if ep == 2 and family in ("qwen3_moe", "mixtral") else pytest.mark.slow,
        )
        for family in FAMILIES
        for layout in ("per-expert", "stacked")
        for ep in (1, 2, 4)
    ],
)  # fmt: skip
def test_load_and_save_is_equal_for_moe_accel_verify(plainly, tmp_path, family, layout, ep):
    source = plainly(family, False)
    run_ranks(
        load_and_write, max(2, ep), with_moe_config(ep_size=ep, save_layout=layout),
        family=family, source=source, folder=tmp_path / "out",
    )  # fmt: skip
    same_names = plainly(family, True) if layout == "stacked" and family in RENAMED else source
    assert verify(same_names, tmp_path / "out", None, None, as_json=False) == 0


def write_from_two_hosts(family: str, folder: Path) -> list[str]:
    """Every rank has a folder of its own, as on hosts that share none; the weights that this rank wrote."""
    from accelerate import Accelerator

    written = watch_writing()
    accelerator = Accelerator()
    model = build_tiny(family)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.save_model(model, folder / str(accelerator.process_index), max_shard_size="20KB")
    return written


def test_where_ranks_share_no_folder_rank_0_writes_for_all(plainly, tmp_path):
    written = run_ranks(write_from_two_hosts, 2, with_moe_config(ep_size=2), family="qwen3_moe", folder=tmp_path)
    assert written[0]
    assert not written[1]
    assert_same_checkpoint(tmp_path / "0", plainly("qwen3_moe", False))
    assert not (tmp_path / "1").exists()


def write_twice(family: str, folder: Path) -> None:
    """A save in many files, and one of another model, in few, into the same folder."""
    from accelerate import Accelerator

    watch_writing()
    accelerator = Accelerator()
    for seed, max_shard_size in ((1, "10KB"), (0, "60KB")):
        model = build_tiny(family, seed=seed)
        model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        accelerator.unwrap_model(model).save_pretrained(folder, max_shard_size=max_shard_size)


def test_a_second_save_leaves_nothing_of_the_first(plainly, tmp_path):
    run_ranks(write_twice, 2, with_moe_config(ep_size=2), family="qwen3_moe", folder=tmp_path / "out")
    assert_same_checkpoint(tmp_path / "out", plainly("qwen3_moe", False))


TIED = (("tie_word_embeddings", True),)


def test_tied_weights_are_written_once(plainly, tmp_path):
    run_ranks(write_on_ranks, 2, with_moe_config(ep_size=2), family="qwen3_moe", folder=tmp_path / "out", config=TIED)
    assert "lm_head.weight" not in contents(tmp_path / "out")
    assert_same_checkpoint(tmp_path / "out", plainly("qwen3_moe", False, TIED))


UNEVEN = (("num_experts", 6), ("vocab_size", 67))


@pytest.mark.parametrize(("ranks", "ep"), [(4, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_uneven_shards_are_put_together(plainly, tmp_path, ranks, ep):
    """6 experts over 4 ranks, 67 rows of embeddings: some ranks hold less than others, or rows across."""
    environment = with_moe_config(ep_size=ep)
    run_ranks(write_on_ranks, ranks, environment, family="qwen3_moe", folder=tmp_path / "out", config=UNEVEN)
    assert_same_checkpoint(tmp_path / "out", plainly("qwen3_moe", False, UNEVEN))


def write_adapters(family: str, folder: Path) -> tuple[list[str], list[str]]:
    """Save adapters of attention, of experts and a whole output layer, in two ways; names gathered, names of it all."""
    from accelerate import Accelerator
    from peft import LoraConfig, get_peft_model

    from moe_accel.checkpoint.save import gather_adapters
    from tests.families import randomise

    experts = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    accelerator = Accelerator()
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=experts, modules_to_save=["lm_head"])
    model = get_peft_model(build_tiny(family), config)
    randomise(model, seed=7, only="lora_")
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    unwrapped: Any = accelerator.unwrap_model(model)
    unwrapped.save_pretrained(folder / "ours")
    weights = accelerator.get_state_dict(model)
    unwrapped.save_pretrained(folder / "gathered", state_dict=weights, is_main_process=accelerator.is_main_process)
    return list(gather_adapters(unwrapped)), list(weights)


def test_adapters_are_those_that_peft_writes_and_the_base_is_not_gathered(tmp_path):
    gathered, everything = run_ranks(
        write_adapters, 2, with_moe_config(ep_size=2), family="qwen3_moe", folder=tmp_path
    )[0]
    ours, theirs = contents(tmp_path / "ours"), contents(tmp_path / "gathered")
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert any("experts" in name for name in ours)
    assert any("lm_head" in name for name in ours)
    assert len(gathered) < len(everything) / 2
    assert not [name for name in gathered if "base_layer" in name and "lora_" not in name]
    configs = [json.loads((tmp_path / way / "adapter_config.json").read_text()) for way in ("ours", "gathered")]
    assert configs[0] == configs[1]
