"""Weights that stay in their files: right whatever a script does before prepare(), and damaged files are named."""

import copy
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from moe_accel.errors import CheckpointError
from moe_accel.streaming import hook as hook_module
from moe_accel.streaming import is_pending, pending_parameters, read_onto, shard_on_read
from moe_accel.streaming.pending import Pending
from moe_accel.streaming.source import fill as fill_jobs
from moe_accel.streaming.source import open_sources, part_jobs, read_whole
from tests.families import build_tiny, model_class, tiny_inputs, tiny_loss

FAMILY = "qwen3_moe"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    build_tiny(FAMILY).save_pretrained(folder, max_shard_size="60KB")
    return folder


def load(folder: Path, **how):
    with shard_on_read():
        return model_class(FAMILY).from_pretrained(folder, **how)


def names(model: nn.Module) -> list[str]:
    return [name for name, each in model.named_parameters() if is_pending(each)]


def test_transformers_has_the_two_steps_that_are_replaced():
    for name in hook_module.LOADING:
        assert isinstance(vars(PreTrainedModel)[name], staticmethod), name


def test_stock_loading_is_left_alone_without_being_asked(saved):
    assert names(model_class(FAMILY).from_pretrained(saved)) == []
    assert len(names(load(saved))) == len(list(load(saved).parameters()))


@pytest.mark.parametrize(
    "part", [((0, 4), (0, 6)), ((1, 3), (0, 6)), ((0, 4), (2, 5)), ((3, 4), (5, 6)), ((2, 2), (0, 6))]
)
def test_a_part_of_a_stack_of_a_transpose_of_a_cut_is_what_torch_gives(tmp_path, part):
    from safetensors.torch import save_file

    weights = {f"w{number}": torch.randn(12, 4) for number in range(3)}
    save_file(weights, tmp_path / "a.safetensors")
    pending = {name: Pending.of(each) for name, each in open_sources([tmp_path / "a.safetensors"]).items()}

    def build(tensors):
        cut = [each.chunk(2, 0)[1].transpose(0, 1).contiguous().to(torch.bfloat16) for each in tensors.values()]
        return torch.cat([torch.stack(cut), torch.stack(cut[:2])], 0)

    built, truth = build(pending), build(weights)
    assert isinstance(built, Pending)
    assert built.shape == truth.shape
    whole = ((1, 5), *part)
    out = torch.empty([stop - start for start, stop in whole])
    fill_jobs(part_jobs(built.source, whole, out))
    assert torch.equal(out, truth[tuple(slice(*each) for each in whole)].float())


def test_what_cannot_be_read_by_parts_is_computed(tmp_path):
    from safetensors.torch import save_file

    weight = torch.randn(6, 4)
    save_file({"w": weight}, tmp_path / "a.safetensors")
    pending = Pending.of(open_sources([tmp_path / "a.safetensors"])["w"])
    computed = (pending.reshape(2, 3, 4).transpose(1, 2) + 1).reshape(6, 4)
    assert isinstance(computed, Pending)
    assert torch.equal(read_whole(computed.source), (weight.reshape(2, 3, 4).transpose(1, 2) + 1).reshape(6, 4))


def test_casts_and_copies_and_requires_grad_read_nothing(saved):
    model = load(saved, dtype=torch.float32)
    weights = {name: id(each) for name, each in model.named_parameters()}
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad = True
    model.to(torch.bfloat16)
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.bfloat16
    copied = copy.deepcopy(model)
    model.gradient_checkpointing_enable()
    assert len(names(model)) == len(names(copied)) == len(weights)
    assert model.num_parameters() > 0
    assert {name: id(each) for name, each in model.named_parameters()} == weights
    truth = build_tiny(FAMILY).to(torch.bfloat16).state_dict()
    for each in (model, copied):
        assert [name for name, value in each.state_dict().items() if not torch.equal(value, truth[name])] == []
        assert [name for name, value in each.named_parameters() if value.requires_grad] == ["lm_head.weight"]


def test_an_edit_counts_and_leaves_the_rest_in_the_files(saved):
    model = load(saved)
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.model.norm.weight.data.fill_(3)
    assert len(names(model)) == len(list(model.parameters())) - 2
    read_onto(model, torch.device("cpu"))
    truth = build_tiny(FAMILY).state_dict()
    assert torch.equal(model.lm_head.weight, 2 * truth["lm_head.weight"])
    assert torch.equal(model.model.norm.weight, torch.full_like(truth["model.norm.weight"], 3))
    assert torch.equal(model.model.embed_tokens.weight, truth["model.embed_tokens.weight"])
    assert {id(each) for each in optimizer.param_groups[0]["params"]} == {id(each) for each in model.parameters()}


def test_generate_resize_and_save_work_before_prepare(saved, tmp_path):
    truth = build_tiny(FAMILY)
    inputs = tiny_inputs(FAMILY)
    assert tiny_loss(load(saved), inputs).item() == tiny_loss(truth.eval(), inputs).item()
    load(saved).save_pretrained(tmp_path)
    again = model_class(FAMILY).from_pretrained(tmp_path).state_dict()
    assert [name for name, each in truth.state_dict().items() if not torch.equal(each, again[name])] == []
    model = load(saved)
    rows = model.config.vocab_size
    model.resize_token_embeddings(rows + 8)
    assert torch.equal(model.get_input_embeddings().weight[:rows], truth.get_input_embeddings().weight)
    assert len(names(model)) > 15


def test_lora_on_attention_and_experts_leaves_the_base_in_its_files(saved):
    model = load(saved)
    total = len(names(model))
    adapted = get_peft_model(
        model,
        LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]),
    )
    assert len(names(adapted)) == total
    adapters = [each for name, each in adapted.named_parameters() if "lora_" in name]
    assert adapters
    assert all(each.device.type == "cpu" and not is_pending(each) for each in adapters)
    assert tiny_loss(adapted.get_base_model(), tiny_inputs(FAMILY)).item() == pytest.approx(
        tiny_loss(build_tiny(FAMILY), tiny_inputs(FAMILY)).item(), rel=1e-5
    )


def test_missing_and_unexpected_weights_are_told_and_initialised_as_by_transformers(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = {}
    for file in saved.glob("*.safetensors"):
        weights |= load_file(file)
    weights["nobody.weight"] = weights.pop("lm_head.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    torch.manual_seed(3)
    stock, told = model_class(FAMILY).from_pretrained(tmp_path, output_loading_info=True)
    torch.manual_seed(3)
    model, own = load(tmp_path, output_loading_info=True)
    assert own == told
    assert own["unexpected_keys"] == {"nobody.weight"}
    assert own["missing_keys"] == {"lm_head.weight"}
    assert not is_pending(model.lm_head.weight)
    assert len(names(model)) > 15
    assert torch.equal(model.lm_head.weight, stock.lm_head.weight)


@pytest.mark.parametrize("how", [{"device_map": "cpu"}, {"use_safetensors": False}])
def test_where_it_cannot_be_the_reason_is_said(saved, tmp_path, how, capsys, monkeypatch):
    if "use_safetensors" in how:
        torch.save(build_tiny(FAMILY).state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_text((saved / "config.json").read_text())
        saved = tmp_path
    model = load(saved, **how)
    assert names(model) == []
    told = capsys.readouterr().err
    assert "Qwen3MoeForCausalLM is loaded whole on every rank: " in told
    assert ("device_map was given" if "device_map" in how else "no safetensors files") in told


@pytest.mark.parametrize(("rank", "shown"), [("0", True), ("1", False)])
def test_rank_0_shows_how_far_it_is(saved, capsys, monkeypatch, rank, shown):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    model = load(saved)
    num_bytes = sum(each.nbytes for each in model.parameters())
    capsys.readouterr()
    read_onto(model, torch.device("cpu"))
    told = capsys.readouterr().err
    assert ("Loading shards: 100%" in told and f"{num_bytes / 1e3:.0f}k/{num_bytes / 1e3:.0f}k" in told) == shown, told


def damage(folder: Path, kind: str) -> str:
    """Damage one file of a checkpoint; returns the name of the file that the error has to give."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = sorted(set(index["weight_map"].values()))[1]
    if kind == "short":
        os.truncate(folder / file, (folder / file).stat().st_size - 10)
    elif kind == "pointer":
        (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif kind == "missing":
        (folder / file).unlink()
    else:
        index["weight_map"]["model.layers.9.ghost.weight"] = file
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return file


@pytest.mark.parametrize("kind", ["short", "pointer", "missing", "index"])
def test_a_damaged_checkpoint_is_an_error_that_names_the_file(saved, tmp_path, kind):
    for each in saved.iterdir():
        (tmp_path / each.name).write_bytes(each.read_bytes())
    file = damage(tmp_path, kind)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert file in str(caught.value)


def test_a_file_that_became_short_after_it_was_opened_is_an_error(saved, tmp_path):
    for each in saved.iterdir():
        (tmp_path / each.name).write_bytes(each.read_bytes())
    model = load(tmp_path)
    file = sorted(tmp_path.glob("*.safetensors"))[0]
    os.truncate(file, 4000)
    with pytest.raises(CheckpointError, match=f"{file.name} is cut short"):
        read_onto(model, torch.device("cpu"))


def test_a_replaced_checkpoint_does_not_mix_with_the_one_that_was_opened(saved, tmp_path):
    for each in saved.iterdir():
        (tmp_path / each.name).write_bytes(each.read_bytes())
    model = load(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
        file.write_bytes(b"another")
    assert torch.equal(model.lm_head.weight, build_tiny(FAMILY).lm_head.weight)


def test_tied_weights_stay_tied(tmp_path):
    build_tiny(FAMILY, tie_word_embeddings=True).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(list(pending_parameters(model))) == len(names(model)) + 1
    model.to(torch.bfloat16)
    read_onto(model, torch.device("cpu"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sys.getrefcount(model.lm_head.weight) < 20
