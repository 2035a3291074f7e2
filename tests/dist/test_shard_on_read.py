"""Loading by shards gives what plain transformers gives, bit for bit, and reads no rank more than its part."""

import errno
import gc
import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import distributed_c10d

from moe_accel.errors import CheckpointError
from moe_accel.ranks import FAILED, meet, telling_others
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


def before_fork(families: Sequence[str] = (), **_: Any) -> None:
    for family in families:
        model_class(family)


KINDS: dict[str, dict[str, Any]] = {
    "hub": {},
    "stacked": {"saving": {"save_original_format": False}},
    "tied": {"config": {"tie_word_embeddings": True}},
    "bf16": {"loading": {"dtype": torch.bfloat16}, "families": ["ernie4_5_moe", "deepseek_v3", "nemotron_h"]},
    "missing": {"drops": "lm_head.weight", "families": ["qwen3_moe", "mixtral"]},
}
"""How a checkpoint is made and loaded, and of which families there is one. Those of bf16 keep some weights in fp32."""


def write_checkpoints(families: list[str], folder: Path) -> None:
    """In one process, without moe-accel: the checkpoints, and beside them what plain transformers loads from them."""
    for family in families:
        for kind, how in KINDS.items():
            if family not in how.get("families", families):
                continue
            target = folder / family / kind
            model = build_tiny(family, **how.get("config", {}))
            state = {name: each for name, each in model.state_dict().items() if name != how.get("drops")}
            given = {"state_dict": state} if "drops" in how else {}
            model.save_pretrained(target, max_shard_size="60KB", **given, **how.get("saving", {}))
            torch.manual_seed(5)
            loaded, info = model_class(family).from_pretrained(
                target, output_loading_info=True, **how.get("loading", {})
            )
            assert ("drops" in how) == bool(info["missing_keys"])
            truth = dict(loaded.state_dict())
            assert kind != "bf16" or {each.dtype for each in truth.values()} == {torch.bfloat16, torch.float32}
            truth |= {f"buffer {name}": each for name, each in loaded.named_buffers()}
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
            how = {"output_loading_info": True, **KINDS[kind].get("loading", {})}
            model, own_info = model_class(family).from_pretrained(target, **how)
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
    ("ep_size", "ram_efficient", "families", "kind_names", "precision"),
    [
        pytest.param(2, "false", FAMILIES, ["hub", "stacked"], "no", id="ep2-all", marks=pytest.mark.slow),
        pytest.param(2, "false", FAMILIES[:5], ["hub"], "no", id="ep2"),
        pytest.param(2, "false", FAMILIES[:1], ["stacked", "tied"], "no", id="ep2-tied"),
        pytest.param(2, "false", FAMILIES[:3], ["tied"], "no", id="ep2-tied-more", marks=pytest.mark.slow),
        pytest.param(4, "false", FAMILIES[:4], ["hub"], "no", id="ep4", marks=pytest.mark.slow),
        pytest.param(1, "false", FAMILIES[:3], ["stacked"], "no", id="ep1", marks=pytest.mark.slow),
        pytest.param(2, "true", FAMILIES[:2], ["hub"], "no", id="ep2-ram_efficient"),
        pytest.param(2, "false", ["ernie4_5_moe"], ["bf16"], "bf16", id="ep2-keeps-fp32"),
        pytest.param(
            4, "false", KINDS["bf16"]["families"], ["bf16"], "bf16", id="ep4-keeps-fp32", marks=pytest.mark.slow
        ),
        pytest.param(2, "true", ["qwen3_moe"], ["missing"], "no", id="ep2-new-weights"),
        pytest.param(
            4, "true", ["qwen3_moe", "mixtral"], ["missing"], "no", id="ep4-new-weights", marks=pytest.mark.slow
        ),
    ],
)
def test_every_weight_buffer_and_loss_is_that_of_plain_transformers(
    folder, ep_size, ram_efficient, families, kind_names, precision
):
    environment = {**with_moe_config(ep_size=ep_size), "FSDP_CPU_RAM_EFFICIENT_LOADING": ram_efficient}
    how = {"families": families, "folder": folder, "kind_names": kind_names, "precision": precision, "timeout_s": 500}
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


def read_a_damaged_copy(families: list[str], folder: Path, damage: str) -> tuple[str, str, list[str]]:
    """prepare() on a rank that has its own copy of a checkpoint, as on a local disk; that of rank 1 suffers meanwhile.

    Returns:
        The error, its class and message, and which weights are then not those of plain transformers.
    """
    from accelerate import Accelerator

    accelerator = Accelerator()
    mine = shutil.copytree(folder / families[0] / "hub", folder / f"rank-{accelerator.process_index}")
    index = json.loads((mine / "model.safetensors.index.json").read_text())
    file = mine / index["weight_map"]["model.layers.1.mlp.experts.7.down_proj.weight"]
    model = model_class(families[0]).from_pretrained(mine)
    if accelerator.process_index == 1:
        DAMAGES[damage](file)
    try:
        model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    except Exception as error:
        return type(error).__name__, str(error), []
    truth, found = torch.load(mine / "truth.pt", weights_only=True)[0], whole(model.state_dict())
    return "none", "", [name for name, each in found.items() if not _equal(truth.get(name), each)]


def fail_reads(error: Exception) -> None:
    def preadv(*_: Any) -> int:
        raise error

    os.preadv = preadv


DAMAGES = {
    "cut-short": lambda file: os.truncate(file, 5000),
    "unreadable": lambda _: fail_reads(OSError(errno.EIO, "Input/output error")),
    "no-memory": lambda _: fail_reads(MemoryError("none left")),
    "deleted": lambda file: file.unlink(),
}
ON_FSDP2 = with_moe_config(ep_size=2)
ON_DDP = {**with_moe_config(ep_size=1), "ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_CPU": "true"}


@pytest.mark.parametrize(
    ("environment", "damage", "told"),
    [
        pytest.param(
            ON_FSDP2, "cut-short", r"rank 1: {folder}/rank-1/model-\d+-of-\d+.safetensors is cut short: ", id="cut"
        ),
        pytest.param(
            ON_FSDP2, "unreadable", r"rank 1: {folder}/rank-1/\S+ cannot be read: Input/output error", id="eio"
        ),
        pytest.param(
            ON_FSDP2, "no-memory", "rank 1: its part of the checkpoint .* MemoryError: none left", id="no-memory"
        ),
        pytest.param(
            ON_DDP, "cut-short", r"rank 1: {folder}/rank-1/model-\d+-of-\d+.safetensors is cut short: ", id="ddp"
        ),
    ],
)
def test_what_one_rank_cannot_read_ends_all_of_them(folder, tmp_path, environment, damage, told):
    """At once: nothing that is left waits for the rank that failed."""
    shutil.copytree(folder / FAMILIES[0] / "hub", tmp_path / FAMILIES[0] / "hub")
    how = {"families": FAMILIES[:1], "folder": tmp_path, "damage": damage, "timeout_s": 30}
    ranks = run_ranks(read_a_damaged_copy, 2, environment, **how)
    own = "MemoryError" if damage == "no-memory" else "CheckpointError"
    assert [rank[0] for rank in ranks] == ["CheckpointError", own]
    assert re.match(told.format(folder=re.escape(str(tmp_path))), ranks[0][1]), ranks[0][1]
    assert ranks[1][1] == ("none left" if damage == "no-memory" else ranks[0][1])


def load_with_a_file_missing(families: list[str], folder: Path) -> tuple[str, str, str, float]:
    """from_pretrained and prepare() on a rank; rank 1 lacks a file. The error, where it came from, and after how long.

    Rank 0 loads another model by itself before: nobody waits for anybody then.
    """
    from accelerate import Accelerator

    accelerator = Accelerator()
    if accelerator.is_main_process:
        model_class(families[0]).from_pretrained(folder)
    mine = shutil.copytree(folder, folder.with_name(f"rank-{accelerator.process_index}"))
    if accelerator.process_index == 1:
        min(mine.glob("*.safetensors")).unlink()
    start, where = time.monotonic(), "from_pretrained"
    try:
        model = model_class(families[0]).from_pretrained(mine)
        where = "prepare"
        accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    except Exception as error:
        return where, type(error).__name__, str(error), time.monotonic() - start
    return "none", "", "", time.monotonic() - start


@pytest.mark.parametrize("environment", [ON_FSDP2, pytest.param(ON_DDP, marks=pytest.mark.slow)], ids=["fsdp2", "ddp"])
def test_a_file_that_one_rank_lacks_ends_all_of_them(folder, tmp_path, environment):
    shutil.copytree(folder / FAMILIES[0] / "hub", tmp_path / "hub")
    how = {"families": FAMILIES[:1], "folder": tmp_path / "hub", "timeout_s": 100}
    others, own = run_ranks(load_with_a_file_missing, 2, environment, **how)
    assert own[:2] == ("from_pretrained", "CheckpointError")
    assert re.match(rf"{re.escape(str(tmp_path))}/rank-1/model-\S+ ", own[2])
    assert others[:3] == ("prepare", "CheckpointError", f"rank 1: {own[2]}")
    assert others[3] < 60


def fail_and_go_on() -> None:
    """Rank 1 fails and comes to the meeting all the same, before rank 0."""
    torch.distributed.init_process_group("gloo")
    rank, store = torch.distributed.get_rank(), distributed_c10d._get_default_store()
    if rank == 1:
        with pytest.raises(CheckpointError), telling_others():
            raise CheckpointError("no such file")
        assert store.check([FAILED])
    while rank == 0 and not store.check(["moe_accel/met/0"]):
        time.sleep(0.01)
    meet()
    torch.distributed.barrier()


def test_a_rank_that_failed_and_went_on_without_stops_nobody():
    run_ranks(fail_and_go_on, 2)


def test_files_deleted_after_from_pretrained_are_read_all_the_same(folder, tmp_path):
    """They were opened then, and are there as long as they are open."""
    shutil.copytree(folder / FAMILIES[0] / "hub", tmp_path / FAMILIES[0] / "hub")
    how = {"families": FAMILIES[:1], "folder": tmp_path, "damage": "deleted", "timeout_s": 30}
    assert run_ranks(read_a_damaged_copy, 2, ON_FSDP2, **how) == [("none", "", [])] * 2
