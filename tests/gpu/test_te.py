"""TransformerEngine on a GPU: experts under `kernels: te` are right, and its FusedAdam trains and resumes.

run: PYTHONPATH=FOLDER_WITH_TE python3 -m pytest -q -m gpu tests/gpu/test_te.py -c /dev/null --rootdir .
"""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from moe_accel import MoEConfig, experts
from moe_accel.kernels import te_parts
from moe_accel.plugin import reports
from tests.families import build_tiny
from tests.gpu.test_experts import BF16_SLACK, FAMILIES, by, computed, module_and_inputs
from tests.gradients import relative_error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WHY_NOT = te_parts.problem(DEVICE, "experts")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=f"kernels=te cannot be used: {WHY_NOT}")]


def by_te(module, *inputs):
    experts.register()
    experts.install(module, experts.Settings("te"))
    return module(*inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_about_as_close_to_fp64_as_native(family):
    module, (x, choices, weights) = module_and_inputs(family)
    eager = type(module).forward.__wrapped__
    truth = computed(module.double(), eager, x.double(), choices, weights.double())
    module = module.bfloat16()
    native = computed(module, by("grouped_mm"), x, choices, weights)
    for name, values in computed(module, by_te, x, choices, weights).items():
        error, allowed = relative_error(values, truth[name]), relative_error(native[name], truth[name])
        assert values.dtype == native[name].dtype
        assert error <= BF16_SLACK * allowed + 1e-6, f"{name}: {error:.2e}, native {allowed:.2e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_without_rows_give_no_values_and_zero_gradients(family):
    module, (x, choices, weights) = module_and_inputs(family)
    few = torch.zeros_like(choices[:, :1]), weights[:, :1]
    for inputs in ((x, *few), (x[:0], choices[:0], weights[:0])):
        fused, found = (computed(module, how, *inputs) for how in (by("moe_accel"), by_te))
        for name, expected in fused.items():
            assert (found[name].float() - expected.float()).norm() <= 0.02 * expected.float().norm(), name


def test_prepare_says_whose_the_products_are():
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(parallelism_config=MoEConfig(kernels="te"))
    model = accelerator.prepare(build_tiny("qwen3_moe", torch.bfloat16))
    index = torch.arange(32, device=DEVICE).view(2, 16)
    model(input_ids=index, labels=index).loss.backward()
    (report,) = reports(accelerator)
    assert (report.kernels.value, "TransformerEngine" in report.kernels.reason) == ("te", True)
    assert all(torch.isfinite(each.grad).all() for each in model.parameters() if each.grad is not None)


def trained(model, optimizer, steps):
    losses = []
    for step in steps:
        index = (torch.arange(64, device=DEVICE).view(4, 16) * (step + 3)) % 64
        loss = model(input_ids=index, labels=index).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_fused_adam_with_reduced_states_learns_and_resumes():
    from transformer_engine.pytorch.optimizers import FusedAdam

    how = {"master_weights": True, "store_param_remainders": True}
    how |= {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}
    model = build_tiny("qwen3_moe", torch.bfloat16).to(DEVICE)
    names = list(model.state_dict())
    optimizer = FusedAdam(model.parameters(), lr=1e-3, **how)
    first = trained(model, optimizer, range(10))
    assert first[-1] < first[0]
    again = copy.deepcopy(model)
    other = FusedAdam(again.parameters(), lr=1e-3, **how)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected, found = trained(model, optimizer, range(10, 15)), trained(again, other, range(10, 15))
    assert found == pytest.approx(expected, rel=1e-3)
    assert list(model.state_dict()) == names
    assert {each.dtype for each in model.state_dict().values()} == {torch.bfloat16}
