"""Trainer, SFTTrainer and PEFT train a model that stays in its files until they prepare it as one loaded whole.

The truth is the same script in one process with plain transformers, on a batch as large as that of both ranks.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.dist.parity import TOLERANCE, UPDATE_TOLERANCE
from tests.dist.ranks import run_alone, run_ranks, with_moe_config
from tests.dist.test_trl import LENGTHS, tokenizer
from tests.dist.training import OPTIMIZER
from tests.families import build_tiny, model_class, tiny_inputs

FAMILY = "qwen3_moe"
NUM_RANKS, NUM_STEPS, BATCH = 2, 3, 4
ARGUMENTS: dict[str, Any] = {
    "max_steps": NUM_STEPS,
    "learning_rate": OPTIMIZER["lr"],
    "adam_epsilon": OPTIMIZER["eps"],
    "weight_decay": OPTIMIZER["weight_decay"],
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "target_parameters": ["experts.gate_up_proj"]}


def before_fork(**_: Any) -> None:
    import peft  # noqa: F401
    from trl import SFTTrainer  # noqa: F401

    model_class(FAMILY)


def write_checkpoint(folder: Path) -> None:
    """In the hub's layout; without the aux loss, which is a mean of its own on every rank."""
    build_tiny(FAMILY, router_aux_loss_coef=0.0).save_pretrained(folder, max_shard_size="60KB")
    tokenizer().save_pretrained(folder)


def with_trainer(model: Path, batch: int) -> tuple[list[float], Any]:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    inputs = tiny_inputs(FAMILY, batch=32)
    arguments = TrainingArguments(str(model / "out"), per_device_train_batch_size=batch, **ARGUMENTS)
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=arguments,
        train_dataset=[{name: each[row] for name, each in inputs.items()} for row in range(32)],
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.model


def with_sft_trainer(model: Path, batch: int, by_path: bool, adapted: bool = False) -> tuple[list[float], Any]:
    import datasets
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    tokens = tiny_inputs(FAMILY, batch=32)["input_ids"].tolist()
    rows = [{"input_ids": row[: LENGTHS[number % len(LENGTHS)]]} for number, row in enumerate(tokens)]
    arguments = SFTConfig(
        str(model / "out"), bf16=False, gradient_checkpointing=False, per_device_train_batch_size=batch, **ARGUMENTS
    )
    set_seed(0)  # of the adapters
    trainer = SFTTrainer(
        model=str(model) if by_path else AutoModelForCausalLM.from_pretrained(model),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA) if adapted else None,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.model


def with_peft(model: Path, batch: int) -> tuple[list[float], Any]:
    """A plain loop; its losses are the mean over the ranks, as Trainer logs it."""
    from accelerate import Accelerator
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, set_seed

    accelerator = Accelerator()
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    base = AutoModelForCausalLM.from_pretrained(model)
    set_seed(0)  # of the adapters
    adapted = get_peft_model(base.train(), LoraConfig(**LORA))
    optimizer = torch.optim.AdamW(adapted.parameters(), **OPTIMIZER)
    adapted, optimizer = accelerator.prepare(adapted, optimizer)
    losses = []
    for step in range(NUM_STEPS):
        inputs = tiny_inputs(FAMILY, batch * num_ranks, seed=step)
        loss = adapted(**{name: each[rank::num_ranks] for name, each in inputs.items()}).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return losses, adapted


def train(how: str, folder: Path, batch: int) -> tuple[list[float], int, int]:
    """The losses; the bytes that this rank read with `preadv`, as only shard-on-read does; and those of its shards."""
    num_read = 0
    preadv = os.preadv

    def counted(*given: Any) -> int:
        nonlocal num_read
        num_read += (count := preadv(*given))
        return count

    os.preadv = counted
    losses, model = HOW[how](folder, batch)
    own = [each for name, each in model.named_parameters() if "lora_" not in name]
    shards = [each.to_local() if isinstance(each, DTensor) else each for each in own]
    return losses, num_read, sum(each.nbytes for each in shards)


HOW = {
    "trainer": with_trainer,
    "sft": lambda *given: with_sft_trainer(*given, by_path=False),
    "sft-by-path": lambda *given: with_sft_trainer(*given, by_path=True),
    "sft-lora": lambda *given: with_sft_trainer(*given, by_path=True, adapted=True),
    "peft": with_peft,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("checkpoint")
    run_alone(write_checkpoint, folder=made)
    return made


QUICK = ("sft-by-path", "peft")


@pytest.mark.parametrize("how", [pytest.param(how, marks=() if how in QUICK else pytest.mark.slow) for how in HOW])
def test_a_model_that_stays_in_its_files_trains_as_one_loaded_whole(folder, how):
    truth, *read = run_alone(train, how=how, folder=folder, batch=BATCH)
    assert read[0] == 0, "plain transformers"
    ranks = run_ranks(train, NUM_RANKS, with_moe_config(ep_size=2), how=how, folder=folder, batch=BATCH // NUM_RANKS)
    assert ranks[0][0][0] == pytest.approx(truth[0], rel=TOLERANCE)
    assert [losses for losses, *_ in ranks] == [pytest.approx(truth, rel=UPDATE_TOLERANCE)] * NUM_RANKS
    assert len(truth) == NUM_STEPS
    assert truth[2] != pytest.approx(truth[0], rel=0.01)
    assert [num_read for _, num_read, _ in ranks] == [num_bytes for _, _, num_bytes in ranks]
    assert sum(num_bytes for _, _, num_bytes in ranks) == read[1], "each byte by one rank"
