"""Large parameters of a fused AdamW under FSDP2: this rank's parts are updated by our kernel, as torch updates them.

Its definition in torch stands for the kernel, which needs a GPU.
"""

from typing import Any

import pytest
import torch

from moe_accel import optimizer
from moe_accel.kernels import adam
from tests.dist import training
from tests.dist.ranks import run_ranks, with_moe_config
from tests.dist.training import Job
from tests.families import tiny_inputs, tiny_loss

JOB = Job()
STEPS = 3


def before_fork(**_: Any) -> None:
    """Import the job's modeling file once for all ranks."""
    training.before_fork(JOB)


def trained(ours: bool) -> tuple[list[tuple[int, ...]], set[str], dict[str, torch.Tensor]]:
    """Shapes that `adam.step` updated, classes that torch's own did, and this rank's parts of all after some steps."""
    from accelerate import Accelerator

    updated, left, by_torch = [], set(), torch._fused_adamw_

    def fused(parameters: list[torch.Tensor], *lists: list[torch.Tensor], **numbers: Any) -> None:
        left.update(type(each).__name__ for each in (*parameters, *lists[0], *lists[1], *lists[2]))
        by_torch(parameters, *lists, **numbers)

    torch._fused_adamw_ = fused

    def step(parameter: torch.Tensor, *args: Any) -> None:
        updated.append(tuple(parameter.shape))
        adam.step_torch(parameter, *args)

    adam.step, optimizer.LARGE = step, 100
    optimizer.use_triton = optimizer._has_kernels = lambda _: ours
    accelerator = Accelerator()
    model = training.initial_model(JOB)
    options = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}
    model, optim = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), fused=True, **options))
    for number in range(STEPS):
        inputs = tiny_inputs(JOB.family, seed=10 * number + accelerator.process_index)
        accelerator.backward(tiny_loss(model, inputs))
        optim.step()
        optim.zero_grad()
    return updated, left, {name: each.to_local().clone() for name, each in model.named_parameters()}


@pytest.mark.parametrize("ep_size", [1, 2])
def test_parts_of_parameters_are_updated_as_by_torch(ep_size):
    environment = with_moe_config(ep_size=ep_size)
    expected = run_ranks(trained, 2, environment, ours=False)
    found = run_ranks(trained, 2, environment, ours=True)
    for (updated, left, ours), (none, all_of_them, theirs) in zip(found, expected, strict=True):
        assert not none
        assert (left, all_of_them) == ({"Tensor"}, {"DTensor"})
        assert len(updated) == STEPS * sum(each.numel() >= 100 for each in ours.values())
        assert 0 < len(updated) < STEPS * len(ours)
        for name, each in theirs.items():
            torch.testing.assert_close(ours[name], each, rtol=1e-5, atol=1e-6, msg=name)


def stepped(ours: bool) -> list[torch.Tensor]:
    """Two small parameters after a step, the gradient of one spread in another way than it: torch takes no mixture."""
    from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor

    torch.distributed.init_process_group("gloo")
    mesh, generator = DeviceMesh("cpu", range(2)), torch.Generator().manual_seed(0)
    optimizer.use_triton = optimizer._has_kernels = lambda _: ours
    made = []
    for placement in (Shard(0), Replicate()):
        value, gradient = (torch.randn(6, 4, generator=generator) for _ in range(2))
        made.append(torch.nn.Parameter(distribute_tensor(value, mesh, [Shard(0)])))
        made[-1].grad = distribute_tensor(gradient, mesh, [placement])
    optim = torch.optim.AdamW(made, lr=0.1, fused=True)
    optimizer.install(optim, torch.device("cpu"))
    optim.step()
    return [each.full_tensor().detach() for each in made]  # pyright: ignore[reportAttributeAccessIssue]


def test_a_gradient_that_is_spread_in_another_way_is_left_to_torch():
    by_ours, by_torch = (run_ranks(stepped, 2, ours=ours) for ours in (True, False))
    for found, expected in zip(by_ours, by_torch, strict=True):
        assert all(map(torch.equal, found, expected))
