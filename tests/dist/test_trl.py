"""TRL's SFTTrainer on ranks, with the aux loss that is its default: same as on stock FSDP2, resumed, and with LoRA."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_accel.plugin import reports
from tests.dist.ranks import run_alone
from tests.dist.test_resume import EP2, EP4, STOCK, TWO_RANKS
from tests.dist.test_trainer import CHECKPOINT, EP1_ON_2, STOCK_ON_2, reload, slow
from tests.dist.trainer_runs import (
    ARGUMENTS,
    FAMILY,
    SAVE_STEPS,
    Fit,
    assert_same_fit,
    cached,
    different,
    fit_on_ranks,
    watch_training,
)
from tests.families import build_tiny, model_class, tiny_inputs
from tests.family_data import VOCAB

AUX_LOSS_COEF = 0.5
"""Large, so that a run without it is told from one with it."""

LENGTHS = (13, 9, 4, 7, 11, 2, 13, 6)
ATTENTION = (("target_modules", ("q_proj", "v_proj")),)
EXPERTS = (("target_modules", ()), ("target_parameters", ("experts.gate_up_proj", "experts.down_proj")))


def before_fork(**_: Any) -> None:
    from trl import SFTTrainer  # noqa: F401

    model_class(FAMILY)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCAB)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1", eos_token="w2", unk_token="w0")


def sft(
    folder: Path,
    seed: int = 0,
    resume_from: Path | None = None,
    aux_loss_coef: float = AUX_LOSS_COEF,
    lora: tuple[tuple[str, Any], ...] | None = None,
    save_as: Path | None = None,
    arguments: Mapping[str, Any] = {},
) -> Fit:
    """Fine-tune a tiny Qwen3-MoE with SFTTrainer on this rank; `lora` are the arguments of a LoraConfig."""
    import datasets
    from peft import LoraConfig
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    tokens = tiny_inputs(FAMILY, batch=64)["input_ids"].tolist()
    rows = [{"input_ids": row[: LENGTHS[number % len(LENGTHS)]]} for number, row in enumerate(tokens)]
    peft_config = None
    if lora is not None:
        set_seed(seed)  # of the adapters
        given = {name: list(value) for name, value in lora}
        peft_config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", **given)
    trainer = SFTTrainer(
        model=build_tiny(FAMILY, seed=0 if lora else seed, router_aux_loss_coef=aux_loss_coef),
        args=SFTConfig(str(folder), bf16=False, **{"gradient_checkpointing": False, **ARGUMENTS, **arguments}),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )
    assert trainer.aux_loss_enabled == (aux_loss_coef > 0)
    finish = watch_training(trainer)
    batches: list[int] = []
    trainer.model.get_input_embeddings().register_forward_hook(lambda _, args, __: batches.append(args[0].shape[0]))
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    leaves_out = bool(reports(trainer.accelerator)) and trainer.accelerator.parallelism_config.padding_free == "auto"
    assert (1 in batches) == leaves_out  # two ragged rows are one without their padding
    result = finish()
    if save_as is not None:
        trainer.save_model(str(save_as))
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(Fit, folder with checkpoints and a final save) of a layout; each is run once."""
    return cached(tmp_path_factory, sft)


@pytest.mark.parametrize(("ours", "stock"), [(TWO_RANKS, STOCK_ON_2), slow(EP2, STOCK), slow(EP4, STOCK)], ids=str)
def test_losses_norms_and_weights_are_those_of_stock_fsdp2(trained, ours, stock):
    assert_same_fit(trained(ours, "FULL")[0], trained(stock, "FULL")[0])


def test_the_aux_loss_is_in_the_loss(trained):
    (with_it, _), (without, _) = trained(STOCK_ON_2, "FULL"), trained(STOCK_ON_2, "FULL", aux_loss_coef=0.0)
    assert with_it.losses[0] > without.losses[0] + AUX_LOSS_COEF


@pytest.mark.parametrize(
    ("kind", "saved", "resumed"),
    [
        ("FULL", TWO_RANKS, EP1_ON_2),
        slow("SHARDED", TWO_RANKS, EP1_ON_2),
        slow("SHARDED", EP1_ON_2, TWO_RANKS),
        slow("SHARDED", EP2, EP4),
        slow("FULL", EP4, EP2),
    ],
    ids=str,
)
def test_training_resumes_at_another_ep_size(trained, tmp_path, kind, saved, resumed):
    truth, folder = trained(saved, kind)
    tried = fit_on_ranks(resumed, kind, sft, folder=tmp_path, seed=1, resume_from=folder / CHECKPOINT)
    assert_same_fit(tried, truth, resumed=True)


def test_the_final_save_loads_in_plain_transformers_with_nothing_missing(trained):
    truth, folder = trained(TWO_RANKS, "FULL")
    info, weights = run_alone(reload, folder=folder / "final")
    assert not any(info.values()), info
    assert not different(weights, truth.weights)


@pytest.mark.parametrize(
    ("ours", "adapters"),
    [
        pytest.param(TWO_RANKS, ATTENTION, id="ep2-attention"),
        pytest.param(EP1_ON_2, EXPERTS, id="ep1-experts"),
        pytest.param(EP1_ON_2, ATTENTION, id="ep1-attention", marks=pytest.mark.slow),
    ],
)
def test_lora_is_that_of_stock_fsdp2(trained, ours, adapters):
    (tried, _), (truth, _) = trained(ours, "FULL", lora=adapters), trained(STOCK_ON_2, "FULL", lora=adapters)
    assert_same_fit(tried, truth)
    assert_only_adapters_changed(tried)


def assert_only_adapters_changed(trained):
    changed = different(trained.weights, trained.saved[SAVE_STEPS])
    assert changed == [name for name in trained.weights if "lora_" in name]
    assert changed


@pytest.mark.parametrize("kind", ["FULL", pytest.param("SHARDED", marks=pytest.mark.slow)])
def test_lora_on_attention_resumes_at_another_ep_size(trained, tmp_path, kind):
    truth, folder = trained(TWO_RANKS, kind, lora=ATTENTION)
    how = {"lora": ATTENTION, "seed": 1, "resume_from": folder / CHECKPOINT}
    tried = fit_on_ranks(EP1_ON_2, kind, sft, folder=tmp_path, **how)
    assert_same_fit(tried, truth, resumed=True)


@pytest.mark.parametrize(("ours", "stock"), [(TWO_RANKS, STOCK_ON_2), slow(EP4, STOCK)], ids=str)
def test_lora_on_experts_trains_as_stock_fsdp2_and_saves_the_same_files(trained, tmp_path, ours, stock):
    """The same bits but for the rounding of three steps: names, shapes, dtypes and config of the adapter are PEFT's."""
    fits, files = [], []
    for layout, name in ((ours, "ours"), (stock, "stock")):
        fits.append(fit_on_ranks(layout, "FULL", sft, folder=tmp_path, lora=EXPERTS, save_as=tmp_path / name))
        files.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert_same_fit(*fits)
    assert files[0].keys() == files[1].keys()
    for name, expected in files[1].items():
        assert files[0][name].dtype == expected.dtype, name
        torch.testing.assert_close(files[0][name], expected, rtol=0, atol=1e-4, msg=name)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "stock")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("kind", ["FULL", pytest.param("SHARDED", marks=pytest.mark.slow)])
def test_lora_on_experts_resumes_at_another_ep_size(trained, tmp_path, kind):
    truth, folder = trained(TWO_RANKS, kind, lora=EXPERTS)
    how = {"lora": EXPERTS, "seed": 1, "resume_from": folder / CHECKPOINT}
    assert_same_fit(fit_on_ranks(EP1_ON_2, kind, sft, folder=tmp_path, **how), truth, resumed=True)
