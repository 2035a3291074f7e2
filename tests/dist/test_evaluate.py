"""Evaluation and generation of a prepared model in a plain loop: those of one process, or what accelerate says."""

import pytest
import torch

from tests.dist.parity import TOLERANCE
from tests.dist.ranks import STOCK_FSDP2, run_alone, run_ranks, with_moe_config
from tests.families import build_tiny, model_class, tiny_inputs, tiny_loss

FAMILY = "qwen3_moe"
NUM_RANKS = 4
NEW_TOKENS = (2, 6, 3, 5)
"""By rank: the first to finish has to go on with the others."""


def before_fork(**_):
    model_class(FAMILY)


def inputs_of(rank):
    return tiny_inputs(FAMILY, batch=2, sequence=4 + 2 * rank, seed=rank)


@torch.no_grad()
def evaluate(model, rank, **how):
    """Loss of the rank's batch, and what the model says after its prompts."""
    model.eval()
    inputs = inputs_of(rank)
    prompt = inputs["input_ids"]
    said = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS[rank], **how)
    return tiny_loss(model, inputs).item(), said.tolist()


def evaluate_alone():
    model = build_tiny(FAMILY)
    model.generation_config.pad_token_id = 0
    return [evaluate(model, rank, do_sample=False) for rank in range(NUM_RANKS)]


def evaluate_on_ranks():
    from accelerate import Accelerator

    accelerator = Accelerator()
    model = build_tiny(FAMILY)
    model.generation_config.pad_token_id = 0
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    return evaluate(model, accelerator.process_index, do_sample=False, synced_gpus=True)


@pytest.mark.parametrize("ep_size", [2, pytest.param(4, marks=pytest.mark.slow), None], ids=["ep2", "ep4", "stock"])
def test_ranks_of_uneven_lengths_say_what_one_process_says(ep_size):
    environment = STOCK_FSDP2 if ep_size is None else with_moe_config(ep_size=ep_size)
    truth = run_alone(evaluate_alone)
    assert [len(said[0]) for _, said in truth] == [4 + 2 * rank + NEW_TOKENS[rank] for rank in range(NUM_RANKS)]
    for (loss, said), (true_loss, truly_said) in zip(
        run_ranks(evaluate_on_ranks, NUM_RANKS, environment), truth, strict=True
    ):
        assert loss == pytest.approx(true_loss, rel=TOLERANCE)
        assert said == truly_said


def prepare_alone():
    from accelerate import Accelerator

    return error_of(lambda: Accelerator().prepare(build_tiny(FAMILY)))


def evaluate_with_trainer(folder):
    from transformers import Trainer, TrainingArguments

    from tests.dist.trainer_runs import NUM_EVAL, examples

    arguments = TrainingArguments(folder, per_device_eval_batch_size=2, report_to="none", disable_tqdm=True)
    trainer = Trainer(model=build_tiny(FAMILY), args=arguments, eval_dataset=examples(NUM_EVAL, seed=1))
    return error_of(trainer.evaluate)


def error_of(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def test_a_model_without_an_optimizer_is_refused_by_accelerate_as_without_moe_config():
    stock, ours = run_ranks(prepare_alone, 2), run_ranks(prepare_alone, 2, with_moe_config(ep_size=2))
    assert "a model and optimizer must be passed together" in stock[0]
    assert ours == stock


def test_so_is_trainer_that_evaluates_without_training(tmp_path):
    stock = run_ranks(evaluate_with_trainer, 2, folder=str(tmp_path))
    ours = run_ranks(evaluate_with_trainer, 2, with_moe_config(ep_size=2), folder=str(tmp_path))
    assert "a model and optimizer must be passed together" in stock[0]
    assert ours == stock
