"""Adapters in the GEMMs of the experts that a rank has alone: PEFT's training, and files as ever."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import training
from tests.dist.parity import as_one, assert_same_training
from tests.dist.ranks import run_ranks, with_moe_config
from tests.dist.training import LORA, Job, Trained, reference
from tests.families import experts_modules

JOB = Job(lora=LORA, lengths=(training.SEQUENCE,) * 2)


def before_fork(job: Job = JOB, **_: Any) -> None:
    """Import the job's modeling file once for all ranks."""
    training.before_fork(job)


def everywhere() -> list[bool]:
    """Join on the CPU, too; what `noting` notes."""
    from moe_accel.experts import joined
    from tests.unit.expert_adapters import noting

    found: list[bool] = []
    joined.Projection.product = noting(joined.Projection.product, found)  # in a process of its own
    joined.takes_torch_grouped_mm = lambda *_: True
    return found


def on_ranks(job: Job, **how: Any) -> tuple[Trained, list[bool]]:
    used = everywhere()
    return training.on_ranks(job, **how), used


def trained(job: Job, ep_size: int, variables: dict[str, str] | None = None, **how: Any) -> tuple[Trained, list[bool]]:
    environment = with_moe_config(ep_size=ep_size) | (variables or {})
    ranks = run_ranks(on_ranks, len(job.lengths), environment, job=job, **how)
    return as_one([rank for rank, _ in ranks]), [each for _, used in ranks for each in used]


@pytest.mark.parametrize(
    ("job", "variables", "how"),
    [
        (JOB, {}, {}),
        (JOB, {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}),
        (JOB, {}, {"gradient_checkpointing": "non-reentrant"}),
        (JOB, {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, {}),
        (JOB, {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {"garbage": True}),
        (dataclasses.replace(JOB, lengths=(13, 4)), {}, {}),
        (dataclasses.replace(JOB, accumulate=2), {}, {}),
        (dataclasses.replace(JOB, family="gpt_oss"), {}, {}),
        (dataclasses.replace(JOB, lengths=(13,) * 4), {}, {}),
    ],
    ids=[
        "plain", "checkpointed-by-fsdp", "checkpointed", "no-wrap", "ram-efficient", "uneven", "accumulate2", "gpt-oss",
        "ep4",
    ],
)  # fmt: skip
def test_training_is_that_of_peft_in_one_process(job, variables, how):
    tried, used = trained(job, len(job.lengths), variables, **how)
    assert_same_training(tried, reference(job), job)
    assert used
    assert all(used)


def test_experts_that_ranks_share_have_adapters_beside():
    job = dataclasses.replace(JOB, lengths=(13,) * 4)
    tried, used = trained(job, 2)
    assert_same_training(tried, reference(job), job)
    assert used
    assert not any(used)


def saved_and_read(folder: Path) -> tuple[bool, list[str]]:
    """Whether a state was read as it was written and adapters are joined again; and the base weights that a model file
    has other bits of than the model had."""
    from accelerate import Accelerator

    from moe_accel.experts.weights import local

    used = everywhere()
    accelerator = Accelerator()
    model = training.initial_model(JOB)
    before = _base(model)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))

    def step() -> tuple[float, list[torch.Tensor]]:
        loss = next(training.losses_of(JOB, model, 0, accelerator.process_index))
        accelerator.backward(loss)
        gradients = [local(each.grad).clone() for each in model.parameters() if each.grad is not None]
        optimizer.zero_grad()
        return loss.item(), gradients

    first = step()
    accelerator.save_state(str(folder / "state"))
    modules: list[Any] = [module for _, module in experts_modules(model)]
    whole = all(local(module.down_proj).is_contiguous() for module in modules)
    with torch.no_grad():
        for parameter in model.parameters():
            local(parameter).zero_()
    accelerator.load_state(str(folder / "state"))
    used.clear()
    again = step()
    joined_again = bool(used) and all(used) and not any(local(module.down_proj).is_contiguous() for module in modules)
    same = first[0] == again[0] and all(map(torch.equal, first[1], again[1]))
    found = _base(model)
    assert found.keys() == before.keys()
    return whole and joined_again and same, [name for name in before if not torch.equal(found[name], before[name])]


def _base(model: Any) -> dict[str, torch.Tensor]:
    """Copies of all but adapters, whole."""
    return training.whole({name: each for name, each in model.state_dict().items() if "lora_" not in name})


def test_weights_leave_for_a_state_dict_and_are_joined_again(tmp_path):
    assert run_ranks(saved_and_read, 2, with_moe_config(ep_size=2), folder=tmp_path) == [(True, [])] * 2
