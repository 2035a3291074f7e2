"""Reading a Hugging Face checkpoint into a live model: exact for every family, and no damage goes unnoticed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_accel import MoEConfig
from moe_accel.checkpoint import load_hub_checkpoint
from moe_accel.checkpoint.files import check_sharded, open_weights
from moe_accel.checkpoint.load import default_conversions
from moe_accel.errors import CheckpointError
from tests.families import available_families, build_tiny

EXPERT = "model.layers.0.mlp.experts.2.up_proj.weight"


def same(one: torch.nn.Module, other: torch.nn.Module) -> list[str]:
    """Names of the weights and buffers whose bits differ between two models."""
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny Qwen3-MoE, and its checkpoint of several files."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = build_tiny("qwen3_moe")
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return model, folder


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy of the checkpoint to damage."""
    return Path(shutil.copytree(saved[1], tmp_path / "checkpoint"))


def file_of(folder: Path, weight: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][weight]


@pytest.mark.parametrize("family", available_families())
def test_what_save_pretrained_wrote_is_read_back_bit_for_bit(family, tmp_path):
    model, other = build_tiny(family, seed=0), build_tiny(family, seed=1)
    model.save_pretrained(tmp_path)
    assert same(model, other)
    load_hub_checkpoint(other, tmp_path)
    assert not same(model, other)


def test_values_go_into_the_tensors_the_model_has(saved):
    model, folder = saved
    other = build_tiny("qwen3_moe", seed=1)
    before = {name: (id(p), p.data_ptr()) for name, p in other.named_parameters()}
    load_hub_checkpoint(other, folder)
    assert {name: (id(p), p.data_ptr()) for name, p in other.named_parameters()} == before
    assert not same(model, other)


def test_dtype_of_the_model_is_kept(saved):
    model, folder = saved
    other = build_tiny("qwen3_moe", dtype=torch.bfloat16, seed=1)
    load_hub_checkpoint(other, folder)
    for (name, ours), theirs in zip(other.named_parameters(), model.parameters(), strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs.bfloat16()), name


def test_tied_weights_need_only_one_copy(tmp_path):
    model = build_tiny("qwen3_moe", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    other = build_tiny("qwen3_moe", seed=1, tie_word_embeddings=True)
    load_hub_checkpoint(other, tmp_path)
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert not same(model, other)


def test_stacked_layout_is_read_too(saved, tmp_path):
    model, _ = saved
    model.save_pretrained(tmp_path, save_original_format=False)
    other = build_tiny("qwen3_moe", seed=1)
    load_hub_checkpoint(other, tmp_path)
    assert not same(model, other)


def test_weights_of_older_torch_files_are_read(saved, tmp_path):
    model, folder = saved
    weights = {name: tensor[...] for name, tensor in open_weights(folder).items()}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    other = build_tiny("qwen3_moe", seed=1)
    load_hub_checkpoint(other, tmp_path)
    assert not same(model, other)


def test_a_missing_file_is_named(damaged):
    lost = file_of(damaged, EXPERT)
    lost.unlink()
    with pytest.raises(CheckpointError, match=rf"index\.json names \d+ files, 1 of them missing: {lost.name}"):
        load_hub_checkpoint(build_tiny("qwen3_moe"), damaged)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_named(damaged, keep):
    file = file_of(damaged, EXPERT)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match=rf"{file.name} is damaged or cut short"):
        load_hub_checkpoint(build_tiny("qwen3_moe"), damaged)


def test_a_truncated_index_is_named(damaged):
    index = damaged / "model.safetensors.index.json"
    index.write_text(index.read_text()[:100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json is damaged or cut short"):
        load_hub_checkpoint(build_tiny("qwen3_moe"), damaged)


def test_an_index_that_promises_too_much_is_found(damaged):
    file = file_of(damaged, EXPERT)
    weights = load_file(file)
    del weights[EXPERT]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{file.name} lacks 1 weights that .*: {EXPERT}"):
        load_hub_checkpoint(build_tiny("qwen3_moe"), damaged)


def single_file(saved, folder: Path, change) -> None:
    weights = {name: tensor[...] for name, tensor in open_weights(saved[1]).items()}
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("experts.2.up_proj", r"gate_up_proj cannot be built from 8 .*gate_proj\.weight, 7 .*up_proj\.weight"),
        ("experts.2.down_proj", r"experts\.down_proj has shape \(7, 32, 24\), the model's is \(8, 32, 24\) \(from 7 "),
        ("experts.", r"2 weights of the model are not in it: .*experts\.down_proj, .*experts\.gate_up_proj"),
        ("self_attn.q_proj", r"1 weights of the model are not in it: .*self_attn\.q_proj\.weight"),
    ],
)
def test_weights_that_are_not_there_are_named(saved, tmp_path, gone, message):
    def drop(weights):
        for name in [name for name in weights if "layers.0." in name and gone in name]:
            del weights[name]

    single_file(saved, tmp_path, drop)
    with pytest.raises(CheckpointError, match=message) as error:
        load_hub_checkpoint(build_tiny("qwen3_moe"), tmp_path)
    assert str(tmp_path) in str(error.value)


def test_weights_the_model_does_not_have_are_named(saved, tmp_path):
    single_file(saved, tmp_path, lambda weights: weights.update({"model.layers.9.mlp.gate.weight": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"1 weights in it are not in the model: model\.layers\.9\.mlp\.gate"):
        load_hub_checkpoint(build_tiny("qwen3_moe"), tmp_path)


def test_a_checkpoint_of_another_size_is_refused_with_both_shapes(tmp_path):
    build_tiny("qwen3_moe", moe_intermediate_size=16).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"gate_up_proj has shape \(8, 32, 32\), the model's is \(8, 48, 32\)"):
        load_hub_checkpoint(build_tiny("qwen3_moe"), tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no model weights"):
        load_hub_checkpoint(build_tiny("qwen3_moe"), tmp_path)


def sharded(folder: Path) -> Path:
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"model": {"a": torch.zeros(100), "b": torch.ones(3)}}, checkpoint_id=folder, no_dist=True)
    return next(folder.glob("*.distcp"))


def test_a_sharded_checkpoint_tells_what_is_in_it(tmp_path):
    sharded(tmp_path)
    assert check_sharded(tmp_path) == {"model.a", "model.b"}


def test_a_truncated_sharded_checkpoint_is_named(tmp_path):
    file = sharded(tmp_path)
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size - 200])
    with pytest.raises(CheckpointError, match=rf"{file.name} has {size - 200} of \d+ bytes"):
        check_sharded(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"{file.name} is missing, its metadata names 1 files"):
        check_sharded(tmp_path)


def test_a_sharded_checkpoint_without_metadata_is_named(tmp_path):
    sharded(tmp_path)
    metadata = tmp_path / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read"):
        check_sharded(tmp_path)


def test_hub_names_do_not_depend_on_the_class_fully_shard_makes(tmp_path):
    """Of a model built from a config; stock transformers writes `model.` for `backbone.` once the class is replaced."""
    model = build_tiny("nemotron_h")
    model.save_pretrained(tmp_path / "before")
    conversions = default_conversions(model)
    model.__class__ = type(f"FSDP{type(model).__name__}", (type(model),), {})
    model.save_pretrained(tmp_path / "stock")
    model._weight_conversions = conversions
    model.save_pretrained(tmp_path / "ours")

    def names(which):
        with safe_open(tmp_path / which / "model.safetensors", "pt") as file:
            return set(file.keys())

    assert names("stock") != names("before")
    assert names("ours") == names("before")


@pytest.mark.usefixtures("new_accelerate_state")
def test_a_missing_random_state_is_said(tmp_path, capsys):
    accelerator = Accelerator(cpu=True, parallelism_config=MoEConfig())
    accelerator.prepare(build_tiny("qwen3_moe"))
    accelerator.save_state(tmp_path / "state")
    capsys.readouterr()
    accelerator.load_state(tmp_path / "state")
    assert capsys.readouterr().err == ""
    (tmp_path / "state" / "random_states_0.pkl").unlink()
    accelerator.load_state(tmp_path / "state")
    said = "has no random state of rank 0: there, what is drawn from now on is drawn anew\n"
    assert capsys.readouterr().err == f"moe-accel: {tmp_path / 'state'} {said}"
