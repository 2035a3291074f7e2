"""`kept_layers: auto` on ranks: all keep the same, what the rank with least room can, and train as one process."""

from typing import Any

import pytest

from tests.dist import training
from tests.dist.parity import as_one, assert_same_training
from tests.dist.ranks import run_ranks, with_moe_config
from tests.dist.training import Job, Trained, reference

JOB = Job(config=(("num_hidden_layers", 3),), lengths=(13, 9, 13, 5), num_steps=5)
BASE = 10_000


def before_fork(**_: Any) -> None:
    """Import the job's modeling file once for all ranks."""
    training.before_fork(JOB)


def train(job: Job, room: tuple[int, ...], **how: Any) -> tuple[Trained, list[tuple[int, ...]]]:
    """The job on this rank, whose device has room for so many layers of 26 tokens; and what was kept, step by step."""
    import os

    from torch import nn
    from transformers.modeling_layers import GradientCheckpointingLayer

    from moe_accel.kept import memory
    from tests.fake_memory import FakeMemory

    num_layers, rank = dict(job.config)["num_hidden_layers"], int(os.environ["RANK"])
    tokens = 26
    total = round((BASE + (num_layers + 1) * tokens + room[rank] * 30 * tokens + 1) / (1 - memory.MARGIN))
    device = FakeMemory(total, BASE, lambda tokens: 31 * tokens)
    memory.memory_of = lambda _device: device
    seen: list[tuple[int, ...]] = []

    def after(module: nn.Module, _args: Any, _output: Any) -> None:
        layers = [each for each in module.modules() if isinstance(each, GradientCheckpointingLayer)]
        if len(layers) == num_layers and type(module).__name__ == "Qwen3MoeModel":
            seen.append(tuple(at for at, layer in enumerate(layers) if not layer.gradient_checkpointing))

    nn.modules.module.register_module_forward_hook(after)
    return training.on_ranks(job, **how), seen


@pytest.mark.parametrize(
    "ep_size", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("how", ["transformers", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_all_ranks_keep_what_the_rank_with_least_room_can(ep_size, how):
    environment = with_moe_config(ep_size=ep_size, kept_layers="auto")
    options = {"gradient_checkpointing": "non-reentrant"} if how == "transformers" else {}
    if how == "fsdp":
        environment["FSDP_ACTIVATION_CHECKPOINTING"] = "true"
    ranks = run_ranks(train, 4, environment, job=JOB, room=(3, 3, 2, 3), **options)
    assert [seen for _, seen in ranks] == [[(), (), (2,), (1, 2), (1, 2)]] * 4
    assert_same_training(as_one([trained for trained, _ in ranks]), reference(JOB), JOB)
