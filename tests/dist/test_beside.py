"""Shared experts beside dispatch on ranks: training is that of one process, recomputed and prefetched as ever.

`test_parity_families` has more families and sizes; here it is made sure that calls were moved, and how many.
"""

import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.dist import training
from tests.dist.parity import TOLERANCE, as_one, assert_same_gradients, assert_same_training
from tests.dist.ranks import ROOT, run_ranks, with_moe_config
from tests.dist.training import Job, Trained, reference

LATE, EARLY = "glm4_moe", "qwen2_moe"
"""Families whose blocks call the shared expert after the experts, and before."""

TWO_RANKS = (training.SEQUENCE,) * 2
ADAPTED = (("target_modules", r".*shared_experts?\.down_proj|.*o_proj"), ("r", 2))


def before_fork(job: Job, **_: Any) -> None:
    training.before_fork(job)
    if job.lora is not None:
        import peft  # noqa: F401


def counted(job: Job, **how: Any) -> tuple[Trained, int]:
    """What came of the job on this rank, and how many calls of shared experts were moved."""
    from moe_accel.dispatch import alltoall

    moved, travel = 0, alltoall.travel

    def counting(x: Any, weights: Any, transfer: Any, beside: Any = None, scale: float = 1.0) -> Any:
        nonlocal moved
        moved += beside is not None
        return travel(x, weights, transfer, beside, scale)

    alltoall.travel = counting  # in a process of its own
    return training.on_ranks(job, **how), moved


def case(name: str, family: str, num_ranks: int = 2, slow: bool = False, **how: Any) -> Any:
    job = Job(family, lengths=(training.SEQUENCE,) * num_ranks, num_steps=2, lora=how.pop("lora", None))
    return pytest.param(job, how, id=f"{family}-{name}", marks=pytest.mark.slow if slow else ())


CASES = [
    case("plain", LATE, slow=True),
    case("plain", EARLY, slow=True),
    case("non-reentrant", LATE, slow=True, gradient_checkpointing="non-reentrant"),
    case("non-reentrant", EARLY, gradient_checkpointing="non-reentrant"),
    case("reentrant", LATE, slow=True, gradient_checkpointing="reentrant"),
    case("reentrant", EARLY, slow=True, gradient_checkpointing="reentrant"),
    case("prefetched-and-recomputed", LATE, num_ranks=4, by_fsdp="true"),
    case("prefetched-and-recomputed", EARLY, num_ranks=4, slow=True, by_fsdp="true"),
    case("prefetched", EARLY, num_ranks=4, slow=True),
    case("lora", "hy_v3", slow=True, lora=ADAPTED, gradient_checkpointing="non-reentrant"),
    case("lora", EARLY, slow=True, lora=ADAPTED),
]
"""With 4 ranks and ep 2, experts are sharded over groups, and FSDP2 prefetches by explicit lists."""


@pytest.mark.parametrize(("job", "how"), CASES)
def test_training_is_that_of_one_process(job, how):
    how = dict(how)
    by_fsdp = how.pop("by_fsdp", "false")
    environment = with_moe_config(ep_size=2) | {"FSDP_ACTIVATION_CHECKPOINTING": by_fsdp}
    ranks = run_ranks(counted, len(job.lengths), environment, job=job, **how)
    forwards = 2 * job.num_steps  # of two layers
    recomputed = forwards if by_fsdp == "true" or "gradient_checkpointing" in how else 0
    assert [moved for _, moved in ranks] == [forwards + recomputed] * len(ranks)
    tried, truth = as_one([rank for rank, _ in ranks]), reference(job)
    if job.lora is None:
        return assert_same_training(tried, truth, job)
    assert tried.losses[0] == pytest.approx(truth.losses[0], rel=TOLERANCE)
    assert_same_gradients(tried, truth)  # too small to be clipped
    assert any("shared" in name and each is not None and each.any() for name, each in tried.gradients.items())


def at_ep_1(job: Job) -> list[str]:
    """Classes of a prepared model that are not as they were."""
    from accelerate import Accelerator

    from moe_accel.experts.beside import BlockBeside, SharedBeside

    model = training.initial_model(job)
    model, _ = Accelerator().prepare(model, torch.optim.AdamW(model.parameters()))
    return [name for name, each in model.named_modules() if isinstance(each, BlockBeside | SharedBeside)]


@pytest.mark.parametrize("family", [LATE, pytest.param(EARLY, marks=pytest.mark.slow)])
def test_at_ep_size_1_nothing_changes(family):
    job = Job(family, lengths=TWO_RANKS)
    assert run_ranks(at_ep_1, 2, with_moe_config(ep_size=1), job=job) == [[], []]


@pytest.mark.slow
def test_the_measurement_runs_without_a_gpu():
    command = ["-m", "tests.gpu.beside", "--device", "cpu", "--tokens", "32", "--steps", "1", "--checkpointing"]
    done = subprocess.run(
        [sys.executable, *command, "--shapes", "deepseek-v3"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "deepseek-v3, alltoall, checkpointing" in done.stdout
    assert "shared experts of 2 of 2 layers computed while tokens travel" in done.stdout
    assert done.stdout.endswith("all the same\n")
