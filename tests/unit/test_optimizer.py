"""A fused Adam or AdamW of torch whose large parameters are updated by our kernel: the same training, whoever does it.

The kernel itself is checked on the interpreter (`interpreted_kernels.py`) and on a GPU (`tests/gpu/test_adam.py`); here
its definition in torch stands for it.
"""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Adam, AdamW

from moe_accel import MoEConfig, optimizer
from moe_accel.kernels import adam
from tests.families import build_tiny

SHAPES = {"large": (16, 8), "transposed": (8, 16), "small": (5,), "frozen": (64, 2)}
STEPS = 3


@pytest.fixture
def updated(monkeypatch):
    """Shapes that our `step` updated, where it computes on the CPU and 100 elements are many."""
    found = []

    def step(parameter, *args):
        found.append(tuple(parameter.shape))
        adam.step_torch(parameter, *args)

    monkeypatch.setattr(optimizer, "LARGE", 100)
    monkeypatch.setattr(optimizer, "use_triton", lambda _: True)
    monkeypatch.setattr(optimizer, "_has_kernels", lambda _: True)
    monkeypatch.setattr(adam, "step", step)
    monkeypatch.setattr(Adam, "_init_group", Adam._init_group)  # both as they were, after the test
    monkeypatch.setattr(AdamW, "_init_group", Adam._init_group)
    monkeypatch.delattr(AdamW, "_init_group")
    return found


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    made["transposed"] = made["transposed"].t()
    return {name: nn.Parameter(value, requires_grad=name != "frozen") for name, value in made.items()}


def train(made, optim, steps=STEPS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in made.values():
            if parameter.requires_grad:
                gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
        optim.step()


def pair(kind=AdamW, dtype=torch.float32, **options):
    """Parameters and optimizer of torch, and the same with ours."""
    options = {"lr": 1e-2, "fused": True} | options
    theirs, ours = parameters(dtype), parameters(dtype)
    made = kind(theirs.values(), **options), kind(ours.values(), **options)
    optimizer.install(made[1], torch.device("cpu"))
    return (theirs, made[0]), (ours, made[1])


def same(theirs, ours, optims, rtol=1e-6, atol=1e-7):
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=atol, msg=name)
    one, other = (optim.state_dict() for optim in optims)
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for index, of_torch in one["state"].items():
        assert of_torch.keys() == other["state"][index].keys()
        for key, value in of_torch.items():
            torch.testing.assert_close(other["state"][index][key], value, rtol=rtol, atol=atol)


@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"weight_decay": 0.0, "betas": (0.8, 0.95), "eps": 1e-4}])
@pytest.mark.parametrize(("kind", "more"), [(AdamW, {}), (AdamW, {"weight_decay": 0.3}), (Adam, {"weight_decay": 0.3})])
def test_training_is_that_of_torch(updated, kind, more, options):
    (theirs, of_torch), (ours, optim) = pair(kind, **(more | options))
    start = ours["large"].detach().clone()
    train(theirs, of_torch)
    assert not updated
    train(ours, optim)
    assert updated == [(16, 8), (16, 8)] * STEPS
    same(theirs, ours, (of_torch, optim))
    assert torch.equal(theirs["small"], ours["small"])
    assert (ours["large"] - start).abs().min() > 0


def test_bf16_is_rounded_once(updated):
    (theirs, of_torch), (ours, optim) = pair(dtype=torch.bfloat16, weight_decay=0.1)
    train(theirs, of_torch, 1)
    train(ours, optim, 1)
    assert len(updated) == 2
    same(theirs, ours, (of_torch, optim), rtol=2.0**-8, atol=0)


def test_groups_schedules_and_saved_states_are_torchs(updated):
    (theirs, of_torch), (ours, optim) = pair()
    for made, each in ((theirs, of_torch), (ours, optim)):
        added = nn.Parameter(torch.linspace(-1, 1, 120).view(10, 12))
        made["added"] = added
        each.add_param_group({"params": [added], "lr": 3e-2, "weight_decay": 0.5})
        schedule = torch.optim.lr_scheduler.LambdaLR(each, lambda step: 1 / (1 + step))
        for _ in range(2):
            train(made, each, 1)
            schedule.step()
    assert updated == [(16, 8), (16, 8), (10, 12)] * 2
    same(theirs, ours, (of_torch, optim))
    crossed = copy.deepcopy(optim.state_dict()), copy.deepcopy(of_torch.state_dict())
    for each, state in zip((of_torch, optim), crossed, strict=True):
        each.load_state_dict(state)
    train(theirs, of_torch, seed=2)
    train(ours, optim, seed=2)
    same(theirs, ours, (of_torch, optim))


class Derived(AdamW):
    """Somebody's own: may do anything."""


LEFT = {
    "amsgrad": (AdamW, {"amsgrad": True}),
    "tensor lr": (AdamW, {"lr": torch.tensor(1e-2)}),
    "foreach": (AdamW, {"fused": False, "foreach": True}),
    "derived": (Derived, {}),
}


@pytest.mark.parametrize("first", [True, False])
def test_dynamo_may_give_the_optimizer_a_method_of_its_own(updated, monkeypatch, first):
    """It does at the first torch.compile of a process."""
    if first:
        monkeypatch.setattr(AdamW, "_init_group", torch._dynamo.disable(Adam._init_group))
    (theirs, of_torch), (ours, optim) = pair()
    if not first:
        monkeypatch.setattr(AdamW, "_init_group", torch._dynamo.disable(AdamW._init_group))
    train(theirs, of_torch)
    assert not updated
    train(ours, optim)
    assert updated == [(16, 8), (16, 8)] * STEPS
    same(theirs, ours, (of_torch, optim))


@pytest.mark.parametrize("kind", [Adam, AdamW])
@pytest.mark.parametrize("says_so", [True, False], ids=["torch 2.13", "torch 2.11"])
def test_a_step_that_is_compiled_is_made_once(updated, monkeypatch, kind, says_so):
    """Dynamo collects parameters while it compiles, which is no step; `is_compiling` says so from torch 2.13 on."""
    if not says_so and hasattr(torch.compiler, "_compile_session_context"):
        monkeypatch.setattr(torch.compiler, "_compile_session_context", contextlib.nullcontext)
    torch._dynamo.reset()
    (theirs, of_torch), (ours, optim) = pair(kind)
    step = torch.compile(optim.step, backend="eager")
    for _ in range(STEPS):
        train(theirs, of_torch, 1)
        train(ours, SimpleNamespace(step=step), 1)
    assert len(updated) in (0, 2 * STEPS)  # compiled by torch, or not compiled
    same(theirs, ours, (of_torch, optim))


def test_step_numbers_may_have_one_element(updated):
    (theirs, of_torch), (ours, optim) = pair()
    for made, each in ((theirs, of_torch), (ours, optim)):
        train(made, each, 1)
        number = each.state[made["large"]]["step"]
        each.state[made["large"]]["step"] = number.reshape(1)
        train(made, each, 1, seed=2)
    assert len(updated) == 4
    same(theirs, ours, (of_torch, optim))


@pytest.mark.parametrize(("kind", "options"), LEFT.values(), ids=LEFT)
def test_what_the_kernel_does_not_compute_is_left_to_torch(updated, kind, options):
    (theirs, of_torch), (ours, optim) = pair(kind, **options)
    train(theirs, of_torch)
    train(ours, optim)
    assert not updated
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_a_step_that_a_scaler_may_skip_is_left_to_torch(updated):
    _, (ours, optim) = pair()
    optim.found_inf = torch.tensor(1.0)
    before = ours["large"].detach().clone()
    train(ours, optim, 1)
    assert not updated
    assert torch.equal(ours["large"], before)
    del optim.found_inf
    train(ours, optim, 1)
    assert updated


def test_tensors_that_lie_differently_in_memory_are_left_to_torch(updated):
    (theirs, of_torch), (ours, optim) = pair()
    for made, each in ((theirs, of_torch), (ours, optim)):
        train(made, each, 1)
        made["large"].grad = torch.ones(8, 16).t()
        made["transposed"].grad = None
        each.step()
    assert updated == [(16, 8)] * 2  # both in the first step alone
    same(theirs, ours, (of_torch, optim))


def test_an_optimizer_that_is_not_fused_is_told_what_that_costs(updated, capsys):
    pair(fused=None)
    assert "AdamW(..., fused=True) takes a quarter of the time" in capsys.readouterr().err


def test_without_kernels_nothing_is_changed_or_said(capsys):
    _, (ours, optim) = pair()
    train(ours, optim, 1)
    assert optim not in optimizer._installed
    assert not capsys.readouterr().err


@pytest.mark.usefixtures("new_accelerate_state")
@pytest.mark.parametrize("kernels", ["fused", "reference"])
def test_prepare_takes_the_optimizer_unless_kernels_are_transformers(updated, capsys, kernels):
    model = build_tiny("qwen3_moe", torch.float32)
    given = AdamW(model.parameters(), fused=True)
    accelerator = Accelerator(cpu=True, parallelism_config=MoEConfig(kernels=kernels))
    model, prepared = accelerator.prepare(model, given)
    assert accelerator.prepare_optimizer(optimizer=prepared) is prepared
    assert (given in optimizer._installed) is (kernels == "fused")
    for _ in range(2):
        for each in model.parameters():
            each.grad = torch.ones_like(each)
        prepared.step()
    assert bool(updated) is (kernels == "fused")
    said = capsys.readouterr().err
    assert said.count("moe-accel: AdamW updates each large parameter in one pass") == (kernels == "fused")
