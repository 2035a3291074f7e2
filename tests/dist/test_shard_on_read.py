"""Loading by shards gives what plain transformers gives, bit for bit, and reads no rank more than its part."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.ranks import run_alone, run_ranks, with_moe_config
from tests.dist.test_resume import whole
from tests.families import build_tiny, model_class, tiny_inputs, tiny_loss

FAMILIES = [
    "qwen3_moe",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "nemotron_h",
    "granitemoe",
    "qwen3_5_moe",
    "qwen3_vl_moe",
    "glm4_moe",
    "olmoe",
    "minimax_m2",
    "ernie4_5_moe",
    "openai_privacy_filter",
    "deepseek_v4",
]


def before_fork(families: list[str], **_: Any) -> None:
    for family in families:
        model_class(family)


def kinds(family: str) -> dict[str, dict[str, Any]]:
    """The checkpoints of a family: how its config and how it is saved."""
    return {
        "hub": {},
        "stacked": {"save_original_format": False},
        "tied": {"tie_word_embeddings": True},
    }


def write_checkpoints(families: list[str], folder: Path) -> None:
    """In one process, without moe-accel: the checkpoints, and beside them what plain transformers loads from them."""
    for family in families:
        for kind, how in kinds(family).items():
            config = {name: value for name, value in how.items() if name == "tie_word_embeddings"}
            saving = {name: value for name, value in how.items() if name == "save_original_format"}
            target = folder / family / kind
            build_tiny(family, **config).save_pretrained(target, max_shard_size="60KB", **saving)
            torch.manual_seed(5)
            loaded, info = model_class(family).from_pretrained(target, output_loading_info=True)
            truth = dict(loaded.state_dict()) | {f"buffer {name}": each for name, each in loaded.named_buffers()}
            torch.save((truth, told(info), loaded.dtype), target / "truth.pt")


def told(info: dict[str, Any]) -> dict[str, list[str]]:
    return {name: sorted(map(str, each)) for name, each in info.items()}


def load_and_compare(
    families: list[str], folder: Path, kind_names: list[str], stock: bool, precision: str = "no"
) -> dict[str, tuple[int, list[str], float]]:
    """On a rank: how many parameters stayed in their files, what differs from the truth, and the first loss."""
    from accelerate import Accelerator

    from moe_accel.streaming import hook, pending, pending_parameters

    read_whole: list[Any] = []
    pending.materialise = read_whole.append
    if stock:
        hook.is_wanted = lambda: False
    accelerator = Accelerator(mixed_precision=precision)
    results, plugin = {}, accelerator.state.fsdp_plugin
    plugin_fields = dict(vars(plugin))
    for family in families:
        vars(plugin).update(plugin_fields)  # which layers to wrap is remembered from the model before
        for kind in kind_names:
            target = folder / family / kind
            truth, info, dtype = torch.load(target / "truth.pt", weights_only=True)
            torch.manual_seed(5 + accelerator.process_index)
            model, own_info = model_class(family).from_pretrained(target, output_loading_info=True)
            assert told(own_info) == info
            assert (model.dtype, model.device) == (dtype, torch.device("cpu"))
            num_pending = len(list(pending_parameters(model)))
            read_whole.clear()
            model, _ = accelerator.prepare(model.train(), torch.optim.SGD(model.parameters()))
            assert stock or read_whole == [], "parameters that this rank read whole"
            assert not list(pending_parameters(model))
            found = whole(model.state_dict()) | {f"buffer {name}": each for name, each in model.named_buffers()}
            wrong = [name for name in truth.keys() | found.keys() if not _equal(truth.get(name), found.get(name))]
            loss = tiny_loss(model, tiny_inputs(family)).item()
            results[f"{family} {kind}"] = (num_pending, wrong, loss)
            accelerator.free_memory()
            del model, found
            gc.collect()
    return results


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one.to(other.dtype), other)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("checkpoints")
    run_alone(write_checkpoints, families=FAMILIES, folder=made, timeout_s=300)
    return made


@pytest.mark.parametrize(
    ("ep_size", "ram_efficient", "families", "kind_names"),
    [
        pytest.param(2, "false", FAMILIES, ["hub", "stacked"], id="ep2-all", marks=pytest.mark.slow),
        pytest.param(2, "false", FAMILIES[:5], ["hub"], id="ep2"),
        pytest.param(2, "false", FAMILIES[:1], ["stacked", "tied"], id="ep2-tied"),
        pytest.param(2, "false", FAMILIES[:3], ["tied"], id="ep2-tied-more", marks=pytest.mark.slow),
        pytest.param(4, "false", FAMILIES[:4], ["hub"], id="ep4", marks=pytest.mark.slow),
        pytest.param(1, "false", FAMILIES[:3], ["stacked"], id="ep1", marks=pytest.mark.slow),
        pytest.param(2, "true", FAMILIES[:2], ["hub"], id="ep2-ram_efficient"),
    ],
)
def test_every_weight_buffer_and_loss_is_that_of_plain_transformers(
    folder, ep_size, ram_efficient, families, kind_names
):
    environment = {**with_moe_config(ep_size=ep_size), "FSDP_CPU_RAM_EFFICIENT_LOADING": ram_efficient}
    how = {"families": families, "folder": folder, "kind_names": kind_names, "timeout_s": 500}
    ranks = run_ranks(load_and_compare, 4, environment, stock=False, **how)
    for rank in ranks:
        assert {case: each[1] for case, each in rank.items() if each[1]} == {}
        assert {case for case, each in rank.items() if each[0] == 0} == set()
    if ram_efficient == "false" and len(families) < len(FAMILIES):
        stock = run_ranks(load_and_compare, 4, environment, stock=True, **how)
        assert losses(ranks) == losses(stock)
        assert {each[0] for rank in stock for each in rank.values()} == {0}


def losses(ranks: list[dict[str, tuple[int, list[str], float]]]) -> list[dict[str, float]]:
    return [{case: each[2] for case, each in rank.items()} for rank in ranks]
